# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # What carries the difference between thinking off and a chain of thought?
#
# Run the model once with thinking off (it refuses) and once under a chain of thought (it does not). Put single activations of the one
# run into the other, and see how much of the difference comes with them.

# %%
import rim_lens as rl

model = rl.load_model("toy")
chat = rl.ChatFormat.from_model(model)
harmful = rl.load_prompts("harmful", language="toy", split="evaluate")[::2]
off = chat.render(harmful, think="off")
cot = chat.render(harmful, think=chat.cots(harmful, "careful"))
off_score, cot_score = (rl.refusal_score(model, batch) for batch in (off, cot))
print(
    f"refusal score: off {float(off_score.mean()):+.1f} nats, under a chain of thought {float(cot_score.mean()):+.1f}"
)

# %% [markdown]
# Denoising: what each head wrote with thinking off, at the last prompt token, put into the run with the chain. `recovered` is its share
# of the whole difference. **Look for** few heads with much of it, and at `p`, which is corrected over all cells of the table.

# %%
into_cot = rl.patching_table(
    rl.head_patching(model, target=cot, source=off, positions="prompt_last")
)
into_cot.head(5).round(3)

# %% [markdown]
# Noising: the other way round. A head that is needed and one that is enough are different things; hold the two tables together.

# %%
into_off = rl.patching_table(
    rl.head_patching(model, target=off, source=cot, positions="prompt_last")
)
both = into_cot.merge(
    into_off, on=["layer", "head"], suffixes=("_into_cot", "_into_off")
)
both[["layer", "head", "recovered_into_cot", "recovered_into_off"]].head(5).round(2)

# %% [markdown]
# As a map: effects are an xarray, and any plotting library takes one. Nats of refusal score, layer 0 at the top.

# %%
import plotly.express as px

grid = rl.head_patching(model, target=cot, source=off, positions="prompt_last")[
    "effect"
].mean("prompt")
px.imshow(
    grid,
    labels={"x": "head", "y": "layer", "color": "nats"},
    color_continuous_scale="Blues",
    aspect="auto",
    height=260,
)

# %% [markdown]
# Which span carries it? The residual stream of a whole span, before a layer, from the other run.

# %%
spans = rl.patching_table(rl.span_patching(model, target=cot, source=off))
spans.head(6).round(2)

# %% [markdown]
# And without a second run: the answer may not look at the chain of thought at all. If refusal comes back, it was attention to the chain
# that took it away. **Look at the filler too**: what blocking filler brings back as well is not about what the chain says.

# %%
filler = rl.render_conditions(chat, harmful, ["filler"])["filler"]
for name, batch in (("careful", cot), ("filler", filler)):
    blocked = rl.refusal_score(
        model, batch, rl.BlockAttention("prompt_last", "cot")
    )
    print(
        f"{name:>8}: {float(rl.refusal_score(model, batch).mean()):+.1f} → {float(blocked.mean()):+.1f} nats"
    )

# %% [markdown]
# **Not shown**: patching says what is enough to carry a difference between these two runs. What both runs share, it cannot see.
# Next: [safety neurons](safety_neurons.py).
