"""Editors run on a case, and what the plain model says they should do, written down with loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from rim_lens.chat.spans import ATOMS, SpanBatch, Spans
from rim_lens.hooks import bound
from rim_lens.lens import Decoder, all_logits
from rim_lens.prompts.records import Prompt
from tests.families import TOLERANCE, Case, close

N_NEW = 2


def logits_under(case: Case, *editors: Any, batch: SpanBatch | None = None) -> Tensor:
    """One pass over the case's batch, or another, bound to the editors."""
    batch = case.batch if batch is None else batch
    with ExitStack() as stack:
        stack.enter_context(bound(editors, batch))
        for editor in editors:
            stack.enter_context(editor.on(case.model))
        return all_logits(case.model, batch.tokens, batch.attention_mask)


def decoded_under(case: Case, *editors: Any) -> Tensor:
    """Logits of the last prompt row and of N_NEW forced tokens under a key-value cache."""
    new = forced(case.batch)
    with ExitStack() as stack:
        stack.enter_context(bound(editors, case.batch))
        for editor in editors:
            stack.enter_context(editor.on(case.model))
        decoder = Decoder(case.model)
        found = [decoder.prefill(case.batch.tokens, case.batch.attention_mask)]
        found += [decoder.step(new[:, step]) for step in range(N_NEW)]
    return torch.stack(found, dim=1)


def forced(batch: SpanBatch) -> Tensor:
    """The tokens that a decoding test writes."""
    return torch.randint(2, 71, (len(batch), N_NEW), generator=torch.Generator().manual_seed(5))


def extended(batch: SpanBatch) -> tuple[Tensor, Tensor]:
    """Tokens and mask of the prompts with the forced tokens behind them."""
    new = forced(batch)
    return torch.cat([batch.tokens, new], dim=1), torch.cat(
        [batch.attention_mask, torch.ones_like(new)], dim=1
    )


def same(case: Case, found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Assert that the logits of all real rows agree."""
    real = case.batch.attention_mask.bool()
    close(found[real], expected[real], tolerance)


def differs(case: Case, found: Tensor) -> None:
    """Assert that an edit did something, so that agreement says something."""
    real = case.batch.attention_mask.bool()
    assert float((found - case.truth.logits)[real].abs().max()) > 1e-2


def agrees(case: Case, editors: Sequence[Any], oracle: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Hold editors against the plain model, in one pass and step by step under a cache.

    Args:
        case: The model.
        editors: Attached together.
        oracle: tokens, mask → logits of the plain model, edited at the prompt's rows as the editors should.
    """
    width = case.batch.tokens.shape[1]
    tokens, mask = extended(case.batch)
    truth = oracle(tokens, mask)
    whole = logits_under(case, *editors)
    same(case, whole, truth[:, :width])
    differs(case, whole)
    close(decoded_under(case, *editors), truth[:, width - 1 :], how="cache")


def pairs_by_hand(target: SpanBatch, i: int, source: SpanBatch, j: int, rule: str = "end") -> dict[int, int]:
    """Target position → source position, for one prompt of each."""
    pairs = {}
    for atom in ATOMS:
        here = [place for place, inside in enumerate(target.spans[atom][i].tolist()) if inside]
        there = [place for place, inside in enumerate(source.spans[atom][j].tolist()) if inside]
        if rule == "end":
            pairs.update(zip(reversed(here), reversed(there), strict=False))
        elif rule == "start":
            pairs.update(zip(here, there, strict=False))
        elif there:
            for k, place in enumerate(here):
                pairs[place] = there[int((k + 0.5) / len(here) * len(there))]
    return pairs


def copying(
    columns: list[tuple[int, int]],
    values: list[Tensor],
    pairs: list[dict[int, int]],
    partners: Sequence[int],
    rows: Tensor,
) -> Callable[[int, Tensor], Tensor]:
    """Put z of a head, or a neuron, of the source's rows in place of the target's, with loops."""

    def change(layer: int, value: Tensor) -> Tensor:
        for its_layer, column in columns:
            if its_layer != layer:
                continue
            for prompt, partner in enumerate(partners):
                for here, there in pairs[prompt].items():
                    if rows[prompt, here]:
                        value[prompt, here, column] = values[layer][partner, there, column]
        return value

    return change


def labelled(rows: list[list[str]], seed: int = 0) -> SpanBatch:
    """Random tokens whose atoms are given, left-padded."""
    width = max(len(row) for row in rows)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    atoms = {
        atom: torch.tensor([[False] * (width - len(row)) + [name == atom for name in row] for row in rows])
        for atom in ATOMS
    }
    tokens = torch.randint(2, 71, mask.shape, generator=torch.Generator().manual_seed(seed)) * mask
    return SpanBatch(
        tokens=tokens,
        attention_mask=mask,
        spans=Spans(atoms),
        prompts=tuple(Prompt(id=f"p{row}", text="") for row in range(len(rows))),
        texts=("",) * len(rows),
        think="cot",
        format="random",
        pad_token_id=0,
    )
