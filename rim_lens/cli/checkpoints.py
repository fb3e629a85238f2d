"""The command that compares runs of fine-tuning with their base: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rim_lens.cli.names import TRAINED
from rim_lens.cli.options import (
    ASKED,
    GATE_EXIT,
    SIZE,
    AsJson,
    BothKinds,
    Device,
    Dtype,
    Gate,
    Harmful,
    Harmless,
    Neurons,
    Out,
    PlanOnly,
    RandomSets,
    Reasoning,
    Requests,
    Seed,
    Tokens,
    complete_listed,
    complete_model,
    errors,
    planned_and_run,
    read_device,
    read_dtype,
    read_files,
    read_seeds,
    safe_name,
    show_result,
)
from rim_lens.errors import RimLensError

TRAINING = "Training here, with --train"


def compare(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE",
            help="The model before tuning: a name rim_lens knows, a folder, or a hub name.",
            autocompletion=complete_model,
        ),
    ],
    tuned: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TUNED]...",
            help="What was tuned from it: folders step-N of one run, a run of rl.fine_tune, models; or NAME=MODEL.",
            autocompletion=complete_model,
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Or train runs here, on these chains of thought: careful,confirm,deviate,heuristic.",
            autocompletion=complete_listed(*TRAINED),
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seeds: Annotated[
        str,
        typer.Option(
            metavar="LIST", help="One run of each kind for each: 0-2, or 0,2.", rich_help_panel=TRAINING
        ),
    ] = "0-2",
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Of each run; 320 for the toy, 120 for others.", rich_help_panel=TRAINING
        ),
    ] = None,
    checkpoints: Annotated[
        int, typer.Option(min=1, metavar="N", help="Of each run.", rich_help_panel=TRAINING)
    ] = 6,
    operator: Annotated[
        str,
        typer.Option(
            metavar="SIGN", help="Of the toy's sums: - is new to it, + it knows.", rich_help_panel=TRAINING
        ),
    ] = "-",
    control: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="The kind, or given run, that others are held against at equal drift; careful if there is one.",
            rich_help_panel=ASKED,
        ),
    ] = None,
    m: Neurons = None,
    prompts: BothKinds = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    reasoning: Reasoning = None,
    requests: Requests = None,
    random_sets: RandomSets = 100,
    max_new_tokens: Tokens = 48,
    max_cot_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-cot-tokens",
            min=1,
            metavar="N",
            help="Close a chain of thought that is longer than this.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    gate: Gate = True,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    plan: PlanOnly = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """What does fine-tuning do to refusal on the way, and does entanglement follow it better than drift and chance do?

    Give tuned models, or --train to make them here. Each checkpoint is read: refusal, twins, sums, drift, RAS and its rivals.
    """
    import torch

    from rim_lens.study import CheckpointSettings, CheckpointStudy

    if bool(tuned) == bool(train):
        raise typer.BadParameter("give tuned models, or --train with kinds of chains of thought; one of them")
    try:
        question = CheckpointStudy(
            base,
            checkpoints=read_runs(tuned or []),
            train=[kind.strip() for kind in (train or "").split(",") if kind.strip()],
            train_seeds=read_seeds(seeds),
            steps=steps,
            n_checkpoints=checkpoints,
            operator=operator,  # type: ignore[arg-type]
            control=control,
            n_requests=requests,
            settings=CheckpointSettings(
                m=m,
                n_random_sets=random_sets,
                max_new_tokens=max_new_tokens,
                max_cot_tokens=max_cot_tokens,
                gate=gate,
                seed=seed,
                progress=errors.is_terminal,
            ),
            device=read_device(device),
            dtype=getattr(torch, read_dtype(dtype)),
            **read_files({"harmful": harmful, "harmless": harmless, "reasoning": reasoning}, prompts),
        )
    except RimLensError:
        raise
    except ValueError as problem:  # a name, kind or number that cannot be
        raise typer.BadParameter(str(problem)) from None
    folder = out or Path("runs") / f"compare-{safe_name(base)}"
    result = planned_and_run(question, base, folder, plan_only=plan, as_json=as_json)
    if result is None:
        return
    show_result(result, as_json)
    if result.stopped:
        raise typer.Exit(GATE_EXIT)


def read_runs(tuned: list[str]) -> Any:
    """Models as they are, or by name where one is NAME=MODEL; models of one name are one run."""
    if not any("=" in one for one in tuned):
        return tuned
    from rim_lens.study.runs import given_runs

    found: dict[str, Any] = {}
    for one in tuned:
        name, equals, model = one.partition("=")
        if not equals:
            found |= given_runs([one])
        elif (Path(model) / "fine_tuned.json").is_file():
            found[name] = model
        else:
            found[name] = [*found.get(name, []), model]
    return found
