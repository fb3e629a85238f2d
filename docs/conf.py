"""How the documentation is built: ``make docs``. The pages of the API are written anew from the public names at each build."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import rim_lens  # noqa: E402 - found by the line above

project = "rim_lens"
copyright = "the rim_lens authors"  # noqa: A001 - Sphinx reads this name
release = rim_lens.__version__
html_title = f"rim_lens {release}"
html_theme = "furo"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
default_role = "code"  # names in docstrings stand in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say what arguments are
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nitpicky = False

# Rooms in the order in which a study goes through them, with what each is for.
ROOMS = {
    "organisms": "Models: loading, and organisms whose truth is known",
    "lens": "Models as the rest sees them",
    "prompts": "Requests, twins, questions and chains of thought",
    "chat": "Chat formats and token-exact spans",
    "hooks": "Components: readers and editors",
    "capturing": "Capture",
    "generation": "Generation",
    "measures": "Measures of refusal, heads, neurons, probes and checkpoints",
    "measures.entanglement.entangling": "Entanglement",
    "measures.entanglement.result": "Entanglement: the result",
    "measures.entanglement.multiverse": "Entanglement over every choice",
    "study": "Studies: plan, run, resume, load",
    "views": "Pages and reports",
}


def write_api() -> None:
    """One page a room, with every public name that lives there."""
    by_room: dict[str, list[str]] = {}
    for name, room in rim_lens._HOME.items():
        by_room.setdefault(room, []).append(name)
    unknown = sorted(set(by_room) - set(ROOMS))
    if unknown:
        raise RuntimeError(
            f"docs/conf.py knows no title for the rooms {', '.join(unknown)}; add them to ROOMS."
        )
    folder = HERE / "api"
    folder.mkdir(exist_ok=True)
    pages = []
    for room, title in ROOMS.items():
        lines = [title, "=" * len(title), ""]
        for name in sorted(by_room[room], key=str.lower):
            kind = "class" if isinstance(getattr(rim_lens, name), type) else "function"
            lines += [f".. auto{kind}:: rim_lens.{name}", *(["   :members:"] if kind == "class" else []), ""]
        page = room.replace(".", "_")
        (folder / f"{page}.rst").write_text("\n".join(lines), encoding="utf-8")
        pages.append(page)
    index = [
        "API",
        "===",
        "",
        "Every public name is an attribute of ``rim_lens`` (``rl`` in the examples).",
        "",
    ]
    index += [".. toctree::", "   :maxdepth: 1", "", *(f"   {page}" for page in pages), ""]
    (folder / "index.rst").write_text("\n".join(index), encoding="utf-8")


write_api()
