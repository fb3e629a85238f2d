"""Counterfactual pairs: what is paired with what, and on which side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import rim_lens as rl
from rim_lens.errors import MissingIntent, MissingTwin, NotEnoughData, StatisticsError
from rim_lens.measures.neurons.pairs import Pair, as_pairs, counterfactual_pairs, pair_sides
from rim_lens.prompts import Prompt

HARMFUL, HARMLESS = (rl.load_prompts(kind) for kind in ("harmful", "harmless"))


@pytest.mark.parametrize("kind", ["intent", "neutral"])
def test_intent_pairs_are_a_request_and_the_same_with_a_sentence(kind: Any) -> None:
    pairs = counterfactual_pairs(HARMFUL, kind=kind)
    assert [pair.less for pair in pairs] == HARMFUL
    for request, pair in zip(HARMFUL, pairs, strict=True):
        assert pair.more.text.startswith(request.text.rstrip())
        assert pair.more.text.endswith(str(request.intent)) == (kind == "intent")
        assert pair.kind == kind
    lengths = [
        [len(pair.more.text.split()) for pair in counterfactual_pairs(HARMFUL, kind=one)]
        for one in ("intent", "neutral")
    ]
    assert lengths[0] == lengths[1]


def test_twins_are_told_by_their_ids_in_any_order() -> None:
    pairs = counterfactual_pairs(HARMFUL, HARMLESS[::-1], kind="twins")
    assert [pair.more for pair in pairs] == HARMFUL
    assert all(pair.more.twin == pair.less.id for pair in pairs)
    strings = counterfactual_pairs(["make", "get"], ["ban", "avoid"], kind="twins")
    assert [(pair.less.text, pair.more.text) for pair in strings] == [("ban", "make"), ("avoid", "get")]


def test_own_pairs_are_taken_as_they_come() -> None:
    first = (HARMLESS[0], HARMFUL[0])
    made = as_pairs([first, ("Ban it.", "Make it."), Pair(HARMLESS[1], HARMFUL[1], "twins")])
    assert [pair.kind for pair in made] == ["own", "own", "twins"]
    assert (made[0].less, made[0].more) == first
    assert made[1].less.family == made[1].more.family == made[1].family
    assert made[0].family != made[1].family


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: counterfactual_pairs([]), NotEnoughData, "no request"),
        (lambda: counterfactual_pairs(HARMFUL, kind="other"), StatisticsError, "other"),  # type: ignore[arg-type]
        (lambda: counterfactual_pairs(["no intent"]), MissingIntent, "no sentence"),
        (lambda: counterfactual_pairs(HARMFUL, kind="twins"), MissingTwin, "no harmless"),
        (lambda: counterfactual_pairs(HARMFUL, HARMLESS[1:], kind="twins"), MissingTwin, "twin"),
        (lambda: counterfactual_pairs(["a", "b"], ["c"], kind="twins"), MissingTwin, "twin"),
        (lambda: as_pairs([]), NotEnoughData, "no pair"),
        (lambda: as_pairs(["ab"]), StatisticsError, "less refused"),  # type: ignore[list-item]
        (lambda: as_pairs([("a", "b", "c")]), StatisticsError, "less refused"),  # type: ignore[list-item]
        (lambda: as_pairs([("a", 3)]), StatisticsError, "less refused"),  # type: ignore[list-item]
        (lambda: as_pairs([("a", "a")]), StatisticsError, "same words"),
        (lambda: as_pairs([(HARMLESS[0], HARMFUL[0])] * 2), StatisticsError, "twice"),
    ],
)
def test_what_is_no_pair_is_refused(make: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        make()


def test_a_pair_across_splits_is_refused() -> None:
    less, more = replace(HARMLESS[0], split="select"), replace(HARMFUL[0], split="evaluate")
    with pytest.raises(StatisticsError, match="two splits"):
        as_pairs([(less, more)])


def test_the_records_splits_say_which_pairs_choose() -> None:
    sides = pair_sides(counterfactual_pairs(HARMFUL, HARMLESS, kind="twins"), halves=True)
    assert [pair.more for pair in sides.select] == [p for p in HARMFUL if p.split == "select"]
    assert [pair.more for pair in sides.evaluate] == [p for p in HARMFUL if p.split == "evaluate"]
    train = [p for p in HARMFUL if p.split == "train"]
    with pytest.raises(NotEnoughData, match="found: train"):
        pair_sides(counterfactual_pairs(train), halves=True)


@pytest.mark.parametrize("kind", ["intent", "twins"])
def test_pairs_without_splits_are_cut_by_family_or_all_choose(kind: Any) -> None:
    bare = [
        [replace(prompt, split=None) for prompt in prompts if prompt.split == "evaluate"]
        for prompts in (HARMFUL, HARMLESS)
    ]
    pairs = counterfactual_pairs(*bare, kind=kind)
    sides = pair_sides(pairs, halves=True, seed=3)
    assert len(sides.select) + len(sides.evaluate) == len(pairs)
    assert sides.select
    assert sides.evaluate
    assert not {p.family for p in sides.select} & {p.family for p in sides.evaluate}
    for side, name in zip(sides, ("select", "evaluate"), strict=True):
        assert {form.split for pair in side for form in (pair.less, pair.more)} == {name}
    assert pair_sides(pairs, halves=True, seed=3) == sides
    everyone = pair_sides(pairs, halves=False)
    assert len(everyone.select) == len(pairs)
    assert not everyone.evaluate


def test_the_same_words_never_choose_and_test() -> None:
    one = Pair(Prompt("a", "ban", split="select"), Prompt("b", "make", split="select"))
    other = Pair(Prompt("c", "stop", split="evaluate"), Prompt("d", "Make!", split="evaluate"))
    with pytest.raises(ValueError, match="tested"):
        pair_sides([one, other], halves=True)
