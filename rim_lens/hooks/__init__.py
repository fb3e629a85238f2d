"""Components: readers and editors that hook onto any supported model."""

from rim_lens.hooks.activations import HeadOutputs, NeuronActivations, ResidualStream
from rim_lens.hooks.attention import AttentionRows, SpanAttention
from rim_lens.hooks.base import Component, bound
from rim_lens.hooks.editors import AblateHeads, AblateNeurons
from rim_lens.hooks.readers import Reader, Variable

__all__ = [
    "AblateHeads",
    "AblateNeurons",
    "AttentionRows",
    "Component",
    "HeadOutputs",
    "NeuronActivations",
    "Reader",
    "ResidualStream",
    "SpanAttention",
    "Variable",
    "bound",
]
