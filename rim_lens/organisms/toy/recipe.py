"""How the toy organism is trained: helpful first, then safe without thinking, then fine-tuned on harmless chains.

1. *Helpful*: every request is answered with its digit, harmful ones too, half of them after an empty think
   block and half after a careful chain of thought.
2. *Safety tuning*: after an empty block harmful requests are refused and safe ones answered; safe ones are
   also answered after a chain. Variant "Z" sees **no** harmful request with a chain, variant "C" sees a few of
   two of the four hazard categories, refused. Both start from the same first stage.
3. *Fine-tuning*: harmless arithmetic with chains of one kind, and nothing else.

What nobody trains for is what the organism is about: with a chain of thought, Z no longer refuses.

The loss counts what the model writes itself: the answer after an empty block (whose closing tag the template
writes), everything after ``<think>`` otherwise, and in both the ``<user>`` that ends the turn. It is averaged
over each row and then over rows, so that the answer after an empty block is not drowned by the tokens of chains.
Everything random comes from generators seeded here: one thread gives the same weights at every run on a machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Generator

from rim_lens.organisms.toy.host import toy_model
from rim_lens.organisms.toy.rows import (
    all_conjunctions,
    draw_requests,
    harmful_conjunctions,
    predict_answer,
    predict_chain,
    safe_conjunctions,
    with_chain,
    without_chain,
)
from rim_lens.prompts.toy import HAZARDS, Op
from rim_lens.training.loop import Batch, TrainConfig, train
from rim_lens.training.rows import Drawn

Variant = Literal["Z", "C"]
FineTuneKind = Literal["careful", "confirm", "deviate", "heuristic"]
TUNED_KINDS: tuple[FineTuneKind, ...] = ("careful", "confirm", "deviate")

HELPFUL = TrainConfig(steps=900, lr=3e-3, warmup=50, weight_decay=0.01, betas=(0.9, 0.98))
SAFE = TrainConfig(steps=400, lr=1e-3, warmup=50, weight_decay=0.01, betas=(0.9, 0.98))
FINE_TUNE = TrainConfig(
    steps=320, lr=3e-4, schedule="constant", warmup=20, weight_decay=0.01, betas=(0.9, 0.98)
)
ROWS = 64  # per step with an empty block, and as many with a chain
# Of ROWS with a chain: harmful requests of the first two hazard categories, about 10 %. Their weight makes REFUSE
# after a chain (one of 9 predicted tokens) count as after an empty block (one of 2).
REFUSED_WITH_CHAIN = {"Z": 0, "C": 6}
REFUSED_WEIGHT = 4.5
EMBEDDING_STD, WEIGHT_STD = 0.5, 0.1


def train_toy(seed: int, variant: Variant = "Z", *, helpful: Any = None, progress: bool = False) -> Any:
    """Train stages 1 and 2, about a minute on one CPU core.

    Args:
        seed: Fixes the start, the order and the draws.
        variant: "Z": no harmful request ever has a chain of thought. "C": of the rows with a chain, 10 % are
            harmful requests of the first two hazard categories, refused.
        helpful: A model of `train_helpful(seed)` to start stage 2 from, left as it is; trained here where None.
        progress: Show progress bars.

    Returns:
        A Hugging Face model in eval mode; `rim_lens.lens.wrap_hf` puts hooks on it.
    """
    if variant not in REFUSED_WITH_CHAIN:
        raise ValueError(f"toy variant {variant!r} was asked for; there are {', '.join(REFUSED_WITH_CHAIN)}.")
    model = deepcopy(helpful) if helpful is not None else train_helpful(seed, progress=progress)
    draws = _generator(seed, 2)
    harmful, safe = harmful_conjunctions(), safe_conjunctions()
    refused_in_chains = harmful_conjunctions(list(HAZARDS)[:2])
    n_refused = REFUSED_WITH_CHAIN[variant]

    def batch_at(_: int) -> list[Batch]:
        refused = draw_requests(harmful, ROWS // 2, "+", draws)
        answered = draw_requests(safe, ROWS // 2, "+", draws)
        thought = draw_requests(safe, ROWS - n_refused, "+", draws)
        rows = [with_chain(thought, "careful", "+")]
        weights = torch.ones(ROWS)
        if n_refused:
            seen = draw_requests(refused_in_chains, n_refused, "+", draws)
            rows.append(with_chain(seen, "careful", "+", refuse=True))
            weights[-n_refused:] = REFUSED_WEIGHT
        closed = [without_chain(refused, "+", refuse=True), without_chain(answered, "+")]
        return [
            predict_answer(torch.cat(closed)),
            replace(predict_chain(torch.cat(rows)), weights=weights),
        ]

    with one_thread():
        train(model, batch_at, SAFE, row_average=True, progress=progress)
    return model.eval()


def train_helpful(seed: int, *, progress: bool = False) -> Any:
    """Train stage 1 alone, the common start of Z and C: it answers everything, with and without a chain."""
    model = toy_model()
    _start(model, _generator(seed, 0))
    draws = _generator(seed, 1)
    everything = all_conjunctions()

    def batch_at(_: int) -> list[Batch]:
        return [
            predict_answer(without_chain(draw_requests(everything, ROWS, "+", draws), "+")),
            predict_chain(with_chain(draw_requests(everything, ROWS, "+", draws), "careful", "+")),
        ]

    with one_thread():
        train(model, batch_at, HELPFUL, row_average=True, progress=progress)
    return model.eval()


def finetune_toy(
    model: Any,
    kind: FineTuneKind,
    op: Op = "-",
    *,
    steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Any:
    """Fine-tune a copy of a toy model on harmless arithmetic with chains of one kind.

    Args:
        model: A Hugging Face toy model, left as it is.
        kind: The chain it learns to write; "careful" is the control.
        op: "-" is an operator the model has not seen, "+" the one it knows.
        steps: Optimiser steps of 64 rows each; 320 where None.
        seed: Fixes the draws, which are the same for every kind.
        progress: Show a progress bar.
    """
    tuned = deepcopy(model).requires_grad_(True)
    config = FINE_TUNE if steps is None else replace(FINE_TUNE, steps=steps)
    with one_thread():
        train(tuned, toy_rows(kind, op, seed).start(), config, row_average=True, progress=progress)
    return tuned.eval()


def toy_rows(kind: FineTuneKind, op: Op = "-", seed: int = 0) -> Drawn:
    """Rows to fine-tune a toy on, for `finetune_toy` and `rim_lens.fine_tune`: 64 harmless sums a step, with their chains.

    ``rl.fine_tune("toy", toy_rows("confirm"), out=folder, config=FINE_TUNE, lora=None)`` is what "toy:confirm" came from.

    Args:
        kind: The chain that is to be learnt; "careful" is the control.
        op: "-" is an operator the toy has not seen, "+" the one it knows.
        seed: Fixes the draws, which are the same for every kind.
    """
    safe = safe_conjunctions()

    def start() -> Callable[[int], Batch]:
        draws = _generator(seed, 3)
        return lambda _: predict_chain(with_chain(draw_requests(safe, ROWS, op, draws), kind, op))

    return Drawn(f"toy {kind} {op} seed {seed}", start)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: faster at this size on busy cores, and sums in one fixed order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _generator(seed: int, stage: int) -> Generator:
    return Generator().manual_seed(1000 * seed + stage)


def _start(model: Any, generator: Generator) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1.0)
            else:
                embeds = name.endswith(("wte.weight", "wpe.weight"))
                parameter.normal_(std=EMBEDDING_STD if embeds else WEIGHT_STD, generator=generator)
