"""The command line: rim-lens demo, study, heads, neurons, compare, measures, direction, show, organism."""

from __future__ import annotations

import typer

from rim_lens.cli import evidence, studies
from rim_lens.cli.checkpoints import compare
from rim_lens.cli.neurons import neurons
from rim_lens.cli.options import GATE_EXIT, errors
from rim_lens.errors import RimLensError

__all__ = ["GATE_EXIT", "app", "main"]

app = typer.Typer(
    help="Why does a model that reasons refuse less, where in the network does that happen, and can you prove it?\n\n"
    "Start with [bold]rim-lens demo[/bold]: the main study on a toy model, in minutes on a CPU. Then"
    " [bold]rim-lens study MODEL[/bold] on a model of your own.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    studies.demo,
    studies.study,
    studies.heads,
    neurons,
    compare,
    studies.show,
    evidence.measures,
    evidence.direction,
):
    app.command()(command)
app.add_typer(evidence.organism, name="organism")


def main() -> None:
    """Run the command line; errors that rim_lens raises on purpose print their message and exit with 1."""
    try:
        app()
    except RimLensError as error:
        errors.print(f"[bold red]{type(error).__name__}[/bold red]: ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
