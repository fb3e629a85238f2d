"""The documentation holds every public name, and no link of it leads nowhere; `make docs` builds it, a warning being an error."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import rim_lens as rl

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "evidence").glob("*.md")]


def test_every_public_name_is_on_one_page_of_the_api():
    runpy.run_path(str(ROOT / "docs" / "conf.py"))
    pages = [path.read_text() for path in (ROOT / "docs" / "api").glob("*.rst")]
    named = re.findall(r"^\.\. auto(?:class|function):: rim_lens\.(\w+)$", "\n".join(pages), re.MULTILINE)
    assert sorted(named) == sorted(set(rl.__all__) - {"__version__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s#]+)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_functions_that_the_pages_name_are_there():
    for page in (ROOT / "docs").glob("*.md"):
        for name in set(re.findall(r"`rl\.(\w+)", page.read_text(encoding="utf-8"))):
            assert hasattr(rl, name), f"{page.name}: rl.{name}"
