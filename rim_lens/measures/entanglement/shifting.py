"""RAS and its rivals of many sets of neurons at once, and of many resamples of the prompts.

The formulas are those of `rim_lens.measures.shift`. What each neuron adds to n·δ is worked out once; a set sums its own
members. Side by side stand what needs no guard and looks both ways: the mean absolute and the root mean square change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rim_lens.measures.shift import Average, one_sided_shift
from rim_lens.measures.stats import family_index

Numbers = dict[str, Float[np.ndarray, " set"]]
SHIFTS = (
    "ras",
    "safety_drop",
    "reasoning_rise",
    "arithmetic",
    "geometric",
    "minimum",
    "product",
    "floored_ras",
    "l1_safety",
    "l1_reasoning",
    "l2_safety",
    "l2_reasoning",
)
COUNTS = ("used_safety", "used_reasoning", "moved_safety", "moved_reasoning")
_BLOCK = 2**22


class Sides(NamedTuple):
    """Pooled activations of both models on both kinds of prompts, [prompt, neuron] each, in float64."""

    base_safety: Float[np.ndarray, "prompt neuron"]
    tuned_safety: Float[np.ndarray, "prompt neuron"]
    base_reasoning: Float[np.ndarray, "prompt neuron"]
    tuned_reasoning: Float[np.ndarray, "prompt neuron"]

    def only(self, neurons: Int[np.ndarray, " neuron"]) -> Sides:
        """These neurons alone."""
        return Sides(*(values[:, neurons] for values in self))

    def averaged(self) -> Sides:
        """Prompts averaged, as one row."""
        return Sides(*(values.mean(axis=0, keepdims=True) for values in self))


def shifts_of(
    sides: Sides, sets: Sequence[Int[np.ndarray, " member"]], average: Average, floor: float | None
) -> Numbers:
    """All of `SHIFTS` and `COUNTS` of each set; what is undefined is NaN.

    Args:
        sides: Activations.
        sets: Places of each set's members among the neurons.
        average: "prompts_first" or "after", see `reciprocal_activation_shift`.
        floor: For floored_ras, which is NaN without one.
    """
    if average == "prompts_first":
        sides = sides.averaged()
    drop, used_safety, moved_safety = _delta(sides.tuned_safety, sides.base_safety, sets, None)
    rise, used_reasoning, moved_reasoning = _delta(sides.base_reasoning, sides.tuned_reasoning, sets, None)
    floored = np.full(len(sets), np.nan)
    if floor is not None:
        floored = harmonic(
            _delta(sides.tuned_safety, sides.base_safety, sets, floor)[0],
            _delta(sides.base_reasoning, sides.tuned_reasoning, sets, floor)[0],
        )
    safety = sides.tuned_safety - sides.base_safety
    reasoning = sides.tuned_reasoning - sides.base_reasoning
    return {
        **combined(drop, rise),
        "floored_ras": floored,
        "l1_safety": np.array([np.abs(safety[:, one]).mean() for one in sets]),
        "l1_reasoning": np.array([np.abs(reasoning[:, one]).mean() for one in sets]),
        "l2_safety": _rms(safety, sets),
        "l2_reasoning": _rms(reasoning, sets),
        "used_safety": used_safety,
        "used_reasoning": used_reasoning,
        "moved_safety": moved_safety,
        "moved_reasoning": moved_reasoning,
    }


def combined(drop: Float[np.ndarray, " set"], rise: Float[np.ndarray, " set"]) -> Numbers:
    """δ⁻ and δ⁺ with their means, RAS (the harmonic one) first."""
    return {
        "ras": harmonic(drop, rise),
        "safety_drop": drop,
        "reasoning_rise": rise,
        "arithmetic": (drop + rise) / 2,
        "geometric": np.sqrt(drop) * np.sqrt(rise),
        "minimum": np.minimum(drop, rise),
        "product": drop * rise,
    }


def harmonic(drop: Float[np.ndarray, " set"], rise: Float[np.ndarray, " set"]) -> Float[np.ndarray, " set"]:
    """2 δ⁻ δ⁺ / (δ⁻ + δ⁺); 0 where both are 0, the limit; NaN where one is.

    >>> harmonic(np.array([1.0, 0.0]), np.array([3.0, 0.0])).tolist()
    [1.5, 0.0]
    """
    total = drop + rise
    return np.where(total == 0, 0.0, 2 * drop * (rise / np.where(total == 0, 1.0, total)))


def _delta(
    low: Float[np.ndarray, "row neuron"],
    high: Float[np.ndarray, "row neuron"],
    sets: Sequence[Int[np.ndarray, " member"]],
    floor: float | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """δ of each set, its usable neurons, and those that moved this side's way (pairs with prompts, where there are several rows)."""
    added, usable = one_sided_shift(low, high, floor)
    deltas, used, moved = np.empty(len(sets)), np.empty(len(sets)), np.empty(len(sets))
    for place, one in enumerate(sets):
        here, fit = added[:, one], usable[:, one]
        rows = fit.any(axis=1)
        deltas[place] = here[rows].mean(axis=1).mean() if rows.any() else np.nan
        used[place], moved[place] = fit.sum(), (here > 0).sum()
    return deltas, used, moved


def _rms(change: Float[np.ndarray, "row neuron"], sets: Sequence[Int[np.ndarray, " member"]]) -> np.ndarray:
    return np.array([np.sqrt(np.square(change[:, one]).mean(axis=1)).mean() for one in sets])


# --- resampling --------------------------------------------------------------------------------------


def family_weights(
    families: Mapping[str, Sequence[str]], n_boot: int, seed: int | np.random.Generator = 0
) -> dict[str, Float[np.ndarray, "resample prompt"]] | None:
    """How often each prompt of each kind comes in each bootstrap resample of whole families.

    Kinds that share families (harmful requests and their twins) are drawn together, others apart. None where some kind has a
    single family: there is no resampling one.

    Args:
        families: Kind → one label per prompt.
        n_boot: Resamples.
        seed: Of the resampling.
    """
    if any(family_index(labels, len(labels))[1] < 2 for labels in families.values()):
        return None
    rng = np.random.default_rng(seed)
    weights = {}
    for group in drawn_together(families):
        labels = [label for kind in group for label in families[kind]]
        index, n_families = family_index(labels, len(labels))
        drawn = rng.multinomial(n_families, np.full(n_families, 1 / n_families), size=n_boot).astype(
            np.float64
        )
        start = 0
        for kind in group:
            stop = start + len(families[kind])
            weights[kind] = drawn[:, index[start:stop]]
            start = stop
    return weights


def drawn_together(families: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Kinds of prompts in groups: those that share a family stand in one.

    >>> drawn_together({"harmful": ["a", "b"], "harmless": ["b", "c"], "reasoning": ["d"]})
    [['harmful', 'harmless'], ['reasoning']]
    """
    groups: list[list[str]] = []
    for kind, labels in families.items():
        touching = [group for group in groups if any(set(labels) & set(families[one]) for one in group)]
        groups = [group for group in groups if group not in touching]
        groups.append([*(one for group in touching for one in group), kind])
    return groups


def resampled_shifts(
    sides: Sides,
    safety: Float[np.ndarray, "resample prompt"],
    reasoning: Float[np.ndarray, "resample prompt"],
    average: Average,
    floor: float | None,
) -> Numbers:
    """All of `SHIFTS` of one set, whose members are all neurons given, on each resample.

    Args:
        sides: Activations of the set's members.
        safety: Weights of the safety prompts.
        reasoning: Weights of the reasoning prompts.
        average: See `shifts_of`.
        floor: See `shifts_of`.
    """
    if average == "after":
        return _resampled_after(sides, safety, reasoning, floor)
    found: dict[str, list[np.ndarray]] = {}
    n_rows = max(1, _BLOCK // (4 * sides.base_safety.shape[1]))
    for start in range(0, len(safety), n_rows):
        here = safety[start : start + n_rows], reasoning[start : start + n_rows]
        means = [_weighted(values, here[place // 2]) for place, values in enumerate(sides)]
        drop, rise = (_means(*pair, None) for pair in ((means[1], means[0]), (means[2], means[3])))
        numbers = combined(drop, rise)
        numbers["floored_ras"] = (
            np.full(len(drop), np.nan)
            if floor is None
            else harmonic(_means(means[1], means[0], floor), _means(means[2], means[3], floor))
        )
        for name, before, after in (("safety", means[0], means[1]), ("reasoning", means[2], means[3])):
            numbers[f"l1_{name}"] = np.abs(after - before).mean(axis=1)
            numbers[f"l2_{name}"] = np.sqrt(np.square(after - before).mean(axis=1))
        for name, values in numbers.items():
            found.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _weighted(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means over prompts [resample, neuron]; NaN where a resample has no prompt of the kind."""
    total = weights.sum(axis=1, keepdims=True)
    return np.where(total > 0, weights @ values / np.where(total > 0, total, 1.0), np.nan)


def _means(low: np.ndarray, high: np.ndarray, floor: float | None) -> np.ndarray:
    added, usable = one_sided_shift(low, high, floor)
    return np.where(usable.any(axis=1), added.mean(axis=1), np.nan)


def _resampled_after(sides: Sides, safety: np.ndarray, reasoning: np.ndarray, floor: float | None) -> Numbers:
    """Each prompt has a number of its own there, so that a resample is a weighted mean."""

    def resampled(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        there = ~np.isnan(values)
        return _weighted(np.where(there, values, 0.0)[there, None], weights[:, there])[:, 0]

    def both(limit: float | None) -> list[np.ndarray]:
        return [
            resampled(_means(*pair, limit), weights)
            for pair, weights in (
                ((sides.tuned_safety, sides.base_safety), safety),
                ((sides.base_reasoning, sides.tuned_reasoning), reasoning),
            )
        ]

    numbers = combined(*both(None))
    numbers["floored_ras"] = np.full(len(safety), np.nan) if floor is None else harmonic(*both(floor))
    for name, change, weights in (
        ("safety", sides.tuned_safety - sides.base_safety, safety),
        ("reasoning", sides.tuned_reasoning - sides.base_reasoning, reasoning),
    ):
        numbers[f"l1_{name}"] = resampled(np.abs(change).mean(axis=1), weights)
        numbers[f"l2_{name}"] = resampled(np.sqrt(np.square(change).mean(axis=1)), weights)
    return numbers
