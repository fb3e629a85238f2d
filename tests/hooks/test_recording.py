"""A recording against what the plain model's projections received."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rim_lens.errors import NotFinite, ReferenceMismatch, UnknownHead, UnknownLayer
from rim_lens.hooks import AblateHeads, Recording, record
from tests.families import Case, close, random_batch, wrapped

pytestmark = pytest.mark.family_contract


def test_it_holds_what_the_model_computed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rim_lens.hooks.recording.MAX_TOKENS", 20)  # several passes, out of order
    heads = [(1, 2), (0, 3), (1, 0)]
    found = record(case.model, case.batch, ["z", "post", "resid_post", "pattern"], heads=heads)
    real = case.batch.attention_mask.bool()
    for layer in range(case.facts.n_layers):
        for site, truth in (
            ("z", case.truth.z),
            ("post", case.truth.post),
            ("resid_post", case.truth.resid_post),
        ):
            close(found.activations[site, layer][real], truth[layer][real])
            assert not found.activations[site, layer][~real].any()
    for place, (layer, head) in enumerate([(1, 0), (1, 2)]):
        for prompt, query in real.nonzero().tolist():
            close(
                found.activations["pattern", layer][prompt, place, query],
                case.truth.patterns[layer][prompt, head, query],
            )
    assert found.heads == ((0, 3), (1, 0), (1, 2))
    assert found.facts == case.facts
    assert found.batch is case.batch


def test_it_is_of_the_model_without_components(case_gqa: Case) -> None:
    plain = record(case_gqa.model, case_gqa.batch, ["z"], layers=[1])
    with AblateHeads([(0, 0), (0, 1)]).on(case_gqa.model):
        inside = record(case_gqa.model, case_gqa.batch, ["z"], layers=[1])
    assert list(inside.activations) == [("z", 1)]
    assert torch.equal(inside.activations["z", 1], plain.activations["z", 1])
    assert inside.digest == plain.digest
    assert inside != plain  # by identity: tensors have no one truth value
    assert repr(plain) == f"Recording(4 prompts, z of 1 layers:{plain.digest})"
    other = record(case_gqa.model, random_batch(seed=12), ["z"], layers=[1])
    assert other.digest != plain.digest


def test_what_cannot_be_recorded(case_gqa: Case) -> None:
    model, batch = case_gqa.model, case_gqa.batch
    with pytest.raises(UnknownLayer, match="0 to 1"):
        record(model, batch, ["z"], layers=[2])
    with pytest.raises(UnknownLayer, match="no layer"):
        record(model, batch, ["z"], layers=[])
    with pytest.raises(UnknownHead):
        record(model, batch, ["pattern"], heads=[(0, 6)])
    with pytest.raises(UnknownHead, match="no head named"):
        record(model, batch, ["pattern"])
    with pytest.raises(ReferenceMismatch, match="vocabulary"):
        record(model, random_batch(vocabulary=500), ["z"])
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_what_is_not_a_number_is_refused(case_gqa: Case) -> None:
    model = wrapped("qwen3", "bridge" if case_gqa.family != "hooked" else "hooked", seed=3)
    sound = record(model, case_gqa.batch, ["z"])
    broken = {spot: tensor.clone() for spot, tensor in sound.activations.items()}
    broken["z", 1][2, -1] = float("nan")
    with pytest.raises(NotFinite, match=r"layer 1 .* 1 of 4 prompts .first: '2'"):
        replace(sound, activations=broken)
    with torch.no_grad():
        for parameter in model.blocks[1].parameters():
            parameter.fill_(1e30)
    with pytest.raises(NotFinite):
        record(model, case_gqa.batch, ["post", "resid_post"], layers=[1])


def test_a_recording_of_another_shape_is_refused(case_gqa: Case) -> None:
    sound = record(case_gqa.model, case_gqa.batch, ["z"])
    with pytest.raises(ReferenceMismatch, match=r"should begin with \(3, "):
        replace(sound, batch=case_gqa.batch.select([0, 1, 2]))
    with pytest.raises(ReferenceMismatch, match="'d_head': 13"):
        sound.require(replace(case_gqa.facts, d_head=13), [("z", 0)])
    with pytest.raises(ReferenceMismatch, match="was not recorded"):
        sound.require(case_gqa.facts, [("post", 0)])
    with pytest.raises(ReferenceMismatch, match="pattern of head"):
        sound.require(case_gqa.facts, [], [(0, 0)])


def test_processes_that_share_work_call_a_recording_alike(
    case_gqa: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read under it is kept by its name, which a last bit of another machine must not change."""
    own = record(case_gqa.model, case_gqa.batch, ["z"])
    told: list[str] = []
    monkeypatch.setattr("rim_lens.hooks.recording.n_processes", lambda: 2)
    monkeypatch.setattr(
        "rim_lens.hooks.recording.agreed", lambda _, measure: told.append(measure()) or "0f" * 4
    )
    shared = record(case_gqa.model, case_gqa.batch, ["z"])
    assert told == [own.digest]
    assert repr(shared) == repr(own).replace(own.digest, "0f" * 4)


def test_a_dtype_may_be_widened_but_not_rounded(case_gqa: Case) -> None:
    sound = record(case_gqa.model, case_gqa.batch, ["z"])
    half = Recording(
        sound.batch, sound.facts, {spot: tensor.bfloat16() for spot, tensor in sound.activations.items()}
    )
    half.require(case_gqa.facts, [("z", 0)])
    with pytest.raises(ReferenceMismatch, match="round"):
        sound.require(replace(case_gqa.facts, dtype=torch.bfloat16), [("z", 0)])
    with pytest.raises(ReferenceMismatch, match="round"):
        half.require(replace(case_gqa.facts, dtype=torch.float16), [("z", 0)])
