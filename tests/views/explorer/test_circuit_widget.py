"""The circuit explorer's kernel: what is off gives the numbers of `CircuitSwitches`, in Python and in the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rim_lens as rl
from rim_lens.errors import CaptureError, StatisticsError
from rim_lens.views import CircuitExplorer
from rim_lens.views.explorer.page import module
from tests.verdicts import toy_requests
from tests.views.explorer.kernel import Kernel

OFF = ["L0H5", "and L0 → L1H1.v"]


@pytest.fixture(scope="module")
def explorer(planted_circuits: dict[str, rl.Circuit]) -> CircuitExplorer:
    model = rl.load_model("planted")
    chat = rl.ChatFormat.from_model(model)
    questions = rl.load_prompts("reasoning", language="toy", split="evaluate")
    return CircuitExplorer(model, chat, planted_circuits, *toy_requests(), questions)


def switches(explorer: CircuitExplorer, name: str, contrast: str) -> rl.CircuitSwitches:
    """Made anew, as a reader of the code would make them."""
    circuit, questions = explorer.view.circuits[name], explorer.requests[2]
    return rl.CircuitSwitches(
        explorer.models[name], explorer.chat, circuit, *toy_requests(), questions, contrast=contrast
    )


def steps(*names: str) -> list[dict[str, Any]]:
    return [{"operation": "off", "names": [name]} for name in names]


@pytest.mark.parametrize(("place", "name", "contrast"), [(0, "off", "careful"), (1, "careful", "twins")])
def test_scores_are_those_of_the_switches(
    explorer: CircuitExplorer, place: int, name: str, contrast: str
) -> None:
    alone = [*steps(*OFF), {"operation": "alone"}]
    told, _ = explorer.answer({"kind": "apply", "steps": alone, "circuit": place, "contrast": contrast})
    own = switches(explorer, name, contrast)
    expected = own.read(OFF, alone=True)
    assert [row["kind"] for row in told["rows"]] == expected["kind"].tolist()
    for row, (_, values) in zip(told["rows"], expected.iterrows(), strict=True):
        for column in ("full", "after", "change", "change_low", "change_high"):
            assert row[column] == pytest.approx(values[column], abs=1e-6)
    course = [own.read(OFF[:n])["after"][0] for n in range(3)] + [expected["after"][0]]
    assert [step["scores"][0] for step in told["history"]] == pytest.approx(course, abs=1e-6)
    assert told["history"][1]["edit"] == "off: L0H5"
    assert (told["off"], told["alone"]) == (OFF, True)
    # Its code gives the same table.
    scope = {"rl": rl, "explorer": explorer, "chat": explorer.chat}
    lines = told["code"].splitlines()
    exec("\n".join(lines[:-1]), scope)  # noqa: S102
    assert eval(lines[-1], scope).equals(expected)  # noqa: S307
    assert explorer.scores.equals(expected)


def test_steps_are_taken_back_and_what_cannot_be_done_leaves_them(explorer: CircuitExplorer) -> None:
    explorer.answer({"kind": "apply", "steps": [], "circuit": 0, "contrast": "twins"})
    explorer.off(["L0H5"]).off(["L1H1"]).on(["L0H5"])
    assert [node.name for node in explorer.selection().kept()] == ["L0H5", "and L0"]
    assert explorer.undo().selection().kept() == [
        node for node in explorer.view.circuits["off"].kept() if node.name == "and L0"
    ]
    with pytest.raises(StatisticsError, match="'L7H7'"):
        explorer.answer({"kind": "apply", "steps": steps("L7H7"), "circuit": 1, "contrast": "twins"})
    assert explorer.chosen == ("off", "twins")
    assert [step.told() for step in explorer.edits] == ["off: L0H5", "off: L1H1"]
    with pytest.raises(CaptureError, match="'explode'"):
        explorer.answer(
            {"kind": "apply", "steps": [{"operation": "explode"}], "circuit": 0, "contrast": "twins"}
        )
    with pytest.raises(CaptureError, match="'dance'"):
        explorer.answer({"kind": "dance"})
    assert explorer.reset().edits == []
    assert explorer.alone().scores["share"][0] == pytest.approx(
        explorer.view.circuits["off"].row("faithfulness", "harmful")["share"], abs=1e-5
    )
    assert explorer.whole().scores["share"][0] == pytest.approx(1)
    explorer.reset()


def test_the_selection_is_saved_once(explorer: CircuitExplorer, tmp_path: Path) -> None:
    explorer.reset().off(OFF)
    told, _ = explorer.answer({"kind": "save", "folder": str(tmp_path / "some")})
    again = rl.Circuit.load(told["saved"])
    assert again.settings["switched_off"] == sorted(OFF)
    assert [node.name for node in again.kept()] == ["L1H1", "and L0"]
    for folder in (str(tmp_path / "some"), " "):
        with pytest.raises(CaptureError, match="was to be saved"):
            explorer.answer({"kind": "save", "folder": folder})
    explorer.reset()


def test_the_widget_carries_the_module_and_the_numbers(explorer: CircuitExplorer) -> None:
    pytest.importorskip("anywidget")
    widget = explorer.widget
    assert widget._esm == module("circuits")
    assert widget.view == explorer.view.data


@pytest.mark.chromium
def test_switching_in_the_page_moves_the_score_to_python_s_value(
    explorer: CircuitExplorer, browser: Any, tmp_path: Path
) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    explorer.reset()
    kernel = Kernel(explorer, browser, tmp_path)
    kernel.wait_for(1)

    def shown(kind: str) -> float:
        cell = f"return document.querySelector('[data-kind=\"{kind}\"] [data-what=score]').title"
        return float(browser.execute_script(cell))

    def holds(own: rl.CircuitSwitches, off: list[str], alone: bool = False) -> None:
        for _, row in own.read(off, alone=alone).iterrows():
            assert shown(row["kind"]) == pytest.approx(row["after"], rel=1e-5, abs=1e-6)

    own = switches(explorer, "off", "twins")
    holds(own, [])
    graph = browser.find_element(By.CSS_SELECTOR, "[data-what=graph]")
    browser.execute_script(
        "document.querySelector('[data-node=L0H5]').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    graph.send_keys(Keys.ENTER)  # by keyboard: the chosen node goes off
    kernel.wait_for(2)
    holds(own, ["L0H5"])
    assert (
        browser.execute_script(
            "return document.querySelector('[data-node=L0H5] text').getAttribute('text-decoration')"
        )
        == "line-through"
    )
    browser.execute_script(
        "document.querySelector('[data-node=L1H1]').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    browser.execute_script("document.querySelector('[data-cut=\"and L0 → L1H1.v\"]').click()")
    kernel.wait_for(3)
    holds(own, OFF)
    browser.find_element(By.CSS_SELECTOR, "[data-what=alone]").click()
    kernel.wait_for(4)
    holds(own, OFF, alone=True)
    assert browser.find_element(By.CSS_SELECTOR, "[data-what=code]").text == explorer.code()
    # The other circuit is read under the same steps, and the steps can be taken back there.
    browser.execute_script(
        "const menu = document.querySelector('[data-what=circuit]'); menu.value = '1'; menu.dispatchEvent(new Event('change'))"
    )
    kernel.wait_for(5)
    assert explorer.chosen == ("careful", "twins")
    other = switches(explorer, "careful", "twins")
    holds(other, OFF, alone=True)
    browser.find_element(By.CSS_SELECTOR, "[data-what=undo]").click()
    kernel.wait_for(6)
    holds(other, OFF)
    browser.execute_script(
        "document.querySelector('[data-what=folder]').value = arguments[0]; document.querySelector('[data-what=save]').click()",
        str(tmp_path / "kept"),
    )
    kernel.pump(lambda: browser.execute_script("return document.querySelector('.rlx').dataset.saved === '1'"))
    assert rl.Circuit.load(tmp_path / "kept").settings["switched_off"] == sorted(OFF)
    kernel.close()
