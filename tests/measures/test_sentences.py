"""Suppressed sentences against the plain Hugging Face model, its keys removed by a 4-D mask."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rim_lens.errors import ConditionError, EmptySpan
from rim_lens.measures.refusal.openers import TOY_OPENERS
from rim_lens.measures.sentences import FLOOR, sentence_effects
from rim_lens.organisms.toy.host import TOKEN
from tests.speaking import REQUESTS, Spoken

COTS = ["3 4 > 0 6 > 6", "so 1 2 > 3", "please > kindly now > so > then", "well just", "6 5 > 4 > 3 > so > 1"]


def steps(text: str) -> list[str]:
    """A sentence ends with ``>``."""
    pieces = text.split(" >")
    return [*(piece + " >" for piece in pieces[:-1]), pieces[-1]]


def log_probs(spoken: Spoken, tokens: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
    """[pos, d_vocab] of one prompt; every row after the last of the keys loses them."""
    width = tokens.shape[1]
    allowed = torch.ones(width, width).tril().bool()
    if keys is not None:
        for row in range(int(keys.nonzero().max()) + 1, width):
            allowed[row, keys] = False
    mask = torch.zeros(1, 1, width, width).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = spoken.oracle.hf(tokens, attention_mask=mask, position_ids=torch.arange(width)[None]).logits
    return logits[0].double().log_softmax(dim=-1)


def refusal(log_probs: torch.Tensor) -> float:
    refuse = float(log_probs[-1, TOKEN[TOY_OPENERS[0]]])
    return refuse - math.log1p(-math.exp(refuse))


@pytest.mark.family_contract
def test_suppressing_equals_removing_keys_of_the_plain_model(spoken: Spoken) -> None:
    chat = spoken.chat
    batch = chat.render(REQUESTS, think=COTS)
    found = sentence_effects(spoken.model, batch, chat=chat, split=steps)
    assert found["log_kl"].dims == ("prompt", "suppressed", "read")
    for row, cot in enumerate(COTS):
        tokens = batch.tokens[row][batch.attention_mask[row].bool()][None]
        start = tokens.shape[1] - 1 - len(cot.split())
        owner = torch.full((tokens.shape[1],), -1)
        place = start
        for number, sentence in enumerate(steps(cot)):
            owner[place : place + len(sentence.split())] = number
            place += len(sentence.split())
        plain = log_probs(spoken, tokens, None)
        assert float(found["refusal_score"][row]) == pytest.approx(refusal(plain), abs=1e-4)
        n = len(steps(cot))
        for suppressed in range(found.sizes["suppressed"]):
            if suppressed >= n:
                assert np.isnan(found["refusal_effect"][row, suppressed])
                assert np.isnan(found["log_kl"][row, suppressed]).all()
                continue
            edited = log_probs(spoken, tokens, owner == suppressed)
            change = refusal(edited) - refusal(plain)
            assert float(found["refusal_effect"][row, suppressed]) == pytest.approx(change, abs=1e-4)
            last = int((owner == suppressed).nonzero().max())
            for read in range(found.sizes["read"]):
                value = float(found["log_kl"][row, suppressed, read])
                logs = [
                    math.log(float((plain[at - 1].exp() * (plain[at - 1] - edited[at - 1])).sum()))
                    for at in (owner == read).nonzero().flatten().tolist()
                    if at > last + 1 and read > suppressed
                ]
                if not logs:
                    assert math.isnan(value)
                else:
                    assert value == pytest.approx(sum(logs) / len(logs), abs=2e-3)
                    assert value > math.log(FLOOR) / 2


def test_texts_and_lengths_go_along(spoken_gqa: Spoken) -> None:
    batch = spoken_gqa.chat.render(REQUESTS, think=COTS)
    found = sentence_effects(spoken_gqa.model, batch, split=steps, refusal=False)
    assert found["text"][0].values.tolist() == ["3 4 >", "0 6 >", "6", "", ""]
    assert found["n_tokens"][0].values.tolist() == [3, 3, 1, 0, 0]
    assert "refusal_effect" not in found
    assert found["prompt"].values.tolist() == [prompt.id for prompt in REQUESTS]


def test_few_sentences_at_a_time_give_the_same(spoken_gqa: Spoken, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = spoken_gqa.chat.render(REQUESTS, think=COTS)
    whole = sentence_effects(spoken_gqa.model, batch, split=steps, refusal=False)
    monkeypatch.setattr("rim_lens.measures.sentences._MOST_LOGITS", 1)
    alone = sentence_effects(spoken_gqa.model, batch, split=steps, refusal=False)
    np.testing.assert_allclose(alone["log_kl"], whole["log_kl"], atol=1e-2)


def test_prompts_that_do_not_end_at_the_answer(spoken_gqa: Spoken) -> None:
    chat = spoken_gqa.chat
    said = chat.render(REQUESTS[:2], think=COTS[:2], answers="6")
    for batch in (said, replace(said, answers=("", ""), n_generated=(1, 1))):
        with pytest.raises(ConditionError, match="refusal=False"):
            sentence_effects(spoken_gqa.model, batch, split=steps)
    assert sentence_effects(spoken_gqa.model, said, split=steps, refusal=False)["log_kl"].notnull().any()
    with pytest.raises(EmptySpan):
        sentence_effects(spoken_gqa.model, chat.render(REQUESTS[:2], think="off"))


def test_harmful_requests_keep_first_words_only(spoken_gqa: Spoken) -> None:
    long = " ".join(["so"] * 30)
    harmful = [replace(REQUESTS[0], kind="harmful")]
    given = spoken_gqa.chat.render(harmful, think=long)
    assert (
        sentence_effects(spoken_gqa.model, given, refusal=False)["text"].item() == long
    )  # nobody wrote it but us
    batch = replace(given, n_generated=(len(long.split()) + 1,))
    hidden = sentence_effects(spoken_gqa.model, batch, refusal=False)["text"].item()
    whole = sentence_effects(spoken_gqa.model, batch, refusal=False, keep_text=True)["text"].item()
    assert len(hidden) < len(whole) == len(long)
