"""Pictures, words and pages of what was measured. Nothing here measures a model."""

from rim_lens.views.checkpoint_report import checkpoint_study_html, write_checkpoint_report
from rim_lens.views.circuitsvis import circuitsvis_heads, circuitsvis_pattern, circuitsvis_tokens
from rim_lens.views.explorer import (
    CircuitExplorer,
    CircuitView,
    HeadExplorer,
    HeadView,
    NeuronExplorer,
    NeuronView,
    circuit_explorer_html,
    circuit_view,
    explorer_html,
    head_patterns,
    head_view,
    neuron_explorer_html,
    neuron_study_view,
    neuron_view,
    write_circuit_explorer,
    write_explorer,
    write_neuron_explorer,
)
from rim_lens.views.finding import Finding
from rim_lens.views.neuron_report import neuron_study_html, write_neuron_report
from rim_lens.views.report import heads_html, probes_html, study_html, write_report
from rim_lens.views.terminal import print_checkpoints, print_neurons, print_study
from rim_lens.views.verdict import findings

__all__ = [
    "CircuitExplorer",
    "CircuitView",
    "Finding",
    "HeadExplorer",
    "HeadView",
    "NeuronExplorer",
    "NeuronView",
    "checkpoint_study_html",
    "circuit_explorer_html",
    "circuit_view",
    "circuitsvis_heads",
    "circuitsvis_pattern",
    "circuitsvis_tokens",
    "explorer_html",
    "findings",
    "head_patterns",
    "head_view",
    "heads_html",
    "neuron_explorer_html",
    "neuron_study_html",
    "neuron_study_view",
    "neuron_view",
    "print_checkpoints",
    "print_neurons",
    "print_study",
    "probes_html",
    "study_html",
    "write_checkpoint_report",
    "write_circuit_explorer",
    "write_explorer",
    "write_neuron_explorer",
    "write_neuron_report",
    "write_report",
]
