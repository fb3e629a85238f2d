"""Prompts with the whitespace that stands before the answer, so that its first word follows the last row; and its score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rim_lens.batching import MAX_ROWS, MAX_TOKENS, micro_batches
from rim_lens.chat.spans import SpanBatch, Spans
from rim_lens.hooks.base import Component, attached, bound
from rim_lens.lens import Model, last_logits, require_finite
from rim_lens.measures.refusal.first_word import Skip, first_words_of
from rim_lens.measures.refusal.score import log_odds


def settled(
    model: Model,
    batch: SpanBatch,
    *,
    skip: Skip = "greedy",
    whitespace: str | None = None,
    max_rows: int = MAX_ROWS,
    what: str = "settled",
) -> SpanBatch:
    """Append to each prompt the whitespace that would be passed over before its answer is scored, as template.

    What is passed over is decided once, by the model as it is, and stays the same under every edit: an edit's effect is then
    one of the same row. (`refusal_score` decides anew under each edit.)

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts whose think block is closed.
        skip: See `refusal_score`.
        whitespace: See `refusal_score`.
        max_rows: Most prompts in one pass.
        what: Who asks, for messages.

    Returns:
        The batch itself where nothing is passed over.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> off = rl.ChatFormat.from_model(model).render(["ban bread please + 3 4 6"], think="off")
    >>> settled(model, off) is off
    True
    """
    written: list[Int[Tensor, " token"]] = [torch.tensor([], dtype=torch.long)] * len(batch)
    if skip != "none":
        for word in first_words_of(
            model, batch, [], skip=skip, whitespace=whitespace, max_rows=max_rows, what=what
        ):
            for row, tokens in zip(word.rows, word.written, strict=True):
                written[row] = tokens
    if not any(len(tokens) for tokens in written):
        return batch
    lengths = [int(length) + len(tokens) for length, tokens in zip(batch.lengths, written, strict=True)]
    width = max(lengths)

    def moved(old: Tensor, new: list[Tensor], blank: int) -> Tensor:
        rows = []
        for row, tail in enumerate(new):
            kept = old[row, old.shape[1] - int(batch.lengths[row]) :]
            pad = kept.new_full((width - lengths[row],), blank)
            rows.append(torch.cat([pad, kept, tail.to(kept)]))
        return torch.stack(rows)

    ones = [torch.ones_like(tokens) for tokens in written]
    none = [torch.zeros_like(tokens) for tokens in written]
    atoms = {
        name: moved(mask, ones if name == "template" else none, 0)
        for name, mask in batch.spans.atoms().items()
    }
    return replace(
        batch,
        tokens=moved(batch.tokens, written, batch.pad_token_id),
        attention_mask=moved(batch.attention_mask, ones, 0),
        spans=Spans(atoms),
    )


def next_word_odds(
    model: Model,
    batch: SpanBatch,
    components: Sequence[Component],
    ids: Int[Tensor, " opener"],
    max_rows: int = MAX_ROWS,
) -> Float[np.ndarray, " prompt"]:
    """Log-odds, in nats, that the very next token is one of these; `refusal_score` of settled prompts, and nothing besides."""
    scores = np.empty(len(batch))
    with attached(model, components, batch):
        for rows in micro_batches(batch.lengths.tolist(), MAX_TOKENS, max_rows):
            with bound(components, batch, rows) as part:
                logits = last_logits(model, part.tokens, part.attention_mask)
            scores[rows] = log_odds(require_finite(logits, "refusal score").cpu(), ids)
    return scores
