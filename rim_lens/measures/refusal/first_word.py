"""Up to the first word of an answer: whitespace that stands before it is passed over by a stated rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rim_lens.batching import micro_batches
from rim_lens.chat.formats import format_names, named_format
from rim_lens.chat.spans import SpanBatch, require_batch
from rim_lens.errors import ConditionError
from rim_lens.hooks.base import Component, bound
from rim_lens.lens import Decoder, Model, last_logits, model_facts, require_finite, tokenizer_of
from rim_lens.measures.refusal.openers import whitespace_ids
from rim_lens.sharing import each, row_groups

MAX_SKIP = 4  # whitespace tokens skipped before the first word is looked at

Skip = Literal["greedy", "none", "forced"]
T = TypeVar("T")


@dataclass(frozen=True)
class FirstWord:
    """Prompts that have come to the first word of their answer.

    Attributes:
        rows: Row numbers of the batch.
        logits: Of that word, [row, d_vocab].
        skipped: Whitespace tokens passed over.
        written: Those tokens, [row, skipped].
        decoder: Makes a decoder that has read these rows up to here.
    """

    rows: list[int]
    logits: Float[Tensor, "row d_vocab"]
    skipped: int
    written: Int[Tensor, "row skipped"]
    decoder: Callable[[], Decoder]


def check_answer_is_next(batch: SpanBatch, what: str) -> None:
    """Refuse prompts whose next token does not open an answer.

    Raises:
        ConditionError: The think block is open, the prompts end with what the model wrote, or are not rendered.
    """
    require_batch(batch, what)
    if batch.think == "open":
        raise ConditionError(
            f"{what} was asked at an open think block: the next token there is the CoT's, not the answer's. Use"
            " rl.generate(model, batch) and rl.refusal_rate, or close the block (think='off', or a given CoT)."
        )
    if any(batch.n_generated):
        raise ConditionError(
            f"{what} was asked after what the model itself wrote: the next token there opens no answer. Score the"
            " prompts as rendered, and the text with rl.refusal_rate."
        )


def forced_tokens(model: Model, batch: SpanBatch, whitespace: str | None) -> list[int]:
    r"""Tokens of the whitespace that is forced before the first word.

    Args:
        model: For its tokenizer.
        batch: For its format.
        whitespace: None: what the format writes after the closing think tag, where that is whitespace, else two
            newlines.

    Raises:
        ConditionError: It is not whitespace, or has no token in this vocabulary.
    """
    text = whitespace
    if text is None:
        after = named_format(batch.format).after_close if batch.format in format_names() else ""
        text = after if after and not after.strip() else "\n\n"
    if not text or text.strip():
        raise ConditionError(
            f"whitespace={text!r} was to be forced before the answer; give whitespace only, such as '\\n\\n'."
        )
    tokenizer = tokenizer_of(model)
    tokens = list(tokenizer.encode(text, add_special_tokens=False))
    if not tokens or tokenizer.decode(tokens) != text:
        raise ConditionError(
            f"this vocabulary has no tokens for the whitespace {text!r}; use skip='greedy' or skip='none'."
        )
    return tokens


def first_words_of(
    model: Model,
    batch: SpanBatch,
    components: Sequence[Component],
    *,
    skip: Skip,
    whitespace: str | None,
    max_rows: int,
    what: str,
    only: Sequence[int] | None = None,
) -> Iterator[FirstWord]:
    """Read prompts, or `only` some rows of the batch, up to the first word of the answer; rows that skip the same come together.

    Components must be attached by the caller, in a `with` of its own: they are only told here which rows are read.
    """
    read = _reader(model, batch, components, skip, whitespace, what)
    asked = list(range(len(batch))) if only is None else list(only)
    for places in micro_batches([int(batch.lengths[row]) for row in asked], max_rows=max_rows):
        yield from read([asked[place] for place in places])


def at_first_words(
    model: Model,
    batch: SpanBatch,
    components: Sequence[Component],
    measure: Callable[[FirstWord], T],
    *,
    skip: Skip,
    whitespace: str | None,
    max_rows: int,
    what: str,
) -> Iterator[tuple[list[int], T]]:
    """Row numbers, and what is measured where these prompts have come to the first word of their answer.

    As `first_words_of`, for what stands by itself in each prompt: processes share it, see `rim_lens.sharing.each`.
    """
    read = _reader(model, batch, components, skip, whitespace, what)

    def measured(rows: list[int]) -> list[tuple[list[int], T]]:
        return [(word.rows, measure(word)) for word in read(rows)]

    for found in each(row_groups(batch.lengths.tolist(), max_rows=max_rows), measured, what):
        yield from found


def written_before(
    model: Model, batch: SpanBatch, *, skip: Skip, whitespace: str | None, max_rows: int, what: str
) -> Iterator[tuple[list[int], Int[Tensor, "row skipped"]]]:
    """Row numbers, and what these prompts have before the first word of their answer; only `greedy` has to read them for it."""
    if skip == "greedy":
        # And no more than the tokens: a word holds on to its key-value cache.
        yield from at_first_words(
            model,
            batch,
            [],
            lambda word: word.written,
            skip=skip,
            whitespace=whitespace,
            max_rows=max_rows,
            what=what,
        )
        return
    forced = forced_tokens(model, batch, whitespace) if skip == "forced" else []
    yield list(range(len(batch))), torch.tensor(forced, dtype=torch.long).expand(len(batch), -1)


def _reader(
    model: Model,
    batch: SpanBatch,
    components: Sequence[Component],
    skip: Skip,
    whitespace: str | None,
    what: str,
) -> Callable[[list[int]], Iterator[FirstWord]]:
    blank = torch.tensor([], dtype=torch.long)
    if skip == "greedy":
        blank = whitespace_ids(tokenizer_of(model), model_facts(model).d_vocab)
    forced = forced_tokens(model, batch, whitespace) if skip == "forced" else []
    return lambda rows: _of_group(model, batch, components, rows, blank, forced, what)


def _of_group(
    model: Model,
    batch: SpanBatch,
    components: Sequence[Component],
    rows: list[int],
    blank: Tensor,
    forced: Sequence[int],
    what: str,
) -> Iterator[FirstWord]:
    decoder = Decoder(model)
    written = torch.tensor(forced, dtype=torch.long).expand(len(rows), -1)
    with bound(components, batch, rows) as part:
        if not len(blank) and not forced:
            logits = require_finite(last_logits(model, part.tokens, part.attention_mask), what).cpu()
        else:
            logits = require_finite(decoder.prefill(part.tokens, part.attention_mask), what).cpu()
        for token in forced:
            logits = require_finite(decoder.step(torch.full((len(rows),), token)), what).cpu()
    if not len(blank) and not forced:
        yield FirstWord(rows, logits, 0, written, lambda: _prefilled(model, batch, components, rows))
        return
    width, skipped = part.tokens.shape[1], len(forced)
    while True:
        next_tokens = logits.argmax(dim=-1)
        waits = torch.isin(next_tokens, blank) & (skipped < MAX_SKIP)
        ready, waiting = (~waits).nonzero().flatten(), waits.nonzero().flatten()
        if len(ready):
            its_rows = [rows[place] for place in ready.tolist()]
            yield FirstWord(
                its_rows,
                logits[ready],
                skipped,
                written[ready],
                _going_on(decoder, batch, its_rows, ready, width),
            )
        if not len(waiting):
            return
        rows = [rows[place] for place in waiting.tolist()]
        decoder = _going_on(decoder, batch, rows, waiting, width)()
        with bound(components, batch, rows) as part:
            width = part.tokens.shape[1]
            logits = require_finite(decoder.step(next_tokens[waiting]), what).cpu()
        written = torch.cat([written[waiting], next_tokens[waiting][:, None]], dim=1)
        skipped += 1


def _prefilled(model: Model, batch: SpanBatch, components: Sequence[Component], rows: list[int]) -> Decoder:
    decoder = Decoder(model)
    with bound(components, batch, rows) as part:
        decoder.prefill(part.tokens, part.attention_mask)
    return decoder


def _going_on(
    decoder: Decoder, batch: SpanBatch, rows: list[int], places: Tensor, width: int
) -> Callable[[], Decoder]:
    # The cache must be as wide as the prompts that components are told of, which lose padding none of them needs.
    drop = width - int(batch.lengths[rows].max())
    return lambda: decoder.chosen(places, drop)
