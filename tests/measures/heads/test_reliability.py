"""Split-half reliability on halves cut by hand, and against what a planted reliability must give."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import xarray as xr

from rim_lens.errors import NotEnoughData, NotFinite, StatisticsError
from rim_lens.measures.heads.reliability import _halves, _spearman, split_half


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson of the ranks; the rank of a number is how many are below it, and half of those equal to it."""
    ranks = [[sum((u < v) + (u == v) / 2 for u in side) for v in side] for side in (a.tolist(), b.tolist())]
    return float(np.corrcoef(ranks)[0, 1])


def values_of(
    signal: float, n_families: int, per_family: int = 3, seed: int = 0, heads: int = 40
) -> xr.DataArray:
    """Heads that differ by `signal`, with noise of 1 that requests of one family share in part."""
    rng = np.random.default_rng(seed)
    truth = signal * rng.standard_normal(heads)
    shared = np.repeat(rng.standard_normal((n_families, heads)), per_family, axis=0)
    own = rng.standard_normal((n_families * per_family, heads))
    array = (truth + 0.8 * shared + 0.6 * own).reshape(-1, 2, heads // 2)
    families = np.repeat([f"f{number}" for number in range(n_families)], per_family)
    return xr.DataArray(array, dims=("prompt", "layer", "head"), coords={"family": ("prompt", families)})


@pytest.mark.parametrize("n_families", [4, 5, 6])
def test_every_split_by_hand(n_families: int) -> None:
    values = values_of(1.0, n_families)
    flat = values.values.reshape(len(values), -1)
    numbers = np.array([int(label[1:]) for label in values["family"].values])
    by_hand = {}
    for half in combinations(range(n_families), n_families // 2):
        side = np.isin(numbers, half)
        key = frozenset([frozenset(half), frozenset(range(n_families)) - frozenset(half)])
        by_hand[key] = spearman(flat[side].mean(axis=0), flat[~side].mean(axis=0))
    found = split_half(values)
    r = np.mean(list(by_hand.values()))
    assert found.n_splits == len(by_hand)
    assert found.halves == pytest.approx(r)
    assert found.value == pytest.approx(2 * r / (1 + r))
    corrected = [2 * one / (1 + one) for one in by_hand.values()]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(corrected, [0.025, 0.975])))
    assert (found.n_families, found.n_prompts, found.n_heads) == (n_families, 3 * n_families, 40)


def test_it_predicts_the_agreement_with_as_many_other_requests() -> None:
    """What Spearman and Brown correct for, to the accuracy of a rank correlation: 30 draws of twice the requests."""
    told, true = [], []
    for seed in range(30):
        values = values_of(0.35, 24, seed=seed)
        here, there = values[:36], values[36:]
        told.append(split_half(here, n_splits=40).value)
        true.append(spearman(here.mean("prompt").values.ravel(), there.mean("prompt").values.ravel()))
    assert 0.3 < np.mean(true) < 0.9
    assert np.mean(told) == pytest.approx(np.mean(true), abs=0.06)


def test_noise_is_not_reliable_and_splits_by_request_would_say_it_were() -> None:
    by_family = [split_half(values_of(0.0, 10, seed=seed), n_splits=60).halves for seed in range(20)]
    by_request = [
        split_half(values_of(0.0, 10, seed=seed).drop_vars("family"), n_splits=60).halves
        for seed in range(20)
    ]
    assert abs(np.mean(by_family)) < 0.1
    assert np.mean(by_request) > 0.2


def test_labels_given_count_and_order_of_dimensions_does_not() -> None:
    values = values_of(1.0, 6)
    bare = values.drop_vars("family")
    assert split_half(bare, values["family"].values) == split_half(values)
    assert split_half(values.transpose("head", "layer", "prompt")).n_prompts == 18
    assert split_half(bare).n_families == 18
    assert split_half(values, n_splits=5, seed=1) == split_half(values, n_splits=5, seed=1)
    assert split_half(values, n_splits=5, seed=1) != split_half(values, n_splits=5, seed=2)


def test_halves_are_halves() -> None:
    rng = np.random.default_rng(0)
    for n, splits, expected in ((4, 200, 3), (5, 200, 10), (6, 10, 10), (6, 9, 9), (30, 50, 50)):
        side = _halves(n, splits, rng)
        assert side.shape == (expected, n)
        assert (side.sum(axis=1) == n // 2).all()
        if expected < splits:
            assert len({frozenset([tuple(row), tuple(~row)]) for row in side}) == expected


def test_ties_are_shared_and_constants_have_no_rank() -> None:
    a, b = np.array([[0.0, 0, 1, 1, 0.5], [1, 1, 1, 1, 1]]), np.array([[0.0, 1, 1, 1, 0], [1, 2, 3, 4, 5]])
    found = _spearman(a, b)
    assert found[0] == pytest.approx(spearman(a[0], b[0]))
    assert np.isnan(found[1])


def test_rank_correlation_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(0).integers(0, 6, (2, 5, 30)).astype(float)
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(_spearman(a, b), expected)


def test_shares_where_no_head_does_a_thing() -> None:
    still = xr.zeros_like(values_of(1.0, 6)).astype(bool)
    found = split_half(still)
    assert np.isnan([found.value, found.halves, found.low, found.high]).all()
    assert (found.n_splits, found.n_undefined) == (0, 10)
    still[:3, 0, 0] = True  # one head, in one family: each split has a half without it
    assert split_half(still).n_splits == 0


def test_what_is_refused() -> None:
    values = values_of(1.0, 3)
    with pytest.raises(NotEnoughData, match="3 request families"):
        split_half(values)
    with pytest.raises(NotEnoughData, match="2 heads"):
        split_half(values_of(1.0, 6)[:, :, :1])
    with pytest.raises(StatisticsError, match="no 'prompt'"):
        split_half(values.mean("prompt"))
    with pytest.raises(StatisticsError, match="labels"):
        split_half(values, ["a", "b"])
    with pytest.raises(StatisticsError, match="n_splits"):
        split_half(values, n_splits=0)
    values = values_of(1.0, 6)
    values[2, 0, 1] = np.nan
    with pytest.raises(NotFinite, match="prompt 2"):
        split_half(values)
