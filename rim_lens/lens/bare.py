"""The Hugging Face model beneath a bridge, of the same parameters and without hooks, to be run block by block.

A scan over heads runs blocks far more often than whole models, from an edited block to the end and on few rows. What is
between the blocks stays the model's own code: embedding, positions and masks before them, norm and unembedding after
them, by letting its forward pass run over stations that stand where the blocks were; and within a block, norms, residual
sums and MLP, by putting a station where attention was. Attention itself is `Pack.attend`, which the model calls by the
interface transformers has for it.

Nothing here is trusted: what is computed so is held against the bridge, on the prompts at hand, by whoever uses it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rim_lens.errors import UnsupportedModel
from rim_lens.lens.facts import Model, model_facts
from rim_lens.lens.packing import Pack, Past

_ATTENTION = "rim_lens_packed"
_ADDED = ("s_aux", "position_bias", "head_mask", "alibi")  # what else enters scores in some architectures

# An activation [copy, row, ...], changed
Edit = Callable[[Tensor], Tensor]
Site = Literal["z", "post"]


@dataclass
class _Plan:
    """What the stations do in the call under way."""

    pack: Pack | None = None
    past: Past | None = None
    edits: dict[Site, Edit] = field(default_factory=dict)
    keys: Tensor | None = None
    values: Tensor | None = None
    z: Tensor | None = None


class _Attended(Exception):
    """No error: a block is left after its attention."""


class _Places:
    """What the model hands to each block beside the residual stream: depends on tokens and positions alone."""

    def __init__(self, embedded: Tensor, handed: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        self.embedded = embedded
        self.handed = handed


class BareModel:
    """A bridge's Hugging Face model, block by block.

    Args:
        model: A TransformerBridge.

    Raises:
        UnsupportedModel: It cannot be taken apart so: a HookedTransformer, weights on several devices, or an
            architecture with other parts.
    """

    def __init__(self, model: Model) -> None:
        self.facts = model_facts(model)
        if self.facts.family != "TransformerBridge":
            raise UnsupportedModel(f"a {self.facts.family} has no Hugging Face model beneath it.")
        if len({parameter.device for parameter in model.parameters()}) > 1:
            raise UnsupportedModel("the weights lie on several devices.")
        bare: dict[int, nn.Module] = {}
        self._plan = _Plan()
        try:
            self.hf: Any = _bare(model.original_model, bare)
            self.layers = [bare[id(_innermost(block))] for block in model.blocks]
            attention = [bare[id(_innermost(block.attn))] for block in model.blocks]
            self._out = [bare[id(_innermost(block.attn.o))] for block in model.blocks]
            down = [] if self.facts.moe else [bare[id(_innermost(block.mlp.out))] for block in model.blocks]
        except (AttributeError, KeyError) as problem:
            raise UnsupportedModel(
                f"this {self.facts.architecture} has other parts ({problem})."
            ) from problem
        _own_configs(self.hf)
        _register()
        for module in attention:
            module.__dict__["_rim_lens_plan"] = self._plan
        for module in down:
            module.register_forward_pre_hook(partial(_edited_input, self._plan))
        self._attention = [
            _put(layer, module, _AttentionStation(module))
            for layer, module in zip(self.layers, attention, strict=True)
        ]
        self._stations = _stationed(self.hf, self.layers)
        self._probe()

    def places(self, pack: Pack) -> _Places:
        """Embed a pack, and note what the model would hand to its blocks for these tokens and positions."""
        for station in self._stations:
            station.mode = "note"
        self._run(pack.tokens[None], pack.pos[None], logits_to_keep=1)
        first = self._stations[0].noted[0]
        return _Places(first, [station.noted[1:] for station in self._stations])

    def block(
        self,
        layer: int,
        hidden: Float[Tensor, "copy row d_model"],
        places: _Places,
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
        places: _Places,
        pack: Pack,
        past: Past | None = None,
        edits: dict[Site, Edit] | None = None,
    ) -> tuple[Float[Tensor, "copy row d_attn"], Float[Tensor, "copy row head d_head"]]:
        """Run a block's attention alone; return what it gives to the block, and the heads' outputs z before W_O."""
        station = self._attention[layer]
        station.leave = True
        try:
            with self._planned(pack, past, edits):
                self._call(layer, hidden, places)
        except _Attended:
            pass
        finally:
            station.leave = False
        return _there(station.output), _there(self._plan.z)

    def written(
        self, layer: int, z: Float[Tensor, "copy row head d_head"]
    ) -> Float[Tensor, "copy row d_attn"]:
        """What attention gives to the block with these outputs of its heads."""
        return self._out[layer](z.flatten(2))

    def after_attention(
        self,
        layer: int,
        hidden: Float[Tensor, "copy row d_model"],
        written: Float[Tensor, "copy row d_attn"],
        places: _Places,
        edits: dict[Site, Edit] | None = None,
    ) -> Float[Tensor, "copy row d_model"]:
        """Run a block with what its attention gives; rows do not meet, so that any rows will do."""
        station = self._attention[layer]
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
        return _there(self._plan.keys), _there(self._plan.values)

    def logits(self, hidden: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        """Final norm and unembedding, of rows after the last block."""
        for station in self._stations:
            station.mode = "pass"
        self._stations[-1].supply = hidden[None]
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return self._run(tokens, tokens)[0]

    def _call(self, layer: int, hidden: Tensor, places: _Places) -> Tensor:
        args, kwargs = places.handed[layer]
        found = self.layers[layer](hidden, *args, **kwargs)
        return found if isinstance(found, Tensor) else found[0]

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

    def _run(self, tokens: Tensor, positions: Tensor, **more: Any) -> Tensor:
        # A mask of four dimensions is taken as it is, and here nobody looks at it.
        mask = torch.zeros(1, 1, 1, 1, device=tokens.device)
        return self.hf(
            input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False, **more
        ).logits

    def _probe(self) -> None:
        """Run once as the model would, to see what blocks and attention hand back."""
        count = min(2, self.facts.n_ctx)
        rows = torch.arange(count, device=self.facts.device)
        none = torch.zeros(1, 0, dtype=torch.long, device=rows.device)
        pack = Pack(rows * 0, rows * 0, rows, 0, rows[None], rows[None] >= 0, none, none.bool())
        for station in self._stations:
            station.mode = "run"
        try:
            with torch.no_grad(), self._planned(pack, None, None):
                self._run(pack.tokens[None], pack.pos[None])
        except UnsupportedModel:
            raise
        except Exception as problem:
            raise UnsupportedModel(
                f"this {self.facts.architecture} does not run block by block ({type(problem).__name__}: {problem})."
            ) from problem
        if self._plan.z is None or self._plan.z.shape[2] != self.facts.n_heads:
            raise UnsupportedModel(f"attention of this {self.facts.architecture} is called in another way.")


class _Station(nn.Module):
    """Stands where a block was: hands on the residual stream and notes what came, or runs the block."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # no child: it is reached by no other way
        self.mode: Literal["run", "note", "pass"] = "run"
        self.noted: tuple[Any, ...] = ()
        self.supply: Tensor | None = None
        self.in_tuple = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.mode == "run":
            found = self.__dict__["layer"](hidden, *args, **kwargs)
            self.in_tuple = not isinstance(found, Tensor)
            return found
        if self.mode == "note":
            self.noted = hidden, args, kwargs
        elif self.supply is not None:
            hidden, self.supply = self.supply, None
        return (hidden,) if self.in_tuple else hidden


class _AttentionStation(nn.Module):
    """Stands where attention was: runs it and keeps what it gave, or gives what it was told."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.__dict__["attention"] = attention
        self.given: Tensor | None = None
        self.leave = False
        self.output: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["attention"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.given is not None:
            return self.given, None
        found = self.__dict__["attention"](*args, **kwargs)
        self.output = found if isinstance(found, Tensor) else found[0]
        if self.leave:
            raise _Attended
        return found


def _there(value: Tensor | None) -> Tensor:
    if value is None:
        raise UnsupportedModel("a block ran without its attention.")
    return value


def _innermost(module: Any) -> nn.Module:
    """What a bridge component wraps."""
    while "_original_component" in getattr(module, "_modules", {}):
        module = module._modules["_original_component"]
    return module


def _bare(module: nn.Module, seen: dict[int, nn.Module]) -> Any:
    """A copy of a tree of modules that shares parameters and buffers, without bridge components and hooks."""
    module = _innermost(module)
    if id(module) in seen:
        return seen[id(module)]
    if "forward" in vars(module):
        raise UnsupportedModel(f"the forward pass of a {type(module).__name__} was replaced by another.")
    made: Any = type(module).__new__(type(module))
    made.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if "_hooks" in name and isinstance(value, dict):
            if value and name in ("_forward_hooks", "_forward_pre_hooks"):
                raise UnsupportedModel(f"a {type(module).__name__} has hooks of its own.")
            made.__dict__[name] = OrderedDict()
    seen[id(module)] = made
    made.__dict__["_modules"] = {
        name: None if child is None else _bare(child, seen) for name, child in module._modules.items()
    }
    return made


def _own_configs(hf: nn.Module) -> None:
    """Let the copy call our attention, and the model beneath the bridge its own."""
    made: dict[int, Any] = {}
    for module in hf.modules():
        config = module.__dict__.get("config")
        if config is None:
            continue
        if id(config) not in made:
            made[id(config)] = copy.deepcopy(config)
            made[id(config)]._attn_implementation = _ATTENTION
        module.__dict__["config"] = made[id(config)]


def _put(parent: nn.Module, old: nn.Module, new: Any) -> Any:
    """Put a station where a child was."""
    for module in parent.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
                return new
    raise UnsupportedModel(f"a {type(parent).__name__} does not hold its {type(old).__name__}.")


def _stationed(hf: nn.Module, layers: Sequence[nn.Module]) -> list[_Station]:
    for module in hf.modules():
        children = list(module._modules.values())
        if len(children) == len(layers) and all(a is b for a, b in zip(children, layers, strict=True)):
            stations = [_Station(layer) for layer in layers]
            module._modules.update(zip(module._modules, stations, strict=True))
            return stations
    raise UnsupportedModel(f"the blocks of this {type(hf).__name__} are not in one list.")


def _edited_input(plan: _Plan, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:  # noqa: ARG001
    edit = plan.edits.get("post")
    return None if edit is None else (edit(args[0]), *args[1:])


def _packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the pack has its own
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    plan: _Plan = module.__dict__["_rim_lens_plan"]
    added = [name for name in _ADDED if more.get(name) is not None]
    if added or plan.pack is None:
        raise UnsupportedModel(f"attention with {', '.join(added) or 'no pack'} is not done here.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    z = plan.pack.attend(query, key, value, plan.past, scale, softcap, sliding_window)
    plan.keys, plan.values = key, value
    edit = plan.edits.get("z")
    plan.z = z if edit is None else edit(z)
    return plan.z, None


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _ATTENTION not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _packed_attention)
