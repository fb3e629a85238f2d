"""What commands share: options, how they are read, and how a study is planned, run and stopped."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from rim_lens.sharing import leads

GATE_EXIT = 3  # the study ran and stopped at its gate: an answer, but not the one a script may wait for
DTYPES = ("float32", "bfloat16", "float16")

# A pipe or a log has no width of its own: wide enough for the tables.
console = Console(width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True)

# Panels of a command's help, in the order in which a command has them.
ASKED, REQUESTS, SIZE, LEFT_OUT, RUN, RESULT = (
    "What is asked",
    "Requests: our own sets where no file is given",
    "How much",
    "Leave out",
    "How it runs",
    "Plan and results",
)


def complete_model(incomplete: str) -> list[str]:
    """Names that `load_model` knows, and folders."""
    from rim_lens.cli.names import MODELS

    head, _, last = incomplete.rpartition("/")
    folders = (
        [folder.name for folder in Path(head or ".").glob(f"{last}*") if folder.is_dir()]
        if last or head
        else []
    )
    return [name for name in MODELS if name.startswith(incomplete)] + [
        f"{head}/{name}" if head else name for name in folders
    ]


def complete_listed(*words: str) -> Callable[[str], list[str]]:
    """Words of a list with commas: what stands before the last comma is kept."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + word for word in words if word.startswith(last)]

    return complete


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A name rim_lens knows (toy, toy:C, planted, smollm2, smollm2-refusal …), a folder, or a hub name.",
        autocompletion=complete_model,
    ),
]
Tuned = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODEL",
        help="A fine-tuned variant to hold beside; repeat for more.",
        autocompletion=complete_model,
        rich_help_panel=ASKED,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Results go there; the same folder goes on where it stopped. Else runs/COMMAND-MODEL.",
        show_default=False,
        rich_help_panel=RESULT,
    ),
]
Requests = Annotated[
    int | None,
    typer.Option(
        "--requests", min=4, metavar="N", help="At most so many of each kind and split.", rich_help_panel=SIZE
    ),
]
Tokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens",
        min=1,
        metavar="N",
        help="Most tokens written per prompt; 64 at most on harmful requests.",
        rich_help_panel=SIZE,
    ),
]
RandomSets = Annotated[
    int,
    typer.Option(
        "--random-sets",
        min=1,
        metavar="N",
        help="Random sets with as many neurons in each layer, beside the chosen one.",
        rich_help_panel=SIZE,
    ),
]
Neurons = Annotated[
    int | None,
    typer.Option(
        "--m",
        min=1,
        metavar="N",
        help="Neurons that each pair names in each layer; 5 % of a layer if not given.",
        rich_help_panel=ASKED,
    ),
]
PlanOnly = Annotated[
    bool,
    typer.Option(
        "--plan",
        help="Count passes, estimate time and memory, and stop: nothing is run.",
        rich_help_panel=RESULT,
    ),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON document in place of tables; progress goes to stderr.",
        rich_help_panel=RESULT,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Where the model runs: cpu, cuda, cuda:1, mps; balanced: over all accelerators.",
        autocompletion=complete_listed("cpu", "cuda", "mps", "balanced"),
        rich_help_panel=RUN,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Of the weights, and never chosen for you: " + ", ".join(DTYPES) + ".",
        autocompletion=complete_listed(*DTYPES),
        rich_help_panel=RUN,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        metavar="N", help="Of random sets, controls, permutations and intervals.", rich_help_panel=RUN
    ),
]
Harmful = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Harmful ones: .csv or .jsonl with a column text.", rich_help_panel=REQUESTS
    ),
]
Harmless = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Their harmless twins, in the same order or by id.", rich_help_panel=REQUESTS
    ),
]
Reasoning = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Reasoning questions, with answers.", rich_help_panel=REQUESTS),
]
BothKinds = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Both kinds in one file: .csv or .jsonl with columns text and kind.",
        rich_help_panel=REQUESTS,
    ),
]
Gate = Annotated[
    bool,
    typer.Option(
        " /--no-gate",
        help="The gate, which stops where the model does not refuse in the first place.",
        show_default=False,
        rich_help_panel=LEFT_OUT,
    ),
]


def read_files(files: Mapping[str, Path | None], both_kinds: Path | None = None) -> dict[str, Any]:
    """Requests of these files by kind, or of one file with both kinds."""
    from rim_lens.prompts import load_file

    if both_kinds is not None:
        if files.get("harmful") or files.get("harmless"):
            raise typer.BadParameter("give --prompts, or --harmful with --harmless, not both")
        given = read_by_kind(both_kinds)
    else:
        given = {}
    return given | {kind: load_file(path, kind=kind) for kind, path in files.items() if path is not None}


def read_dtype(name: str) -> str:
    """A dtype by its name."""
    if name not in DTYPES:
        raise typer.BadParameter(f"--dtype {name}: there are {', '.join(DTYPES)}")
    return name


def read_device(name: str) -> str:
    """The device, tried before a model is read onto it."""
    import torch

    from rim_lens.lens.loading import SPREAD

    if name in SPREAD:
        return name
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).splitlines()[0]
        raise typer.BadParameter(f"--device {name} cannot be used here: {reason}") from None
    return name


def read_conditions(think: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Conditions in the order in which they are shown everywhere, and which of them were added."""
    from rim_lens.chat.conditions import STANDARD, check_condition, with_controls

    names = [name.strip() for name in think.split(",") if name.strip()]
    for name in names:
        check_condition(name)
    whole, added = with_controls(list(dict.fromkeys(names)))
    return (
        *(name for name in STANDARD if name in whole),
        *(name for name in whole if name not in STANDARD),
    ), added


def read_by_kind(path: Path) -> dict[str, Any]:
    """Harmful and harmless requests of one file, by its column kind."""
    from rim_lens.errors import PromptFileError
    from rim_lens.prompts import load_file

    read = load_file(path)
    found = {kind: [prompt for prompt in read if prompt.kind == kind] for kind in ("harmful", "harmless")}
    other = [prompt for prompt in read if prompt.kind not in found]
    if other or not all(found.values()):
        kinds = sorted({repr(prompt.kind) for prompt in read})
        raise PromptFileError(
            f"{path}: its kinds are {', '.join(kinds)}, and harmful and harmless are needed. Fill in the column kind, or give two"
            " files: --harmful and --harmless."
        )
    return found


def read_seeds(text: str) -> list[int]:
    """Seeds as 0-5 or 0,2,4."""
    try:
        first, _, last = text.partition("-")
        return list(range(int(first), int(last) + 1)) if last else [int(item) for item in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r}: write seeds as 0-5 or 0,2,4") from None


def called(model: str) -> str:
    """A name for pages: without the way to a folder, which says where it lay on one machine."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def safe_name(name: str) -> str:
    """A model's name as part of a folder's."""
    return name.strip("/").replace("/", "_").replace(":", "_")


def planned_and_run(question: Any, model: str, out: Path, *, plan_only: bool, as_json: bool) -> Any | None:
    """Print what a study will cost, run it into its folder and return the result.

    None where only the plan was asked for, and in a process that shares the work and is not the first: it has nothing to show.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    planned = question.plan()
    if as_json and plan_only:
        console.print_json(json.dumps(planned.to_dict()))
    elif not as_json:
        console.print(f"[bold]Plan[/bold] for {escape(model)}")
        console.print(str(planned), markup=False, highlight=False, soft_wrap=True)
    if plan_only:
        return None
    with going_on_later(out):
        result = question.run(out, say=whisper if as_json else say)
    return result if leads() else None


@contextmanager
def going_on_later(folder: Path) -> Iterator[None]:
    """Where a user stops what is measured into a folder, say how it goes on, and leave."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print(
            f"\nStopped. What was measured is in {folder}; the same command goes on from there.", markup=False
        )
        raise typer.Exit(130) from None


def say(line: str) -> None:
    """One line of what goes on."""
    console.print(f"· {line}", markup=False, highlight=False)


def whisper(line: str) -> None:
    """The same on stderr, where stdout is one JSON document."""
    errors.print(f"· {line}", markup=False, highlight=False)


def show_written(paths: Sequence[Path], as_json: bool) -> None:
    """Say what was written, or print the JSON document among it."""
    if as_json:
        print(next(path for path in paths if path.suffix == ".json").read_text(encoding="utf-8"))
        return
    for path in paths:
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)


def open_result(folder: Path) -> Any:
    """The study that a folder holds, of whichever kind."""
    from rim_lens import study
    from rim_lens.study import checkpoint_results, neuron_results

    loaders = {
        neuron_results.CLAIM: study.load_neuron_study,
        checkpoint_results.CLAIM: study.load_checkpoint_study,
    }
    load = next((load for claim, load in loaders.items() if (folder / claim).exists()), study.load_study)
    return load(folder)


def show_result(result: Any, as_json: bool) -> None:
    """Write the report of a result, and print it as tables or JSON."""
    from rim_lens import study, views

    shown: dict[type, tuple[Any, Any]] = {
        study.StudyResult: (views.write_report, views.print_study),
        study.NeuronStudyResult: (views.write_neuron_report, views.print_neurons),
        study.CheckpointStudyResult: (views.write_checkpoint_report, views.print_checkpoints),
    }
    write, show = shown[type(result)]
    report = write(result)
    if as_json:
        print(report.with_suffix(".json").read_text(encoding="utf-8"))
        return
    show(result, console)
    console.print(f"\nreport: {report.resolve()}", markup=False, highlight=False, soft_wrap=True)
