"""Which way a model is taken apart, by its family."""

from __future__ import annotations

from typing import Any

from rim_lens.lens.bare import Bare
from rim_lens.lens.bare_bridge import BareBridge
from rim_lens.lens.bare_hooked import BareHooked
from rim_lens.lens.facts import Model, model_facts


def taken_apart(model: Model) -> Bare[Any]:
    """A model of the same parameters and without hooks, to be run block by block.

    Raises:
        UnsupportedModel: It cannot be taken apart so.
    """
    bridge = model_facts(model).family == "TransformerBridge"
    return BareBridge(model) if bridge else BareHooked(model)
