"""docs/checkpoints.md: the page is that of its figures, and a figure is what training and scoring by hand give."""

from __future__ import annotations

import json
from collections import Counter

import pytest

import rim_lens as rl
from rim_lens.organisms.toy import load_toy
from rim_lens.organisms.toy.recipe import finetune_toy
from rim_lens.organisms.toy.truth import refusal_log_odds
from rim_lens.prompts.toy import toy_prompts
from tests import checkpoint_verdicts

FOUND = json.loads(checkpoint_verdicts.EVIDENCE.read_text())


def test_the_page_is_that_of_its_figures():
    assert checkpoint_verdicts.PAGE.read_text() == checkpoint_verdicts.page(FOUND)


def test_every_run_that_was_asked_for_is_there():
    counts = Counter((row["study"].split()[0], row["kind"]) for row in FOUND["ends"])
    kinds = ("careful", "confirm", "deviate")
    assert counts == {(operator, kind): 6 for operator in ("minus", "plus") for kind in kinds}
    assert Counter(row["run"] for row in FOUND["checkpoints"]).most_common(1)[0][1] == 6
    ras = {row["how"]: row for row in FOUND["correlations"]["all"] if row["metric"] == "ras"}
    assert (ras["pooled"]["n"], ras["across"]["n"]) == (216, 36)


def test_statistics_are_told_again_from_the_tables_and_from_nothing_else(monkeypatch):
    """Of two metrics, for time; the one whose numbers were not kept has no p within kinds, and what random sets say stays."""
    monkeypatch.setattr(checkpoint_verdicts, "METRICS", ("arithmetic", "cka_ratio_model"))
    lines = {
        of: [row for row in rows if row["metric"] in checkpoint_verdicts.METRICS]
        for of, rows in FOUND["correlations"].items()
    }
    stripped = [
        {name: cell for name, cell in row.items() if name != "cka_ratio_model"}
        for row in FOUND["checkpoints"]
    ]
    asked = {**FOUND, "correlations": lines, "checkpoints": stripped, "forecast": [], "beyond_drift": []}
    told = checkpoint_verdicts.retold(asked)
    assert told["beyond_drift"] == FOUND["beyond_drift"]
    after = {row["metric"]: row for row in told["forecast"]}
    for row in FOUND["forecast"]:
        if row["metric"] in after:
            assert after[row["metric"]] == row
    for of, rows in lines.items():
        for old, new in zip(rows, told["correlations"][of], strict=True):
            assert (old["metric"], old["how"], old["p_random"]) == (
                new["metric"],
                new["how"],
                new["p_random"],
            )
            if new["metric"] == "arithmetic":
                assert (new["p_pearson"], new["p_pearson_kind"]) == (old["p_pearson"], old["p_pearson_kind"])
            else:
                assert new["p_pearson_kind"] is None
                assert new["reason_kind"] == checkpoint_verdicts.NOT_KEPT
    assert told["retold"]["command"].endswith("--retell")
    assert told["date"] == FOUND["date"]
    other = [{**row, "lost": -row["lost"]} for row in stripped]
    with pytest.raises(ValueError, match="Measure again"):
        checkpoint_verdicts.retold({**asked, "checkpoints": other})


@pytest.mark.parametrize("kind", ["careful", "deviate"])
def test_the_first_checkpoint_of_the_shipped_toy_is_what_plain_training_gives(kind):
    """No study, no hooks: the recipe's own trainer and the truth's own score."""
    base, _ = load_toy()
    harmful = toy_prompts("harmful", split="evaluate")
    tuned = finetune_toy(base, kind, "-", steps=53, seed=0)
    lost = float((refusal_log_odds(base, harmful) - refusal_log_odds(tuned, harmful)).mean())
    row = next(row for row in FOUND["checkpoints"] if (row["run"], row["step"]) == (f"minus 0/{kind}_0", 53))
    assert row["lost"] == pytest.approx(lost, abs=0.2)


def test_the_study_that_made_them_can_be_planned(tmp_path):
    study = checkpoint_verdicts.study_of(0, "-", tmp_path)
    assert isinstance(study, rl.CheckpointStudy)
    training = next(step for step in study.plan().steps if step.stage == "training")
    assert training.passes == 3 * checkpoint_verdicts.STEPS
