"""Likeness of representations: debiased linear CKA of two models, and the cosine of two directions in whitened space.

*Debiased linear CKA* of X and Y (the same n prompts in two models): with K = XXᵀ and L = YYᵀ, diagonals left out and both
centred so that the diagonal has no part in it (Székely and Rizzo's U-centring, K̃),

    HSIC₁(K, L) = ⟨K̃, L̃⟩ / (n (n − 3)),        CKA = HSIC₁(K, L) / √(HSIC₁(K, K) HSIC₁(L, L))

HSIC₁ is the unbiased estimate of Song et al. (2012): plain linear CKA is near 1 for any two models where prompts are
fewer than dimensions. It is 1 for a model and itself, and does not change under orthogonal maps, scaling and shifts.

*CKA ratio* (2608.23497): (1 − CKA_harmful) / (1 − CKA_harmless) between base and tuned. Above 1: what training did moved
harmful requests more than harmless ones. Undefined while harmless requests have not moved.

*Whitened cosine* of directions a and b: aᵀΣ⁻¹b / √(aᵀΣ⁻¹a · bᵀΣ⁻¹b), with Σ the covariance of the prompts around the mean of
their kind, shrunk towards a multiple of the identity (Ledoit and Wolf 2004), as n is mostly less than d. Plain cosines in
a residual stream are ruled by its few wide directions.

What they do not show: that a likeness or an angle has any part in refusal. A ratio of two small numbers is noisy; read
its interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from rim_lens.errors import NotEnoughData, StatisticsError
from rim_lens.measures.entanglement.shifting import drawn_together
from rim_lens.measures.stats import check_finite, family_index, to_numpy

# 1 − CKA below this is the rounding of float32 passes, not movement.
UNMOVED = 1e-9
_LEAST_SHRINKAGE = 1e-3


def u_centred(activations: Float[np.ndarray, "prompt dim"]) -> Float[np.ndarray, "prompt prompt"]:
    """The U-centred Gram matrix of the rows, its diagonal 0.

    >>> u_centred(np.array([[0.0], [1.0], [2.0], [4.0]])).sum(axis=0).round(12).tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    centred = activations - activations.mean(axis=0)  # changes nothing but rounding
    return recentred(centred @ centred.T)


def recentred(gram: Float[np.ndarray, "prompt prompt"]) -> Float[np.ndarray, "prompt prompt"]:
    """U-centre a Gram matrix; its diagonal is not looked at."""
    n = len(gram)
    if n < 4:
        raise NotEnoughData(f"debiased CKA of {n} prompts was asked for; it takes at least 4.")
    off = gram.copy()
    np.fill_diagonal(off, 0.0)
    sums = off.sum(axis=0)
    off -= (sums[:, None] + sums[None, :]) / (n - 2) - sums.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(off, 0.0)
    return off


def debiased_cka(first: object, second: object) -> float:
    """Debiased linear CKA of two sets of activations of the same prompts; the formula is at the top of this module.

    Args:
        first: [prompt, dim] of one model.
        second: [prompt, dim] of the other; the dimensions may differ.

    Returns:
        At most 1. It can fall below 0 where nothing is shared. NaN where one of the two does not vary.

    Raises:
        NotEnoughData: Fewer than four prompts.
        StatisticsError: The prompts differ in number.
        NotFinite: A number is NaN or infinite.

    >>> values = np.random.default_rng(0).normal(size=(6, 3))
    >>> debiased_cka(values, -2 * values)
    1.0
    """
    return 1.0 - distance(u_centred(_rows(first, "first")), u_centred(_rows(second, "second")))


def distance(first: Float[np.ndarray, "prompt prompt"], second: Float[np.ndarray, "prompt prompt"]) -> float:
    """1 − CKA of two U-centred Gram matrices: half the squared distance of their unit vectors, exact where they are near.

    NaN where one of the two is 0.
    """
    if first.shape != second.shape:
        raise StatisticsError(
            f"{len(first)} prompts of one model and {len(second)} of the other were given; CKA takes the same ones."
        )
    lengths = np.linalg.norm(first), np.linalg.norm(second)
    if min(lengths) == 0:
        return float("nan")
    return float(0.5 * np.square(first / lengths[0] - second / lengths[1]).sum())


def moved_ratio(harmful: float, harmless: float) -> tuple[float, str]:
    """(1 − CKA_harmful) / (1 − CKA_harmless) from these two distances, and why it is NaN where it is.

    >>> moved_ratio(0.2, 0.1), moved_ratio(0.0, 0.0)[1][:24]
    ((2.0, ''), 'neither harmful nor harm')
    """
    if np.isnan(harmful) or np.isnan(harmless):
        return float("nan"), "activations do not vary over the prompts of a kind"
    if harmless <= UNMOVED:
        what = (
            "neither harmful nor harmless requests have"
            if harmful <= UNMOVED
            else "harmful requests have, and harmless ones have not"
        )
        return float("nan"), f"{what} moved (1 − CKA at most {UNMOVED:g}), so that there is no ratio"
    return harmful / harmless, ""


def shrinkage(centred: Float[np.ndarray, "prompt dim"]) -> tuple[float, float]:
    """How far Ledoit and Wolf (2004) shrink the covariance of these rows, and to which variance.

    Σ = (1 − ρ) S + ρ μ I with S the covariance and μ its mean variance.

    Args:
        centred: Rows around their own means.

    Returns:
        ρ, at least 0.001 so that Σ has an inverse, and μ.
    """
    n, dim = centred.shape
    gram = centred @ centred.T
    mean_variance = np.trace(gram) / (n * dim)
    norm = np.square(gram).sum() / n**2  # ‖S‖²
    spread = norm / dim - mean_variance**2
    noise = min((np.square(np.diag(gram)).sum() / n**2 - norm / n) / dim, spread)
    if spread <= 0:
        return 1.0, float(mean_variance)
    return float(max(noise / spread, _LEAST_SHRINKAGE)), float(mean_variance)


class Whitener:
    """Σ^−½ with the shrunk covariance of some rows, kept as a few directions instead of a d × d matrix.

    Args:
        centred: [prompt, dim], around the means of their kinds.

    Raises:
        NotEnoughData: The rows do not vary.
    """

    def __init__(self, centred: Float[np.ndarray, "prompt dim"]) -> None:
        self.rho, mean_variance = shrinkage(centred)
        if mean_variance == 0:
            raise NotEnoughData(
                "the prompts do not vary around the means of their kinds; there is nothing to whiten by."
            )
        _, sizes, self._directions = np.linalg.svd(centred, full_matrices=False)
        floor = self.rho * mean_variance
        self._outside = floor**-0.5
        self._inside = ((1 - self.rho) * sizes**2 / len(centred) + floor) ** -0.5

    def __call__(self, rows: Float[np.ndarray, "prompt dim"]) -> Float[np.ndarray, "prompt dim"]:
        """Return Σ^−½ x for each row x."""
        along = rows @ self._directions.T
        return self._outside * rows + (along * (self._inside - self._outside)) @ self._directions


def cosine(first: Float[np.ndarray, " dim"], second: Float[np.ndarray, " dim"]) -> float:
    """Cosine of two vectors; NaN where one is zero."""
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / lengths) if lengths > 0 else float("nan")


def half_samples(
    families: Mapping[str, Sequence[str]], n_samples: int, seed: int | np.random.Generator = 0
) -> list[dict[str, Int[np.ndarray, " row"]]]:
    """Places of the prompts of half of the families, drawn without replacement, as often as asked.

    For statistics of *pairs* of prompts, which a bootstrap misleads: a prompt drawn twice is a pair that is perfectly alike.
    A statistic over half of the families spreads about as far around the whole one as the whole one around the truth
    (Var = σ²/(n/2) · (1 − ½) = σ²/n). Kinds that share families are drawn together.

    Args:
        families: Kind → one label per prompt.
        n_samples: How many.
        seed: Of the drawing.

    >>> [half["harmful"].tolist() for half in half_samples({"harmful": ["a", "a", "b", "c", "c", "d"]}, 2)]
    [[0, 1, 3, 4], [3, 4, 5]]
    """
    rng = np.random.default_rng(seed)
    samples: list[dict[str, Int[np.ndarray, " row"]]] = [{} for _ in range(n_samples)]
    for group in drawn_together(families):
        index, n_families = family_index(
            [label for kind in group for label in families[kind]], sum(len(families[kind]) for kind in group)
        )
        cuts = np.cumsum([len(families[kind]) for kind in group])[:-1]
        for sample in samples:
            chosen = np.isin(index, rng.permutation(n_families)[: n_families // 2])
            for kind, rows in zip(group, np.split(chosen, cuts), strict=True):
                sample[kind] = np.flatnonzero(rows)
    return samples


def _rows(values: object, name: str) -> Float[np.ndarray, "prompt dim"]:
    array = to_numpy(values)
    if array.ndim != 2 or not array.shape[1]:
        raise StatisticsError(f"{name} has shape {array.shape}; give [prompt, dim].")
    check_finite(array, name, axes=("prompt", "dim"))
    return array
