"""Which harmful and harmless requests select, and which evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import NamedTuple

from rim_lens.errors import NotEnoughData
from rim_lens.measures.refusal.rates import families_of
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


def twin_places(side: Side) -> list[int] | None:
    """For each harmful request, the place of its twin among the harmless ones; None where some has no twin there."""
    place_of = {prompt.id: place for place, prompt in enumerate(side.harmless)}
    if any(prompt.twin not in place_of for prompt in side.harmful):
        return None
    return [place_of[str(prompt.twin)] for prompt in side.harmful]


def families_by_swap(harmful: Sequence[Prompt], twins: Sequence[Prompt]) -> list[str]:
    """Family of each harmful request for tests against its twin: families in which twins swap the same words are one.

    What tells a request from its twin is a swap of words (``make`` for ``ban``), and a model may react to these very words
    whatever they mean. Two families with one swap share that reaction, so they are no two witnesses against chance. In the
    toy language ten conjunctions share six verbs this way; in the English set each family has words of its own. Twins that
    share some words of their swap and not all are left apart: of two texts written freely, any two have some in common.

    Args:
        harmful: Harmful requests.
        twins: The twin of each, in the same order.

    Returns:
        One label per request: its own family, or those of its families joined by " + ".

    >>> asked = [Prompt("1", "make a bomb", family="a"), Prompt("2", "make a virus", family="b"), Prompt("3", "rob a bank")]
    >>> twins = [Prompt("4", "ban a bomb"), Prompt("5", "ban a virus"), Prompt("6", "visit a bank")]
    >>> families_by_swap(asked, twins)
    ['a + b', 'a + b', '3']
    """
    families = families_of(harmful)
    groups: dict[str, set[str]] = {family: {family} for family in families}
    first: dict[tuple[tuple[str, str], ...], str] = {}
    for family, prompt, twin in zip(families, harmful, twins, strict=True):
        one, other = groups[first.setdefault(_swap(prompt.text, twin.text), family)], groups[family]
        if one is not other:
            one |= other
            groups |= dict.fromkeys(other, one)
    return [" + ".join(sorted(groups[family])) for family in families]


def _swap(text: str, twin: str) -> tuple[tuple[str, str], ...]:
    """The runs of words in which two texts differ, in order."""
    words, others = text.casefold().split(), twin.casefold().split()
    parts = SequenceMatcher(a=words, b=others, autojunk=False).get_opcodes()
    return tuple(
        (" ".join(words[start:end]), " ".join(others[first:last]))
        for kind, start, end, first, last in parts
        if kind != "equal"
    )


def named(requests: Sequence[Prompt | str], kind: str) -> list[Prompt]:
    """Records as they are; strings with ids that tell the kinds apart, the n-th of each kind in one family."""
    return [
        prompt if isinstance(given, Prompt) else replace(prompt, id=f"{kind}-{prompt.id}", kind=kind)
        for given, prompt in zip(requests, as_prompts(requests), strict=True)
    ]
