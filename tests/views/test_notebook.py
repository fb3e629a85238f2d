"""Results as a notebook shows them: in a frame that can run nothing, text of models and tokens taken literally."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rim_lens as rl
from rim_lens.measures.heads.result import RefusalHeads
from tests.views.browser import errors_of, requests_of
from tests.views.test_report import HOSTILE, Reader


@pytest.fixture(scope="module")
def heads() -> RefusalHeads:
    model = rl.load_model("planted")
    requests = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    search = rl.HeadSearch(limit=10, n_random_sets=3)
    return rl.refusal_heads(model, rl.ChatFormat.from_model(model), *requests, search=search)


def inside(html: str) -> Reader:
    """What stands in the one frame that there is, which is sandboxed."""
    ((tag, attributes),) = Reader(html).tags
    assert (tag, attributes["sandbox"]) == ("iframe", None)
    page = Reader(attributes["srcdoc"] or "")
    assert {"script", "img"}.isdisjoint(name for name, _ in page.tags)
    return page


def test_heads_show_the_verdict_first_and_the_set_beside_its_controls(heads: RefusalHeads) -> None:
    text = inside(heads._repr_html_()).text
    rows = [" ".join(line.split()) for line in text.split("\n")]
    first = heads.table.iloc[0]
    assert "".join(rows).count(f"{first['verdict']}L{first['layer']}H{first['head']}") == 1
    for wanted in ("The found set", "What was asked", "read in", "of n = 3 other sets", "no effect shown"):
        assert wanted in text, wanted


def test_verdicts_are_counted_over_all_heads(heads: RefusalHeads) -> None:
    from rim_lens.views.tables import verdict_table

    counts = {row[0]: int(row[1]) for row in verdict_table(heads).rows}
    assert sum(counts.values()) == heads.settings["n_candidates"]
    assert counts["refusal"] == len(heads.top())


def test_heads_that_found_nothing_say_so(heads: RefusalHeads) -> None:
    assert "None. On 10 select requests" in inside(replace(heads, found=(), set={})._repr_html_()).text


def test_names_of_models_run_nothing(heads: RefusalHeads) -> None:
    named = {**heads.settings, "model": {**heads.settings["model"], "name": HOSTILE}}
    assert HOSTILE in inside(replace(heads, settings=named)._repr_html_()).text


def test_probes_show_the_effect_beside_what_separates(toy_study: Any) -> None:
    probes = toy_study.probes()
    text = inside(probes._repr_html_()).text
    assert "AUC [95 %]" in text
    assert "ablated: on harmful" in text
    tested = probes.table[probes.table["effect"].notna()]
    for state in tested["state"]:
        assert state in text
    assert "no probe: one class empty" in inside(toy_study.probes("refusal")._repr_html_()).text


@pytest.mark.chromium
def test_the_frame_opens_offline_and_fits(heads: RefusalHeads, tmp_path: Path, browser: Any) -> None:
    page = tmp_path / "notebook.html"
    page.write_text(
        f"<meta charset='utf-8'><link rel='icon' href='data:,'>{heads._repr_html_()}", encoding="utf-8"
    )
    requests_of(browser), errors_of(browser)
    browser.get(page.as_uri())
    browser.switch_to.frame(0)
    try:
        shown = browser.execute_script("return document.body.innerText")
    finally:
        browser.switch_to.default_content()
    assert "Heads zeroed one by one" in shown
    assert [url for url in requests_of(browser) if not url.startswith("about:")] == [page.as_uri()]
    assert errors_of(browser) == []
