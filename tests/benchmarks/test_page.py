"""docs/speed.md is what docs/evidence/bench.json says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.benchmarks.page import EVIDENCE, GROWTH, PAGE, page


def test_the_page_is_what_was_measured():
    found = json.loads(EVIDENCE.read_text(encoding="utf-8"))
    assert page(found) == PAGE.read_text(encoding="utf-8")
    for figure in found["figures"]:
        assert figure["ratio"] == figure["rival_cpu_seconds"] / figure["cpu_seconds"]
        assert (figure["largest_difference_nats"] or 0) < 1e-4


def test_cost_grows_by_no_more_than_is_promised():
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


def test_two_models_take_less_than_both_at_once():
    two = json.loads(GROWTH.read_text(encoding="utf-8"))["two_models"]
    assert two["both"] < two["one"] + 0.6 * two["weights"]
    assert two["held"] > two["one"] + two["weights"]  # or nothing would be shown by it
