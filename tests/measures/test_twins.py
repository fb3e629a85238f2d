"""Who is whose twin, told in one way everywhere; and families by what twins swap."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.errors import MissingTwin
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.removing import both_kinds
from rim_lens.measures.twins import families_by_swap, twin_places, with_families, witnesses
from rim_lens.measures.two_sides import Side, paired
from rim_lens.prompts import Prompt
from rim_lens.study.requests import requests_by_split


@pytest.mark.parametrize("split", ["select", "evaluate"])
def test_conjunctions_of_one_verb_are_one_family(split: str) -> None:
    harmful, twins = (rl.load_prompts(kind, language="toy", split=split) for kind in ("harmful", "harmless"))
    labels = families_by_swap(harmful, twins)
    verbs = [prompt.text.split()[0] for prompt in harmful]
    assert len(set(families_of(harmful))) == 10
    assert len(set(labels)) == len(set(verbs)) == len(set(zip(labels, verbs, strict=True))) == 6


def test_one_rule_says_of_both_kinds_what_is_one_witness() -> None:
    harmful, harmless = (
        rl.load_prompts(kind, language="toy", split="evaluate") for kind in ("harmful", "harmless")
    )
    places = twin_places(harmful, harmless[::-1])
    labels = witnesses(harmful, harmless[::-1], enumerate(places))
    assert labels["harmful"] == families_by_swap(harmful, harmless)
    assert [labels["harmless"][place] for place in places] == labels["harmful"]
    assert len(set(labels["harmless"])) == 6
    assert witnesses(harmful, harmless, ()) == {
        "harmful": families_of(harmful),
        "harmless": families_of(harmless),
    }
    some = witnesses(harmful, harmless, [(place, place) for place in range(0, len(harmful), 2)])
    assert set(some["harmful"]) >= set(some["harmless"])


def test_english_families_have_words_of_their_own() -> None:
    harmful, harmless = (rl.load_prompts(kind, language="en") for kind in ("harmful", "harmless"))
    twin = {prompt.id: prompt for prompt in harmless}
    assert families_by_swap(harmful, [twin[str(prompt.twin)] for prompt in harmful]) == families_of(harmful)


def test_what_joins_two_joins_three_in_any_order() -> None:
    rows = [
        ("a", "make one", "ban one"),
        ("b", "Make two", "ban two"),  # as a, whatever the case
        ("b", "sell two", "study two"),
        ("c", "sell three", "study three"),  # as b
        ("d", "sell three now", "study three then"),  # not the same swap
        ("", "hide four", "find four"),
        ("", "hide five", "find five"),  # no family, and the same swap
    ]
    wanted = {"a": "a + b + c", "b": "a + b + c", "c": "a + b + c", "d": "d"}
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(len(rows))
        asked = [Prompt(str(i), rows[i][1], family=rows[i][0]) for i in order]
        labels = families_by_swap(asked, [Prompt(f"t{i}", rows[i][2]) for i in order])
        assert labels == [wanted.get(rows[i][0], "5 + 6") for i in order]


ASKED = [
    Prompt("a", "rob one", family="x"),
    Prompt("b", "rob two", family="y"),
    Prompt("c", "rob six", family="x"),
]
TWINS = [Prompt("d", "see six"), Prompt("e", "see one"), Prompt("f", "see two"), Prompt("g", "see none")]


def naming(prompts: list[Prompt], names: list[str | None]) -> list[Prompt]:
    return [replace(prompt, twin=name) for prompt, name in zip(prompts, names, strict=True)]


def test_either_side_may_name_the_twins() -> None:
    by_harmful = naming(ASKED, ["e", "f", "d"])
    by_harmless = naming(TWINS, ["c", "a", "b", None])
    assert twin_places(by_harmful, TWINS) == twin_places(ASKED, by_harmless) == [1, 2, 0]
    assert [prompt.family for prompt in with_families(by_harmful, TWINS)] == ["x", "x", "y", ""]
    assert twin_places(ASKED, TWINS) is None
    in_order = [replace(prompt, family=other.family) for prompt, other in zip(TWINS, ASKED, strict=False)]
    assert twin_places(ASKED, in_order) == [0, 1, 2]


@pytest.mark.parametrize("names", [["e", "f", None], ["e", "f", "nobody"], ["e", "e", "d"]])
def test_twins_that_are_missing_or_shared_are_refused_everywhere(names: list[str | None]) -> None:
    asked = naming(ASKED, names)
    for pairing in (
        twin_places,
        lambda *both: paired(Side(*both)),
        lambda *both: both_kinds(*both, "removing"),
        lambda *both: requests_by_split("en", *both, None, None),
    ):
        with pytest.raises(MissingTwin, match="twin"):
            pairing(asked, TWINS)


def test_twins_without_a_family_are_of_that_of_their_request() -> None:
    """On every way that measures both kinds; a twin alone in its family would be a witness of its own."""
    harmful = rl.load_prompts("harmful", language="toy")
    bare = [replace(prompt, family="") for prompt in rl.load_prompts("harmless", language="toy")]
    whole = {prompt.id: prompt.family for prompt in rl.load_prompts("harmless", language="toy")}
    for twins in (
        both_kinds(harmful, bare, "removing")["harmless"],
        paired(Side(harmful, bare)).harmless,
        [
            twin
            for side in requests_by_split("toy", harmful, bare, None, None).values()
            for twin in side.twins
        ],
    ):
        assert len(twins) > 50
        assert all(twin.family == whole[twin.id] for twin in twins)
