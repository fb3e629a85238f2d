"""Commands that run a study of heads, or show one: demo, study, heads, show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rim_lens.cli.names import CONDITIONS
from rim_lens.cli.options import (
    ASKED,
    GATE_EXIT,
    LEFT_OUT,
    SIZE,
    AsJson,
    BothKinds,
    Device,
    Dtype,
    Gate,
    Harmful,
    Harmless,
    ModelName,
    Out,
    PlanOnly,
    Reasoning,
    Requests,
    Tokens,
    Tuned,
    complete_listed,
    complete_model,
    console,
    errors,
    open_result,
    planned_and_run,
    read_conditions,
    read_device,
    read_dtype,
    read_files,
    safe_name,
    show_result,
)

# A toy study is over in a minute or two; on a real model the same questions are asked of fewer requests.
TOY_TUNED = ("toy:careful", "toy:confirm", "toy:deviate")
REAL_REQUESTS = 24


def demo(
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="toy, smollm2, smollm2-refusal, a folder, or a hub name.",
            autocompletion=complete_model,
            rich_help_panel=ASKED,
        ),
    ] = "toy",
    requests: Requests = None,
    max_new_tokens: Tokens = 48,
    gate: Gate = True,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    plan: PlanOnly = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Run the main study and write its report: by default on the toy, a minute or two.

    Does a chain of thought lower refusal, which heads carry refusal, and what did fine-tuning move? The toy comes with its three fine-tuned variants; other models are asked with 24 requests of each kind, about heads: see [bold]neurons[/bold] for the other half.
    """
    toy = model == "toy"
    _study(
        model,
        tuned=list(TOY_TUNED) if toy else [],
        out=out or Path("runs") / f"demo-{safe_name(model)}",
        requests=requests if toy or requests is not None else REAL_REQUESTS,
        max_new_tokens=max_new_tokens,
        plan_only=plan,
        as_json=as_json,
        gate=gate,
        parts=("heads", "neurons") if toy else ("heads",),
        device=read_device(device),
        dtype=read_dtype(dtype),
    )


def study(
    model: ModelName,
    tuned: Tuned = None,
    probes: Annotated[
        bool, typer.Option("--probes", help="Train and ablate probes as well.", rich_help_panel=ASKED)
    ] = False,
    prompts: BothKinds = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    reasoning: Reasoning = None,
    requests: Requests = None,
    max_new_tokens: Tokens = 64,
    gate: Gate = True,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    plan: PlanOnly = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Run the main study on a model, with your own requests if you like.

    The plan comes first. Then: a gate (does it refuse at all?), attention on spans with and without a chain of thought, refusal in each condition beside filler, heads by removal, and neurons where tuned variants are given.
    """
    _study(
        model,
        tuned=tuned or [],
        out=out or Path("runs") / f"study-{safe_name(model)}",
        requests=requests,
        max_new_tokens=max_new_tokens,
        plan_only=plan,
        as_json=as_json,
        gate=gate,
        files={"harmful": harmful, "harmless": harmless, "reasoning": reasoning},
        both_kinds=prompts,
        parts=("heads", "probes", "neurons") if probes else ("heads", "neurons"),
        device=read_device(device),
        dtype=read_dtype(dtype),
    )


def heads(
    model: ModelName,
    think: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Think conditions, with commas; off and the controls they need are added.",
            autocompletion=complete_listed(*CONDITIONS),
            rich_help_panel=ASKED,
        ),
    ] = "off,careful,filler,unrelated,open",
    tuned: Tuned = None,
    prompts: BothKinds = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    requests: Requests = None,
    n_test: Annotated[
        int,
        typer.Option(
            "--n-test",
            min=1,
            metavar="N",
            help="Heads tested one by one; all where there are no more.",
            rich_help_panel=SIZE,
        ),
    ] = 24,
    max_new_tokens: Tokens = 48,
    statistics: Annotated[
        bool,
        typer.Option(
            " /--no-statistics",
            help="What all heads write and how they look, and pairs of the found ones.",
            show_default=False,
            rich_help_panel=LEFT_OUT,
        ),
    ] = True,
    removing: Annotated[
        bool,
        typer.Option(
            " /--no-removing",
            help="Removing the found heads, and editing them under chains of thought.",
            show_default=False,
            rich_help_panel=LEFT_OUT,
        ),
    ] = True,
    probes: Annotated[
        bool,
        typer.Option(
            " /--no-probes",
            help="Probes: what separates, and what ablating it does.",
            show_default=False,
            rich_help_panel=LEFT_OUT,
        ),
    ] = True,
    gate: Gate = True,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    plan: PlanOnly = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Which heads does refusal depend on, where do they look with and without a CoT, and what does removing them do?

    Heads are chosen on some requests and tested on others and their harmless twins, beside random heads of the same layers.
    """
    conditions, added = read_conditions(think)
    if added and not as_json:
        console.print(
            f"· added, so that there is something to hold against: {', '.join(added)}", highlight=False
        )
    _study(
        model,
        tuned=tuned or [],
        out=out or Path("runs") / f"heads-{safe_name(model)}",
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
                for part, asked in (
                    ("statistics", statistics),
                    ("removing", removing),
                    ("comparing", tuned),
                    ("probes", probes),
                )
                if asked
            ),
        ),
        device=read_device(device),
        dtype=read_dtype(dtype),
        conditions=conditions,
        n_test=n_test,
    )


def show(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where a study was run: runs/…")],
    as_json: AsJson = False,
) -> None:
    """Show a finished study, and write its report anew. Nothing is measured."""
    show_result(open_result(folder), as_json)


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
    import torch

    from rim_lens.study import Settings, Study

    asked = Settings(max_new_tokens=max_new_tokens, gate=gate, progress=errors.is_terminal, **settings)
    question = Study(
        model,
        tuned=tuned,
        n_requests=requests,
        settings=asked,
        parts=parts,
        device=device,
        dtype=getattr(torch, dtype),
        **read_files(files or {}, both_kinds),
    )
    result = planned_and_run(question, model, out, plan_only=plan_only, as_json=as_json)
    if result is None:
        return
    show_result(result, as_json)
    if not result.gate["passed"] and gate:
        raise typer.Exit(GATE_EXIT)
