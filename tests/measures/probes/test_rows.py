"""What a row of probes may say of refusal, by its numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rim_lens.measures.probes.groups import Groups
from rim_lens.measures.probes.rows import COLUMNS, blank, state


def said(effect: float, twins: float, *, paired: bool = True) -> str:
    """The state of a direction that separates, with these effects known to a nat either way."""
    sharp: dict[str, Any] = {
        "auc": 1.0,
        "auc_low": 0.9,
        "_empty": False,
        "baseline": 4.0,
        "percentile": 100.0,
    }
    gap = effect - twins if paired else math.nan
    for name, value in {"effect": effect, "effect_twins": twins, "specificity": gap}.items():
        sharp |= {name: value, f"{name}_low": value - 1, f"{name}_high": value + 1}
    row = blank("off", 0, "think_close") | sharp | {"n_positive": 9, "n_negative": 9, "n_controls": 8}
    assert set(COLUMNS) <= set(row)
    return state(row, 0.5, Groups({}), ("harmful", "harmless"))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(
    ("effect", "twins", "lowers"),
    [(-10.0, 0.0, True), (-10.0, -7.0, True), (-10.0, -8.0, False), (-10.0, -20.0, False), (-3.0, 4.0, True)],
)
def test_refusal_is_lowered_only_where_twins_move_clearly_less(
    effect: float, twins: float, lowers: bool, paired: bool
) -> None:
    """Specific by at least a quarter of the effect, with or without twins of one's own."""
    words = "lowers refusal" if lowers else "not shown to move harmless requests less"
    assert said(effect, twins, paired=paired) == f"separates, {words}"
