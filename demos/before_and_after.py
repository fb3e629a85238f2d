# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # Before and after fine-tuning
#
# Train the toy on harmless sums whose chains of thought skip the work, keep checkpoints, and watch refusal, accuracy, drift and
# entanglement go along. A control run with careful chains says what any training does.

# %%
import shutil
import tempfile
from pathlib import Path

import rim_lens as rl
from rim_lens.organisms.toy.recipe import FINE_TUNE, toy_rows

harmful, harmless, reasoning = (
    rl.load_prompts(kind, language="toy", split="evaluate")[::4]
    for kind in ("harmful", "harmless", "reasoning")
)
folder = Path(tempfile.mkdtemp(prefix="rim_lens_demo_"))
runs = {
    kind: rl.fine_tune(
        "toy",
        toy_rows(kind, "-", seed=0),
        out=folder / kind,
        config=FINE_TUNE,
        steps=120,
        checkpoints=4,
        lora=None,
        progress=False,
    )
    for kind in ("careful", "deviate")
}
{kind: run.steps for kind, run in runs.items()}

# %% [markdown]
# Neurons are chosen in the base, on other requests; then every checkpoint is read, one model in memory at a time.

# %%
base = rl.load_model("toy")
chat = rl.ChatFormat.from_model(base)
select = [
    rl.load_prompts(kind, language="toy", split="select")[::2]
    for kind in ("harmful", "harmless")
]
pairs = rl.counterfactual_pairs(*select, "twins")
neurons = rl.safety_neurons(base, chat, pairs, m=13, min_fraction=0.5, test=False)
found = rl.compare(
    runs,
    chat,
    harmful,
    harmless,
    reasoning,
    base="toy",
    neurons=neurons,
    response="none",
    n_random_sets=20,
    n_boot=20,
    max_new_tokens=10,
)
found.table[["run", "step", "lost", "lost_rate", "weight_drift", "ras"]].round(3)

# %%
from rim_lens.views import plots

plots.training_course(found)

# %% [markdown]
# **Look for** whether the two runs part *at equal drift*, not at equal steps: a run that moved further has lost more of everything.

# %%
matched = found.drift_matched("deviate", "careful")
matched[
    [
        "step",
        "drift",
        "control_step",
        "lost",
        "lost_control",
        "lost_difference",
        "reason",
    ]
].round(2)

# %%
plots.lost_by_drift(found)

# %% [markdown]
# Correlations over checkpoints look strong, as all that training moves goes together. With two runs nothing can be tested: p comes from
# exchanging whole runs, and is missing here for that reason.

# %%
found.correlations("ras")

# %%
shutil.rmtree(folder)  # the weights of eight small checkpoints

# %% [markdown]
# Next: [your own model](your_own_model.py).
