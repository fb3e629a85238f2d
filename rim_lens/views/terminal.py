"""Studies in the terminal."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rim_lens.views import checkpoint_tables, checkpoint_words, neuron_tables, neuron_words, tables, verdict
from rim_lens.views.tables import Table, Token
from rim_lens.views.text import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

    from rim_lens.study import CheckpointStudyResult, NeuronStudyResult, StudyResult
    from rim_lens.views.finding import Finding

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
_OF_REMOVAL = ("measure", "on", "condition", "n", "change [95 %]", "p", "random sets [95 %]", "larger than")
_OF_ENDS = (
    "run",
    "step",
    "harmful refused",
    "score lost, nats [95 %] (p)",
    "twins refused",
    "questions right",
)
_OF_DRIFT = ("kind", "drift by", "runs", "score lost beyond the control, nats: mean (range)", "p over runs")
_OF_METRICS = ("metric", "in one run: mean (range)", "pooled", "across runs", "above random sets")
_NOT_WRITERS = ("neuron", "score", "activity")
_MOST_NEURONS = 12
_STYLES = {"shown": "green", "not shown": "yellow", "cannot tell": "yellow", "note": "dim"}


def print_study(result: StudyResult, console: Console) -> None:
    """Print the question, the verdict, and the tables of gate, outcomes, heads and neurons.

    Args:
        result: A study that came to its end, or stopped at its gate.
        console: Where to; a `rich.console.Console`.

    Raises:
        StudyFolderError: The study was interrupted, or its folder is incomplete.
    """
    from rich.text import Text

    said = verdict.findings(result)
    console.print(Text(visible(verdict.question(result)), style="bold"))
    console.print()
    shown = [tables.gate_table(result)]
    if len(said) > 1:
        shown += [tables.outcome_table(result), *_found_only(tables.head_tables(result.heads))]
        if "probes" in result.parts:
            shown.append(_columns(tables.probe_table(result.probes()), _OF_PROBES))
        shown += _of_neurons(result.neurons)
    for table in shown:
        console.print(_rich(table))
        console.print()
    _say(said, console)


def print_neurons(result: NeuronStudyResult, console: Console) -> None:
    """Print the question, the neurons, what removing them does, and the verdict of a study of neurons.

    Args:
        result: A study that came to its end, stopped at its gate, or as far as it came.
        console: Where to; a `rich.console.Console`.

    Raises:
        StudyFolderError: A file of the folder is corrupt.
    """
    from rich.text import Text

    console.print(Text(visible(neuron_words.neuron_question(result)), style="bold"))
    console.print()
    for table in _of_neurons(result):
        console.print(_rich(table))
        console.print()
    _say(neuron_words.neuron_findings(result), console)


def _of_neurons(result: NeuronStudyResult | None) -> list[Table]:
    """The neurons, and what removing them does; of a study that has come so far."""
    found = None if result is None else result.neurons
    if result is None or found is None or not len(found):
        return []
    listed = neuron_tables.set_table(found, result.writers)
    first = replace(listed, rows=listed.rows[:_MOST_NEURONS])
    shown = [first if result.writers is not None else _columns(first, _NOT_WRITERS)]
    if found.effects is not None:
        removed = tables.removal_table(found.effects, "chosen neurons", "neurons")
        shown.append(_columns(removed, _OF_REMOVAL))
    return shown


def print_checkpoints(result: CheckpointStudyResult, console: Console) -> None:
    """Print the question, what each run lost, how metrics go with it, and the verdict of a study of checkpoints.

    Args:
        result: A study that came to its end, stopped at its gate, or as far as it came.
        console: Where to; a `rich.console.Console`.

    Raises:
        StudyFolderError: A file of the folder is corrupt.
    """
    from rich.text import Text

    console.print(Text(visible(checkpoint_words.checkpoint_question(result)), style="bold"))
    console.print()
    shown = [tables.gate_table(result)]
    if not result.stopped and not result.missing:
        shown.append(_columns(checkpoint_tables.ends_table(result), _OF_ENDS))
        if len(result.beyond_drift):
            shown.append(_columns(checkpoint_tables.beyond_table(result), _OF_DRIFT))
        shown.append(_columns(checkpoint_tables.metrics_table(result), _OF_METRICS))
    for table in shown:
        console.print(_rich(table))
        console.print()
    _say(checkpoint_words.checkpoint_findings(result), console)


def _say(said: list[Finding], console: Console) -> None:
    from rich.padding import Padding
    from rich.text import Text

    for finding in said:
        head = Text.assemble(
            (f"[{finding.status}] ", _STYLES[finding.status]), (visible(finding.topic), "bold")
        )
        console.print(head)
        console.print(Padding(Text(visible(finding.text)), (0, 0, 1, 2)))


def _columns(table: Table, wanted: tuple[str, ...]) -> Table:
    places = [table.columns.index(name) for name in wanted]
    rows = tuple(tuple(row[place] for place in places) for row in table.rows)
    return replace(table, columns=wanted, rows=rows)


def _found_only(shown: list[Table]) -> list[Table]:
    """Heads that were found or have an effect, and what a terminal is wide enough for; the rest is for the report."""
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
