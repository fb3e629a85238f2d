"""docs/speed.md is what docs/evidence/bench.json and recall.json say."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks.page import EVIDENCE, PAGE, written


def test_the_page_is_what_was_measured() -> None:
    found = json.loads(EVIDENCE.read_text(encoding="utf-8"))
    assert written() == PAGE.read_text(encoding="utf-8")
    for name, part in found["parts"].items():
        assert part["command"].startswith("make bench")
        for figure in part["figures"]:
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
