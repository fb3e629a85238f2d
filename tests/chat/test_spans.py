"""SpanBatch and Spans on hand-made rows, where the answer is plain to see."""

from __future__ import annotations

import pytest
import torch

from rim_lens.chat import SpanBatch, Spans
from rim_lens.chat.spans import ATOMS, COMPOSITES
from rim_lens.errors import EmptySpan, SpanError, UnknownSpan
from rim_lens.prompts.records import Prompt

ROWS = (
    ["sink", "request", "assistant", "think_open", "think_close"],
    ["sink", "request", "request", "assistant", "think_open", "cot", "cot", "think_close", "answer"],
)


def batch(rows=ROWS, **changes) -> SpanBatch:
    width = max(map(len, rows))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    padded = [[None] * (width - len(row)) + list(row) for row in rows]
    spans = Spans({atom: torch.tensor([[name == atom for name in row] for row in padded]) for atom in ATOMS})
    fields = {
        "tokens": torch.arange(mask.numel()).view_as(mask) * mask,
        "attention_mask": mask,
        "spans": spans,
        "prompts": tuple(Prompt(id=str(row), text="x") for row in range(len(rows))),
        "texts": tuple(f"text {row}" for row in range(len(rows))),
        "think": "cot",
        "format": "toy",
        "pad_token_id": 0,
    }
    return SpanBatch(**{**fields, **changes})


def test_think_is_both_tags_and_all_between():
    think = batch().spans["think"]
    assert think.sum(dim=1).tolist() == [2, 4]
    assert set(batch().spans) == {*ATOMS, *COMPOSITES}


def test_an_empty_span_is_refused_with_the_nearest_useful_one():
    spans = batch().spans
    assert not spans["gap"].any()
    with pytest.raises(EmptySpan, match="Ask for 'think' instead"):
        spans.require("gap")
    with pytest.raises(EmptySpan, match="1 of 2 prompts"):
        spans.require("cot")
    with pytest.raises(UnknownSpan, match="thinking"):
        spans["thinking"]
    assert "gap" not in spans.present()
    assert "think" in spans.present()


def test_atoms_of_a_row_are_read_back_in_order():
    assert [batch().atoms_of(row) for row in (0, 1)] == [list(row) for row in ROWS]


def test_a_key_in_two_spans_or_in_none_is_refused():
    good = batch()
    for mask in (good.spans["sink"] | good.spans["cot"], torch.zeros_like(good.spans["sink"])):
        with pytest.raises(SpanError, match="partition"):
            batch(spans=Spans({**good.spans.atoms(), "sink": mask}))


def test_right_padding_is_refused():
    good = batch()
    flipped = Spans({name: mask.flip(1) for name, mask in good.spans.atoms().items()})
    with pytest.raises(SpanError, match="left-padded"):
        batch(attention_mask=good.attention_mask.flip(1), spans=flipped)


def test_per_row_facts_must_have_one_entry_per_row():
    with pytest.raises(SpanError, match="answers has 1 entries for 2 rows"):
        batch(answers=("only one",))


def test_select_keeps_every_fact_of_a_row_and_drops_padding_no_row_needs():
    full = batch(
        n_generated=(0, 3),
        cots=("", "why"),
        answers=("", "Yes"),
        finished_thinking=(False, True),
        label="careful",
    )
    short = full.select([0])
    assert short.tokens.shape == (1, 5)
    assert short.atoms_of(0) == list(ROWS[0])
    swapped = full.select([1, 0])
    assert (swapped.cots, swapped.answers, swapped.n_generated) == (("why", ""), ("Yes", ""), (3, 0))
    assert (swapped.finished_thinking, swapped.label) == ((True, False), "careful")
    assert swapped.prompt_last.tolist() == [5, 8]
