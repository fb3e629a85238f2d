"""A HookedTransformer's blocks, of the same parameters and without hooks, to be run one by one.

Projections, norms of queries and keys, rotations and W_O stay its own code: of a copy of each attention module the methods
between queries and heads' outputs are replaced, which would make a pattern, by `Pack.attend`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from rim_lens.errors import UnsupportedModel
from rim_lens.lens.bare import AttentionStation, Bare, Places, Plan, copied, put
from rim_lens.lens.facts import Model
from rim_lens.lens.packing import Pack
from rim_lens.lens.running import final_norm, soft_cap, softcapped

_SWITCHES = ("use_attn_in", "use_split_qkv_input", "use_attn_result", "use_hook_mlp_in", "use_logn_attn")
_POSITIONS = ("standard", "rotary", "none")


class _Rows(Places):
    """Positions of rows, as a padded prompt of one token each has them: TransformerLens counts positions by its mask."""

    def __init__(self, embedded: Tensor, mask: Int[Tensor, "row key"], offset: int) -> None:
        self.embedded, self.mask, self.offset = embedded, mask, offset


class BareHooked(Bare[_Rows]):
    """A HookedTransformer, block by block.

    Args:
        model: A HookedTransformer.

    Raises:
        UnsupportedModel: See `Bare`.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        cfg = self._cfg = model.cfg
        told = [f"{name} is on" for name in _SWITCHES if getattr(cfg, name, False)]
        if getattr(cfg, "load_in_4bit", False):
            told.append("weights are quantised")
        if getattr(cfg, "use_attention_sinks", False):
            told.append("it has attention sinks")
        if cfg.positional_embedding_type not in _POSITIONS:
            told.append(f"positions are {cfg.positional_embedding_type}")
        if getattr(cfg, "attention_dir", "causal") != "causal":
            told.append("a query sees keys after it")
        if told:
            raise UnsupportedModel(f"{told[0]}.")
        self._model = model
        self._rows: _Rows | None = None
        self.layers: list[Any] = [copied(block, {}) for block in model.blocks]
        self._attention = [block.attn for block in self.layers]
        for attention in self._attention:
            self._without_pattern(attention)
        self._stations = [
            put(block, block.attn, AttentionStation(block.attn, in_tuple=False)) for block in self.layers
        ]
        for block in self.layers:
            if hasattr(getattr(block, "mlp", None), "hook_post"):
                block.mlp.hook_post.register_forward_hook(partial(_edited, self._plan))

    @override
    def places(self, pack: Pack) -> _Rows:
        mask, offset = _alone(pack.pos)
        column = pack.tokens[:, None]
        embedded = self._model.embed(column)
        if self._cfg.positional_embedding_type == "standard":
            embedded = embedded + self._model.pos_embed(column, offset, mask)
        return _Rows(embedded.transpose(0, 1), mask, offset)

    @override
    def written(
        self, layer: int, z: Float[Tensor, "copy row head d_head"]
    ) -> Float[Tensor, "copy row d_attn"]:
        attention = self._attention[layer]
        return nn.functional.linear(z.flatten(2), attention.W_O.flatten(0, 1).T, attention.b_O)

    @override
    def logits(self, hidden: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        # Its own unembedding copies the whole matrix at each call, in TransformerLens 3.
        normed, unembed = final_norm(self._model, hidden[None])[0], self._model.unembed
        return softcapped(self._model, torch.addmm(unembed.b_U, normed, unembed.W_U))

    @override
    def _call(self, layer: int, hidden: Tensor, places: _Rows) -> Tensor:
        self._rows = places
        found: Tensor = self.layers[layer](hidden)
        return found

    def _without_pattern(self, attention: Any) -> None:
        seen: dict[str, Tensor] = {}
        own = type(attention).apply_rotary
        cap = soft_cap(self._cfg, "attn_scores_soft_cap")
        window = self._cfg.window_size if attention.attn_type == "local" else None

        def rotated(x: Tensor, *_: Any) -> Tensor:
            """Each row as a prompt of its own, all copies and heads of it beside one another."""
            rows, copies = self._rows, x.shape[0]
            if rows is None:
                raise UnsupportedModel("a block ran without positions.")
            apart = x.transpose(0, 1).flatten(1, 2)[:, None]
            turned = own(attention, apart, rows.offset, rows.mask)
            return turned[:, 0].unflatten(1, (copies, -1)).transpose(0, 1)

        def no_scores(query: Tensor, key: Tensor) -> Tensor:
            seen["query"], seen["key"] = query, key
            return query.new_zeros(1, 1, 1, 1)

        def attended(value: Tensor, pattern: Tensor) -> Tensor:  # noqa: ARG001 - there is none
            # TransformerLens 2 scores in float32 where values are in half precision.
            query, key = (seen[name].to(value.dtype).transpose(1, 2) for name in ("query", "key"))
            return self._plan.attend(query, key, value.transpose(1, 2), 1 / attention.attn_scale, cap, window)

        attention.__dict__ |= {
            "apply_rotary": rotated,
            "calculate_attention_scores": no_scores,
            "apply_causal_mask": lambda scores, *_: scores,
            "calculate_z_scores": attended,
        }


def _alone(pos: Int[Tensor, " row"]) -> tuple[Int[Tensor, "row key"], int]:
    """A mask whose last column is the given position in each row, and how many columns come before it."""
    offset = int(pos.max())
    columns = torch.arange(offset + 1, device=pos.device)
    return (columns[None] >= offset - pos[:, None]).long(), offset


def _edited(plan: Plan, module: nn.Module, args: Any, found: Tensor) -> Tensor:  # noqa: ARG001
    edit = plan.edits.get("post")
    return found if edit is None else edit(found)
