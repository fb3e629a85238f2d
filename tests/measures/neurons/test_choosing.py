"""The choice of neurons against the same rule written with loops and sorting."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rim_lens.errors import NotEnoughData, NotFinite, StatisticsError
from rim_lens.measures.neurons.choosing import chosen, stability, sweep, top_m

shapes = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6))


@st.composite
def cases(draw: Any) -> tuple[np.ndarray, int, Any, float]:
    """Small whole numbers, so that ties are the rule."""
    shape = draw(shapes)
    values = draw(st.lists(st.integers(-3, 3), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    scope = draw(st.sampled_from(["layer", "model"]))
    m = draw(st.integers(1, shape[2] if scope == "layer" else shape[1] * shape[2]))
    return np.array(values, dtype=float).reshape(shape), m, scope, draw(st.floats(0.05, 1.0))


def by_hand(difference: np.ndarray, m: int, scope: str) -> list[set[tuple[int, int]]]:
    """Per pair, the neurons sorted by falling difference and then by place, the first m of each layer or of all."""
    _, layers, width = difference.shape
    found = []
    for pair in difference.tolist():
        order = sorted(
            itertools.product(range(layers), range(width)),
            key=lambda at: (-pair[at[0]][at[1]], at),
        )
        pools = (
            [order]
            if scope == "model"
            else [[at for at in order if at[0] == layer] for layer in range(layers)]
        )
        found.append({at for pool in pools for at in pool[:m] if pair[at[0]][at[1]] > 0})
    return found


@given(cases())
def test_it_is_the_rule_written_out(case: tuple[np.ndarray, int, Any, float]) -> None:
    difference, m, scope, share = case
    per_pair = by_hand(difference, m, scope)
    marked = top_m(difference, m, scope)
    assert [{(int(a), int(b)) for a, b in np.argwhere(pair)} for pair in marked] == per_pair
    found = chosen(difference, m, scope, share)
    for at in itertools.product(range(difference.shape[1]), range(difference.shape[2])):
        votes = sum(at in pair for pair in per_pair)
        assert found.votes[at] == votes / len(per_pair)
        assert found.mask[at] == (votes > 0 and votes >= share * len(per_pair) - 1e-9)
    whole = chosen(difference, m, scope).mask
    assert {(int(a), int(b)) for a, b in np.argwhere(whole)} == set.intersection(*per_pair)


@given(cases())
def test_ties_at_the_bar_are_counted(case: tuple[np.ndarray, int, Any, float]) -> None:
    difference, m, scope, _ = case
    rows = difference if scope == "layer" else difference.reshape(len(difference), 1, -1)
    tied = 0
    for row in rows.reshape(-1, rows.shape[2]).tolist():
        ranked = sorted(row, reverse=True)
        tied += m < len(ranked) and ranked[m - 1] == ranked[m] > 0
    assert chosen(difference, m, scope).n_tied == tied


def test_a_neuron_that_does_not_rise_is_never_chosen() -> None:
    """With ReLU most differences are exactly 0; place alone would make the first of them the same ones in every pair."""
    difference = np.zeros((4, 1, 9))
    difference[:, 0, 7] = 1.0
    difference[:, 0, 8] = -1.0
    assert np.argwhere(chosen(difference, 5).mask).tolist() == [[0, 7]]


def test_the_sign_counts() -> None:
    difference = np.array([[[-9.0, 1.0, 0.5]]])
    assert chosen(difference, 1).mask.tolist() == [[False, True, False]]
    assert chosen(-difference, 1).mask.tolist() == [[True, False, False]]


def chance(least: int, n: int, each: float) -> float:
    """P(at least so many of n), over every outcome."""
    outcomes = itertools.product((0, 1), repeat=n)
    return float(
        sum(np.prod([each if hit else 1 - each for hit in one]) for one in outcomes if sum(one) >= least)
    )


def test_a_sweep_has_the_sizes_of_the_choices_and_what_chance_would_give() -> None:
    difference = np.random.default_rng(0).normal(size=(6, 2, 40))
    table = sweep(difference, [1, 5, 20], min_fractions=[0.5, 1.0])
    assert table[["m", "min_fraction"]].values.tolist() == [
        [m, share] for m in (1, 5, 20) for share in (0.5, 1.0)
    ]
    for line in table.to_dict("records"):
        mask = chosen(difference, line["m"], min_fraction=line["min_fraction"]).mask
        assert line["size"] == mask.sum()
        assert line["largest_layer"] == mask.sum(axis=1).max()
        assert line["n_layers"] == np.count_nonzero(mask.sum(axis=1))
        least = 3 if line["min_fraction"] == 0.5 else 6
        assert line["by_chance"] == pytest.approx(80 * chance(least, 6, line["m"] / 40))
    # Independent pairs come out near chance.
    sizes = [
        chosen(np.random.default_rng(seed).normal(size=(4, 2, 200)), 80, min_fraction=0.75).mask.sum()
        for seed in range(60)
    ]
    expected = sweep(np.ones((4, 2, 200)), [80], min_fractions=[0.75])["by_chance"][0]
    assert abs(np.mean(sizes) - expected) < 4 * np.sqrt(expected / 60)


def test_stability_is_one_where_pairs_agree_and_chance_where_they_do_not() -> None:
    rng = np.random.default_rng(1)
    same = rng.normal(size=(1, 2, 50)).repeat(8, axis=0)
    agreed = stability(same, 5, n_splits=6)
    assert (agreed["jaccard"] == 1).all()
    assert (agreed["size_first"] == 10).all()
    noise = stability(rng.normal(size=(40, 2, 50)), 25, min_fraction=0.5, n_splits=40)
    assert abs(noise["jaccard"].mean() - noise["by_chance"].mean()) < 0.1
    assert noise["by_chance"].between(0.2, 0.5).all()
    # Whole families go to one side: with two of them there is one way to cut.
    families = ["a"] * 4 + ["b"] * 4
    two = np.concatenate([same[:4], -same[:4]])
    assert (stability(two, 5, families=families, n_splits=5)["jaccard"] == 0).all()
    assert stability(-np.ones((2, 1, 4)), 2, n_splits=1)["jaccard"].isna().all()


@pytest.mark.parametrize(
    ("difference", "options", "error"),
    [
        (np.zeros((0, 1, 3)), {"m": 1}, NotEnoughData),
        (np.zeros((2, 3)), {"m": 1}, StatisticsError),
        (np.full((1, 1, 3), np.nan), {"m": 1}, NotFinite),
        (np.full((1, 1, 3), np.inf), {"m": 1}, NotFinite),
        (np.zeros((1, 1, 3)), {"m": 0}, StatisticsError),
        (np.zeros((1, 1, 3)), {"m": 4}, StatisticsError),
        (np.zeros((1, 1, 3)), {"m": 1.0}, StatisticsError),
        (np.zeros((1, 1, 3)), {"m": True}, StatisticsError),
        (np.zeros((1, 1, 3)), {"m": 1, "scope": "head"}, StatisticsError),
        (np.zeros((1, 1, 3)), {"m": 1, "min_fraction": 0.0}, StatisticsError),
        (np.zeros((1, 1, 3)), {"m": 1, "min_fraction": 1.1}, StatisticsError),
        (np.zeros((1, 1, 3)), {"m": 1, "min_fraction": float("nan")}, StatisticsError),
    ],
)
def test_what_cannot_be_chosen_by_is_refused(difference: Any, options: Any, error: Any) -> None:
    with pytest.raises(error):
        chosen(difference, **options)


def test_stability_and_sweep_refuse_what_they_cannot_do() -> None:
    with pytest.raises(NotEnoughData, match="two families"):
        stability(np.ones((2, 1, 3)), 1, families=["a", "a"])
    with pytest.raises(StatisticsError, match="n_splits"):
        stability(np.ones((2, 1, 3)), 1, n_splits=0)
    with pytest.raises(StatisticsError, match="name some"):
        sweep(np.ones((2, 1, 3)), [])
