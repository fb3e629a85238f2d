"""The head explorer in JupyterLab with a live kernel: what it shows is what Python computes there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import rim_lens as rl
from tests.views.browser import errors_of, requests_of
from tests.views.explorer.lab import press, printed, run_notebook, until
from tests.views.jupyter import Lab

SHOWN = """
import rim_lens as rl

model = rl.load_model("toy")
requests = rl.load_prompts("harmful", language="toy", split="select")[:2]
explorer = rl.views.HeadExplorer(
    model, rl.ChatFormat.from_model(model), requests, ("off", "careful"), heads=[(0, 5)], max_new_tokens=8
)
explorer
"""
# The same by a hook of TransformerLens itself, head (0, 5) zeroed by hand.
COMPUTED = """
import json

def zero(z, hook):
    z[:, :, 5] = 0
    return z

def scores():
    return [float(score) for batch in explorer.view.batches.values() for score in rl.refusal_score(model, batch)]

plain = scores()
with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", zero)]):
    print(json.dumps([plain, scores()]))
"""


@pytest.fixture(scope="module")
def opened(lab: Lab, lab_browser: Any) -> Any:
    """The notebook, all its cells run."""
    return run_notebook(lab, lab_browser, "heads.ipynb", [SHOWN, COMPUTED])


def shown_scores(browser: Any, what: str = "[data-what=score]") -> list[float]:
    told = browser.execute_script(
        "return [...document.querySelectorAll(`[data-what=scores] ${arguments[0]}`)].map(cell => Number(cell.title))",
        what,
    )
    return [float(value) for value in told]


def shown_digits(value: float) -> float:
    """As many digits of a float as the page tells."""
    return float(f"{value:.7g}")


def masses(browser: Any, span: str) -> list[float]:
    """What the table of masses says of a span, of both conditions."""
    cells = browser.execute_script(
        "return [...document.querySelectorAll(`[data-what=masses] tr[data-span=${arguments[0]}] td.n`)].map(cell => cell.title)",
        span,
    )
    return [float(text) for text in cells[:2]]


@pytest.fixture(scope="module")
def here() -> tuple[Any, dict[str, rl.SpanBatch]]:
    """The same model in this process, and the prompt that the notebook shows first."""
    model = rl.load_model("toy")
    chat = rl.ChatFormat.from_model(model)
    requests = rl.load_prompts("harmful", language="toy", split="select")[:2]
    batches = rl.render_conditions(chat, requests, ("off", "careful"))
    return model, {name: batch.select([0]) for name, batch in batches.items()}


@pytest.mark.chromium
def test_a_ticked_head_moves_the_score_to_the_kernel_s_own_value(opened: Any, here: Any) -> None:
    plain, ablated = printed(opened)
    first = slice(0, None, 2)  # the first of two prompts, off and careful
    assert shown_scores(opened) == [shown_digits(value) for value in plain[first]]
    press(opened, "tick")
    press(opened, "ablate", 2)
    assert shown_scores(opened) == [shown_digits(value) for value in ablated[first]]
    assert abs(ablated[0] - plain[0]) > 1e-3
    press(opened, "copy")  # the history as code, which gives the same score anywhere
    code = until(opened, "return getSelection().toString() || navigator.clipboard.readText()")
    assert code == opened.execute_script("return document.querySelector('[data-what=code]').textContent")
    model, batches = here
    again = eval(code.splitlines()[-1], {"rl": rl, "model": model, "batch": batches["off"]})  # noqa: S307
    assert float(again[0]) == pytest.approx(ablated[0], rel=1e-6)
    press(opened, "undo", 3)
    assert shown_scores(opened) == [shown_digits(value) for value in plain[first]]
    history = opened.execute_script("return document.querySelector('[data-what=history]').textContent")
    assert "no edit" in history
    assert "ablate" not in history


@pytest.mark.chromium
def test_rows_of_any_head_come_when_it_is_looked_at_and_keys_stay_in_the_map(opened: Any, here: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    cell = "return jupyterapp.shell.currentWidget.content.activeCellIndex"
    canvas = opened.find_element(By.CSS_SELECTOR, ".rlx .map")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", canvas)
    canvas.click()
    before = opened.execute_script(cell)
    canvas.send_keys(
        Keys.ARROW_LEFT * 8, Keys.ARROW_UP * 2, Keys.ARROW_DOWN, Keys.ARROW_RIGHT * 2, Keys.ENTER
    )
    said = "return document.querySelector('[data-what=said]').textContent"
    assert opened.execute_script(said).startswith("Layer 1, head 2:")
    assert opened.execute_script("return document.querySelector('[data-what=tick]').textContent").startswith(
        "Untick"
    )
    assert opened.execute_script(cell) == before  # JupyterLab's own arrow and Enter keys did nothing
    until(opened, "return document.querySelector('.rlx').textContent.includes('Token colour: attention')")
    # Another query than the last token, its neighbour: only full rows know it.
    opened.execute_script(
        "for (const side of [0, 1]) [...document.querySelectorAll(`[data-what=tokens${side}] .token`)].at(-2).click()"
    )
    model, batches = here
    expected = []
    for batch in batches.values():
        rows = rl.views.head_patterns(model, batch, [(1, 2)]).values[0, 0]
        expected.append(float(rows[-2][batch.spans["request"][0].numpy()].sum()))
    assert masses(opened, "request") == pytest.approx(expected, abs=1e-5)
    assert not np.isclose(*expected)


@pytest.mark.chromium
def test_nothing_went_to_the_network(opened: Any, lab: Lab) -> None:
    asked = [url for url in requests_of(opened) if not url.startswith(("blob:", "chrome:", "about:"))]
    assert asked
    assert [url for url in asked if not url.startswith(lab.address)] == []
    ours = ("blob:", "rim_lens", "anywidget", "Content Security Policy")
    said = [one for one in errors_of(opened) if any(word in one for word in ours)]
    assert [
        one for one in said if "to activate" not in one
    ] == []  # how long JupyterLab took is no error of ours
