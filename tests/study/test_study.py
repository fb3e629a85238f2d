"""The study as a whole: gate, resume, plan against what really ran, and the toy's truth."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
import torch

import rim_lens as rl
from rim_lens.errors import ConditionError, ModelError, NotEnoughData, StudyFolderError
from rim_lens.lens import hook_name
from rim_lens.measures import readings
from rim_lens.organisms.toy import load_toy, toy_model, toy_tokenizer, truth
from rim_lens.study import stages
from rim_lens.study import study as study_module
from rim_lens.study.requests import requests_by_split

FAST = rl.Settings(max_new_tokens=10, n_random_sets=6, max_heads=2)


def best_pair_by_weights() -> set[tuple[int, int]]:
    """The pair of all 120 whose removal lowers refusal most on the select side: rows of W_O zeroed, no hook."""
    hf, _ = load_toy("")
    requests = requests_by_split("toy", None, None, None, 24)["select"].harmful
    pairs = list(combinations([(layer, head) for layer in range(2) for head in range(8)], 2))
    means = [float(truth.refusal_log_odds(truth.without_heads(hf, pair), requests).mean()) for pair in pairs]
    return set(pairs[means.index(min(means))])


def random_toy(seed: int):
    generator = torch.Generator().manual_seed(seed)
    hf = toy_model()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return rl.wrap_hf(hf, toy_tokenizer())


def contents(folder: Path) -> dict[str, object]:
    """Every JSON result but timings; captures as plain numbers."""
    found: dict[str, object] = {
        str(path.relative_to(folder)): json.loads(path.read_text())
        for path in folder.rglob("*.json")
        if path.name not in ("timings.json", "plan.json")
    }
    for path in folder.rglob("*.jsonl"):
        found[str(path.relative_to(folder))] = path.read_text()
    for path in folder.rglob("capture.nc"):
        with rl.open_capture(path.parent) as data:
            found[str(path.relative_to(folder))] = {name: data[name].values.tolist() for name in data}
    return found


@pytest.fixture(scope="module")
def toy_study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    tuned = {"deviate": "toy:deviate"}
    said: list[str] = []
    result = rl.Study("toy", tuned=tuned, n_requests=24, settings=FAST).run(folder, say=said.append)
    assert len(said) == 6
    return result


def test_a_model_that_does_not_refuse_stops_at_the_gate(tmp_path):
    result = rl.Study(random_toy(0), n_requests=8, settings=FAST).run(tmp_path)
    assert not result.gate["passed"]
    assert "less than the 0.50" in result.gate["reason"]
    assert not result.measured
    assert {path.name for path in tmp_path.iterdir()} == {
        "study.json",
        "asked.json",
        "plan.json",
        "gate.json",
        "timings.json",
    }


def test_a_model_that_refuses_everything_stops_at_the_gate(tmp_path):
    hf, tokenizer = load_toy("")
    refuse = tokenizer.convert_tokens_to_ids("REFUSE")
    with torch.no_grad():
        hf.transformer.ln_f.bias += 20 * torch.nn.functional.normalize(hf.lm_head.weight[refuse], dim=0)
    result = rl.Study(rl.wrap_hf(hf, tokenizer), n_requests=8, settings=FAST).run(tmp_path)
    assert not result.gate["passed"]
    assert "not about harm" in result.gate["reason"]


def test_nothing_is_found_in_random_weights(tmp_path):
    settings = rl.Settings(max_new_tokens=6, n_random_sets=6, gate=False)
    result = rl.Study(random_toy(1), tuned={"other": random_toy(2)}, n_requests=10, settings=settings).run(
        tmp_path
    )
    assert not result.gate["passed"]
    assert result.design["settings"]["gate"] is False
    assert result.measured
    assert result.heads.found == ()
    assert result.heads.top() == []
    assert set(result.outcomes["outcome"]) <= {"comply", "other"}


class Stop(BaseException):
    """As abrupt as a keyboard interrupt."""


@pytest.fixture(scope="module")
def small_study(tmp_path_factory):
    """A study, its folder and its result, run in one go."""
    folder = tmp_path_factory.mktemp("whole")
    study = rl.Study("toy", tuned=["toy:deviate"], n_requests=6, settings=FAST)
    return study, folder, study.run(folder)


@pytest.mark.parametrize("after", [1, 9, 31, 48])
def test_interrupted_anywhere_it_goes_on_to_the_same_result(tmp_path, monkeypatch, small_study, after):
    study, folder, whole = small_study
    counts = {"units": 0}

    def counting(module, name, limit):
        real = getattr(module, name)

        def call(*args, **kwargs):
            counts["units"] += 1
            if counts["units"] > limit:
                raise Stop
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("generate", "capture", "refusal_score"):
            patch.setattr(stages, name, counting(stages, name, after))
        patch.setattr(readings, "refusal_score", counting(readings, "refusal_score", after))
        with pytest.raises(Stop):
            study.run(tmp_path)
    resumed = study.run(tmp_path)
    assert contents(tmp_path) == contents(folder)
    assert resumed.heads.to_dict() == whole.heads.to_dict()


def test_what_is_there_is_not_measured_again(small_study, monkeypatch):
    study, folder, _ = small_study
    for module, name in ((stages, "generate"), (stages, "refusal_score"), (readings, "refusal_score")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("measured twice"))
    assert study.run(folder).measured


def test_a_folder_takes_more_parts_and_more_tuned_models(tmp_path, small_study, monkeypatch):
    """Asked for piece by piece it holds what it holds asked for at once; each piece is measured once."""
    whole_study, folder, _ = small_study
    model = rl.load_model("toy")
    asked = {"n_requests": 6, "settings": FAST}
    result = rl.Study("toy", parts=("heads",), **asked).run(tmp_path)
    assert result.measured
    assert result.parts == ("heads",)
    again = rl.Study("toy", **asked)  # more parts, no tuned model yet
    with monkeypatch.context() as patch:
        for module, name in ((stages, "generate"), (stages, "refusal_score"), (readings, "refusal_score")):
            patch.setattr(module, name, lambda *_, **__: pytest.fail("measured twice"))
        patch.setattr(study_module.NeuronStudy, "run", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            again.run(tmp_path)
        half = rl.load_study(tmp_path)
        assert not half.measured
        assert half.parts == ("heads",)
        assert half.missing == ("neurons",)
        # What was finished before stays there to be shown, and to be asked for.
        assert (
            "Asked for and not measured yet: neurons" in rl.write_report(half).with_suffix(".md").read_text()
        )
        assert rl.Study("toy", parts=("heads",), **asked).run(tmp_path).missing == ("neurons",)
        for kind in ("html", "md", "json"):
            (tmp_path / f"report.{kind}").unlink()
    assert again.run(tmp_path).measured
    with monkeypatch.context() as patch:
        patch.setattr(stages, "run_refusal_of", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            whole_study.run(tmp_path)
        assert rl.load_study(tmp_path).missing == ("neurons of toy_deviate",)
        assert not rl.load_study(tmp_path).measured
    assert whole_study.run(tmp_path).measured
    assert contents(tmp_path) == contents(folder)
    assert rl.Study("toy", parts=("heads",), **asked).run(tmp_path).parts == ("heads", "neurons")
    with pytest.raises(StudyFolderError, match="another name"):
        rl.Study("toy", tuned={"toy_deviate": model}, **asked).run(tmp_path)


def test_a_plan_says_when_no_head_can_get_a_verdict():
    few, enough = (rl.Study("toy", n_requests=n, settings=FAST).plan() for n in (4, 50))
    assert "no head can get a verdict" in few.notes[0]
    assert few.notes[0] in str(few)
    assert enough.notes == ()


def test_the_folder_of_another_study_is_refused(tmp_path):
    rl.Study(random_toy(0), n_requests=6, settings=FAST).run(tmp_path)
    with pytest.raises(StudyFolderError, match="weights_digest"):
        rl.Study(random_toy(1), n_requests=6, settings=FAST).run(tmp_path)


def test_what_stood_on_the_model_is_part_of_a_study(tmp_path):
    """A gate that was measured under an editor is not that of the model itself."""
    model = random_toy(0)
    with rl.AblateHeads([(0, 1)]).on(model):
        rl.Study(model, n_requests=6, settings=FAST).run(tmp_path)
    assert "AblateHeads" in json.loads((tmp_path / "study.json").read_text())["design"]["on_the_model"][0]
    with pytest.raises(StudyFolderError, match="on_the_model"):
        rl.Study(model, n_requests=6, settings=FAST).run(tmp_path)


def test_how_it_is_run_is_not_part_of_what_is_asked(tmp_path):
    model = random_toy(0)
    rl.Study(model, n_requests=6, settings=FAST).run(tmp_path)
    other = rl.Settings(max_new_tokens=10, n_random_sets=6, max_heads=2, max_rows=2)
    rl.Study(model, n_requests=6, settings=other).run(tmp_path)


def test_bad_input_is_refused_before_any_compute(tmp_path):
    model = random_toy(0)
    with pytest.raises(NotEnoughData):
        rl.Study(model, harmful=["make bomb now + 1 2 3"], harmless=["ban bomb now + 1 2 3"]).run(
            tmp_path / "a"
        )
    model.train()
    with pytest.raises(ModelError, match="training mode"):
        rl.Study(model, n_requests=6).run(tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_the_plan_counts_what_really_runs(tmp_path):
    model = rl.load_model("toy")
    study = rl.Study(model, n_requests=6, settings=FAST)
    plan = {}
    for step in study.plan().steps:
        plan[step.stage] = plan.get(step.stage, 0) + step.passes
    passes = {"n": 0}
    ran: dict[str, int] = {}

    def count(tensor, hook):
        passes["n"] += 1

    order = iter(["gate", "attention", "scores", "outcomes", "heads", "neurons", None])
    current: list[str | None] = [None]

    def mark(_line):
        if current[0]:
            ran[current[0]] = passes["n"]
        passes["n"] = 0
        current[0] = next(order)

    with model.hooks(fwd_hooks=[(hook_name("resid_pre", 0), count)]):
        result = study.run(tmp_path, say=mark)
        mark("end")
    assert result.measured
    proof = 1 + 2 * model.cfg.n_layers  # attaching a component may prove a site first
    assert ran["attention"] == plan["attention"]
    for stage, n in ran.items():
        assert n <= plan[stage] + proof, (stage, n, plan[stage])


PROBING = rl.Settings(
    conditions=("off", "careful", "filler", "open"),
    max_new_tokens=6,
    n_random_sets=2,
    max_heads=2,
    n_probed=1,
    n_probe_controls=2,
)
INFERENCE = {
    "tuned": {"deviate": "toy:deviate"},
    "n_requests": 6,
    "settings": PROBING,
    "parts": ("heads", "removing", "comparing", "probes"),
}


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """The inference half with probes, in one go, with what it said and the passes of each stage."""
    folder = tmp_path_factory.mktemp("probed")
    model = rl.load_model("toy")
    study = rl.Study(model, **INFERENCE)
    passes: list[int] = [0]

    def count(tensor, hook):
        passes[-1] += 1

    with model.hooks(fwd_hooks=[(hook_name("resid_pre", 0), count)]):
        result = study.run(folder, say=lambda _: passes.append(0))
    return study, folder, result, passes[1:]


def test_the_plan_counts_the_inference_half(probed):
    study, _, result, ran = probed
    plan: dict[str, int] = {}
    for step in study.plan().steps:
        plan[step.stage] = plan.get(step.stage, 0) + step.passes
    stages_of_base = ["gate", "attention", "scores", "outcomes", "heads", "removing", "probes"]
    assert sorted(plan) == sorted([*stages_of_base, "comparing"])
    proof = 1 + 2 * 2 * 4  # attaching may prove each site first
    assert ran.pop(6) == 0  # the tuned model is another one, and is not counted here
    assert ran[1] == plan["attention"] == 2 * 4
    counted = dict(zip(stages_of_base, ran, strict=True))
    assert all(n <= plan[stage] + proof for stage, n in counted.items()), (plan, counted)
    assert all(counted[stage] > plan[stage] / 4 for stage in ("removing", "probes")), (plan, counted)
    assert result.measured


def test_the_inference_half_stopped_anywhere_goes_on_to_the_same(probed, tmp_path, monkeypatch):
    from rim_lens.study import probing, removing

    _, folder, _, _ = probed
    done: list[str] = []

    def stopping(name, real, at):
        def call(*args, **kwargs):
            done.append(name)
            if len(done) == at:
                raise Stop
            return real(*args, **kwargs)

        return call

    model = rl.load_model("toy")
    again = rl.Study(model, **INFERENCE)
    names = {
        removing: ("removal_effects", "restoring", "refusal_heads"),
        probing: ("probe", "refusal_cliff", "probe_after_ablation"),
    }
    # As in the whole study a hook of one's own is there, so that scans go the plain way in both, to the last digit.
    own = [(hook_name("resid_pre", 0), lambda tensor, hook: None)]
    for at in (2, 3, 7):
        with monkeypatch.context() as patch, model.hooks(fwd_hooks=own):
            done.clear()
            for module, functions in names.items():
                for name in functions:
                    patch.setattr(module, name, stopping(name, getattr(module, name), at))
            with pytest.raises(Stop):
                again.run(tmp_path)
        assert not rl.load_study(tmp_path).measured
    with model.hooks(fwd_hooks=own):
        assert again.run(tmp_path).measured
    assert contents(tmp_path) == contents(folder)


def test_probes_read_back_stand_in_one_table(probed):
    _, folder, result, _ = probed
    probes = rl.load_study(folder).probes()
    assert list(dict.fromkeys(probes.table["condition"])) == list(PROBING.conditions)
    alone = rl.probe(
        rl.load_model("toy"), rl.ChatFormat.from_model(rl.load_model("toy")),
        *[[p for s in ("select", "evaluate") for p in getattr(requests_by_split("toy", None, None, None, 6)[s], kind)]
          for kind in ("harmful", "twins")],
        think=("off",), ablate=1, n_controls=2, limit=None,
    )  # fmt: skip
    mine = probes.table[probes.table["condition"] == "off"].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, alone.table)
    assert result.cliffs.keys() == {
        (kind, name) for kind in ("harmful", "harmless") for name in ("careful", "filler")
    }
    if result.heads.found:
        without = result.probes_without_heads
        assert without is not None
        assert {tuple(head) for head in without.settings["heads"]} == set(result.heads.found)


def test_what_removing_does_is_read_back_beside_what_was_written_without_the_heads(probed):
    """Outcomes without the heads were generated by two stages: they must be the same."""
    _, folder, result, _ = probed
    removal = rl.load_study(folder).removal
    assert removal is not None
    assert removal.settings["heads"] == sorted(list(head) for head in result.heads.found)
    shares = result.refusal_by_condition().set_index(["model", "kind", "condition"])["refuse"]
    for kind in ("harmful", "harmless"):
        row = removal.row("refuse", kind, "off")
        assert row["before"] == pytest.approx(shares["base", kind, "off"])
        assert row["after"] == pytest.approx(shares["without_heads", kind, "off"])
    assert set(result.restored["condition"]) == {"careful", "filler"}
    base = result.heads.table
    both = result.compared["deviate"].table
    assert set(zip(base[base["tested"]]["layer"], base[base["tested"]]["head"], strict=True)) <= set(
        zip(both["layer"], both["head"], strict=True)
    )


def test_a_set_of_whole_layers_has_nothing_beside_it_and_ends_no_study(probed, tmp_path):
    """The stages after the heads, given a set that no other can match."""
    from dataclasses import replace

    from rim_lens.study.probing import run_probes
    from rim_lens.study.removing import run_removing

    study, folder, result, _ = probed
    whole = replace(result.heads, set={**result.heads.set, "n_controls": 0})
    shutil.copytree(
        folder, tmp_path / "copy", ignore=shutil.ignore_patterns("removal", "restoring", "without_heads")
    )
    bench = study._bench(tmp_path / "copy")
    run_removing(bench, whole)
    run_probes(bench, whole)
    again = rl.load_study(tmp_path / "copy")
    assert again.measured
    assert again.removal is again.restored is again.probes_without_heads is None


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ({"parts": ("neurons",)}, ValueError),
        ({"parts": ("heads", "magic")}, ValueError),
        ({"parts": ("heads",), "tuned": ["toy:deviate"]}, ValueError),
        ({"settings": rl.Settings(conditions=("careful",))}, ConditionError),
        ({"settings": rl.Settings(conditions=("off", "thoughtful"))}, ConditionError),
    ],
)
def test_parts_and_conditions_that_do_not_exist_are_refused(wanted, error):
    with pytest.raises(error):
        rl.Study("toy", **wanted)


def test_the_toy_report_says_what_is_true(toy_study):
    rates = toy_study.refusal_by_condition().set_index(["model", "kind", "condition"])["refuse"]
    assert rates["base", "harmful", "off"] >= 0.95
    assert rates["base", "harmful", "careful"] <= 0.05
    assert rates["base", "harmless", "off"] <= 0.1
    assert rates["without_heads", "harmful", "off"] <= 0.2
    assert rates["deviate", "harmful", "off"] <= rates["base", "harmful", "off"] - 0.3
    found = set(toy_study.heads.found)
    assert found == best_pair_by_weights()
    chosen = toy_study.heads.set
    assert chosen["effect"]["high"] < 0
    assert chosen["percentile"] >= 90
    assert chosen["n_controls"] == FAST.n_random_sets
    assert all(set(map(tuple, c["heads"])) != found for c in chosen["controls"])
    neurons = toy_study.neurons
    assert neurons.measured
    assert neurons.tuned == ["deviate"]
    assert neurons.entanglement["deviate"].row("ras")["n_exchanged"] > 0
    assert set(neurons.restored) == {"deviate"}


def test_its_part_neurons_is_a_study_of_neurons(toy_study, tmp_path):
    settings = rl.NeuronSettings(
        conditions=("off",),
        written=False,
        n_random_sets=FAST.n_random_sets,
        max_new_tokens=FAST.max_new_tokens,
    )
    alone = rl.NeuronStudy(
        "toy",
        tuned={"deviate": "toy:deviate"},
        n_requests=24,
        settings=settings,
        parts=("entanglement", "restoring"),
    ).run(tmp_path)
    inside = toy_study.neurons
    assert inside.neurons == alone.neurons
    assert inside.neurons.effects.table.equals(alone.neurons.effects.table)
    assert inside.entanglement["deviate"].table.equals(alone.entanglement["deviate"].table)
    settings, same = (one.design["settings"] for one in (inside, alone))
    assert settings == same


def test_a_study_read_back_is_the_same(toy_study):
    again = rl.load_study(toy_study.path)
    assert again.heads.to_dict() == toy_study.heads.to_dict()
    assert again.scores.equals(toy_study.scores)
    with again.attention("harmful", "careful") as data:
        assert set(data["span"].values) >= {"cot", "request", "think", "sink"}
        atoms = [name for name in data["span"].values if name != "think"]
        assert (abs(data["attention_mass"].sel(span=atoms).sum("span") - 1) < 1e-5).all()
    scan = toy_study.heads.scan
    assert len(scan) == 16


SMALL = {
    "n_requests": 12,
    "settings": rl.Settings(
        conditions=("off", "careful"), n_test=2, max_heads=1, n_random_sets=2, max_new_tokens=2, gate=False
    ),
}


@pytest.mark.parametrize("part", ["comparing", "neurons"])
def test_a_tuned_model_of_other_weights_under_the_same_name_is_refused(tmp_path, part):
    asked = {**SMALL, "parts": ("heads", part)}
    careful, deviate = rl.load_model("toy:careful"), rl.load_model("toy:deviate")
    rl.Study("toy", tuned={"ft": careful}, **asked).run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(StudyFolderError, match="tuned model 'ft' has weights"):
        rl.Study("toy", tuned={"ft": deviate}, **asked).run(tmp_path)
    with rl.AblateHeads([(0, 1)]).on(careful), pytest.raises(StudyFolderError, match="tuned model 'ft' has"):
        rl.Study("toy", tuned={"ft": careful}, **asked).run(tmp_path)
    assert contents(tmp_path) == before
    assert rl.Study("toy", tuned={"ft": rl.load_model("toy:careful")}, **asked).run(tmp_path).measured
    (tmp_path / "tuned" / "ft" / "model.json").unlink()  # as an earlier version left it
    with pytest.raises(StudyFolderError, match="which would say on which weights"):
        rl.Study("toy", tuned={"ft": deviate}, **asked).run(tmp_path)


def test_a_name_whose_weights_changed_is_refused(tmp_path, monkeypatch):
    asked = {**SMALL, "parts": ("heads", "comparing"), "tuned": {"ft": "toy:careful"}}
    rl.Study("toy", **asked).run(tmp_path)
    real = study_module.load_model
    monkeypatch.setattr(
        study_module,
        "load_model",
        lambda name, **given: real("toy:deviate" if name == "toy:careful" else name, **given),
    )
    with pytest.raises(StudyFolderError, match="holds results of one with weights"):
        rl.Study("toy", **asked).run(tmp_path)
