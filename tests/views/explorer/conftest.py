"""JupyterLab once for all explorers, and circuits to look at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import rim_lens as rl
from rim_lens.organisms.planted import planted_truth
from tests.verdicts import toy_requests
from tests.views.browser import offline_chromium, require_chromium
from tests.views.explorer.lab import WAIT
from tests.views.jupyter import HOST, Lab, jupyterlab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    require_chromium("jupyterlab", "ipykernel", "anywidget")
    with jupyterlab(tmp_path_factory.mktemp("jupyter")) as running:
        yield running


@pytest.fixture(scope="session")
def lab_browser(lab: Lab) -> Iterator[Any]:
    with offline_chromium(HOST) as driver:
        driver.set_window_size(1280, 1000)
        driver.set_script_timeout(WAIT)  # a busy machine may leave the page no turn for long
        granted = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        driver.execute_cdp_cmd("Browser.grantPermissions", granted)
        yield driver


@pytest.fixture(scope="session")
def planted_circuits() -> dict[str, rl.Circuit]:
    """Of the planted model, thinking off and under a careful chain of thought, a decoy among the nodes."""
    model, truth = rl.load_model("planted"), planted_truth()
    chat = rl.ChatFormat.from_model(model)
    asked = [model, chat, [*truth.heads, *truth.decoy_heads], {"and": truth.neurons}, *toy_requests()]
    questions = rl.load_prompts("reasoning", language="toy", split="evaluate")
    search = rl.CircuitSearch(limit=8, n_random=3, n_random_senders=1)
    return {
        "off": rl.circuit(*asked, reasoning=questions, contrasts=("twins", "careful"), search=search),
        "careful": rl.circuit(*asked, read_in="careful", gate=False, search=search),
    }
