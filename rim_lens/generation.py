"""Text under any editor: batched, with the key-value cache on, spans of what was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from rim_lens.batching import MAX_ROWS, micro_batches
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.errors import CaptureError, ConditionError
from rim_lens.hooks.base import Component, bound
from rim_lens.lens import Decoder, Model, model_facts, require_eval, require_finite
from rim_lens.outcomes import Outcome, first_words, judge

if TYPE_CHECKING:
    import pandas as pd

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
    """

    batch: SpanBatch
    cot: tuple[str, ...]
    answer: tuple[str, ...]
    outcome: tuple[str, ...]
    where: tuple[str, ...]
    finished: tuple[bool, ...]

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
            }
        )

    def __repr__(self) -> str:
        counts = {verdict: self.outcome.count(verdict) for verdict in ("refuse", "comply", "other")}
        return f"Generation({len(self.outcome)} prompts, {self.batch.name}: {counts})"


def generate(
    model: Model,
    batch: SpanBatch,
    *components: Component,
    max_new_tokens: int = 64,
    chat: ChatFormat | None = None,
    keep_text: bool = False,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> Generation:
    """Let the model continue each prompt, greedily, and judge the outcome.

    Deterministic: the most probable token at each step. Left padding and the cache change nothing but the
    last bits of floating-point numbers. A row stops at its end-of-turn token. A model that does not
    close its think block within the tokens allowed is unfinished, and is judged by what stands there.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts from `ChatFormat.render`, in any condition.
        *components: Editors (or readers) that are active meanwhile, spans and generated rows included.
        max_new_tokens: Most tokens a row may get. The *answer* to a harmful request is cut at 64 all the same,
            unless keep_text.
        chat: The format the batch was rendered with; found from the model when None.
        keep_text: Keep full texts for harmful requests too. Your responsibility; nothing is written to disk here.
        max_rows: Most prompts generated together.
        progress: Show a progress bar.

    Raises:
        ConditionError: max_new_tokens is not positive, or leaves no room in the context.
        NotFinite: The model gives NaN or infinity.
    """
    facts = model_facts(model)
    require_eval(model)
    chat = chat or ChatFormat.from_model(model)
    if max_new_tokens < 1:
        raise ConditionError(f"max_new_tokens={max_new_tokens} was asked for; at least 1 is needed.")
    longest = int(batch.lengths.max())
    room = facts.n_ctx - longest
    if room < 1:
        raise ConditionError(
            f"the longest prompt has {longest} tokens and the model's context {facts.n_ctx}: no room to write."
        )
    steps = min(max_new_tokens, room)
    if len({id(component) for component in components}) < len(components):
        raise CaptureError("the same component was given twice.")

    written: dict[int, list[int]] = {}
    with ExitStack() as stack:
        for component in components:
            stack.enter_context(component.on(model))
        groups = micro_batches(batch.lengths.tolist(), max_rows=max_rows)
        for group in tqdm(groups, desc=f"generate {batch.name}", disable=not progress):
            with bound(components, batch, group) as part:
                done = _stopper(chat, part, keep_text)
                for row, tokens in zip(group, _greedy(model, part, steps, done), strict=True):
                    written[row] = tokens
    return _label(chat, batch, [written[row] for row in range(len(batch))], keep_text)


def _greedy(
    model: Model, part: SpanBatch, steps: int, done: Callable[[int, Sequence[int]], bool]
) -> list[list[int]]:
    decoder = Decoder(model)
    logits = decoder.prefill(part.tokens, part.attention_mask)
    rows: list[list[int]] = [[] for _ in range(len(part))]
    alive = [True] * len(part)
    for step in range(steps):
        chosen = _most_probable(logits)
        for row, token in enumerate(chosen.tolist()):
            if alive[row]:
                rows[row].append(token)
                alive[row] = not done(row, rows[row])
        if not any(alive) or step == steps - 1:
            break
        # Rows that are done are fed their own continuation until the batch ends; nothing of it is kept.
        logits = decoder.step(chosen)
    return rows


def _most_probable(logits: Float[Tensor, "prompt d_vocab"]) -> Int[Tensor, " prompt"]:
    return require_finite(logits, "generate").argmax(dim=-1).cpu()


def _stopper(chat: ChatFormat, part: SpanBatch, keep_text: bool) -> Callable[[int, Sequence[int]], bool]:
    stops = set(chat.stop_ids)
    begun: list[int | None] = [None if part.think == "open" else 0] * len(part)  # where the answer begins

    def done(row: int, tokens: Sequence[int]) -> bool:
        if tokens[-1] in stops:
            return True
        if begun[row] is None:
            begun[row] = _answer_start(chat, tokens)
        start = begun[row]
        cap = part.prompts[row].kind == "harmful" and not keep_text
        return cap and start is not None and len(tokens) - start >= HARMFUL_ANSWER_CAP

    return done


def _answer_start(chat: ChatFormat, tokens: Sequence[int]) -> int | None:
    """Where the answer to an open prompt begins: after the block, or at once where the model opens none."""
    opening, closing = chat.spec.think_open, chat.spec.think_close
    if closing and closing in chat.decode(tokens[-_LONGEST_TAG:]):
        return len(tokens)
    if chat.opener_in_prompt:
        return None
    head = chat.decode(tokens[:_LONGEST_TAG]).lstrip()
    may_come = opening.startswith(head) and len(tokens) < _LONGEST_TAG
    return None if head.startswith(opening) or may_come else 0


def _label(chat: ChatFormat, batch: SpanBatch, rows: Sequence[Sequence[int]], keep_text: bool) -> Generation:
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[batch.pad_token_id] * (width - len(row))] for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    whole = chat.extend(batch, tokens, mask)
    outcomes: list[Outcome] = []
    for row, prompt in enumerate(whole.prompts):
        # A given CoT was not written by the model, so that a refusal inside it is not the model's.
        cot = "" if batch.think == "cot" else whole.cots[row]
        toy = prompt.language == "toy" or chat.name == "toy"
        finished = whole.finished_thinking[row]
        outcomes.append(judge(cot, whole.answers[row], finished_thinking=finished, toy=toy))
    stops = set(chat.stop_ids)
    redact = [prompt.kind == "harmful" and not keep_text for prompt in whole.prompts]
    return Generation(
        batch=whole,
        cot=tuple(first_words(text) if hide else text for text, hide in zip(whole.cots, redact, strict=True)),
        answer=tuple(
            first_words(text) if hide else text for text, hide in zip(whole.answers, redact, strict=True)
        ),
        outcome=tuple(outcome.verdict for outcome in outcomes),
        where=tuple(outcome.where for outcome in outcomes),
        finished=tuple(bool(row) and row[-1] in stops for row in rows),
    )
