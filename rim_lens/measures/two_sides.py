"""Which harmful and harmless requests select, and which evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from rim_lens.errors import MissingTwin, NotEnoughData
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.twins import twin_places, with_families
from rim_lens.prompts import Prompt, as_prompts, assign_splits, check_splits, spread


class Side(NamedTuple):
    """Requests of one side: what selects is never what evaluates."""

    harmful: list[Prompt]
    harmless: list[Prompt]


def two_sides(
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Side, Side]:
    """Return the select and the evaluate side.

    The records' own splits say which is which; where some have none, halves are cut by family, twins together. Of
    plain strings, the n-th of each kind are taken to be of one family.

    Args:
        harmful: Records or strings.
        harmless: Records or strings, twins of the harmful ones at best.
        limit: At most so many of each kind and side, taken evenly, and of the harmless ones first the twins of those taken;
            None for all.
        seed: Of the halves.

    Raises:
        NotEnoughData: A side lacks requests of a kind, or has a single family.
        ValueError: A family, or a request and its twin, stand on both sides.

    >>> select, evaluate = two_sides(["a", "b", "c", "d"], ["e", "f", "g", "h"])
    >>> len(select.harmful), len(evaluate.harmless)
    (2, 2)
    """
    bad, good = named(harmful, "harmful"), named(harmless, "harmless")
    if any(prompt.split is None for prompt in (*bad, *good)):
        both = assign_splits([*bad, *good], seed=seed)
        bad, good = both[: len(bad)], both[len(bad) :]
    sides = []
    for split in ("select", "evaluate"):
        here, there = ([p for p in prompts if p.split == split] for prompts in (bad, good))
        asked = spread(here, limit)
        chosen = Side(asked, _twins_first(asked, there, limit))
        n_families = [len(set(families_of(prompts))) for prompts in chosen]
        if min(n_families) < 2:
            raise NotEnoughData(
                f"the {split} side has {len(chosen.harmful)} harmful requests of {n_families[0]} families and"
                f" {len(chosen.harmless)} harmless ones of {n_families[1]}; two families of each kind are needed on each side."
                " Give more requests, or records without splits, which are then cut into halves."
            )
        sides.append(chosen)
    check_splits([prompt for side in sides for prompts in side for prompt in prompts])
    return sides[0], sides[1]


def _twins_first(harmful: Sequence[Prompt], harmless: list[Prompt], limit: int | None) -> list[Prompt]:
    """At most so many of the harmless ones, in their order: the twins of the harmful ones, and others taken evenly."""
    if limit is None or len(harmless) <= limit:
        return harmless
    ids = {prompt.twin for prompt in harmful}
    twins = [prompt for prompt in harmless if prompt.id in ids]
    others = spread([prompt for prompt in harmless if prompt.id not in ids], limit - len(twins))
    taken = {prompt.id for prompt in (*twins, *others)}
    return [prompt for prompt in harmless if prompt.id in taken]


def paired(side: Side) -> Side:
    """Return a side with the twin of each harmful request at its place.

    Raises:
        MissingTwin: Some harmful request has no twin there, or two share one, see `twin_places`.
    """
    places = twin_places(side.harmful, side.harmless)
    if places is None:
        raise MissingTwin(
            f"not every one of {len(side.harmful)} harmful requests has its twin among {len(side.harmless)} harmless ones. What is"
            " about refusal is told from general damage by minimally different harmless requests: set the records' twin ids, or"
            " give as many plain strings in the same order."
        )
    harmless = with_families(side.harmful, side.harmless)
    return Side(side.harmful, [harmless[place] for place in places])


def named(requests: Sequence[Prompt | str], kind: str) -> list[Prompt]:
    """Records as they are; strings with ids that tell the kinds apart, the n-th of each kind in one family."""
    return [
        prompt if isinstance(given, Prompt) else replace(prompt, id=f"{kind}-{prompt.id}", kind=kind)
        for given, prompt in zip(requests, as_prompts(requests), strict=True)
    ]
