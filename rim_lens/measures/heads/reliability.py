"""Whether a statistic of heads repeats itself on other requests of the same sort."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, islice
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float

from rim_lens.errors import NotEnoughData, StatisticsError
from rim_lens.measures.stats import Families, check_finite, family_index, to_numpy

if TYPE_CHECKING:
    import xarray as xr

MIN_FAMILIES = 4


@dataclass(frozen=True)
class SplitHalf:
    """How well two halves of the requests agree on the order of the heads.

    Attributes:
        value: Spearman–Brown corrected: what the mean over *all* requests would correlate with that over as many others.
        halves: Mean Spearman correlation between halves, over heads.
        low: 2.5 % quantile of the corrected correlation over splits.
        high: 97.5 % quantile.
        n_splits: Splits of which the correlation was taken.
        n_undefined: Splits left out, as one half gave all heads the same.
        n_families: Independent units that were dealt out.
        n_prompts: Requests.
        n_heads: Heads.
    """

    value: float
    halves: float
    low: float
    high: float
    n_splits: int
    n_undefined: int
    n_families: int
    n_prompts: int
    n_heads: int


def split_half(
    values: xr.DataArray, families: Families | None = None, n_splits: int = 200, seed: int = 0
) -> SplitHalf:
    """Split-half reliability of a statistic of heads: halves of the requests, cut by family, ranked against each other.

    For each split the statistic is averaged over the requests of either half, and the heads' two averages are
    rank-correlated (Spearman, ties shared). The mean r over splits is corrected to the full number of requests by
    Spearman and Brown, 2r / (1 + r); an r of 0 or less is left as it is, as there is nothing to correct. Where there are
    no more than `n_splits` different splits, each is taken once.

    What it does not show: that the statistic is about refusal. A head that follows a position or rests on the sink does so
    on every request, and is the most reliable of all. `low` and `high` say how much hangs on the cut, over splits that
    share their requests; they are no confidence interval. And where most heads never do a thing (a share of 0), the value
    tells mostly those that do from those that do not.

    Args:
        values: (prompt, layer, head) or any array with a dimension "prompt", a number or a bool per request and head.
        families: One label per request, in order; None: the array's own coordinate "family", or each request by itself.
        n_splits: Most splits.
        seed: Of the random splits.

    Raises:
        NotEnoughData: Fewer than four families, or fewer than three heads.
        NotFinite: A value is NaN or infinite.
        StatisticsError: No dimension "prompt", or labels and requests differ in number.

    >>> import xarray as xr
    >>> steady = xr.DataArray(np.tile([[0.1, 0.5, 0.2]], (6, 1)), dims=("prompt", "head"))
    >>> split_half(steady).value
    1.0
    """
    if "prompt" not in values.dims:
        raise StatisticsError(
            f"the values have dimensions {values.dims}, no 'prompt'; give them per request, not averaged."
        )
    if n_splits < 1:
        raise StatisticsError(f"n_splits is {n_splits}; it must be at least 1.")
    values = values.transpose("prompt", ...)
    array = to_numpy(values.values)
    check_finite(array, "values", ("prompt", "head"))
    array = array.reshape(len(array), -1)
    if families is None and "family" in values.coords:
        families = values["family"].values
    index, n_families = family_index(families, len(array))
    if n_families < MIN_FAMILIES or array.shape[1] < 3:
        raise NotEnoughData(
            f"{n_families} request families and {array.shape[1]} heads: a split half needs at least {MIN_FAMILIES} families and"
            " three heads. Take more requests, of more families."
        )
    sums = np.zeros((n_families, array.shape[1]))
    np.add.at(sums, index, array)
    counts = np.bincount(index, minlength=n_families).astype(np.float64)
    halves = _halves(n_families, n_splits, np.random.default_rng(seed))
    means = [side @ sums / (side @ counts)[:, None] for side in (halves, ~halves)]
    found = _spearman(*means)
    usable = found[np.isfinite(found)]
    nothing = len(usable) == 0
    r = math.nan if nothing else float(usable.mean())
    low, high = (math.nan, math.nan) if nothing else np.quantile(_corrected(usable), [0.025, 0.975]).tolist()
    return SplitHalf(
        value=float(_corrected(np.array(r))),
        halves=r,
        low=low,
        high=high,
        n_splits=len(usable),
        n_undefined=len(found) - len(usable),
        n_families=n_families,
        n_prompts=len(array),
        n_heads=array.shape[1],
    )


def _halves(n: int, n_splits: int, rng: np.random.Generator) -> Bool[np.ndarray, "split family"]:
    half = n // 2
    even = n % 2 == 0
    if math.comb(n, half) // (1 + even) <= n_splits:
        # In an even number each split occurs twice, once from either side: keep those with family 0 on this one.
        chosen = islice(combinations(range(n), half), math.comb(n - 1, half - 1) if even else None)
        places = np.array(list(chosen))
    else:
        places = np.stack([rng.permutation(n)[:half] for _ in range(n_splits)])
    side = np.zeros((len(places), n), dtype=bool)
    np.put_along_axis(side, places, True, axis=1)
    return side


def _spearman(
    a: Float[np.ndarray, "split head"], b: Float[np.ndarray, "split head"]
) -> Float[np.ndarray, " split"]:
    import pandas as pd

    centred = []
    for side in (a, b):
        # Sums taken in another order differ in the last digits, and those must not break a tie.
        ranks = pd.DataFrame(np.round(side, 12)).rank(axis=1).to_numpy()
        centred.append(ranks - ranks.mean(axis=1, keepdims=True))
    x, y = centred
    scale = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return np.divide((x * y).sum(axis=1), scale, out=np.full(len(x), np.nan), where=scale > 0)


def _corrected(r: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    return np.where(r > 0, 2 * r / (1 + np.maximum(r, 0)), r)
