"""A study of neurons: refused before any compute, resumed, grown, stopped at its gate, and the planted truth found."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import rim_lens as rl
from rim_lens.errors import ConditionError, StatisticsError, StudyFolderError
from rim_lens.organisms.planted import planted_truth
from rim_lens.study import neurons as neurons_module
from rim_lens.study.neuron_results import PARTS
from tests.verdicts import random_toy

FAST = rl.NeuronSettings(m=8, scope="model", n_random_sets=20, max_new_tokens=8, min_fraction=1.0)


def planted_study(**changes: object) -> rl.NeuronStudy:
    asked = {"tuned": {"same": "planted", "other": "planted:1"}, "n_requests": 12, "settings": FAST}
    return rl.NeuronStudy("planted", **{**asked, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> rl.NeuronStudyResult:
    return planted_study(parts=PARTS).run(tmp_path_factory.mktemp("whole"))


def numbers_in(folder: Path) -> dict[str, str]:
    """All that was measured, without times and without what each model said about itself."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*.json"))
        if path.name not in ("timings.json", "plan.json", "asked.json")
    }


def test_the_planted_neurons_are_found_and_told(whole):
    assert whole.measured
    assert whole.gate == {"passed": True, "reason": ""}
    assert whole.neurons.neurons == planted_truth().neurons
    assert whole.neurons.effects.verdict == "refusal"
    assert whole.dose["size"].max() == 100
    assert not whole.writers["writer"].any()
    assert set(whole.entanglement) == set(whole.restored) == set(whole.multiverse) == {"same", "other"}
    # A model against itself: nothing moved, and nothing is there to bring back.
    assert whole.entanglement["same"].value("ras", "all") == 0
    assert whole.restored["same"]["effect"].abs().max() < 1e-3


def test_the_test_is_that_of_the_function_itself(whole):
    """The set, tested by hand on the same requests."""
    sides = planted_study()._both
    model = rl.load_model("planted")
    by_hand = rl.neuron_effects(
        model,
        rl.ChatFormat.from_model(model),
        planted_truth().neurons,
        sides["evaluate"].harmful,
        sides["evaluate"].twins,
        n_random_sets=20,
    )
    for kind in ("harmful", "harmless"):
        ours, theirs = (one.row("score", kind, "off") for one in (whole.neurons.effects, by_hand))
        assert ours["change"] == pytest.approx(theirs["change"], abs=1e-5)
        assert ours["random"] == pytest.approx(theirs["random"], abs=1e-5)


def test_a_stopped_run_keeps_what_it_has_and_goes_on(whole, tmp_path, monkeypatch):
    """One folder, stopped at every stage in turn."""

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    missing = []
    for stage in ("dose_curve", "direct_to_logits", "entanglement", "restore_by_neurons"):
        with monkeypatch.context() as patched:
            patched.setattr(neurons_module, stage, stopped)
            with pytest.raises(KeyboardInterrupt):
                planted_study(parts=PARTS).run(tmp_path)
        half = rl.load_neuron_study(tmp_path)
        missing.append(len(half.missing))
        assert half.neurons == whole.neurons
        assert half.neurons.effects is not None
    assert missing == sorted(missing, reverse=True)
    assert missing[-1]
    report = rl.write_neuron_report(half)
    assert "Not measured yet" in report.with_suffix(".md").read_text()
    report.unlink()
    report.with_suffix(".json").unlink()
    report.with_suffix(".md").unlink()
    assert planted_study(parts=PARTS).run(tmp_path).measured
    assert numbers_in(tmp_path) == numbers_in(whole.path)


def test_a_folder_takes_more_parts_and_tuned_models_and_measures_only_these(whole, tmp_path, monkeypatch):
    planted_study(parts=["writers"], tuned=[]).run(tmp_path)
    kept = (tmp_path / "writers.json").stat().st_mtime_ns
    monkeypatch.setattr(neurons_module, "direct_to_logits", None)
    grown = planted_study(parts=["dose", "entanglement"], tuned={"other": "planted:1"}).run(tmp_path)
    assert grown.parts == ("dose", "writers", "entanglement")
    assert grown.measured
    assert (tmp_path / "writers.json").stat().st_mtime_ns == kept
    pd.testing.assert_frame_equal(grown.dose, whole.dose)
    pd.testing.assert_frame_equal(grown.entanglement["other"].table, whole.entanglement["other"].table)
    with pytest.raises(StudyFolderError, match="holds a tuned model 'other'"):
        planted_study(tuned={"other": "toy"}).run(tmp_path)
    with pytest.raises(StudyFolderError, match="another study"):
        planted_study(settings=replace(FAST, m=4)).run(tmp_path)


def test_a_model_that_does_not_refuse_stops_at_the_gate_unless_told_not_to(tmp_path):
    study = rl.NeuronStudy(random_toy(0, 0.2), n_requests=8, settings=FAST)
    stopped = study.run(tmp_path / "a")
    assert not stopped.gate["passed"]
    assert "is refused" in stopped.gate["reason"]
    assert stopped.neurons is None
    assert stopped.missing == ()
    study.settings = replace(FAST, gate=False, min_fraction=0.1, m=40)
    on = study.run(tmp_path / "b")
    assert not on.gate["passed"]
    assert on.measured
    assert "overridden" in rl.write_neuron_report(on).with_suffix(".md").read_text()


def test_pairs_that_agree_on_nothing_end_the_study(tmp_path):
    found = rl.NeuronStudy("toy", n_requests=12, settings=replace(FAST, m=1), tuned=["toy:careful"]).run(
        tmp_path
    )
    assert found.neurons is not None
    assert not len(found.neurons)
    assert found.measured
    assert found.dose is None
    assert not found.entanglement
    assert "None: m = 1" in rl.write_neuron_report(found).with_suffix(".md").read_text()


def test_a_plan_runs_no_model_and_counts_no_less_than_what_runs(tmp_path, monkeypatch):
    study = planted_study(parts=PARTS)
    model, passes = study._model, []
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: passes.append(1))
    plan = study.plan()
    monkeypatch.undo()
    assert not passes
    assert plan.memory > 0
    forward = type(model).forward

    def counted(self, *args, **kwargs):
        passes.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    study.run(tmp_path)
    assert 0 < len(passes) <= sum(step.passes for step in plan.steps)


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"parts": ["heads"]}, ValueError, "parts heads"),
        ({"tuned": {"base": "toy"}}, ValueError, "means something else"),
        ({"settings": replace(FAST, conditions=("open",))}, ConditionError, "not open"),
        ({"settings": replace(FAST, conditions=("off", "off"))}, ConditionError, "each once"),
        ({"settings": replace(FAST, conditions=())}, ConditionError, "none"),
        ({"settings": replace(FAST, conditions=("filler",))}, ConditionError, "not filler"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(changes, error, told):
    with pytest.raises(error, match=told):
        rl.NeuronStudy("no such model", **changes)


def test_a_given_model_stays_where_it_is():
    with pytest.raises(ValueError, match="stays as it is"):
        rl.NeuronStudy(rl.load_model("toy"), dtype=torch.float16)


def test_an_impossible_m_is_refused_before_any_number_is_kept(tmp_path):
    with pytest.raises(StatisticsError, match="m=9999"):
        planted_study(settings=replace(FAST, m=9999)).run(tmp_path)
    assert not (tmp_path / "neurons").exists()


def test_a_corrupt_table_says_which_file(whole, tmp_path):
    shutil.copytree(whole.path, tmp_path / "copy")
    (tmp_path / "copy" / "dose.json").write_text(json.dumps({"table": 3}))
    with pytest.raises(StudyFolderError, match=r"dose\.json"):
        _ = rl.load_neuron_study(tmp_path / "copy").dose
