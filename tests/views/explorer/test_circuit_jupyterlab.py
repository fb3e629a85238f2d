"""The circuit explorer in JupyterLab with a live kernel: a node switched off gives the score that Python's own editors give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rim_lens as rl
from tests.views.explorer.lab import press, printed, run_notebook, until
from tests.views.jupyter import Lab

SHOWN = """
import rim_lens as rl
from rim_lens.organisms.planted import planted_truth

model, truth = rl.load_model("planted"), planted_truth()
chat = rl.ChatFormat.from_model(model)
harmful, harmless = (rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless"))
search = rl.CircuitSearch(limit=6, n_random=0, n_random_senders=0)
circuit = rl.circuit(model, chat, truth.heads, {"and": truth.neurons}, harmful, harmless, search=search)
explorer = rl.views.CircuitExplorer(model, chat, circuit, harmful, harmless)
explorer
"""
# The same by an editor and the refusal score, without anything of circuits.
COMPUTED = """
import json

asked = explorer.switches.asked
here, reference = asked.batches["evaluate"]["off"], asked.batches["select"]["twins"]
without = rl.AblateHeads([(1, 1)], method="mean", reference=reference, per="position")
print(json.dumps([[float(rl.refusal_score(model, here, *some).mean()) for some in ([], [without])]]))
"""


@pytest.fixture(scope="module")
def opened(lab: Lab, lab_browser: Any) -> Any:
    return run_notebook(lab, lab_browser, "circuit.ipynb", [SHOWN, COMPUTED])


def shown(browser: Any) -> float:
    cell = "return document.querySelector('[data-what=scores] [data-kind=harmful] [data-what=score]').title"
    return float(browser.execute_script(cell))


@pytest.mark.chromium
def test_a_node_switched_off_moves_the_score_to_python_s_value(opened: Any, lab: Lab) -> None:
    ((plain, ablated),) = printed(opened)
    assert ablated < plain - 10
    assert shown(opened) == pytest.approx(plain, rel=1e-5)
    opened.execute_script(
        "document.querySelector('[data-node=L1H1]').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    press(opened, "toggle", 2)
    assert shown(opened) == pytest.approx(ablated, rel=1e-5)
    # What is left is saved where the notebook lies, and read back.
    opened.execute_script("document.querySelector('[data-what=folder]').value = 'selection'")
    press(opened, "save")
    until(opened, "return document.querySelector('.rlx').dataset.saved === '1'")
    saved = rl.Circuit.load(Path(lab.folder) / "selection")
    assert [node.name for node in saved.kept()] == ["L0H5", "and L0"]
    press(opened, "undo", 3)
    assert shown(opened) == pytest.approx(plain, rel=1e-5)
