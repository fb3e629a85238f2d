"""Which runs may change places: all, those of one group, or whole units (a seed, a base) with their run of every kind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, permutations, product

import numpy as np
from jaxtyping import Int

# Below so many runs, or units, no p of a two-sided test can come below 1/6.
FEWEST_RUNS = 4


@dataclass(frozen=True, eq=False)
class Exchanges:
    """Ways to give each run the outcome of another.

    Attributes:
        pairings: One row a way: of each run, the place of the run whose outcome it gets. No row where `reason` says why.
        exact: Whether these are all ways; the runs' own pairing is then among them.
        reason: Why no p can come of it, or "".
    """

    pairings: Int[np.ndarray, "way run"]
    exact: bool
    reason: str = ""

    def p(self, hits: int) -> float:
        """The share of ways that reach as far; where ways were drawn, the runs' own pairing counts as one more."""
        n = len(self.pairings)
        return hits / n if self.exact else (1 + hits) / (1 + n)


def exchanges(
    runs: Sequence[str],
    groups: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    *,
    n_permutations: int = 9999,
    seed: int = 0,
) -> Exchanges:
    """List or draw the ways to exchange outcomes between runs.

    Runs are exchanged within groups, each group by itself. With `units`, what is exchanged is whole units, each with its run of
    every group: what all runs of a unit share, and what all runs of a group share, stays with them in every way.

    Args:
        runs: Names.
        groups: Run → group; None: all runs are one.
        units: Run → unit. Every unit needs one run of every group.
        n_permutations: Drawn at most, where there are more ways.
        seed: Of the drawing.

    >>> runs = ["a/0", "a/1", "a/2", "a/3", "b/0", "b/1", "b/2", "b/3"]
    >>> kinds, seeds = ({run: run[place] for run in runs} for place in (0, 2))
    >>> [len(exchanges(runs, kinds, units).pairings) for units in (None, seeds)]
    [576, 24]
    """
    labels = _labels(runs, groups)
    members = [[place for place, label in enumerate(labels) if label == one] for one in dict.fromkeys(labels)]
    if units is None:
        what, n_ways = f"{len(runs)} runs", math.prod(math.factorial(len(one)) for one in members)
    else:
        moved = _labels(runs, units)
        names = list(dict.fromkeys(moved))
        place_of = {
            (unit, label): place for place, (unit, label) in enumerate(zip(moved, labels, strict=True))
        }
        if len(place_of) < len(runs) or len(place_of) < len(names) * len(members):
            return _none(runs, "not every unit has one run of each kind, so that units cannot change places")
        blocks = np.array([[place_of[unit, label] for label in dict.fromkeys(labels)] for unit in names])
        what, n_ways = f"{len(names)} units", math.factorial(len(names))
        members = [list(range(len(names)))]
    if n_ways < math.factorial(FEWEST_RUNS):
        return _none(runs, f"{what} can be paired in {n_ways} ways: no p below 1/{n_ways}, so none is given")
    exact = n_ways <= max(n_permutations, math.factorial(7))
    ways = _all_ways(members) if exact else _drawn_ways(members, n_permutations, np.random.default_rng(seed))
    found = np.array(list(ways))
    if units is None:
        return Exchanges(found, exact)
    pairings = np.empty((len(found), len(runs)), dtype=int)
    pairings[:, blocks.reshape(-1)] = blocks[found].reshape(len(found), -1)
    return Exchanges(pairings, exact)


def _labels(runs: Sequence[str], of: Mapping[str, str] | None) -> list[str]:
    return [str((of or {}).get(run, "")) for run in runs]


def _none(runs: Sequence[str], reason: str) -> Exchanges:
    return Exchanges(np.empty((0, len(runs)), dtype=int), False, reason)


def _all_ways(members: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    n = sum(map(len, members))
    for parts in product(*(permutations(one) for one in members)):
        way = [0] * n
        for one, part in zip(members, parts, strict=True):
            for place, other in zip(one, part, strict=True):
                way[place] = other
        yield way


def _drawn_ways(
    members: Sequence[Sequence[int]], n_permutations: int, rng: np.random.Generator
) -> Iterator[list[int]]:
    def endless() -> Iterator[list[int]]:
        n = sum(map(len, members))
        while True:
            way = np.empty(n, dtype=int)
            for one in members:
                way[list(one)] = rng.permutation(list(one))
            yield way.tolist()

    return islice(endless(), n_permutations)
