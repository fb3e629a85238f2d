"""Debiased CKA against the definition of its U-statistic, whitening against a full covariance matrix, and half samples."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rim_lens.errors import NotEnoughData, NotFinite, StatisticsError
from rim_lens.measures.entanglement.residual import angles, likeness
from rim_lens.measures.entanglement.similarity import (
    Whitener,
    debiased_cka,
    half_samples,
    moved_ratio,
    recentred,
    shrinkage,
    u_centred,
)
from tests.chance import UNHURRIED

SEEDS = st.integers(0, 10_000)


def loop_hsic(x, y):
    """HSIC as the mean over all quadruples of distinct prompts (Song et al. 2012, equation 5)."""
    k, ell = x @ x.T, y @ y.T
    terms = [
        k[i, j] * ell[i, j] + k[i, j] * ell[q, r] - 2 * k[i, j] * ell[i, q]
        for i, j, q, r in permutations(range(len(x)), 4)
    ]
    return sum(terms) / len(terms)


@settings(UNHURRIED, max_examples=25)
@given(seed=SEEDS, n=st.integers(4, 7), dims=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_equals_the_mean_over_all_quadruples(seed, n, dims):
    rng = np.random.default_rng(seed)
    x, y = (rng.normal(size=(n, dim)) for dim in dims)
    y[:, 0] += x[:, 0]
    expected = loop_hsic(x, y) / np.sqrt(loop_hsic(x, x) * loop_hsic(y, y))
    assert debiased_cka(x, y) == pytest.approx(expected, abs=1e-8)


@settings(UNHURRIED, max_examples=25)
@given(seed=SEEDS, scale=st.sampled_from([-3.0, 0.01, 7.0]))
def test_orthogonal_maps_scaling_and_shifts_change_nothing(seed, scale):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(9, 5))
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    assert debiased_cka(x, scale * y @ turn + 3) == pytest.approx(debiased_cka(x, y), abs=1e-9)
    assert debiased_cka(y, scale * y @ turn - 1) == pytest.approx(1.0, abs=1e-12)
    assert debiased_cka(x, y) <= 1


def test_unlike_the_plain_one_it_is_near_nothing_for_unrelated_models_with_fewer_prompts_than_dimensions():
    rng = np.random.default_rng(0)
    found = [debiased_cka(rng.normal(size=(20, 300)), rng.normal(size=(20, 300))) for _ in range(40)]
    x, y = (rng.normal(size=(20, 300)) for _ in range(2))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    plain = np.square(x.T @ y).sum() / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert plain > 0.9
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(len(found))


def test_a_part_of_a_centred_matrix_centred_again_is_that_part_centred():
    values = np.random.default_rng(1).normal(size=(9, 3))
    rows = np.array([0, 2, 3, 5, 8])
    assert recentred(u_centred(values)[np.ix_(rows, rows)]) == pytest.approx(u_centred(values[rows]))


@pytest.mark.parametrize(
    ("first", "second", "error"),
    [
        (np.ones((3, 2)), np.ones((3, 2)), NotEnoughData),
        (np.ones((5, 2)), np.ones((6, 2)), StatisticsError),
        (np.ones(5), np.ones(5), StatisticsError),
        (np.full((5, 2), np.nan), np.ones((5, 2)), NotFinite),
    ],
)
def test_bad_input_is_named(first, second, error):
    with pytest.raises(error):
        debiased_cka(first, second)


def test_what_does_not_vary_has_no_likeness():
    assert np.isnan(debiased_cka(np.ones((5, 2)), np.random.default_rng(0).normal(size=(5, 2))))


def test_the_ratio_is_undefined_while_harmless_requests_have_not_moved():
    assert moved_ratio(0.3, 0.1) == (pytest.approx(3.0), "")
    for harmful in (0.0, 0.3):
        value, reason = moved_ratio(harmful, 0.0)
        assert np.isnan(value)
        assert "moved" in reason


# --- whitening ---------------------------------------------------------------------------------------


def loop_shrinkage(rows):
    """Ledoit and Wolf 2004, section 3, with all matrices written out."""
    n, dim = rows.shape
    covariance = sum(np.outer(row, row) for row in rows) / n
    mean = np.trace(covariance) / dim
    spread = np.square(covariance - mean * np.eye(dim)).sum() / dim
    noise = sum(np.square(np.outer(row, row) - covariance).sum() for row in rows) / n**2 / dim
    return min(noise, spread) / spread, mean, covariance


@settings(UNHURRIED, max_examples=20)
@given(seed=SEEDS, shape=st.sampled_from([(30, 4), (5, 12), (40, 8)]))
def test_whitening_equals_the_inverse_root_of_the_full_shrunk_covariance(seed, shape):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=shape) * np.linspace(0.2, 4, shape[1])
    rho, mean, covariance = loop_shrinkage(rows)
    assert shrinkage(rows) == (pytest.approx(max(rho, 1e-3)), pytest.approx(mean))
    shrunk = (1 - max(rho, 1e-3)) * covariance + max(rho, 1e-3) * mean * np.eye(shape[1])
    sizes, directions = np.linalg.eigh(shrunk)
    root = directions @ np.diag(sizes**-0.5) @ directions.T
    others = rng.normal(size=(3, shape[1]))
    assert Whitener(rows)(others) == pytest.approx(others @ root, rel=1e-6, abs=1e-8)


def test_rows_that_do_not_vary_whiten_nothing():
    with pytest.raises(NotEnoughData):
        Whitener(np.zeros((4, 3)))


def families_of(n, per=2):
    return [str(place // per) for place in range(n)]


def test_angles_equal_a_plain_rederivation():
    rng = np.random.default_rng(3)
    sizes = {"harmful": 12, "harmless": 12, "reasoning": 10}
    base = {kind: rng.normal(size=(n, 2, 5)) for kind, n in sizes.items()}
    base["harmful"][..., 0] += 2
    tuned = {kind: values + 0.3 * rng.normal(size=values.shape) for kind, values in base.items()}
    families = {kind: [f"{kind}{one}" for one in families_of(n)] for kind, n in sizes.items()}
    columns, estimates = angles(base, tuned, families, 20, 0.95, seed=4)

    chosen = np.random.default_rng(4).permutation(6)[:3]
    half = np.repeat(np.isin(np.arange(6), chosen), 2)
    for name, model in (("base", base), ("tuned", tuned)):
        for layer in range(2):
            parts = [model[kind][:, layer] for kind in sizes]
            rho, mean, covariance = loop_shrinkage(
                np.concatenate([part - part.mean(axis=0) for part in parts])
            )
            inverse = np.linalg.inv((1 - rho) * covariance + rho * mean * np.eye(5))
            both = []
            for one, other in ((half, ~half), (~half, half)):
                safety = parts[0].mean(axis=0) - parts[1][one].mean(axis=0)
                reasoning = parts[2].mean(axis=0) - parts[1][other].mean(axis=0)
                both.append(
                    safety
                    @ inverse
                    @ reasoning
                    / np.sqrt((safety @ inverse @ safety) * (reasoning @ inverse @ reasoning))
                )
            assert columns[f"whitened_cosine_{name}"][layer] == pytest.approx(np.mean(both))
    one = estimates["whitened_cosine_base"]
    assert one.low < one.high
    assert one.value == pytest.approx(columns["whitened_cosine_base"].mean())


def test_a_model_and_itself_are_alike_and_have_no_ratio_and_no_shift():
    rng = np.random.default_rng(5)
    kinds = {kind: rng.normal(size=(8, 2, 6)) for kind in ("harmful", "harmless", "reasoning")}
    families = {kind: [f"{kind}{one}" for one in families_of(8)] for kind in kinds}
    _, found = likeness(kinds, kinds, families, 10, 0.95, 0)
    assert [found[f"cka_{kind}"].value for kind in kinds] == [1.0, 1.0, 1.0]
    assert np.isnan(found["cka_ratio"].value)
    assert "moved" in found["cka_ratio"].reason
    assert np.isnan(angles(kinds, kinds, families, 10, 0.95, 0)[1]["whitened_cosine_shift"].value)


def test_a_half_sample_spreads_as_the_estimate_does():
    """Half of the families without replacement: for a mean the variance is that of the mean itself."""
    rng = np.random.default_rng(6)
    values = rng.normal(size=40)
    halves = half_samples({"harmful": [str(one) for one in range(40)]}, 4000, seed=0)
    drawn = [values[half["harmful"]].mean() for half in halves]
    assert np.std(drawn) == pytest.approx(values.std(ddof=1) / np.sqrt(40), rel=0.05)


def test_half_samples_keep_families_whole_and_twins_together():
    families = {"harmful": ["a", "a", "b", "c", "d"], "harmless": ["a", "b", "c", "c", "d"]}
    for half in half_samples(families, 20, seed=1):
        named = [{families[kind][row] for row in half[kind]} for kind in families]
        assert named[0] == named[1]
        assert len(named[0]) == 2
        for kind, chosen in zip(families, named, strict=True):
            assert len(half[kind]) == sum(label in chosen for label in families[kind])
