"""Batches by length: each row once, within the limits, little padding."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rim_lens.batching import MAX_ROWS, MAX_TOKENS, micro_batches
from rim_lens.errors import ConditionError

LENGTHS = st.lists(st.integers(1, 300), max_size=60)


@given(LENGTHS, st.integers(1, 2000), st.integers(1, 20))
def test_each_row_once_within_the_limits_longest_first(
    lengths: list[int], max_tokens: int, max_rows: int
) -> None:
    groups = micro_batches(lengths, max_tokens, max_rows)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[row] for row in group)
        assert 1 <= len(group) <= max_rows
        assert len(group) == 1 or len(group) * longest <= max_tokens
    flat = [lengths[row] for group in groups for row in group]
    assert flat == sorted(lengths, reverse=True)  # and so no row is padded further than its neighbours need


@given(LENGTHS, st.integers(1, 2000), st.integers(1, 20))
def test_no_group_is_left_smaller_than_it_could_be(
    lengths: list[int], max_tokens: int, max_rows: int
) -> None:
    groups = micro_batches(lengths, max_tokens, max_rows)
    for group, later in pairwise(groups):
        assert later
        assert len(group) == max_rows or (len(group) + 1) * lengths[group[0]] > max_tokens


@given(LENGTHS)
def test_equal_lengths_keep_their_order(lengths: list[int]) -> None:
    rows = [row for group in micro_batches(lengths) for row in group]
    for first, second in pairwise(rows):
        assert lengths[first] > lengths[second] or first < second


def test_limits() -> None:
    assert micro_batches([]) == []
    assert micro_batches([MAX_TOKENS + 1, 1]) == [[0], [1]]  # a prompt longer than the limit runs alone
    assert [len(group) for group in micro_batches([1] * (2 * MAX_ROWS + 1))] == [MAX_ROWS, MAX_ROWS, 1]
    assert micro_batches([3, 9, 4, 8], max_tokens=18) == [[1, 3], [2, 0]]


@pytest.mark.parametrize("limit", [0, -1, 2.0, "4", None])
def test_what_is_no_limit_is_refused(limit: Any) -> None:
    with pytest.raises(ConditionError, match=r"max_rows=.*at least 1"):
        micro_batches([3, 4], max_rows=limit)
