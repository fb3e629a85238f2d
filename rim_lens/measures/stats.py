"""The one room of statistics: paired tests, intervals, corrections.

Requests are the unit of chance here, and requests of one family (same verb, same frame) are not independent
of each other. So whatever flips signs or resamples does it by family where families are given.

- *Is there an effect?* `sign_flip_test`, paired over requests. Under its null, every family's differences are
  as likely to come with the opposite sign; all sign vectors, or a random sample of them, say how often the
  mean would be as far from zero as it is.
- *How large, give or take?* `bootstrap_interval` (resampled families) and `proportion_interval` (Wilson).
- *Many heads at once?* `correction="max"` holds the chance of any false finding, `benjamini_hochberg` the
  share of false ones among the findings.
- *Large against what?* Control sets, in `rim_lens.measures.controls`.

What none of these numbers shows: that an effect is about refusal (that takes `specificity`), or that it holds
for requests unlike those measured. A small p says that the effect is not zero, not that it matters.

Everything takes arrays, nested lists, torch tensors and xarray DataArrays, and computes in float64 on NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from rim_lens.errors import (
    NotEnoughData,
    NotFinite,
    StatisticsError,
)

Alternative = Literal["two-sided", "less", "greater"]
Families = Sequence[Hashable] | np.ndarray

# What one block of sign vectors or resamples may hold at a time: 4 M numbers, 32 MiB.
_BLOCK = 2**22
# Sums of the same numbers in another order differ by rounding; so much (of a norm of 1) still counts as a tie.
_TIE = 1e-9


@dataclass(frozen=True, eq=False)
class PairedTest:
    """What a paired sign-flip test found. Numbers are NumPy scalars where one difference per request was given.

    Attributes:
        p: In (0, 1], one per head; corrected over heads where `correction` says so.
        statistic: Mean difference over requests, in the unit of the differences.
        n: Requests.
        n_families: Independent units whose sign can turn: families with at least one difference other than zero.
        exact: Whether all 2 ** n_families sign vectors were counted.
        n_permutations: Sign vectors looked at (exact: all of them; else: drawn, the data's own not among them).
        finest: No p of this test can be smaller, whatever the effect. Above the level wanted: too few families.
        alternative: "two-sided", "less" or "greater".
        correction: "max" (familywise over all heads) or None.
    """

    p: Float[np.ndarray, " *head"]
    statistic: Float[np.ndarray, " *head"]
    n: int
    n_families: int
    exact: bool
    n_permutations: int
    finest: float
    alternative: Alternative
    correction: Literal["max"] | None


@dataclass(frozen=True, eq=False)
class Interval:
    """An estimate and how far it may be off. Numbers are NumPy scalars where one value per request was given.

    Attributes:
        low: Lower end, in the unit of the values.
        high: Upper end.
        estimate: The statistic on all requests as they are.
        n: Requests.
        n_families: Independent units behind them.
        level: Nominal coverage, for instance 0.95.
        n_undefined: Resamples on which the statistic was NaN; they are left out of `low` and `high`.
    """

    low: Float[np.ndarray, " *head"]
    high: Float[np.ndarray, " *head"]
    estimate: Float[np.ndarray, " *head"]
    n: int
    n_families: int
    level: float
    n_undefined: int = 0


# --- tests -------------------------------------------------------------------------------------------


def sign_flip_test(
    differences: ArrayLike,
    *,
    families: Families | None = None,
    alternative: Alternative = "two-sided",
    correction: Literal["max"] | None = None,
    studentise: bool = True,
    max_exact: int = 2**14,
    n_permutations: int = 9999,
    seed: int | np.random.Generator = 0,
) -> PairedTest:
    """Test whether paired differences are centred on zero, by flipping their signs.

    The statistic is the mean over requests. All differences of a family flip together. Where there are at most
    `max_exact` sign vectors all are counted and p is their share with a mean at least as extreme (the data's own
    among them); else p = (1 + hits) / (1 + n_permutations) over random ones. Ties count as hits, so the test is
    valid with ties and at any n: P(p ≤ α) ≤ α.

    Families that do not differ at all cannot turn and are left out of the count, as in a sign test.

    With `correction="max"` each head is held against the largest statistic of all heads under the same flips
    (single-step, familywise). `studentise` puts heads on one scale first, dividing by the standard error of
    their family sums; without it, heads with noisier differences set the bar for all. For one head alone it
    changes nothing, as the sum of squares is the same under every flip.

    What it does not show: the null says that each family's differences are symmetric about zero (true where
    the two conditions are exchangeable). A mean of zero with a long tail on one side is not that null.

    Args:
        differences: [request] or [request, head …]; a DataArray's "prompt" dimension is taken as the request.
        families: One label per request; one without a label is a family of its own.
        alternative: "greater" asks whether the mean is above zero.
        correction: "max", or None for raw p-values.
        studentise: Only with `correction="max"`.
        max_exact: Count all sign vectors where there are at most so many.
        n_permutations: Random sign vectors otherwise.
        seed: Of the random sign vectors. The same flips are used for all heads.

    Raises:
        NotFinite: A difference is NaN or infinite.
        NotEnoughData: There is no request.
        StatisticsError: Labels and requests differ in number, or an option is unknown.

    >>> test = sign_flip_test([1.0, 2.0, 0.5, 3.0])
    >>> float(test.p), test.exact, test.finest
    (0.125, True, 0.125)
    """
    check_alternative(alternative)
    if correction not in (None, "max"):
        raise StatisticsError(f"correction {correction!r} is unknown; it is 'max' or None.")
    if n_permutations < 1:
        raise StatisticsError(f"n_permutations is {n_permutations}; at least 1 is needed.")
    values = _requests_first(differences, "differences")
    n, shape = values.shape[0], values.shape[1:]
    index, n_families = family_index(families, n)
    columns = values.reshape(n, math.prod(shape))
    sums = np.zeros((n_families, columns.shape[1]))
    np.add.at(sums, index, columns)
    sums = sums[np.any(sums != 0, axis=1)]

    turning = len(sums)
    exact = turning <= math.log2(max(max_exact, 1))
    finest = min(1.0, (2.0 if alternative == "two-sided" else 1.0) * 2.0**-turning)
    if not exact:
        finest = max(finest, 1 / (1 + n_permutations))

    # The studentised mean is an increasing function, the same for every head, of the sum divided by the norm of
    # the family sums (the norm does not change under flips). Comparing that avoids a standard error of zero.
    norms = np.linalg.norm(sums, axis=0)
    if correction == "max" and not studentise:
        norms = np.full_like(norms, norms.max(initial=0.0))
    sums = sums / np.where(norms > 0, norms, 1.0)

    observed = extremeness(sums.sum(axis=0), alternative)
    hits = np.zeros(columns.shape[1])
    rows = max(1, _BLOCK // (turning + columns.shape[1] + 1))
    total = 2**turning if exact else n_permutations
    for signs in _all_signs(turning, rows) if exact else _random_signs(turning, rows, total, seed):
        flipped = extremeness(signs @ sums, alternative)
        if correction == "max":
            flipped = flipped.max(axis=1, keepdims=True)
        hits += (flipped >= observed - _TIE).sum(axis=0)
    p = hits / total if exact else (1 + hits) / (1 + total)
    return PairedTest(
        p=np.maximum(p, finest).reshape(shape)[()],
        statistic=columns.mean(axis=0).reshape(shape)[()],
        n=n,
        n_families=turning,
        exact=exact,
        n_permutations=total,
        finest=finest,
        alternative=alternative,
        correction=correction,
    )


def benjamini_hochberg(p: ArrayLike) -> Float[np.ndarray, " *head"]:
    """Adjust p-values so that those ≤ q hold the false discovery rate at q (Benjamini and Hochberg 1995).

    NaN means "not tested": it stays NaN and does not count as a test. The level is proven for independent
    p-values and for positively dependent ones; heads may depend otherwise, and `sign_flip_test` with
    `correction="max"` holds its level under any dependence.

    Args:
        p: P-values in any shape.

    Returns:
        Adjusted p-values in the same shape, each at least as large as its raw one.

    Raises:
        StatisticsError: A number is outside 0 to 1.

    >>> benjamini_hochberg([0.01, 0.02, float("nan"), 0.5]).tolist()
    [0.03, 0.03, nan, 0.5]
    """
    raw = to_numpy(p)
    tested = raw[~np.isnan(raw)]
    if np.any((tested < 0) | (tested > 1)):
        raise StatisticsError(f"p-values lie between 0 and 1; found {tested.min():g} to {tested.max():g}.")
    order = np.argsort(tested, kind="stable")
    scaled = tested[order] * len(tested) / np.arange(1, len(tested) + 1)
    adjusted = np.empty_like(tested)
    adjusted[order] = np.minimum.accumulate(scaled[::-1])[::-1]
    result = np.full(raw.shape, np.nan)
    # A ratio m / m times p may round below p itself.
    result[~np.isnan(raw)] = np.clip(adjusted, tested, 1.0)
    return result[()]


def specificity(effect_on_harmful: ArrayLike, effect_on_twins: ArrayLike) -> Float[np.ndarray, " pair *head"]:
    """Return the effect on each harmful request minus the effect on its harmless twin.

    Ready for `sign_flip_test` and `bootstrap_interval`. An edit that shifts every answer alike, harmful or
    not, has an effect but no specificity, and is not about refusal.

    Args:
        effect_on_harmful: Edited − baseline, [pair, head …], in nats of refusal log-odds.
        effect_on_twins: The same for the twins, in the same order.

    Raises:
        StatisticsError: The two differ in shape.
        NotFinite: An effect is NaN or infinite.

    >>> specificity([-3.0, -2.0], [-0.5, 0.0]).tolist()
    [-2.5, -2.0]
    """
    harmful = _requests_first(effect_on_harmful, "effect_on_harmful")
    twins = _requests_first(effect_on_twins, "effect_on_twins")
    if harmful.shape != twins.shape:
        raise StatisticsError(
            f"effect_on_harmful has shape {harmful.shape} and effect_on_twins {twins.shape};"
            " give one twin per request, in the same order."
        )
    return harmful - twins


# --- intervals ---------------------------------------------------------------------------------------


def mean_over_requests(values: Float[np.ndarray, " request *head"]) -> Float[np.ndarray, " *head"]:
    """The default statistic of `bootstrap_interval`.

    >>> float(mean_over_requests(np.array([1.0, 2.0])))
    1.5
    """
    return values.mean(axis=0)


def bootstrap_interval(
    values: ArrayLike,
    families: Families | None = None,
    statistic: Callable[[np.ndarray], Any] = mean_over_requests,
    level: float = 0.95,
    *,
    n_resamples: int = 2000,
    seed: int | np.random.Generator = 0,
) -> Interval:
    """Return a percentile bootstrap interval, resampling whole families.

    As many families as there are come with replacement, each with all its requests; the interval holds the middle
    `level` of the statistic over resamples.

    What it does not show: with few families the interval is too narrow. A nominal 95 % for the mean covers 83 %
    with 5 families, 90 % with 10, 93 % with 20 and 94 % with 50 where values are normal, and 78, 86, 90 and 93 %
    where they are exponential. Where all values are equal it has no width at all: use `proportion_interval` for a
    refusal rate of 0 or 1. It is not a test: p-values come from `sign_flip_test`.

    Args:
        values: [request] or [request, head …]; a DataArray's "prompt" dimension is taken as the request.
        families: One label per request; one without a label is a family of its own.
        statistic: Takes [request, head …], gives [head …] (or a number); the mean over requests by default.
        level: Nominal coverage.
        n_resamples: Bootstrap resamples.
        seed: Of the resampling. The same resamples are used for all heads.

    Raises:
        NotEnoughData: Fewer than two families.
        NotFinite: A value is NaN or infinite.
        StatisticsError: Labels and requests differ in number, or `level` is not between 0 and 1.

    >>> interval = bootstrap_interval([0.0, 1.0, 2.0, 3.0, 4.0])
    >>> float(interval.estimate), bool(interval.low < 2.0 < interval.high), interval.n_families
    (2.0, True, 5)
    """
    _check_level(level)
    data = _requests_first(values, "values")
    n, shape = data.shape[0], data.shape[1:]
    index, n_families = family_index(families, n)
    if n_families < 2:
        raise NotEnoughData(
            f"an interval over families was asked for and all {n} requests are of one family; give at least two."
        )
    ends = [(1 - level) / 2, (1 + level) / 2]
    n_undefined = 0
    if statistic is mean_over_requests:
        estimate = data.mean(axis=0)
        low, high = _resampled_means(data.reshape(n, -1), index, n_families, ends, n_resamples, seed)
        low, high = low.reshape(shape), high.reshape(shape)
    else:
        estimate = np.asarray(statistic(data), dtype=np.float64)
        draws = np.stack(
            [
                np.asarray(statistic(data[rows]), np.float64)
                for rows in resampled_requests(index, n_resamples, seed)
            ]
        )
        undefined = np.isnan(draws.reshape(n_resamples, -1)).any(axis=1)
        n_undefined = int(undefined.sum())
        if n_undefined == n_resamples:
            low = high = np.full(estimate.shape, np.nan)
        else:
            low, high = np.quantile(draws[~undefined], ends, axis=0)
    return Interval(
        low=np.asarray(low)[()],
        high=np.asarray(high)[()],
        estimate=np.asarray(estimate)[()],
        n=n,
        n_families=n_families,
        level=level,
        n_undefined=n_undefined,
    )


def resampled_requests(
    families: Families, n_resamples: int, seed: int | np.random.Generator = 0
) -> Iterator[Int[np.ndarray, " row"]]:
    """Yield, for each bootstrap resample, the places of its requests: families with replacement, each whole.

    For statistics of more than one array, such as one that reads a base and a tuned model on the same requests.

    Args:
        families: One label per request; one without a label is a family of its own.
        n_resamples: How many.
        seed: Of the resampling.

    >>> [rows.tolist() for rows in resampled_requests(["a", "a", "b"], 2, seed=1)]
    [[0, 1, 2], [2, 2]]
    """
    index, n_families = family_index(families, len(families))
    members = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    rng = np.random.default_rng(seed)
    for _ in range(n_resamples):
        yield np.concatenate(
            [members[family] for family in np.sort(rng.integers(n_families, size=n_families))]
        )


def proportion_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Return Wilson's interval for a proportion, such as a refusal rate.

    It stays inside 0 to 1 and has a width also at 0 and at 1. It takes requests as independent: where families
    are few and alike it is too narrow, and `bootstrap_interval` over families is the honest one.

    Args:
        successes: How often it happened.
        n: Out of how many requests.
        level: Nominal coverage.

    Raises:
        NotEnoughData: `n` is 0.
        StatisticsError: `successes` is not between 0 and `n`, or `level` not between 0 and 1.

    >>> interval = proportion_interval(10, 10)
    >>> round(float(interval.low), 3), float(interval.high)
    (0.722, 1.0)
    """
    _check_level(level)
    if n < 1:
        raise NotEnoughData(f"a proportion of {n} requests was asked for; at least 1 is needed.")
    if not 0 <= successes <= n:
        raise StatisticsError(
            f"{successes} successes out of {n} requests cannot be; give a count from 0 to {n}."
        )
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n the ends are 0 and 1 exactly; rounding would leave them a hair off.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(np.asarray(low)[()], np.asarray(high)[()], np.asarray(share)[()], n, n, level)


# --- shared ------------------------------------------------------------------------------------------


def to_numpy(values: Any) -> Float[np.ndarray, "..."]:
    """Return numbers as a float64 array: from lists, arrays, DataArrays, and tensors on any device and of any dtype.

    >>> to_numpy([[1, 2]]).shape
    (1, 2)
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def check_finite(values: np.ndarray, name: str, axes: Sequence[str] = ("request", "head")) -> None:
    """Refuse NaN and infinity.

    Args:
        values: Any shape.
        name: What to call them in the message.
        axes: Names of the axes; the last stands for all axes from there on, as head (2, 5) is layer 2, head 5.

    Raises:
        NotFinite: It says how many, and where the first is.

    >>> check_finite(np.array([1.0, np.nan]), "differences")
    Traceback (most recent call last):
    rim_lens.errors.NotFinite: differences: 1 of 2 numbers NaN or infinite (first: request 1); leave it out, or mend it.
    """
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        first = bad[0].tolist()
        if len(first) > len(axes):
            first = [*first[: len(axes) - 1], tuple(first[len(axes) - 1 :])]
        where = ", ".join(f"{axis} {place}" for axis, place in zip(axes, first, strict=False))
        raise NotFinite(
            f"{name}: {len(bad)} of {values.size} numbers NaN or infinite (first: {where}); leave it out, or mend it."
        )


def family_index(families: Families | None, n: int) -> tuple[Int[np.ndarray, " request"], int]:
    """Number the families: the number of each request's family, and how many there are.

    A request labelled "", None or NaN has no label, and is a family of its own.

    Raises:
        StatisticsError: There are not as many labels as requests.

    >>> family_index(["b", "a", "b", ""], 4)
    (array([0, 1, 0, 2]), 3)
    """
    if families is None:
        return np.arange(n), n
    if hasattr(families, "to_numpy"):
        families = families.to_numpy()
    labels: list[Hashable] = families.tolist() if hasattr(families, "tolist") else list(families)
    if len(labels) != n:
        raise StatisticsError(f"{len(labels)} family labels for {n} requests; give one per request.")
    numbers: dict[Hashable, int] = {}
    index = [
        numbers.setdefault(("its own", place) if _unknown(label) else ("family", label), len(numbers))
        for place, label in enumerate(labels)
    ]
    return np.array(index, dtype=np.int64), len(numbers)


def _unknown(label: Hashable) -> bool:
    return label is None or label == "" or (isinstance(label, float) and math.isnan(label))


def _requests_first(values: Any, name: str) -> Float[np.ndarray, " request *head"]:
    dims = getattr(values, "dims", ())
    if "prompt" in dims:
        values = values.transpose("prompt", ...)
    array = to_numpy(values)
    if array.ndim == 0 or array.size == 0:
        raise NotEnoughData(
            f"{name} has shape {array.shape}; give [request] or [request, head] with at least one of each."
        )
    check_finite(array, name)
    return array


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise StatisticsError(f"level is {level}; give a share between 0 and 1, such as 0.95.")


def check_alternative(alternative: str) -> None:
    """Refuse an unknown alternative.

    Raises:
        StatisticsError: It is not "two-sided", "less" or "greater".
    """
    if alternative not in ("two-sided", "less", "greater"):
        raise StatisticsError(
            f"alternative {alternative!r} is unknown; it is 'two-sided', 'less' or 'greater'."
        )


def extremeness(statistic: Any, alternative: Alternative) -> Any:
    """The statistic turned so that larger means further into the alternative.

    >>> extremeness(-2.0, "less")
    2.0
    """
    if alternative == "two-sided":
        return np.abs(statistic)
    return statistic if alternative == "greater" else -statistic


def _all_signs(n_families: int, rows: int) -> Iterator[Float[np.ndarray, "row family"]]:
    bits = np.arange(n_families)
    for start in range(0, 2**n_families, rows):
        codes = np.arange(start, min(start + rows, 2**n_families))
        yield 1.0 - 2.0 * ((codes[:, None] >> bits) & 1)


def _random_signs(
    n_families: int, rows: int, total: int, seed: int | np.random.Generator
) -> Iterator[Float[np.ndarray, "row family"]]:
    # Doubles, not bits: their stream does not depend on how it is cut into blocks.
    rng = np.random.default_rng(seed)
    for start in range(0, total, rows):
        yield np.where(rng.random((min(rows, total - start), n_families)) < 0.5, -1.0, 1.0)


def _resampled_means(
    columns: Float[np.ndarray, "request column"],
    index: Int[np.ndarray, " request"],
    n_families: int,
    ends: list[float],
    n_resamples: int,
    seed: int | np.random.Generator,
) -> tuple[Float[np.ndarray, " column"], Float[np.ndarray, " column"]]:
    """The mean of a resample is a weighted mean of family sums: no rows are gathered, and heads come in blocks."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(n_families, np.full(n_families, 1 / n_families), size=n_resamples).astype(
        np.float64
    )
    sums = np.zeros((n_families, columns.shape[1]))
    np.add.at(sums, index, columns)
    weights = drawn / (drawn @ np.bincount(index, minlength=n_families))[:, None]
    width = max(1, _BLOCK // n_resamples)
    blocks = [
        np.quantile(weights @ sums[:, start : start + width], ends, axis=0)
        for start in range(0, max(1, columns.shape[1]), width)
    ]
    low, high = np.concatenate(blocks, axis=1)
    return low, high
