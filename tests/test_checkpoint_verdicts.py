"""docs/checkpoints.md: the page is that of its figures, and a figure is what training and scoring by hand give."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
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


def test_pooled_correlations_are_those_of_the_kept_tables():
    """By numpy, over all checkpoints of all runs."""
    for row in FOUND["correlations"]["all"]:
        if row["how"] == "pooled":
            pairs = [
                (line[row["metric"]], line["lost"])
                for line in FOUND["checkpoints"]
                if line[row["metric"]] is not None
            ]
            assert row["n"] == len(pairs)
            assert row["pearson"] == pytest.approx(np.corrcoef(np.array(pairs).T)[0, 1], abs=1e-4), row[
                "metric"
            ]


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
