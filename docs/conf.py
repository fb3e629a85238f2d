"""How the documentation is built: ``make docs``. API pages are written from the public names, notebooks are run, at each build."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import run_notebooks  # noqa: E402 - beside this file

import rim_lens  # noqa: E402 - found by the line above

REPOSITORY = "https://github.com/rim-lens/rim_lens"
project = "rim_lens"
copyright = "the rim_lens authors"  # noqa: A001 - Sphinx reads this name
release = rim_lens.__version__
html_title = f"rim_lens {release}"
html_theme = "furo"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_js_files = [("figures.js", {"defer": "defer"})]
nb_execution_mode = "off"  # run_notebooks has run them
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "jupyter_execute"]
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
    "sharing": "Work shared between processes",
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
    index = [
        "API",
        "===",
        "",
        "Every public name is an attribute of ``rim_lens`` (``rl`` in the examples). The examples run in the test suite.",
        "",
    ]
    for room, title in ROOMS.items():
        names = sorted(by_room[room], key=str.lower)
        lines = [title, "=" * len(title), ""]
        summary = [title, "-" * len(title), ""]
        for name in names:
            found = getattr(rim_lens, name)
            kind = "class" if isinstance(found, type) else "function"
            lines += [f".. auto{kind}:: rim_lens.{name}", *(["   :members:"] if kind == "class" else []), ""]
            first = (found.__doc__ or "").strip().splitlines()[0]
            summary += [f":py:obj:`rim_lens.{name}`", f"   {first}", ""]
        page = room.replace(".", "_")
        (folder / f"{page}.rst").write_text("\n".join(lines), encoding="utf-8")
        index += [*summary, ".. toctree::", "   :hidden:", "", f"   {page}", ""]
    (folder / "index.rst").write_text("\n".join(index), encoding="utf-8")


def write_help() -> None:
    """What each command says of itself on a terminal of 80 columns."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from rim_lens.cli import app

    folder = HERE / "api" / "help"
    folder.mkdir(parents=True, exist_ok=True)
    for words in ([], *([name] for name in get_command(app).commands)):
        terminal = {"TERMINAL_WIDTH": "80", "COLUMNS": "80", "NO_COLOR": "1"}
        shown = CliRunner().invoke(app, [*words, "--help"], prog_name="rim-lens", env=terminal)
        lines = [line.rstrip() for line in shown.output.strip().splitlines()]
        (folder / f"{(words or ['rim-lens'])[0]}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepare(app: Any) -> None:  # noqa: ARG001 - Sphinx passes it
    """Write what is written from the code: the API, the commands' help, and the notebooks with what they show."""
    write_api()
    write_help()
    run_notebooks.write_notebooks(HERE / "notebooks")


def as_page(app: Any, docname: str, source: list[str]) -> None:  # noqa: ARG001
    """A notebook as a page: figures as data that figures.js draws, links to other notebooks as links to their pages."""
    if not source[0].lstrip().startswith('{"cells"') and '"nbformat"' not in source[0][-400:]:
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            for name in run_notebooks.NAMES:
                text = text.replace(f"]({name}.py)", f"]({name}.ipynb)")
            cell["source"] = text
        for output in cell.get("outputs", ()):
            figure = output.get("data", {}).pop(run_notebooks.PLOTLY, None)
            if figure is not None:
                output["data"] = {"text/html": figure_html(figure)}
    name = docname.rpartition("/")[2]
    told = f"*The file [demos/{name}.py]({REPOSITORY}/blob/main/demos/{name}.py), run from top to bottom on {notebook['metadata']['run_on']}.*"
    notebook["cells"].append({"cell_type": "markdown", "metadata": {}, "source": told, "id": "source"})
    source[0] = json.dumps(notebook)


def figure_html(figure: dict[str, Any]) -> str:
    """A place for a figure, and its data beside it. No text of it can end the tag that holds it."""
    layout = {key: value for key, value in figure["layout"].items() if key != "template"}
    data = json.dumps({"data": figure["data"], "layout": layout}).replace("<", "\\u003c")
    height = int(layout.get("height") or 450)
    return f'<div class="rim-figure" style="min-height:{height}px"><script type="application/json">{data}</script></div>'


def write_library(app: Any, exception: Exception | None) -> None:
    """The plotly library once for all pages, with the two themes of the house."""
    if exception is not None:
        return
    from plotly.offline import get_plotlyjs

    from rim_lens.views.plots.style import template

    static = Path(app.outdir) / "_static"
    themes = json.dumps({theme: template(theme) for theme in ("light", "dark")})
    (static / "plotly.min.js").write_text(
        f"{get_plotlyjs()}\nwindow.rimThemes = {themes};\n", encoding="utf-8"
    )


def setup(app: Any) -> None:
    app.connect("builder-inited", prepare)
    app.connect("source-read", as_page)
    app.connect("build-finished", write_library)
