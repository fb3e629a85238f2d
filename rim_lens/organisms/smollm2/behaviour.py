"""What the organism does with each kind of request: generated outcomes, counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from rim_lens.chat import ChatFormat
from rim_lens.outcomes import Verdict, judge
from rim_lens.prompts import Prompt, load_prompts

MAX_NEW_TOKENS = 32
ROWS_AT_ONCE = 32

# name → (prompt set, think condition). "no block" is a bare assistant turn, "open" an opened think block in
# which the model writes its own chain of thought; the other words are kinds of chains of thought.
CONDITIONS: dict[str, tuple[str, str]] = {
    f"{prompts} {think}": (prompts, think)
    for prompts, thinks in {
        "harmful": ("off", "careful", "filler", "unrelated", "open", "no block"),
        "twins": ("off", "careful", "filler", "unrelated", "no block"),
        "sums": ("off",),
        "problems": ("off", "careful"),
    }.items()
    for think in thinks
}


@dataclass(frozen=True, slots=True)
class Replies:
    """Outcomes of one prompt set in one condition; no text is kept.

    Attributes:
        ids: Id of each request.
        verdicts: "refuse", "comply" or "other" of each.
        correct: For maths, whether the last number of the answer's first line is the right one; else empty.
    """

    ids: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    correct: tuple[bool, ...] = ()

    def rate(self, verdict: Verdict) -> float:
        """Share of requests with that outcome.

        >>> Replies(("a", "b"), ("refuse", "comply")).rate("refuse")
        0.5
        """
        return self.verdicts.count(verdict) / len(self.verdicts)

    def counts(self) -> dict[str, int]:
        """How many of each outcome, of how many, and how many right answers where there are any."""
        counted = Counter(self.verdicts)
        counts = {"n": len(self.ids)} | {
            verdict: counted[verdict] for verdict in ("refuse", "comply", "other")
        }
        return counts | ({"correct": sum(self.correct)} if self.correct else {})


def behaviour(
    model: Any,
    tokenizer: Any,
    split: str,
    conditions: Iterable[str] = tuple(CONDITIONS),
    *,
    limit: int | None = None,
) -> dict[str, Replies]:
    """Let a Hugging Face model answer our English prompts, greedily, and judge each reply by its opening words.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, with a chat format known to `ChatFormat`.
        split: Which of our splits.
        conditions: Names in `CONDITIONS`.
        limit: At most so many prompts of each set, spread evenly over it.

    Returns:
        Condition → outcomes. At most 32 tokens are written per reply: an "open" reply whose own chain of thought
        is longer counts by what stands in it so far (refuse) or as "other".
    """
    model.eval()
    chat = ChatFormat.from_tokenizer(tokenizer)
    found = {}
    for condition in conditions:
        prompts, think = CONDITIONS[condition]
        found[condition] = _replies(model, chat, _spread(_prompts(prompts, split), limit), think)
    return found


def _prompts(name: str, split: str) -> list[Prompt]:
    if name in ("harmful", "twins"):
        return load_prompts("harmful" if name == "harmful" else "harmless", split=split)
    return [p for p in load_prompts("reasoning", split=split) if (p.category == "sum") == (name == "sums")]


def _spread(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    if limit is None or limit >= len(prompts):
        return list(prompts)
    return [prompts[i * len(prompts) // limit] for i in range(limit)]


def _replies(model: Any, chat: ChatFormat, prompts: Sequence[Prompt], think: str) -> Replies:
    given = (
        think if think in ("off", "open") else "open" if think == "no block" else chat.cots(prompts, think)
    )
    verdicts: list[Verdict] = []
    correct: list[bool] = []
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        part = prompts[start : start + ROWS_AT_ONCE]
        batch = chat.render(part, think=given if isinstance(given, str) else given[start : start + len(part)])
        tokens, mask = batch.tokens, batch.attention_mask
        if think == "no block":
            end = int(batch.spans["think_open"].any(dim=0).nonzero()[0])
            tokens, mask = tokens[:, :end], mask[:, :end]
        for prompt, text in zip(part, _continue(model, chat, tokens, mask), strict=True):
            cot, closed, answer = text.partition("</think>") if think == "open" else ("", "", text)
            verdicts.append(judge(cot, answer, finished_thinking=think != "open" or bool(closed)).verdict)
            if prompt.answer is not None:
                numbers = re.findall(r"\d+", answer.strip().split("\n")[0])
                correct.append(bool(numbers) and numbers[-1] == prompt.answer)
    return Replies(tuple(prompt.id for prompt in prompts), tuple(verdicts), tuple(correct))


@torch.inference_mode()
def _continue(
    model: Any, chat: ChatFormat, tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"]
) -> list[str]:
    stop = set(chat.stop_ids)
    written = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=list(stop),
        pad_token_id=min(stop),
    )[:, tokens.shape[1] :].tolist()
    ends = [next((i for i, token in enumerate(row) if token in stop), len(row)) for row in written]
    return [chat.decode(row[:end]) for row, end in zip(written, ends, strict=True)]
