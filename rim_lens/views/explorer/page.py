"""What an explorer shows, and how it becomes one file that opens anywhere, offline."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from rim_lens.views import offline
from rim_lens.views.plots import style

FORMAT_VERSION = 1
MAX_BYTES = 40_000_000
_STYLE = "body { margin: 0; } html { color-scheme: light dark; } @media (prefers-color-scheme: dark) { body { background: #1B1F24; } }\n"
_BESIDE = {"circuits": ("graph", "nodes")}
# `export` is allowed in a module of the page itself; nothing imports it there.
_START = """
const texts = new Map();
mount(document.getElementById("explorer"), JSON.parse(document.getElementById("view").textContent), (ref) => {
  if (!texts.has(ref)) texts.set(ref, document.getElementById("array-" + ref).textContent);
  return texts.get(ref);
});
"""


@dataclass(frozen=True)
class ExplorerView:
    """Everything that a page or widget of an explorer holds.

    Attributes:
        data: Plain values; arrays are named by their place.
        arrays: float32 arrays.
    """

    data: dict[str, Any]
    arrays: tuple[Float[np.ndarray, "..."], ...]
    of: ClassVar[str]  # "heads", "neurons" or "circuits": whose module draws it

    @property
    def n_bytes(self) -> int:
        """Size of the arrays in a page, about that of the page."""
        return sum(page_bytes(array.size) for array in self.arrays)

    def _repr_html_(self) -> str:
        return offline.frame(explorer_html(self), f"rim_lens: explorer of {self.of}", "60em")


@cache
def module(of: str) -> str:
    """The ES module of an explorer, complete in itself.

    Args:
        of: "heads", "neurons" or "circuits".
    """
    here = Path(__file__).parent
    parts = ("common", "live", *_BESIDE.get(of, ()), of)
    return "\n".join((here / f"{name}.js").read_text(encoding="utf-8") for name in parts)


def explorer_html(view: ExplorerView) -> str:
    """An explorer as a page, complete in itself: no request leaves it, and no token can run or hide.

    Args:
        view: From `head_view`, `neuron_view`, `neuron_study_view` or `circuit_view`.
    """
    data = [
        ("view", "application/json", offline.harmless_json(view.data)),
        *(
            (f"array-{place}", "text/plain", base64.b64encode(array.astype("<f4").tobytes()).decode())
            for place, array in enumerate(view.arrays)
        ),
    ]
    scripts = [offline.as_read(module(view.of) + _START)]
    return offline.page(view.data["title"], _STYLE, '<main id="explorer"></main>', scripts, data)


def write_explorer(view: ExplorerView, path: str | Path) -> Path:
    """Write an explorer's page to a file and return its path.

    Args:
        view: From `head_view`, `neuron_view`, `neuron_study_view` or `circuit_view`.
        path: Of the page.
    """
    target = Path(path)
    offline.write(target, explorer_html(view))
    return target


class Arrays(list[np.ndarray]):
    """Arrays in the making: each is named by its place."""

    def keep(self, values: np.ndarray) -> int:
        """Keep an array as float32 and return its place."""
        self.append(np.ascontiguousarray(values, dtype=np.float32))
        return len(self) - 1


def page_bytes(n_floats: int) -> int:
    """Characters that so many float32 take in a page."""
    return -(-4 * n_floats // 3) * 4


def palette() -> dict[str, Any]:
    """The house's colours, for the page's two themes."""
    themes = {}
    for theme in ("light", "dark"):
        layout = style.template(theme)["layout"]
        axis = layout["xaxis"]
        themes[theme] = {
            "ink": layout["font"]["color"],
            "paper": layout["paper_bgcolor"],
            "grid": axis["gridcolor"],
            "axis": axis["linecolor"],
            "sequential": layout["colorscale"]["sequential"],
            "diverging": layout["colorscale"]["diverging"],
        }
    return {
        **themes,
        "spans": style.SPANS,
        "blue": style.BLUE,
        "found": style.FOUND,
        "control": style.CONTROL,
        "font": style.FONT,
    }
