"""Figures and words of a study of neurons, held to the tables they are drawn from."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from rim_lens.views.plots import direct_and_total, dose_effects, specification_curve


def doses() -> pd.DataFrame:
    rows = []
    for size in (1, 10, 11, 100):
        for measure, kind, change in (
            ("score", "harmful", -1.0 * size),
            ("score", "harmless", -0.5),
            ("specificity", "harmful − harmless", 0.5 - size),
        ):
            rows.append(
                {
                    "size": size,
                    "measure": measure,
                    "kind": kind,
                    "n": 7,
                    "change": change,
                    "change_low": change - 1,
                    "change_high": change + 2,
                    "p": 0.2,
                    "random_low": -0.1 * size if size < 100 else np.nan,
                    "random_high": 0.1,
                }
            )
    return pd.DataFrame(rows)


def test_doses_are_drawn_with_intervals_beside_the_range_of_random_sets():
    figure = dose_effects(doses().sample(frac=1, random_state=0))
    band, harmful, twins, gap = figure.data
    assert harmful.x == (1, 10, 11, 100)
    assert harmful.y == (-1.0, -10.0, -11.0, -100.0)
    assert set(harmful.error_y.array) == {2.0}
    assert set(harmful.error_y.arrayminus) == {1.0}
    assert "n = 7" in harmful.name
    assert set(twins.y) == {-0.5}
    assert gap.y[0] == -0.5
    # Up the one side and back the other, without the size that has no random sets.
    assert band.x == (1, 10, 11, 11, 10, 1)
    assert band.y[3:] == pytest.approx((-1.1, -1.0, -0.1))
    assert list(figure.layout.xaxis.tickvals) == [100, 11, 1]
    with pytest.raises(ValueError, match="without a row"):
        dose_effects(doses().iloc[:0])


def test_writers_and_others_have_marks_of_their_own_and_the_set_stands_among_them():
    table = pd.DataFrame(
        {
            "layer": [0, 1, 1],
            "neuron": [5, 6, 7],
            "direct": [-1.0, 0.0, -0.2],
            "total": [-1.0, -2.0, -0.5],
            "writer": [True, False, False],
        }
    )
    for name in ("direct", "total"):
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.25, table[name] + 0.5
    table.attrs["set"] = {"direct": -1.5, "total": -4.0}
    writers, others, whole, diagonal = direct_and_total(table).data
    assert (writers.x, writers.y, list(writers.text)) == ((-1.0,), (-1.0,), ["L0N5"])
    assert list(others.text) == ["L1N6", "L1N7"]
    assert set(others.error_x.array) == {0.5}
    assert (whole.x, whole.y) == ((-4.0,), (-1.5,))
    assert diagonal.x == diagonal.y == (-4.0, 0.0)
    with pytest.raises(ValueError, match="without a neuron"):
        direct_and_total(table.iloc[:0])


def test_universes_are_sorted_by_p_and_those_without_one_left_out():
    table = pd.DataFrame(
        {
            "response": "own",
            "pool": "max",
            "site": "post",
            "m": [5, 10, 20],
            "min_fraction": [1.0, 0.5, 0.5],
            "average": "after",
            "n_neurons": [0, 3, 9],
            "ras": [np.nan, 0.1, 0.2],
            "p": [np.nan, 0.7, 0.02],
            "percentile": [np.nan, 20.0, 99.0],
        }
    )
    p, ranks = specification_curve(table).data
    assert p.y == (0.02, 0.7)
    assert ranks.y == pytest.approx((0.01, 0.8))
    assert "m = 20" in p.text[0]
    with pytest.raises(ValueError, match="no universe"):
        specification_curve(table.iloc[:1])
