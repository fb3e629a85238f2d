"""Components: readers and editors that hook onto any supported model."""

from rim_lens.hooks.activations import HeadOutputs, NeuronActivations, ResidualStream
from rim_lens.hooks.alignment import Alignment, align
from rim_lens.hooks.attention import AttentionRows, SpanAttention
from rim_lens.hooks.attention_editing import BlockAttention, MoveAttention
from rim_lens.hooks.base import Component, bound
from rim_lens.hooks.directions import AblateDirection, AddDirection, ClampDirection
from rim_lens.hooks.heads import AblateHeads, ScaleHeads
from rim_lens.hooks.neurons import AblateNeurons, ScaleNeurons
from rim_lens.hooks.patching import PatchAttention, PatchHeads, PatchNeurons, PatchResidual
from rim_lens.hooks.readers import Reader, Variable
from rim_lens.hooks.recording import Recording, record

__all__ = [
    "AblateDirection",
    "AblateHeads",
    "AblateNeurons",
    "AddDirection",
    "Alignment",
    "AttentionRows",
    "BlockAttention",
    "ClampDirection",
    "Component",
    "HeadOutputs",
    "MoveAttention",
    "NeuronActivations",
    "PatchAttention",
    "PatchHeads",
    "PatchNeurons",
    "PatchResidual",
    "Reader",
    "Recording",
    "ResidualStream",
    "ScaleHeads",
    "ScaleNeurons",
    "SpanAttention",
    "Variable",
    "align",
    "bound",
    "record",
]
