"""The figures of a study, as plotly figures: one colour per span, condition and outcome everywhere, light or dark.

Most take a finished `StudyResult`, and draw only what the folder holds; those of probes take a `ProbeResult`, a
`ProbesAfterAblation` or `Cliff`s, those of circuits a `Circuit`, and `attention_pattern` takes arrays. `.to_html(include_plotlyjs=True)`
makes a page of one that works offline.
"""

from rim_lens.views.plots.attention import attention_by_head, attention_map
from rim_lens.views.plots.checkpoints import (
    lost_by_drift,
    metrics_against_loss,
    ras_beside_random,
    training_course,
)
from rim_lens.views.plots.circuits import circuit_graph, circuit_shares
from rim_lens.views.plots.doses import direct_and_total, dose_effects, specification_curve
from rim_lens.views.plots.entanglement import entanglement_rivals
from rim_lens.views.plots.heads import head_bubbles, head_effects, head_scan, head_set
from rim_lens.views.plots.looking import argmax_positions, attention_pattern, head_pattern
from rim_lens.views.plots.neurons import neuron_sweep, neurons_by_layer
from rim_lens.views.plots.probes import probe_curves, probes_without_heads, refusal_cliff
from rim_lens.views.plots.refusal import outcomes, scores, tuned_outcomes
from rim_lens.views.plots.removing import compared_heads, removal_beside_random, restored_refusal

__all__ = [
    "argmax_positions",
    "attention_by_head",
    "attention_map",
    "attention_pattern",
    "circuit_graph",
    "circuit_shares",
    "compared_heads",
    "direct_and_total",
    "dose_effects",
    "entanglement_rivals",
    "head_bubbles",
    "head_effects",
    "head_pattern",
    "head_scan",
    "head_set",
    "lost_by_drift",
    "metrics_against_loss",
    "neuron_sweep",
    "neurons_by_layer",
    "outcomes",
    "probe_curves",
    "probes_without_heads",
    "ras_beside_random",
    "refusal_cliff",
    "removal_beside_random",
    "restored_refusal",
    "scores",
    "specification_curve",
    "training_course",
    "tuned_outcomes",
]
