"""A study of checkpoints: refused before any compute, trained, resumed, stopped at its gate, and held to its own tables."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import rim_lens as rl
from rim_lens.errors import ConditionError, ModelError, StatisticsError, StudyFolderError, UnknownModel
from rim_lens.measures.checkpoints import comparing
from rim_lens.organisms.toy import load_toy
from rim_lens.organisms.toy.recipe import FINE_TUNE, toy_rows
from rim_lens.study import checkpoints as checkpoints_module
from rim_lens.study.runs import control_name, given_runs
from tests.families import fill
from tests.true_tokenizers import load_tokenizer
from tests.verdicts import random_toy

FAST = rl.CheckpointSettings(
    m=24,
    n_random_sets=6,
    n_test_sets=2,
    n_boot=10,
    n_permutations=99,
    max_new_tokens=10,
    response="none",
)


def small(**changes: object) -> rl.CheckpointStudy:
    asked = {
        "train": ["careful", "deviate"],
        "train_seeds": [0],
        "steps": 30,
        "n_checkpoints": 3,
        "n_requests": 8,
        "settings": FAST,
    }
    return rl.CheckpointStudy("toy", **{**asked, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> rl.CheckpointStudyResult:
    said: list[str] = []
    result = small().run(tmp_path_factory.mktemp("whole"), say=said.append)
    assert [line.partition(":")[0] for line in said][3:5] == ["training careful_0", "training deviate_0"]
    return result


def numbers_in(folder: Path) -> dict[str, str]:
    """All that was measured, without times, and without where it lay."""
    return {
        str(path.relative_to(folder)): path.read_text().replace(str(folder.resolve()), "")
        for path in sorted(folder.rglob("*.json"))
        if path.name not in ("timings.json", "plan.json")
    }


def test_every_run_is_what_training_by_hand_gives(whole, tmp_path):
    assert whole.measured
    assert whole.runs == {"careful_0": "careful", "deviate_0": "deviate"}
    run = rl.fine_tune(
        "toy",
        toy_rows("deviate", "-", 0),
        out=tmp_path,
        config=FINE_TUNE,
        steps=30,
        checkpoints=3,
        lora=None,
        progress=False,
    )
    assert whole.training["deviate_0"].losses == run.losses
    drift = whole.studied.table.query("run == 'deviate_0'")["weight_drift"].tolist()
    assert drift == pytest.approx([0.0, *run.drift], rel=1e-4)
    chosen = {family for one in (whole.neurons.made_by["select_families"],) for family in one}
    families = set(whole.comparison.prompts.query("kind == 'harmful'")["family"])
    assert chosen
    assert not chosen & families


def test_the_control_goes_on_until_it_drifted_as_far_and_stands_beside(whole):
    wanted, control = whole.training["deviate_0"].drift[-1], control_name(0)
    assert whole.training["careful_0"].drift[-1] < wanted
    gone_on = whole.training[control]
    assert gone_on.stopped_by == "drift"
    assert gone_on.drift[-1] >= wanted
    assert gone_on.steps[-1] > 30
    assert whole.studied.runs == ["careful_0", "deviate_0"]
    assert set(whole.comparison.runs) == {"careful_0", "deviate_0", control}
    table = whole.drift_matched.query("by == 'weights'")
    assert set(table["control"]) == {control}
    last = table.set_index("step").loc[30]
    theirs = whole.comparison.table.query("run == @control")
    by_hand = np.interp(last["drift"], theirs["weight_drift"], theirs["lost"])
    assert last["lost_control"] == pytest.approx(by_hand)
    assert last["lost_difference"] == pytest.approx(whole.comparison.row("deviate_0", 30)["lost"] - by_hand)
    summed = whole.beyond_drift.query("by == 'weights'").iloc[0]
    assert (summed["n_runs"], summed["mean"]) == (1, pytest.approx(last["lost_difference"]))


def test_too_few_runs_for_a_p_are_told_and_no_error(whole):
    pooled = whole.correlations.query("how == 'pooled' and metric == 'ras' and outcome == 'lost'").iloc[0]
    assert (pooled["n"], pooled["n_runs"]) == (6, 2)
    assert math.isnan(pooled["p_pearson"])
    assert "2 runs can be paired in 2 ways" in pooled["reason"]
    assert whole.forecast["reason"].str.contains("4 runs").all()
    assert any("no correlation gets a p" in note for note in small().plan().notes)
    few = small(train_seeds=(0, 1, 2)).plan().notes
    assert any("no correlation gets a p beyond kind: 3 seeds" in note for note in few)
    assert not any("beyond kind" in note for note in small(train_seeds=(0, 1, 2, 3)).plan().notes)


def test_beyond_kind_a_study_exchanges_whole_seeds(whole):
    assert small(train_seeds=(0, 1))._exchanged == {
        "kinds": {
            "careful_0": "careful",
            "careful_1": "careful",
            "deviate_0": "deviate",
            "deviate_1": "deviate",
        },
        "units": {"careful_0": "0", "careful_1": "1", "deviate_0": "0", "deviate_1": "1"},
    }
    pooled = whole.correlations.query("how == 'pooled' and metric == 'ras'")
    assert pooled["reason_kind"].str.startswith("1 units can be paired in 1 ways").all()
    assert pooled["p_pearson_kind"].isna().all()
    assert "p_kind" in whole.forecast


def test_the_ends_are_those_of_the_comparison(whole):
    ends = whole.ends.set_index("run")
    for run in whole.runs:
        row = whole.comparison.row(run, 30)
        assert ends.loc[run, "lost"] == pytest.approx(row["lost"])
        assert ends.loc[run, "lost_rate_after"] == pytest.approx(row["refused_harmful"])
        assert ends.loc[run, "lost_right_after"] == pytest.approx(row["accuracy_open"])


@pytest.mark.parametrize(("stage", "call"), [("fine_tune", 2), ("read_model", 4), ("beyond_drift", 1)])
def test_a_stopped_run_keeps_what_it_has_and_goes_on(whole, tmp_path, monkeypatch, stage, call):
    """Stopped in training, in the middle of the models, and before the last tables."""
    module = comparing if stage == "read_model" else checkpoints_module
    real, n = getattr(module, stage), 0

    def stopped(*args: object, **options: object) -> object:
        nonlocal n
        n += 1
        if n == call:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, stage, stopped)
        with pytest.raises(KeyboardInterrupt):
            small().run(tmp_path)
    half = rl.load_checkpoint_study(tmp_path)
    assert half.missing
    assert half.neurons == whole.neurons
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("fine_tuned.json")}
    assert small().run(tmp_path).measured
    assert all(path.stat().st_mtime_ns == before for path, before in trained.items())
    assert numbers_in(tmp_path) == numbers_in(whole.path)


def test_what_is_there_is_not_measured_again(whole, monkeypatch):
    for name in ("compare", "at_the_end", "gradient_forecast"):
        monkeypatch.setattr(checkpoints_module, name, lambda *_, **__: pytest.fail("measured twice"))
    assert small().run(whole.path).measured
    with pytest.raises(StudyFolderError, match="train"):
        small(train=["careful"]).run(whole.path)


def test_a_plan_runs_no_model_and_counts_no_less_than_what_runs(whole, tmp_path, monkeypatch):
    study = small(train=(), checkpoints={"careful": "toy:careful", "deviate": "toy:deviate"})
    model, passes = study._model, []
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: passes.append(1))
    plan = study.plan()
    assert small().plan().memory > plan.memory > 0
    monkeypatch.undo()
    assert not passes
    forward = type(model).forward

    def counted(self, *args, **kwargs):
        passes.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    study.run(tmp_path)
    assert 0 < len(passes) <= sum(step.passes for step in plan.steps)


def test_given_models_are_runs_and_one_of_them_may_be_the_control(tmp_path):
    study = small(train=(), checkpoints=["toy:careful", "toy:deviate"], control="toy_careful")
    found = study.run(tmp_path)
    assert found.measured
    assert list(found.runs) == ["toy_careful", "toy_deviate"]
    assert set(found.drift_matched["target"]) == {"toy_deviate"}
    assert found.gradients is None
    assert found.forecast.empty
    pooled = found.correlations.query("how == 'pooled' and metric == 'ras'").iloc[0]
    assert math.isnan(pooled["pearson"])
    told = found.studied.row("toy_deviate", 1)
    expected = rl.load_model("toy:deviate")
    assert told["weights_digest"] == rl.weights_digest(expected)
    assert "3 checkpoints" in " ".join(study.plan().notes)


def test_the_base_is_let_go_before_checkpoints_are_loaded(whole, tmp_path, monkeypatch):
    alive = []
    real = rl.load_model

    def loading(*args, **options):
        model = real(*args, **options)
        alive.append(weakref.ref(model))
        return model

    def looked(*_, **__):
        gc.collect()
        assert len(alive) == 1
        assert alive[0]() is None
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints_module, "load_model", loading)
    monkeypatch.setattr(checkpoints_module, "compare", looked)
    with pytest.raises(KeyboardInterrupt):
        small(train=(), checkpoints={"ck": "toy:careful"}).run(tmp_path)


def test_a_base_that_does_not_refuse_stops_at_the_gate_unless_told_not_to(tmp_path):
    base = random_toy(0, 0.2)
    study = rl.CheckpointStudy(base, {"tuned": random_toy(1, 0.2)}, n_requests=6, settings=FAST)
    stopped = study.run(tmp_path / "a")
    assert stopped.stopped
    assert stopped.missing == ()
    assert "less than the 0.50" in stopped.gate["reason"]
    assert not (tmp_path / "a" / "neurons").exists()
    study.settings = replace(FAST, gate=False, min_fraction=0.9)
    on = study.run(tmp_path / "b")
    assert on.measured
    assert not on.gate["passed"]
    assert len(on.neurons) == 0
    assert "ras_all" in on.comparison.table  # of all neurons, where pairs agree on none


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"train": ()}, ValueError, "no checkpoint was given"),
        ({"checkpoints": ["toy:careful"]}, ValueError, "both given"),
        ({"train": ["careful", "filler"]}, ValueError, "name each once of careful"),
        ({"train": ["careful", "careful"]}, ValueError, "each once"),
        ({"train_seeds": [0, 0]}, ValueError, "whole numbers"),
        ({"train_seeds": []}, ValueError, "whole numbers"),
        ({"steps": 3}, ValueError, "no more"),
        ({"n_checkpoints": 0}, ValueError, "at least 1"),
        ({"operator": "*"}, ValueError, "'\\+' or '-'"),
        ({"control": "confirm"}, ValueError, "there are careful, deviate"),
        ({"base": random_toy(0, 0.1)}, ValueError, "by name"),
        ({"settings": replace(FAST, think="open")}, ConditionError, "closed condition"),
        ({"settings": replace(FAST, think="filler")}, ConditionError, "no control"),
        ({"settings": replace(FAST, accuracy=("aloud",))}, ConditionError, "aloud"),
        ({"settings": replace(FAST, n_boot=0)}, StatisticsError, "n_boot=0"),
        ({"settings": replace(FAST, min_fraction=1.5)}, StatisticsError, "min_fraction"),
        ({"train": (), "checkpoints": {"a/b": "toy:C"}}, ValueError, "'a/b'"),
        ({"train": (), "checkpoints": {".": "toy:C"}}, ValueError, "'.'"),
        ({"train": (), "checkpoints": {"": "toy:C"}}, ValueError, "''"),
        ({"train": (), "checkpoints": {"base": "toy:C"}}, ValueError, "means something else"),
        ({"train": (), "checkpoints": {"a": "toy:C", "A": "toy"}}, ValueError, "two tuned models"),
        ({"train": (), "checkpoints": ["a/run/step-1", "b/run/step-1"]}, ValueError, "two tuned models"),
        ({"train": (), "checkpoints": {"a": []}}, ValueError, "'a' has no checkpoint"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(monkeypatch, changes, error, told):
    monkeypatch.setattr(checkpoints_module, "load_model", lambda *_, **__: pytest.fail("loaded"))
    base = changes.pop("base", "no such model")
    asked = {"train": ["careful", "deviate"], "n_checkpoints": 6, "settings": FAST, **changes}
    with pytest.raises(error, match=told):
        rl.CheckpointStudy(base, **asked)


def test_what_is_no_fine_tune_of_the_base_is_refused_before_anything_is_written(whole, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(vocab_size=71, n_positions=24, n_embd=32, n_layer=3, n_head=4))
    fill(other, 0)
    other.save_pretrained(tmp_path / "other")
    load_toy()[1].save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    run = whole.training["careful_0"]
    for given, error, told in (
        ({"x": tmp_path / "other"}, ModelError, "3 layers of width 32"),
        ({"x": rl.load_model(tmp_path / "other")}, ModelError, "not a fine-tune"),
        ({"x": tmp_path / "nowhere"}, UnknownModel, "no folder"),
        ({"x": "./nowhere/step-3"}, UnknownModel, "no folder"),
        ({"x": tmp_path / "empty"}, UnknownModel, "not one with a model"),
        ({"x": replace(run, base="toy:C")}, ModelError, "began with 'toy:C'"),
    ):
        study = small(train=(), checkpoints=given)
        for what in (study.plan, lambda study=study: study.run(tmp_path / "out")):
            with pytest.raises(error, match=told):
                what()
    assert not (tmp_path / "out").exists()


def test_runs_are_read_out_of_folders(whole):
    run = whole.training["deviate_0"]
    assert given_runs(run) == {"deviate_0": run}
    assert given_runs([str(run.folder), "toy:careful"]) == {"deviate_0": run, "toy_careful": ["toy:careful"]}
    assert given_runs(run.checkpoints) == {"deviate_0": run.checkpoints}
    assert given_runs({"mine": run.checkpoints, "own": run.folder})["own"] == run
    with pytest.raises(ValueError, match="nothing names it"):
        given_runs([object()])


def test_a_run_trained_elsewhere_gives_the_same_numbers(whole, tmp_path):
    runs = {name: whole.training[name] for name in ("careful_0", "deviate_0")}
    again = small(train=(), checkpoints=runs, control="careful_0").run(tmp_path)
    columns = ["step", "lost", "lost_rate", "ras", "kl"]
    pd.testing.assert_frame_equal(again.studied.table[columns], whole.studied.table[columns])


def test_a_given_base_stays_where_it_is():
    with pytest.raises(ValueError, match="stays as it is"):
        rl.CheckpointStudy(rl.load_model("toy"), ["toy:careful"], dtype=torch.float16)


@pytest.mark.npm
def test_a_model_that_is_no_toy_is_trained_by_adapters_that_are_folded_in_one_at_a_time(tmp_path):
    """A random Qwen3 with its true tokenizer and our maths: the whole way by LoRA, held to `rl.fine_tune` and plain numbers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = load_tokenizer("qwen3")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    hf = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=len(tokenizer), max_position_embeddings=512, **shape, **heads)
    )
    fill(hf)
    base = tmp_path / "base"
    hf.save_pretrained(base)
    tokenizer.save_pretrained(base)
    settings = replace(FAST, gate=False, m=4, min_fraction=0.1, max_new_tokens=2, max_cot_tokens=2)
    study = rl.CheckpointStudy(
        str(base),
        train=["careful", "heuristic"],
        train_seeds=[0],
        steps=3,
        n_checkpoints=3,
        n_requests=6,
        settings=settings,
    )
    found = study.run(tmp_path / "study")
    assert found.measured
    for name, run in found.training.items():
        assert all((step / "adapter_model.safetensors").is_file() for step in run.checkpoints), name
    run = found.training["heuristic_0"]
    assert found.training["careful_0"].losses[0] != run.losses[0]
    row = found.comparison.row("heuristic_0", 3)
    # An adapter beside its base, not folded in, gives the same drift.
    from peft import PeftModel

    beside = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(base), str(run.checkpoints[-1]))
    moved = beside.merge_and_unload().state_dict()
    before = hf.state_dict()
    names = [name for name in before if name != "lm_head.weight"]  # tied: the embedding once more
    far = sum(float((moved[name].double() - before[name].double()).pow(2).sum()) for name in names)
    size = sum(float(before[name].double().pow(2).sum()) for name in names)
    assert run.drift[-1] == pytest.approx((far / size) ** 0.5, rel=1e-4)
    if rl.model_facts(rl.load_model(str(base))).family == "TransformerBridge":
        assert row["weight_drift"] == pytest.approx(run.drift[-1], rel=1e-3)
    assert row["weights_digest"] == rl.weights_digest(rl.load_model(str(run.checkpoints[-1])))
