"""A page of a widget with a queue in place of Jupyter's comm, and the kernel that answers it."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rim_lens.views import offline
from rim_lens.views.explorer.page import module
from tests.views.browser import errors_of, requests_of

# What anywidget hands to `render`.
_FAKE = """
const page = JSON.parse(document.getElementById("page").textContent);
const heard = [];
window.sent = [];
window.reply = (message, buffers) => heard.forEach((call) => call(message, buffers.map((text) => new DataView(decoded(text).buffer))));
const model = {
  get: (name) => (name === "view" ? page.view : page.arrays.map((text) => new DataView(decoded(text).buffer))),
  on: (_, call) => heard.push(call), off: () => {}, send: (message) => window.sent.push(message),
};
render({ model, el: document.getElementById("explorer") });
"""


class Kernel:
    """An explorer whose widget is open in a browser."""

    def __init__(self, explorer: Any, browser: Any, folder: Path) -> None:
        self.explorer, self.browser = explorer, browser
        arrays = [base64.b64encode(one.astype("<f4").tobytes()).decode() for one in explorer.view.arrays]
        data = offline.harmless_json({"view": explorer.view.data, "arrays": arrays})
        self.page = folder / "widget.html"
        scripts = [offline.as_read(module(explorer.view.of) + _FAKE)]
        body = '<div id="explorer"></div>'
        offline.write(self.page, offline.page("x", "", body, scripts, [("page", "application/json", data)]))
        requests_of(browser), errors_of(browser)
        browser.get(self.page.as_uri())

    def pump(self, until: Callable[[], Any]) -> None:
        """Be the kernel until something is seen."""
        stop = time.monotonic() + 120
        while not until():
            assert time.monotonic() < stop
            for message in self.browser.execute_script("return window.sent.splice(0)"):
                told, buffers = self.explorer.answer(message)
                self.browser.execute_script(
                    "window.reply(arguments[0], arguments[1])",
                    {"id": message["id"], **told},
                    [base64.b64encode(one).decode() for one in buffers],
                )

    def wait_for(self, n: int) -> None:
        """Until the model has run n times."""
        applied = "return document.querySelector('.rlx').dataset.applied"
        self.pump(lambda: self.browser.execute_script(applied) == str(n))

    def scores(self) -> dict[str, float]:
        """Scores as the page tells them, by condition."""
        return dict(
            self.browser.execute_script(
                "return [...document.querySelectorAll('[data-what=scores] tbody tr')].map("
                "row => [row.dataset.condition, Number(row.querySelector('[data-what=score]').title)])"
            )
        )

    def close(self) -> None:
        """Nothing was asked for but the page, and nothing went wrong."""
        assert requests_of(self.browser) == [self.page.as_uri()]
        assert errors_of(self.browser) == []
