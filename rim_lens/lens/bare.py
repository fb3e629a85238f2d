"""A model taken apart, of the same parameters and without hooks, to be run block by block: what both families have in common.

A scan over heads runs blocks far more often than whole models, from an edited block to the end and on few rows. Norms, residual
sums, MLPs and projections stay the model's own code: attention alone is `Pack.attend`, and where attention was stands a station
that runs it, keeps what it gave, or gives what it was told.

Nothing here is trusted: what is computed so is held against the model, on the prompts at hand, by whoever uses it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from rim_lens.errors import UnsupportedModel
from rim_lens.lens.attaching import acting
from rim_lens.lens.facts import Model, model_facts
from rim_lens.lens.packing import Pack, Past

# An activation [copy, row, ...], changed
Edit = Callable[[Tensor], Tensor]
Site = Literal["z", "post"]
T = TypeVar("T")


@dataclass
class Plan:
    """What the stations do in the call under way."""

    pack: Pack | None = None
    past: Past | None = None
    edits: dict[Site, Edit] = field(default_factory=dict)
    keys: Tensor | None = None
    values: Tensor | None = None
    z: Tensor | None = None

    def attend(
        self,
        query: Float[Tensor, "copy head row d_head"],
        key: Float[Tensor, "copy kv row d_head"],
        value: Float[Tensor, "copy kv row d_head"],
        scaling: float,
        softcap: float | None = None,
        window: int | None = None,
    ) -> Float[Tensor, "copy row head d_head"]:
        """Heads' outputs, edited; what else was seen is kept."""
        z = there(self.pack).attend(query, key, value, self.past, scaling, softcap, window)
        self.keys, self.values = key, value
        edit = self.edits.get("z")
        self.z = z if edit is None else edit(z)
        return self.z


class _Attended(Exception):
    """No error: a block is left after its attention."""


class AttentionStation(nn.Module):
    """Stands where attention was.

    Args:
        attention: What it runs.
        in_tuple: Whether the block takes attention's output as the first of two.
    """

    def __init__(self, attention: nn.Module, in_tuple: bool) -> None:
        super().__init__()
        self.__dict__["attention"] = attention  # no child: it is reached by no other way
        self.in_tuple = in_tuple
        self.given: Tensor | None = None
        self.leave = False
        self.output: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["attention"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Give, or run and keep."""
        if self.given is not None:
            return (self.given, None) if self.in_tuple else self.given
        found = self.__dict__["attention"](*args, **kwargs)
        self.output = found if isinstance(found, Tensor) else found[0]
        if self.leave:
            raise _Attended
        return found


class Places:
    """What the model hands to its blocks beside the residual stream: depends on tokens and positions alone.

    Attributes:
        embedded: The residual stream before the first block.
    """

    embedded: Float[Tensor, "1 row d_model"]


P = TypeVar("P", bound=Places)


class Bare(ABC, Generic[P]):
    """A model, block by block.

    Args:
        model: Of the family that a subclass serves.

    Raises:
        UnsupportedModel: It cannot be taken apart so: weights on several devices, or an architecture with other parts.
    """

    _stations: list[AttentionStation]  # by layer

    def __init__(self, model: Model) -> None:
        self.facts = model_facts(model)
        self._plan = Plan()
        if len({parameter.device for parameter in model.parameters()}) > 1:
            raise UnsupportedModel("the weights lie on several devices.")

    @abstractmethod
    def places(self, pack: Pack) -> P:
        """Embed a pack, and note what the model would hand to its blocks for these tokens and positions."""

    @abstractmethod
    def written(
        self, layer: int, z: Float[Tensor, "copy row head d_head"]
    ) -> Float[Tensor, "copy row d_attn"]:
        """What attention gives to the block with these outputs of its heads."""

    @abstractmethod
    def logits(self, hidden: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        """Final norm and unembedding, of rows after the last block."""

    @abstractmethod
    def _call(self, layer: int, hidden: Tensor, places: P) -> Tensor:
        """Run a block with the plan there is."""

    def block(
        self,
        layer: int,
        hidden: Float[Tensor, "copy row d_model"],
        places: P,
        pack: Pack,
        past: Past | None = None,
        edits: dict[Site, Edit] | None = None,
    ) -> Float[Tensor, "copy row d_model"]:
        """Run one block."""
        with self._planned(pack, past, edits):
            return self._call(layer, hidden, places)

    def attention(
        self,
        layer: int,
        hidden: Float[Tensor, "copy row d_model"],
        places: P,
        pack: Pack,
        past: Past | None = None,
        edits: dict[Site, Edit] | None = None,
    ) -> tuple[Float[Tensor, "copy row d_attn"], Float[Tensor, "copy row head d_head"]]:
        """Run a block's attention alone; return what it gives to the block, and the heads' outputs z before W_O."""
        station = self._stations[layer]
        station.leave = True
        try:
            with self._planned(pack, past, edits):
                self._call(layer, hidden, places)
        except _Attended:
            pass
        finally:
            station.leave = False
        return there(station.output), there(self._plan.z)

    def after_attention(
        self,
        layer: int,
        hidden: Float[Tensor, "copy row d_model"],
        written: Float[Tensor, "copy row d_attn"],
        places: P,
        edits: dict[Site, Edit] | None = None,
    ) -> Float[Tensor, "copy row d_model"]:
        """Run a block with what its attention gives; rows do not meet, so that any rows will do."""
        station = self._stations[layer]
        station.given = written
        try:
            with self._planned(None, None, edits):
                return self._call(layer, hidden, places)
        finally:
            station.given = None

    @property
    def keys_and_values(
        self,
    ) -> tuple[Float[Tensor, "copy kv row d_head"], Float[Tensor, "copy kv row d_head"]]:
        """Of the block that ran last."""
        return there(self._plan.keys), there(self._plan.values)

    @contextmanager
    def _planned(
        self, pack: Pack | None, past: Past | None, edits: dict[Site, Edit] | None
    ) -> Iterator[None]:
        plan = self._plan
        plan.pack, plan.past, plan.edits = pack, past, edits or {}
        try:
            yield
        finally:
            plan.pack, plan.past, plan.edits = None, None, {}


def there(value: T | None) -> T:
    """What a block was to leave behind.

    Raises:
        UnsupportedModel: It is not there.
    """
    if value is None:
        raise UnsupportedModel("a block ran without its attention.")
    return value


def copied(module: nn.Module, seen: dict[int, nn.Module]) -> Any:
    """A copy of a tree of modules that shares parameters and buffers, without bridge components and hooks.

    Args:
        module: Its root.
        seen: Filled with the copy of each module, by the original's id.

    Raises:
        UnsupportedModel: A module has hooks, or another forward pass than its class's.
    """
    module = innermost(module)
    if id(module) in seen:
        return seen[id(module)]
    if "forward" in vars(module):
        raise UnsupportedModel(f"the forward pass of a {type(module).__name__} was replaced by another.")
    made: Any = type(module).__new__(type(module))
    made.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if "_hooks" in name and isinstance(value, dict):
            if name in ("_forward_hooks", "_forward_pre_hooks") and acting(value):
                raise UnsupportedModel(f"a {type(module).__name__} has hooks of its own.")
            made.__dict__[name] = OrderedDict()
    seen[id(module)] = made
    made.__dict__["_modules"] = {
        name: None if child is None else copied(child, seen) for name, child in module._modules.items()
    }
    return made


def innermost(module: Any) -> nn.Module:
    """What a bridge component wraps."""
    while "_original_component" in getattr(module, "_modules", {}):
        module = module._modules["_original_component"]
    return module


def put(parent: nn.Module, old: nn.Module, new: Any) -> Any:
    """Put a station where a child was."""
    for module in parent.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
                return new
    raise UnsupportedModel(f"a {type(parent).__name__} does not hold its {type(old).__name__}.")
