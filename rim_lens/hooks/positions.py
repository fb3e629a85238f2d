"""Which rows of a forward pass an editor or reader means, also under a key-value cache."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import EmptySpan, SpanError, WrongHookShape
from rim_lens.hooks.base import Edit
from rim_lens.lens import Attention, RowHook, Site, hook_name

# "all", "prompt_last", "generated", the name of a span, or a mask
Positions = str | Bool[Tensor, "prompt pos"]


def is_word(positions: Positions, word: str) -> bool:
    """Whether rows were asked for by this very word; a mask is no word, and comparing it with one means nothing."""
    return isinstance(positions, str) and positions == word


def told(positions: Positions) -> str:
    """Return rows asked for in words, for a message."""
    return repr(positions) if isinstance(positions, str) else "a mask"


def require_rows(positions: Positions, batch: SpanBatch, what: str) -> None:
    """Refuse rows that some prompt has none of, before any pass: nothing would be edited there, and an effect of 0 read.

    Rows of generated tokens may still come; see `rim_lens.hooks.base.attached`.

    Args:
        positions: Rows asked for, as editors take them.
        batch: The prompts.
        what: Who asks, for the message.

    Raises:
        EmptySpan: Some prompt has no such row.
        SpanError: It is neither a word nor a mask.
        WrongHookShape: A mask is of another shape than the prompts.
    """
    if isinstance(positions, str):
        if positions not in ("all", "prompt_last", "generated"):
            batch.spans.require(positions)
        return
    if not isinstance(positions, Tensor):
        raise SpanError(
            f"{what} was given {positions!r} for rows; give 'all', 'prompt_last', 'generated', the name of a span, or a mask"
            " [prompt, pos] as a torch tensor, such as batch.spans['request'] | batch.spans['think']."
        )
    if positions.shape != batch.tokens.shape:
        raise WrongHookShape(
            f"{what} was given a mask of shape {tuple(positions.shape)} and is to read prompts of shape"
            f" {tuple(batch.tokens.shape)}. Pass a mask of these prompts (batch.spans[...]), or name the span."
        )
    bare = (
        (~(positions.bool().cpu() & batch.attention_mask.bool().cpu()).any(dim=1))
        .nonzero()
        .flatten()
        .tolist()
    )
    if bare:
        raise EmptySpan(
            f"{what} was given a mask that marks no token in {len(bare)} of {len(batch)} prompts (first:"
            f" {batch.prompts[bare[0]].id!r}), so nothing would be edited there. Leave those prompts out, or mark a token"
            " in each."
        )


class RowOffset:
    """Absolute position of the first row of the pass under way.

    A pass without a cache has as many keys as queries. With a cache there are more keys, and the
    difference is the position of the first row. The attention pattern of layer 0 is the first tensor in a
    pass that knows both. What comes before it (the residual stream before layer 0) has to tell a prefill from a later
    step by the number of rows; the pattern then proves that right, or raises.
    """

    def __init__(self) -> None:
        self.value = 0
        self._n_keys = 0
        self._taken: tuple[int, int] | None = (
            None  # before layer 0: the position, and where generated rows begin
        )

    def hook(self) -> tuple[str, Edit]:
        """The hook that keeps the value up to date; add it before all others."""
        return hook_name("pattern", 0), RowHook(self._read)

    def at(self, site: Site, layer: int, n_rows: int, width: int | None) -> int:
        """The position of the first row, as known at this hook point.

        Args:
            site: The hook point's.
            layer: The hook point's.
            n_rows: Rows of this pass.
            width: Positions of the prompts, where known. Before layer 0 a later step is then said to begin at `width` or
                beyond: a row that no prompt has, which is all that is ever asked about it.
        """
        if site != "resid_pre" or layer > 0:
            return self.value
        if width is None:
            begins = self._n_keys if n_rows == 1 else 0
        else:
            begins = 0 if n_rows >= width else max(width, self._n_keys)
        self._taken = (begins, width or 1)
        return begins

    def _read(self, seen: Attention) -> None:
        self.value = seen.offset
        self._n_keys = seen.n_keys
        taken, self._taken = self._taken, None
        if taken is None or (taken[0] == 0 == self.value) or (taken[0] > 0 and self.value >= taken[1]):
            return
        raise WrongHookShape(
            f"before layer 0 this pass was taken to begin at position {taken[0]}, and it begins at {self.value}: a prompt of"
            " one token, or one read in pieces. Bind the batch that is read, or use the stream after layer 0."
        )


def prompt_width(positions: Positions | None, batch: SpanBatch | None) -> int | None:
    """Return how many positions the prompts have, where the batch or a mask says."""
    if batch is not None:
        return int(batch.tokens.shape[1])
    return int(positions.shape[1]) if isinstance(positions, Tensor) else None


def chosen_rows(
    positions: Positions, batch: SpanBatch | None, offset: int, n_prompts: int, n_rows: int
) -> Bool[Tensor, "prompt row"]:
    """Return which rows of this pass are meant.

    Args:
        positions: "all", "prompt_last" (the row that produces the first token), "generated" (every row of a
            generated token), a span's name, or a mask [prompt, pos] over the prompt.
        batch: The prompts being read, where known. Without it, "prompt_last" is the last row of the first pass.
        offset: Absolute position of the first row.
        n_prompts: Rows of the batch dimension in this pass.
        n_rows: Query rows in this pass.

    Raises:
        SpanError: A span was named and no batch is bound.
        WrongHookShape: The pass has another number of prompts or positions than the batch.
    """
    if is_word(positions, "all"):
        return torch.ones(n_prompts, n_rows, dtype=torch.bool)
    if isinstance(positions, Tensor):
        return _window(positions.bool().cpu(), offset, n_prompts, n_rows)
    if batch is None:
        if positions not in ("prompt_last", "generated"):
            raise SpanError(
                f"positions={positions!r} names a span, but no prompts are bound. Pass the mask itself"
                " (positions=batch.spans[...]), or run through rl.capture / rl.generate, which bind the batch."
            )
        rows = torch.zeros(n_prompts, n_rows, dtype=torch.bool)
        if positions == "prompt_last" and offset == 0:
            rows[:, -1] = True
        if positions == "generated" and offset > 0:
            rows[:] = True
        return rows
    if positions not in ("prompt_last", "generated"):
        return _window(batch.spans.require(positions), offset, n_prompts, n_rows)
    width = batch.tokens.shape[1]
    if offset == 0 and n_rows < width:
        raise WrongHookShape(
            f"the bound batch has {width} positions, but this pass has {n_rows}. Bind the batch that is read."
        )
    absolute = offset + torch.arange(n_rows)
    last = batch.prompt_last[:, None]
    if positions == "prompt_last":
        return _agree(absolute[None] == last, n_prompts)
    return _agree(absolute[None] > last, n_prompts)


def rows_to_read(
    positions: Positions,
    batch: SpanBatch | None,
    real: Bool[Tensor, "prompt pos"] | None,
    offset: int,
    n_prompts: int,
    n_rows: int,
) -> Bool[Tensor, "prompt row"]:
    """Return which rows of this pass a reader pools over: the chosen ones, padding left out.

    Args:
        positions: See `chosen_rows`.
        batch: See `chosen_rows`.
        real: Which positions of the prompts are no padding, where known; what follows them was generated.
        offset: Absolute position of the first row.
        n_prompts: Rows of the batch dimension in this pass.
        n_rows: Query rows in this pass.

    Raises:
        EmptySpan: Some prompts have a row in this pass and others have none.
    """
    rows = chosen_rows(positions, batch, offset, n_prompts, n_rows)
    if real is not None:
        beyond = max(0, offset + n_rows - real.shape[1])
        padded = torch.nn.functional.pad(real.cpu(), (0, beyond), value=True)
        rows = rows & padded[:, offset : offset + n_rows]
    some = rows.any(dim=1)
    if some.any() and not some.all():
        empty = (~some).nonzero().flatten().tolist()
        raise EmptySpan(
            f"positions={told(positions)} has no row in {len(empty)} of"
            f" {n_prompts} prompts (first: prompt {empty[0]}); a mean or maximum over nothing is undefined."
        )
    return rows


def _window(mask: Tensor, offset: int, n_prompts: int, n_rows: int) -> Tensor:
    width = mask.shape[1]
    if offset == 0 and n_rows != width:
        raise WrongHookShape(
            f"the rows were given for prompts of {width} positions, but this pass has {n_rows}. Bind or pass the batch"
            " that is really being read."
        )
    rows = torch.zeros(mask.shape[0], n_rows, dtype=torch.bool)
    inside = max(0, min(n_rows, width - offset))  # rows past the prompt were generated: no span names them
    rows[:, :inside] = mask[:, offset : offset + inside]
    return _agree(rows, n_prompts)


def _agree(rows: Tensor, n_prompts: int) -> Tensor:
    if rows.shape[0] != n_prompts:
        raise WrongHookShape(
            f"the bound batch has {rows.shape[0]} prompts, but this pass has {n_prompts}. Bind the batch that is read."
        )
    return rows
