"""The documentation holds every public name, and no link of it leads nowhere; `make docs` builds it, a warning being an error."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

import rim_lens as rl
from rim_lens import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GENERATED = {"api", "notebooks", "_build"}
PAGES = [*ROOT.glob("*.md"), *(path for path in DOCS.rglob("*.md") if GENERATED.isdisjoint(path.parts))]
HOW_TO = [*sorted((DOCS / "howto").glob("*.md")), DOCS / "paper.md", DOCS / "from_transformerlens.md"]


def configuration():
    """docs/conf.py, without what it does at a build."""
    return runpy.run_path(str(DOCS / "conf.py"))


def test_every_public_name_is_on_one_page_of_the_api():
    configuration()["write_api"]()
    pages = [path.read_text() for path in (ROOT / "docs" / "api").glob("*.rst")]
    named = re.findall(r"^\.\. auto(?:class|function):: rim_lens\.(\w+)$", "\n".join(pages), re.MULTILINE)
    assert sorted(named) == sorted(set(rl.__all__) - {"__version__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s#]+)", text):
        file = re.sub(r"^https://github.com/rim-lens/rim_lens/blob/main/", f"{ROOT}/", target)
        notebook = re.fullmatch(r"(?:\.\./)?notebooks/(\w+)", file)
        if notebook:  # made at a build from the file of that name
            file = f"{ROOT}/demos/{notebook[1]}.py"
        if not re.match(r"[a-z]+:", file):
            assert (page.parent / file).exists(), target


def test_pages_are_in_the_contents():
    """Every page stands in one toctree, in the pages that are written and in those that a build makes."""
    listed = []
    for page in PAGES:
        if DOCS in page.parents:
            for tree in re.findall(r"```\{toctree\}(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
                names = [line for line in tree.split() if not line.startswith(":") and line[0].isalpha()]
                listed += [(page.parent / name).relative_to(DOCS).as_posix() for name in names]
    notebooks = configuration()["run_notebooks"].NAMES
    assert sorted(name for name in listed if name.startswith("notebooks/")) == sorted(
        f"notebooks/{name}" for name in notebooks
    )
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in PAGES if DOCS in path.parents}
    globbed = {name for name in pages if name.startswith("evidence/") and name != "evidence/index"}
    assert pages - globbed - {"index"} <= set(listed)


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_pages_with_python_run(page, tmp_path, monkeypatch):
    """Their Python runs on the toy from top to bottom."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    known: dict[str, object] = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(block, page.name, "exec"), known)  # noqa: S102 - our own page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_pages_are_commands(page):
    """Also behind a launcher, and over several lines; their options are options."""
    import typer

    commands = typer.main.get_command(cli.app).commands
    for block in re.findall(
        r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|-m )rim[-_]lens (.*)", line)
            if found:
                words = re.split(r"\s+(?:#|>|\|)", found[1])[0].split()
                commands[words[0]].make_context(words[0], words[1:])


def test_a_notebook_becomes_a_page():
    """Figures as data that ends no tag, links to pages, and where the file lies."""
    conf = configuration()
    figure = {"data": [{"name": "</script><b>"}], "layout": {"height": 300, "template": {"layout": {}}}}
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": "[next](patching.py) [other](elsewhere.py)"},
        {
            "cell_type": "code",
            "metadata": {},
            "source": "",
            "outputs": [
                {
                    "output_type": "display_data",
                    "data": {conf["run_notebooks"].PLOTLY: figure},
                    "metadata": {},
                }
            ],
        },
    ]
    source = [
        json.dumps({"cells": cells, "metadata": {"run_on": "2026-11-30"}, "nbformat": 4, "nbformat_minor": 5})
    ]
    conf["as_page"](None, "notebooks/quick_start", source)
    linked, shown, told = json.loads(source[0])["cells"]
    assert linked["source"] == "[next](patching.ipynb) [other](elsewhere.py)"
    html = shown["outputs"][0]["data"]["text/html"]
    assert html.count("</script>") == 1
    inner = json.loads(re.search(r"json\">(.*)</script>", html)[1])
    assert inner == {"data": figure["data"], "layout": {"height": 300}}
    assert "demos/quick_start.py" in told["source"]
    page = ["# No notebook\n"]
    conf["as_page"](None, "concepts", page)
    assert page == ["# No notebook\n"]


def test_functions_that_the_pages_name_are_there():
    for page in (ROOT / "docs").glob("*.md"):
        for name in set(re.findall(r"`rl\.(\w+)", page.read_text(encoding="utf-8"))):
            assert hasattr(rl, name), f"{page.name}: rl.{name}"


def test_the_notebook_that_was_run_beforehand_is_the_one_in_demos():
    """Its page shows the code that stands in demos/smollm2.py, with outputs and no error."""
    import ast

    cells = json.loads((DOCS / "evidence" / "smollm2.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    run = "\n".join("".join(cell["source"]) for cell in code)
    now = (ROOT / "demos" / "smollm2.py").read_text(encoding="utf-8")
    assert ast.dump(ast.parse(run)) == ast.dump(ast.parse(now))
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    assert sum(bool(cell["outputs"]) for cell in code) >= 6
