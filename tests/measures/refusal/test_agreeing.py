"""Cohen's κ against its definition by hand and published examples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rim_lens.errors import NotEnoughData, StatisticsError
from rim_lens.measures import agreement
from rim_lens.measures.refusal.agreeing import kappa


def pairs(table: list[list[int]], labels: list[str]) -> tuple[list[str], list[str]]:
    one, two = [], []
    for a, row in zip(labels, table, strict=True):
        for b, count in zip(labels, row, strict=True):
            one += [a] * count
            two += [b] * count
    return one, two


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        # Cohen (1960), Educational and Psychological Measurement 20, table 1 as counts of 200: p_o .70, p_e .41, κ .492
        ([[88, 14, 18], [10, 40, 10], [2, 6, 12]], 0.29 / 0.59),
        # the usual textbook table: 20, 5, 10, 15 of 50
        ([[20, 5], [10, 15]], 0.4),
        ([[45, 15], [25, 15]], 0.1304),
        ([[25, 35], [5, 35]], 0.2593),
        ([[10, 0], [0, 10]], 1.0),
        ([[0, 10], [10, 0]], -1.0),
    ],
)
def test_published_tables(table: list[list[int]], expected: float) -> None:
    labels = ["refuse", "comply", "other"][: len(table)]
    found = agreement(*pairs(table, labels))
    assert found.kappa == pytest.approx(expected, abs=5e-5)
    assert found.table.loc[labels, labels].to_numpy().tolist() == table
    assert found.n == sum(map(sum, table))
    assert found.observed == sum(table[k][k] for k in range(len(table))) / found.n
    assert found.low <= found.kappa <= found.high


def test_by_its_definition() -> None:
    """Observed and chance agreement counted over pairs of replies, one by one."""
    rng = np.random.default_rng(4)
    one = rng.choice(["refuse", "comply", "other"], 60, p=[0.5, 0.3, 0.2]).tolist()
    two = [a if rng.random() < 0.6 else b for a, b in zip(one, rng.permutation(one), strict=True)]
    found = agreement(one, two)
    observed = np.mean([a == b for a, b in zip(one, two, strict=True)])
    chance = np.mean([a == b for a, b in itertools.product(one, two)])
    assert found.expected == pytest.approx(chance)
    assert found.kappa == pytest.approx((observed - chance) / (1 - chance))
    assert agreement(two, one).kappa == pytest.approx(found.kappa)


def test_the_interval_counts_families() -> None:
    """Every reply eight times: the same κ, and an interval as wide as that of the replies themselves."""
    one, two = pairs([[12, 3], [4, 11]], ["refuse", "comply"])
    single = agreement(one, two)
    families = [str(n) for n in range(30)] * 8
    clustered = agreement(one * 8, two * 8, families)
    naive = agreement(one * 8, two * 8)
    assert clustered.kappa == pytest.approx(single.kappa)
    assert clustered.n_families == 30
    assert clustered.high - clustered.low == pytest.approx(single.high - single.low, rel=0.05)
    assert naive.high - naive.low < 0.5 * (single.high - single.low)


def test_where_it_is_undefined() -> None:
    found = agreement(["refuse"] * 5, ["refuse"] * 5)
    assert np.isnan(found.kappa)
    assert "'refuse' of every reply" in found.reason
    assert "undefined" in str(found)
    assert found.observed == 1.0
    one_sided = agreement(["refuse"] * 5, ["refuse"] * 4 + ["comply"])
    assert one_sided.kappa == 0.0  # one judge says one thing: no better than chance
    family = agreement(["refuse", "comply"], ["refuse", "comply"], ["a", "a"])
    assert family.kappa == 1.0
    assert np.isnan(family.low)
    assert "one family" in family.reason
    few = agreement(["refuse", "refuse", "comply"], ["refuse", "refuse", "comply"])
    assert few.n_undefined > 0  # resamples of one class


def test_what_is_refused() -> None:
    with pytest.raises(NotEnoughData):
        agreement([], [])
    with pytest.raises(StatisticsError, match="3 and 2"):
        agreement(["refuse"] * 3, ["refuse"] * 2)
    with pytest.raises(StatisticsError, match="labels"):
        agreement(["refuse"] * 2, ["refuse"] * 2, ["a"])


def test_a_table_of_counts() -> None:
    assert kappa(np.array([[88, 14, 18], [10, 40, 10], [2, 6, 12]])) == pytest.approx(0.4915, abs=1e-4)
    assert np.isnan(kappa(np.array([[3, 0], [0, 0]])))
