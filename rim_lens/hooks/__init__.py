"""Components: readers and editors that hook onto any supported model."""

from rim_lens.hooks.activations import HeadOutputs, NeuronActivations, ResidualStream
from rim_lens.hooks.attention import AttentionRows, SpanAttention
from rim_lens.hooks.attention_editing import BlockAttention, MoveAttention
from rim_lens.hooks.base import Component, bound
from rim_lens.hooks.directions import AblateDirection, AddDirection, ClampDirection
from rim_lens.hooks.editors import AblateHeads, AblateNeurons
from rim_lens.hooks.readers import Reader, Variable

__all__ = [
    "AblateDirection",
    "AblateHeads",
    "AblateNeurons",
    "AddDirection",
    "AttentionRows",
    "BlockAttention",
    "ClampDirection",
    "Component",
    "HeadOutputs",
    "MoveAttention",
    "NeuronActivations",
    "Reader",
    "ResidualStream",
    "SpanAttention",
    "Variable",
    "bound",
]
