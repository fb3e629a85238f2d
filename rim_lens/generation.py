"""Text under any editor: batched, with the key-value cache on, spans of what was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.chat.spans import require_batch
from rim_lens.errors import ConditionError, SpanError
from rim_lens.hooks.base import Component, attached, bound
from rim_lens.lens import Decoder, Model, model_facts, require_eval, require_finite
from rim_lens.outcomes import Outcome, first_words, judge
from rim_lens.sharing import each, row_groups

if TYPE_CHECKING:
    import pandas as pd

Ending = Literal["ended", "empty", "cut", "out of tokens"]

HARMFUL_ANSWER_CAP = 64  # tokens; enough to judge an answer, too few to be of use
_LONGEST_TAG = 12  # tokens; a think tag spelled out in text takes at most so many, spaces before it included


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    Attributes:
        batch: Prompt and completion as one SpanBatch, so that every reader runs on what the model itself wrote.
        cot: Text inside the think block per row. For harmful requests only its first words, unless keep_text.
        answer: Text after it, likewise.
        outcome: "refuse", "comply" or "other" per row.
        where: "answer", "think" or "none" per row: where the outcome was found.
        finished: Per row, whether the turn ended by itself within the tokens allowed.
        n_forced: Per row, how many of its `batch.n_generated` tokens are a closing think tag (with the whitespace around
            it) that was forced and not written by the model; 0 where the model closed its block itself, or had none.
        ending: Per row, why writing stopped: "ended" (the model ended its turn), "empty" (it ended its turn and had said
            nothing, neither in a think block nor after it: the outcome is "other", found "none"), "cut" (an answer
            to a harmful request came to its 64 tokens), or "out of tokens".
        given_cot: Per row, the chain of thought, or the beginning of one, that stood in the prompt; "" where none did.
    """

    batch: SpanBatch
    cot: tuple[str, ...]
    answer: tuple[str, ...]
    outcome: tuple[str, ...]
    where: tuple[str, ...]
    finished: tuple[bool, ...]
    n_forced: tuple[int, ...]
    ending: tuple[Ending, ...]
    given_cot: tuple[str, ...]

    @property
    def own_cot(self) -> tuple[str, ...]:
        """Per row, what the model itself wrote inside think blocks, in full: a refusal in given words is not its own."""
        return tuple(map(_own, self.batch.cots, self.given_cot))

    @property
    def closed_by_force(self) -> tuple[bool, ...]:
        """Per row, whether the think block was closed for the model."""
        return tuple(count > 0 for count in self.n_forced)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt, without full texts."""
        import pandas as pd

        return pd.DataFrame(
            {
                "prompt": [prompt.id for prompt in self.batch.prompts],
                "kind": [prompt.kind for prompt in self.batch.prompts],
                "condition": self.batch.name,
                "outcome": self.outcome,
                "where": self.where,
                "first_words": [
                    first_words(answer or cot) for cot, answer in zip(self.cot, self.answer, strict=True)
                ],
                "n_generated": self.batch.n_generated,
                "finished": self.finished,
                "closed_by_force": self.closed_by_force,
                "ending": self.ending,
            }
        )

    def __repr__(self) -> str:
        counts = {verdict: self.outcome.count(verdict) for verdict in ("refuse", "comply", "other")}
        told = [
            f"{count} {words}"
            for count, words in (
                (sum(self.closed_by_force), "closed by force"),
                (self.ending.count("empty"), "empty"),
            )
            if count
        ]
        return f"Generation({', '.join([f'{len(self.outcome)} prompts', f'{self.batch.name}: {counts}', *told])})"


def generate(
    model: Model,
    batch: SpanBatch,
    *components: Component,
    max_new_tokens: int = 64,
    max_cot_tokens: int | None = None,
    close_unfinished: bool = False,
    chat: ChatFormat | None = None,
    keep_text: bool = False,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> Generation:
    """Let the model continue each prompt, greedily, and judge the outcome.

    Deterministic: the most probable token at each step. Left padding and the cache change nothing but the
    last bits of floating-point numbers. A row stops at its end-of-turn token. A model that does not
    close its think block within the tokens allowed is unfinished, and is judged by what stands there.

    With ``close_unfinished=True`` such a block is closed instead: when its chain of thought has come to
    `max_cot_tokens`, the format's closing tag with the whitespace around it is appended token by token, and the model goes
    on to its answer. It is counted: `Generation.n_forced`. The forced tokens are part of `batch.n_generated` (they follow
    the prompt, and editors at "generated" act on their rows), and the spans are those of a block the model closed. What a
    model says after a tag it did not write is not what it would have said in its own time: report the share of
    forced rows. A model that ends its turn inside the block is left alone.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts from `ChatFormat.render`, in any condition.
        *components: Editors (or readers) that are active meanwhile, spans and generated rows included.
        max_new_tokens: Most tokens a row may get. Where the chain of thought has its own budget, most tokens of the answer.
            The *answer* to a harmful request is cut at 64 all the same, unless keep_text.
        max_cot_tokens: Most tokens of a chain of thought that the model writes itself, its closing tag among them. None:
            chain of thought and answer share max_new_tokens; with close_unfinished each gets as many.
        close_unfinished: Close a think block that is still open after max_cot_tokens.
        chat: The format the batch was rendered with; found from the model when None.
        keep_text: Keep full texts for harmful requests too. Your responsibility; nothing is written to disk here.
        max_rows: Most prompts generated together.
        progress: Show a progress bar.

    Raises:
        ConditionError: A number of tokens is not positive, or there is no room for them in the context.
        NotFinite: The model gives NaN or infinity.
        SpanError: The batch is of another format.
    """
    facts = model_facts(model)
    require_eval(model)
    require_batch(batch, "generate")
    chat = chat or ChatFormat.from_model(model)
    if batch.format != chat.name:
        raise SpanError(
            f"the batch is in format {batch.format!r}, this is {chat.name!r}; pass chat=, the format it came from."
        )
    for name, value in (("max_new_tokens", max_new_tokens), ("max_cot_tokens", max_cot_tokens)):
        if value is not None and value < 1:
            raise ConditionError(f"{name}={value} was asked for; at least 1 is needed.")
    longest = int(batch.lengths.max())
    room = facts.n_ctx - longest
    if room < 1:
        raise ConditionError(
            f"the longest prompt has {longest} tokens and the model's context {facts.n_ctx}: no room to write."
        )
    thinks = batch.think == "open"
    if thinks and close_unfinished and max_cot_tokens is None:
        max_cot_tokens = max_new_tokens
    budget = _Budget(
        cot=max_cot_tokens if thinks else None,
        answer=max_new_tokens,
        close=close_unfinished and thinks,
        room=room,
    )
    needed = (budget.cot or 0) + len(_closing(chat, "")) + max_new_tokens
    if budget.close and needed > room:
        raise ConditionError(
            f"{budget.cot} tokens of thought, the closing tag and {max_new_tokens} tokens of answer are {needed}, and the"
            f" context of {facts.n_ctx} has room for {room} after the longest prompt. Lower max_cot_tokens or max_new_tokens."
        )

    written: dict[int, _Row] = {}
    with attached(model, components, batch):

        def write(group: list[int]) -> list[_Row]:
            with bound(components, batch, group) as part:
                rows = [_started(part, place, keep_text) for place in range(len(part))]
                _greedy(model, part, chat, rows, budget)
            return rows

        groups = row_groups(batch.lengths.tolist(), max_rows=max_rows)
        shown = tqdm(groups, desc=f"generate {batch.name}", disable=not progress)
        for group, rows in zip(shown, each(groups, write, "generate"), strict=True):
            written.update(zip(group, rows, strict=True))
    return _label(chat, batch, [written[row] for row in range(len(batch))], keep_text)


@dataclass(frozen=True)
class _Budget:
    """How many tokens a row may get: `cot` inside the block (None: shared with the answer), `answer` after it."""

    cot: int | None
    answer: int
    close: bool
    room: int


@dataclass
class _Row:
    """A row while it is written.

    Attributes:
        opened: Whether the prompt ends inside a think block.
        capped: Whether its answer is cut at `HARMFUL_ANSWER_CAP`.
        answer_at: Token at which the answer begins; None while the model thinks.
        tokens: What was written.
        queue: Forced tokens that come next.
        n_forced: Forced tokens so far, and in the queue.
        ending: Why it stopped; None while it goes on.
    """

    opened: bool
    capped: bool
    answer_at: int | None
    tokens: list[int] = field(default_factory=list)
    queue: list[int] = field(default_factory=list)
    n_forced: int = 0
    ending: Ending | None = None


def _started(part: SpanBatch, place: int, keep_text: bool) -> _Row:
    return _Row(
        opened=bool(part.spans["think_open"][place].any()),
        capped=part.prompts[place].kind == "harmful" and not keep_text,
        answer_at=None if part.think == "open" else 0,
    )


def _greedy(model: Model, part: SpanBatch, chat: ChatFormat, rows: Sequence[_Row], budget: _Budget) -> None:
    decoder = Decoder(model)
    logits = decoder.prefill(part.tokens, part.attention_mask)
    stops = frozenset(chat.stop_ids)
    while True:
        chosen = _most_probable(logits)
        for place, row in enumerate(rows):
            if row.ending is None:
                chosen[place] = _append(row, int(chosen[place]), chat, stops, budget)
        if all(row.ending is not None for row in rows):
            return
        # Rows that are done are fed their own continuation until the batch ends; nothing of it is kept.
        logits = decoder.step(chosen)


def _append(row: _Row, token: int, chat: ChatFormat, stops: frozenset[int], budget: _Budget) -> int:
    """Write a token, the forced one where one is due, and see whether the row ends here; return it."""
    if row.queue:
        token = row.queue.pop(0)
        row.tokens.append(token)
        if not row.queue:
            row.answer_at = len(row.tokens)
    else:
        row.tokens.append(token)
        if token in stops:
            row.ending = "ended"
        elif row.answer_at is None:
            row.answer_at = _answer_start(chat, row)
    n = len(row.tokens)
    if row.ending is not None or row.queue:
        return token
    if row.answer_at is not None and row.capped and n - row.answer_at >= HARMFUL_ANSWER_CAP:
        row.ending = "cut"
    elif n >= budget.room or (budget.cot is None and n >= budget.answer):
        row.ending = "out of tokens"
    elif budget.cot is not None and row.answer_at is not None:
        row.ending = "out of tokens" if n - row.answer_at >= budget.answer else None
    elif budget.cot is not None and n >= budget.cot:
        if budget.close and _inside(chat, row):
            row.queue = _closing(chat, chat.decode(row.tokens[-_LONGEST_TAG:]))
            row.n_forced = len(row.queue)
        else:
            row.ending = "out of tokens"
    return token


def _inside(chat: ChatFormat, row: _Row) -> bool:
    """Whether a block has been opened; where the model opens it itself, the tag may still be unfinished."""
    return row.opened or chat.decode(row.tokens).lstrip().startswith(chat.spec.think_open)


def _closing(chat: ChatFormat, thought: str) -> list[int]:
    """Tokens that close a block after these last words of it: the format's tag, the whitespace before it not twice."""
    spec = chat.spec
    before = "" if spec.before_close and thought.endswith(spec.before_close) else spec.before_close
    return chat.encode(before + spec.think_close + spec.after_close)


def _most_probable(logits: Float[Tensor, "prompt d_vocab"]) -> Int[Tensor, " prompt"]:
    return require_finite(logits, "generate").argmax(dim=-1).cpu()


def _answer_start(chat: ChatFormat, row: _Row) -> int | None:
    """Where the answer to an open prompt begins: after the block, or at once where the model opens none."""
    opening, closing = chat.spec.think_open, chat.spec.think_close
    if closing and closing in chat.decode(row.tokens[-_LONGEST_TAG:]):
        return len(row.tokens)
    if row.opened:
        return None
    head = chat.decode(row.tokens[:_LONGEST_TAG]).lstrip()
    may_come = opening.startswith(head) and len(row.tokens) < _LONGEST_TAG
    return None if head.startswith(opening) or may_come else 0


def _label(chat: ChatFormat, batch: SpanBatch, rows: Sequence[_Row], keep_text: bool) -> Generation:
    width = max(len(row.tokens) for row in rows)
    tokens = torch.tensor([[*row.tokens, *[batch.pad_token_id] * (width - len(row.tokens))] for row in rows])
    mask = torch.tensor([[True] * len(row.tokens) + [False] * (width - len(row.tokens)) for row in rows])
    whole = chat.extend(batch, tokens, mask)
    outcomes: list[Outcome] = []
    endings: list[Ending] = []
    given = batch.cots or ("",) * len(batch)
    if any(given):  # as read back from tokens, which may differ from the text by spaces
        given = chat.extend(batch, tokens[:, :0], mask[:, :0]).cots
    for place, prompt in enumerate(whole.prompts):
        own = _own(whole.cots[place], given[place])
        toy = prompt.language == "toy" or chat.name == "toy"
        finished = whole.finished_thinking[place]
        outcomes.append(judge(own, whole.answers[place], finished_thinking=finished, toy=toy))
        ending: Ending = rows[place].ending or "out of tokens"
        silent = not own and not whole.answers[place]
        endings.append("empty" if ending == "ended" and silent else ending)
    redact = [prompt.kind == "harmful" and not keep_text for prompt in whole.prompts]
    return Generation(
        batch=whole,
        cot=tuple(first_words(text) if hide else text for text, hide in zip(whole.cots, redact, strict=True)),
        answer=tuple(
            first_words(text) if hide else text for text, hide in zip(whole.answers, redact, strict=True)
        ),
        outcome=tuple(outcome.verdict for outcome in outcomes),
        where=tuple(outcome.where for outcome in outcomes),
        finished=tuple(row.ending == "ended" for row in rows),
        n_forced=tuple(row.n_forced for row in rows),
        ending=tuple(endings),
        given_cot=given,
    )


def _own(cot: str, given: str) -> str:
    return cot.removeprefix(given).strip()
