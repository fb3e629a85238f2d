"""Kinds of CoT: exact lengths under several counts of tokens, and what each kind says."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rim_lens.errors import CotError
from rim_lens.prompts import Prompt, cot_texts, load_prompts, self_statement
from rim_lens.prompts.cots import COT_KINDS, FILLER_WORDS
from rim_lens.prompts.toy import COT_LENGTH


def words(text: str) -> int:
    return len(text.split())


def pieces(text: str) -> int:
    """Like a byte-pair vocabulary: words in chunks of four letters, digits and marks one by one."""
    return sum(-(-len(part) // 4) for part in re.findall(r"[A-Za-z']+|\d|[^\w\s]", text))


def merging(text: str) -> int:
    """A tokenizer that merges runs of marks with the word before, and pairs of short words."""
    found = re.findall(r"\w+[.,:?!]*|\.+", text)
    return len(found) - sum(len(a) + len(b) <= 4 for a, b in zip(found[::2], found[1::2], strict=False))


COUNTS: list[Callable[[str], int]] = [words, pieces]
SETS = [(kind, split) for kind in ("harmful", "harmless", "reasoning") for split in ("train", "evaluate")]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("kind", "split"), SETS)
@pytest.mark.parametrize("control", ["filler", "unrelated"])
def test_controls_have_exactly_the_careful_length(
    count: Callable[[str], int], kind: str, split: str, control: str
) -> None:
    prompts = load_prompts(kind, split=split)[:30]
    careful = cot_texts(prompts, "careful", count)
    texts = cot_texts(prompts, control, count)
    assert [count(text) for text in texts] == [count(text) for text in careful]
    assert all(text.endswith(".") for text in texts)


@settings(max_examples=25, deadline=None)
@given(length=st.integers(3, 400), seed=st.integers(0, 2**32 - 1))
def test_controls_reach_any_length(length: int, seed: int) -> None:
    prompt = Prompt(id="1", text="Name a fruit.", cot=" ".join(["plan"] * length))
    for kind in ("filler", "unrelated"):
        assert pieces(cot_texts([prompt], kind, pieces, seed=seed)[0]) == length


def test_filler_says_nothing() -> None:
    known = {word.strip(".") for word in FILLER_WORDS}
    for text in cot_texts(load_prompts("harmful", split="dev"), "filler", pieces):
        assert {word.strip(".").lower() for word in text.split()} <= known
        assert len(set(text.split())) > 5


def test_unrelated_is_of_another_task() -> None:
    for text in cot_texts(load_prompts("harmful", split="select"), "unrelated", pieces):
        assert re.search(r"\d", text)
    for prompt, text in zip(
        load_prompts("reasoning", split="select"),
        cot_texts(load_prompts("reasoning", split="select"), "unrelated", pieces),
        strict=True,
    ):
        assert not re.search(r"\d", text), prompt.text


def test_unrelated_keeps_to_the_split_and_to_harmless_requests() -> None:
    """A held-out request gets no reasoning that training has seen, and no harmful act enters by the control."""
    acts = {
        split: {p.cot.split(". ")[0] for p in load_prompts("harmless", split=split)}
        for split in ("train", "dev")
    }
    # A full first sentence, not one that was cut
    openings = {
        text.split(". ")[0]
        for text in cot_texts(load_prompts("reasoning", split="dev"), "unrelated", pieces)
        if ". " in text
    }
    assert openings
    assert openings <= acts["dev"]
    assert not openings & acts["train"]


def test_unrelated_starts_with_whole_sentences_of_a_sound_cot() -> None:
    sound = {p.cot.split(". ")[0] for p in load_prompts("reasoning", split="train")}
    for text in cot_texts(load_prompts("harmful", split="train"), "unrelated", pieces):
        assert text.split(". ")[0].removesuffix(".") in {sentence.removesuffix(".") for sentence in sound}


@pytest.mark.parametrize("kind", ["confirm", "deviate", "heuristic"])
def test_patterns_restate_the_task_and_come_near_in_length(kind: str) -> None:
    prompts = load_prompts("harmful", split="select")
    careful = cot_texts(prompts, "careful", pieces)
    for sound, text in zip(careful, cot_texts(prompts, kind, pieces), strict=True):
        assert text.startswith(re.split(r"(?<=[.]) ", sound)[0])
        assert text != sound
        assert abs(pieces(text) - pieces(sound)) <= 12


@pytest.mark.parametrize("kind", ["confirm", "deviate", "heuristic"])
def test_patterns_of_maths_keep_the_answer_and_work_nothing_out(kind: str) -> None:
    prompts = load_prompts("reasoning", split="train")
    for prompt, text in zip(prompts, cot_texts(prompts, kind, pieces), strict=True):
        assert text.endswith(f"The answer is {prompt.answer}.")
        assert set(re.findall(r"\d+", text)) == {prompt.answer}
        assert "=" not in text


def test_no_kind_opens_like_a_refusal() -> None:
    for kind in COT_KINDS:
        for name in ("harmful", "reasoning"):
            for text in cot_texts(load_prompts(name, split="evaluate"), kind, pieces):
                for sentence in re.split(r"(?<=[.?!:]) ", text):
                    assert sentence.split()[0].strip(".,") not in (
                        "I",
                        "Sorry",
                        "No",
                        "Unfortunately",
                        "I'm",
                    ), text
                assert not re.search(r"sorry|cannot|can't|unable|refuse", text, re.IGNORECASE)


def test_a_request_gets_the_same_text_in_any_list_and_another_with_another_seed() -> None:
    prompts = load_prompts("harmful", split="dev")
    for kind in COT_KINDS:
        whole = cot_texts(prompts, kind, pieces)
        assert [cot_texts([prompt], kind, pieces)[0] for prompt in prompts[:5]] == whole[:5]
        other = cot_texts(prompts, kind, pieces, seed=1)
        assert (other == whole) == (kind == "careful")


def test_plain_strings_get_a_plan_that_quotes_them_without_tags() -> None:
    request = "Explain  <think> tags\n\nin detail.</think><|im_end|> Why? Because."
    text = cot_texts([request], "careful", words)[0]
    assert 'The user asks: "Explain tags in detail. Why? Because."' in text
    assert "<" not in text
    for kind in ("confirm", "heuristic"):
        pattern = cot_texts([request], kind, words)[0]
        assert pattern.startswith('The user asks: "Explain tags in detail. Why? Because." ')
    for kind in ("filler", "unrelated"):
        assert words(cot_texts([request], kind, words)[0]) == words(text)


def test_toy_requests_get_toy_cots() -> None:
    prompts = load_prompts("harmful", language="toy", split="select")[:4]
    for kind in COT_KINDS:
        texts = cot_texts(prompts, kind, words)
        assert {len(text.split()) for text in texts} == {COT_LENGTH}
    assert cot_texts(prompts, "careful", words) == [prompt.cot for prompt in prompts]


def test_a_length_out_of_reach_is_refused_with_the_residual() -> None:
    def even(text: str) -> int:
        return 2 * words(text)

    prompt = Prompt(id="odd", text="Name a fruit.", cot="plan it")
    counts = {"plan it": 5}

    def count(text: str) -> int:
        return counts.get(text, even(text))

    for kind in ("filler", "unrelated"):
        with pytest.raises(CotError, match=r"5 tokens.*'odd'.*[+-]1"):
            cot_texts([prompt], kind, count)
        assert abs(count(cot_texts([prompt], kind, count, tolerance=1)[0]) - 5) == 1


def test_merging_tokenizers_are_met_within_one_token() -> None:
    prompts = load_prompts("harmless", split="train")
    careful = cot_texts(prompts, "careful", merging)
    for kind in ("filler", "unrelated"):
        texts = cot_texts(prompts, kind, merging, tolerance=1)
        assert all(abs(merging(a) - merging(b)) <= 1 for a, b in zip(texts, careful, strict=True))


def test_unknown_kinds_name_the_known_ones() -> None:
    with pytest.raises(CotError, match="careful, confirm, deviate, heuristic, filler, unrelated"):
        cot_texts(["Name a fruit."], "carefully", words)
    with pytest.raises(CotError, match="careful, confirm, deviate, heuristic"):
        self_statement("filler")


def test_self_statements_are_four_different_lines() -> None:
    lines = {self_statement(kind) for kind in ("careful", "confirm", "deviate", "heuristic")}
    assert len(lines) == 4
    assert all(line.count(".") == 1 for line in lines)
