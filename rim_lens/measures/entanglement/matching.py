"""Sets of neurons to hold a chosen set against: equally active ones, and ones chosen the same way on exchanged labels.

A set chosen along one contrast (harmful against harmless) is not like neurons drawn one by one, however well these are
matched: its neurons respond to one thing, so that whatever moves that moves all of them together. Among such sets a rank is
a description; under weight noise and under exchanged labels it comes out at 5 % two to four times as often as it should
(docs/evidence/entanglement_nulls.json). `exchanged_sets` are chosen along a contrast as well, one that means nothing, and
ranks among them hold their level in both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from rim_lens.measures.controls import NEAREST, random_neurons_per_layer
from rim_lens.measures.stats import check_finite, family_index

Neuron = tuple[int, int]
_GIVE_UP = 1000


def alike_sets(
    neurons: Sequence[Neuron],
    features: Float[np.ndarray, "layer neuron feature"],
    n_sets: int = 100,
    seed: int | np.random.Generator = 0,
) -> list[list[Neuron]]:
    """Sets with as many neurons in each layer, each replaced by one that comes near it in every feature.

    The rule is that of `random_neurons_per_layer(activity=…)`, with several features: each is turned into ranks within its
    layer, and near means Euclidean distance of ranks. One of the `NEAREST` others (a quarter of the layer at most) takes
    each neuron's place. Where no more than `n_sets` sets exist without matching, all of those come.

    Args:
        neurons: (layer, neuron) pairs.
        features: What the sets are to be alike in.
        n_sets: How many at most.
        seed: Of the draws.

    Raises:
        NotEnoughData: The set is empty, or no other set of these sizes exists.
        NotFinite: A feature is NaN or infinite.

    >>> ramp = np.linspace(0, 1, 100)[None, :, None]
    >>> sets = alike_sets([(0, 50)], ramp, n_sets=5)
    >>> all(abs(neuron - 50) <= 10 for one in sets for _, neuron in one)
    True
    """
    check_finite(features, "features", axes=("layer", "neuron", "feature"))
    width = features.shape[1]
    plain = random_neurons_per_layer(neurons, width, n_sets, seed)
    if len(plain) < n_sets:
        return plain
    given = sorted(set(neurons))
    places: dict[int, list[int]] = {}
    for layer, place in given:
        places.setdefault(layer, []).append(place)
    order: dict[Neuron, np.ndarray] = {}
    for layer, taken in places.items():
        ranks = np.stack([_ranks(column) for column in features[layer].T], axis=1)
        others = np.setdiff1d(np.arange(width), taken)
        pool = others if len(others) >= len(taken) else np.arange(width)
        for place in taken:
            distances = np.linalg.norm(ranks[pool] - ranks[place], axis=1)
            order[layer, place] = pool[np.argsort(distances, kind="stable")]
    rng = np.random.default_rng(seed)
    drawn: dict[tuple[Neuron, ...], None] = {}
    repeats = 0
    while len(drawn) < n_sets and repeats < _GIVE_UP:
        candidate: list[Neuron] = []
        for layer, taken in places.items():
            used: set[int] = set()
            for place in rng.permutation(taken).tolist():
                free = [other for other in order[layer, place].tolist() if other not in used]
                reach = min(NEAREST, max(1, len(free) // 4))
                used.add(free[int(rng.integers(reach))])
            candidate += [(layer, place) for place in sorted(used)]
        repeats = repeats + 1 if tuple(candidate) in drawn or candidate == given else 0
        if candidate != given:
            drawn.setdefault(tuple(candidate))
    return [list(one) for one in drawn]


def exchanged_sets(
    difference: Float[np.ndarray, "pair layer neuron"],
    neurons: Sequence[Neuron],
    n_sets: int = 100,
    families: Sequence[str] | None = None,
    seed: int | np.random.Generator = 0,
) -> list[list[Neuron]]:
    """Sets chosen on exchanged labels: as many neurons in each layer, those whose mean difference is largest.

    In each draw the two sides of a pair change places or not, all pairs of a family alike. A set that was chosen this way on the
    true labels is one more such draw if labels mean nothing; of one chosen otherwise (an intersection) that is nearly true.

    Args:
        difference: More refused minus less refused, in the base model.
        neurons: The chosen set: how many there are in each layer.
        n_sets: How many. They may repeat where families are few, as a rank among them then cannot be fine.
        families: One label per pair.
        seed: Of the draws.

    Raises:
        NotFinite: A difference is NaN or infinite.
        StatisticsError: Labels and pairs differ in number.

    >>> rises = np.array([[[5.0, 0.0, 1.0]], [[5.0, 0.0, -1.0]]])
    >>> sorted({tuple(one) for one in exchanged_sets(rises, [(0, 0)], n_sets=20)})
    [((0, 0),), ((0, 1),), ((0, 2),)]
    """
    check_finite(difference, "difference", axes=("pair", "neuron"))
    index, n_families = family_index(families, len(difference))
    sums = np.zeros((n_families, *difference.shape[1:]))
    np.add.at(sums, index, difference)
    counts = np.bincount([layer for layer, _ in neurons], minlength=difference.shape[1])
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n_sets):
        rises = np.tensordot(rng.choice([-1.0, 1.0], size=n_families), sums, axes=1)
        found.append(
            [
                (layer, int(place))
                for layer, count in enumerate(counts)
                for place in np.sort(np.argsort(-rises[layer], kind="stable")[:count])
            ]
        )
    return found


def _ranks(values: Float[np.ndarray, " neuron"]) -> Float[np.ndarray, " neuron"]:
    """Ranks from 0 to 1; ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - (counts + 1) / 2) / max(1, len(values) - 1))[inverse]
