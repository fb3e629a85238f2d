"""Receiver heads: sentence × sentence matrices averaged by hand from the full pattern, and kurtosis by formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import rim_lens as rl
from rim_lens.capturing import capture
from rim_lens.chat.sentences import cot_sentences
from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import EmptySpan, NotEnoughData, StatisticsError, WrongHookShape
from rim_lens.hooks import bound
from rim_lens.measures.heads.receiving import _kurtosis, _Received
from rim_lens.organisms.toy.host import TOKEN
from tests.speaking import REQUESTS, Spoken

# Eight, nine, five, three and seven sentences, of one to four words each.
COTS = [
    "3 4 > 0 > 6 6 > so > 1 2 3 > 4 > 5 > 6",
    "so 1 2 > 3 > now > 4 4 4 > 0 > 1 > 2 3 > so > then",
    "please > kindly now > so > then > just 1",
    "well just > so > 6",
    "6 5 > 4 > 3 > so > 1 > 2 2 > 0",
]
DISTANCE = 2


def steps(text: str) -> list[str]:
    """A sentence ends with ``>``."""
    pieces = text.split(" >")
    return [*(piece + " >" for piece in pieces[:-1]), pieces[-1]]


def received_by_hand(patterns: list[torch.Tensor], owner: list[int], n: int, distance: int) -> np.ndarray:
    """[layer, head, sentence] of one unpadded prompt: the paper's steps, one sentence pair at a time."""
    out = np.full((len(patterns), patterns[0].shape[0], n), np.nan)
    places = [[at for at, own in enumerate(owner) if own == sentence] for sentence in range(n)]
    for layer, heads in enumerate(patterns):
        for head, pattern in enumerate(heads.double().numpy()):
            matrix = [[pattern[np.ix_(later, earlier)].mean() for earlier in places] for later in places]
            for sentence in range(n - distance):
                out[layer, head, sentence] = np.mean(
                    [matrix[later][sentence] for later in range(sentence + distance, n)]
                )
    return out


def owners(batch: SpanBatch, row: int) -> list[int]:
    """Which sentence each token is in, from the words alone: a sentence ends with ``>``."""
    own, sentence = [], 0
    for atom, token in zip(
        batch.atoms_of(row), batch.tokens[row][batch.attention_mask[row].bool()].tolist(), strict=True
    ):
        own.append(sentence if atom == "cot" else -1)
        sentence += atom == "cot" and token == GREATER
    return own


def kurtosis_by_hand(values: np.ndarray) -> float:
    """m₄ / m₂² − 3 of the numbers there are."""
    numbers = [value for value in values.tolist() if math.isfinite(value)]
    mean = sum(numbers) / len(numbers)
    m2, m4 = (sum((value - mean) ** power for value in numbers) / len(numbers) for power in (2, 4))
    return m4 / m2**2 - 3


GREATER = TOKEN[">"]


@pytest.mark.family_contract
def test_sentences_receive_what_the_full_pattern_says(spoken: Spoken) -> None:
    batch = spoken.chat.render(REQUESTS, think=COTS)
    data = rl.receiver_kurtosis(spoken.model, batch, split=steps, min_distance=DISTANCE, max_rows=2)
    assert data["received"].dims == ("prompt", "layer", "head", "sentence")
    assert data["n_sentences"].values.tolist() == [8, 9, 5, 3, 7]
    for row in range(len(batch)):
        alone = batch.select([row])
        with torch.no_grad():
            _, cache = spoken.model.run_with_cache(alone.tokens, attention_mask=alone.attention_mask)
        layers = range(spoken.model.cfg.n_layers)
        patterns = [cache[f"blocks.{layer}.attn.hook_pattern"][0] for layer in layers]
        n = int(data["n_sentences"][row])
        expected = received_by_hand(patterns, owners(batch, row), n, DISTANCE)
        np.testing.assert_allclose(data["received"][row, ..., :n], expected, atol=1e-6)
        assert data["received"][row, ..., n:].isnull().all()
        if n >= DISTANCE + 4:
            by_hand = np.apply_along_axis(kurtosis_by_hand, -1, expected)
            np.testing.assert_allclose(data["kurtosis"][row], by_hand, atol=2e-3, rtol=2e-3)
        else:
            assert data["kurtosis"][row].isnull().all()
            assert np.isnan(data["kurtosis_uniform"][row])
    assert data.attrs["n_too_short"] == 2


def test_batched_equals_one_by_one_and_written_equals_given(spoken_gqa: Spoken) -> None:
    batch = spoken_gqa.chat.render(REQUESTS, think=COTS)
    together = rl.receiver_kurtosis(spoken_gqa.model, batch, split=steps, min_distance=DISTANCE)
    alone = rl.receiver_kurtosis(spoken_gqa.model, batch, split=steps, min_distance=DISTANCE, max_rows=1)
    np.testing.assert_allclose(together["received"], alone["received"], atol=1e-6)
    # What stands after the chain does not look back into it, and nothing there is read.
    said = spoken_gqa.chat.render(REQUESTS, think=COTS, answers="6 so")
    after = rl.receiver_kurtosis(spoken_gqa.model, said, split=steps, min_distance=DISTANCE)
    np.testing.assert_allclose(together["received"], after["received"], atol=1e-6)


def planted_pattern(n_sentences: int, length: int, marks: dict[int, float], rest: float) -> torch.Tensor:
    """[prompt, head, query, key]: each row puts `marks` on all tokens of those sentences, `rest` on the others."""
    per_key = torch.full((n_sentences,), rest)
    for sentence, share in marks.items():
        per_key[sentence] = share
    width = n_sentences * length
    return per_key.repeat_interleave(length).expand(1, 1, width, width).clone()


def test_a_planted_anchor_has_the_kurtosis_of_one_spike(spoken_gqa: Spoken) -> None:
    """n − 1 equal numbers and one other: m₄ / m₂² = (n² − 3n + 3) / (n − 1), whatever the numbers."""
    n, length, distance = 14, 3, 4
    sentences = torch.arange(n).repeat_interleave(length)[None]
    reader = _Received(sentences, n, distance)
    reader._reduce(0, planted_pattern(n, length, {3: 0.25}, 0.01))
    found = reader.collect()["received"][0, 0, 0]
    scored = n - distance
    np.testing.assert_allclose(found[:scored], [0.25 if at == 3 else 0.01 for at in range(scored)], rtol=1e-5)
    assert found[scored:].abs().max() == 0
    m = scored
    expected = (m**2 - 3 * m + 3) / (m - 1) - 3
    assert float(_kurtosis(found[:scored].double().numpy())) == pytest.approx(expected, rel=1e-4)


def test_near_rows_do_not_count() -> None:
    """All attention goes to the sentence three back: with a distance of four nothing is received."""
    n, length = 12, 2
    sentences = torch.arange(n).repeat_interleave(length)[None]
    back = torch.arange(n * length)[:, None] // length - torch.arange(n * length)[None] // length
    pattern = (back == 3).float()[None, None] / length
    for distance, expected in ((4, 0.0), (3, 1 / length)):
        reader = _Received(sentences, n, distance)
        reader._reduce(0, pattern)
        last = reader.collect()["received"][0, 0, 0, n - 1 - distance]  # read by one sentence only
        assert float(last) == pytest.approx(expected)


def test_long_sentences_weigh_no_more_than_short_ones() -> None:
    owner = [0, 1, 1, 1, 1, 2]  # sentence 1 has four rows that give 0.1, sentence 2 one that gives 0.5
    pattern = torch.zeros(1, 1, 6, 6)
    pattern[..., 1:5, 0], pattern[..., 5, 0] = 0.1, 0.5
    reader = _Received(torch.tensor([owner]), 3, 1)
    reader._reduce(0, pattern)
    assert float(reader.collect()["received"][0, 0, 0, 0]) == pytest.approx(0.3)


def test_kurtosis_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    values = rng.standard_exponential((3, 4, 12))
    np.testing.assert_allclose(_kurtosis(values), stats.kurtosis(values, axis=-1))
    values[0, 0, 7:] = np.nan
    np.testing.assert_allclose(_kurtosis(values)[0, 0], stats.kurtosis(values[0, 0, :7]))


def test_rounding_has_no_shape() -> None:
    flat = np.full(9, 0.1) + 1e-9 * np.random.default_rng(0).standard_normal(9)
    assert np.isnan(_kurtosis(flat))


def test_uniform_attention_is_the_yardstick(spoken_gqa: Spoken) -> None:
    batch = spoken_gqa.chat.render(REQUESTS, think=COTS)
    data = rl.receiver_kurtosis(spoken_gqa.model, batch, split=steps, min_distance=DISTANCE)
    for row in (0, 1, 4):
        alone = batch.select([row])
        width = alone.tokens.shape[1]
        flat = torch.ones(width, width).tril() / torch.arange(1, width + 1)[:, None]
        n = int(data["n_sentences"][row])
        expected = received_by_hand([flat[None]], owners(batch, row), n, DISTANCE)[0, 0]
        found = float(data["kurtosis_uniform"][row])
        assert found == pytest.approx(kurtosis_by_hand(expected), abs=1e-3)


def test_what_is_refused(spoken_gqa: Spoken) -> None:
    model, chat = spoken_gqa.model, spoken_gqa.chat
    batch = chat.render(REQUESTS, think=COTS)
    with pytest.raises(NotEnoughData, match=r"has 9 sentences.*needs 10"):
        rl.receiver_kurtosis(model, batch, split=steps, min_distance=6)
    with pytest.raises(NotEnoughData, match="has 1 sentences"):
        rl.receiver_kurtosis(model, batch)
    with pytest.raises(StatisticsError, match="min_distance is 0"):
        rl.receiver_kurtosis(model, batch, min_distance=0)
    with pytest.raises(EmptySpan):
        rl.receiver_kurtosis(model, chat.render(REQUESTS, think="off"))
    found = cot_sentences(chat, batch, steps)
    reader = _Received(found.index[:2], 9, DISTANCE)
    with pytest.raises(WrongHookShape, match="one pass"):
        capture(model, batch, reader)
    with bound([reader], batch), pytest.raises(WrongHookShape, match="one pass"):
        reader._reduce(0, torch.zeros(2, 1, 1, found.index.shape[1]))
