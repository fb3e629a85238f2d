"""docs/speed.md is what docs/evidence/bench.json says."""

from __future__ import annotations

import json

from tests.benchmarks.page import EVIDENCE, PAGE, page


def test_the_page_is_what_was_measured():
    found = json.loads(EVIDENCE.read_text(encoding="utf-8"))
    assert page(found) == PAGE.read_text(encoding="utf-8")
    for figure in found["figures"]:
        assert figure["ratio"] == figure["rival_cpu_seconds"] / figure["cpu_seconds"]
        assert (figure["largest_difference_nats"] or 0) < 1e-4
