"""The page of statistics is what its evidence says, and a sample of it comes out again."""

from __future__ import annotations

import json

import pytest

from tests import calibration


@pytest.fixture(scope="module")
def found():
    return json.loads(calibration.EVIDENCE.read_text(encoding="utf-8"))


def test_the_page_is_made_from_the_evidence(found) -> None:
    assert calibration.PAGE.read_text(encoding="utf-8") == calibration.page(found)


def test_levels_hold_and_the_wrong_way_shows(found) -> None:
    for name, shares in found["levels"].items():
        for alpha in calibration.ALPHAS:
            slack = 3.5 * (alpha * (1 - alpha) / found["n_runs"]) ** 0.5
            assert (shares[str(alpha)] <= alpha + slack) == (name not in calibration.WRONG), (name, alpha)


def test_a_sample_comes_out_again(found) -> None:
    again = calibration.levels(n_runs=300)
    for name, shares in found["levels"].items():
        assert again[name]["0.1"] == pytest.approx(shares["0.1"], abs=0.1)
    recorded = {row["families"]: row for row in found["power"]}
    for row in calibration.power(n_models=2):
        assert row["both_found"] == recorded[row["families"]]["both_found"]
        assert row["smallest_true_effect"] >= recorded[row["families"]]["smallest_true_effect"] - 1e-3
