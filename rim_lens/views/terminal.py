"""A study in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rim_lens.views import tables, verdict
from rim_lens.views.tables import Table, Token
from rim_lens.views.text import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

    from rim_lens.study import StudyResult

_LONGEST_WORD = 14
# What a terminal is wide enough for; the rest is for the report.
_OF_HEADS = ("verdict", "head", "found", "effect on harmful", "effect on twins", "specificity", "p, specific")
_OF_PROBES = (
    "condition",
    "layer",
    "place",
    "AUC [95 %]",
    "ablated: on harmful",
    "on twins",
    "what may be said",
)
_STYLES = {"shown": "green", "not shown": "yellow", "cannot tell": "yellow", "note": "dim"}


def print_study(result: StudyResult, console: Console) -> None:
    """Print the question, the verdict, and the tables of gate, outcomes, heads, set and RAS.

    Args:
        result: A study that came to its end, or stopped at its gate.
        console: Where to; a `rich.console.Console`.

    Raises:
        StudyFolderError: The study was interrupted, or its folder is incomplete.
    """
    from rich.padding import Padding
    from rich.text import Text

    said = verdict.findings(result)
    console.print(Text(visible(verdict.question(result)), style="bold"))
    console.print()
    shown = [tables.gate_table(result)]
    if len(said) > 1:
        shift = tables.shift_table(result)
        shown += [tables.outcome_table(result), *_found_only(tables.head_tables(result.heads))]
        if "probes" in result.parts:
            shown.append(_columns(tables.probe_table(result.probes()), _OF_PROBES))
        shown += [shift] if shift else []
    for table in shown:
        console.print(_rich(table))
        console.print()
    for finding in said:
        head = Text.assemble(
            (f"[{finding.status}] ", _STYLES[finding.status]), (visible(finding.topic), "bold")
        )
        console.print(head)
        console.print(Padding(Text(visible(finding.text)), (0, 0, 1, 2)))


def _columns(table: Table, wanted: tuple[str, ...]) -> Table:
    from dataclasses import replace

    places = [table.columns.index(name) for name in wanted]
    rows = tuple(tuple(row[place] for place in places) for row in table.rows)
    return replace(table, columns=wanted, rows=rows)


def _found_only(shown: list[Table]) -> list[Table]:
    """Heads that were found or have an effect, and what a terminal is wide enough for; the rest is for the report."""
    from dataclasses import replace

    kept = []
    for table in shown:
        if table.key == "heads":
            rows = tuple(row for row in table.rows if row[2] == "yes" or row[0] in ("refusal", "general"))
            note = table.note.partition(" Of its")[0]
            kept.append(_columns(replace(table, rows=rows, note=note), _OF_HEADS))
        elif table.key != "verdicts":
            kept.append(table)
    return [table for table in kept if table.rows]


def _rich(table: Table) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        title=Text(visible(table.title)),
        caption=Text(visible(table.note)) if table.note else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    cells = [[visible(cell) for cell in row] for row in table.rows]
    for number, column in enumerate(table.columns):
        # A narrow terminal breaks lines between words, and within a word only where it is longer than a name.
        words = [word for text in (column, *(row[number] for row in cells)) for word in text.split()]
        drawn.add_column(
            Text(column), overflow="fold", min_width=min(_LONGEST_WORD, max(map(len, words), default=1))
        )
    for row in table.rows:
        # Text, not markup: brackets in a name are no style.
        drawn.add_row(*(Text(visible(cell), style="cyan" if isinstance(cell, Token) else "") for cell in row))
    return drawn
