"""The command line: rim-lens demo, study, heads, measures, direction, show, organism."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from rim_lens.errors import RimLensError

if TYPE_CHECKING:
    from rim_lens.study import Study, StudyResult

GATE_EXIT = 3  # the study ran and stopped at its gate: an answer, but not the one a script may wait for

app = typer.Typer(
    help="Why does a model that reasons refuse less, where in the network does that happen, and can you prove it?\n\n"
    "Start with [bold]rim-lens demo[/bold]: the main study on a toy model, in minutes on a CPU. Then"
    " [bold]rim-lens study MODEL[/bold] on a model of your own.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
organism = typer.Typer(
    help="Train the model organisms again, from nothing but the recipe.", no_args_is_help=True
)
app.add_typer(organism, name="organism")
# A pipe or a log has no width of its own: wide enough for the tables.
console = Console(width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True)

Out = Annotated[
    Path | None, typer.Option("--out", help="Folder for the results; run again with the same to go on.")
]
Requests = Annotated[
    int | None, typer.Option("--requests", min=4, help="At most so many requests of each kind and split.")
]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens generated per prompt.")]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Count passes and estimate the time, then stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of tables.")]
Gate = Annotated[bool, typer.Option(help="Stop where the model does not refuse in the first place.")]

# A toy study is over in a minute or two; on a real model the same questions are asked of fewer requests.
TOY_TUNED = ("toy:careful", "toy:confirm", "toy:deviate")
REAL_REQUESTS = 24
DTYPES = ("float32", "bfloat16", "float16")


@app.command()
def demo(
    model: Annotated[
        str, typer.Option(help="toy, smollm2, smollm2-refusal, a hub name, or a folder.")
    ] = "toy",
    out: Out = None,
    requests: Requests = None,
    max_new_tokens: Tokens = 48,
    plan: PlanOnly = False,
    as_json: AsJson = False,
    gate: Gate = True,
) -> None:
    """Run the main study and write its report: by default on the toy, with its three fine-tuned variants."""
    toy = model == "toy"
    _study(
        model,
        tuned=list(TOY_TUNED) if toy else [],
        out=out or Path("runs") / f"demo-{_safe(model)}",
        requests=requests if toy or requests is not None else REAL_REQUESTS,
        max_new_tokens=max_new_tokens,
        plan_only=plan,
        as_json=as_json,
        gate=gate,
    )


@app.command()
def study(
    model: Annotated[str, typer.Argument(help="A name rim_lens knows, a hub name, or a folder.")],
    tuned: Annotated[list[str] | None, typer.Option(help="A fine-tuned variant; repeat for more.")] = None,
    harmful: Annotated[
        Path | None, typer.Option(help="Your requests: .csv or .jsonl with a text column.")
    ] = None,
    harmless: Annotated[
        Path | None, typer.Option(help="Their harmless twins, in the same order or by id.")
    ] = None,
    reasoning: Annotated[Path | None, typer.Option(help="Your reasoning questions.")] = None,
    probes: Annotated[bool, typer.Option(help="Train and ablate probes as well.")] = False,
    out: Out = None,
    requests: Requests = None,
    max_new_tokens: Tokens = 64,
    plan: PlanOnly = False,
    as_json: AsJson = False,
    gate: Gate = True,
) -> None:
    """Run the main study on a model, with your own requests if you like."""
    _study(
        model,
        tuned=tuned or [],
        out=out or Path("runs") / f"study-{_safe(model)}",
        requests=requests,
        max_new_tokens=max_new_tokens,
        plan_only=plan,
        as_json=as_json,
        gate=gate,
        files={"harmful": harmful, "harmless": harmless, "reasoning": reasoning},
        parts=("heads", "probes", "neurons") if probes else ("heads", "neurons"),
    )


@app.command()
def heads(
    model: Annotated[str, typer.Argument(help="A name rim_lens knows, a hub name, or a folder.")],
    think: Annotated[
        str, typer.Option(help="Think conditions, with commas; off and the controls they need are added.")
    ] = "off,careful,filler,unrelated,open",
    prompts: Annotated[
        Path | None, typer.Option(help="Requests of both kinds: .csv or .jsonl with columns text and kind.")
    ] = None,
    harmful: Annotated[
        Path | None, typer.Option(help="Or: your harmful requests, and with --harmless")
    ] = None,
    harmless: Annotated[
        Path | None, typer.Option(help="their harmless twins, in the same order or by id.")
    ] = None,
    out: Out = None,
    requests: Requests = None,
    n_test: Annotated[
        int, typer.Option("--n-test", min=1, help="Heads tested one by one; all where there are no more.")
    ] = 24,
    max_new_tokens: Tokens = 48,
    tuned: Annotated[
        list[str] | None, typer.Option(help="A fine-tuned variant whose heads stand beside; repeat for more.")
    ] = None,
    removing: Annotated[
        bool, typer.Option(help="Remove the found heads, and edit them under chains of thought.")
    ] = True,
    probes: Annotated[bool, typer.Option(help="Train and ablate probes as well.")] = True,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Of the weights, and never chosen for you: " + ", ".join(DTYPES) + ".")
    ] = "float32",
    plan: PlanOnly = False,
    as_json: AsJson = False,
    gate: Gate = True,
) -> None:
    """Which heads does refusal depend on, where do they look with and without a CoT, and what does removing them do?"""
    conditions, added = _conditions(think)
    if added and not as_json:
        console.print(
            f"· added, so that there is something to hold against: {', '.join(added)}", highlight=False
        )
    if prompts is not None and (harmful or harmless):
        raise typer.BadParameter("give --prompts, or --harmful with --harmless, not both")
    _study(
        model,
        tuned=tuned or [],
        out=out or Path("runs") / f"heads-{_safe(model)}",
        requests=requests,
        max_new_tokens=max_new_tokens,
        plan_only=plan,
        as_json=as_json,
        gate=gate,
        files={"harmful": harmful, "harmless": harmless},
        both_kinds=prompts,
        parts=(
            "heads",
            *(
                part
                for part, asked in (("removing", removing), ("comparing", tuned), ("probes", probes))
                if asked
            ),
        ),
        device=_device(device),
        dtype=_dtype(dtype),
        conditions=conditions,
        n_test=n_test,
    )


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="A study's folder.")],
    as_json: AsJson = False,
) -> None:
    """Show a finished study, and write its report anew."""
    from rim_lens.study import load_study

    _show(load_study(folder), as_json)


@app.command()
def measures(
    model: Annotated[str, typer.Argument(help="A name rim_lens knows, a hub name, or a folder.")],
    requests: Annotated[int, typer.Option(min=2, help="Requests of each kind, of the evaluate split.")] = 24,
    conditions: Annotated[
        list[str] | None, typer.Option("--condition", help="Think condition; repeat for more.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("docs/evidence"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 32,
    max_cot_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a self-written thought.")] = 96,
    twins: Annotated[bool, typer.Option(help="Measure the harmless twins as well.")] = True,
    seed: Annotated[int, typer.Option(help="Of the controls and the intervals.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="What the tables call the model; a folder's own name else.")
    ] = None,
) -> None:
    """Read refusal in every way side by side (first token, first word, prefixes, text), and show where they differ."""
    from rim_lens.chat import ChatFormat
    from rim_lens.chat.conditions import STANDARD
    from rim_lens.measures.side_by_side import measure_side_by_side, write_side_by_side
    from rim_lens.organisms import load_model
    from rim_lens.prompts import load_prompts, spread
    from rim_lens.provenance import provenance

    loaded = load_model(model)
    chat = ChatFormat.from_model(loaded)
    language = "toy" if chat.name == "toy" else "en"
    kinds = ("harmful", "harmless") if twins else ("harmful",)
    asked = {
        kind: spread(load_prompts(kind, language=language, split="evaluate"), requests) for kind in kinds
    }
    found = measure_side_by_side(
        loaded,
        chat,
        asked,
        conditions or STANDARD,
        max_new_tokens=max_new_tokens,
        max_cot_tokens=max_cot_tokens,
        seed=seed,
        say=lambda line: console.print(f"· {line}", highlight=False),
    )
    command = f"rim-lens measures {model} --requests {requests} --max-new-tokens {max_new_tokens}"
    command += f" --max-cot-tokens {max_cot_tokens}" + ("" if twins else " --no-twins")
    command += "".join(f" --condition {name}" for name in conditions or ()) + (
        f" --seed {seed}" if seed else ""
    )
    command += f" --name {name}" if name else ""
    told = f"{' and '.join(f'{len(prompts)} {kind}' for kind, prompts in asked.items())} requests of the split evaluate"
    origin = provenance(command, ("transformer-lens", "torch", "transformers"))
    for path in write_side_by_side(found, out, name or _called(model), origin, told):
        console.print(f"written: {path}", highlight=False, soft_wrap=True)


@app.command()
def direction(
    model: Annotated[str, typer.Argument(help="A name rim_lens knows, a hub name, or a folder.")],
    requests: Annotated[int, typer.Option(min=4, help="Requests of each kind and split.")] = 24,
    controls: Annotated[int, typer.Option(min=1, help="Control directions of each of the two kinds.")] = 30,
    candidates: Annotated[int, typer.Option(min=1, help="Candidate directions that are tested.")] = 32,
    max_kl: Annotated[
        float | None, typer.Option(help="Bound on the KL on harmless requests, nats; 0.1, and 1 for the toy.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("docs/evidence"),
    seed: Annotated[int, typer.Option(help="Of the controls and the intervals.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="What the page calls the model; a folder's own name else.")
    ] = None,
) -> None:
    """Find the direction that refusal runs along, beside controls, and what refusal owes to single sentences of thought."""
    from rim_lens.chat import ChatFormat
    from rim_lens.chat.sentences import split_sentences
    from rim_lens.measures.refusal_causes import refusal_causes, write_causes
    from rim_lens.organisms import load_model
    from rim_lens.prompts import load_prompts
    from rim_lens.prompts.toy import split_steps
    from rim_lens.provenance import provenance

    loaded = load_model(model)
    chat = ChatFormat.from_model(loaded)
    toy = chat.name == "toy"
    harmful, harmless = (
        load_prompts(kind, language="toy" if toy else "en") for kind in ("harmful", "harmless")
    )
    found = refusal_causes(
        loaded,
        chat,
        harmful,
        harmless,
        limit=requests,
        n_controls=controls,
        max_candidates=candidates,
        max_kl=max_kl if max_kl is not None else 1.0 if toy else 0.1,
        split=split_steps if toy else split_sentences,
        seed=seed,
        progress=errors.is_terminal,
        say=lambda line: console.print(f"· {line}", highlight=False),
    )
    command = (
        f"rim-lens direction {model} --requests {requests} --controls {controls} --candidates {candidates}"
    )
    command += "".join(
        f" --{option} {value}"
        for option, value in (("max-kl", max_kl), ("seed", seed), ("name", name))
        if value
    )
    origin = provenance(command, ("transformer-lens", "torch", "transformers"))
    for path in write_causes(found, out, name or _called(model), origin):
        console.print(f"written: {path}", highlight=False, soft_wrap=True)


@organism.command("toy")
def organism_toy(
    seeds: Annotated[str, typer.Option(help="Seeds: 0-5, or 0,2,4.")] = "0-5",
    out: Annotated[Path, typer.Option(help="Folder for the table of what emerged.")] = Path("docs/evidence"),
) -> None:
    """Train the toy for several seeds and tabulate what emerges, failures included (minutes a seed)."""
    from rim_lens.organisms.toy import recipe

    recipe.evidence(_seeds(seeds), out / "toy_seeds.json")
    console.print(f"written: {out / 'toy_seeds.json'}")


@organism.command("smollm2")
def organism_smollm2(
    seeds: Annotated[str, typer.Option(help="Seeds: 0-2, or 0,2.")] = "0-2",
    out: Annotated[Path, typer.Option(help="Folder for the outcomes.")] = Path("docs/evidence"),
    adapters: Annotated[Path | None, typer.Option(help="Folder to keep the adapters in.")] = None,
    newline: Annotated[
        bool, typer.Option("--newline", help="The variant that writes a newline before every answer.")
    ] = False,
) -> None:
    """Tune smollm2-refusal for several seeds and count what it does on held-out requests (about 15 minutes a seed)."""
    from rim_lens.organisms.smollm2 import recipe

    path = out / ("smollm2-newline.json" if newline else "smollm2-refusal.json")
    recipe.evidence(
        _seeds(seeds), path, adapters=adapters, recipe=recipe.NEWLINE if newline else recipe.Recipe()
    )
    console.print(f"written: {path}")


def _study(
    model: str,
    *,
    tuned: list[str],
    out: Path,
    requests: int | None,
    max_new_tokens: int,
    plan_only: bool,
    as_json: bool,
    gate: bool,
    files: dict[str, Path | None] | None = None,
    both_kinds: Path | None = None,
    parts: Sequence[str] = ("heads", "neurons"),
    device: str = "cpu",
    dtype: str = "float32",
    **settings: Any,
) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import torch

    from rim_lens.prompts import load_file
    from rim_lens.study import Settings, Study

    given: dict[str, Any] = {
        kind: load_file(path, kind=kind) for kind, path in (files or {}).items() if path is not None
    }
    if both_kinds is not None:
        given = _by_kind(both_kinds)
    asked = Settings(
        max_new_tokens=max_new_tokens, gate=gate, progress=not as_json and errors.is_terminal, **settings
    )
    question = Study(
        model,
        tuned=tuned,
        n_requests=requests,
        settings=asked,
        parts=parts,
        device=device,
        dtype=getattr(torch, dtype),
        **given,
    )
    planned = question.plan()
    if as_json and plan_only:
        console.print_json(json.dumps(planned.to_dict()))
    elif not as_json:
        console.print(f"[bold]Plan[/bold] for {model}")
        console.print(str(planned), highlight=False, soft_wrap=True)
    if plan_only:
        return
    result = _run(question, out, as_json)
    _show(result, as_json)
    if not result.gate["passed"] and gate:
        raise typer.Exit(GATE_EXIT)


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise typer.BadParameter(f"--dtype {name}: there are {', '.join(DTYPES)}")
    return name


def _device(name: str) -> str:
    """The device, tried before a model is read onto it."""
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).splitlines()[0]
        raise typer.BadParameter(f"--device {name} cannot be used here: {reason}") from None
    return name


def _conditions(think: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
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


def _by_kind(path: Path) -> dict[str, Any]:
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


def _run(question: Study, out: Path, as_json: bool) -> StudyResult:
    try:
        return question.run(
            out, say=None if as_json else lambda line: console.print(f"· {line}", highlight=False)
        )
    except KeyboardInterrupt:
        errors.print(f"\nStopped. What was measured is in {out}; the same command goes on from there.")
        raise typer.Exit(130) from None


def _show(result: StudyResult, as_json: bool) -> None:
    from rim_lens.views import print_study, write_report

    report = write_report(result)
    if as_json:
        print(report.with_suffix(".json").read_text(encoding="utf-8"))
        return
    print_study(result, console)
    console.print(f"\nreport: {report.resolve()}", highlight=False, soft_wrap=True)


def _seeds(text: str) -> list[int]:
    try:
        first, _, last = text.partition("-")
        return list(range(int(first), int(last) + 1)) if last else [int(item) for item in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r}: write seeds as 0-5 or 0,2,4") from None


def _called(model: str) -> str:
    """A name for pages: without the way to a folder, which says where it lay on one machine."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _safe(name: str) -> str:
    return name.strip("/").replace("/", "_").replace(":", "_")


def main() -> None:
    """Run the command line; errors that rim_lens raises on purpose print their message and exit with 1."""
    try:
        app()
    except RimLensError as error:
        errors.print(f"[bold red]{type(error).__name__}[/bold red]: ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
