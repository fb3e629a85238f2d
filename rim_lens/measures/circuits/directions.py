"""A direction of the residual stream as the end of edges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from rim_lens.errors import ImpossibleEdit
from rim_lens.lens import Model, model_facts
from rim_lens.measures.circuits.nodes import Node
from rim_lens.measures.heads.direct import unit_direction
from rim_lens.measures.refusal.direction import RefusalDirection

if TYPE_CHECKING:
    from rim_lens.measures.probes.fitting import Probe


def direction_node(
    model: Model,
    direction: Tensor | RefusalDirection | Probe,
    layer: int | None = None,
    name: str = "direction",
) -> Node:
    """A direction as a node: who writes along it, at the row whose next word is the answer's first.

    Args:
        model: Any HookedTransformer or TransformerBridge.
        direction: A vector, what `refusal_direction` found, or a probe; made a unit vector.
        layer: The layer whose input it was taken from; needed with a vector.
        name: Of the node.

    Raises:
        ImpossibleEdit: It is zero or not finite, or none was given.
        UnknownLayer: A vector came without its layer, or the model lacks it.
        WrongHookShape: It is not one vector [d_model].

    >>> import rim_lens as rl
    >>> import torch
    >>> model = rl.load_model("planted")
    >>> rl.direction_node(model, torch.ones(64), layer=1).inputs()
    ('projection',)
    """
    unit, below = unit_direction(model_facts(model), direction, layer)
    if unit is None:
        raise ImpossibleEdit("no direction was given; give a vector, a refusal direction or a probe.")
    return Node(name, "direction", below, vector=tuple(unit.tolist()))
