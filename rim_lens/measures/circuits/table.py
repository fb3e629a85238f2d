"""The table of edges: effects both ways, intervals, corrected p, the place among random senders, and which are the circuit's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from rim_lens.errors import StatisticsError
from rim_lens.measures.circuits.nodes import Edge
from rim_lens.measures.controls import percentile_among
from rim_lens.measures.stats import bootstrap_interval, family_index, sign_flip_test

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    *("contrast", "edge", "sender", "receiver", "input"),
    *("effect_select", "effect", "effect_low", "effect_high", "share"),
    *("back", "back_low", "back_high", "both", "both_low", "both_high", "p"),
    *("percentile", "n_controls", "percentile_receiver", "n_controls_receiver", "in_circuit"),
)
Effects = Float[np.ndarray, "prompt edge"]


@dataclass(frozen=True, slots=True)
class EdgeRule:
    """When an edge is the circuit's.

    p ≤ alpha on evaluate requests, an effect there of at least `min_effect` nats and `min_share` of the difference between the two
    runs, and on select requests one of the same sign, large enough to keep its sender (`keep_share`). Where the runs do not
    differ no share can be had, and any size from `min_effect` on counts.

    Attributes:
        alpha: Level of the test, over all edges of a contrast.
        min_effect: Smallest size of an effect, nats.
        min_share: Smallest size as a share of the mean difference between the runs. Weights with noise write a little
            everywhere; ask for less where many edges share the work.
        keep_share: The same for edges that keep a node in the circuit, on select requests.
    """

    alpha: float = 0.05
    min_effect: float = 0.25
    min_share: float = 0.2
    keep_share: float = 0.1

    def __post_init__(self) -> None:
        """Refuse thresholds out of range.

        Raises:
            StatisticsError: One is.
        """
        shares = (self.min_share, self.keep_share)
        if not (0 < self.alpha <= 1 and self.min_effect >= 0 and all(0 <= one <= 1 for one in shares)):
            raise StatisticsError(
                f"{self} was asked for; alpha, min_share and keep_share are shares, min_effect is at least 0."
            )

    def least(self, reach: float) -> float:
        """Smallest size of an effect, nats, where the runs differ by `reach`.

        >>> EdgeRule().least(-20.0), EdgeRule().least(0.1)
        (4.0, 0.25)
        """
        return max(self.min_effect, self.min_share * abs(reach))

    def least_kept(self, reach: float) -> float:
        """Smallest size of an effect on select requests, nats, that keeps its sender.

        >>> EdgeRule().least_kept(-20.0)
        2.0
        """
        return max(self.min_effect, self.keep_share * abs(reach))


@dataclass(frozen=True, eq=False)
class Measured:
    """Effects of the edges of one contrast.

    Attributes:
        edges: Those of the nodes in question.
        select: [prompt, edge], the other run's words in this run, select side.
        effect: The same on the evaluate side.
        back: This run's words in the other run, evaluate side.
        reach: The other run's score − this one's, [prompt], evaluate side.
        reach_select: The same, select side.
        random: By edge, mean effects of random senders of the sender's kind and layer on the same input, evaluate side.
        random_receivers: Likewise of the sender on random receivers of the receiver's kind and layer, by the same input.
    """

    edges: Sequence[Edge]
    select: Effects
    effect: Effects
    back: Effects
    reach: Float[np.ndarray, " prompt"]
    reach_select: Float[np.ndarray, " prompt"]
    random: Mapping[Edge, list[float]]
    random_receivers: Mapping[Edge, list[float]] = field(default_factory=dict)


def edge_table(
    contrast: str, found: Measured, families: Sequence[str], rule: EdgeRule, seed: int = 0
) -> pd.DataFrame:
    """One row per edge, the largest effect first.

    What is tested is *both* = (effect − back) / 2: by how much the words of either run, heard in the other, pull towards it.
    Exchanging the two runs of a pair turns its sign and leaves its size, so that under "which of the two is which does not
    matter" the test by sign flips is exact. p is corrected by the max statistic over the edges that could matter, those whose root
    mean square comes to the rule's least size; an edge below is corrected over all.

    Args:
        contrast: Its name.
        found: Effects.
        families: Of the evaluate prompts; their signs are flipped together.
        rule: Which edges are the circuit's.
        seed: Of permutations and intervals.
    """
    import pandas as pd

    both = (found.effect - found.back) / 2
    reach = float(found.reach.mean())
    least, least_select = rule.least(reach), rule.least_kept(float(found.reach_select.mean()))
    p = corrected_p(both, families, least, seed)
    # All edges at once: the resamples are the same for each.
    columns = {
        name: value
        for what, values in (("effect", found.effect), ("back", found.back), ("both", both))
        for name, value in _intervals(what, values, families, seed).items()
    }
    rows: list[dict[str, Any]] = []
    for place, edge in enumerate(found.edges):
        told = {name: float(value[place]) for name, value in columns.items()}
        mean, pull, chosen = told["effect"], told["both"], float(found.select[:, place].mean())
        agrees = mean * chosen > 0 and mean * pull > 0
        rows.append(
            {
                "contrast": contrast,
                "edge": str(edge),
                "sender": edge.sender.name,
                "receiver": edge.receiver.name,
                "input": edge.input,
                "effect_select": chosen,
                "share": mean / reach if reach else float("nan"),
                **told,
                "p": p[place],
                **_among("", mean, found.random.get(edge, [])),
                **_among("_receiver", mean, found.random_receivers.get(edge, [])),
                "in_circuit": bool(
                    agrees
                    and p[place] <= rule.alpha
                    and min(abs(mean), abs(pull)) >= least
                    and abs(chosen) >= least_select
                ),
            }
        )
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    order = table["effect"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def _intervals(
    name: str, values: Effects, families: Sequence[str], seed: int
) -> dict[str, Float[np.ndarray, " edge"]]:
    """Means with their bootstrap intervals over families, NaN where there is one family."""
    means = values.mean(axis=0)
    if family_index(list(families), len(values))[1] < 2:
        blank = np.full(len(means), np.nan)
        return {name: means, f"{name}_low": blank, f"{name}_high": blank}
    found = bootstrap_interval(values, list(families), seed=seed)
    return {name: means, f"{name}_low": np.asarray(found.low), f"{name}_high": np.asarray(found.high)}


def _among(suffix: str, mean: float, controls: list[float]) -> dict[str, float]:
    percentile = percentile_among(mean, controls).percentile if controls else float("nan")
    return {f"percentile{suffix}": percentile, f"n_controls{suffix}": len(controls)}


def corrected_p(both: Effects, families: Sequence[str], least: float, seed: int = 0) -> list[float]:
    """P of each edge by the max statistic, see `edge_table`.

    Args:
        both: [prompt, edge], nats.
        families: Of the prompts; their signs are flipped together.
        least: Root mean square from which on an edge could matter, nats.
        seed: Of permutations.
    """

    def test(values: Effects) -> np.ndarray:
        found = sign_flip_test(values, families=list(families), correction="max", seed=seed)
        return np.atleast_1d(np.asarray(found.p))

    p = test(both)
    # Sizes do not hang on signs, so that leaving out what is too small keeps the test exact (see heads.table.corrected_p).
    large = np.sqrt(np.mean(both**2, axis=0)) >= least * (1 - 1e-9)
    if large.any() and not large.all():
        p[large] = test(both[:, large])
    return [float(one) for one in p]
