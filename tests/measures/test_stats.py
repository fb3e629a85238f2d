"""Statistics against brute force, against distributions known in closed form, and calibrated by simulation."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rim_lens.errors import NotEnoughData, NotFinite, StatisticsError
from rim_lens.measures import stats
from rim_lens.measures.stats import (
    benjamini_hochberg,
    bootstrap_interval,
    family_index,
    proportion_interval,
    resampled_requests,
    sign_flip_test,
    specificity,
)
from tests.chance import ALTERNATIVES, EIGHTHS, UNHURRIED, assert_level_held


def brute_force_p(differences, families, alternative):
    """All sign vectors over all families, one Python loop each, in exact arithmetic on multiples of 1/8."""
    labels = sorted(set(families))

    def extremeness(signs):
        total = sum(d * signs[labels.index(family)] for d, family in zip(differences, families, strict=True))
        return {"two-sided": abs(total), "less": -total, "greater": total}[alternative]

    observed = extremeness([1] * len(labels))
    vectors = list(itertools.product([1, -1], repeat=len(labels)))
    return sum(extremeness(signs) >= observed for signs in vectors) / len(vectors)


# --- sign-flip test: right -----------------------------------------------------------------------------


@settings(UNHURRIED, max_examples=60)
@given(
    data=st.lists(st.tuples(EIGHTHS, st.sampled_from("abcdef")), min_size=1, max_size=9),
    alternative=st.sampled_from(ALTERNATIVES),
)
def test_exact_p_equals_brute_force(data, alternative):
    differences, families = zip(*data, strict=True)
    test = sign_flip_test(differences, families=families, alternative=alternative)
    assert test.exact
    assert test.p == pytest.approx(brute_force_p(differences, families, alternative))
    assert test.p >= test.finest
    assert test.statistic == pytest.approx(sum(differences) / len(differences))


@pytest.mark.parametrize(
    ("wins", "losses", "ties"), [(5, 0, 0), (7, 2, 6), (3, 3, 1), (10, 1, 20), (1, 0, 4)]
)
def test_plus_and_minus_one_give_the_sign_test(wins, losses, ties):
    differences = [1.0] * wins + [-1.0] * losses + [0.0] * ties
    turning = wins + losses
    tail = sum(math.comb(turning, k) for k in range(wins, turning + 1)) / 2**turning
    greater = sign_flip_test(differences, alternative="greater")
    assert greater.exact
    assert greater.p == pytest.approx(tail)
    assert greater.n == wins + losses + ties
    assert greater.n_families == turning
    assert sign_flip_test(differences).p == pytest.approx(min(1.0, 2 * tail))


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_agrees_with_scipy(alternative):
    scipy_stats = pytest.importorskip("scipy.stats")
    differences = np.random.default_rng(0).normal(0.4, 1, size=10)
    theirs = scipy_stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative=alternative
    )
    assert sign_flip_test(differences, alternative=alternative).p == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_drawn_signs_agree_with_all_signs(alternative):
    differences = np.random.default_rng(1).normal(0.3, 1, size=(12, 5))
    exact = sign_flip_test(differences, alternative=alternative)
    drawn = sign_flip_test(differences, alternative=alternative, max_exact=1, n_permutations=40_000, seed=3)
    assert not drawn.exact
    error = 4 * np.sqrt(exact.p * (1 - exact.p) / 40_000) + 2 / 40_000
    assert np.all(np.abs(drawn.p - exact.p) <= error)
    # (1 + hits) / (1 + N): the data's own signs count as one more draw.
    assert drawn.p * 40_001 == pytest.approx(np.round(drawn.p * 40_001), abs=1e-6)


def test_max_statistic_equals_brute_force():
    sums = np.random.default_rng(2).normal(0.5, [1.0, 3.0, 0.2], size=(7, 3))
    signs = np.array(list(itertools.product([1, -1], repeat=7)))
    for studentise in (True, False):
        flipped = signs[:, :, None] * sums
        statistic = flipped.mean(axis=1)
        if studentise:
            statistic = statistic / (flipped.std(axis=1, ddof=1) / math.sqrt(7))
        largest = np.abs(statistic).max(axis=1)
        expected = [(largest >= abs(statistic[0, head]) * (1 - 1e-9)).mean() for head in range(3)]
        test = sign_flip_test(sums, correction="max", studentise=studentise)
        assert test.p == pytest.approx(expected)


def test_without_studentising_a_noisy_head_hides_a_quiet_one():
    rng = np.random.default_rng(3)
    differences = np.stack([rng.normal(0, 50, 12), rng.normal(1, 0.3, 12)], axis=1)
    assert sign_flip_test(differences, correction="max").p[1] < 0.01
    assert sign_flip_test(differences, correction="max", studentise=False).p[1] > 0.2


@pytest.mark.parametrize("correction", [None, "max"])
def test_blocks_do_not_change_the_result(monkeypatch, correction):
    differences = np.random.default_rng(4).normal(0.2, 1, size=(13, 6))
    options = ({"max_exact": 2**13}, {"max_exact": 1, "n_permutations": 500})
    whole = [sign_flip_test(differences, correction=correction, **each).p for each in options]
    monkeypatch.setattr(stats, "_BLOCK", 97)
    assert [sign_flip_test(differences, correction=correction, **each).p.tolist() for each in options] == [
        p.tolist() for p in whole
    ]


def test_layers_and_heads_keep_their_shape_and_each_head_its_own_p():
    differences = np.random.default_rng(5).normal(0.3, 1, size=(30, 2, 3))
    test = sign_flip_test(differences, n_permutations=400)
    assert test.p.shape == test.statistic.shape == (2, 3)
    assert sign_flip_test(differences[:, 1, 2], n_permutations=400).p == test.p[1, 2]
    assert isinstance(sign_flip_test(differences[:, 1, 2]).p, float)


def test_tensors_and_labelled_arrays_are_read_by_request():
    differences = np.random.default_rng(6).normal(0.3, 1, size=(8, 3))
    expected = sign_flip_test(differences).p.tolist()
    assert sign_flip_test(torch.tensor(differences, requires_grad=True)).p.tolist() == expected
    turned = xr.DataArray(differences.T, dims=("head", "prompt"))
    assert sign_flip_test(turned).p.tolist() == expected


# --- sign-flip test: properties ------------------------------------------------------------------------

COLUMNS = st.integers(1, 8).flatmap(lambda n: hnp.arrays(np.float64, (n, 3), elements=EIGHTHS))


@settings(UNHURRIED, max_examples=50)
@given(differences=COLUMNS, correction=st.sampled_from([None, "max"]))
def test_turning_all_signs_keeps_the_two_sided_p_and_swaps_the_one_sided(differences, correction):
    def p(values, alternative):
        return sign_flip_test(values, alternative=alternative, correction=correction).p.tolist()

    assert p(-differences, "two-sided") == p(differences, "two-sided")
    assert p(-differences, "less") == p(differences, "greater")


@settings(UNHURRIED, max_examples=50)
@given(differences=COLUMNS, data=st.data(), correction=st.sampled_from([None, "max"]))
def test_the_order_of_requests_and_the_scale_do_not_matter(differences, data, correction):
    order = data.draw(st.permutations(range(len(differences))))
    p = sign_flip_test(differences, correction=correction).p
    assert sign_flip_test(differences[order] * 4.0, correction=correction).p == pytest.approx(p)


@settings(UNHURRIED, max_examples=50)
@given(differences=COLUMNS, studentise=st.booleans(), alternative=st.sampled_from(ALTERNATIVES))
def test_correcting_never_makes_p_smaller(differences, studentise, alternative):
    raw = sign_flip_test(differences, alternative=alternative)
    corrected = sign_flip_test(differences, alternative=alternative, correction="max", studentise=studentise)
    assert np.all(corrected.p >= raw.p - 1e-12)
    assert np.all((raw.p >= raw.finest) & (raw.p <= 1))


@settings(UNHURRIED, max_examples=50)
@given(differences=hnp.arrays(np.float64, 6, elements=EIGHTHS), shift=st.integers(0, 40).map(lambda k: k / 8))
def test_adding_a_constant_never_raises_the_one_sided_p(differences, shift):
    before = sign_flip_test(differences, alternative="greater").p
    assert sign_flip_test(differences + shift, alternative="greater").p <= before + 1e-12


@settings(UNHURRIED, max_examples=50)
@given(differences=hnp.arrays(np.float64, (7, 2), elements=EIGHTHS), data=st.data())
def test_requests_that_do_not_differ_change_nothing_but_n(differences, data):
    places = data.draw(st.lists(st.integers(0, 7), max_size=20))
    padded = np.insert(differences, places, 0.0, axis=0)
    one, other = sign_flip_test(differences), sign_flip_test(padded)
    assert other.p.tolist() == one.p.tolist()
    assert (other.n_families, other.finest) == (one.n_families, one.finest)
    assert other.n == len(padded)


def test_p_is_never_finer_than_families_or_permutations_allow():
    strong = np.full(40, 3.0) + np.arange(40) / 100
    few = sign_flip_test(strong, families=["a", "b", "c", "d"] * 10)
    assert (few.p, few.finest, few.n_families, few.n_permutations) == (0.125, 0.125, 4, 16)
    # Drawn at random, 5 families may show a lower p by luck of the draw: it is held at the bound.
    for seed in range(20):
        drawn = sign_flip_test(strong, families=list("abcde") * 8, max_exact=1, n_permutations=99, seed=seed)
        assert drawn.p >= drawn.finest == 2 / 2**5
    many = sign_flip_test(strong, n_permutations=199)
    assert many.p == many.finest == 1 / 200
    assert sign_flip_test([1.0]).p == 1.0
    assert sign_flip_test([1.0], alternative="greater").p == 0.5
    nothing = sign_flip_test(np.zeros((4, 2)))
    assert nothing.p.tolist() == [1.0, 1.0]
    assert nothing.finest == 1.0


def test_the_same_seed_gives_the_same_p():
    differences = np.random.default_rng(7).normal(0.2, 1, size=40)
    p = [sign_flip_test(differences, n_permutations=300, seed=seed).p for seed in (1, 1, 2)]
    assert p[0] == p[1] != p[2]
    assert sign_flip_test(differences, n_permutations=300, seed=np.random.default_rng(1)).p == p[0]


# --- sign-flip test: calibrated ------------------------------------------------------------------------
# Exact tests are run with one null data set per column. Random flips are shared over columns, which would tie
# the runs together, so those come one by one.


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("n", [2, 3, 5, 8, 12])
def test_level_on_continuous_differences(n, alternative):
    null = np.random.default_rng(n).standard_t(df=3, size=(n, 5000))
    assert_level_held(sign_flip_test(null, alternative=alternative).p)


@pytest.mark.parametrize("n", [3, 6, 12])
@pytest.mark.parametrize("values", [[-1, 0, 1], [-1, 0, 0, 0, 0, 1], [-0.3, -0.1, 0.1, 0.3]])
def test_level_with_exact_ties(n, values):
    null = np.random.default_rng(n).choice(values, size=(n, 5000))
    for alternative in ALTERNATIVES:
        assert_level_held(sign_flip_test(null, alternative=alternative).p)


def test_level_with_drawn_signs_and_ties():
    rng = np.random.default_rng(8)
    null = rng.choice([-1, -0.5, 0, 0.5, 1], size=(2000, 25))
    assert_level_held([sign_flip_test(run, n_permutations=99, seed=seed).p for seed, run in enumerate(null)])


def clustered(rng, n_families, n_runs, size=6):
    """Null differences that share most of their noise within a family."""
    shared = np.repeat(rng.normal(size=(n_families, n_runs)), size, axis=0)
    labels = [f"family {k}" for k in range(n_families) for _ in range(size)]
    return shared + 0.5 * rng.normal(size=shared.shape), labels


@pytest.mark.parametrize("n_families", [3, 6, 10])
def test_level_on_clustered_differences_needs_families(n_families):
    null, families = clustered(np.random.default_rng(9), n_families, 3000)
    assert_level_held(sign_flip_test(null, families=families).p)
    ignored = sign_flip_test(null, n_permutations=499).p
    assert np.mean(ignored <= 0.05) > 0.15


def test_families_of_unequal_size_hold_the_level():
    rng = np.random.default_rng(10)
    sizes = [1, 1, 2, 3, 5, 8, 13]
    shared = np.repeat(rng.normal(size=(len(sizes), 3000)), sizes, axis=0)
    families = np.repeat(np.arange(len(sizes)), sizes)
    assert_level_held(sign_flip_test(shared, families=families).p)


@pytest.mark.parametrize("studentise", [True, False])
@pytest.mark.parametrize("kind", ["independent", "correlated", "ties"])
def test_max_statistic_holds_the_familywise_level(studentise, kind):
    rng = np.random.default_rng(11)
    null = rng.normal(size=(2000, 9, 8)) * np.geomspace(0.1, 10, 8)
    if kind == "correlated":
        null = null + 3 * rng.normal(size=(2000, 9, 1))
    if kind == "ties":
        null = np.sign(null) * (rng.random(null.shape) < 0.6)
    smallest = [sign_flip_test(run, correction="max", studentise=studentise).p.min() for run in null]
    assert_level_held(smallest)
    if kind == "independent":
        raw = [sign_flip_test(run).p.min() for run in null[:500]]
        assert np.mean(np.array(raw) <= 0.05) > 0.2


def test_max_statistic_holds_its_level_among_true_nulls_beside_true_effects():
    rng = np.random.default_rng(12)
    runs = rng.normal(size=(2000, 9, 6))
    runs[:, :, :3] += 2.0
    assert_level_held([sign_flip_test(run, correction="max").p[3:].min() for run in runs])


def test_power_rises_with_the_effect_and_the_requests():
    rng = np.random.default_rng(13)

    def power(effect, n):
        return np.mean(sign_flip_test(rng.normal(effect, 1, size=(n, 1000))).p <= 0.05)

    assert 0.02 < power(0.0, 12) < 0.08
    # The t-test's power at effect 1 and n = 12 is .88; flips come close to it.
    assert power(1.0, 12) > 0.82
    assert power(0.5, 6) < power(0.5, 12) < power(1.0, 12)


def test_max_statistic_still_finds_a_strong_head_among_many():
    rng = np.random.default_rng(14)
    found = []
    for _ in range(50):
        differences = rng.normal(size=(14, 60))
        differences[:, 17] -= 2.5
        p = sign_flip_test(differences, correction="max").p
        found.append(p[17] <= 0.05)
    assert np.mean(found) > 0.9


# --- corrections ---------------------------------------------------------------------------------------


def step_up(p, level):
    """Benjamini and Hochberg's procedure as they wrote it: the set of rejected hypotheses."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    last = max((rank for rank, i in enumerate(order, start=1) if p[i] <= level * rank / len(p)), default=0)
    return set(order[:last])


@settings(UNHURRIED, max_examples=100)
@given(
    p=st.lists(st.integers(1, 1000).map(lambda k: k / 1000), min_size=1, max_size=12),
    level=st.floats(0.013, 0.4),
)
def test_adjusted_p_rejects_what_the_step_up_procedure_rejects(p, level):
    adjusted = benjamini_hochberg(p)
    assert {i for i in range(len(p)) if adjusted[i] <= level} == step_up(p, level)


@settings(UNHURRIED, max_examples=100)
@given(
    p=hnp.arrays(np.float64, hnp.array_shapes(max_dims=2, max_side=6), elements=st.floats(0, 1)),
    data=st.data(),
)
def test_adjusted_p_properties(p, data):
    adjusted = benjamini_hochberg(p)
    assert adjusted.shape == p.shape
    assert np.all(adjusted >= p)
    assert np.all(adjusted <= 1)
    order = np.argsort(p, axis=None, kind="stable")
    assert np.all(np.diff(adjusted.ravel()[order]) >= 0)
    mixed = data.draw(st.permutations(range(p.size)))
    assert benjamini_hochberg(p.ravel()[mixed]).tolist() == adjusted.ravel()[mixed].tolist()


def test_adjusted_p_agrees_with_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    p = np.random.default_rng(15).uniform(size=50) ** 2
    assert benjamini_hochberg(p) == pytest.approx(scipy_stats.false_discovery_control(p))


def test_nan_is_not_a_test_and_stays():
    adjusted = benjamini_hochberg([[0.01, math.nan], [0.04, 0.03]])
    assert adjusted[0].tolist()[0] == pytest.approx(0.03)
    assert math.isnan(adjusted[0, 1])
    assert adjusted[1].tolist() == pytest.approx([0.04, 0.04])
    assert np.isnan(benjamini_hochberg([math.nan, math.nan])).all()
    assert benjamini_hochberg([]).tolist() == []


@pytest.mark.parametrize("p", [[-0.1, 0.5], [0.2, 1.1]])
def test_numbers_that_are_no_p_values_are_refused(p):
    with pytest.raises(StatisticsError, match="between 0 and 1"):
        benjamini_hochberg(p)


def test_false_discovery_rate_is_held():
    rng = np.random.default_rng(16)
    shares = []
    for _ in range(2000):
        z = rng.normal(size=40)
        z[:10] += 3
        p = np.array([2 * (1 - NormalDist().cdf(abs(each))) for each in z])
        found = benjamini_hochberg(p) <= 0.1
        shares.append(found[10:].sum() / max(1, found.sum()))
    # The rate is level × share of true nulls = .075, exactly, for independent tests.
    assert np.mean(shares) == pytest.approx(0.075, abs=4 * np.std(shares) / math.sqrt(2000))


def test_false_discovery_rate_is_held_on_sign_flip_tests_of_correlated_heads():
    rng = np.random.default_rng(17)
    shares = []
    for _ in range(500):
        differences = rng.normal(size=(10, 20)) + rng.normal(size=(10, 1))
        differences[:, :4] += 1.5
        found = benjamini_hochberg(sign_flip_test(differences).p) <= 0.1
        shares.append(found[4:].sum() / max(1, found.sum()))
    assert np.mean(shares) <= 0.1 + 3.5 * np.std(shares) / math.sqrt(500)


# --- specificity ---------------------------------------------------------------------------------------


def test_specificity_is_the_paired_difference():
    harmful, twins = np.array([[-3.0, 1.0], [-2.0, 1.0]]), np.array([[-1.0, 1.0], [0.0, 1.0]])
    assert specificity(harmful, twins).tolist() == [[-2.0, 0.0], [-2.0, 0.0]]
    assert specificity(twins, harmful).tolist() == (-specificity(harmful, twins)).tolist()


def test_specificity_refuses_unpaired_effects():
    with pytest.raises(StatisticsError, match="one twin per request"):
        specificity([1.0, 2.0], [1.0])
    with pytest.raises(NotFinite, match="effect_on_twins"):
        specificity([1.0], [math.nan])


# --- intervals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bootstrap_coverage_is_roughly_nominal_from_30_requests_on(level):
    values = np.random.default_rng(18).normal(2.0, 1.5, size=(30, 3000))
    interval = bootstrap_interval(values, level=level)
    coverage = np.mean((interval.low <= 2.0) & (interval.high >= 2.0))
    assert level - 0.04 < coverage < level + 0.02


def test_bootstrap_coverage_on_families_needs_families():
    values, families = clustered(np.random.default_rng(19), 30, 2000)

    def coverage(interval):
        return np.mean((interval.low <= 0) & (interval.high >= 0))

    assert 0.91 < coverage(bootstrap_interval(values, families)) < 0.97
    assert coverage(bootstrap_interval(values)) < 0.75


def test_a_statistic_of_ones_own_is_resampled_as_the_mean_is():
    values, families = clustered(np.random.default_rng(20), 12, 2)
    fast = bootstrap_interval(values, families, n_resamples=4000)
    slow = bootstrap_interval(values, families, lambda rows: rows.mean(axis=0), n_resamples=4000, seed=5)
    width = fast.high - fast.low
    assert np.all(np.abs(fast.low - slow.low) < 0.1 * width)
    assert np.all(np.abs(fast.high - slow.high) < 0.1 * width)
    assert fast.estimate == pytest.approx(slow.estimate)
    median = bootstrap_interval(values[:, 0], families, np.median, n_resamples=200)
    assert median.low <= median.estimate <= median.high


def test_equal_values_have_no_width_also_where_families_differ_in_size():
    # A resample holds more or fewer requests than there are; its mean divides by its own number.
    interval = bootstrap_interval([5.0] * 6, families=["a", "b", "b", "b", "b", "c"])
    assert (interval.low, interval.high) == pytest.approx((5.0, 5.0))


def test_bootstrap_of_the_mean_agrees_with_all_resamples():
    values = np.array([0.0, 1.0, 4.0, 9.0])
    means = np.sort([np.mean(rows) for rows in itertools.product(values, repeat=4)])
    interval = bootstrap_interval(values, level=0.8, n_resamples=50_000)
    # Resampled means are a lattice: the end lies on or beside the quantile of the full enumeration.
    assert np.searchsorted(means, interval.low + 1e-9) / 256 == pytest.approx(0.1, abs=0.06)
    assert np.searchsorted(means, interval.high - 1e-9) / 256 == pytest.approx(0.9, abs=0.06)


@settings(UNHURRIED, max_examples=30)
@given(values=hnp.arrays(np.float64, 6, elements=EIGHTHS), shift=EIGHTHS)
def test_bootstrap_moves_with_the_values(values, shift):
    one = bootstrap_interval(values, n_resamples=200)
    moved = bootstrap_interval(values + shift, n_resamples=200)
    turned = bootstrap_interval(-values, n_resamples=200)
    assert moved.low == pytest.approx(one.low + shift, abs=1e-9)
    assert moved.high == pytest.approx(one.high + shift, abs=1e-9)
    assert (turned.low, turned.high) == pytest.approx((-one.high, -one.low), abs=1e-9)
    assert values.min() - 1e-9 <= one.low <= one.high <= values.max() + 1e-9


def test_bootstrap_blocks_do_not_change_the_result(monkeypatch):
    values = np.random.default_rng(21).normal(size=(10, 2, 7))
    whole = bootstrap_interval(values, n_resamples=300)
    monkeypatch.setattr(stats, "_BLOCK", 1000)
    parts = bootstrap_interval(values, n_resamples=300)
    assert parts.low == pytest.approx(whole.low)
    assert parts.high == pytest.approx(whole.high)
    assert parts.low.shape == (2, 7)


def test_resamples_without_a_statistic_are_left_out_and_counted():
    values = np.array([0.0, 0.0, 1.0])

    def ratio(rows):
        return 1 / rows.mean() if rows.any() else math.nan

    interval = bootstrap_interval(values, statistic=ratio, n_resamples=3000)
    assert interval.n_undefined / 3000 == pytest.approx((2 / 3) ** 3, abs=0.04)
    assert (interval.low, interval.high) == (1.0, 3.0)
    never = bootstrap_interval(values, statistic=lambda rows: math.nan, n_resamples=10)
    assert math.isnan(never.low)
    assert never.n_undefined == 10


def test_resampled_requests_come_in_whole_families():
    families = ["a", "b", "a", "c", "c", "c"]
    counts = np.zeros(6)
    for rows in resampled_requests(families, 3000, seed=1):
        drawn = np.bincount(rows, minlength=6)
        assert drawn[0] == drawn[2]
        assert drawn[3] == drawn[4] == drawn[5]
        assert drawn[0] + drawn[1] + drawn[3] == 3
        counts += drawn
    assert counts / 3000 == pytest.approx(np.ones(6), abs=0.06)


def test_fewer_than_two_families_are_no_interval():
    with pytest.raises(NotEnoughData, match="one family"):
        bootstrap_interval([1.0, 2.0, 3.0], families=["a", "a", "a"])
    with pytest.raises(NotEnoughData):
        bootstrap_interval([1.0])


@pytest.mark.parametrize("level", [0, 1, 95])
def test_levels_that_are_no_share_are_refused(level):
    with pytest.raises(StatisticsError, match="level"):
        bootstrap_interval([1.0, 2.0], level=level)
    with pytest.raises(StatisticsError, match="level"):
        proportion_interval(1, 2, level=level)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_ends_are_where_the_score_test_turns(n, level):
    z = NormalDist().inv_cdf(0.5 + level / 2)
    for successes in range(n + 1):
        share = successes / n
        interval = proportion_interval(successes, n, level)
        for end in (interval.low, interval.high):
            assert abs(share - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-9)
        assert 0 <= interval.low <= share <= interval.high <= 1
        mirrored = proportion_interval(n - successes, n, level)
        assert mirrored.low == pytest.approx(1 - interval.high)
    assert proportion_interval(n, n, level).high == 1.0


def test_wilson_coverage_is_near_nominal_on_average():
    rng = np.random.default_rng(22)
    table = [proportion_interval(k, 25) for k in range(26)]
    shares = rng.uniform(0.02, 0.98, size=4000)
    counts = rng.binomial(25, shares)
    covered = [table[k].low <= share <= table[k].high for k, share in zip(counts, shares, strict=True)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_impossible_counts_are_refused():
    with pytest.raises(NotEnoughData):
        proportion_interval(0, 0)
    for successes in (-1, 5):
        with pytest.raises(StatisticsError, match="out of 4"):
            proportion_interval(successes, 4)


# --- families ------------------------------------------------------------------------------------------


def test_families_are_read_from_lists_arrays_and_labelled_arrays():
    labels = ["b", "a", "b"]
    for families in (labels, tuple(labels), np.array(labels), xr.DataArray(labels, dims="prompt")):
        index, count = family_index(families, 3)
        assert (index.tolist(), count) == ([0, 1, 0], 2)
    assert family_index([("x", 1), ("x", 2), ("x", 1)], 3)[0].tolist() == [0, 1, 0]
    assert family_index(None, 3)[0].tolist() == [0, 1, 2]


def test_a_request_without_a_label_is_a_family_of_its_own():
    index, count = family_index(["", None, "a", "", math.nan, "a"], 6)
    assert (index.tolist(), count) == ([0, 1, 2, 3, 4, 2], 5)


def test_labels_must_match_requests():
    with pytest.raises(StatisticsError, match="2 family labels for 3 requests"):
        sign_flip_test([1.0, 2.0, 3.0], families=["a", "b"])


# --- bad input -----------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_are_refused_by_place():
    differences = np.zeros((4, 2, 3))
    differences[1, 0, 2] = math.nan
    differences[3, 1, 1] = math.inf
    with pytest.raises(NotFinite, match=r"differences: 2 of 24 .*first: request 1, head \(0, 2\)"):
        sign_flip_test(differences)
    with pytest.raises(NotFinite, match=r"request 1, head 0"):
        bootstrap_interval([[1.0, 1.0], [math.nan, 2.0]])


def test_nothing_to_test_is_refused():
    for nothing in ([], np.zeros((0, 3)), np.zeros((3, 0)), 1.0):
        with pytest.raises(NotEnoughData, match="shape"):
            sign_flip_test(nothing)


@pytest.mark.parametrize(
    "options", [{"alternative": "both"}, {"correction": "bonferroni"}, {"n_permutations": 0}]
)
def test_unknown_options_are_refused(options):
    with pytest.raises(StatisticsError):
        sign_flip_test([1.0, 2.0], **options)
