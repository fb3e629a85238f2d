"""Prompts of like length run together, so that little is spent on padding."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from rim_lens.errors import ConditionError

# About 4 000 tokens keep a pass of a small model in the cache and of a large one in memory.
MAX_TOKENS = 4096
MAX_ROWS = 64


def micro_batches(
    lengths: Sequence[int], max_tokens: int = MAX_TOKENS, max_rows: int = MAX_ROWS
) -> list[list[int]]:
    """Group row numbers by length, longest first, each group within the limits (one row always fits).

    Longest first, so that running out of memory shows in the first pass and not in the last.

    Raises:
        ConditionError: A limit is no whole number of at least 1.

    >>> micro_batches([3, 9, 4, 8], max_tokens=18)
    [[1, 3], [2, 0]]
    """
    for name, limit in (("max_tokens", max_tokens), ("max_rows", max_rows)):
        if not isinstance(limit, Integral) or limit < 1:
            raise ConditionError(f"{name}={limit!r} was asked for; give a whole number of at least 1.")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    groups: list[list[int]] = []
    for row in order:
        group = groups[-1] if groups else None
        if group and len(group) < max_rows and (len(group) + 1) * lengths[group[0]] <= max_tokens:
            group.append(row)
        else:
            groups.append([row])
    return groups
