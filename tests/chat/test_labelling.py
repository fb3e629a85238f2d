"""The rule for shared tokens, and the characters a token covers, on texts small enough to see through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rim_lens.chat.labelling import Segment, assign, character_ranges, check, joined, merge, separate
from rim_lens.errors import SpanError
from tests.true_tokenizers import true_chat


def labels(pieces: list[tuple[str, str]], tokens: list[str], strict: bool = False) -> list[str]:
    segments = [Segment(*piece) for piece in pieces]
    ends = torch.tensor([len(token) for token in tokens]).cumsum(0).tolist()
    ranges = [(end - len(token), end) for token, end in zip(tokens, ends, strict=True)]
    assert "".join(tokens) == joined(segments)
    return [segments[number].atom for number in assign(segments, ranges, strict=strict, where="row 0")]


def test_a_tag_takes_the_whitespace_merged_with_it():
    pieces = [("<think>", "think_open"), ("\n\n", "gap"), ("</think>", "think_close"), ("\n\n", "template")]
    tokens = ["<th", "ink", ">\n\n", "</", "think", ">\n\n"]
    assert labels(pieces, tokens, strict=True) == ["think_open"] * 3 + ["think_close"] * 3


def test_visible_text_takes_the_whitespace_merged_with_it():
    pieces = [("</think>", "think_close"), ("\n\n", "template"), ("Sure", "answer")]
    assert labels(pieces, ["</think>", "\n", "\nSure"], strict=True) == ["think_close", "template", "answer"]


def test_shared_whitespace_is_scaffold_and_else_the_earlier_span():
    assert labels([("user\n", "template"), ("\nHi", "request")], ["user", "\n\n", "Hi"]) == [
        "template",
        "template",
        "request",
    ]
    assert labels([("a ", "system"), (" b", "request")], ["a", "  ", "b"]) == ["system", "system", "request"]


def test_shared_visible_text_is_refused_when_rendered_and_the_tags_when_written():
    pieces = [("</think>", "think_close"), ("Sorry", "answer")]
    tokens = ["</", "think", ">S", "orry"]
    with pytest.raises(SpanError, match=r"'>S' holds text of two spans, 'think_close' and 'answer'"):
        labels(pieces, tokens, strict=True)
    assert labels(pieces, tokens) == ["think_close"] * 3 + ["answer"]


def test_of_two_tags_the_first_has_the_token():
    pieces = [("<think>", "think_open"), ("</think>", "think_close")]
    assert labels(pieces, ["<think", "></", "think>"]) == ["think_open", "think_open", "think_close"]


def test_a_token_without_text_goes_with_the_character_it_stands_at():
    segments = [Segment("ab", "cot"), Segment("c", "answer")]
    assert assign(segments, [(0, 2), (2, 2), (2, 3), (3, 3)], strict=True, where="") == [0, 1, 1, 1]
    assert assign([Segment("", "template")], [(0, 0)], strict=True, where="") == [0]


def test_merge_and_separate():
    pieces = [Segment("a", "template"), Segment("", "system"), Segment("b", "template"), Segment("c", "cot")]
    assert merge(pieces) == [Segment("ab", "template"), Segment("c", "cot")]
    assert joined(separate(pieces, " ")) == "a b c"


def test_check_names_row_span_and_both_texts():
    words = {0: "Hello", 1: " wurld"}
    with pytest.raises(
        SpanError, match=r"row 7: span 'request' should hold 'Hello world', .* decode to 'Hello wurld'"
    ):
        check(
            [Segment("Hello world", "request")],
            [(0, 5), (5, 11)],
            [0, 0],
            [0, 1],
            lambda ids: "".join(words[number] for number in ids),
            lambda a, b: a == b,
            "row 7",
        )


BYTES = [character.to_bytes(1, "big") for character in range(256)]


def decode_bytes(ids) -> str:
    return b"".join(BYTES[number] for number in ids).decode(errors="replace")


@given(st.text(max_size=12))
def test_tokens_that_share_a_character_each_cover_it(text):
    ids = list(text.encode())
    found, ranges = character_ranges(ids, decode_bytes, {})
    assert found == text
    expected = [(place, place + 1) for place, character in enumerate(text) for _ in character.encode()]
    assert ranges == expected


@given(st.binary(max_size=12))
def test_bytes_that_are_no_text_still_have_ranges_in_order(noise):
    text, ranges = character_ranges(list(noise), decode_bytes, {})
    assert text == noise.decode(errors="replace")
    assert len(ranges) == len(noise)
    assert all(0 <= start <= stop <= len(text) for start, stop in ranges)
    assert ranges == sorted(ranges)


@pytest.mark.npm
@pytest.mark.parametrize("name", ["llama3_1", "qwen3", "gemma3", "gpt_oss", "deepseek_r1"])
@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=30) | st.text(alphabet="🏳️‍🌈👩🏽‍🚒אבגش ا<>/think\n ", max_size=20))
def test_ranges_from_ids_are_the_tokenizers_own_offsets(name, text):
    """Two ways to the same places: decoded ids, and the offsets given on the way in."""
    chat = true_chat(name)
    encoded = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    found, ranges = character_ranges(encoded["input_ids"], chat.decode, {})
    if (
        found != text
    ):  # the tokenizer's own normalisation changed the text (NFC, ▁): offsets are of the old one
        normalizer = chat.tokenizer.backend_tokenizer.normalizer
        assert normalizer.normalize_str(found) == normalizer.normalize_str(text)
        return
    assert ranges == [tuple(offset) for offset in encoded["offset_mapping"]]
