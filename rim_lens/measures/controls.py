"""Random control sets, the yardstick of an effect's size, and an effect's place among theirs.

`random_heads_per_layer` and `random_neurons_per_layer` draw sets with the same number of members in each layer
as the set in question; `percentile_among` and `control_p` place its effect among theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain, combinations, product
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from rim_lens.errors import (
    NotEnoughData,
    NotFinite,
    RimLensError,
    StatisticsError,
    UnknownHead,
    UnknownNeuron,
)
from rim_lens.measures.stats import Alternative, check_alternative, check_finite, extremeness, to_numpy

Unit = tuple[int, int]
NEAREST = (
    20  # a control is drawn from so many neighbours in activity, and from a quarter of the layer at most
)
_GIVE_UP = 1000


class Percentile(NamedTuple):
    """A place among controls: `percentile` from 0 to 100, and how many controls it is a place among."""

    percentile: float
    n_controls: int


# --- a place among controls --------------------------------------------------------------------------


def percentile_among(value: float, controls: ArrayLike) -> Percentile:
    """Return the share of controls whose effect is smaller in size, in per cent; a tie counts half.

    100 means larger than every control, and says little where there are few of them: hence the count beside it.

    Args:
        value: Effect of the set in question.
        controls: Effects of the control sets [control], in the same unit.

    Raises:
        NotEnoughData: There is no control.
        NotFinite: An effect is NaN or infinite.

    >>> percentile_among(-3.0, [0.1, -1.0, 2.0, 3.0])
    Percentile(percentile=87.5, n_controls=4)
    """
    size, sizes = abs(_one(value)), np.abs(_controls(controls))
    below = int(np.count_nonzero(sizes < size)) + int(np.count_nonzero(sizes == size)) / 2
    return Percentile(percentile=100 * below / len(sizes), n_controls=len(sizes))


def control_p(value: float, controls: ArrayLike, alternative: Alternative = "two-sided") -> float:
    """Return (1 + controls at least as extreme) / (1 + controls): never finer than the controls allow.

    It is the chance of so high a rank *if* the set were one more random draw. Controls that share members, or
    that are all there are, make it a description and no more.

    Args:
        value: Effect of the set in question.
        controls: Effects of the control sets [control], in the same unit.
        alternative: "two-sided" compares sizes, "less" and "greater" the signed effects.

    Raises:
        NotEnoughData: There is no control.
        NotFinite: An effect is NaN or infinite.

    >>> control_p(-3.0, [0.1, -1.0, 2.0])
    0.25
    """
    check_alternative(alternative)
    others = extremeness(_controls(controls), alternative)
    own = extremeness(np.float64(_one(value)), alternative)
    return float((1 + np.count_nonzero(others >= own)) / (1 + len(others)))


def _one(value: float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise NotFinite(f"the effect to be placed among controls is {number}; a finite number is needed.")
    return number


def _controls(controls: ArrayLike) -> Float[np.ndarray, " control"]:
    array = to_numpy(controls).reshape(-1)
    if len(array) == 0:
        raise NotEnoughData(
            "there is no control to compare with; give the effect of at least one control set."
        )
    check_finite(array, "controls", axes=("control",))
    return array


# --- random control sets -----------------------------------------------------------------------------


def random_heads_per_layer(
    heads: Iterable[Unit],
    n_heads: int,
    n_sets: int = 100,
    rng: int | np.random.Generator = 0,
    activity: ArrayLike | None = None,
) -> list[list[Unit]]:
    """Return control sets with as many heads in each layer as the given set has there.

    In a layer with enough other heads the control takes none of the given ones. In a layer where more than half
    are given that cannot be, and there it draws from all heads of the layer. The given set itself is never
    among the controls. Sets are distinct; where no more than `n_sets` exist, all of them come, in order.

    With `activity`, each head is replaced by one of those others of its layer that come nearest to it in
    activity (`NEAREST` of them, a quarter of the layer at most), so that a control moves about as much as the set in
    question. It may then be more like it in other ways as well, and the yardstick is stricter. Fewer sets exist
    then: count them. Where no more than `n_sets` exist without matching, all of those come all the same.

    Args:
        heads: (layer, head) pairs; one named twice counts once.
        n_heads: Heads in each layer of the model.
        n_sets: How many control sets at most.
        rng: Generator or seed.
        activity: [layer, head] of any size that controls are to be alike in (mean norm of z, mass on a span).

    Raises:
        UnknownHead: A pair that the model cannot have.
        NotEnoughData: The set is empty, or no other set of these sizes exists.
        StatisticsError: `activity` has no entry for a head in question.
        NotFinite: `activity` holds NaN or infinity.

    >>> random_heads_per_layer([(0, 1), (2, 0)], n_heads=3, n_sets=4)
    [[(0, 0), (2, 1)], [(0, 0), (2, 2)], [(0, 2), (2, 1)], [(0, 2), (2, 2)]]
    """
    return _random_sets_per_layer(heads, n_heads, n_sets, rng, activity, "head", UnknownHead)


def random_neurons_per_layer(
    neurons: Iterable[Unit],
    d_mlp: int,
    n_sets: int = 100,
    rng: int | np.random.Generator = 0,
    activity: ArrayLike | None = None,
    avoid: Iterable[Unit] = (),
) -> list[list[Unit]]:
    """Return control sets with as many neurons in each layer as the given set has there.

    The rule is that of `random_heads_per_layer`. Without `activity` they are matched in number only: a control may
    well be less active than the given set, which an effect's size has to be read against.

    Args:
        neurons: (layer, neuron) pairs; one named twice counts once.
        d_mlp: Neurons in each layer of the model.
        n_sets: How many control sets at most.
        rng: Generator or seed.
        activity: [layer, neuron] of any size that controls are to be alike in (mean pooled activation).
        avoid: Neurons that no control holds either, where its layer has enough others.

    Raises:
        UnknownNeuron: A pair that the model cannot have.
        NotEnoughData: The set is empty, or no other set of these sizes exists.
        StatisticsError: `activity` has no entry for a neuron in question.
        NotFinite: `activity` holds NaN or infinity.

    >>> random_neurons_per_layer([(1, 0)], d_mlp=3)
    [[(1, 1)], [(1, 2)]]
    """
    return _random_sets_per_layer(neurons, d_mlp, n_sets, rng, activity, "neuron", UnknownNeuron, avoid)


def _random_sets_per_layer(
    units: Iterable[Unit],
    width: int,
    n_sets: int,
    rng: int | np.random.Generator,
    activity: ArrayLike | None,
    word: str,
    unknown: type[RimLensError],
    avoid: Iterable[Unit] = (),
) -> list[list[Unit]]:
    given = sorted({(int(layer), int(place)) for layer, place in units})
    if not given:
        raise NotEnoughData(
            f"random sets like an empty set of {word}s were asked for; give at least one {word}."
        )
    if n_sets < 1:
        raise StatisticsError(f"{n_sets} random sets were asked for; ask for at least 1.")
    places: dict[int, list[int]] = {}
    for layer, place in given:
        if layer < 0 or not 0 <= place < width:
            raise unknown(
                f"{word} ({layer}, {place}) was given; layers count from 0 and {word}s run from 0 to {width - 1}."
            )
        places.setdefault(layer, []).append(place)

    alike = None if activity is None else _activity(activity, max(places), width, word)
    pools: dict[int, np.ndarray] = {}
    shunned: dict[int, list[int]] = {}
    for layer, place in avoid:
        shunned.setdefault(int(layer), []).append(int(place))
    for layer, taken in places.items():
        others = np.setdiff1d(np.arange(width), taken)
        clear = np.setdiff1d(others, shunned.get(layer, []))
        pools[layer] = next((pool for pool in (clear, others) if len(pool) >= len(taken)), np.arange(width))
    # The given set can come up only where no layer keeps clear of it.
    itself = all(len(pool) == width for pool in pools.values())
    total = math.prod(math.comb(len(pool), len(places[layer])) for layer, pool in pools.items()) - itself
    if total < 1:
        raise NotEnoughData(
            f"all {width} {word}s of layers {sorted(places)} are in the set, so that no other set has as many"
            f" {word}s there; leave some out, or compare with another measure."
        )
    if total <= n_sets:
        per_layer = [
            [[(layer, int(place)) for place in choice] for choice in combinations(pool, len(places[layer]))]
            for layer, pool in pools.items()
        ]
        every = (list(chain.from_iterable(parts)) for parts in product(*per_layer))
        return [candidate for candidate in every if candidate != given]
    generator = np.random.default_rng(rng)
    drawn: dict[tuple[Unit, ...], None] = {}
    repeats = 0
    # Near neighbours may allow fewer sets than the layer does: a long run of repeats means that all were seen.
    while len(drawn) < n_sets and repeats < _GIVE_UP:
        candidate = [
            (layer, place)
            for layer, pool in pools.items()
            for place in sorted(
                generator.choice(pool, size=len(places[layer]), replace=False).tolist()
                if alike is None
                else _nearest(alike[layer], places[layer], pool, generator)
            )
        ]
        repeats = repeats + 1 if tuple(candidate) in drawn or candidate == given else 0
        if candidate != given:
            drawn.setdefault(tuple(candidate))
    return [list(candidate) for candidate in drawn]


def _activity(
    activity: ArrayLike, last_layer: int, width: int, word: str
) -> Float[np.ndarray, "layer place"]:
    array = to_numpy(activity)
    if array.ndim != 2 or array.shape[1] != width or array.shape[0] <= last_layer:
        raise StatisticsError(
            f"activity has shape {array.shape}; controls of {word}s up to layer {last_layer} need one number per"
            f" (layer, {word}), [at least {last_layer + 1}, {width}]."
        )
    check_finite(array, "activity", axes=("layer", word))
    return array


def _nearest(
    activity: Float[np.ndarray, " place"],
    members: list[int],
    pool: np.ndarray,
    generator: np.random.Generator,
) -> list[int]:
    """For each member, one of the places nearest to it in activity; none twice."""
    taken: list[int] = []
    for member in generator.permutation(members):
        free = np.setdiff1d(pool, taken)
        distance = np.abs(activity[free] - activity[member])
        reach = min(NEAREST, max(1, len(free) // 4))
        near = free[np.argsort(distance, kind="stable")[:reach]]
        taken.append(int(generator.choice(near)))
    return taken
