"""A PEFT adapter's folder becomes a plain model with hooks: held against B·A added by hand."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rim_lens.errors import AdapterMismatch, CorruptWeights, MissingExtra, UnknownModel, UnsupportedModel
from rim_lens.lens import adapters, load_model, loading, model_facts, register_source
from tests.families import FAMILIES, Oracle, close, hf_model, random_batch, tokenizer

peft = pytest.importorskip("peft")
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
LLAMA = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


def save_base(folder: Path, architecture: str = "llama", **changes: Any) -> Any:
    plain = hf_model(architecture)
    hf = type(plain)(type(plain.config)(**(plain.config.to_dict() | changes))) if changes else plain
    hf.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return hf


def save_lora(folder: Path, base: str | Path, hf: Any, modules: list[str], **options: Any) -> Any:
    """A LoRA adapter with random A and B; peft's own start has B = 0, which would add nothing."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 12, "target_modules": modules} | options)
    adapted = peft.get_peft_model(hf, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return adapted


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_lora(tmp_path / "adapter", tmp_path / "base", save_base(tmp_path / "base"), LLAMA)
    return tmp_path / "adapter"


def amend(folder: Path, **values: Any) -> None:
    read = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(read | values))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("architecture", "modules", "options", "scale"),
    [
        ("llama", LLAMA, {}, 12 / 3),
        ("llama", LLAMA, {"use_rslora": True, "layers_to_transform": [1, 2]}, 12 / math.sqrt(3)),
        ("gpt2_relu", ["c_attn", "c_fc"], {"fan_in_fan_out": True}, 12 / 3),
    ],
)
def test_the_product_is_added_and_nothing_else(
    tmp_path: Path, architecture: str, modules: list[str], options: dict[str, Any], scale: float, family: Any
) -> None:
    hf = save_base(tmp_path / "base", architecture)
    save_lora(tmp_path / "adapter", tmp_path / "base", hf, modules, **options)
    written = load_file(tmp_path / "adapter" / WEIGHTS)
    by_hand = hf_model(architecture)
    with torch.no_grad():
        for name in {name.rpartition(".lora_")[0] for name in written}:
            product = scale * written[f"{name}.lora_B.weight"] @ written[f"{name}.lora_A.weight"]
            module = by_hand.get_submodule(name.removeprefix("base_model.model."))
            module.weight += product.T if architecture.startswith("gpt2") else product
    batch = random_batch(seed=6)
    real = batch.attention_mask.bool()
    truth = Oracle(by_hand).run(batch.tokens, batch.attention_mask).logits
    plain = Oracle(hf_model(architecture)).run(batch.tokens, batch.attention_mask).logits
    assert (truth - plain)[real].abs().max() > 0.1  # it must matter
    model = load_model(tmp_path / "adapter", family=family)
    found = model(batch.tokens, attention_mask=batch.attention_mask)
    close(found[real], truth[real])
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_base_that_is_a_known_name_and_a_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Path
) -> None:
    monkeypatch.setattr(loading, "_SOURCES", dict(loading._SOURCES))
    register_source("tiny", lambda variant: (hf_model("llama"), tokenizer()))
    expected = load_model(adapter)
    amend(adapter, base_model_name_or_path="tiny:some")
    tokens = torch.tensor([[5, 6, 7]])
    close(load_model(str(adapter))(tokens), expected(tokens))
    assert model_facts(load_model(adapter, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_an_adapter_on_an_adapter(tmp_path: Path, adapter: Path) -> None:
    """Both products, one after the other."""
    merged = adapters.merge_adapter(hf_model("llama"), adapter)
    save_lora(tmp_path / "second", adapter, merged, ["up_proj"])
    twice = adapters.merge_adapter(adapters.merge_adapter(hf_model("llama"), adapter), tmp_path / "second")
    tokens = torch.tensor([[5, 6, 7]])
    close(load_model(tmp_path / "second")(tokens), twice(tokens).logits)


def test_the_tokenizer_it_was_trained_with_comes_along(adapter: Path) -> None:
    assert not load_model(adapter).tokenizer.chat_template
    own = tokenizer().__class__.from_pretrained(adapter.parent / "base")
    own.chat_template = "{{ messages[0]['content'] }}"
    own.save_pretrained(adapter)
    assert load_model(adapter).tokenizer.chat_template == own.chat_template


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [None, "", 7, "{self}"])
def test_no_base(adapter: Path, base: Any) -> None:
    amend(adapter, base_model_name_or_path=str(adapter) if base == "{self}" else base)
    with pytest.raises(UnknownModel, match=r"names no model"):
        load_model(adapter)


def test_an_unknown_base_says_whose_it_is(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    amend(adapter, base_model_name_or_path="no-such-organisation/no-such-model")
    with pytest.raises(UnknownModel, match=r"trained on 'no-such-organisation/no-such-model'.*write where"):
        load_model(adapter)


def test_a_configuration_that_is_no_json(adapter: Path) -> None:
    (adapter / CONFIG).write_text("{")
    with pytest.raises((CorruptWeights, UnsupportedModel), match=CONFIG):
        load_model(adapter)
    (adapter / CONFIG).write_text("[]")
    with pytest.raises(CorruptWeights, match="no readable"):
        adapters.adapter_base(adapter)


def test_peft_missing(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="pip install peft"):
        load_model(adapter)


def test_weights_missing_pickled_damaged_or_not_finite(adapter: Path) -> None:
    weights = load_file(adapter / WEIGHTS)
    first = min(weights)
    save_file(weights | {first: torch.full_like(weights[first], torch.nan)}, adapter / WEIGHTS)
    with pytest.raises(CorruptWeights, match="NaN"):
        load_model(adapter)
    (adapter / WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(CorruptWeights, match="cannot be read"):
        load_model(adapter)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(CorruptWeights, match=r"adapter_model\.bin.*pickles"):
        load_model(adapter)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"hidden_size": 48, "head_dim": 12}, "size mismatch"), ({"num_hidden_layers": 1}, "no place")],
)
def test_a_base_of_another_shape(adapter: Path, changes: dict[str, int], told: str) -> None:
    save_base(adapter.parent / "other", **changes)
    amend(adapter, base_model_name_or_path=str(adapter.parent / "other"))
    with pytest.raises(AdapterMismatch, match=rf"does not fit the LlamaForCausalLM.*{told}"):
        load_model(adapter)


def test_a_base_of_another_architecture(adapter: Path) -> None:
    save_base(adapter.parent / "gpt2", "gpt2_relu")
    amend(adapter, base_model_name_or_path=str(adapter.parent / "gpt2"))
    with pytest.raises(AdapterMismatch, match="does not fit the GPT2LMHeadModel"):
        load_model(adapter)


def test_an_adapter_that_lacks_weights(adapter: Path) -> None:
    """peft would leave what it drew at random in their place."""
    weights = load_file(adapter / WEIGHTS)
    weights.pop(max(weights))
    save_file(weights, adapter / WEIGHTS)
    with pytest.raises(AdapterMismatch, match="1 weights are not in the file"):
        load_model(adapter)


def test_a_product_on_tied_embeddings_is_refused(tmp_path: Path) -> None:
    """Folded into the unembedding, it would act at the embedding as well."""
    hf = save_base(tmp_path / "base", tie_word_embeddings=True)
    save_lora(tmp_path / "adapter", tmp_path / "base", hf, ["lm_head"])
    with pytest.raises(UnsupportedModel, match="tied embeddings"):
        load_model(tmp_path / "adapter")


def test_an_adapter_at_a_hub_is_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers resolves it to model and adapter side by side, as it does a folder that we do not recognise."""
    monkeypatch.setattr(loading, "is_adapter", lambda name: False)
    tokenizer().save_pretrained(adapter)
    with pytest.raises(UnsupportedModel, match=r"adapter at a hub.*give load_model the folder"):
        load_model(adapter)


def test_prompt_tuning_is_refused(tmp_path: Path) -> None:
    hf = save_base(tmp_path / "base")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    adapted = peft.get_peft_model(hf, config)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedModel, match="PROMPT_TUNING"):
        load_model(tmp_path / "adapter")
