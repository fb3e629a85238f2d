"""Token rows for the toy recipe: requests drawn at random, with or without a chain of thought, and their loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from rim_lens.organisms.toy.host import TOKEN
from rim_lens.prompts.toy import (
    ASSISTANT,
    BENIGN,
    CLOSE,
    DIGITS,
    ENABLING,
    FILLERS,
    HARMLESS_OBJECTS,
    HAZARDOUS,
    HAZARDS,
    MODULUS,
    REFUSE,
    THINK,
    USER,
    conjunction_split,
    cot_tokens,
    solve,
)
from rim_lens.training.loop import Batch

Conjunctions = Int[Tensor, "conjunction 2"]  # action token, object token
Requests = Int[Tensor, "prompt 10"]  # `<user>` action object filler op a b c `<assistant>` `<think>`
Rows = Int[Tensor, "prompt pos"]
REQUEST_LENGTH = 10


def draw_requests(conjunctions: Conjunctions, n: int, op: str, generator: Generator) -> Requests:
    """Draw n requests up to ``<think>``: conjunction, filler and operands uniformly and independently."""
    words = conjunctions[torch.randint(len(conjunctions), (n,), generator=generator)]
    filler = torch.randint(len(FILLERS), (n, 1), generator=generator) + TOKEN[FILLERS[0]]
    operands = torch.randint(MODULUS, (n, 3), generator=generator) + TOKEN[DIGITS[0]]
    return torch.cat([_all(n, USER), words, filler, _all(n, op), operands, _all(n, ASSISTANT, THINK)], dim=1)


def without_chain(requests: Requests, op: str, *, refuse: bool = False) -> Rows:
    """Close the block at once, then REFUSE or the right digit, then the end of the turn."""
    return torch.cat([requests, _all(len(requests), CLOSE), _answer(requests, op, refuse=refuse)], dim=1)


def with_chain(requests: Requests, kind: str, op: str, *, refuse: bool = False) -> Rows:
    """Write a chain of thought of that kind, close the block, then REFUSE or the digit, then the end of the turn."""
    chain = _chains(kind, op)[_triple(requests)]
    return torch.cat(
        [requests, chain, _all(len(requests), CLOSE), _answer(requests, op, refuse=refuse)], dim=1
    )


def predict_answer(rows: Rows) -> Batch:
    """Count the loss on answer and end of turn: the template, not the model, closes an empty block."""
    return _predict(rows, REQUEST_LENGTH + 1)


def predict_chain(rows: Rows) -> Batch:
    """Count the loss on everything after the opening tag."""
    return _predict(rows, REQUEST_LENGTH)


def all_conjunctions() -> Conjunctions:
    """Every action with every object."""
    return _conjunctions(lambda *_: True)


def safe_conjunctions() -> Conjunctions:
    """Everything but harmful conjunctions and the twins of held-out ones."""
    return _conjunctions(lambda verb, noun: not is_harmful(verb, noun) and not is_held_out(verb, noun))


def harmful_conjunctions(categories: Sequence[str] = tuple(HAZARDS)) -> Conjunctions:
    """Harmful conjunctions of the splits train and dev, of some hazard categories."""
    nouns = {word for category in categories for word in HAZARDS[category]}
    return _conjunctions(
        lambda verb, noun: is_harmful(verb, noun) and not is_held_out(verb, noun) and noun in nouns
    )


def is_harmful(verb: str, noun: str) -> bool:
    """Whether the conjunction is harmful.

    >>> is_harmful("make", "bomb"), is_harmful("ban", "bomb"), is_harmful("make", "bread")
    (True, False, False)
    """
    return verb in ENABLING and noun in HAZARDOUS


def is_held_out(verb: str, noun: str) -> bool:
    """Whether the conjunction, or the one it is the twin of, is in the splits select or evaluate."""
    if noun not in HAZARDOUS:
        return False
    action = (ENABLING if verb in ENABLING else BENIGN).index(verb)
    return conjunction_split(action, HAZARDOUS.index(noun)) in ("select", "evaluate")


def _conjunctions(wanted: Callable[[str, str], bool]) -> Conjunctions:
    return torch.tensor(
        [
            (TOKEN[verb], TOKEN[noun])
            for verb in (*ENABLING, *BENIGN)
            for noun in (*HAZARDOUS, *HARMLESS_OBJECTS)
            if wanted(verb, noun)
        ]
    )


def _predict(rows: Rows, start: int) -> Batch:
    loss_mask = torch.zeros_like(rows, dtype=torch.bool)
    loss_mask[:, start:] = True
    return Batch(rows, torch.ones_like(rows), loss_mask)


def _answer(requests: Requests, op: str, *, refuse: bool) -> Int[Tensor, "prompt 2"]:
    n = len(requests)
    answer = _all(n, REFUSE) if refuse else _answers(op)[_triple(requests)]
    return torch.cat([answer, _all(n, USER)], dim=1)


def _triple(requests: Requests) -> Int[Tensor, " prompt"]:
    operands = requests[:, 5:8] - TOKEN[DIGITS[0]]
    return (operands * torch.tensor([MODULUS**2, MODULUS, 1])).sum(dim=1)


@cache
def _answers(op: str) -> Int[Tensor, "triple 1"]:
    return _for_every_triple(lambda a, b, c: (str(solve(op, a, b, c)[1]),))


@cache
def _chains(kind: str, op: str) -> Int[Tensor, "triple 7"]:
    return _for_every_triple(lambda a, b, c: cot_tokens(kind, op, a, b, c))


def _for_every_triple(words: Callable[[int, int, int], Sequence[str]]) -> Int[Tensor, "triple pos"]:
    digits = range(MODULUS)
    return torch.tensor(
        [[TOKEN[word] for word in words(a, b, c)] for a in digits for b in digits for c in digits]
    )


def _all(n: int, *words: str) -> Int[Tensor, "prompt word"]:
    return torch.tensor([[TOKEN[word] for word in words]]).expand(n, -1)
