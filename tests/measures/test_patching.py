"""Patching tables on the planted circuit, whose paths are known, and against one patch at a time by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rim_lens.chat import ChatFormat
from rim_lens.errors import EmptySpan, NotEnoughData, ReferenceMismatch, UnknownHead, UnknownLayer
from rim_lens.hooks import AblateHeads, BlockAttention, PatchHeads, PatchResidual
from rim_lens.lens import load_model, model_facts
from rim_lens.measures.patching import head_patching, patching_table, span_patching
from rim_lens.measures.refusal.score import refusal_score
from rim_lens.organisms.planted import DECOY_HEAD, READER, TOPIC_HEAD
from rim_lens.prompts import load_prompts

N = 8
STRONG = 0.5  # of what patching everything would do
WEAK = 0.05


@pytest.fixture(scope="module", params=["planted", "planted:1", "planted:2"])
def setting(request):
    model = load_model(request.param)
    chat = ChatFormat.from_model(model)
    harmful = load_prompts("harmful", language="toy", split="select")
    twins = {prompt.id: prompt for prompt in load_prompts("harmless", language="toy", split="select")}
    harmful = harmful[:: len(harmful) // N][:N]
    assert len({prompt.family for prompt in harmful}) > 2
    batches = {
        "off": chat.render(harmful, think="off", label="off"),
        "careful": chat.render(harmful, think=chat.cots(harmful, "careful"), label="careful"),
        "twins": chat.render([twins[prompt.twin] for prompt in harmful], think="off", label="twins"),
    }
    return model, batches


def recovered(effects):
    """(layer, head or span) → mean effect as a share of what patching everything would do."""
    share = (effects["effect"].mean("prompt") / effects["reach"].mean()).to_series()
    return {cell: float(value) for cell, value in share.items()}


@pytest.mark.parametrize(("target", "source"), [("careful", "off"), ("off", "careful")])
def test_between_off_and_a_chain_the_reader_alone_makes_the_difference(setting, target, source):
    """Both ways: what the reader writes is needed for refusal and enough for it; the decoy looks alike and is neither."""
    model, batches = setting
    found = recovered(head_patching(model, batches[target], batches[source]))
    assert found.pop(READER) > STRONG
    assert DECOY_HEAD in found
    assert max(abs(value) for value in found.values()) < WEAK


def test_knocking_heads_out_one_by_one_finds_the_planted_path_and_not_the_decoy(setting):
    model, batches = setting
    off = batches["off"]
    base = refusal_score(model, off).values
    fall = {
        head: float((refusal_score(model, off, AblateHeads([head])).values - base).mean())
        for head in model_facts(model).heads()
    }
    reach = float(refusal_score(model, batches["twins"]).mean() - base.mean())
    assert fall.pop(READER) / reach > STRONG
    assert fall.pop(TOPIC_HEAD) / reach > STRONG
    assert max(abs(value / reach) for value in fall.values()) < WEAK


def test_blocking_attention_head_by_head_finds_the_planted_edges_and_not_the_decoy(setting):
    """The topic head has to see the request, the reader the tags; the decoy sees the tags as well, and need not."""
    model, batches = setting
    off = batches["off"]
    base = refusal_score(model, off).values
    reach = float(refusal_score(model, batches["twins"]).mean() - base.mean())
    share = {
        (head, key): float(
            (refusal_score(model, off, BlockAttention("all", key, [head])).values - base).mean()
        )
        / reach
        for head in model_facts(model).heads()
        for key in ("request", "think_open", "assistant")
    }
    assert share.pop((TOPIC_HEAD, "request")) > STRONG
    # Of two tags one is left to the reader, and either is enough.
    assert abs(share.pop((READER, "think_open"))) < STRONG
    assert max(abs(value) for value in share.values()) < WEAK
    tags = off.spans["think_open"] | off.spans["think_close"]
    for head, needs in ((READER, True), (DECOY_HEAD, False)):
        blocked = refusal_score(model, off, BlockAttention("prompt_last", tags, [head])).values
        assert ((blocked - base).mean() / reach > STRONG) == needs


@pytest.mark.parametrize(("target", "source"), [("twins", "off"), ("off", "twins")])
def test_between_a_request_and_its_twin_the_whole_planted_path_makes_the_difference(setting, target, source):
    model, batches = setting
    found = recovered(head_patching(model, batches[target], batches[source]))
    assert found.pop(READER) > STRONG
    assert found.pop(TOPIC_HEAD) > STRONG
    assert max(abs(value) for value in found.values()) < WEAK


def test_the_residual_stream_shows_the_path_from_words_to_tags_to_answer(setting):
    model, batches = setting
    found = recovered(span_patching(model, batches["twins"], batches["off"]))
    assert found[0, "request"] > STRONG  # the words
    assert found[1, "request"] < WEAK  # layer 0 has moved them on
    assert found[1, "think_open"] + found[1, "think_close"] > STRONG  # to the tags
    assert abs(found[0, "think_open"]) < WEAK
    assert max(abs(found[layer, span]) for layer in (0, 1) for span in ("sink", "assistant")) < WEAK


def test_each_cell_is_one_patch_by_hand(setting):
    model, batches = setting
    off, careful = batches["off"], batches["careful"]
    found = head_patching(model, careful, off, heads=[READER, (0, 3)], positions="prompt_last")
    base = refusal_score(model, careful).values
    for layer, head in (READER, (0, 3)):
        patched = refusal_score(model, careful, PatchHeads([(layer, head)], off, "prompt_last")).values
        np.testing.assert_allclose(found["effect"][:, layer, head], patched - base, atol=1e-5)
    assert np.isfinite(found["effect"].values).sum() == 2 * N
    np.testing.assert_allclose(found["baseline"], base)
    np.testing.assert_allclose(found["reach"], refusal_score(model, off).values - base, atol=1e-9)
    spans = span_patching(model, careful, off, spans=["think_close"], layers=[1])
    patched = refusal_score(model, careful, PatchResidual([1], off, "think_close")).values
    np.testing.assert_allclose(spans["effect"][:, 1, 0], patched - base, atol=1e-5)
    assert np.isnan(spans["effect"][:, 0]).all()
    assert (spans.attrs["target"], spans.attrs["source"]) == ("careful", "off")


def test_runs_of_the_same_prompts_differ_nowhere(setting):
    model, batches = setting
    off = batches["off"]
    found = head_patching(model, off, off)
    # What is put in was computed the plain way, what it replaces in a pack: float32 sums in another order, of scores of 30 nats.
    assert float(abs(found["effect"]).max()) < 3e-4
    assert float(abs(found["reach"]).max()) < 3e-4


def test_a_tuned_model_as_source(setting):
    """The last layer's residual stream carries the source's answer, whatever the target's weights made before."""
    model, batches = setting
    other = load_model("planted:5")
    found = span_patching(
        model, batches["careful"], batches["off"], spans=["think_close"], layers=[1], source_model=other
    )
    goal = refusal_score(other, batches["off"]).values
    np.testing.assert_allclose(found["reach"] + found["baseline"], goal)


def test_the_table_tests_every_cell_and_names_the_planted_head_first(setting):
    model, batches = setting
    effects = head_patching(model, batches["careful"], batches["off"])
    table = patching_table(effects)
    assert len(table) == 16
    first = table.iloc[0]
    assert (first["layer"], first["head"]) == READER
    assert first["effect_low"] <= first["effect"] <= first["effect_high"]
    assert first["recovered"] == pytest.approx(
        float(effects["effect"].mean("prompt")[READER] / effects["reach"].mean())
    )
    assert (table["p"].iloc[1:] >= first["p"]).all()


def test_what_cannot_be_patched_is_refused(setting):
    model, batches = setting
    off, careful = batches["off"], batches["careful"]
    with pytest.raises(UnknownHead):
        head_patching(model, careful, off, heads=[(0, 99)])
    with pytest.raises(UnknownLayer):
        span_patching(model, careful, off, layers=[7])
    with pytest.raises(EmptySpan):
        span_patching(model, careful, off, spans=["cot"])  # off has none
    with pytest.raises(ReferenceMismatch):
        head_patching(model, careful, off.select([0, 1]))
    with pytest.raises(ReferenceMismatch, match="another row"):
        head_patching(model, careful, off.select(list(reversed(range(N)))))
    with pytest.raises(ReferenceMismatch, match="another row"):
        span_patching(model, off, batches["twins"].select([1, 0, *range(2, N)]))
    one = head_patching(model, careful.select([0]), off.select([0]), heads=[READER])
    with pytest.raises(NotEnoughData, match="one family"):
        patching_table(one)
