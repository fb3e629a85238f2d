"""Which neurons are chosen by differences between two sides of pairs, and how far that choice can be relied on.

The rule is the paper's (arXiv 2509.00544, section 4): of each pair the m neurons whose activation rises most from the
less refused side to the more refused one, and of these the neurons that all pairs share. Two things it leaves open are
arguments: whether m counts per layer or over the model, and whether a vote of most pairs is enough.

Pure NumPy on arrays [pair, layer, neuron]. No neuron is chosen that does not rise: with m above the number of neurons that
do, the rest would be picked by their place alone, the same ones in every pair, and an intersection would keep them.
Neurons that tie at the m-th place and do not all fit are taken in the order of their places, and counted.

What a choice does not show: that a neuron does anything. It is a hint, as attention is; ablation is the evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike

from rim_lens.errors import NotEnoughData, StatisticsError
from rim_lens.measures.stats import check_finite, family_index

if TYPE_CHECKING:
    import pandas as pd

Scope = Literal["layer", "model"]


class Chosen(NamedTuple):
    """What a rule chose.

    Attributes:
        mask: Bool [layer, neuron].
        votes: Share of pairs that chose each neuron [layer, neuron].
        n_tied: Pairs (times layers, with scope "layer") in which neurons tied at the m-th place did not all fit.
    """

    mask: Bool[np.ndarray, "layer neuron"]
    votes: Float[np.ndarray, "layer neuron"]
    n_tied: int


def top_m(difference: ArrayLike, m: int, scope: Scope = "layer") -> Bool[np.ndarray, "pair layer neuron"]:
    """Mark, in each pair, the m neurons with the largest difference, as far as they rise at all.

    Args:
        difference: More refused minus less refused [pair, layer, neuron].
        m: How many, in each layer or in the whole model.
        scope: "layer" or "model".

    Raises:
        StatisticsError: Another shape, an m that the model cannot have, or an unknown scope.
        NotEnoughData: No pair.
        NotFinite: NaN or infinity.

    >>> top_m([[[3.0, -9.0, 1.0], [2.0, 0.0, 0.0]]], m=2).astype(int).tolist()
    [[[1, 0, 1], [1, 0, 0]]]
    """
    return _top(_differences(difference), m, scope)[0]


def chosen(difference: ArrayLike, m: int, scope: Scope = "layer", min_fraction: float = 1.0) -> Chosen:
    """Return the neurons that at least this share of the pairs have among their top m.

    Args:
        difference: More refused minus less refused [pair, layer, neuron].
        m: See `top_m`.
        scope: See `top_m`.
        min_fraction: 1.0: the intersection over all pairs, as in the paper. Below: a vote.

    Raises:
        StatisticsError: As `top_m`, or the share is not above 0 and at most 1.
        NotEnoughData: No pair.
        NotFinite: NaN or infinity.

    >>> rises = [[[5.0, 1.0, 0.0]], [[4.0, 0.5, 3.0]], [[0.1, 0.2, 9.0]]]
    >>> chosen(rises, m=2).mask.tolist(), chosen(rises, m=2, min_fraction=0.6).mask.tolist()
    ([[False, False, False]], [[True, True, True]])
    """
    array = _differences(difference)
    return _vote(*_top(array, m, scope), needed(min_fraction, len(array)))


def sweep(
    difference: ArrayLike,
    ms: Iterable[int],
    scope: Scope = "layer",
    min_fractions: Iterable[float] = (1.0,),
) -> pd.DataFrame:
    """Set sizes over m and over the share of pairs that must agree.

    Args:
        difference: More refused minus less refused [pair, layer, neuron].
        ms: Values of m.
        scope: See `top_m`.
        min_fractions: See `chosen`.

    Returns:
        One row per m and share: m, min_fraction, size, by_chance, n_layers (layers with a neuron), largest_layer (most in one
        layer), n_tied. by_chance is the size to expect if every pair drew its m neurons at random and by itself; pairs of one
        template are alike in more than refusal, so that a set above it is no evidence of anything yet.

    Raises:
        StatisticsError: As `chosen`, or nothing to sweep over.
        NotEnoughData: No pair.
        NotFinite: NaN or infinity.
    """
    import pandas as pd

    array = _differences(difference)
    shares, values = list(min_fractions), list(ms)
    if not shares or not values:
        raise StatisticsError(
            f"a sweep over m={values} and min_fractions={shares} was asked for; name some of both."
        )
    n, layers, width = array.shape
    pool = width if scope == "layer" else layers * width
    lines: list[dict[str, Any]] = []
    for m in values:
        marked, n_tied = _top(array, m, scope)
        for share in shares:
            least = needed(share, n)
            per_layer = _vote(marked, n_tied, least).mask.sum(axis=1)
            lines.append(
                {
                    "m": m,
                    "min_fraction": share,
                    "size": int(per_layer.sum()),
                    "by_chance": layers * width * _tail(n, least, m / pool),
                    "n_layers": int(np.count_nonzero(per_layer)),
                    "largest_layer": int(per_layer.max()),
                    "n_tied": n_tied,
                }
            )
    return pd.DataFrame(lines)


def stability(
    difference: ArrayLike,
    m: int,
    scope: Scope = "layer",
    min_fraction: float = 1.0,
    *,
    families: Sequence[Any] | None = None,
    n_splits: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """How alike the sets are that two halves of the pairs choose, over random halves.

    An intersection shrinks with the number of pairs, so halves choose more than the whole does.

    Args:
        difference: More refused minus less refused [pair, layer, neuron].
        m: See `top_m`.
        scope: See `top_m`.
        min_fraction: See `chosen`.
        families: One label per pair; families stay whole.
        n_splits: How many random halves.
        seed: Of the halves.

    Returns:
        One row per split: split, size_first, size_second, jaccard (NaN where both are empty), by_chance (what random sets with
        as many neurons in each layer would have, near enough).

    Raises:
        NotEnoughData: Fewer than two families.
        StatisticsError: As `chosen`, or no split.
        NotFinite: NaN or infinity.
    """
    import pandas as pd

    array = _differences(difference)
    index, n_families = family_index(families, len(array))
    if n_families < 2:
        raise NotEnoughData(
            f"{len(array)} pairs of {n_families} family were given; two families are needed to cut halves."
        )
    if n_splits < 1:
        raise StatisticsError(f"n_splits={n_splits} was asked for; at least 1 is needed.")
    marked, _ = _top(array, m, scope)
    needed(min_fraction, len(array))
    rng = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = []
    for split in range(n_splits):
        in_first = np.isin(index, rng.permutation(n_families)[: n_families // 2])
        one, other = (
            _vote(marked[half], 0, needed(min_fraction, int(half.sum()))).mask
            for half in (in_first, ~in_first)
        )
        either = int((one | other).sum())
        shared = float((one.sum(axis=1) * other.sum(axis=1)).sum() / array.shape[2])
        total = int(one.sum() + other.sum())
        lines.append(
            {
                "split": split,
                "size_first": int(one.sum()),
                "size_second": int(other.sum()),
                "jaccard": int((one & other).sum()) / either if either else float("nan"),
                "by_chance": shared / (total - shared) if total else float("nan"),
            }
        )
    return pd.DataFrame(lines)


def needed(min_fraction: float, n_pairs: int) -> int:
    """How many pairs must agree.

    Raises:
        StatisticsError: The share is not above 0 and at most 1.

    >>> needed(1.0, 30), needed(0.7, 10), needed(0.01, 10)
    (30, 7, 1)
    """
    if not 0 < min_fraction <= 1:
        raise StatisticsError(
            f"min_fraction={min_fraction} was asked for; give a share above 0 and at most 1 (1.0: every pair, the paper's)."
        )
    return max(1, math.ceil(min_fraction * n_pairs - 1e-9))


def _differences(difference: ArrayLike) -> Float[np.ndarray, "pair layer neuron"]:
    # As they are where they are floating: an array of an 8B model need not be copied.
    array = np.asarray(difference)
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float64)
    if array.ndim != 3 or 0 in array.shape[1:]:
        raise StatisticsError(
            f"differences of shape {array.shape} were given; [pair, layer, neuron] is needed."
        )
    if not len(array):
        raise NotEnoughData("there is no pair to choose neurons by; give at least one.")
    check_finite(array, "difference", axes=("pair", "neuron"))
    return array


def _top(
    array: Float[np.ndarray, "pair layer neuron"], m: int, scope: Scope
) -> tuple[Bool[np.ndarray, "pair layer neuron"], int]:
    if scope not in ("layer", "model"):
        raise StatisticsError(f"scope={scope!r} was asked for; it is 'layer' or 'model'.")
    rows = array if scope == "layer" else array.reshape(len(array), 1, -1)
    if isinstance(m, bool) or not isinstance(m, int | np.integer) or not 1 <= m <= rows.shape[2]:
        raise StatisticsError(
            f"m={m!r} was asked for; a {scope} has {rows.shape[2]} neurons, so give a whole number from 1 to that."
        )
    bar = np.partition(rows, rows.shape[2] - m, axis=2)[:, :, rows.shape[2] - m, None]
    above, level = rows > bar, rows == bar
    room = m - above.sum(axis=2, keepdims=True)
    marked = (above | (level & (np.cumsum(level, axis=2) <= room))) & (rows > 0)
    tied = int(np.count_nonzero((level.sum(axis=2, keepdims=True) > room) & (bar > 0)))
    return marked.reshape(array.shape), tied


def _vote(marked: Bool[np.ndarray, "pair layer neuron"], n_tied: int, least: int) -> Chosen:
    counts = marked.sum(axis=0)
    return Chosen(counts >= least, counts / len(marked), n_tied)


def _tail(n: int, least: int, chance: float) -> float:
    """P(at least so many of n), each with this chance by itself."""
    return min(1.0, sum(math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(least, n + 1)))
