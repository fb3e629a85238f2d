"""Which source row stands for each row of the pass under way: what resampling and patching share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import ReferenceMismatch, SpanError
from rim_lens.hooks.alignment import Align, Alignment, align, require_counterparts
from rim_lens.hooks.editing import Rows
from rim_lens.hooks.positions import Positions


class Found(NamedTuple):
    """Counterparts of the rows of a pass.

    Attributes:
        rows: Which of the rows have one.
        prompt: The source prompt of each that has.
        pos: Its position there.
    """

    rows: Bool[Tensor, " row"]
    prompt: Int[Tensor, " found"]
    pos: Int[Tensor, " found"]


class Pairing:
    """Pairs each prompt with a source prompt and each of its rows with a row there.

    Args:
        source: The source prompts.
        rule: How rows within an atom correspond.
        seed: None: prompt i of the whole bound batch is paired with source prompt i. A number: with a donor drawn
            from the source.
    """

    def __init__(self, source: SpanBatch, rule: Align, seed: int | None = None) -> None:
        self.source = source
        self.rule = rule
        self.seed = seed
        self._known: tuple[SpanBatch, list[int], list[int], Alignment] | None = None

    def check(self, batch: SpanBatch, positions: Positions, what: str) -> Int[Tensor, " prompt"]:
        """Refuse a whole batch that cannot be paired, before any pass.

        Returns:
            Tokens asked for that have no counterpart, by prompt.

        Raises:
            ReferenceMismatch: Another number of prompts than the source; or no donor.
            EmptySpan: Some prompt has no row with a counterpart.
        """
        if self.seed is None and len(batch) != len(self.source):
            raise ReferenceMismatch(
                f"{what}: the source has {len(self.source)} prompts and {len(batch)} are read; row i of the source stands for"
                " row i of the target, so render as many."
            )
        _, alignment = self.of(batch, range(len(batch)))
        return require_counterparts(alignment, batch, positions, what)

    def of(self, batch: SpanBatch, members: Sequence[int]) -> tuple[list[int], Alignment]:
        """Return the source row of each prompt, and the counterpart of each token there.

        Args:
            batch: The prompts.
            members: Their indices in the whole batch.
        """
        if self._known is None or self._known[0] is not batch or self._known[1] != list(members):
            partners = list(members) if self.seed is None else donors(batch, members, self.source, self.seed)
            self._known = (batch, list(members), partners, align(batch, self.source, self.rule, partners))
        return self._known[2], self._known[3]

    def find(self, batch: SpanBatch, members: Sequence[int], rows: Rows) -> Found:
        """Return the counterparts of rows of a pass; rows past the prompts were generated and have none."""
        partners, alignment = self.of(batch, members)
        table = alignment.source.to(rows.pos.device)
        inside = rows.pos < table.shape[1]
        pos = torch.where(inside, table[rows.prompt, rows.pos.clamp(max=table.shape[1] - 1)], -1)
        found = pos >= 0
        partner = torch.tensor(partners, device=rows.pos.device)
        return Found(found, partner[rows.prompt][found], pos[found])


def donors(batch: SpanBatch, members: Sequence[int], reference: SpanBatch, seed: int) -> list[int]:
    """Draw a reference prompt for each prompt, never one of the same tokens.

    The draw depends on the seed and the prompt's index in the whole batch alone, so not on which prompts share a pass.

    Args:
        batch: The prompts.
        members: Their indices in the whole batch.
        reference: Prompts to draw from.
        seed: Of the draw.

    Raises:
        ReferenceMismatch: The reference holds no other prompt than the one itself.
    """
    texts = _texts(reference)
    drawn = []
    for text, member in zip(_texts(batch), members, strict=True):
        others = [row for row, other in enumerate(texts) if other != text]
        if not others:
            raise ReferenceMismatch(
                f"prompt {member} is all that its reference set holds ({len(reference)} prompts of the same tokens), so"
                " there is nobody to resample from. Give other prompts as reference."
            )
        drawn.append(others[int(np.random.default_rng([seed, member]).integers(len(others)))])
    return drawn


def _texts(batch: SpanBatch) -> list[tuple[int, ...]]:
    real = batch.attention_mask.bool()
    return [tuple(row[mask].tolist()) for row, mask in zip(batch.tokens, real, strict=True)]


def require_batch(batch: SpanBatch | None, what: str) -> SpanBatch:
    """Return the prompts, or raise SpanError where none are bound."""
    if batch is None:
        raise SpanError(
            f"{what} needs the spans of the prompts that are read, and none are bound. Hand it to rl.capture, rl.generate"
            " or rl.refusal_score, or bind the prompts (rim_lens.hooks.bound)."
        )
    return batch
