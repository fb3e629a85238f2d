"""Probes on arrays: planted directions, AUC by formula and by counting, folds that keep families whole."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rim_lens.errors import NotEnoughData, StatisticsError
from rim_lens.measures.probes.fitting import Probes, fit_probes
from rim_lens.measures.probes.separating import auc, cross_validate, separation
from tests.chance import UNHURRIED

D_MODEL = 12


def planted(
    n: tuple[int, int], shift: float, seed: int = 0, n_layers: int = 1, n_places: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two normal classes of unit variance whose means are `shift` apart along one direction."""
    rng = np.random.default_rng(seed)
    unit = rng.normal(size=D_MODEL)
    unit /= np.linalg.norm(unit)
    centre = rng.normal(size=D_MODEL)
    first, second = (rng.normal(size=(count, n_layers, n_places, D_MODEL)) + centre for count in n)
    return first + shift * unit, second, unit


def counted(positive: np.ndarray, negative: np.ndarray) -> float:
    total = 0.0
    for high in positive:
        for low in negative:
            total += 1.0 if high > low else 0.5 if high == low else 0.0
    return total / (len(positive) * len(negative))


def own(*counts: int) -> tuple[list[str], ...]:
    """Every sample a family of its own."""
    return tuple([f"{side}-{row}" for row in range(count)] for side, count in enumerate(counts))


def test_the_planted_direction_is_found_and_its_auc_is_that_of_the_formula() -> None:
    shift = 2.0
    positive, negative, unit = planted((2400, 2400), shift)
    probes = fit_probes(positive[:1600], negative[:1600])
    direction = probes.direction[0, 0]
    assert direction == pytest.approx(shift * unit, abs=0.15)
    found = separation(probes, positive[1600:], negative[1600:], own(800, 800), n_resamples=50)
    # Two unit normals a distance apart: P(x > y) = Φ(distance / √2), each side right of its midpoint with Φ(distance / 2).
    assert float(found.auc[0, 0]) == pytest.approx(NormalDist().cdf(shift / 2**0.5), abs=0.02)
    assert float(found.accuracy[0, 0]) == pytest.approx(NormalDist().cdf(shift / 2), abs=0.02)
    assert float(found.gap[0, 0]) == pytest.approx(shift, abs=0.1)
    assert float(probes.score_share(positive[1600:])[0, 0]) == pytest.approx(NormalDist().cdf(1), abs=0.03)


def test_unbalanced_classes_do_not_shift_the_threshold() -> None:
    positive, negative, _ = planted((30, 3000), 8.0)
    probes = fit_probes(positive, negative)
    means = [side.mean(axis=0)[0, 0] for side in (positive, negative)]
    direction = means[0] - means[1]
    assert float(probes.threshold[0, 0]) == pytest.approx((direction @ means[0] + direction @ means[1]) / 2)
    assert float(probes.score_share(positive)[0, 0]) == 1.0  # the mean of all scores would do this too, but …
    every = np.concatenate([positive, negative])[:, 0, 0] @ direction
    assert every.mean() < float(probes.threshold[0, 0]) - 0.4 * float(direction @ direction)
    probe = probes.at(0, "0")
    assert probe.margin(means[0] @ direction) == pytest.approx(1)
    assert probe.margin(means[1] @ direction) == pytest.approx(-1)


@UNHURRIED
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
    st.lists(st.integers(-3, 3), min_size=1, max_size=12),
)
def test_auc_is_what_counting_pairs_gives_ties_and_all(first: list[int], second: list[int]) -> None:
    assert auc(first, second) == pytest.approx(counted(np.array(first), np.array(second)))


def one_dimensional(values: list[float]) -> np.ndarray:
    return np.array(values, dtype=np.float64).reshape(-1, 1, 1, 1)


UNIT = Probes(np.ones((1, 1, 1)), np.zeros((1, 1)), ("0",), np.ones((2, 1), dtype=np.int64))


def test_separation_is_the_auc_and_its_interval_that_of_families_drawn_one_by_one() -> None:
    rng = np.random.default_rng(3)
    positive, negative = rng.integers(-2, 4, size=18) / 2, rng.integers(-4, 3, size=15) / 2
    families = [f"f{row % 6}" for row in range(18)], [f"f{row % 6}" for row in range(15)]
    found = separation(
        UNIT, one_dimensional(positive), one_dimensional(negative), families, n_resamples=400, seed=5
    )
    assert float(found.auc[0, 0]) == pytest.approx(auc(positive, negative))
    drawn = np.random.default_rng(5).multinomial(6, [1 / 6] * 6, size=400)
    values = []
    for counts in drawn:
        copies = [(f"f{family}", copy) for family, count in enumerate(counts) for copy in range(count)]
        won, of = 0.0, 0
        for family, copy in copies:
            for other, again in copies:
                if family == other and copy != again:  # not with its own copy
                    continue
                high = positive[[label == family for label in families[0]]]
                low = negative[[label == other for label in families[1]]]
                won += counted(high, low) * len(high) * len(low)
                of += len(high) * len(low)
        values.append(won / of)
    low, high = np.quantile(values, [0.025, 0.975])
    assert (float(found.low[0, 0]), float(found.high[0, 0])) == (pytest.approx(low), pytest.approx(high))


def test_a_perfect_order_keeps_a_width() -> None:
    positive, negative = one_dimensional([2.0, 3.0, 4.0, 5.0]), one_dimensional([-1.0, -2.0, 0.0, -3.0])
    found = separation(UNIT, positive, negative, (["a", "a", "b", "c"], ["a", "b", "b", "c"]))
    assert float(found.auc[0, 0]) == 1.0
    assert float(found.low[0, 0]) == pytest.approx(0.4385, abs=1e-3)  # Wilson, 3 of 3
    assert float(found.accuracy[0, 0]) == 1.0


def test_folds_keep_families_and_no_sample_trains_its_own_probe() -> None:
    """Two copies of a sample are one family: apart, each would be recognised by its twin in training."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 1, 1, 400))
    positive, negative = (np.repeat(values[half::2], 2, axis=0) for half in (0, 1))
    whole = tuple([f"{side}-{row // 2}" for row in range(40)] for side in (0, 1))
    leaking = cross_validate(positive, negative, own(40, 40), n_resamples=20)
    honest = cross_validate(positive, negative, whole, n_resamples=20)
    assert float(leaking.auc[0, 0]) > 0.95
    assert abs(float(honest.auc[0, 0]) - 0.5) < 0.2


def test_cross_validation_by_hand() -> None:
    positive, negative, _ = planted((9, 7), 1.0, seed=4)
    families = [f"f{row % 5}" for row in range(9)], [f"f{row % 5}" for row in range(7)]
    found = cross_validate(positive, negative, families, folds=3, seed=2)
    order = np.random.default_rng(2).permutation(5)
    fold = {f"f{family}": int(np.flatnonzero(order == family)[0]) % 3 for family in range(5)}
    won, of, hits = 0.0, 0, [[], []]
    for number in range(3):
        outside = [
            np.array([values[row, 0, 0] for row in range(len(values)) if fold[labels[row]] != number])
            for values, labels in zip((positive, negative), families, strict=True)
        ]
        inside = [
            np.array([values[row, 0, 0] for row in range(len(values)) if fold[labels[row]] == number])
            for values, labels in zip((positive, negative), families, strict=True)
        ]
        means = [side.mean(axis=0) for side in outside]
        direction = means[0] - means[1]
        scores = [side @ direction - direction @ (means[0] + means[1]) / 2 for side in inside]
        won += counted(*scores) * len(scores[0]) * len(scores[1])
        of += len(scores[0]) * len(scores[1])
        for side, sign in ((0, 1), (1, -1)):
            hits[side] += (sign * scores[side] > 0).tolist()
    assert float(found.auc[0, 0]) == pytest.approx(won / of)
    assert float(found.accuracy[0, 0]) == pytest.approx((np.mean(hits[0]) + np.mean(hits[1])) / 2)


def test_without_a_difference_the_interval_covers_one_half() -> None:
    """Labels given at random: about 95 of 100 intervals should hold .5; fewer for so few families, but not few."""
    covered = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=(80, 1, 1, D_MODEL))
        probes = fit_probes(values[:20], values[20:40])
        found = separation(probes, values[40:60], values[60:], own(20, 20), n_resamples=300, seed=seed)
        covered.append(float(found.low[0, 0]) <= 0.5 <= float(found.high[0, 0]))
        inside = cross_validate(values[:40], values[40:], own(40, 40), n_resamples=20, seed=seed)
        assert 0.1 < float(inside.auc[0, 0]) < 0.9
    assert np.mean(covered) > 0.85


def test_a_place_that_a_sample_lacks_is_left_out_and_one_that_reads_the_same_is_named() -> None:
    positive, negative, _ = planted((6, 6), 3.0, n_layers=2, n_places=2)
    gone = positive.copy()
    gone[0, :, 1] = np.nan
    probes, fewer = fit_probes(gone, negative), fit_probes(positive[1:], negative)
    assert probes.n.tolist() == [[6, 5], [6, 6]]
    np.testing.assert_array_equal(probes.direction[:, 1], fewer.direction[:, 1])
    assert np.isnan(probes.score(gone)[0, :, 1]).all()
    np.testing.assert_allclose(probes.score_share(gone)[:, 1], probes.score_share(positive[1:])[:, 1])
    same = np.ones((4, 1, 1, D_MODEL)) * 7
    none = fit_probes(same, same + 1e-9)
    assert not none.direction.any()
    flat = separation(none, same, same, own(4, 4), n_resamples=10)
    assert (float(flat.auc[0, 0]), float(flat.accuracy[0, 0])) == (0.5, 0.5)
    with pytest.raises(NotEnoughData, match="direction is zero"):
        none.at(0, "0").margin(0.0)


def test_what_does_not_fit_is_refused() -> None:
    positive, negative, _ = planted((4, 4), 1.0, n_layers=2)
    with pytest.raises(NotEnoughData, match="0 negative"):
        fit_probes(positive, negative[:0])
    with pytest.raises(StatisticsError, match="must agree"):
        fit_probes(positive, negative[:, :1])
    with pytest.raises(StatisticsError, match="same model"):
        fit_probes(positive, negative).score(positive[:, :1])
    with pytest.raises(NotEnoughData, match="two folds"):
        cross_validate(positive, negative, own(4, 4), folds=1)
    with pytest.raises(NotEnoughData, match="1 families"):
        cross_validate(positive, negative, (["a"] * 4, ["a"] * 4))
    with pytest.raises(StatisticsError, match="no probe was fitted"):
        fit_probes(positive, negative).at(2, "0")
