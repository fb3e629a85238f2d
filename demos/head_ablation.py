# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Which heads does refusal depend on?
#
# Remove a head and read the refusal score again (log-odds, in nats, that the answer opens with a refusal). Choose on one half of the
# requests, test on the other, and hold what you find against harmless twins and against random heads of the same layers.

# %%
import rim_lens as rl

model = rl.load_model("toy")
chat = rl.ChatFormat.from_model(model)
harmful, harmless = (
    rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")
)

# %%
found = rl.refusal_heads(
    model, chat, harmful, harmless, search=rl.HeadSearch(limit=20, n_random_sets=20)
)
found.table[found.table["tested"]][
    [
        "layer",
        "head",
        "verdict",
        "effect",
        "effect_twins",
        "specificity",
        "p_specific",
    ]
].round(2)

# %% [markdown]
# **Look for** the verdict, and read it in this order: `effect` (removal moves harmful requests), `effect_twins` (does it move twins as
# much? then it is *general*), `p_specific` (is the difference told from chance?). Heads with no effect are called by what they look
# at: *positional* or *sink*, or *none*.

# %%
from rim_lens.views import plots

plots.head_bubbles(found)

# %%
print(found.gate)
print("the set chosen on the select side:", found.found)

# %% [markdown]
# What does removing that set do besides? Its effect should be on harmful requests and little else. `random` is the mean over random
# sets with as many heads in each layer.

# %%
evaluate = [
    rl.load_prompts(kind, language="toy", split="evaluate")[::3]
    for kind in ("harmful", "harmless", "reasoning")
]
removal = rl.removal_effects(
    model,
    chat,
    found,
    *evaluate,
    conditions=["off", "careful"],
    n_random_sets=10,
    n_written=1,
    max_new_tokens=8,
)
shown = removal.table[
    removal.table["measure"].isin(
        ["refuse", "score", "specificity", "correct", "kl"]
    )
]
shown[
    [
        "measure",
        "kind",
        "condition",
        "before",
        "after",
        "change",
        "p",
        "random",
        "percentile",
    ]
].round(2)

# %% [markdown]
# **Look for** the coloured mark outside the grey ones, under harmful requests and not under the others.

# %%
plots.removal_beside_random(removal)

# %% [markdown]
# A head's part need not be all or nothing: scale it, and watch refusal go down and up again.

# %%
off = chat.render(evaluate[0], think="off")
curve = {
    factor: round(
        float(
            rl.refusal_score(
                model, off, rl.ScaleHeads(list(found.found), factor)
            ).mean()
        ),
        2,
    )
    for factor in (0.0, 0.5, 1.0, 1.5)
}
curve

# %% [markdown]
# **Not shown**: that these heads alone do it (others may stand in for each other), nor what they compute. On another seed of the toy
# other heads carry it, and sometimes none by itself. Next: [patching](patching.py).
