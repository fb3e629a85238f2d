"""Direct effects of neurons against the plain model's own norm and unembedding; writers told apart where both kinds are planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rim_lens as rl
from rim_lens.chat import ChatFormat
from rim_lens.errors import (
    ConditionError,
    NotEnoughData,
    NotFinite,
    StatisticsError,
    StudyFolderError,
    UnknownNeuron,
    UnsupportedModel,
)
from rim_lens.lens import hooked, wrap_hf
from rim_lens.measures.held_out import chosen_by
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.measures.neurons.writers import COLUMNS, direct_to_logits
from rim_lens.measures.readings import refusal_reading
from rim_lens.organisms.planted import _AT, _CHANNELS, _PLUS, planted, planted_truth
from rim_lens.organisms.toy.host import TOKEN, toy_tokenizer
from tests.families import FAMILIES, VOCABULARY, fill, random_batch, tiny_moe
from tests.measures.refusal.test_direction import toy
from tests.speaking import REQUESTS, Spoken, fresh, ids_of, toy_speaking

WRITER = (1, 7)


def harmful(step: int = 6) -> list[rl.Prompt]:
    return rl.load_prompts("harmful", language="toy", split="evaluate")[::step]


@pytest.mark.family_contract
def test_direct_effects_are_a_patch_of_the_final_residual_alone(spoken: Spoken) -> None:
    """The plain model's final residual without the neuron's vector, through its own norm and unembedding."""
    neurons = [(0, 3), (0, 30), (1, 4), (1, 5)]
    found = direct_to_logits(spoken.model, spoken.chat, neurons, REQUESTS)
    batch = spoken.chat.render(REQUESTS, think="off")
    hf, oracle = spoken.oracle.hf, spoken.oracle
    norm = hf.transformer.ln_f if oracle.is_gpt2 else hf.model.norm

    def score(stream: torch.Tensor) -> float:
        with torch.no_grad():
            chances = hf.lm_head(norm(stream[None]))[0].double().softmax(dim=-1)
        return float(chances[TOKEN["REFUSE"]].logit())

    direct: dict[Any, list[float]] = {neuron: [] for neuron in [*neurons, "set"]}
    for row in range(len(batch)):
        tokens = torch.tensor([ids_of(batch, row)])
        seen = oracle.run(tokens, torch.ones_like(tokens))
        stream, taken = seen.resid_post[-1][0, -1], {}
        for layer, neuron in neurons:
            weight = oracle.down_projection(layer).weight
            vector = weight[neuron] if oracle.is_gpt2 else weight[:, neuron]
            taken[layer, neuron] = seen.post[layer][0, -1, neuron] * vector
        for one, vector in [*taken.items(), ("set", sum(taken.values()))]:
            direct[one].append(score(stream - vector) - score(stream))
    assert tuple(found.columns) == COLUMNS
    for line in found.to_dict("records"):
        expected = direct[line["layer"], line["neuron"]]
        assert line["direct"] == pytest.approx(np.mean(expected), abs=4e-5)
        total = float(
            rl.refusal_score(spoken.model, batch, rl.AblateNeurons([(line["layer"], line["neuron"])])).mean()
        )
        assert line["total"] == pytest.approx(
            total - float(rl.refusal_score(spoken.model, batch).mean()), abs=4e-5
        )
    assert found.attrs["set"]["direct"] == pytest.approx(np.mean(direct["set"]), abs=4e-5)
    assert max(abs(np.mean(values)) for values in direct.values()) > 1e-2
    assert not any(point.fwd_hooks for point in spoken.model.hook_dict.values())


@pytest.mark.parametrize("architecture", ["gpt2_gelu", "qwen3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_comes_after_the_last_mlp(architecture: str, family: str) -> None:
    """So that all effects of its neurons are direct, and none of the first layer's need be."""
    model = fresh(architecture, family)
    chat, batch = ChatFormat.from_model(model), ChatFormat.from_model(model).render(REQUESTS)
    found = direct_to_logits(model, chat, [(1, neuron) for neuron in range(8)], batch)
    np.testing.assert_allclose(found["direct"], found["total"], atol=4e-5)
    np.testing.assert_allclose(found["share"].dropna(), 1, atol=1e-2)
    assert found["share"].notna().any()
    assert (found["writer"] == found["share"].notna()).all()
    everything = direct_to_logits(model, chat, [(0, neuron) for neuron in range(8)], batch)
    assert (everything["direct"] - everything["total"]).abs().max() > 1e-2


def with_a_writer(family: str = "auto") -> Any:
    """A neuron of the last layer that repeats what the reader says: it writes the refusal's word, and decides nothing."""
    hf = planted()
    mlp = hf.transformer.h[WRITER[0]].mlp
    with torch.no_grad():
        mlp.c_fc.weight[:, WRITER[1]] = 0
        mlp.c_fc.weight[_AT["refuse"], WRITER[1]] = 1
        mlp.c_proj.weight[WRITER[1]] = 0
        mlp.c_proj.weight[WRITER[1], _AT["refuse"]] = 1
        spare = slice(len(_CHANNELS), _PLUS)
        mlp.c_proj.weight[WRITER[1], spare] = -1 / (
            _PLUS - len(_CHANNELS)
        )  # every writer sums to zero, see `planted`
    return wrap_hf(hf, toy_tokenizer(), family=family)  # type: ignore[arg-type]


def test_a_writer_is_told_from_neurons_that_work_through_a_head() -> None:
    model = with_a_writer()
    chat, truth = ChatFormat.from_model(model), planted_truth().neurons
    found = direct_to_logits(model, chat, [*truth, WRITER], harmful())
    assert found.attrs["writers"] == [list(WRITER)]
    lines = {(line["layer"], line["neuron"]): line for line in found.to_dict("records")}
    assert lines[WRITER]["share"] == pytest.approx(1, abs=1e-3)
    assert lines[WRITER]["total"] < -5
    for neuron in truth:
        assert not lines[neuron]["writer"]
        assert abs(lines[neuron]["share"]) < 0.35
        assert lines[neuron]["total"] < -0.5
    assert found.attrs["rest"]["total"] < -15
    assert abs(found.attrs["rest"]["share"]) < 0.1
    assert found.attrs["rest"]["direct"] == pytest.approx(
        direct_to_logits(model, chat, truth, harmful()).attrs["set"]["direct"], abs=1e-5
    )
    alone = direct_to_logits(model, chat, [WRITER], harmful())
    assert alone.attrs["rest"] is None
    assert alone.attrs["set"]["writer"]


@pytest.mark.skipif("bridge" not in FAMILIES, reason="Gemma is wrapped by the bridge alone")
@pytest.mark.parametrize("version", [2, 3])
def test_where_a_norm_follows_the_mlp(version: int) -> None:
    """Gemma 2 and 3 normalise what the MLP gives before adding it; of the last layer all is direct all the same."""
    import transformers

    config, kind = (
        (transformers.Gemma2Config, transformers.Gemma2ForCausalLM)
        if version == 2
        else (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM)
    )
    hf = kind(
        config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=48,
            sliding_window=8,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            attn_implementation="eager",
        )
    )
    fill(hf)
    model = wrap_hf(hf.eval(), toy_tokenizer(), family="bridge")
    batch = random_batch(seed=4, n_prompts=3)
    found = direct_to_logits(
        model, toy("toy")[1], [(1, neuron) for neuron in range(6)], batch, openers=["REFUSE"]
    )
    np.testing.assert_allclose(found["direct"], found["total"], atol=1e-4)
    assert found["direct"].abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("blocks.0.hook_mlp_out", "not its activations × W_out"),
        ("blocks.1.hook_resid_pre", "not the sum of what the layers write"),
    ],
)
def test_models_that_do_not_add_up_are_refused(family: str, name: str, told: str) -> None:
    model = fresh("llama", family)
    chat = ChatFormat.from_model(model)
    with (
        hooked(model, [(name, lambda tensor, hook: tensor * 1.2)]),
        pytest.raises(UnsupportedModel, match=told),
    ):
        direct_to_logits(model, chat, [(0, 1)], REQUESTS)


def test_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, chat = toy("planted")
    truth = planted_truth().neurons[:2]
    first = direct_to_logits(model, chat, truth, harmful(12), folder=tmp_path)
    monkeypatch.setitem(refusal_reading.__globals__, "refusal_score", None)
    second = direct_to_logits(model, chat, truth, harmful(12), folder=tmp_path)
    assert first.equals(second)
    assert first.attrs == second.attrs
    with pytest.raises(StudyFolderError, match="another study"):
        direct_to_logits(model, chat, truth[:1], harmful(12), folder=tmp_path)


def test_bad_input_is_named() -> None:
    model, chat = toy("planted")
    asked, truth = harmful(12), planted_truth().neurons
    with pytest.raises(UnknownNeuron, match="no neuron was given"):
        direct_to_logits(model, chat, [], asked)
    with pytest.raises(UnknownNeuron, match="layers 0 to 1"):
        direct_to_logits(model, chat, [(2, 0)], asked)
    with pytest.raises(StatisticsError, match="mostly=0"):
        direct_to_logits(model, chat, truth, asked, mostly=0)
    with pytest.raises(StatisticsError, match="chose the neurons"):
        direct_to_logits(model, chat, NeuronSet(truth, 2, 256, made_by=chosen_by(asked[:1])), asked)
    with pytest.raises(NotEnoughData, match="no request"):
        direct_to_logits(model, chat, truth, [])
    with pytest.raises(NotEnoughData, match="one family"):
        direct_to_logits(model, chat, truth, asked[:1])
    with pytest.raises(ConditionError, match="open think block"):
        direct_to_logits(model, chat, truth, chat.render(asked, think="open"))
    hf = toy_speaking("gpt2_relu")
    with torch.no_grad():
        hf.transformer.h[1].mlp.c_proj.weight[3, 4] = float("nan")
    broken = wrap_hf(hf, toy_tokenizer())
    with pytest.raises(NotFinite):
        direct_to_logits(broken, chat, [(0, 1)], asked)


@pytest.mark.skipif("bridge" not in FAMILIES, reason="mixtures of experts are wrapped by the bridge")
def test_mixtures_of_experts_have_no_neurons() -> None:
    with pytest.raises(UnsupportedModel, match="mixture of experts"):
        direct_to_logits(tiny_moe("mixtral")[0], toy("planted")[1], [(0, 1)], harmful(12))
