"""Sentences of a chain of thought: cut by hand here, by rule there, and on every true tokenizer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rim_lens.chat import ChatFormat
from rim_lens.chat.sentences import cot_sentences, split_sentences
from rim_lens.errors import EmptySpan, SpanError
from tests.chat.test_chat_format import FORMATS
from tests.true_tokenizers import true_chat

COT = (
    "First, 3.5 kg at $1.20 each, e.g. apples. So it is 4.2! Is that\n right? “Yes.” Then\n\n1. Add 7.\n2. Stop... or"
    " not. Dr. Who asks."
)
SENTENCES = (
    *("First, 3.5 kg at $1.20 each, e.g. apples.", "So it is 4.2!", "Is that", "right?", "“Yes.”", "Then"),
    *("1. Add 7.", "2. Stop... or not.", "Dr. Who asks."),
)


def stripped(text: str) -> list[str]:
    pieces = split_sentences(text)
    assert "".join(pieces) == text
    return [piece.strip() for piece in pieces]


@pytest.mark.parametrize(
    "sentences",
    [
        ("One.", "Two."),
        ("It is 3.5 metres.", "That is 1,000.25 in all."),
        ("Pets, e.g. cats, i.e. animals.", "So!"),
        ("See fig. 3 and no. 7.", "The answer is no.", "Then stop."),
        ("Mr. Brown met J. R. Smith and George W. Bush.", "They left."),
        ("The answer is B.", "Then stop."),
        ("So x = y.", "Ask NASA.", "So do I.", "Then z."),
        ("At 3 p.m. the U.S. team left.", "They won."),
        ("Wait... let me see.", "Hmm…", "No!", "Why?", "because."),
        ('He said "stop."', "Then (really?)", "he went."),
        ("3 + 4 = 7.", "7 + 6 = 13.", "13 mod 7 = 6"),
        ("1. Add.", "2. Take away.", "Step 3. Stop."),
        ("**Step 1.** Add.", "Then stop."),
        ("これは一つ。", "これは二つ！", "終わり"),
        ("one line\n", "another line\n", "\tand a third"),
        ("v2.0.1 of a.b.c is at http://x.y/z.html?q=1.2 now.", "Good."),
        ("",),
        (".",),
        ("  no end",),
    ],
)
def test_sentences_cut_by_hand(sentences: tuple[str, ...]) -> None:
    assert stripped(" ".join(sentences)) == [sentence.strip() for sentence in sentences]
    assert stripped("\n\n".join(sentences)) == [sentence.strip() for sentence in sentences]


def test_a_text_of_everything() -> None:
    assert tuple(stripped(COT)) == SENTENCES


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet='aB1 .!?\n)"…。é', max_size=40))
def test_pieces_join_to_the_text_and_none_is_blank(text: str) -> None:
    pieces = split_sentences(text)
    assert "".join(pieces) == text
    assert not text.strip() or all(piece.strip() for piece in pieces)


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_of_each_sentence_on_true_tokenizers(name: str) -> None:
    chat = true_chat(name)
    batch = chat.render(["Count the apples, please."] * 2, think=[COT, "Only one sentence here"])
    found = cot_sentences(chat, batch)
    assert found.texts[1] == ("Only one sentence here",)
    assert torch.equal(found.index >= 0, batch.spans["cot"])
    for row in range(2):
        own = found.index[row][batch.spans["cot"][row]]
        assert bool((own.diff() >= 0).all())
        assert own.unique().tolist() == list(range(len(found.texts[row])))
        for sentence, text in enumerate(found.texts[row]):
            decoded = chat.decode(batch.tokens[row][found.mask(sentence)[row]])
            assert decoded.split() == text.split()
    assert [" ".join(text.split()) for text in found.texts[0]] == [" ".join(s.split()) for s in SENTENCES]


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_model_wrote_is_cut_as_well(name: str) -> None:
    chat = true_chat(name)
    text = f"{'' if chat.opener_in_prompt else chat.spec.think_open}Hmm. Let me see.{chat.spec.think_close}\n\nSorry."
    ids = torch.tensor([chat.encode(text)])
    batch = chat.extend(chat.render(["Count."], think="open"), ids)
    found = cot_sentences(chat, batch)
    first, second = found.texts[0]
    assert (first, second.rstrip(".")) == (
        "Hmm.",
        "Let me see",
    )  # a plain-text tag may take the full stop along
    assert torch.equal(found.index >= 0, batch.spans["cot"])


def test_a_shared_token_goes_with_its_first_visible_character() -> None:
    """Words of one token each, cut inside a word, at a space, and so that a piece has no token of its own."""
    chat = true_chat("toy")
    batch = chat.render("make bread please + 3 4 6", think="please kindly now")

    def tokens(*pieces: str) -> list[list[str]]:
        found = cot_sentences(chat, batch, split=lambda text: list(pieces))
        return [chat.decode(batch.tokens[0][found.mask(n)[0]]).split() for n in range(len(found.texts[0]))]

    assert tokens("please", " kindly now") == [["please"], ["kindly", "now"]]
    assert tokens("please kin", "dly now") == [["please", "kindly"], ["now"]]
    assert tokens("please ki", "nd", "ly now") == [["please", "kindly"], ["now"]]
    joined = cot_sentences(chat, batch, split=lambda text: ["please ki", "nd", "ly now"])
    assert joined.texts == (("please kind", "ly now"),)


def test_several_blocks_are_cut_one_by_one() -> None:
    chat = true_chat("qwen3")
    written = "<think>One. Two</think>Well<think>three. Four.</think>Done."
    batch = chat.extend(chat.render(["Count."], think="open"), torch.tensor([chat.encode(written)]))
    assert cot_sentences(chat, batch).texts == (("One.", "Two", "three.", "Four."),)


def test_what_cannot_be_cut() -> None:
    chat = true_chat("toy")
    batch = chat.render("make bread please + 3 4 6", think="please kindly now")
    with pytest.raises(SpanError, match="every character"):
        cot_sentences(chat, batch, split=lambda text: text.split())
    with pytest.raises(EmptySpan):
        cot_sentences(chat, chat.render("make bread please + 3 4 6", think="off"))
    with pytest.raises(SpanError, match="the format it came from"):
        cot_sentences(chat, replace(batch, format="qwen3"))
    with pytest.raises(SpanError, match="has 1, counted from 0"):
        cot_sentences(ChatFormat.from_tokenizer(chat.tokenizer), batch).mask(1)
