"""Which token stands for which: properties of the rule, and the same by loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rim_lens.chat.spans import ATOMS, SpanBatch
from rim_lens.errors import EmptySpan, ReferenceMismatch
from rim_lens.hooks.alignment import RULES, align, require_counterparts
from tests.editing import labelled, pairs_by_hand

NAMES = ("sink", "request", "think_open", "cot", "gap", "template")
ROW = st.lists(st.sampled_from(NAMES), min_size=1, max_size=14)


@st.composite
def batches(draw: st.DrawFn) -> tuple[SpanBatch, SpanBatch]:
    n_prompts = draw(st.integers(1, 3))
    rows = st.lists(ROW, min_size=n_prompts, max_size=n_prompts)
    return labelled(draw(rows)), labelled(draw(rows), seed=1)


@given(batches(), st.sampled_from(RULES))
@settings(deadline=None, max_examples=150)
def test_properties(pair: tuple[SpanBatch, SpanBatch], rule: str) -> None:
    target, source = pair
    found = align(target, source, rule)
    assert found.source.shape == target.tokens.shape
    for prompt in range(len(target)):
        pairs = {here: there for here, there in enumerate(found.source[prompt].tolist()) if there >= 0}
        assert pairs == pairs_by_hand(target, prompt, source, prompt, rule)
        lost = int(target.lengths[prompt]) - len(pairs)
        assert found.missing()[prompt] == lost
        for atom in ATOMS:
            inside = target.spans[atom][prompt]
            images = [there for here, there in pairs.items() if inside[here]]
            assert all(source.spans[atom][prompt, there] for there in images)  # of the same atom
            assert images == sorted(images)  # in order
            n, m = int(inside.sum()), int(source.spans[atom][prompt].sum())
            if rule == "stretch":
                assert len(images) == (n if m else 0)
                assert len(set(images)) == min(n, m)  # as many of them as can be
            else:
                assert len(set(images)) == len(images) == min(n, m)


@given(st.lists(ROW, min_size=1, max_size=3), st.sampled_from(RULES))
@settings(deadline=None, max_examples=40)
def test_equal_spans_align_one_to_one(rows: list[list[str]], rule: str) -> None:
    target, source = labelled(rows), labelled(rows, seed=1)
    found = align(target, source, rule)
    places = torch.arange(target.tokens.shape[1]).expand_as(found.source)
    assert torch.equal(found.source, torch.where(found.real, places, -1))
    assert not found.missing().any()


def test_ends_starts_and_stretches() -> None:
    target = labelled([["sink", "cot", "cot", "cot", "cot"]])
    source = labelled([["sink", "sink", "cot", "cot"]])  # two of the first atom, two of the second
    assert align(target, source, "end").source.tolist() == [[1, -1, -1, 2, 3]]
    assert align(target, source, "start").source.tolist() == [[0, 2, 3, -1, -1]]
    assert align(target, source, "stretch").source.tolist() == [[1, 2, 2, 3, 3]]
    assert align(source, target, "stretch").source.tolist() == [[0, 0, 2, 4]]
    assert align(target, source, "end").missing().tolist() == [2]


def test_rows_can_be_paired_at_will() -> None:
    target = labelled([["sink", "cot"], ["sink", "cot", "cot"]])
    source = labelled([["sink"], ["sink", "cot", "cot", "cot"], ["cot", "sink"]])
    assert align(target, source, "end", [2, 1]).source.tolist() == [[-1, 3, 2], [0, 2, 3]]
    with pytest.raises(ReferenceMismatch, match="2 prompts were to be aligned with 3"):
        align(target, source)
    with pytest.raises(ValueError, match="'end', 'start', 'stretch'"):
        align(target, target, "middle")  # type: ignore[arg-type]


def test_a_prompt_of_which_nothing_aligns_is_named() -> None:
    target = labelled([["sink", "cot", "gap"], ["sink", "cot", "cot"]])
    source = labelled([["sink", "gap"], ["sink", "cot"]])
    found = align(target, source)
    assert require_counterparts(found, target, "all", "It").tolist() == [1, 1]
    with pytest.raises(EmptySpan, match=r"spans cot of prompt 'p0' \(row 0\).*1 of 2"):
        require_counterparts(found, target, "cot", "It")
    with pytest.raises(EmptySpan, match="no token of the prompt"):
        require_counterparts(found, target, "generated", "It")
    with pytest.raises(EmptySpan, match="a mask"):
        require_counterparts(found, target, target.spans["cot"], "It")


def test_alignments_compare_by_identity() -> None:
    """A comparison of tensors has no one truth value, and fails."""
    batch = labelled([["sink", "request"], ["request"]])
    one, other = align(batch, batch), align(batch, batch)
    assert one != other
    assert len({one, other}) == 2
