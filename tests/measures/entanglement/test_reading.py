"""Two models through the whole measurement: against the plain models, resumed, and refused where they do not compare."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import rim_lens as rl
from rim_lens.errors import (
    ConditionError,
    NotEnoughData,
    NotFinite,
    ReferenceMismatch,
    StatisticsError,
    StudyFolderError,
)
from rim_lens.lens import wrap_hf
from rim_lens.measures.entanglement import reading as reading_file
from rim_lens.measures.entanglement.divergence import divergence_from, keep_log_probs, task_rows
from rim_lens.measures.entanglement.drift import keep_weights, weight_drift, weights_of
from rim_lens.measures.entanglement.reading import (
    ModelReading,
    check_comparable,
    read_model,
    write_responses,
)
from rim_lens.organisms.toy.host import toy_model, toy_tokenizer
from rim_lens.organisms.toy.shipped import load_toy
from tests.families import hf_model, wrapped

NEURONS = [(0, 3), (1, 7), (1, 40)]


@pytest.fixture(scope="module")
def toys():
    return {name: rl.load_model(name) for name in ("toy", "toy:deviate")}


@pytest.fixture(scope="module")
def chat(toys):
    return rl.ChatFormat.from_model(toys["toy"])


@pytest.fixture(scope="module")
def asked():
    return [
        rl.load_prompts(kind, language="toy", split="evaluate")[:12]
        for kind in ("harmful", "harmless", "reasoning")
    ]


@pytest.fixture(scope="module")
def read(toys, chat, asked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("read")
    base = read_model(toys["toy"], chat, *asked, folder=folder / "base")
    return base, read_model(toys["toy:deviate"], chat, *asked, folder=folder / "tuned", against=base)


def plain_logits(variant, batch):
    positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        model, _ = load_toy(variant)
        return model(
            batch.tokens, attention_mask=batch.attention_mask, position_ids=positions
        ).logits.double()


def test_kl_equals_torch_distributions_on_the_logits_of_the_plain_models(read):
    base, tuned = read
    batch = base.written["reasoning"]
    ours, theirs = (
        torch.distributions.Categorical(logits=plain_logits(variant, batch)) for variant in ("", "deviate")
    )
    apart = torch.distributions.kl_divergence(ours, theirs)
    for row in range(len(batch)):
        atoms = batch.atoms_of(row)
        start = batch.tokens.shape[1] - len(atoms)
        first_written = len(atoms) - batch.n_generated[row]
        predicted = [
            place
            for place, atom in enumerate(atoms)
            if place > 0 and (atom in ("cot", "answer") or place >= first_written)
        ]
        expected = np.mean([float(apart[row, start + place - 1]) for place in predicted])
        assert float(tuned.divergence[row]) == pytest.approx(expected, rel=1e-4)
    assert base.divergence is None


def test_a_question_alone_is_read_at_its_last_row(chat, asked):
    rows = task_rows(chat.render(asked[2], think="off"))
    assert rows.sum(dim=1).tolist() == [1] * 12
    assert rows[:, -1].all()


def test_drift_equals_a_loop_over_the_plain_models_weights(read):
    # TransformerLens cuts and turns weights; no norm changes by that.
    ours, theirs = (load_toy(variant)[0].state_dict() for variant in ("", "deviate"))
    moved = sum(float((theirs[name] - ours[name]).double().square().sum()) for name in ours)
    whole = sum(float(tensor.double().square().sum()) for tensor in ours.values())
    drift = read[1].drift
    assert drift.relative == pytest.approx(math.sqrt(moved / whole), rel=1e-6)
    assert math.sqrt((drift.table["moved_norm"] ** 2).sum()) == pytest.approx(math.sqrt(moved), rel=1e-6)


@pytest.mark.parametrize("architecture", ["gpt2_relu", "qwen3"])
def test_every_weight_counts_once(architecture):
    plain = hf_model(architecture)
    found = weights_of(wrapped(architecture, "auto"))
    numbers = sum(parameter.numel() for parameter in plain.parameters())
    # TransformerLens 3 gives the unembedding a bias of zeros that the model does not have; no training moves it.
    made = found.pop("lm_head.bias", None)
    assert made is None or not made.any()
    assert sum(tensor.numel() for tensor in found.values()) == numbers


def test_drift_is_the_norm_of_the_difference_however_it_is_cut(toys, monkeypatch):
    base, tuned = (weights_of(toys[name]) for name in ("toy", "toy:deviate"))
    before, after = (
        np.concatenate([some[name].double().numpy().ravel() for name in base]) for some in (base, tuned)
    )
    expected = np.linalg.norm(after - before) / np.linalg.norm(before)
    for piece in (97, 2**30):
        monkeypatch.setattr("rim_lens.measures.entanglement.drift._PIECE", piece)
        assert weight_drift(toys["toy"], toys["toy:deviate"]).relative == pytest.approx(expected, rel=1e-6)


def test_drift_through_the_disk_is_that_in_memory(toys, tmp_path):
    keep_weights(toys["toy"], tmp_path)
    kept = weight_drift(tmp_path, toys["toy:deviate"])
    here = weight_drift(toys["toy"], toys["toy:deviate"])
    assert kept.relative == here.relative
    assert kept.table.equals(here.table)
    with pytest.raises(StudyFolderError):
        weight_drift(tmp_path / "nothing", toys["toy"])
    with pytest.raises(ReferenceMismatch):
        weight_drift(tmp_path, wrapped("gpt2_relu", "auto"))


def test_activations_are_those_of_capture_and_scores_those_of_refusal_score(read, toys, chat, asked):
    base, _ = read
    batch = base.written["harmful"]
    seen = rl.capture(toys["toy"], batch, rl.NeuronActivations(pool="max"))["neuron_activation"]
    assert np.array_equal(base.activations["harmful"].values, seen.values)
    score = rl.refusal_score(toys["toy"], chat.render(asked[0], think="off"))
    assert base.refusal["harmful"].values.tolist() == score.values.tolist()
    assert base.families("harmful") == [prompt.family for prompt in asked[0]]
    own = write_responses(toys["toy"], chat, *asked)
    assert {kind: one.digest for kind, one in own.items()} == {
        kind: one.digest for kind, one in base.written.items()
    }


def test_a_whole_reading_is_not_read_again_and_one_cut_short_goes_on(
    toys, chat, asked, tmp_path, monkeypatch
):
    first = read_model(toys["toy"], chat, *asked, folder=tmp_path)
    (tmp_path / "reading.json").unlink()
    (tmp_path / "reasoning" / "read.json").unlink()
    (tmp_path / "harmless" / "refusal.json").unlink()
    done = []
    real = reading_file.capture
    monkeypatch.setattr(
        reading_file, "capture", lambda *args, **more: done.append(args[1].name) or real(*args, **more)
    )
    again = read_model(toys["toy"], chat, *asked, folder=tmp_path)
    assert done == ["careful"]  # the reasoning prompts alone
    monkeypatch.setattr(reading_file, "generate", None)
    whole = read_model(toys["toy"], chat, *asked, folder=tmp_path)
    for other in (again, whole, ModelReading.load(tmp_path)):
        for kind, values in first.activations.items():
            assert other.activations[kind].identical(values)
            assert other.residual[kind].identical(first.residual[kind])
        assert other.settings == first.settings
    with pytest.raises(StudyFolderError, match="weights_digest"):
        read_model(toys["toy:deviate"], chat, *asked, folder=tmp_path)


def test_nothing_that_was_written_to_harmful_requests_is_kept(toys, chat, asked, tmp_path):
    made = read_model(toys["toy"], chat, *asked, folder=tmp_path)
    assert made.written["harmful"].n_generated[0] > 0
    texts = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert not any("REFUSE" in text for text in texts)
    task = json.loads((tmp_path / "task" / "prompts.json").read_text())
    assert task == [prompt.id for prompt in asked[2]]


def test_what_was_not_asked_for_leaves_no_folder(toys, chat, asked):
    made = read_model(toys["toy"], chat, *asked, response="none", parts=())
    folder = made.folder
    assert folder.exists()
    assert not made.residual
    assert not made.refusal
    made.passing.cleanup()
    assert not folder.exists()


def test_entanglement_reads_one_model_after_the_other_and_goes_on_from_its_folder(
    asked, tmp_path, monkeypatch
):
    loaded = []

    def load(name):
        loaded.append(name)
        return rl.load_model(name)

    def measure(folder):
        return rl.entanglement(
            lambda: load("toy"), lambda: load("toy:deviate"), None, asked[0], asked[2], NEURONS,
            harmless=asked[1], response="base", n_random_sets=10, n_boot=30, folder=folder,
        )  # fmt: skip

    found = measure(tmp_path)
    assert loaded == ["toy", "toy:deviate"]
    assert found.value("weight_drift", "model") > 0.01
    assert found.value("kl", "model") > 0
    assert found.row("kl", "model")["low"] < found.value("kl", "model")
    assert found.value("refusal_change_harmful", "model") < 0
    assert found.settings["base"]["prompts"] == found.settings["tuned"]["prompts"]
    assert set(found.layers["layer"]) == {0, 1}
    assert len(found.rows) == 36
    again = measure(tmp_path)
    assert again.table.equals(found.table)
    assert rl.Entanglement.load(tmp_path).table.equals(found.table)


def test_both_models_may_read_what_the_base_wrote(toys, chat, asked):
    base = read_model(toys["toy"], chat, *asked, parts=())
    tuned = read_model(toys["toy:deviate"], chat, *asked, parts=(), against=base, response=base.written)
    seen = rl.capture(toys["toy:deviate"], base.written["harmful"], rl.NeuronActivations())[
        "neuron_activation"
    ]
    assert np.array_equal(tuned.activations["harmful"].values, seen.values)
    short = [part[:3] for part in asked]
    with pytest.raises(ConditionError, match="same prompts"):
        read_model(toys["toy:deviate"], chat, *short, parts=(), response=base.written)


def test_the_same_model_twice_has_not_moved(toys, chat, asked):
    found = rl.entanglement(
        toys["toy"], toys["toy"], chat, asked[0], asked[2], NEURONS, harmless=asked[1], response="none", n_boot=10
    )  # fmt: skip
    assert found.value("ras") == 0
    assert found.value("weight_drift", "model") == 0
    assert found.value("kl", "model") == pytest.approx(0, abs=1e-9)
    assert found.value("cka_harmful", "model") == 1
    assert math.isnan(found.value("cka_ratio", "model"))
    assert "same weights" in found.settings["notes"][0]


def test_channels_of_the_mlp_output_can_stand_for_neurons(toys, chat, asked):
    found = rl.entanglement(
        toys["toy"], toys["toy:deviate"], chat, asked[0], asked[2], [(0, 63), (1, 2)],
        site="mlp_out", response="none", n_random_sets=5, n_boot=5,
    )  # fmt: skip
    assert found.sets["n"].tolist()[:2] == [128, 2]


def spoilt():
    hf, its = load_toy("")
    with torch.no_grad():
        hf.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    return wrap_hf(hf, its)


def test_models_that_do_not_compare_are_refused(toys, chat, asked):
    base = read_model(toys["toy"], chat, *asked, response="none")
    harmful, _, reasoning = asked
    with pytest.raises(ReferenceMismatch, match="d_model"):
        read_model(wrapped("gpt2_relu", "auto"), chat, *asked, against=base, response="none")
    with pytest.raises(ReferenceMismatch, match="tokenizers have other words"):
        check_comparable(base.settings, {**base.settings, "vocabulary": "another"})
    with pytest.raises(ReferenceMismatch, match="pool"):
        read_model(toys["toy"], chat, *asked, against=base, response="none", pool="mean")
    with pytest.raises(ReferenceMismatch, match="prompts"):
        read_model(toys["toy"], chat, harmful[:-1], asked[1], reasoning, against=base, response="none")
    with pytest.raises(NotFinite):
        read_model(spoilt(), chat, *asked, against=base, response="none")
    with pytest.raises(ConditionError):
        read_model(toys["toy"], chat, *asked, response="theirs")
    with pytest.raises(StatisticsError):
        read_model(toys["toy"], chat, *asked, parts=["weights"])


@pytest.mark.parametrize("missing", ["harmful", "reasoning"])
def test_without_prompts_no_model_is_loaded(asked, missing):
    given = {"harmful": asked[0], "reasoning": asked[2], missing: []}

    def never():
        raise AssertionError("loaded")

    with pytest.raises(NotEnoughData, match=missing):
        rl.entanglement(never, never, None, given["harmful"], given["reasoning"], NEURONS)
    with pytest.raises(NotEnoughData, match="empty set"):
        rl.entanglement(never, never, None, asked[0], asked[2], [])


def test_prompts_that_chose_the_neurons_are_refused(asked, toys):
    from rim_lens.measures.held_out import chosen_by

    found = rl.NeuronSet.of(toys["toy"], NEURONS, made_by=chosen_by(asked[0][:2]))

    def never():
        raise AssertionError("loaded")

    with pytest.raises(StatisticsError, match="chose the neurons"):
        rl.entanglement(never, never, None, asked[0], asked[2], found)


def test_damaged_log_probabilities_are_named(toys, chat, asked, tmp_path):
    keep_log_probs(toys["toy"], chat.render(asked[2], think="off"), tmp_path)
    (tmp_path / "log_probs.npy").write_bytes(b"short")
    with pytest.raises(StudyFolderError, match="log-probabilities"):
        divergence_from(tmp_path, toys["toy"])


def test_kl_over_another_vocabulary_is_refused(chat, toys, asked, tmp_path):
    keep_log_probs(toys["toy"], chat.render(asked[2], think="off"), tmp_path)
    hf = toy_model()
    hf.resize_token_embeddings(80)
    with pytest.raises(ReferenceMismatch, match="vocabulary"):
        divergence_from(tmp_path, wrap_hf(hf.eval(), toy_tokenizer()))
