"""A notebook in JupyterLab's own page: opened, run, its widget used as a user does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from tests.views.jupyter import Lab, write_notebook

WAIT = 240  # s; a condition that holds is seen at once, so that only a failure takes so long


def run_notebook(lab: Lab, browser: Any, name: str, cells: Sequence[str]) -> Any:
    """Write a notebook, open it and run all its cells, until its widget has heard from the kernel."""
    write_notebook(lab.folder / name, cells)
    browser.get(lab.url(name))
    until(
        browser,
        "return window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
    )
    browser.execute_script("jupyterapp.commands.execute('notebook:run-all-cells')")
    until(browser, "return document.querySelector('.jp-OutputArea .rlx')?.dataset.applied === '1'")
    return browser


def until(browser: Any, script: str, *arguments: Any) -> Any:
    """Wait until a script gives something; where it does not, what the notebook said."""
    from selenium.common.exceptions import TimeoutException
    from selenium.webdriver.support.ui import WebDriverWait

    try:
        return WebDriverWait(browser, WAIT, poll_frequency=0.1).until(
            lambda it: it.execute_script(script, *arguments)
        )
    except TimeoutException:
        said = (
            "return [...document.querySelectorAll('.jp-OutputArea')].map(one => one.textContent).join(' | ')"
        )
        pytest.fail(f"never: {script}; the notebook says: {browser.execute_script(said)[-2000:]!r}")


def press(browser: Any, what: str, n_applied: int | None = None) -> None:
    """Click a button of the widget, as a user does, and wait for the kernel's answer."""
    from selenium.webdriver.common.by import By

    button = browser.find_element(By.CSS_SELECTOR, f".rlx [data-what={what}]")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
    button.click()
    if n_applied is not None:
        until(
            browser, "return document.querySelector('.rlx').dataset.applied === arguments[0]", str(n_applied)
        )


def printed(browser: Any) -> Any:
    """What the last cell printed: a list of lists, as JSON."""
    return json.loads(
        until(
            browser,
            "return [...document.querySelectorAll('.jp-OutputArea-output pre')].map(one => one.textContent)"
            ".find(text => text.startsWith('[['))",
        )
    )
