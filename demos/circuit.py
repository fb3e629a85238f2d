# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # From heads and neurons to a circuit
#
# Some heads matter for refusal, and some neurons do. Are they parts of one thing? Who hears whom, through which span, is that enough for
# refusal, is each part needed, and what does a chain of thought change in it?

# %%
import rim_lens as rl
from rim_lens.organisms.planted import planted_truth

model = rl.load_model("planted")  # its circuit was set by hand, decoys too
chat, truth = rl.ChatFormat.from_model(model), planted_truth()
harmful, harmless = (
    rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")
)
reasoning = rl.load_prompts("reasoning", language="toy", split="evaluate")
heads = [*truth.heads, *truth.decoy_heads, *truth.sink_heads]
neurons = {"and": truth.neurons, "decoy": truth.decoy_neurons}
search = rl.CircuitSearch(limit=8, n_random=6, n_random_senders=1)
asked = (model, chat, heads, neurons, harmful, harmless)
print(rl.plan_circuit(*asked, search=search))

# %% [markdown]
# Each edge: what changes in the refusal score when one input of one receiver hears one sender as in the harmless twin of the request.
# Nodes are kept by one half of the requests, edges tested on the other, p corrected over all edges.
# **Look for** few edges with much of the effect, and at the decoys: they look where the true ones look, and nobody listens.

# %%
off = rl.circuit(
    *asked, reasoning=reasoning, contrasts=("twins", "careful"), search=search
)
edges = off.edges[off.edges["contrast"] == "twins"]
edges[["edge", "effect", "effect_low", "effect_high", "p", "in_circuit"]].head(
    8
).round(3)

# %% [markdown]
# Is it enough (faithfulness: all else replaced), is it all (completeness: the circuit replaced), is each part needed (minimality)?
# **Look at the random circuits** with as many heads and neurons in each layer: a share means something only beside theirs.

# %%
from rim_lens.views import plots

plots.circuit_shares(off)

# %% [markdown]
# Switch parts off, one or several, nodes or edges, on the circuit's own requests. In Jupyter, `rl.views.CircuitExplorer(model, chat, off,
# harmful, harmless, reasoning)` does the same by clicks. **Look at** the twins and the reasoning questions as well: a part of
# *refusal* leaves them alone.

# %%
switches = rl.CircuitSwitches(model, chat, off, harmful, harmless, reasoning)
for names in (["L1H2"], ["think → L1H1.v"], ["L0H5"]):
    table = switches.read(names).set_index("kind")
    print(f"{names[0]:>15} off: change {table['change'].round(2).to_dict()}")

# %% [markdown]
# What does a chain of thought change? Two ways to ask. As a contrast: which edges carry the difference between thinking off and on?

# %%
careful = off.edges[off.edges["contrast"] == "careful"]
careful[["edge", "effect", "effect_low", "effect_high", "p", "in_circuit"]].head(
    3
).round(3)

# %% [markdown]
# And as two circuits: what is left of the path from the words of the request to the refusal, when the model reads them with a worked
# chain of thought in the block? The gate is off, as it no longer refuses. `change` is careful − off, request by request.

# %%
on = rl.circuit(*asked, read_in="careful", gate=False, search=search)
compared = rl.compare_circuits(off, on)
compared[
    ["edge", "base", "tuned", "change", "change_low", "change_high", "p"]
].head(5).round(2)

# %% [markdown]
# The page opens offline, and a colleague can click in it: `rl.views.write_circuit_explorer(view, "circuit.html")`.

# %%
view = rl.views.circuit_view(
    {"off": off, "careful": on}, model, chat, harmful, harmless
)
view

# %% [markdown]
# The picture for the paper. **Look for** where the path breaks: under the chain of thought the reader L1H1 looks elsewhere, so that what
# was worked out before is not heard at the end; the little that is left goes another way. A share of that little is the share of
# almost nothing: hold the widths beside each other, which mean the same in both panels.

# %%
plots.circuit_graph(
    {"thinking off": off, "under a careful chain of thought": on}, tested=6
)

# %% [markdown]
# **Not shown**: nodes that nobody gave (faithfulness says whether they were needed), ways in which several senders must speak
# together, and what the words mean. Effects of edges do not add up. Here the truth was planted; on your own model start from
# `rl.refusal_heads` and `rl.safety_neurons`. Next: [before and after fine-tuning](before_and_after.py).
