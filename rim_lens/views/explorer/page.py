"""The head explorer as one file that opens anywhere, offline."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path

from rim_lens.views import offline
from rim_lens.views.explorer.building import HeadView

_STYLE = "body { margin: 0; } html { color-scheme: light dark; } @media (prefers-color-scheme: dark) { body { background: #1B1F24; } }\n"
# `export` is allowed in a module of the page itself; nothing imports it there.
_START = """
const texts = new Map();
mount(document.getElementById("explorer"), JSON.parse(document.getElementById("view").textContent), (ref) => {
  if (!texts.has(ref)) texts.set(ref, document.getElementById("array-" + ref).textContent);
  return texts.get(ref);
});
"""


@cache
def module() -> str:
    """The explorer's own ES module."""
    return (Path(__file__).parent / "explorer.js").read_text(encoding="utf-8")


def explorer_html(view: HeadView) -> str:
    """The head explorer as a page, complete in itself: no request leaves it, and no token can run or hide.

    Args:
        view: From `head_view`.
    """
    data = [
        ("view", "application/json", offline.harmless_json(view.data)),
        *(
            (f"array-{place}", "text/plain", base64.b64encode(array.astype("<f4").tobytes()).decode())
            for place, array in enumerate(view.arrays)
        ),
    ]
    scripts = [offline.as_read(module() + _START)]
    return offline.page(view.data["title"], _STYLE, '<main id="explorer"></main>', scripts, data)


def write_explorer(view: HeadView, path: str | Path) -> Path:
    """Write the head explorer's page to a file and return its path.

    Args:
        view: From `head_view`.
        path: Of the page.
    """
    target = Path(path)
    offline.write(target, explorer_html(view))
    return target
