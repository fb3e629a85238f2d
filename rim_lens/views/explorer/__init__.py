"""The explorers: one page, or one widget, in which every head, every neuron or a whole circuit can be looked at."""

from rim_lens.views.explorer.building import HeadView, head_view
from rim_lens.views.explorer.circuit_building import (
    CircuitView,
    circuit_explorer_html,
    circuit_view,
    write_circuit_explorer,
)
from rim_lens.views.explorer.circuit_widget import CircuitExplorer
from rim_lens.views.explorer.neuron_building import (
    NeuronView,
    neuron_explorer_html,
    neuron_study_view,
    neuron_view,
    write_neuron_explorer,
)
from rim_lens.views.explorer.neuron_widget import NeuronExplorer
from rim_lens.views.explorer.page import explorer_html, write_explorer
from rim_lens.views.explorer.reading import GroupMasses, HeadPatterns, head_patterns
from rim_lens.views.explorer.widget import HeadExplorer

__all__ = [
    "CircuitExplorer",
    "CircuitView",
    "GroupMasses",
    "HeadExplorer",
    "HeadPatterns",
    "HeadView",
    "NeuronExplorer",
    "NeuronView",
    "circuit_explorer_html",
    "circuit_view",
    "explorer_html",
    "head_patterns",
    "head_view",
    "neuron_explorer_html",
    "neuron_study_view",
    "neuron_view",
    "write_circuit_explorer",
    "write_explorer",
    "write_neuron_explorer",
]
