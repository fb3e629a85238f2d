"""Places by name, and the stream there against the plain model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rim_lens.chat import ChatFormat
from rim_lens.errors import EmptySpan, NotFinite, UnknownSpan, WrongHookShape
from rim_lens.hooks import AblateHeads
from rim_lens.measures.probes.places import SIX, place_present, place_rows
from rim_lens.measures.probes.reading import StreamAtPlaces, stream_at
from rim_lens.organisms.toy.host import toy_tokenizer
from rim_lens.prompts import load_prompts
from tests.families import Case, close

PLACES = ("cot", "request:first", "assistant:last", "think_open", "prompt_last", "cot@0.3", "assistant-1")


def rows_by_hand(batch, row: int, place: str) -> dict[int, float]:
    """Which positions count how much, written down with loops."""

    def of(span: str) -> list[int]:
        return [pos for pos in range(batch.tokens.shape[1]) if batch.spans[span][row, pos]]

    if place == "prompt_last":
        return {batch.tokens.shape[1] - 1: 1.0}
    if place == "assistant-1":
        at = of("assistant")[-1] - 1
        return {at: 1.0} if batch.attention_mask[row, at] else {}
    if place.endswith(":first"):
        return {of(place[:-6])[0]: 1.0}
    if place.endswith(":last"):
        return {of(place[:-5])[-1]: 1.0}
    if place == "cot@0.3":
        where = of("cot")
        return {
            pos: float(np.interp(0.3 * (len(where) - 1), range(len(where)), np.eye(len(where))[number]))
            for number, pos in enumerate(where)
        }
    where = of(place)
    return {pos: 1 / len(where) for pos in where}


@pytest.mark.family_contract
def test_the_stream_at_each_place_is_that_of_the_plain_model(case: Case) -> None:
    batch = case.batch
    for site, truth in (("resid_post", case.truth.resid_post), ("mlp_out", case.truth.mlp_out)):
        found = stream_at(case.model, batch, PLACES, site=site)  # type: ignore[arg-type]
        expected = torch.full(found.shape, torch.nan)
        for row in range(len(batch)):
            for column, place in enumerate(found["place"].values):
                weights = rows_by_hand(batch, row, str(place))
                for layer, stream in enumerate(truth):
                    if weights:
                        expected[row, layer, column] = sum(
                            share * stream[row, pos] for pos, share in weights.items()
                        )
        assert torch.equal(torch.from_numpy(found.values).isnan(), expected.isnan())
        close(torch.from_numpy(found.values).nan_to_num(), expected.nan_to_num())


def test_projections_and_editors_and_prompts_one_by_one(case_gqa: Case) -> None:
    model, batch = case_gqa.model, case_gqa.batch
    whole = stream_at(model, batch, PLACES)
    vectors = torch.randn(*whole.shape[1:], generator=torch.Generator().manual_seed(1))
    projected = stream_at(model, batch, PLACES, vectors=vectors)
    np.testing.assert_allclose(
        projected.values, (whole.values * vectors.numpy()).sum(axis=-1), atol=1e-4, rtol=1e-4
    )
    edited = stream_at(model, batch, PLACES, AblateHeads([(0, 1)]))
    with AblateHeads([(0, 1)]).on(model):
        np.testing.assert_array_equal(stream_at(model, batch, PLACES).values, edited.values)
    assert float(np.nanmax(np.abs(edited.values - whole.values))) > 0.01
    alone = stream_at(model, batch, PLACES, max_rows=1)
    np.testing.assert_allclose(alone.values, whole.values, atol=1e-5, rtol=1e-5)
    reader = StreamAtPlaces(["cot"], vectors=vectors)
    with pytest.raises(WrongHookShape, match="other places"):
        reader.layout(case_gqa.facts, batch)


def test_shares_of_a_span_run_from_its_first_to_its_last_token() -> None:
    chat = ChatFormat.from_tokenizer(toy_tokenizer())
    asked = load_prompts("harmful", language="toy", split="select")[:2]
    batch = chat.render(asked, think=["1 + 2 + 3", "1 + 2"])
    weights = place_rows(batch, ["cot@0", "cot@1", "cot@0.5", "cot:first", "cot:last", "cot"])
    assert torch.equal(weights[:, 0], weights[:, 3])
    assert torch.equal(weights[:, 1], weights[:, 4])
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 6))
    one = place_rows(chat.render(asked, think="1"), ["cot@0", "cot@0.5", "cot@1", "cot"])
    assert torch.equal(one, one[:, :1].expand_as(one))


def test_a_place_that_is_not_there_is_named_and_never_zero() -> None:
    chat = ChatFormat.from_tokenizer(toy_tokenizer())
    asked = load_prompts("harmful", language="toy", split="select")[:2]
    off = chat.render(asked, think="off")
    assert place_present(off, SIX).tolist() == [[False, True, True, False, True, False]] * 2
    from rim_lens.organisms import load_model

    model = load_model("toy")
    found = stream_at(model, off, SIX)
    assert found["place"].values.tolist() == ["assistant", "think_open", "think_close"]
    assert found.attrs["absent"] == ["turn_end", "gap", "cot"]
    with pytest.raises(EmptySpan, match="Ask for 'think' instead"):
        stream_at(model, off, ["gap"])
    beyond = stream_at(model, off, ["assistant-1", "assistant+99"])
    assert beyond.attrs["absent"] == ["assistant+99"]


@pytest.mark.parametrize("name", ["words", "cot:middle", "cot@1.5", "cot+1", "", "prompt_last:first"])
def test_names_that_mean_no_place(name: str) -> None:
    chat = ChatFormat.from_tokenizer(toy_tokenizer())
    off = chat.render(load_prompts("harmful", language="toy", split="select")[:1], think="off")
    with pytest.raises(UnknownSpan, match="no place is called"):
        place_rows(off, [name])
    with pytest.raises(UnknownSpan, match="each once"):
        place_rows(off, ["cot", "cot"])


def test_a_stream_that_is_not_finite_stops_it(case_gqa: Case) -> None:
    model = case_gqa.fresh()
    with torch.no_grad():
        model.blocks[1].attn.W_O[:] = torch.nan
    with pytest.raises(NotFinite):
        stream_at(model, case_gqa.batch, ["cot"])
