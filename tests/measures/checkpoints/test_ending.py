"""What runs ended at: against SciPy and plain counting, on lines made by hand."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest

from rim_lens.measures.checkpoints.ending import at_the_end, beyond_drift
from rim_lens.measures.checkpoints.result import Comparison


def made(scores: dict[int, list[float]], outcomes: dict[int, list[str]], kind: str = "harmful") -> Comparison:
    """One run, two requests a family."""
    lines = [
        {
            "run": "a",
            "step": step,
            "kind": kind,
            "prompt": f"p{place}",
            "family": f"f{place // 2}",
            "score": score,
            "outcome": outcomes[step][place],
        }
        for step, values in scores.items()
        for place, score in enumerate(values)
    ]
    table = pd.DataFrame({"run": "a", "step": sorted(scores)})
    return Comparison(table, pd.DataFrame(), pd.DataFrame(lines), {})


def p_by_hand(values: np.ndarray) -> float:
    families = values.reshape(-1, 2).sum(axis=1)
    families = families[families != 0]
    sums = [abs(np.dot(signs, families)) for signs in product((1, -1), repeat=len(families))]
    return float(np.mean(np.array(sums) >= abs(families.sum()) - 1e-9))


def test_the_last_checkpoint_is_held_against_the_base_request_by_request():
    rng = np.random.default_rng(0)
    scores = {0: rng.normal(4, 1, 8), 5: rng.normal(3, 1, 8), 10: rng.normal(1, 2, 8)}
    written = {0: ["refuse"] * 8, 5: ["refuse"] * 8, 10: ["refuse", "comply", "other", "comply"] * 2}
    row = at_the_end(made({step: list(one) for step, one in scores.items()}, written)).iloc[0]
    gap = scores[0] - scores[10]
    assert row["step"] == 10
    assert row["lost"] == pytest.approx(gap.mean())
    assert (row["lost_before"], row["lost_after"]) == pytest.approx((scores[0].mean(), scores[10].mean()))
    assert row["lost_p"] == pytest.approx(p_by_hand(gap))
    assert row["lost_low"] < gap.mean() < row["lost_high"]
    lost = np.array([0.0, 1, 1, 1] * 2)
    assert (row["lost_rate"], row["lost_rate_before"], row["lost_rate_after"]) == (0.75, 1.0, 0.25)
    assert row["lost_rate_p"] == pytest.approx(p_by_hand(lost))
    assert (row["lost_n"], row["lost_families"]) == (8, 4)
    assert math.isnan(row["lost_rate_harmless"])
    assert row["lost_right_n"] == 0


def test_answers_that_were_not_asked_for_are_no_loss_of_them():
    written = {0: [""] * 4, 3: [""] * 4}
    nothing = [float("nan")] * 4
    row = at_the_end(made({0: nothing, 3: nothing}, written, "reasoning")).iloc[0]
    assert math.isnan(row["lost_right"])
    answered = {0: ["right"] * 4, 3: ["right", "wrong", "wrong", "wrong"]}
    row = at_the_end(made({0: nothing, 3: nothing}, answered, "reasoning")).iloc[0]
    assert (row["lost_right"], row["lost_right_after"]) == (0.75, 0.25)


def matched(differences: dict[str, list[float]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "kind": "deviate",
                "by": "weights",
                "target": target,
                "step": 10 * (place + 1),
                "drift": 0.1 * (place + 1),
                "lost_difference": value,
                "lost_low": value - 1,
                "lost_high": value + 1,
            }
            for target, values in differences.items()
            for place, value in enumerate(values)
        ]
    )


def test_runs_count_by_the_last_checkpoint_that_has_a_control():
    runs = {"a": [0.0, 3.0], "b": [2.0, math.nan], "c": [9.0, -0.5], "d": [math.nan, math.nan]}
    row = beyond_drift(matched(runs)).iloc[0]
    assert (row["n_runs"], row["n_left_out"], row["n_above"], row["n_below"]) == (3, 1, 2, 0)
    assert (row["mean"], row["least"], row["most"]) == pytest.approx((1.5, -0.5, 3.0))
    # Of 8 ways to sign 3, 2 and .5, four have a sum of at least 4.5 in size: ±(3 + 2 ± .5).
    assert row["p"] == pytest.approx(4 / 8)
    assert row["finest"] == pytest.approx(2 / 8)
    assert row["share_of_drift"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert row["least_share"] == pytest.approx(0.5)


def test_no_run_with_a_control_is_told_and_no_error():
    row = beyond_drift(matched({"a": [math.nan]})).iloc[0]
    assert (row["n_runs"], row["n_left_out"]) == (0, 1)
    assert math.isnan(row["p"])
    assert beyond_drift(matched({"a": [1.0]}).iloc[:0]).empty
