"""How well probes tell two classes apart on samples that did not train them: AUC, accuracy, folds cut by family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from rim_lens.errors import NotEnoughData
from rim_lens.measures.probes.fitting import Probes, cells, fit, to_streams
from rim_lens.measures.stats import Families, family_index, proportion_interval, to_numpy


@dataclass(frozen=True, eq=False)
class Separation:
    """How well scores tell two classes apart, per layer and place.

    Attributes:
        auc: Chance that a positive sample scores above a negative one, ties half. NaN where a class has no sample.
        low: Lower end of the interval over families; NaN with fewer than two families.
        high: Upper end.
        accuracy: Mean of the two classes' shares on their side of the threshold, so that unbalanced classes count alike.
        gap: d′ of the scores less their threshold: difference of the classes' means over their pooled deviation. It orders
            probes whose AUC is the same.
    """

    auc: Float[np.ndarray, "layer place"]
    low: Float[np.ndarray, "layer place"]
    high: Float[np.ndarray, "layer place"]
    accuracy: Float[np.ndarray, "layer place"]
    gap: Float[np.ndarray, "layer place"]


def separation(
    probes: Probes,
    positive: ArrayLike,
    negative: ArrayLike,
    families: tuple[Families, Families],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Separation:
    """Hold probes against samples that did not train them.

    Args:
        probes: What `fit_probes` gave.
        positive: [sample, layer, place, d_model].
        negative: The same of the other class.
        families: Labels of the positive and of the negative samples; one label in both is one family.
        level: Of the interval, a bootstrap over families. Where all pairs are ordered alike it has no width: then
            Wilson's, with the families of the smaller class counted as requests.
        n_resamples: Bootstrap resamples.
        seed: Of the bootstrap.
    """
    scores = probes.score(positive), probes.score(negative)
    margins = tuple(score - probes.threshold for score in scores)
    n_pairs = tuple(np.zeros(len(score), dtype=np.int64) for score in scores)
    return _separation(margins, n_pairs, families, level, n_resamples, seed)


def cross_validate(
    positive: ArrayLike,
    negative: ArrayLike,
    families: tuple[Families, Families],
    folds: int = 5,
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Separation:
    """AUC and accuracy on folds that did not train the probe; folds are cut by family.

    Twins, whose labels are one family, stand in one fold. Only pairs within a fold are compared, under the direction
    that was fitted without it: scores of different directions have no common scale. A fold that leaves a class without
    a training sample, or holds one class only, gives no pair.

    Args:
        positive: [sample, layer, place, d_model]; NaN where a sample lacks the place.
        negative: The same of the other class.
        families: Labels of the positive and of the negative samples.
        folds: At most so many folds, and no more than there are families.
        level: Of the interval, see `separation`. Folds share training samples, which the bootstrap does not see: read it
            as a lower bound of the doubt.
        n_resamples: Bootstrap resamples.
        seed: Which family goes to which fold, and the bootstrap.

    Raises:
        NotEnoughData: Fewer than two families, or fewer than two folds asked for.
    """
    first, second = to_streams(positive), to_streams(negative)
    index, n_families = family_index(_joined(families), len(first) + len(second))
    if min(folds, n_families) < 2:
        raise NotEnoughData(
            f"{folds} folds of {n_families} families were asked for; at least two folds and two families are needed."
        )
    order = np.random.default_rng(seed).permutation(n_families)
    fold_of = (np.argsort(order) % min(folds, n_families))[index]
    sides = fold_of[: len(first)], fold_of[len(first) :]
    margins = tuple(np.full(side.shape[:3], np.nan) for side in (first, second))
    for layer, column, (bad, good) in cells(first, second):
        for fold in range(min(folds, n_families)):
            direction, threshold = fit(bad[sides[0] != fold], good[sides[1] != fold])
            for out, values, side in zip(margins, (bad, good), sides, strict=True):
                out[side == fold, layer, column] = values[side == fold] @ direction - threshold
    return _separation(margins, sides, families, level, n_resamples, seed)


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Chance that a positive score is above a negative one, a tie counting half: Mann-Whitney's U ÷ pairs, exactly.

    >>> auc([3, 2, 1], [1, 0])
    0.9166666666666666
    """
    high, low = to_numpy(positive).ravel(), np.sort(to_numpy(negative).ravel())
    if not len(high) or not len(low):
        raise NotEnoughData(f"an AUC of {len(high)} positive and {len(low)} negative scores is undefined.")
    wins = np.searchsorted(low, high, "left").sum() + np.searchsorted(low, high, "right").sum()
    return float(wins) / (2 * len(high) * len(low))


# --- shared ------------------------------------------------------------------------------------------


def _joined(families: tuple[Families, Families]) -> list[Any]:
    return [label for side in families for label in (side.tolist() if hasattr(side, "tolist") else side)]


def _separation(
    margins: tuple[np.ndarray, ...],
    groups: tuple[np.ndarray, ...],
    families: tuple[Families, Families],
    level: float,
    n_resamples: int,
    seed: int,
) -> Separation:
    """Of scores less their threshold, compared within groups (folds) only."""
    first, second = margins
    index, n_families = family_index(_joined(families), len(first) + len(second))
    sides = index[: len(first)], index[len(first) :]
    held = [np.unique(side) for side in sides]  # families that each class has, in the order of `_by_family`
    both, at_first, at_second = np.intersect1d(held[0], held[1], return_indices=True)
    same = groups[0][:, None] == groups[1][None]
    ends = [(1 - level) / 2, (1 + level) / 2]
    drawn = np.random.default_rng(seed).multinomial(
        n_families, np.full(n_families, 1 / max(n_families, 1)), size=n_resamples
    )
    drawn = drawn.astype(np.float64)
    shape = first.shape[1:]
    found, low, high, accuracy, gap = (np.full(shape, np.nan) for _ in range(5))
    for layer, column in np.ndindex(*shape):
        bad, good = first[:, layer, column], second[:, layer, column]
        pairs = same & np.isfinite(bad)[:, None] & np.isfinite(good)[None]
        if not pairs.any():
            continue
        wins = np.where(pairs, (bad[:, None] > good[None]) + 0.5 * (bad[:, None] == good[None]), 0.0)
        found[layer, column] = wins.sum() / pairs.sum()
        known = bad[np.isfinite(bad)], good[np.isfinite(good)]
        accuracy[layer, column] = ((known[0] > 0).mean() + (known[1] <= 0).mean()) / 2
        spread = np.sqrt((known[0].var() + known[1].var()) / 2)
        difference = known[0].mean() - known[1].mean()
        gap[layer, column] = difference / max(spread, 1e-9 * abs(difference) + 1e-30)
        taking_part: list[Bool[np.ndarray, " sample"]] = [pairs.any(axis=1), pairs.any(axis=0)]
        n_smaller = min(len(set(side[part])) for side, part in zip(sides, taking_part, strict=True))
        if n_smaller < 2:
            continue
        ordered = float(found[layer, column])
        if ordered in (0.0, 1.0):
            interval = proportion_interval(round(ordered) * n_smaller, n_smaller, level)
            low[layer, column], high[layer, column] = float(interval.low), float(interval.high)
            continue
        # A family drawn twice is not paired with its own copy: twins would count twice as often as among the data.
        again = drawn[:, both] * (drawn[:, both] - 1)
        won, of = (
            ((drawn[:, held[0]] @ matrix) * drawn[:, held[1]]).sum(axis=1)
            - again @ matrix[at_first, at_second]
            for matrix in (_by_family(wins, sides), _by_family(pairs.astype(np.float64), sides))
        )
        usable = of > 0
        low[layer, column], high[layer, column] = np.quantile(won[usable] / of[usable], ends)
    return Separation(found, low, high, accuracy, gap)


def _by_family(
    matrix: Float[np.ndarray, "positive negative"], sides: tuple[np.ndarray, np.ndarray]
) -> Float[np.ndarray, "family other"]:
    """Sums over the pairs of each two families."""
    orders = [np.argsort(side, kind="stable") for side in sides]
    starts = [
        np.flatnonzero(np.diff(side[order], prepend=-1)) for side, order in zip(sides, orders, strict=True)
    ]
    rows = np.add.reduceat(matrix[np.ix_(orders[0], orders[1])], starts[0], axis=0)
    return np.add.reduceat(rows, starts[1], axis=1)
