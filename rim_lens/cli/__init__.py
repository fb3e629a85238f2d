"""The command line: rim-lens demo, study, heads, neurons, compare, circuit, measures, direction, show, organism."""

from __future__ import annotations

from collections.abc import Callable

import typer
from rich.markup import escape

from rim_lens.cli import evidence, studies
from rim_lens.cli.checkpoints import compare
from rim_lens.cli.circuits import circuit
from rim_lens.cli.neurons import neurons
from rim_lens.cli.options import GATE_EXIT, errors
from rim_lens.errors import RimLensError

__all__ = ["GATE_EXIT", "app", "main"]

app = typer.Typer(
    help="Why does a model that reasons refuse less, where in the network does that happen, and can you prove it?\n\n"
    "New here? [bold]rim-lens demo[/bold] runs the main study on a toy model, in a minute or two on a CPU, and writes a report."
    " Then [bold]rim-lens study MODEL --plan[/bold] on a model of your own: it says what it would take and runs nothing;"
    " without --plan it runs. Each command's --help has examples.",
    epilog="[bold]Results[/bold]  A command prints its plan, measures, and writes into runs/COMMAND-MODEL or --out: report.html to read,"
    " report.json for machines, arrays beside them. Interrupt it and give the same command again: it goes on.\n\n"
    "[bold]Exit codes[/bold]  0 done · 1 an error, in words · 2 a wrong option · 3 stopped at the gate, as the model does not refuse in"
    " the first place (an answer, not an error) · 130 interrupted",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
# Command → examples for its help; a test sees that each of them is one.
EXAMPLES: dict[Callable[..., None], tuple[str, ...]] = {
    studies.demo: (
        "rim-lens demo",
        "rim-lens demo --model smollm2-refusal --requests 12 --plan",
    ),
    studies.study: (
        "rim-lens study toy --tuned toy:deviate --requests 8",
        "rim-lens study Qwen/Qwen3-0.6B --prompts mine.csv --plan",
        "rim-lens study runs/my-adapter --harmful asked.csv --harmless twins.csv",
    ),
    studies.heads: (
        "rim-lens heads toy --requests 12 --no-probes --no-removing",
        "rim-lens heads Qwen/Qwen3-4B --device cuda --dtype bfloat16 --plan",
        "rim-lens heads toy --think off,confirm --json > heads.json",
    ),
    neurons: (
        "rim-lens neurons toy --tuned toy:deviate --requests 12",
        "rim-lens neurons MODEL --pairs intent --min-fraction 1.0 --plan",
    ),
    compare: (
        "rim-lens compare toy toy:careful toy:deviate --requests 12",
        "rim-lens compare BASE a=runs/a/step-160 b=runs/b/step-160 --control a",
        "rim-lens compare toy --train careful,deviate --seeds 0-2 --plan",
    ),
    circuit: (
        "rim-lens circuit toy --n-neurons 32 --requests 12",
        "rim-lens circuit smollm2-refusal --heads L1H5,L14H2 --neuron-layers 10 --confirm 60 --plan",
        "rim-lens circuit toy --tuned toy:deviate --contrasts twins,careful",
    ),
    studies.show: (
        "rim-lens show runs/demo-toy",
        "rim-lens show runs/demo-toy --json > result.json",
    ),
    evidence.measures: (
        "rim-lens measures toy --requests 8",
        "rim-lens measures MODEL --condition off --condition careful --condition filler",
    ),
    evidence.direction: ("rim-lens direction toy --requests 8 --controls 10",),
}
for command, examples in EXAMPLES.items():
    app.command(epilog="\n\n".join(["[bold]Examples[/bold]", *map(escape, examples)]))(command)
app.add_typer(evidence.organism, name="organism")


def main() -> None:
    """Run the command line; errors that rim_lens raises on purpose print their message and exit with 1."""
    try:
        app()
    except RimLensError as error:
        errors.print(f"[bold red]{type(error).__name__}[/bold red]: ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
