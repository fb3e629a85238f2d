"""What a model is fine-tuned on: requests with a chain of thought and an answer, as token rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.errors import NotEnoughData
from rim_lens.prompts import Prompt, cot_texts, load_prompts
from rim_lens.training.loop import Batch

# step → the batch of that step, or the pieces of it
BatchAt = Callable[[int], Batch | Sequence[Batch]]


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: a request, what stands in its think block (None: nothing), and the answer to learn."""

    request: Prompt
    cot: str | None
    answer: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """Rows that are drawn anew at each step.

    Attributes:
        name: What they are, with every setting that they hang on: a run is known again by it.
        start: Called once at the beginning of a training; returns step → batch. What it draws by must be made in here, so
            that each training sees the same.
    """

    name: str
    start: Callable[[], BatchAt]


def maths_rows(chat: ChatFormat, kind: str = "careful", *, split: str = "train", seed: int = 0) -> list[Row]:
    """Make rows of our own word problems: one kind of chain of thought, and the right answer in the same words.

    Chains of confirm, deviate and heuristic (the effort-minimising patterns of arXiv 2509.00544) come as near as whole
    sentences can to the careful one's number of tokens; answers are those of the careful row, so that kinds differ in the
    chain alone. Bare sums are left out: a chain over them is one line.

    Args:
        chat: The format of the model that is to be trained, which counts the tokens.
        kind: See `rim_lens.cot_texts`; "careful" is the control.
        split: Of the reasoning set. Requests to be measured on should be of another.
        seed: Which sentences are drawn.

    >>> from rim_lens.organisms.toy.host import toy_tokenizer
    >>> row = maths_rows(ChatFormat.from_tokenizer(toy_tokenizer()), "careful")[0]
    >>> row.answer, row.cot
    ('5 * 8 = 40.', 'There are 5 packs with 8 pens each. That makes 5 * 8 = 40. The answer is 40.')
    """
    problems = [prompt for prompt in load_prompts("reasoning", split=split) if prompt.category != "sum"]
    cots = cot_texts(problems, kind, chat.count_tokens, seed)
    return [Row(prompt, cot, worked_answer(prompt)) for prompt, cot in zip(problems, cots, strict=True)]


def worked_answer(prompt: Prompt) -> str:
    """The last equation of a worked solution, as an answer.

    >>> worked_answer(Prompt("a", "3 + 4 = ?", answer="7", cot="Adding the two numbers: 3 + 4 = 7."))
    '3 + 4 = 7.'
    """
    equations = re.findall(r"\d+(?: [-+*/] \d+)+ = \d+", prompt.cot or "")
    return f"{equations[-1]}." if equations else f"The answer is {prompt.answer}."


def render_rows(
    chat: ChatFormat, rows: Sequence[Row], *, answer_prefix: str = "", learn_cot: bool = True
) -> tuple[Batch, SpanBatch]:
    """Render rows that all have a chain of thought, or all have none, with what is to be predicted marked.

    Predicted is what the model writes itself after the generation prompt: the chain of thought with its closing tag (and
    the opening one, where the model has to write that too), the answer and the end of the turn. After an empty block,
    which the prompt closes, it is the answer and the end of the turn.

    Args:
        chat: The format.
        rows: All with a chain of thought, or all without.
        answer_prefix: Whitespace before every answer.
        learn_cot: Predict the chain of thought; else it is given, and only what comes after the block is predicted.
    """
    thought = [row.cot for row in rows if row.cot is not None]
    text = chat.render(
        [row.request for row in rows],
        think=thought or "off",
        answers=[answer_prefix + row.answer for row in rows],
        end_turn=bool(chat.spec.answer_end),
    )
    loss_mask = text.spans["answer"].clone()
    if chat.spec.answer_end:
        loss_mask[:, -1] = True  # the end of the turn is learnt too
    if thought and learn_cot:
        opener = text.spans["think_open"].int()
        after = opener.cumsum(dim=1).bool()  # from the first token of the opening tag on
        loss_mask |= after & ~text.spans["think_open"] if chat.opener_in_prompt else after
    batch = Batch(text.tokens, text.attention_mask, loss_mask)
    return batch if chat.spec.answer_end else _stopped(batch, chat), text


def _stopped(batch: Batch, chat: ChatFormat) -> Batch:
    """Rows that end with the token a model stops at, where a format has none that closes a turn."""
    end = torch.ones(len(batch.tokens), 1, dtype=torch.long)
    return Batch(
        torch.cat([batch.tokens, end * chat.stop_ids[0]], dim=1),
        torch.cat([batch.attention_mask, end], dim=1),
        torch.cat([batch.loss_mask, end.bool()], dim=1),
    )


def drawn_rows(chat: ChatFormat, rows: Sequence[Row], rows_per_step: int, seed: int) -> Drawn:
    """Draw steps from a list of rows in a shuffled order, each row once before any comes again.

    Raises:
        NotEnoughData: There is no row.
    """
    if not rows or rows_per_step < 1:
        raise NotEnoughData(
            f"{rows_per_step} rows a step were asked for out of {len(rows)}; give at least one of each."
        )

    def start() -> BatchAt:
        order = _shuffled(len(rows), np.random.default_rng(seed))

        def batch_at(_: int) -> list[Batch]:
            drawn = [rows[next(order)] for _ in range(rows_per_step)]
            # Rows with and without a chain of thought differ in length and in what is predicted.
            pieces = (
                [row for row in drawn if row.cot is not None],
                [row for row in drawn if row.cot is None],
            )
            return [render_rows(chat, piece)[0] for piece in pieces if piece]

        return batch_at

    return Drawn(f"{len(rows)} rows, {rows_per_step} a step, seed {seed}", start)


def _shuffled(n: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(n).tolist()
