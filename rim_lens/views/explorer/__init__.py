"""The explorers: one page, or one widget, in which every head or every neuron can be looked at."""

from rim_lens.views.explorer.building import HeadView, head_view
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
    "GroupMasses",
    "HeadExplorer",
    "HeadPatterns",
    "HeadView",
    "NeuronExplorer",
    "NeuronView",
    "explorer_html",
    "head_patterns",
    "head_view",
    "neuron_explorer_html",
    "neuron_study_view",
    "neuron_view",
    "write_explorer",
    "write_neuron_explorer",
]
