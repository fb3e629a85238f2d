from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.views import HeadExplorer
from rim_lens.views.explorer.building import packed
from rim_lens.views.explorer.page import module
from tests.views.browser import act_until
from tests.views.explorer.kernel import Kernel


@pytest.fixture
def explorer() -> HeadExplorer:
    model = rl.load_model("toy")
    requests = rl.load_prompts("harmful", language="toy", split="select")[:2]
    return HeadExplorer(
        model,
        rl.ChatFormat.from_model(model),
        requests,
        ("off", "careful", "open"),
        heads=[(0, 5)],
        shown=2,
        max_new_tokens=8,
    )


def _apply(explorer: HeadExplorer, *steps: dict[str, Any], prompt: int = 0) -> dict[str, Any]:
    told, buffers = explorer.answer({"kind": "apply", "steps": list(steps), "prompt": prompt})
    assert buffers == []
    return told


ABLATE = {"operation": "ablate", "heads": [[0, 5], [1, 3]], "factor": None}
SCALE = {"operation": "scale", "heads": [[0, 1]], "factor": 0.5}


def test_scores_are_those_of_the_same_editors(explorer: HeadExplorer) -> None:
    model, batches = explorer.model, explorer.view.batches
    plain = _apply(explorer, prompt=1)["conditions"]
    edited = _apply(explorer, ABLATE, SCALE, prompt=1)
    for name, before, after in zip(batches, plain, edited["conditions"], strict=True):
        if name == "open":
            assert (before["score"], after["score"], after["note"]) == (
                None,
                None,
                "no score: the model goes on thinking",
            )
            continue
        one = batches[name].select([1])
        assert (
            before["score"]
            == before["baseline"]
            == after["baseline"]
            == float(rl.refusal_score(model, one)[0])
        )
        with rl.AblateHeads([(0, 5), (1, 3)]).on(model), rl.ScaleHeads([(0, 1)], 0.5).on(model):
            expected = float(rl.refusal_score(model, one)[0])
            word = rl.first_tokens(model, one)
        assert after["score"] == pytest.approx(expected, abs=1e-6)
        assert after["score"] != before["score"]
        assert [token["token"] for token in after["tokens"]] == word["token"].tolist()
        assert after["continuation"].split(":")[0] in ("refuse", "comply", "other")
    assert [step["edit"] for step in edited["history"]] == ["ablate L0H5, L1H3", "scale L0H1 by 0.5"]
    for place, (name, batch) in enumerate(batches.items()):
        course = [step["scores"][place] for step in edited["history"]]
        if name == "open":
            assert course == [None, None]
            continue
        with rl.AblateHeads([(0, 5), (1, 3)]).on(model):
            first = float(rl.refusal_score(model, batch.select([1]))[0])
        assert course == pytest.approx([first, edited["conditions"][place]["score"]], abs=1e-6)
        assert abs(course[0] - course[1]) > 1e-4


def test_the_history_as_code_gives_the_same_scores(explorer: HeadExplorer) -> None:
    _apply(explorer, ABLATE, SCALE)
    last = explorer.code().splitlines()[-1]
    again = eval(last, {"rl": rl, "model": explorer.model, "batch": explorer.view.batches["off"]})  # noqa: S307
    table = explorer.scores
    assert table[table["condition"] == "off"]["score"].tolist() == pytest.approx(
        again.values.tolist(), abs=1e-6
    )
    assert set(table["condition"]) == {
        "off",
        "careful",
    }  # after an open block the next token is not the answer's
    assert (explorer.undo().undo().undo().scores["effect"] == 0).all()
    assert explorer.code().endswith("rl.refusal_score(model, batch)")


def test_rows_fetched_are_the_cache_s(explorer: HeadExplorer) -> None:
    told, buffers = explorer.answer({"kind": "rows", "prompt": 1, "head": [1, 2]})
    for one, batch in zip(told["conditions"], explorer.view.batches.values(), strict=True):
        alone = batch.select([1])
        _, cache = explorer.model.run_with_cache(alone.tokens, attention_mask=alone.attention_mask)
        expected = packed(cache["blocks.1.attn.hook_pattern"][0, 2].numpy(), 0)
        np.testing.assert_allclose(np.frombuffer(buffers[one["values"]], "<f4"), expected, atol=1e-6)


def test_an_edit_that_cannot_be_done_leaves_the_others(explorer: HeadExplorer) -> None:
    _apply(explorer, SCALE)
    with pytest.raises(rl.errors.UnknownHead):
        _apply(explorer, SCALE, {"operation": "ablate", "heads": [[9, 9]], "factor": None})
    with pytest.raises(rl.errors.CaptureError, match="'explode'"):
        explorer.answer({"kind": "explode"})
    assert [edit.told() for edit in explorer.edits] == ["scale L0H1 by 0.5"]
    sent: list[dict[str, Any]] = []
    fake = type("Fake", (), {"send": lambda _, message, buffers=None: sent.append(message)})()
    explorer._heard(fake, {"id": 7, "kind": "apply", "prompt": 0, "steps": [{**ABLATE, "heads": [[9, 9]]}]})
    assert sent[0]["id"] == 7
    assert "9" in sent[0]["error"]


def test_the_widget_carries_the_module_and_the_numbers(explorer: HeadExplorer) -> None:
    pytest.importorskip("anywidget")
    widget = explorer.widget
    assert widget._esm == module("heads")
    assert widget.view == explorer.view.data
    assert widget.arrays[0] == explorer.view.arrays[0].astype("<f4").tobytes()
    assert "application/vnd.jupyter.widget-view+json" in str(explorer._repr_mimebundle_())


@pytest.mark.chromium
def test_ticking_a_head_moves_the_score_to_python_s_value(
    explorer: HeadExplorer, browser: Any, tmp_path: Path
) -> None:
    from selenium.webdriver.common.by import By

    kernel = Kernel(explorer, browser, tmp_path)
    pump, scores, wait_for = kernel.pump, kernel.scores, kernel.wait_for
    wait_for(1)
    off = explorer.view.batches["off"].select([0])
    plain = float(rl.refusal_score(explorer.model, off)[0])
    assert scores()["off"] == pytest.approx(plain, rel=1e-5)
    # The head shown first is (0, 5); tick it, ablate it.
    for what in ("tick", "ablate"):
        browser.find_element(By.CSS_SELECTOR, f"[data-what={what}]").click()
    wait_for(2)
    expected = float(rl.refusal_score(explorer.model, off, rl.AblateHeads([(0, 5)]))[0])
    assert scores()["off"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - plain) > 1e-3
    assert "rl.AblateHeads([(0, 5)])" in browser.find_element(By.CSS_SELECTOR, "[data-what=code]").text
    browser.find_element(By.CSS_SELECTOR, "[data-what=undo]").click()
    wait_for(3)
    assert scores()["off"] == pytest.approx(plain, rel=1e-5)
    # Another head: its rows are fetched, and drawn with their exact values.
    act_until(
        browser,
        lambda it: it.find_element(By.CSS_SELECTOR, ".map"),
        lambda it: (
            "head 5" not in it.execute_script("return document.querySelector('[data-what=said]').textContent")
        ),
    )
    pump(
        lambda: "Token colour" in browser.execute_script("return document.querySelector('.rlx').textContent")
    )
    # Another prompt: its own score.
    browser.execute_script(
        "const menu = document.querySelector('[data-what=prompt]'); menu.value = '1'; menu.dispatchEvent(new Event('change'))"
    )
    wait_for(4)
    second = float(rl.refusal_score(explorer.model, explorer.view.batches["off"].select([1]))[0])
    assert scores()["off"] == pytest.approx(second, rel=1e-5)
    assert abs(second - plain) > 1e-3
    kernel.close()
