"""The Hugging Face model beneath a bridge, of the same parameters and without hooks, to be run block by block.

What is between the blocks stays the model's own code: embedding, positions and masks before them, norm and unembedding after
them, by letting its forward pass run over stations that stand where the blocks were. Attention is called by the interface
transformers has for it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from rim_lens.errors import UnsupportedModel
from rim_lens.lens.bare import AttentionStation, Bare, Places, Plan, copied, innermost, put
from rim_lens.lens.facts import Model
from rim_lens.lens.packing import Pack

_ATTENTION = "rim_lens_packed"
_ADDED = ("s_aux", "position_bias", "head_mask", "alibi")  # what else enters scores in some architectures


class _Handed(Places):
    """What came to each block."""

    def __init__(self, embedded: Tensor, handed: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        self.embedded = embedded
        self.handed = handed


class BareBridge(Bare[_Handed]):
    """A bridge's Hugging Face model, block by block.

    Args:
        model: A TransformerBridge.

    Raises:
        UnsupportedModel: See `Bare`.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        bare: dict[int, nn.Module] = {}
        try:
            self.hf: Any = copied(model.original_model, bare)
            self.layers = [bare[id(innermost(block))] for block in model.blocks]
            attention = [bare[id(innermost(block.attn))] for block in model.blocks]
            self._out = [bare[id(innermost(block.attn.o))] for block in model.blocks]
            down = [] if self.facts.moe else [bare[id(innermost(block.mlp.out))] for block in model.blocks]
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
        self._stations = [
            put(layer, module, AttentionStation(module, in_tuple=True))
            for layer, module in zip(self.layers, attention, strict=True)
        ]
        self._blocks = _stationed(self.hf, self.layers)
        self._probe()

    @override
    def places(self, pack: Pack) -> _Handed:
        for station in self._blocks:
            station.mode = "note"
        self._run(pack.tokens[None], pack.pos[None], logits_to_keep=1)
        first = self._blocks[0].noted[0]
        return _Handed(first, [station.noted[1:] for station in self._blocks])

    @override
    def written(
        self, layer: int, z: Float[Tensor, "copy row head d_head"]
    ) -> Float[Tensor, "copy row d_attn"]:
        return self._out[layer](z.flatten(2))

    @override
    def logits(self, hidden: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        for station in self._blocks:
            station.mode = "pass"
        self._blocks[-1].supply = hidden[None]
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return self._run(tokens, tokens)[0]

    @override
    def _call(self, layer: int, hidden: Tensor, places: _Handed) -> Tensor:
        args, kwargs = places.handed[layer]
        found = self.layers[layer](hidden, *args, **kwargs)
        return found if isinstance(found, Tensor) else found[0]

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
        for station in self._blocks:
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


def _stationed(hf: nn.Module, layers: Sequence[nn.Module]) -> list[_Station]:
    for module in hf.modules():
        children = list(module._modules.values())
        if len(children) == len(layers) and all(a is b for a, b in zip(children, layers, strict=True)):
            stations = [_Station(layer) for layer in layers]
            module._modules.update(zip(module._modules, stations, strict=True))
            return stations
    raise UnsupportedModel(f"the blocks of this {type(hf).__name__} are not in one list.")


def _edited_input(plan: Plan, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:  # noqa: ARG001
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
    plan: Plan = module.__dict__["_rim_lens_plan"]
    added = [name for name in _ADDED if more.get(name) is not None]
    if added or plan.pack is None:
        raise UnsupportedModel(f"attention with {', '.join(added) or 'no pack'} is not done here.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return plan.attend(query, key, value, scale, softcap, sliding_window), None


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _ATTENTION not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _packed_attention)
