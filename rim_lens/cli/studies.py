"""Commands that run a study of heads, or show one: demo, study, heads, show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rim_lens.cli.options import (
    GATE_EXIT,
    AsJson,
    BothKinds,
    Device,
    Dtype,
    Gate,
    Harmful,
    Harmless,
    Out,
    PlanOnly,
    Reasoning,
    Requests,
    Tokens,
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
        str, typer.Option(help="toy, smollm2, smollm2-refusal, a hub name, or a folder.")
    ] = "toy",
    out: Out = None,
    requests: Requests = None,
    max_new_tokens: Tokens = 48,
    plan: PlanOnly = False,
    as_json: AsJson = False,
    gate: Gate = True,
) -> None:
    """Run the main study and write its report: by default on the toy, with neurons and its three fine-tuned variants.

    On a real model it measures heads; see neurons for the other half.
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
    )


def study(
    model: Annotated[str, typer.Argument(help="A name rim_lens knows, a hub name, or a folder.")],
    tuned: Annotated[list[str] | None, typer.Option(help="A fine-tuned variant; repeat for more.")] = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    reasoning: Reasoning = None,
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
        out=out or Path("runs") / f"study-{safe_name(model)}",
        requests=requests,
        max_new_tokens=max_new_tokens,
        plan_only=plan,
        as_json=as_json,
        gate=gate,
        files={"harmful": harmful, "harmless": harmless, "reasoning": reasoning},
        parts=("heads", "probes", "neurons") if probes else ("heads", "neurons"),
    )


def heads(
    model: Annotated[str, typer.Argument(help="A name rim_lens knows, a hub name, or a folder.")],
    think: Annotated[
        str, typer.Option(help="Think conditions, with commas; off and the controls they need are added.")
    ] = "off,careful,filler,unrelated,open",
    prompts: BothKinds = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    out: Out = None,
    requests: Requests = None,
    n_test: Annotated[
        int, typer.Option("--n-test", min=1, help="Heads tested one by one; all where there are no more.")
    ] = 24,
    max_new_tokens: Tokens = 48,
    tuned: Annotated[
        list[str] | None, typer.Option(help="A fine-tuned variant whose heads stand beside; repeat for more.")
    ] = None,
    statistics: Annotated[
        bool, typer.Option(help="What all heads write and how they look, and pairs of the found ones.")
    ] = True,
    removing: Annotated[
        bool, typer.Option(help="Remove the found heads, and edit them under chains of thought.")
    ] = True,
    probes: Annotated[bool, typer.Option(help="Train and ablate probes as well.")] = True,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    plan: PlanOnly = False,
    as_json: AsJson = False,
    gate: Gate = True,
) -> None:
    """Which heads does refusal depend on, where do they look with and without a CoT, and what does removing them do?"""
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
    folder: Annotated[Path, typer.Argument(help="A study's folder.")],
    as_json: AsJson = False,
) -> None:
    """Show a finished study, and write its report anew."""
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
        **read_files(files or {}, both_kinds),
    )
    result = planned_and_run(question, model, out, plan_only=plan_only, as_json=as_json)
    if result is None:
        return
    show_result(result, as_json)
    if not result.gate["passed"] and gate:
        raise typer.Exit(GATE_EXIT)
