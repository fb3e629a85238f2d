"""Facts of each model, strict indices, and the checks that need only the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rim_lens.errors import (
    MissingTokenizer,
    ModelError,
    TrainingMode,
    UnknownHead,
    UnknownLayer,
    UnknownNeuron,
    UnsupportedModel,
)
from rim_lens.lens import model_facts, require_eval, tokenizer_of
from tests.families import FAMILIES, Case, hf_model, tiny_moe, tokenizer, wrapped

EXPECTED: dict[str, dict[str, Any]] = {
    "gpt2_relu": {
        "architecture": "GPT2LMHeadModel",
        "n_layers": 2,
        "n_heads": 4,
        "n_key_value_heads": 4,
        "d_model": 32,
        "d_head": 8,
        "d_mlp": 44,
        "gated": False,
        "act_fn": "relu",
    },
    "llama": {
        "architecture": "LlamaForCausalLM",
        "n_layers": 3,
        "n_heads": 4,
        "n_key_value_heads": 2,
        "d_model": 32,
        "d_head": 8,
        "d_mlp": 40,
        "gated": True,
        "act_fn": "silu",
    },
    "qwen3": {
        "architecture": "Qwen3ForCausalLM",
        "n_layers": 2,
        "n_heads": 6,
        "n_key_value_heads": 2,
        "d_model": 32,
        "d_head": 12,
        "d_mlp": 52,
        "gated": True,
        "act_fn": "silu",
    },
}
EXPECTED["gpt2_gelu"] = EXPECTED["gpt2_relu"] | {"act_fn": "gelu_new"}


@pytest.mark.family_contract
def test_facts_are_those_of_the_configuration(case: Case) -> None:
    found = model_facts(case.model).to_dict()
    expected = EXPECTED[case.architecture] | {
        "family": "HookedTransformer" if case.family == "hooked" else "TransformerBridge",
        "d_vocab": 71,
        "n_ctx": 48,
        "moe": False,
        "device": "cpu",
        "dtype": "torch.float32",
    }
    assert {key: found[key] for key in expected} == expected


def test_heads_lists_every_pair(case_gqa: Case) -> None:
    assert case_gqa.facts.heads() == [(layer, head) for layer in range(2) for head in range(6)]


def test_something_else_is_refused() -> None:
    with pytest.raises(ModelError, match="wrap_hf"):
        model_facts(hf_model("llama"))


BAD_INDICES = [-1, 99, True, 1.0, 1.5, "1", None]


@pytest.mark.parametrize("bad", BAD_INDICES)
def test_layers_are_strict(case_gqa: Case, bad: Any) -> None:
    with pytest.raises(UnknownLayer, match="layers 0 to 1"):
        case_gqa.facts.check_layer(bad)


@pytest.mark.parametrize("bad", BAD_INDICES)
@pytest.mark.parametrize("place", [0, 1])
def test_heads_are_strict(case_gqa: Case, bad: Any, place: int) -> None:
    head = [0, 0]
    head[place] = bad
    with pytest.raises(UnknownHead, match="heads 0 to 5"):
        case_gqa.facts.check_heads([(1, 5), tuple(head)])


@pytest.mark.parametrize("bad", BAD_INDICES)
@pytest.mark.parametrize("place", [0, 1])
def test_neurons_are_strict(case_gqa: Case, bad: Any, place: int) -> None:
    neuron = [0, 0]
    neuron[place] = bad
    with pytest.raises(UnknownNeuron, match="neurons 0 to 51"):
        case_gqa.facts.check_neurons([(1, 51), tuple(neuron)])


@pytest.mark.parametrize("bad", [3, (1,), (1, 2, 3), "12", None])
def test_what_is_not_a_pair_is_refused(case_gqa: Case, bad: Any) -> None:
    with pytest.raises(UnknownHead, match="pair"):
        case_gqa.facts.check_heads([bad])
    with pytest.raises(UnknownNeuron, match="pair"):
        case_gqa.facts.check_neurons([bad])


def test_whole_numbers_of_numpy_and_torch_are_indices(case_gqa: Case) -> None:
    facts = case_gqa.facts
    assert facts.check_heads([(np.int64(1), torch.tensor(3))]) == [(1, 3)]
    assert facts.check_neurons(np.array([[1, 7], [0, 2]])) == [(0, 2), (1, 7)]
    assert facts.check_layer(np.int32(1)) == 1
    assert all(type(item) is int for pair in facts.check_heads([(np.int64(1), np.int8(3))]) for item in pair)


def test_a_pair_named_twice_counts_once(case_gqa: Case) -> None:
    assert case_gqa.facts.check_heads([(1, 5), (0, 2), (1, 5)]) == [(1, 5), (0, 2)]
    assert case_gqa.facts.check_neurons([(1, 5), (0, 2), (1, 5)]) == [(0, 2), (1, 5)]


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_tokenizer_is_named(family: str) -> None:
    model = wrapped("llama", family)
    assert tokenizer_of(model).get_vocab() == tokenizer().get_vocab()
    model.tokenizer = None
    with pytest.raises(MissingTokenizer, match="no tokenizer"):
        tokenizer_of(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_mode_is_refused_and_not_changed(family: str) -> None:
    model = wrapped("llama", family)
    require_eval(model)
    model.train()
    with pytest.raises(TrainingMode, match=r"eval\(\)"):
        require_eval(model)
    assert model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_one_module_in_training_mode_is_enough(family: str) -> None:
    """The bridge wraps the Hugging Face model; `hf.train()` after wrapping never touches the bridge's own flag."""
    model = wrapped("gpt2_gelu", family)
    inner = getattr(model, "original_model", None)
    (inner if inner is not None else model.blocks[1]).train()
    assert not model.training
    with pytest.raises(TrainingMode):
        require_eval(model)


@pytest.mark.skipif("bridge" not in FAMILIES, reason="mixtures of experts are wrapped by the bridge alone")
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_is_recognised(architecture: str) -> None:
    facts = model_facts(tiny_moe(architecture)[0])
    assert facts.moe
    with pytest.raises(UnsupportedModel, match="mixture of experts"):
        facts.check_neurons([(0, 0)])


@pytest.mark.skipif("bridge" not in FAMILIES, reason="mixtures of experts are wrapped by the bridge alone")
def test_experts_in_a_later_layer_only_are_recognised_too() -> None:
    assert model_facts(tiny_moe("qwen3_moe", mlp_only_layers=[0])[0]).moe
