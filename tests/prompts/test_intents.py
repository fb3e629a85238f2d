"""Counterfactual pairs: the request stays, one sentence comes."""

from __future__ import annotations

import pytest

from rim_lens.errors import MissingIntent
from rim_lens.prompts import Prompt, load_prompts, with_intent
from rim_lens.prompts.intents import INTENTS, NEUTRALS, neutral_sentence


def test_pairs_differ_by_the_sentence_alone() -> None:
    plain = load_prompts("harmful", split="evaluate")
    for before, intent, neutral in zip(
        plain, with_intent(plain), with_intent(plain, neutral=True), strict=True
    ):
        assert intent.text == f"{before.text} {before.intent}"
        assert neutral.text.startswith(before.text + " ")
        assert len(neutral.text.split()) == len(intent.text.split())
        assert (intent.id, neutral.id) == (f"{before.id}+intent", f"{before.id}+neutral")
        for after in (intent, neutral):
            for field in ("kind", "category", "family", "twin", "intent", "cot", "split"):
                assert getattr(after, field) == getattr(before, field)


def test_neutral_sentences_share_no_word_of_harm_with_the_intents() -> None:
    harmful = {
        "information",
        "profit",
        "crime",
        "illegal",
        "attack",
        "harm",
        "malware",
        "laundering",
        "election",
    }
    for sentence in NEUTRALS.values():
        assert not harmful & set(sentence.lower().strip(".").replace(".", "").split())


@pytest.mark.parametrize("length", range(1, 40))
def test_a_neutral_sentence_of_any_length(length: int) -> None:
    sentence = neutral_sentence(" ".join(["word"] * length))
    assert len(sentence.split()) == length
    assert sentence.endswith(".")


def test_a_known_category_with_an_intent_of_another_length_still_matches() -> None:
    assert len(neutral_sentence("I will do it.", "fraud").split()) == 4
    assert neutral_sentence(INTENTS["fraud"], "fraud") == NEUTRALS["fraud"]


def test_a_record_without_intent_is_named() -> None:
    with pytest.raises(MissingIntent, match=r"1 of 2 requests.*'b'"):
        with_intent([Prompt(id="a", text="A?", intent="Bad."), Prompt(id="b", text="B?")])


def test_a_request_without_a_stop_gets_one() -> None:
    assert with_intent([Prompt(id="a", text="Write a poem", intent="Bad.")])[0].text == "Write a poem. Bad."
