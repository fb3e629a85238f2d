"""Figures, words and page of a study of checkpoints, held to the tables they are made from."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import rim_lens as rl
from rim_lens.measures.checkpoints.result import Comparison
from rim_lens.views import checkpoint_words, plots
from rim_lens.views.checkpoint_report import checkpoint_command, checkpoint_python
from tests.views.browser import HOSTILE, harmless

KINDS = {"careful_0": "careful", "deviate_0": "deviate"}
SETTINGS = rl.CheckpointSettings(
    m=24, n_random_sets=6, n_test_sets=2, n_boot=10, n_permutations=99, max_new_tokens=10, response="none"
)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> rl.CheckpointStudyResult:
    return rl.CheckpointStudy(
        "toy",
        train=["careful", "deviate"],
        train_seeds=[0],
        steps=30,
        n_checkpoints=3,
        n_requests=8,
        settings=SETTINGS,
    ).run(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def report(study) -> Path:
    return rl.write_checkpoint_report(study)


def drawn(figure, name: str) -> list:
    return [trace for trace in figure.data if trace.name == name]


def test_the_course_is_that_of_the_table(study):
    figure = plots.training_course(study.studied, KINDS)
    table = study.studied.table
    for place, column in enumerate(("refused_harmful", "refused_harmless", "accuracy_open")):
        for run, kind in KINDS.items():
            rows = table[table["run"] == run]
            trace = drawn(figure, kind)[place]
            assert list(trace.x) == rows["step"].tolist()
            assert list(trace.y) == rows[column].tolist()
    shown = [trace.name for trace in figure.data if trace.showlegend]
    assert shown == ["careful", "deviate"]
    assert drawn(figure, "careful")[0].line.color != drawn(figure, "deviate")[0].line.color


def test_lost_over_drift_shows_controls_that_went_on_apart(study):
    figure = plots.lost_by_drift(study.comparison, KINDS)
    table = study.comparison.table
    gone_on = drawn(figure, "control, gone on")
    assert len(gone_on) == len(study.comparison.runs) - 2
    for trace, run in [*zip(gone_on, ["matched_0"], strict=True), (drawn(figure, "deviate")[0], "deviate_0")]:
        rows = table[table["run"] == run]
        assert list(trace.x) == rows["weight_drift"].tolist()
        assert list(trace.y) == rows["lost"].tolist()
    assert gone_on[0].line.dash == "dash"


def test_metrics_stand_against_the_loss_with_their_correlation(study):
    figure = plots.metrics_against_loss(study.studied, study.correlations, ["ras", "kl", "nothing"], KINDS)
    table = study.studied.table[study.studied.table["step"] > 0]
    for trace, metric in zip(drawn(figure, "deviate"), ("ras", "kl"), strict=True):
        rows = table[table["run"] == "deviate_0"]
        assert list(trace.x) == rows[metric].tolist()
        assert list(trace.y) == rows["lost"].tolist()
    r = np.corrcoef(table["kl"], table["lost"])[0, 1]
    title = figure.layout.annotations[1].text
    assert f"r = {r:.2f}, 6 points of 2 runs, no p" in title
    with pytest.raises(ValueError, match="no metric"):
        plots.metrics_against_loss(study.studied, study.correlations, ["nothing"])


def test_the_band_is_that_of_the_random_sets(study):
    figure = plots.ras_beside_random(study.studied)
    random = study.studied.random
    band, mean, own = (
        drawn(figure, name)[1] for name in ("random sets, 95 % of them", "their mean", "the chosen neurons")
    )
    values = random[(random["run"] == "deviate_0") & (random["step"] == 30)]["ras"]
    assert band.y[2] == pytest.approx(np.quantile(values, 0.975))
    assert band.y[3] == pytest.approx(np.quantile(values, 0.025))
    assert mean.y[-1] == pytest.approx(values.mean())
    assert own.y[-1] == study.studied.row("deviate_0", 30)["ras"]
    nothing = Comparison(
        study.studied.table, study.studied.random.assign(ras=np.nan), study.studied.prompts, {}
    )
    with pytest.raises(ValueError, match="no random set"):
        plots.ras_beside_random(nothing)


def test_names_of_runs_are_literal():
    table = pd.DataFrame(
        {"run": ["<b>x</b>"] * 2, "step": [0, 1], "weight_drift": [0.0, 1.0], "lost": [0.0, 1.0]}
    )
    figure = plots.lost_by_drift(Comparison(table, pd.DataFrame(), pd.DataFrame(), {}))
    assert figure.data[0].name == "&lt;b&gt;x&lt;/b&gt;"


# --- words -------------------------------------------------------------------------------------------


def saying(study, **frames: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """What is said of the same study with other tables."""
    other = replace(study)
    for name, frame in frames.items():
        object.__setattr__(other, name, frame)
    return {one.topic: (one.status, one.text) for one in checkpoint_words.checkpoint_findings(other)}


def test_few_runs_are_told_as_what_cannot_be_told(study):
    said = saying(study)
    assert said["Beyond plain drift: deviate"][0] == "cannot tell"
    assert "1 run cannot show" in said["Beyond plain drift: deviate"][1]
    assert said["Does entanglement follow lost refusal?"][0] == "cannot tell"
    assert "2 runs can be paired" in said["Does entanglement follow lost refusal?"][1]
    assert said["Can the loss be foretold?"][0] == "cannot tell"
    assert not any("shown" in topic for topic in said)


def with_correlations(study, **changes: dict[str, float]) -> pd.DataFrame:
    """Pooled rows of some metrics changed."""
    table = study.correlations.copy()
    for metric, cells in changes.items():
        at = (table["metric"] == metric) & (table["how"] == "pooled") & (table["outcome"] == "lost")
        for name, value in cells.items():
            table.loc[at, name] = value
    return table


@pytest.mark.parametrize(
    ("ras", "drift", "status", "told"),
    [
        ({}, 0.5, "shown", "more than with random sets"),
        ({"p_pearson": 0.2}, 0.5, "not shown", "which run loses refusal is not shown to go with"),
        ({"p_random": 0.3}, 0.5, "not shown", "not set apart"),
        ({}, 0.95, "not shown", "weight drift follows"),
        ({"pearson": -0.9}, 0.5, "not shown", "which run loses refusal is not shown to go with"),
        ({"p_pearson_kind": 0.2}, 0.5, "not shown", "within kinds, which seed"),
        ({"p_pearson_kind": math.nan}, 0.5, "cannot tell", "whether runs of a kind do cannot be told"),
        ({"p_pearson_kind": math.nan, "p_random": 0.3}, 0.5, "not shown", "not set apart"),
    ],
)
def test_entanglement_follows_refusal_only_beyond_exchange_random_sets_and_drift(
    study, ras, drift, status, told
):
    found = {"p_pearson": 0.01, "pearson": 0.9, "p_random": 0.01, "p_pearson_kind": 0.03, "n_random": 6}
    table = with_correlations(study, ras={**found, **ras}, weight_drift={"pearson": drift})
    found = saying(study, correlations=table)["Does entanglement follow lost refusal?"]
    assert found[0] == status
    assert told in found[1]


@pytest.mark.parametrize(
    ("cells", "status", "told"),
    [
        ({"n_runs": 6, "p": 0.03, "finest": 0.03, "mean": 2.0}, "shown", "deviate loses more"),
        ({"n_runs": 6, "p": 0.03, "finest": 0.03, "mean": -2.0}, "shown", "deviate loses less"),
        ({"n_runs": 6, "p": 0.3, "finest": 0.03, "mean": 2.0}, "not shown", "not shown to lose more"),
        ({"n_runs": 3, "p": 0.25, "finest": 0.25, "mean": 2.0}, "cannot tell", "no p below 0.25"),
        ({"n_runs": 0, "p": math.nan, "finest": math.nan}, "cannot tell", "far enough"),
        (
            {"n_runs": 6, "p": 0.03, "finest": 0.03, "mean": -2.0, "least_share": 0.66},
            "cannot tell",
            "came to 0.66",
        ),
    ],
)
def test_a_kind_does_more_than_drift_only_by_a_test_over_runs(study, cells, status, told):
    table = study.beyond_drift.copy()
    for name, value in {"least_share": 1.0, **cells}.items():
        table[name] = value
    found = saying(study, beyond_drift=table)["Beyond plain drift: deviate"]
    assert found[0] == status
    assert told in found[1]


@pytest.mark.parametrize(
    ("cells", "status", "told"),
    [
        ({"p": 0.01, "p_kind": 0.03}, "shown", "within kinds too"),
        ({"p": 0.01, "p_kind": 0.3}, "not shown", "is not shown to foretell"),
        ({"p": 0.2, "p_kind": 0.03}, "not shown", "is not shown to foretell"),
        ({"p": 0.01, "p_kind": math.nan, "reason_kind": "too few seeds"}, "cannot tell", "too few seeds"),
        ({"p": math.nan, "reason": "too few ways"}, "cannot tell", "too few ways"),
        ({"p": 0.01, "p_kind": 0.03, "skill": 0.1}, "not shown", "is not shown to foretell"),
    ],
)
def test_a_loss_is_foretold_only_beyond_kinds_drift_and_the_loss_so_far(study, cells, status, told):
    table = pd.DataFrame({"metric": ["ras", "weight_drift", "lost"], "skill": [0.5, 0.2, 0.3]}).assign(
        outcome="lost", first=1, rmse=1.0, rmse_mean=2.0, p=0.5, p_kind=0.5, n_runs=12, n_permutations=99
    )
    table["reason"] = table["reason_kind"] = ""
    for name, value in cells.items():
        table.loc[0, name] = value
    found = saying(study, forecast=table)["Can the loss be foretold?"]
    assert found[0] == status
    assert told in found[1]


def test_every_run_of_a_kind_must_have_lost_before_it_is_shown(study):
    ends = study.ends.copy()
    ends["lost_rate"], ends["lost_rate_p"] = 0.5, 0.01
    ends["lost_rate_families"] = 10
    topic = "Refusal after training on deviate chains"
    assert saying(study, ends=ends)[topic][0] == "shown"
    ends.loc[ends["run"] == "deviate_0", "lost_rate_p"] = 0.2
    assert saying(study, ends=ends)[topic][0] == "not shown"
    ends["lost_rate_families"] = 4
    assert saying(study, ends=ends)[topic][0] == "cannot tell"


# --- page --------------------------------------------------------------------------------------------


@pytest.mark.chromium
def test_the_page_opens_offline_and_draws_every_figure(study, browser, tmp_path):
    named = replace(study, design={**study.design, "model": " ".join(HOSTILE)})
    harmless(browser, rl.write_checkpoint_report(named, tmp_path / "report.html"), [" ".join(HOSTILE)])
    for width in (1280, 800):
        browser.set_window_size(width, 1000)
        inner, page = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert page <= inner
    assert len(browser.find_elements("css selector", ".plot .main-svg")) >= 5


def test_the_same_for_machines(report, study):
    told = json.loads(report.with_suffix(".json").read_text())
    assert len(told["checkpoints"]) == len(study.comparison.table)
    assert told["missing"] == []
    assert {one["status"] for one in told["verdict"]} <= {"shown", "not shown", "cannot tell", "note"}
    text = report.with_suffix(".md").read_text()
    for words in ("## Beside plain drift", "in one run: mean (range)", "Refusal lost beyond equal drift"):
        assert words in text
    assert told["sections"][:3] == ["gate", "course", "drift"]


def test_how_to_run_it_again_is_told(study, tmp_path):
    assert checkpoint_command(study) is None  # n_boot and others are for Python alone
    assert "settings=rl.CheckpointSettings(" in checkpoint_python(study)
    plain = replace(study, design={**study.design, "settings": {**vars(rl.CheckpointSettings()), "m": 24}})
    line = checkpoint_command(plain)
    assert line == (
        "rim-lens compare toy --train careful,deviate --seeds 0 --steps 30 --checkpoints 3 --operator=- --requests 8 --m 24"
        " --out FOLDER"
    )
    code = checkpoint_python(plain)
    made = eval(code.split("study = ")[1].splitlines()[0], {"rl": rl})  # noqa: S307 - our own words
    assert made.train == ("careful", "deviate")
    assert made.steps == 30


def test_an_interrupted_study_says_what_is_missing(study, tmp_path):
    half = replace(study, path=tmp_path, design={**study.design, "runs": study.design["runs"]})
    (tmp_path / "timings.json").write_text("{}")
    page = rl.write_checkpoint_report(half)
    assert "Not measured yet: neurons/neurons.json" in page.with_suffix(".md").read_text()
    assert "Interrupted" in half._repr_html_()
