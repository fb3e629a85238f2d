"""docs/views.md says what docs/evidence/views.json holds, the goals are kept, and a sample is measured again."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from tests import view_sizes
from tests.views.browser import require_chromium

FOUND = json.loads(view_sizes.EVIDENCE.read_text(encoding="utf-8"))


def test_the_page_is_made_from_the_evidence() -> None:
    assert view_sizes.PAGE.read_text(encoding="utf-8") == view_sizes.page(FOUND)


def test_every_page_is_measured_and_keeps_its_goal() -> None:
    assert [one["page"] for one in FOUND["pages"]] == list(view_sizes.PAGES)
    for one in FOUND["pages"]:
        made = view_sizes.PAGES[one["page"]]
        assert (one["what"], one["goal"]) == (made.what, dict(made.goal))
        assert len(one["load_s"]) == view_sizes.N_LOADS
        if made.goal:
            assert one["megabytes"] <= made.goal["megabytes"]
            assert statistics.median(one["load_s"]) <= made.goal["seconds"]
    largest = FOUND["pages"][FOUND["largest"]]
    assert "32 × 32 heads, 2048 tokens" in largest["what"]
    assert largest["megabytes"] > 20  # it is full of rows, so that its time means something
    assert FOUND["peak_gigabytes"] < FOUND["patterns_gigabytes"]


@pytest.mark.chromium
def test_a_page_measured_again_is_as_large_and_answers_clicks(tmp_path: Path) -> None:
    require_chromium()
    kept = FOUND["pages"][0]
    again = view_sizes.measured(kept["page"], tmp_path, n_loads=1)
    assert again["megabytes"] == pytest.approx(kept["megabytes"], rel=0.05)
    assert len(again["click_ms"]) == view_sizes.N_CLICKS
    assert 0 < again["busy_s"][0] < 30
