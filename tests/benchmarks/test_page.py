"""docs/speed.md is what docs/evidence/bench.json, recall.json and growth.json say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.benchmarks import recall, scans
from tests.benchmarks.page import EVIDENCE, GROWTH, PAGE, written


def test_the_page_is_what_was_measured() -> None:
    found = json.loads(EVIDENCE.read_text(encoding="utf-8"))
    assert written() == PAGE.read_text(encoding="utf-8")
    for name, part in found["parts"].items():
        assert part["command"].startswith("make bench")
        for figure in part["figures"] if name != "profiles" else ():
            ours, theirs = (
                figure[key]
                for key in (
                    ("value", "rival_value") if "value" in figure else ("cpu_seconds", "rival_cpu_seconds")
                )
            )
            more_is_better = figure["goal"] is not None and figure["goal"].startswith("≥")
            assert figure["ratio"] == pytest.approx(theirs / ours if more_is_better else ours / theirs), name
            if figure["goal"] is not None:
                goal = float(figure["goal"].split()[1])
                assert figure["met"] == (
                    figure["ratio"] >= goal if more_is_better else figure["ratio"] <= goal
                )
            assert (figure.get("largest_difference_nats") or 0) < 1e-4


def test_as_many_heads_are_confirmed_as_recall_asks_for() -> None:
    """In the reading that the loop takes, on as many prompts as are scanned, in each of the three models."""
    found = json.loads(recall.EVIDENCE.read_text(encoding="utf-8"))
    tables = recall.summary(found, "none")
    assert {len(table) for table in tables.values()} == {3}
    assert recall.enough(tables["size", 1]) == scans.N_CONFIRM
    assert found["n_drawn"] == 24


def test_cost_grows_by_no_more_than_is_promised() -> None:
    found = json.loads(GROWTH.read_text(encoding="utf-8"))
    assert {one["over"].split()[0].rstrip(",") for one in found["series"]} == {
        "prompts",
        "tokens",
        "layers",
        "heads",
        "new",
    }
    for one in found["series"]:
        sizes = [size for size, some in zip(one["sizes"], one["cpu_seconds"], strict=True) for _ in some]
        seconds = [second for some in one["cpu_seconds"] for second in some]
        fitted = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        assert fitted == pytest.approx(one["slope"])
        assert one["low"] <= one["promised"], one["what"]


def test_two_models_take_less_than_both_at_once() -> None:
    two = json.loads(GROWTH.read_text(encoding="utf-8"))["two_models"]
    assert two["both"] <= two["one"] + two["accumulators"] + two["shard"]
    assert two["held"] > two["one"] + two["weights"]  # or nothing would be shown by it
