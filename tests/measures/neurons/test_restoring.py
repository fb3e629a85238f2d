"""Refusal restored through neurons: where it was taken from planted ones, where all are put back, and against the plain model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import rim_lens as rl
from rim_lens.chat import ChatFormat
from rim_lens.errors import (
    ConditionError,
    MissingTwin,
    NotEnoughData,
    NotFinite,
    ReferenceMismatch,
    StatisticsError,
    StudyFolderError,
    UnknownNeuron,
    UnsupportedModel,
)
from rim_lens.lens import wrap_hf
from rim_lens.measures.held_out import chosen_by
from rim_lens.measures.neurons.restoring import COLUMNS, restore_by_neurons
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.organisms.planted import planted, planted_truth
from rim_lens.organisms.toy.host import TOKEN, toy_tokenizer
from tests.families import FAMILIES, Oracle, tiny_moe
from tests.measures.refusal.test_direction import toy
from tests.speaking import REQUESTS, fresh, ids_of, toy_speaking

TWINS = tuple(replace(one, id=f"t{one.id}") for one in REQUESTS[::-1])


def asked(step: int = 6) -> tuple[list[rl.Prompt], list[rl.Prompt]]:
    harmful, harmless = (
        rl.load_prompts(kind, language="toy", split="evaluate")[::step] for kind in ("harmful", "harmless")
    )
    return harmful, harmless


def row(table: pd.DataFrame, measure: str, kind: str) -> dict[str, Any]:
    here = table[(table["measure"] == measure) & (table["kind"] == kind)]
    assert len(here) == 1
    return here.iloc[0].to_dict()


def silenced() -> Any:
    """The planted model whose AND neurons no longer fire: what training would have taken away."""
    hf = planted()
    with torch.no_grad():
        for layer, neuron in planted_truth().neurons:
            hf.transformer.h[layer].mlp.c_fc.bias[neuron] = -100
    return wrap_hf(hf, toy_tokenizer())


def test_planted_neurons_restore_refusal_and_neither_decoys_nor_random_ones_do() -> None:
    base, chat = toy("planted")
    tuned, truth = silenced(), planted_truth()
    table = restore_by_neurons(
        base,
        tuned,
        chat,
        truth.neurons,
        *asked(9),
        n_random_sets=4,
        written=True,
        n_written=1,
        max_new_tokens=2,
    )
    assert tuple(table.columns) == COLUMNS
    assert set(table["condition"]) == {"off"}
    score, refuse = row(table, "score", "harmful"), row(table, "refuse", "harmful")
    assert (refuse["base"], refuse["tuned"], refuse["patched"], refuse["restored"]) == (1, 0, 1, 1)
    assert refuse["random"] == 0
    assert score["restored"] == pytest.approx(1, abs=1e-3)
    assert score["restored_low"] <= score["restored"] <= score["restored_high"]
    assert score["percentile"] == 100
    assert abs(score["random"]) < 0.5
    assert row(table, "refuse", "harmless")["patched"] == 0
    gap = row(table, "specificity", "harmful − harmless")
    assert gap["restored"] == pytest.approx(1, abs=1e-2)
    assert gap["effect"] == pytest.approx(score["effect"] - row(table, "score", "harmless")["effect"])
    decoys = restore_by_neurons(base, tuned, chat, truth.decoy_neurons, *asked(9), n_random_sets=0)
    assert row(decoys, "score", "harmful")["restored"] == pytest.approx(0, abs=0.02)
    assert row(decoys, "score", "harmful")["n_controls"] == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", ["gpt2_gelu", "qwen3"])
@pytest.mark.family_contract
def test_put_back_in_all_neurons_what_was_read_differently_is_undone_and_some_are_as_in_the_plain_model(
    architecture: str, family: str
) -> None:
    """The tuned model's MLPs read with other weights; everything after their activations is the base's."""
    base_hf = toy_speaking(architecture)
    tuned_hf = copy.deepcopy(base_hf)
    generator = torch.Generator().manual_seed(4)
    oracles = Oracle(base_hf), Oracle(tuned_hf)
    with torch.no_grad():
        for block in oracles[1].blocks:
            mlp = block.mlp
            for reads in [mlp.c_fc] if oracles[1].is_gpt2 else [mlp.gate_proj, mlp.up_proj]:
                reads.weight += 0.3 * torch.randn(reads.weight.shape, generator=generator)
    base = fresh(architecture, family)
    chat = ChatFormat.from_model(base)
    tuned = wrap_hf(copy.deepcopy(tuned_hf), toy_tokenizer(), family=family)  # type: ignore[arg-type]
    facts = rl.model_facts(base)
    everything = [(layer, neuron) for layer in range(facts.n_layers) for neuron in range(facts.d_mlp)]
    some = [(0, 3), (0, 8), (1, 1), (1, 40)]
    batch = chat.render(REQUESTS, think="off")
    before, after, patched = [], [], []
    for place in range(len(batch)):
        tokens = torch.tensor([ids_of(batch, place)])
        mask = torch.ones_like(tokens)
        own = oracles[0].run(tokens, mask)

        def put(layer: int, post: torch.Tensor, own: Any = own) -> torch.Tensor:
            for its_layer, neuron in some:
                if its_layer == layer:
                    post[..., neuron] = own.post[layer][..., neuron]
            return post

        for into, run in (
            (before, own),
            (after, oracles[1].run(tokens, mask)),
            (patched, oracles[1].run(tokens, mask, change_post=put)),
        ):
            into.append(float(run.logits[0, -1].double().softmax(dim=-1)[TOKEN["REFUSE"]].logit()))
    whole = row(
        restore_by_neurons(base, tuned, chat, everything, REQUESTS, TWINS, n_random_sets=0),
        "score",
        "harmful",
    )
    part = row(
        restore_by_neurons(base, tuned, chat, some, REQUESTS, TWINS, n_random_sets=2), "score", "harmful"
    )
    assert abs(np.mean(after) - np.mean(before)) > 1e-2
    assert whole["base"] == pytest.approx(np.mean(before), abs=3e-5)
    assert whole["tuned"] == pytest.approx(np.mean(after), abs=3e-5)
    assert whole["patched"] == pytest.approx(np.mean(before), abs=3e-5)
    assert part["patched"] == pytest.approx(np.mean(patched), abs=3e-5)
    assert abs(np.mean(patched) - np.mean(after)) > 1e-3


def test_one_model_at_a_time_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def base() -> Any:
        calls.append("base")
        return rl.load_model("planted")

    def tuned() -> Any:
        calls.append("tuned")
        return silenced()

    chat, truth = toy("planted")[1], planted_truth().neurons
    few: dict[str, Any] = {"n_random_sets": 1, "folder": tmp_path}
    first = restore_by_neurons(base, tuned, chat, truth, *asked(12), **few)
    assert calls == ["base", "tuned"]
    monkeypatch.setitem(rl.refusal_reading.__globals__, "refusal_score", None)
    second = restore_by_neurons("planted", tuned, chat, truth, *asked(12), **few)
    pd.testing.assert_frame_equal(first, second)
    assert first.attrs == second.attrs
    with pytest.raises(StudyFolderError, match="another study"):
        restore_by_neurons("planted", "planted", chat, truth, *asked(12), **few)
    with pytest.raises(StudyFolderError, match="another study"):
        restore_by_neurons("planted", tuned, chat, truth[1:], *asked(12), **few)


def test_other_conditions_and_matched_sets() -> None:
    base, chat = toy("planted")
    truth = planted_truth().neurons
    table = restore_by_neurons(
        base, silenced(), chat, truth, *asked(12), condition="careful", n_random_sets=2, matched="activity"
    )
    assert set(table["condition"]) == {"careful"}
    there = row(table, "score", "harmful")
    assert there["base"] < 0  # a chain of thought had taken refusal away before
    assert there["patched"] == pytest.approx(there["base"], abs=1e-2)
    assert table.attrs["matched"] == "activity"


def test_bad_input_is_named_before_a_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    base, chat = toy("planted")
    tuned = silenced()
    harmful, harmless = asked(12)
    truth = planted_truth().neurons
    monkeypatch.setitem(rl.refusal_reading.__globals__, "refusal_score", None)

    def call(neurons: Any = truth, *kinds: Any, models: Any = (base, tuned), **options: Any) -> None:
        restore_by_neurons(*models, chat, neurons, *(kinds or (harmful, harmless)), **options)

    with pytest.raises(UnknownNeuron, match="no neuron was given"):
        call([])
    with pytest.raises(UnknownNeuron, match="layers 0 to 1"):
        call([(0, 256)])
    with pytest.raises(NotEnoughData, match="no harmful requests"):
        call(truth, [], harmless)
    with pytest.raises(MissingTwin):
        call(truth, harmful, harmless[1:])
    with pytest.raises(NotEnoughData, match="of 1 family"):
        call(truth, harmful[:1], harmless[:1])
    with pytest.raises(NotEnoughData, match="all 256 neurons"):
        call([(1, neuron) for neuron in range(256)])
    with pytest.raises(ConditionError, match="which is open"):
        call(condition="open")
    with pytest.raises(StatisticsError, match="n_written=-1"):
        call(n_written=-1)
    with pytest.raises(StatisticsError, match="chose the neurons"):
        call(NeuronSet(truth, 2, 256, made_by=chosen_by(harmful[:1])))
    with pytest.raises(ReferenceMismatch, match="no place in the other"):
        call(models=(base, fresh("gpt2_relu", FAMILIES[0])))


@pytest.mark.skipif("bridge" not in FAMILIES, reason="mixtures of experts are wrapped by the bridge")
def test_mixtures_of_experts_have_no_neurons() -> None:
    model = tiny_moe("mixtral")[0]
    with pytest.raises(UnsupportedModel, match="mixture of experts"):
        restore_by_neurons(model, model, toy("planted")[1], [(0, 1)], *asked(12))


def test_nan_never_passes() -> None:
    hf = toy_speaking("gpt2_relu")
    good = wrap_hf(toy_speaking("gpt2_relu"), toy_tokenizer())
    with torch.no_grad():
        hf.transformer.h[1].mlp.c_proj.weight[3, 4] = float("nan")
    broken = wrap_hf(hf, toy_tokenizer())
    chat = ChatFormat.from_model(good)
    for models in ((good, broken), (broken, good)):
        with pytest.raises(NotFinite):
            restore_by_neurons(*models, chat, [(0, 1)], REQUESTS, TWINS, n_random_sets=1)
