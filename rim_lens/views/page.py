"""A page of results: one self-contained file, and the same as Markdown.

The page loads nothing: plotly stands in it once, its content security policy allows no request, and only the two
scripts whose digests it names run. Text from models and prompts is escaped wherever it stands.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_lens.folder import write_whole
from rim_lens.views import offline
from rim_lens.views.plots.style import template
from rim_lens.views.tables import Table, Token
from rim_lens.views.text import markdown_block, markdown_code, markdown_text, visible

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from rim_lens.views.finding import Finding

_NUMBER = re.compile(
    r"^(p [=<] |< )?[≤−+\[]?[\d.,]+( nats| s| min| %| B| kB| MB)?( ?[\[/(].*| of .*)?$|^\[.*\]$|^–$"
)


@dataclass(frozen=True)
class Figure:
    """A picture with what to look for, and what it does not show."""

    key: str
    figure: go.Figure
    look: str
    not_shown: str


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    key: str
    title: str
    paragraphs: tuple[str, ...] = ()
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    code: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Page:
    """What a page says and shows.

    Attributes:
        what: What was done: "study", "neurons", "compare".
        model: Whom it is about, as a title.
        question: What was asked, in a sentence.
        findings: The answer in words.
        sections: Pictures and tables.
        version: Of rim_lens, when it was measured.
    """

    what: str
    model: str
    question: str
    findings: list[Finding]
    sections: list[Section]
    version: str


def page_html(page: Page) -> str:
    """The page: complete in itself, and able to load nothing."""
    figures = {
        figure.key: _bare(figure.figure.to_json()) for section in page.sections for figure in section.figures
    }
    library = _plotly() if figures else ""
    script = (Path(__file__).parent / "templates" / "report.js").read_text(encoding="utf-8")
    scripts = [text for text in (library, script) if text]
    return _render(
        "report.html",
        what=page.what,
        title=visible(page.model),
        question=visible(page.question),
        findings=page.findings,
        sections=page.sections,
        cells=_cells,
        policy=offline.policy(scripts if figures else []),
        library=library,
        script=script,
        data=offline.harmless_json(
            finite({"figures": figures, "templates": {theme: template(theme) for theme in ("light", "dark")}})
        )
        if figures
        else "",
        written=now(),
        version=page.version,
    )


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return offline.as_read(str(get_plotlyjs()))


def _bare(figure: str) -> Any:
    """A figure without its template: the page sets that by its theme, once for all."""
    plain = json.loads(figure)
    plain["layout"].pop("template", None)
    return plain


def _render(name: str, **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)


def _cells(table: Table) -> dict[str, Any]:
    """A table whose cells know how they are shown."""
    return {
        "table": table,
        "rows": [
            [
                {
                    "text": visible(cell),
                    "token": isinstance(cell, Token),
                    "number": len(row) > 2 and not isinstance(cell, Token) and bool(_NUMBER.match(cell)),
                }
                for cell in row
            ]
            for row in table.rows
        ],
    }


def frame(what: str, model: str, question: str, said: list[Finding], shown: list[Table]) -> str:
    """A page in a frame that can run nothing and reach nothing."""
    import html

    page = _render(
        "summary.html",
        title=visible(model),
        question=visible(question),
        findings=said,
        tables=[_cells(table) for table in shown],
    )
    return (
        f'<iframe sandbox srcdoc="{html.escape(page)}" title="rim_lens {what}"'
        ' style="width:100%;height:34em;border:1px solid #8884;border-radius:6px"></iframe>'
    )


def page_markdown(page: Page) -> str:
    """The same without pictures, as Markdown."""
    lines = [f"# rim_lens {page.what}: {markdown_text(page.model)}", ""]
    lines += [markdown_text(page.question), "", "## Verdict", ""]
    lines += [
        f"- **{markdown_text(finding.topic)}** ({finding.status}): {markdown_text(finding.text)}"
        for finding in page.findings
    ]
    for section in page.sections:
        lines += ["", f"## {section.title}", ""]
        for paragraph in section.paragraphs:
            lines += [markdown_text(paragraph), ""]
        for language, code in section.code:
            lines += [markdown_block(code, language.lower()), ""]
        for table in section.tables:
            lines += table_markdown(table)
    lines += ["", f"Written {now()} by rim\\_lens {page.version}.", ""]
    return "\n".join(lines)


def table_markdown(table: Table) -> list[str]:
    """The lines of one table as Markdown: its title, its rows, its note."""
    rows = [
        " | ".join(markdown_code(cell) if isinstance(cell, Token) else markdown_text(cell) for cell in row)
        for row in table.rows
    ]
    head = " | ".join(markdown_text(column) for column in table.columns)
    return [
        f"**{markdown_text(table.title)}**",
        "",
        f"| {head} |",
        f"|{' --- |' * len(table.columns)}",
        *(f"| {row} |" for row in rows),
        "",
        *([markdown_text(table.note), ""] if table.note else []),
    ]


def finite(value: Any) -> Any:
    """NaN and infinity as null: JSON has no other word for them."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def now() -> str:
    """The time, as pages tell it."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all, into a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
