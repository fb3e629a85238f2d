# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Where does a head look, with and without a chain of thought?
#
# A chat prompt falls into spans: the request, the assistant header, the think block, the chain of thought in it. The attention mass
# of a head on a span is the sum of one row of its pattern over the span's tokens. Here the row is that of the last prompt token, which
# produces the first word of the answer.

# %%
import rim_lens as rl

model = rl.load_model("toy")
chat = rl.ChatFormat.from_model(model)
harmful, twins = (rl.load_prompts(kind, language="toy", split="evaluate") for kind in ("harmful", "harmless"))
conditions = rl.render_conditions(chat, harmful, ["off", "careful", "filler", "open"])
list(conditions["careful"].spans)

# %% [markdown]
# One pass per condition. The masses of the atoms are shares of one row: they sum to 1, whatever the head.

# %%
reading = {name: rl.capture(model, batch, rl.SpanAttention()) for name, batch in conditions.items()}
off, careful, filler = (
    reading[name]["attention_mass"].mean("prompt") for name in ("off", "careful", "filler")
)
careful.sel(layer=0, head=5).to_series().round(2)

# %% [markdown]
# Which heads look at the request less once there is a chain of thought? **Look for** heads whose change under `careful` is not there
# under `filler`, which has the same length and says nothing: only that part can be about what the chain says.

# %%
change = (careful - off).sel(span="request").to_series()
by_filler = (filler - off).sel(span="request").to_series()
table = change.rename("careful − off").to_frame().join(by_filler.rename("filler − off"))
table.sort_values("careful − off").head(6).round(2)

# %% [markdown]
# The paper's own statistic: the head's argmax key stands on the assistant header in `open`, and in the empty think block in `off`.
# **Look for** heads that do so on harmless twins as well: they are positional, and the statistic alone cannot tell.

# %%
moves = {}
for kind, prompts in (("harmful", harmful), ("harmless", twins)):
    open_, off_ = (
        rl.capture(model, batch, rl.SpanAttention())
        for batch in rl.render_conditions(chat, prompts, ["open", "off"]).values()
    )
    moves[kind] = rl.argmax_shift(open_, off_, enters="think").mean("prompt").to_series()
share = moves["harmful"].rename("harmful").to_frame().join(moves["harmless"].rename("harmless"))
share[share["harmful"] > 0].round(2)

# %% [markdown]
# The head explorer: every head's mass on a span as a map; click a head (or move with the arrow keys) to see both of its patterns with
# the spans marked. The page works offline; in Jupyter `rl.views.HeadExplorer(model, chat, requests)` is the same with a live kernel,
# where heads can be ablated or scaled.

# %%
view = rl.views.head_view(model, chat, harmful[:3], ["off", "careful"])
page = rl.views.explorer_html(view)
f"{len(page) / 1e3:.0f} kB, {len(view.data['conditions'])} conditions"

# %% [markdown]
# Where a head looks is a hint and no more: `decoy` heads of the planted organism look just like its reader and move nothing. The next
# notebook, [head_ablation.py](head_ablation.py), removes heads.
