"""A model is known again without loading it, and what cannot be one is refused."""

from __future__ import annotations

import json
import shutil

import pytest

import rim_lens as rl
from rim_lens.errors import UnknownModel
from rim_lens.lens import require_source, same_source, source_digest
from rim_lens.organisms.toy import load_toy


@pytest.fixture
def folder(tmp_path):
    model, _ = load_toy()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_known_by_its_weights_wherever_it_lies(folder, tmp_path):
    digest = source_digest(folder)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    (moved / "README.md").write_text("of no weight")
    assert source_digest(str(moved)) == digest
    (weights,) = moved.glob("*.safetensors")
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(bytes(changed))
    assert source_digest(moved) != digest


def test_an_adapters_base_may_move_and_its_scale_may_not_change(tmp_path):
    told = {"base_model_name_or_path": "/somewhere", "lora_alpha": 8}
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(told))
    before = source_digest(tmp_path)
    config.write_text(json.dumps({**told, "base_model_name_or_path": "/elsewhere"}))
    assert source_digest(tmp_path) == before
    config.write_text(json.dumps({**told, "lora_alpha": 16}))
    assert source_digest(tmp_path) != before


def test_names_say_themselves_what_they_are_and_models_by_their_weights():
    assert source_digest("toy:careful") is None
    model = rl.load_model("toy")
    assert source_digest(model) == rl.weights_digest(model)


@pytest.mark.parametrize("name", ["toy:carefull", "smollm2:small", "./none", "/no/where", "a/b/c"])
def test_what_cannot_be_loaded_is_refused_before(name):
    with pytest.raises(UnknownModel):
        require_source(name)


def test_a_folder_without_a_model_is_refused_and_one_with_an_adapter_is_not(tmp_path, folder):
    with pytest.raises(UnknownModel, match=r"neither config\.json nor adapter_config\.json"):
        require_source(tmp_path)
    require_source(folder)
    (tmp_path / "adapter_config.json").write_text("{}")
    require_source(tmp_path)
    for name in ("toy", "toy:C", "planted:7", "smollm2", "me/model", "gpt2"):
        require_source(name)


def test_the_same_folder_by_two_names_is_one(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert same_source("model", tmp_path / "model")
    assert not same_source("model", "other")


@pytest.mark.parametrize("study", [rl.Study, rl.NeuronStudy])
def test_studies_refuse_a_tuned_model_that_is_not_there_before_they_load_one(study, monkeypatch):
    with pytest.raises(UnknownModel, match="has the variants"):
        study("toy", tuned=["toy:carefull"])
