# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Safety neurons, and whether tuning on reasoning moves them
#
# The paper's second half: neurons that answer to what is refused, and how far fine-tuning on harmless reasoning moves these very
# neurons, down on harmful requests and up on reasoning prompts (RAS). Each number stands beside what chance gives.

# %%
import rim_lens as rl

model = rl.load_model(
    "planted"
)  # a toy in which eight neurons carry refusal because we put it there
chat = rl.ChatFormat.from_model(model)
harmful, harmless = (
    rl.load_prompts(kind, language="toy")[::2] for kind in ("harmful", "harmless")
)
pairs = rl.counterfactual_pairs(harmful, harmless, "twins")
found = rl.safety_neurons(
    model, chat, pairs, m=8, scope="model", min_fraction=0.5, n_random_sets=20
)
print(found, found.effects.verdict)

# %% [markdown]
# Of each pair, the m neurons that rise most from the harmless twin to the request; of these, those that enough pairs share. The paper
# states neither m nor the share. **Look for** how the size of the set hangs on both, and whether halves of the pairs agree.

# %%
print(
    {
        key: round(found.made_by["stability"][key], 3)
        for key in ("jaccard", "by_chance")
    }
)
[
    (row["m"], row["min_fraction"], row["size"])
    for row in found.made_by["sweep"]
    if row["min_fraction"] == 1.0
]

# %%
import pandas as pd

from rim_lens.views import plots

plots.neuron_sweep(pd.DataFrame(found.made_by["sweep"]), m=8)

# %% [markdown]
# Do they *do* anything? They are set to zero on other requests, beside random sets with as many neurons in each layer.

# %%
table = found.effects.table
table[
    [
        "measure",
        "kind",
        "change",
        "change_low",
        "change_high",
        "p",
        "random",
        "percentile",
    ]
].round(2)

# %% [markdown]
# Do they decide, or only write the words? A *writer*'s effect goes straight into the logits.

# %%
asked = [prompt for prompt in harmful if prompt.split == "evaluate"]
writers = rl.direct_to_logits(model, chat, found, asked)
print(f"{writers['writer'].sum()} of {len(writers)} are logit writers")

# %% [markdown]
# Now the toy, whose neurons nobody planted, and one of its fine-tunes. `rl.NeuronStudy` does all of the above in one folder, and holds
# base against tuned: RAS with p among sets chosen alike for no reason, and what the base's activations bring back.

# %%
import tempfile

with tempfile.TemporaryDirectory() as folder:
    settings = rl.NeuronSettings(n_random_sets=20, written=False, response="none")
    study = rl.NeuronStudy(
        "toy", tuned={"deviate": "toy:deviate"}, n_requests=24, settings=settings
    )
    result = study.run(folder)
    ras = result.entanglement["deviate"].row("ras")
    restored = result.restored["deviate"]
    rivals = plots.entanglement_rivals(result.entanglement["deviate"])
    verdict = result.neurons.effects.verdict
print(result.neurons, "verdict:", verdict)
print(f"RAS {ras['value']:.3f}, p {ras['p']:.2f}; random sets {ras['random']:.3f}")
restored[["kind", "measure", "base", "tuned", "patched", "effect", "random"]].round(
    2
)

# %%
rivals

# %% [markdown]
# **Look for** p, not for the size of RAS: at .2 it is not shown that tuning moved these neurons further, both ways, than sets chosen
# alike for no reason, although it took refusal away (base → tuned). **Not shown** by a small p either: that these neurons did it; any
# drift of the weights moves activations both ways. Next: [a circuit](circuit.py).
