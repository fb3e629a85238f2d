"""The command line: rim-lens demo, study, heads, neurons, compare, circuit, measures, direction, show, organism."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout

import typer
from rich.markup import escape

from rim_lens.cli import evidence, studies
from rim_lens.cli.checkpoints import compare
from rim_lens.cli.circuits import circuit
from rim_lens.cli.neurons import neurons
from rim_lens.cli.options import GATE_EXIT, errors
from rim_lens.errors import RimLensError, SharingError
from rim_lens.sharing import launched, share_work

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
# What several processes do together; every other command is run by the first of them alone.
SHARED = (studies.demo, studies.study, studies.heads, neurons)
app.add_typer(evidence.organism, name="organism")


def main() -> None:
    """Run the command line; errors that rim_lens raises on purpose print their message and exit with 1."""
    try:
        _run()
    except RimLensError as error:
        if launched() > 1 and os.environ.get("RANK", "0") != "0" and not isinstance(error, SharingError):
            raise SystemExit(1) from error  # the first process has said it
        errors.print(f"[bold red]{type(error).__name__}[/bold red]: ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error


def _run() -> None:
    """The command; as one of several processes, where a launcher started them."""
    if launched() == 1:
        app()
        return
    asked = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    with ExitStack() as stack:
        if asked in {command.__name__ for command in SHARED}:
            work = stack.enter_context(share_work())
            if work.leads:
                errors.print(f"· {work.n} processes share the work", highlight=False)
            else:
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        elif os.environ.get("RANK", "0") != "0":
            return  # one process is enough for what is not shared
        try:
            app()
        except SystemExit as end:
            # A gate that was not passed is an answer; to a launcher every other number is a crash, after which it starts anew.
            if end.code not in (0, None, GATE_EXIT):
                raise
