from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rim_lens.study import StudyResult
from rim_lens.views import study_html, write_report
from rim_lens.views.text import visible
from tests.views.browser import act_until, harmless, open_page
from tests.views.planted import Planted, write

Make = Callable[..., StudyResult]
HOSTILE = "</script><img src=x onerror=window.hit=1>"
TOKENS = (
    "<think>",
    HOSTILE,
    "\U0001f600",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u202eabc",
    "a\x07\tb",
    "`|",
    "%{y} {{7*7}} ${x} &lt;",
)
LIMIT = 12_000_000


@pytest.fixture(scope="module")
def toy_report(toy_study: StudyResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(toy_study, tmp_path_factory.mktemp("page") / "report.html")


class Reader(HTMLParser):
    """Tags with attributes, and text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data


def test_three_files_without_a_trace_of_the_unfinished(toy_report: Path) -> None:
    assert sorted(path.name for path in toy_report.parent.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    assert toy_report.stat().st_size < LIMIT


def test_the_page_asks_for_nothing_and_names_its_scripts(toy_report: Path) -> None:
    page = Reader(toy_report.read_text(encoding="utf-8"))
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data"):
            assert re.match(r"#|data:|$", attributes.get(name) or ""), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and "Content-Security-Policy" in a.values()
    )
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    scripts = next(part for part in policy.split(";") if "script-src" in part)
    assert scripts.count("'sha256-") == 2
    assert "unsafe-inline" not in scripts


def test_numbers_for_machines_are_those_of_the_study(toy_study: StudyResult, toy_report: Path) -> None:
    told = json.loads(toy_report.with_suffix(".json").read_text(), parse_constant=pytest.fail)
    off = next(
        row
        for row in told["outcomes"]
        if (row["model"], row["kind"], row["condition"]) == ("base", "harmful", "off")
    )
    counted = toy_study.outcomes.query("model == 'base' and kind == 'harmful' and condition == 'off'")
    assert off["refuse"] == (counted["outcome"] == "refuse").sum()
    assert told["heads"]["found"] == [list(head) for head in toy_study.heads.found]
    assert told["design"]["weights_digest"] == toy_study.design["weights_digest"]
    assert told["reproduce"]["command"] is None  # no command runs every part
    assert "parts=('heads', 'removing', 'comparing', 'probes', 'neurons')" in told["reproduce"]["python"]
    assert {"removal", "restored", "compared", "probes", "cliff"} <= set(told)
    assert {"Gate", "RAS after tuning to toy_deviate", "What toy_deviate writes"} <= {
        finding["topic"] for finding in told["verdict"]
    }


def test_markdown_says_the_same(toy_study: StudyResult, toy_report: Path) -> None:
    text = toy_report.with_suffix(".md").read_text()
    assert text.startswith("# rim_lens study: toy") or text.startswith("# rim\\_lens study: toy")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 30
    assert "## Verdict" in text


@pytest.fixture(scope="module")
def hostile_study(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    return write(
        tmp_path_factory.mktemp("hostile"),
        Planted(
            model=f"model {HOSTILE}",
            first_token=HOSTILE,
            first_words=TOKENS,
            tuned=["<think>%{x}"],
            n=8,
            n_families=6,
        ),
    )


def test_text_of_models_is_shown_literally(hostile_study: StudyResult) -> None:
    report = write_report(hostile_study)
    page = Reader(report.read_text(encoding="utf-8"))
    for text in (*TOKENS, f"model {HOSTILE}", "<think>%{x}"):
        assert visible(text) in page.text
    assert {tag for tag, _ in page.tags}.isdisjoint({"img", "think", "iframe", "object"})
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    ((_, frame),) = Reader(study_html(hostile_study)).tags
    assert f"model {HOSTILE}" in Reader(frame["srcdoc"] or "").text
    outside_code = re.sub(
        r"(`+)[^`].*?\1(?!`)", "", report.with_suffix(".md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert "<img" not in outside_code
    assert json.loads(report.with_suffix(".json").read_text())["design"]["model"] == f"model {HOSTILE}"


def test_a_study_stopped_at_its_gate_shows_the_gate_and_nothing_else(planted: Make) -> None:
    report = write_report(planted(gate_refused=1))
    page = Reader(report.read_text(encoding="utf-8"))
    assert report.stat().st_size < 60_000
    assert not [tag for tag, _ in page.tags if tag == "script"]
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert sections == ["verdict", "gate", "methods", "reproduce", "files"]
    assert "0.04 [0.01, 0.20]" in page.text
    assert "RAS" not in page.text
    told = json.loads(report.with_suffix(".json").read_text())
    assert {"outcomes", "heads", "neurons"}.isdisjoint(told)
    assert "outcomes" not in told["gate"]


def test_the_command_line_is_left_out_where_it_would_not_say_the_same(planted: Make) -> None:
    told = json.loads(write_report(planted()).with_suffix(".json").read_text())
    assert told["reproduce"]["command"] is None  # "planted by hand" is no model's name
    assert "rl.Study(model, tuned={'confirm': 'toy:confirm'}, n_requests=24)" in told["reproduce"]["python"]


def test_the_notebook_frame_can_run_nothing(planted: Make) -> None:
    frame = Reader(planted()._repr_html_())
    ((tag, attributes),) = frame.tags
    assert (tag, attributes["sandbox"]) == ("iframe", None)
    inside = Reader(attributes["srcdoc"] or "")
    assert "script" not in {tag for tag, _ in inside.tags}
    assert "24 of 24 harmful requests" in inside.text


def test_plotly_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, rim_lens.views; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.chromium
def test_the_page_opens_offline(toy_study: StudyResult, toy_report: Path, browser: Any) -> None:
    harmless(browser, toy_report)
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(plot => plot.querySelectorAll('svg.main-svg').length)"
    )
    assert len(drawn) == (21 if toy_study.heads.found else 13)
    assert all(drawn)


@pytest.mark.chromium
@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_wider_than_the_window(toy_report: Path, browser: Any, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    open_page(browser, toy_report)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    cut = browser.execute_script(
        """return [...document.querySelectorAll('.plot')].filter(plot => {
            const place = plot.getBoundingClientRect();
            return [...plot.querySelectorAll('text')].some(text => {
                const box = text.getBoundingClientRect();
                return box.width > 0 && (box.left < place.left - 1 || box.right > place.right + 1);
            });
        }).map(plot => plot.id)"""
    )
    assert cut == []


@pytest.mark.chromium
def test_figures_follow_the_theme(toy_report: Path, browser: Any) -> None:
    colours = []
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        open_page(browser, toy_report)
        colours.append(
            browser.execute_script(
                "return getComputedStyle(document.querySelector('.plot .xtick text')).fill"
            )
        )
    assert colours == ["rgb(31, 35, 40)", "rgb(230, 232, 235)"]


@pytest.mark.chromium
def test_the_menu_changes_the_span(toy_report: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By

    open_page(browser, toy_report)
    plot = browser.find_element(By.ID, "figure-attention_off")
    before = browser.execute_script("return arguments[0].data[0].z", plot)
    buttons = ".updatemenu-dropdown-button"
    act_until(
        browser,
        lambda _: plot.find_element(By.CSS_SELECTOR, ".updatemenu-header"),
        lambda page: len(page.find_elements(By.CSS_SELECTOR, buttons)) > 1,
    )
    act_until(
        browser,
        lambda page: page.find_elements(By.CSS_SELECTOR, buttons)[1],
        lambda page: page.execute_script("return arguments[0].data[0].z", plot) != before,
    )


@pytest.mark.chromium
def test_hostile_text_runs_nothing_and_is_seen(hostile_study: StudyResult, browser: Any) -> None:
    from selenium.webdriver.common.by import By

    report = write_report(hostile_study)
    harmless(browser, report, [*TOKENS, f"model {HOSTILE}", "<think>%{x}"])
    labels = browser.execute_script(
        "return [...document.querySelectorAll('#figure-tuned_outcomes .xtick text')]"
        ".map(text => text.textContent)"
    )
    assert labels.count("<think>%{x}") == 1
    bar = "#figure-tuned_outcomes .barlayer .trace:nth-child(1) .point:nth-child(2) path"
    hover = act_until(
        browser,
        lambda page: page.find_element(By.CSS_SELECTOR, bar),
        lambda page: page.execute_script(
            "return document.querySelector('#figure-tuned_outcomes .hoverlayer').textContent"
        ),
        click=False,
    )
    assert "<think>%{x}" in hover
