"""Many prompts in one sequence without padding: what they share stands once, and a mask keeps them apart.

A `Pack` is a row of tokens: a *stem* that all prompts begin with (it may be empty), then each prompt's own *tail*. A row sees
the rows of its prompt that stand before it, and a *past* that is not in the pack: keys and values of an earlier pass. Copies
of a pack, each with another edit, are the batch dimension; the past is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Past(NamedTuple):
    """Keys and values of rows before the pack."""

    keys: Float[Tensor, "kv prompt key d_head"]
    values: Float[Tensor, "kv prompt key d_head"]


@dataclass(frozen=True, eq=False)
class Pack:
    """Rows of several prompts in one sequence.

    Attributes:
        tokens: Token of each row.
        prompt: Prompt of each row; 0 in the stem, which is every prompt's.
        pos: Place of each row in its prompt, padding not counted.
        n_stem: Rows of the stem, which come first.
        tails: Rows of each prompt's tail, padded with whatever row.
        tail_real: Which of them are no padding.
        past_pos: Places of the keys of the past.
        past_real: Which of them are no padding.
    """

    tokens: Int[Tensor, " row"]
    prompt: Int[Tensor, " row"]
    pos: Int[Tensor, " row"]
    n_stem: int
    tails: Int[Tensor, "prompt place"]
    tail_real: Bool[Tensor, "prompt place"]
    past_pos: Int[Tensor, "prompt key"]
    past_real: Bool[Tensor, "prompt key"]
    _masks: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    def masks(
        self, window: int | None
    ) -> tuple[Float[Tensor, "stem key"], Float[Tensor, "prompt place key"]]:
        """What is added to scores of the stem and of the tails: 0 or −∞, keys in the order past, stem, tail.

        Args:
            window: Keys so many places back, and further, are not seen; None where all are.
        """
        if window not in self._masks:
            stem_pos, tail_pos = self.pos[: self.n_stem], self.pos[self.tails]
            stem_real = torch.ones_like(stem_pos, dtype=torch.bool)
            stem = _bias(
                stem_pos,
                torch.cat([self.past_pos[0], stem_pos]),
                torch.cat([self.past_real[0], stem_real]),
                window,
            )
            every = (len(self.tails), -1)
            tails = _bias(
                tail_pos,
                torch.cat([self.past_pos, stem_pos.expand(every), tail_pos], dim=1),
                torch.cat([self.past_real, stem_real.expand(every), self.tail_real], dim=1),
                window,
            )
            tails[~self.tail_real] = 0.0  # nobody looks at these rows: anything but NaN
            self._masks[window] = stem, tails
        return self._masks[window]

    def attend(
        self,
        q: Float[Tensor, "copy head row d_head"],
        k: Float[Tensor, "copy kv row d_head"],
        v: Float[Tensor, "copy kv row d_head"],
        past: Past | None,
        scaling: float,
        softcap: float | None = None,
        window: int | None = None,
    ) -> Float[Tensor, "copy row head d_head"]:
        """Attention of every row to what it may see, in every copy.

        Args:
            q: Queries, rotated.
            k: Keys, rotated; one head serves a group of query heads.
            v: Values.
            past: Keys and values of the rows before the pack; None where there are none.
            scaling: Of the scores.
            softcap: Scores are squashed to ±this before the mask, where given.
            window: See `masks`.
        """
        n_copies, n_heads, n_rows, _ = q.shape
        n_kv, n_stem = k.shape[1], self.n_stem
        q = q.reshape(n_copies, n_kv, n_heads // n_kv, n_rows, -1) * scaling
        out = q.new_empty(n_copies, n_rows, n_kv, n_heads // n_kv, v.shape[-1])
        for_stem, for_tails = self.masks(window)
        stem_k, stem_v = k[:, :, :n_stem], v[:, :, :n_stem]
        if n_stem:  # c copy, k key-value head, g query head of it, s row, t key; b prompt, n row of its tail
            rows = q[:, :, :, :n_stem]
            parts = [("ckgst,cktd->cskgd", torch.einsum("ckgsd,cktd->ckgst", rows, stem_k), stem_v)]
            if past is not None:
                scores = torch.einsum("ckgsd,ktd->ckgst", rows, past.keys[:, 0])
                parts.insert(0, ("ckgst,ktd->cskgd", scores, past.values[:, 0]))
            out[:, :n_stem] = _mixed(parts, for_stem, softcap)
        rows, own_k, own_v = q[:, :, :, self.tails], k[:, :, self.tails], v[:, :, self.tails]
        parts = [("ckgbnt,ckbtd->cbnkgd", torch.einsum("ckgbnd,ckbtd->ckgbnt", rows, own_k), own_v)]
        if n_stem:
            scores = torch.einsum("ckgbnd,cktd->ckgbnt", rows, stem_k)
            parts.insert(0, ("ckgbnt,cktd->cbnkgd", scores, stem_v))
        if past is not None:
            scores = torch.einsum("ckgbnd,kbtd->ckgbnt", rows, past.keys)
            parts.insert(0, ("ckgbnt,kbtd->cbnkgd", scores, past.values))
        out[:, self.tails[self.tail_real]] = _mixed(parts, for_tails, softcap)[:, self.tail_real]
        return out.flatten(2, 3)


def _bias(query_pos: Tensor, key_pos: Tensor, key_real: Tensor, window: int | None) -> Tensor:
    back = query_pos[..., :, None] - key_pos[..., None, :]
    seen = (back >= 0) & key_real[..., None, :]
    if window is not None:
        seen &= back < window
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))


def _mixed(parts: Sequence[tuple[str, Tensor, Tensor]], bias: Tensor, softcap: float | None) -> Tensor:
    """One softmax over the keys of all parts; values summed part by part, as the equations say."""
    sizes = [scores.shape[-1] for _, scores, _ in parts]
    scores = torch.cat([scores for _, scores, _ in parts], dim=-1) if len(parts) > 1 else parts[0][1]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.split((scores + bias).softmax(dim=-1), sizes, dim=-1)
    found = [
        torch.einsum(equation, weight.to(values.dtype), values)
        for weight, (equation, _, values) in zip(weights, parts, strict=True)
    ]
    return sum(found[1:], start=found[0])
