"""Whatever the words, spans partition the row, decode to what they claim, and do not depend on the batch."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rim_lens.errors import ConditionError
from tests.true_tokenizers import true_chat

pytestmark = pytest.mark.npm
NAMES = ("qwen3", "llama3_1", "gemma3", "deepseek_r1", "gpt_oss", "chatml")

# Pieces that break tokenisers: tags, joined emoji, right-to-left, combining marks, odd spaces, the ▁ of SentencePiece.
PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<think",
        ">",
        "<",
        "\n",
        "\n\n",
        " ",
        "\t",
        "🏳️‍🌈",
        "👩🏽‍🚒",
        "שלום",
        "مرحبا",
        "é",
        "\u0338",
        "▁",
        "\u200b",
        *("\u00a0", "\u2028", "\r\n", "Sure", "123456", "'s", "我", "ﬁ", "Å", "\ufffd", "\x00"),
    ]
)
WORDS = st.lists(PIECES | st.text(max_size=4), max_size=8).map("".join)


def words_of(chat, batch, span, row=0) -> str:
    return chat.decode(batch.tokens[row][batch.spans[span][row]])


def canonical(chat, text: str) -> str:
    normalizer = chat.tokenizer.backend_tokenizer.normalizer
    return normalizer.normalize_str(text) if normalizer else text


def bare(chat, text: str) -> str:
    """Without outer whitespace; Gemma cannot tell its ▁ from a space."""
    return canonical(chat, text).replace("▁", " ").strip()


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=80)
@given(request=WORDS, cot=WORDS, answer=WORDS, system=st.none() | WORDS)
def test_spans_decode_to_what_was_given(name, request, cot, answer, system):
    chat = true_chat(name)
    try:
        batch = chat.render(request, think=cot, answers=answer, system=system)
    except ConditionError:
        assume(False)
    counts = torch.stack(list(batch.spans.atoms().values())).sum(0)
    assert torch.equal(counts, batch.attention_mask)
    whole = batch.tokens[0].tolist()
    assert canonical(chat, chat.decode(whole)) == canonical(chat, batch.texts[0])
    for span, given_text in (
        ("request", request),
        ("cot", cot),
        ("answer", answer),
        ("system", system or ""),
    ):
        assert bare(chat, words_of(chat, batch, span)) == bare(chat, given_text)
    assert canonical(chat, words_of(chat, batch, "think")).startswith(canonical(chat, chat.spec.think_open))


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(requests=st.lists(WORDS, min_size=2, max_size=4), think=st.sampled_from(["off", "open"]))
def test_batched_equals_one_by_one(name, requests, think):
    chat = true_chat(name)
    batch = chat.render(requests, think=think)
    for row, request in enumerate(requests):
        alone = chat.render([request], think=think)
        assert batch.tokens[row][batch.attention_mask[row].bool()].tolist() == alone.tokens[0].tolist()
        assert batch.atoms_of(row) == alone.atoms_of(0)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=40)
@given(completion=WORDS, think=st.sampled_from(["off", "open"]))
def test_what_is_written_is_labelled_whole_and_in_whatever_portions(name, completion, think):
    chat = true_chat(name)
    prompt = chat.render("Name a fruit, not a <think> tag.", think=think)
    ids = chat.encode(completion)
    mask = torch.ones((1, len(ids)), dtype=torch.bool)
    new = torch.tensor([ids], dtype=torch.long).reshape(1, len(ids))
    out = chat.extend(prompt, new, mask)
    half = len(ids) // 2
    twice = chat.extend(chat.extend(prompt, new[:, :half], mask[:, :half]), new[:, half:], mask[:, half:])
    assert out.atoms_of(0) == twice.atoms_of(0)
    assert (out.cots, out.answers, out.finished_thinking) == (
        twice.cots,
        twice.answers,
        twice.finished_thinking,
    )
    assert out.atoms_of(0) == chat.label_tokens(out.tokens[0].tolist())
    prompt_atoms = {"sink", "system", "request", "turn_end", "assistant"}
    assert prompt_atoms.isdisjoint(out.atoms_of(0)[prompt.tokens.shape[1] :])
    # No visible character is lost between the reasoning and the answer.
    tags = re.compile(f"{re.escape(chat.spec.think_open)}|{re.escape(chat.spec.think_close)}")
    said, written = tags.sub("", out.cots[0] + "\n" + out.answers[0]), tags.sub("", chat.decode(ids))
    assert sorted("".join(said.split())) == sorted("".join(written.split()))


@pytest.mark.parametrize("name", ["qwen3", "llama3_1"])
@settings(deadline=None, max_examples=60)
@given(request=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_parse_reads_back_any_plain_words(name, request):
    chat = true_chat(name)
    assume(not any(token in request for token in chat._control))
    batch = chat.render(request, think="off")
    assert chat.label_tokens(batch.tokens[0].tolist()) == batch.atoms_of(0)
