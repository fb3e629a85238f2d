"""From a name or a folder to a model with hooks, and what is refused on the way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rim_lens.errors import MissingTokenizer, ModelError, UnknownModel, UnsupportedModel
from rim_lens.lens import (
    all_logits,
    known_sources,
    load_model,
    loading,
    model_facts,
    register_source,
    wrap_hf,
)
from tests.families import (
    ARCHITECTURES,
    FAMILIES,
    Oracle,
    close,
    fill,
    hf_model,
    random_batch,
    tiny_moe,
    tokenizer,
)

MISSING = [family for family in ("bridge", "hooked") if family not in FAMILIES]
hooked_only = pytest.mark.skipif(
    "hooked" not in FAMILIES, reason="TransformerLens 4 has no HookedTransformer"
)


def saved(folder: Path, architecture: str) -> Any:
    hf = hf_model(architecture)
    hf.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return hf


@pytest.mark.family_contract
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_local_folder(tmp_path: Path, architecture: str, family: Any) -> None:
    oracle = Oracle(saved(tmp_path, architecture))
    model = load_model(tmp_path, family=family)
    facts = model_facts(model)
    assert facts.dtype == torch.float32
    assert facts.family == ("TransformerBridge" if family == "bridge" else "HookedTransformer")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    batch = random_batch(seed=6)
    real = batch.attention_mask.bool()
    truth = oracle.run(batch.tokens, batch.attention_mask).logits
    close(all_logits(model, batch.tokens, batch.attention_mask)[real], truth[real])
    assert model.tokenizer.get_vocab() == tokenizer().get_vocab()
    assert model.tokenizer("w5 w6")["input_ids"] == [5, 6]


@pytest.mark.parametrize("family", FAMILIES)
def test_dtype_is_what_was_asked_for(tmp_path: Path, family: Any) -> None:
    saved(tmp_path, "llama")
    model = load_model(str(tmp_path), family=family, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model_facts(model).to_dict()["dtype"] == "torch.bfloat16"
    batch = random_batch(seed=6)
    assert torch.isfinite(all_logits(model, batch.tokens, batch.attention_mask).float()).all()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"dtype": "bfloat16"}, r"dtype='bfloat16'.*torch\.bfloat16"),
        ({"dtype": "bf16"}, r"dtype='bf16'.*torch\.float32"),
        ({"device": "gpu"}, "device='gpu'.*cannot be used here"),
        ({"device": "cuda:77"}, "device='cuda:77'.*cannot be used here"),
    ],
)
def test_a_dtype_or_device_that_is_not_there_is_refused_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, asked: Any, told: str
) -> None:
    monkeypatch.setattr(loading, "_fetch", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ModelError, match=told):
        load_model("toy", **asked)


def test_what_cannot_be_wrapped_is_refused() -> None:
    with pytest.raises(MissingTokenizer, match="AutoTokenizer"):
        wrap_hf(hf_model("llama"), None)
    with pytest.raises(ModelError, match=r"wrap_hf\(hf_model, tokenizer\)"):
        wrap_hf(tokenizer(), hf_model("llama"))


def test_auto_prefers_the_bridge(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    found = model_facts(load_model(tmp_path)).family
    assert found == ("TransformerBridge" if "bridge" in FAMILIES else "HookedTransformer")


def test_the_users_tokenizer_is_left_as_it_was(tmp_path: Path) -> None:
    before = dict(tokenizer().special_tokens_map)
    for family in FAMILIES:
        model = wrap_hf(hf_model("llama"), tokenizer(), family=family)
        assert model.tokenizer is not tokenizer()
    assert dict(tokenizer().special_tokens_map) == before


def test_an_unknown_name_offline_fails_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(UnknownModel, match="no-such-organisation/no-such-model") as caught:
        load_model("no-such-organisation/no-such-model")
    assert time.monotonic() - start < 20
    for name in known_sources():
        assert name in str(caught.value)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"folder.*config\.json"):
        load_model(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    hf_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UnknownModel, match="tokenizer"):
        load_model(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnknownModel, match="weights"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", MISSING)
def test_a_family_that_is_not_installed(family: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"TransformerLens.*install"):
        wrap_hf(hf_model("llama"), tokenizer(), family=family)


def test_a_family_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="'bridge', 'hooked'"):
        wrap_hf(hf_model("llama"), tokenizer(), family="hooks")  # type: ignore[arg-type]


# --- what HookedTransformer would get wrong without a word ---------------------------------------------


@hooked_only
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("gpt2_relu", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2_relu", {"scale_attn_weights": False}),
    ],
)
def test_a_conversion_that_would_give_other_numbers_is_refused(
    architecture: str, changes: dict[str, Any]
) -> None:
    plain = hf_model(architecture)
    config = type(plain.config)(**(plain.config.to_dict() | changes))
    hf = type(plain)(config)
    fill(hf)
    hf.set_attn_implementation("eager")  # under sdpa transformers 4 forgets GPT-2's scalings itself
    with pytest.raises(UnsupportedModel, match="other logits"):
        wrap_hf(hf, tokenizer(), family="hooked")


@hooked_only
def test_rotary_scaling_is_refused_or_equal() -> None:
    plain = hf_model("llama")
    settings = plain.config.to_dict() | {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    }
    settings.pop("rope_parameters", None)
    hf = type(plain)(type(plain.config)(**settings))
    fill(hf)
    with pytest.raises(UnsupportedModel, match="rotary scaling"):
        wrap_hf(hf, tokenizer(), family="hooked")


@hooked_only
def test_a_sliding_window_is_refused() -> None:
    """Eight tokens would not show it."""
    from transformers import MistralConfig, MistralForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 71,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 48,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    with pytest.raises(UnsupportedModel, match="sliding window of 16"):
        wrap_hf(
            MistralForCausalLM(MistralConfig(**settings, sliding_window=16)), tokenizer(), family="hooked"
        )
    model = wrap_hf(
        MistralForCausalLM(MistralConfig(**settings, sliding_window=48)), tokenizer(), family="hooked"
    )
    assert model_facts(model).n_ctx == 48


@hooked_only
def test_another_rotary_base_is_kept() -> None:
    plain = hf_model("llama")
    settings = plain.config.to_dict() | {"rope_theta": 500000.0}
    if "rope_parameters" in settings:
        settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    hf = type(plain)(type(plain.config)(**settings))
    fill(hf)
    model = wrap_hf(hf, tokenizer(), family="hooked")
    batch = random_batch(seed=6)
    real = batch.attention_mask.bool()
    hf.set_attn_implementation("eager")
    truth = Oracle(hf).run(batch.tokens, batch.attention_mask).logits
    close(all_logits(model, batch.tokens, batch.attention_mask)[real], truth[real])


@hooked_only
def test_tied_embeddings() -> None:
    plain = hf_model("llama")
    hf = type(plain)(type(plain.config)(**(plain.config.to_dict() | {"tie_word_embeddings": True})))
    fill(hf)
    hf.set_attn_implementation("eager")
    assert hf.lm_head.weight is hf.model.embed_tokens.weight
    truth_model = Oracle(hf)
    batch = random_batch(seed=6)
    real = batch.attention_mask.bool()
    truth = truth_model.run(batch.tokens, batch.attention_mask).logits
    found = all_logits(wrap_hf(hf, tokenizer(), family="hooked"), batch.tokens, batch.attention_mask)
    close(found[real], truth[real])


@hooked_only
def test_an_architecture_without_a_conversion_is_refused() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=71,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    with pytest.raises(UnsupportedModel, match="GPTNeoXForCausalLM"):
        wrap_hf(GPTNeoXForCausalLM(config), tokenizer(), family="hooked")


@pytest.mark.skipif("bridge" not in FAMILIES, reason="mixtures of experts are wrapped by the bridge alone")
def test_a_mixture_of_experts_equals_the_plain_model() -> None:
    model, hf = tiny_moe("qwen3_moe")
    batch = random_batch(seed=6)
    real = batch.attention_mask.bool()
    positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        truth = hf(batch.tokens, attention_mask=batch.attention_mask, position_ids=positions).logits
    close(all_logits(model, batch.tokens, batch.attention_mask)[real], truth[real])


# --- sources -------------------------------------------------------------------------------------------


def test_a_source_and_its_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_SOURCES", dict(loading._SOURCES))
    asked: list[str] = []

    def source(variant: str) -> tuple[Any, Any]:
        asked.append(variant)
        return hf_model("llama", seed=len(variant)), tokenizer()

    register_source("tiny", source)
    assert "tiny" in known_sources()
    assert model_facts(load_model("tiny")).n_layers == 3
    load_model("tiny:C")
    assert asked == ["", "C"]
    for name in ("tiny", "a:b", "a/b"):
        with pytest.raises(ValueError, match="unique"):
            register_source(name, source)


@pytest.mark.skipif("bridge" not in FAMILIES, reason="HookedTransformer takes no device map")
def test_a_device_map_reaches_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    saved(tmp_path, "qwen3")
    plain = load_model(tmp_path)
    asked: list[Any] = []
    as_it_is = AutoModelForCausalLM.from_pretrained

    def noted(*given: Any, **more: Any) -> Any:
        asked.append(more.get("device_map"))
        return as_it_is(*given, **more)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    # All on the CPU, which is what there is everywhere; where weights lie is Transformers' affair.
    spread = load_model(tmp_path, device={"model": "cpu", "lm_head": "cpu"})
    assert asked == [{"model": "cpu", "lm_head": "cpu"}]
    batch = random_batch(seed=6)
    assert torch.equal(*(all_logits(model, batch.tokens, batch.attention_mask) for model in (plain, spread)))


@pytest.mark.skipif("bridge" not in FAMILIES, reason="HookedTransformer takes no device map")
@pytest.mark.parametrize(
    ("name", "device", "told"), [("toy", "balanced", "our own models"), ("any", {"": "disk"}, "on a disk")]
)
def test_a_device_map_is_refused_where_it_cannot_be_used(name: str, device: Any, told: str) -> None:
    with pytest.raises(UnsupportedModel, match=told):
        load_model(name, device=device)


def test_hooked_transformer_takes_no_device_map() -> None:
    with pytest.raises(UnsupportedModel, match="takes no device map"):
        load_model("any", family="hooked", device="balanced")


@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_weights_are_refused(family: Any) -> None:
    """They are on no device between passes, when proofs and digests read them."""
    from accelerate import cpu_offload

    offloaded = cpu_offload(hf_model("llama"), execution_device="cpu")
    with pytest.raises(UnsupportedModel, match=r"model\.embed_tokens\.weight is on none"):
        wrap_hf(offloaded, tokenizer(), family=family)
