"""Which rows are meant, in passes of every kind, spelt out row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rim_lens.errors import EmptySpan, SpanError, WrongHookShape
from rim_lens.hooks.positions import RowOffset, chosen_rows, require_rows, rows_to_read
from tests.families import random_batch


def rows(*places: int, of: int) -> list[bool]:
    return [place in places for place in range(of)]


def test_without_a_batch() -> None:
    assert chosen_rows("all", None, 0, 2, 3).all()
    assert chosen_rows("prompt_last", None, 0, 2, 4).tolist() == [rows(3, of=4)] * 2
    assert not chosen_rows("prompt_last", None, 4, 2, 1).any()
    assert not chosen_rows("generated", None, 0, 2, 4).any()
    assert chosen_rows("generated", None, 4, 2, 1).all()


def test_with_a_batch_that_was_written_to_unequally() -> None:
    """Three prompts of which the model wrote 0, 1 and 3 tokens; padding stands at the left."""
    batch = replace(random_batch(n_prompts=3, longest=12), n_generated=(0, 1, 3))
    assert chosen_rows("prompt_last", batch, 0, 3, 12).tolist() == [rows(p, of=12) for p in (11, 10, 8)]
    assert chosen_rows("generated", batch, 0, 3, 12).tolist() == [
        rows(of=12),
        rows(11, of=12),
        rows(9, 10, 11, of=12),
    ]
    assert chosen_rows("generated", batch, 12, 3, 1).all()  # what follows the batch is generated too
    assert not chosen_rows("prompt_last", batch, 12, 3, 1).any()


def test_a_mask_is_read_at_the_right_place() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(chosen_rows(mask, None, 0, 2, 6), mask)
    assert torch.equal(chosen_rows(mask, None, 3, 2, 2), mask[:, 3:5])
    part = chosen_rows(mask, None, 4, 2, 3)
    assert torch.equal(part[:, :2], mask[:, 4:])
    assert not part[:, 2].any()
    assert not chosen_rows(mask, None, 6, 2, 1).any()
    assert torch.equal(chosen_rows(mask.long(), None, 0, 2, 6), mask)


def test_readers_leave_padding_out_and_want_a_row_everywhere() -> None:
    real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(rows_to_read("all", None, real, 0, 2, 4), real)
    assert rows_to_read("all", None, real, 4, 2, 2).all()
    assert torch.equal(rows_to_read("all", None, real, 2, 2, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(EmptySpan, match=r"1 of 2 prompts \(first: prompt 0\)"):
        rows_to_read(torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]]).bool(), None, real, 0, 2, 4)
    assert not rows_to_read(torch.zeros(2, 4).bool(), None, real, 0, 2, 4).any()


def test_what_does_not_fit_is_refused() -> None:
    batch = random_batch(n_prompts=3, longest=12)
    mask = batch.spans["cot"]
    with pytest.raises(SpanError, match="'cot'"):
        chosen_rows("cot", None, 0, 3, 12)
    for where in (mask, "cot", "prompt_last", "generated"):
        with pytest.raises(WrongHookShape, match="12"):
            chosen_rows(where, batch, 0, 3, 11)
        with pytest.raises(WrongHookShape, match="3 prompts"):
            chosen_rows(where, batch, 0, 4, 12)


def test_where_a_pass_begins_before_it_shows() -> None:
    """Before layer 0 a prefill is told from a later step by its rows, and the pattern proves it."""

    def reads(offset: RowOffset, n_queries: int, n_keys: int) -> None:
        offset.hook()[1](torch.zeros(1, 1, n_queries, n_keys))

    for width in (None, 5):
        offset = RowOffset()
        for _ in range(2):  # what is left of one generation does not mislead the next
            assert offset.at("resid_pre", 0, 5, width) == 0
            reads(offset, 5, 5)
            assert offset.at("resid_pre", 0, 1, width) == 5
            reads(offset, 1, 6)
            assert offset.at("resid_pre", 1, 1, width) == offset.at("z", 0, 1, width) == 5
    assert (
        offset.at("resid_pre", 0, 1, 9) == 9
    )  # another, longer prompt's step: beyond its prompt, wherever it is
    reads(offset, 1, 12)
    assert RowOffset().at("resid_pre", 0, 1, None) == 0
    for width, n_rows, n_keys in ((1, 1, 2), (5, 2, 4), (5, 5, 6), (None, 3, 4)):
        offset = RowOffset()
        offset.at("resid_pre", 0, n_rows, width)
        with pytest.raises(WrongHookShape, match="before layer 0"):
            reads(offset, n_rows, n_keys)


def test_rows_that_some_prompt_has_none_of_are_refused() -> None:
    batch = random_batch(n_prompts=3, longest=12)
    mask = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    mask[:, -2] = True
    require_rows(mask, batch, "It")
    for name in ("all", "prompt_last", "generated", "request"):
        require_rows(name, batch, "It")
    mask[1] = ~batch.attention_mask[1].bool()  # marks padding alone
    with pytest.raises(EmptySpan, match=f"1 of 3 prompts .*{batch.prompts[1].id!r}"):
        require_rows(mask, batch, "It")
    with pytest.raises(EmptySpan, match="gap"):
        require_rows("gap", batch, "It")
    with pytest.raises(WrongHookShape, match="2, 12"):
        require_rows(mask[:2], batch, "It")


@pytest.mark.parametrize("positions", [-1, ["request"], None, torch.ones(2, dtype=torch.bool).numpy()])
def test_what_names_no_rows_is_refused(positions: Any) -> None:
    batch = random_batch(n_prompts=3, longest=12)
    with pytest.raises(SpanError, match=r"'prompt_last'.*batch\.spans"):
        require_rows(positions, batch, "It")
