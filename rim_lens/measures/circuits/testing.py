"""Whether a circuit is enough, whether it is needed, and what each of its parts adds; beside random circuits like it.

With *full* the score of the model as it is and *none* that of the model with every unit replaced:

- faithfulness = (score with all but the circuit replaced − none) / (full − none): 1 where the circuit alone does it all;
- completeness = (full − score with the circuit replaced) / (full − none): 1 where nothing else does it as well;
- minimality of a node = (faithful score − the same with the node replaced too) / (full − none): its own share.

Units are all heads and all neurons, or (scope "heads") all heads and the circuit's own neurons, the MLPs otherwise left to
themselves. What units are replaced by is the mean, or a donor's, of harmless prompts, place by place: *none* is how the
model speaks where there is nothing to refuse. What this does not show: that the circuit is the only one (completeness
says so, as far as parts that stand in for each other are seen), or that it works on requests unlike these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from rim_lens.errors import NotEnoughData
from rim_lens.hooks import Component
from rim_lens.lens import Head, ModelFacts
from rim_lens.measures.circuits.keeping import Replacements, every_neuron, members
from rim_lens.measures.circuits.nodes import Neuron, Node
from rim_lens.measures.circuits.remembering import Once, remembering
from rim_lens.measures.controls import random_heads_per_layer, random_neurons_per_layer
from rim_lens.measures.readings import Reading
from rim_lens.measures.removal_table import beside_random, mean_columns, shuffled
from rim_lens.measures.stats import bootstrap_interval, sign_flip_test

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    *("measure", "node", "kind", "unit", "n", "n_families", "full", "none", "after"),
    *("share", "share_low", "share_high", "change", "change_low", "change_high", "p"),
    *("random", "random_low", "random_high", "percentile", "p_controls", "n_controls"),
)
Units = tuple[list[Head], list[Neuron]]
Values = Float[np.ndarray, " prompt"]


@dataclass(frozen=True, eq=False)
class Bench:
    """Prompts of one kind, how they are read, and what units are replaced by there.

    Attributes:
        reading: The measure.
        replacements: For the prompts of that reading.
        families: Of the prompts.
        shared: Whether shares of full − none are told; elsewhere there is nothing to share out.
        each: Whether nodes are taken out one by one, too.
    """

    reading: Reading
    replacements: Replacements
    families: Sequence[str]
    shared: bool
    each: bool


def random_circuits(facts: ModelFacts, units: Units, n: int, seed: int) -> list[Units]:
    """Circuits with as many heads and as many neurons in each layer; fewer where no more exist, none where nothing else does."""
    heads, neurons = units
    drawn: list[list[Any]] = []
    for given, width, draw in (
        (heads, facts.n_heads, random_heads_per_layer),
        (neurons, facts.d_mlp, random_neurons_per_layer),
    ):
        try:
            sets = shuffled(draw(given, width, n, seed), seed) if given and n else []
        except NotEnoughData:
            sets = []
        drawn.append(sets)
    some_heads, some_neurons = drawn
    if heads and neurons:
        # The shorter list goes round, so that a small layer of heads does not keep neurons from being drawn anew.
        count = max(len(some_heads), len(some_neurons)) if some_heads and some_neurons else 0
        return [(some_heads[i % len(some_heads)], some_neurons[i % len(some_neurons)]) for i in range(count)]
    return [(one, []) for one in some_heads] if heads else [([], one) for one in some_neurons]


def whole(facts: ModelFacts, own: Units, scope: str) -> Units:
    """All units of a scope: every head, and every neuron or the circuit's own."""
    return facts.heads(), every_neuron(facts) if scope == "all" else own[1]


def outside(everything: Units, units: Units) -> Units:
    """What of everything is not among these."""
    (heads, neurons), (some_heads, some_neurons) = everything, map(set, units)
    return [head for head in heads if head not in some_heads], sorted(set(neurons) - some_neurons)


def circuit_tests(
    facts: ModelFacts,
    nodes: Sequence[Node],
    benches: Mapping[str, Bench],
    *,
    scope: str,
    random: Sequence[Units],
    seed: int = 0,
    once: Once | None = None,
) -> pd.DataFrame:
    """Measure faithfulness, completeness and minimality on each kind of prompts.

    Args:
        facts: Of the model.
        nodes: The circuit's heads and neurons.
        benches: By kind of prompts.
        scope: "all", or "heads".
        random: Random circuits, see `random_circuits`.
        seed: Of intervals and permutations.
        once: Keeps each reading.

    Returns:
        One row per measure and kind, and for minimality per node (on kinds whose nodes are taken out one by one): full, none, after (scores); share with its interval (NaN on
        kinds that have none); change, after − full (minimality: after − the faithful score), with interval and p; and the shares
        of random circuits.
    """
    import pandas as pd

    own = members(nodes)
    everything = whole(facts, own, scope)
    once = once or remembering(None)
    rows = []
    for kind, bench in benches.items():

        def read(units: Units, bench: Bench = bench, kind: str = kind) -> Values:
            def measure() -> Values:
                editors: list[Component] = list(bench.replacements.of(*units))
                return bench.reading(editors)

            return once(f"{kind}, {bench.reading.name}: {units}", measure)

        full, none = read(([], [])), read(everything)
        alone, gone = read(outside(everything, own)), read(own)

        def row(
            measure: str,
            above: tuple[Values, Values],
            change: tuple[Values, Values],
            others: Sequence[tuple[Values, Values]] = (),
            node: str = "",
            kind: str = kind,
            bench: Bench = bench,
            full: Values = full,
            none: Values = none,
        ) -> dict[str, Any]:
            told = {"measure": measure, "node": node, "kind": kind}
            return told | _numbers(bench, full, none, above, change, others, seed)

        by_chance = [(read(outside(everything, units)), read(units)) for units in random if bench.shared]
        rows.append(row("faithfulness", (alone, none), (alone, full), [(one, none) for one, _ in by_chance]))
        rows.append(row("completeness", (full, gone), (gone, full), [(full, one) for _, one in by_chance]))
        for node in nodes if bench.each else ():
            rest = members([other for other in nodes if other is not node])
            lacking = read(outside(everything, rest))
            rows.append(row("minimality", (alone, lacking), (lacking, alone), node=node.name))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _numbers(
    bench: Bench,
    full: Values,
    none: Values,
    above: tuple[Values, Values],
    change: tuple[Values, Values],
    others: Sequence[tuple[Values, Values]],
    seed: int,
) -> dict[str, Any]:
    """The numbers of a row: share = mean of above[0] − above[1] over that of full − none; change = change[0] − change[1]."""
    families = list(bench.families)
    moved = change[0] - change[1]
    share = dict.fromkeys(("share", "share_low", "share_high"), float("nan"))
    random: list[float] = []
    if bench.shared:
        stacked = np.stack([above[0] - above[1], full - none], axis=1)
        found = bootstrap_interval(stacked, families, statistic=_ratio, seed=seed)
        share = {
            "share": float(found.estimate),
            "share_low": float(found.low),
            "share_high": float(found.high),
        }
        whole = float((full - none).mean())
        random = [float((one - other).mean()) / whole for one, other in others] if whole else []
    return {
        "unit": bench.reading.units,
        "n": len(full),
        "n_families": len(set(families)),
        "full": float(full.mean()),
        "none": float(none.mean()),
        "after": float(change[0].mean()),
        **share,
        **mean_columns("change", moved, families, seed),
        "p": float(sign_flip_test(moved, families=families, seed=seed).p),
        **beside_random(share["share"], random),
    }


def _ratio(values: np.ndarray) -> float:
    part, whole = values.mean(axis=0)
    return float(part / whole) if whole else float("nan")
