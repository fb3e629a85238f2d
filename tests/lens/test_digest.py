"""The digest sees every single weight and setting, and nothing but what passes go by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rim_lens as rl
from rim_lens.lens import all_logits, known_by, sdpa_kept, verify, weights_digest, wrap_hf
from tests.families import FAMILIES, hf_model, random_batch, tokenizer, wrapped


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", ["gpt2_relu", "qwen3"])
def test_every_weight_counts(architecture: str, family: str) -> None:
    model = wrapped(architecture, family)
    before = weights_digest(model)
    assert len(before) == 16
    assert set(before) <= set("0123456789abcdef")
    for name, parameter in model.named_parameters():
        for place in (0, parameter.numel() // 2, parameter.numel() - 1):
            index = torch.unravel_index(torch.tensor(place), parameter.shape)
            kept = parameter.data[index].clone()
            parameter.data[index] = torch.nextafter(kept, torch.tensor(float("inf")))
            assert weights_digest(model) != before, (name, place)
            parameter.data[index] = kept
    assert weights_digest(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_weights_equal_digest(family: str) -> None:
    model = wrapped("llama", family)
    verify(model, reads=("pattern",), edits=("z",))
    assert weights_digest(model) == weights_digest(wrapped("llama", family))
    assert weights_digest(model) != weights_digest(wrapped("llama", family, seed=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_weights_are_seen(family: str) -> None:
    """The same numbers at another place are another model."""
    model = wrapped("llama", family)
    before = weights_digest(model)
    scale = dict(model.named_parameters())
    shaped: dict[torch.Size, list[str]] = {}
    for name, parameter in scale.items():
        shaped.setdefault(parameter.shape, []).append(name)
    first, second = next(names for names in shaped.values() if len(names) > 1)[:2]
    kept = scale[first].data.clone()
    scale[first].data.copy_(scale[second].data)
    scale[second].data.copy_(kept)
    assert weights_digest(model) != before


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_has_a_digest(family: str) -> None:
    model = wrapped("gpt2_relu", family)
    whole = weights_digest(model)
    assert weights_digest(model.to(torch.bfloat16)) != whole


SETTINGS = {
    "rms_norm_eps": {"rms_norm_eps": 1e-2},
    "hidden_act": {"hidden_act": "gelu"},
    # transformers 5 and 4
    "rotary": {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}, "rope_theta": 50.0},
}


def with_setting(name: str, family: Any) -> Any:
    """The weights of `wrapped("llama", family)` under another setting."""
    plain = hf_model("llama")
    told = plain.config.to_dict()
    config = type(plain.config)(**(told | {key: of for key, of in SETTINGS[name].items() if key in told}))
    other = type(plain)(config)
    other.load_state_dict(plain.state_dict())
    return wrap_hf(other, tokenizer(), family=family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_count(name: str, family: Any) -> None:
    one, other, batch = wrapped("llama", family), with_setting(name, family), random_batch(seed=1)
    assert not torch.allclose(
        *(all_logits(model, batch.tokens, batch.attention_mask) for model in (one, other)), atol=1e-3
    )
    assert weights_digest(one) != weights_digest(other)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_buffer_counts(family: str) -> None:
    model = wrapped("llama", family)
    before = weights_digest(model)
    frequencies = [
        buffer
        for name, buffer in model.named_buffers()
        if name.endswith(("inv_freq", "rotary_sin")) and "original_inv" not in name
    ]
    assert frequencies
    for buffer in frequencies:
        buffer[..., 1] *= 2
        assert weights_digest(model) != before
        buffer[..., 1] /= 2
    assert weights_digest(model) == before


@pytest.mark.skipif("bridge" not in FAMILIES, reason="the Hugging Face model's own buffers")
def test_frequencies_that_follow_the_prompt_are_the_same_model() -> None:
    """Dynamic scaling of rotary positions: the first long prompt changes a buffer for as long as longer ones come."""
    plain = hf_model("llama")
    rope = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}
    config = type(plain.config)(**(plain.config.to_dict() | {"rope_parameters": rope}))
    model = wrap_hf(type(plain)(config), tokenizer(), family="bridge")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = weights_digest(model)
    tokens = torch.arange(64)[None] % 60 + 2
    all_logits(model, tokens, torch.ones_like(tokens))
    assert any(not torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert weights_digest(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_where_a_model_lies_does_not_count(family: Any, tmp_path: Path) -> None:
    """Saved and loaded, under another name, with other ways to return what it finds: the same model."""
    for name in ("one", "other"):
        hf_model("qwen3").save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    one, other = (rl.load_model(tmp_path / name, family=family) for name in ("one", "other"))
    before = weights_digest(one)
    assert before == weights_digest(other)
    batch = random_batch(seed=1)
    all_logits(one, batch.tokens, batch.attention_mask)
    for toggle in ("set_use_attn_result", "set_use_split_qkv_input", "set_use_hook_mlp_in"):
        getattr(one, toggle, lambda on: None)(True)
    assert weights_digest(one) == before


@pytest.mark.skipif("bridge" not in FAMILIES, reason="a Hugging Face model is wrapped in place")
def test_wrapped_again_it_is_the_same_model() -> None:
    hf = hf_model("llama")
    before = weights_digest(wrap_hf(hf, tokenizer(), family="bridge"))
    assert weights_digest(wrap_hf(hf, tokenizer(), family="bridge")) == before


@pytest.mark.skipif("bridge" not in FAMILIES, reason="a bridge keeps sdpa")
def test_while_another_pass_keeps_sdpa_it_is_the_same_model() -> None:
    """Another thread's, or of another model over the same config."""
    model = wrapped("llama", "bridge")
    before = weights_digest(model)
    with sdpa_kept(model):
        assert weights_digest(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_result_says_of_its_model(family: str) -> None:
    model = wrapped("llama", family)
    plain = {"weights_digest": weights_digest(model)}
    with rl.AblateHeads([(0, 1)]).on(model):
        (hook,) = known_by(model)["on_the_model"]
    assert hook == "blocks.0.attn.hook_z: AblateHeads([(0, 1)], 'zero', positions='all')"
    assert known_by(model) == plain
