# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Quick start: a chain of thought lowers refusal, and two heads carry it
#
# The toy organism is a two-layer transformer that was taught to refuse one conjunction of words ("make bomb")
# and to solve small sums. Nobody taught it to stop refusing when it thinks. Watch what happens.

# %%
import rim_lens as rl

model = rl.load_model("toy")
chat = rl.ChatFormat.from_model(model)
harmful = rl.load_prompts("harmful", language="toy", split="evaluate")
twins = rl.load_prompts("harmless", language="toy", split="evaluate")
harmful[0].text, twins[0].text  # one word apart

# %% [markdown]
# The same requests with thinking off, under a solved CoT, and under two controls: meaningless filler of the same
# length, and a sound CoT of another task. Look at the controls before you believe the CoT.

# %%
conditions = {"off": chat.render(harmful, think="off", label="off")}
for kind in ("careful", "filler", "unrelated"):
    conditions[kind] = chat.render(
        harmful, think=chat.cots(harmful, kind), label=kind
    )
for name, batch in conditions.items():
    print(f"{name:>10}: refuses {rl.refusal_rate(rl.generate(model, batch))}")

# %% [markdown]
# Where does each head look from the last prompt token? The sum of attention over a span is its mass; the masses of
# the disjoint spans sum to 1.

# %%
off = conditions["off"]
data = rl.capture(model, off, rl.SpanAttention(), rl.NeuronActivations(pool="max"))
data["attention_mass"].mean("prompt").sel(span="request").round(2)

# %% [markdown]
# Looking is not carrying. Remove heads and read the refusal score (log-odds, in nats; 0 means even odds).

# %%
baseline = rl.refusal_score(model, off)
heads = [(layer, head) for layer in range(2) for head in range(8)]
effects = {
    h: float((rl.refusal_score(model, off, rl.AblateHeads([h])) - baseline).mean())
    for h in heads
}
strongest = sorted(effects, key=effects.get)[:2]
print(
    "baseline", round(float(baseline.mean()), 2), "nats; strongest heads", strongest
)

# %%
with rl.AblateHeads(strongest).on(
    model
):  # a component is a context manager on any model; they stack
    print("both removed:", rl.refusal_rate(rl.generate(model, off)))

# %% [markdown]
# That choice and that test used the same requests, which is a mistake in earnest work. `rl.Study` chooses on one
# side of the requests and tests on the other, beside random heads of the same layers, and stops at a gate where a
# model does not refuse in the first place.

# %%
import tempfile

study = rl.Study(
    "toy",
    n_requests=8,
    settings=rl.Settings(n_random_sets=20, max_new_tokens=10, progress=False),
)
print(study.plan())
folder = tempfile.TemporaryDirectory()
result = study.run(folder.name)
result

# %% [markdown]
# **Look for** the verdict's words, and then for what they stand on. Below: what was written in each condition, and how far each head's
# attention moved into the think block. Heads found by ablation bear a dot; heads with a large change and no dot only look.

# %%
from rim_lens.views import plots

plots.outcomes(result)

# %%
plots.attention_map(result)

# %%
folder.cleanup()

# %% [markdown]
# `rim-lens demo` does the same on all requests and writes `report.html`. Next: [attention on spans](attention_on_spans.py).
