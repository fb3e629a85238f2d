"""Which harmless request is the twin of which harmful one, and which of them are one witness against chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import SequenceMatcher

from rim_lens.errors import MissingTwin
from rim_lens.measures.refusal.rates import families_of
from rim_lens.prompts import Prompt


def twin_places(harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> list[int] | None:
    """For each harmful request, the place of its twin among the harmless ones; None where nobody names any.

    Twins are told by the ids that the harmful requests name, or else those that the harmless ones name. Where nobody names any
    (plain strings), the n-th belong together, as far as there are as many and their families agree.

    Raises:
        MissingTwin: Twins are named and some are not there, or two requests share one.

    >>> twin_places([Prompt("a", "rob", twin="c"), Prompt("b", "make", twin="d")], [Prompt("d", "ban"), Prompt("c", "see")])
    [1, 0]
    """
    place_of = {prompt.id: place for place, prompt in enumerate(harmless)}
    named_by = {prompt.twin: place for place, prompt in enumerate(harmless) if prompt.twin}
    if any(prompt.twin for prompt in harmful):
        found = [None if prompt.twin is None else place_of.get(prompt.twin) for prompt in harmful]
    elif any(prompt.id in named_by for prompt in harmful):
        found = [named_by.get(prompt.id) for prompt in harmful]
    elif families_of(harmful) == families_of(harmless):
        found = list(range(len(harmful)))
    else:
        return None
    places = [place for place in found if place is not None]
    if len(places) < len(harmful):
        first = harmful[found.index(None)]
        raise MissingTwin(
            f"{len(harmful) - len(places)} of {len(harmful)} harmful requests have no twin among {len(harmless)} harmless ones (first:"
            f" {first.id!r}, whose twin is {first.twin!r}). What is about refusal is told from general damage by minimally different"
            " harmless requests: give them, set the records' twin ids, or give as many plain strings in the same order."
        )
    if len(set(places)) < len(places):
        raise MissingTwin(
            f"{len(places)} harmful requests have {len(set(places))} twins between them; effects are paired request by request, so"
            " give each a twin of its own."
        )
    return places


def with_families(harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> list[Prompt]:
    """The harmless requests, those without a family in that of the harmful request whose twin they are.

    Raises:
        MissingTwin: As `twin_places`.

    >>> [prompt.family for prompt in with_families([Prompt("a", "rob", family="theft", twin="b")], [Prompt("b", "see")])]
    ['theft']
    """
    family = dict(zip(twin_places(harmful, harmless) or (), families_of(harmful), strict=False))
    return [
        replace(prompt, family=prompt.family or family.get(place, prompt.family))
        for place, prompt in enumerate(harmless)
    ]


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


def witnesses(
    harmful: Sequence[Prompt], harmless: Sequence[Prompt], pairs: Iterable[Sequence[int]]
) -> dict[str, list[str]]:
    """Labels by which tests flip signs and intervals resample: one rule, for each kind by itself and for their difference.

    Families in which twins swap the same words are one (`families_by_swap`): a model that reacts to these words reacts to them
    in each. A twin has the label of its harmful request, and a request without a twin that of its family.

    Args:
        harmful: Harmful requests.
        harmless: Harmless ones.
        pairs: Place of each harmful request that has a twin, and of its twin.

    >>> asked = [Prompt("1", "make a bomb", family="a"), Prompt("2", "make a virus", family="b")]
    >>> others = [Prompt("3", "ban a virus"), Prompt("4", "ban a bomb"), Prompt("5", "hi")]
    >>> witnesses(asked, others, [(0, 1), (1, 0)])
    {'harmful': ['a + b', 'a + b'], 'harmless': ['a + b', 'a + b', '5']}
    """
    found = [list(pair) for pair in pairs]
    asked = [harmful[place] for place, _ in found]
    labels = families_by_swap(asked, [harmless[place] for _, place in found])
    joined = dict(zip(families_of(asked), labels, strict=True))
    ours, theirs = (
        [joined.get(family, family) for family in families_of(kind)] for kind in (harmful, harmless)
    )
    for (_, place), label in zip(found, labels, strict=True):
        theirs[place] = label
    return {"harmful": ours, "harmless": theirs}


def _swap(text: str, twin: str) -> tuple[tuple[str, str], ...]:
    """The runs of words in which two texts differ, in order."""
    words, others = text.casefold().split(), twin.casefold().split()
    parts = SequenceMatcher(a=words, b=others, autojunk=False).get_opcodes()
    return tuple(
        (" ".join(words[start:end]), " ".join(others[first:last]))
        for kind, start, end, first, last in parts
        if kind != "equal"
    )
