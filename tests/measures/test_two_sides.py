"""Families by what twins swap: the toy's conjunctions share verbs, the English families share nothing."""

from __future__ import annotations

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.two_sides import families_by_swap
from rim_lens.prompts import Prompt


@pytest.mark.parametrize("split", ["select", "evaluate"])
def test_conjunctions_of_one_verb_are_one_family(split: str) -> None:
    harmful, twins = (rl.load_prompts(kind, language="toy", split=split) for kind in ("harmful", "harmless"))
    labels = families_by_swap(harmful, twins)
    verbs = [prompt.text.split()[0] for prompt in harmful]
    assert len(set(families_of(harmful))) == 10
    assert len(set(labels)) == len(set(verbs)) == len(set(zip(labels, verbs, strict=True))) == 6


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
