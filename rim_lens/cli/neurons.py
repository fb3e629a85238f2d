"""The command that runs a study of neurons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    errors,
    planned_and_run,
    read_device,
    read_dtype,
    read_files,
    safe_name,
    show_result,
)


def neurons(
    model: Annotated[str, typer.Argument(help="A name rim_lens knows, a hub name, or a folder.")],
    tuned: Annotated[list[str] | None, typer.Option(help="A fine-tuned variant; repeat for more.")] = None,
    pairs: Annotated[
        str, typer.Option(help="What chooses: twins, or intent (a sentence of malicious intent, the paper).")
    ] = "twins",
    m: Annotated[
        int | None,
        typer.Option("--m", min=1, help="Neurons that each pair names in each layer; 5 % of a layer."),
    ] = None,
    min_fraction: Annotated[
        float, typer.Option(help="Share of pairs that must name a neuron; the paper takes all, 1.0.")
    ] = 0.5,
    random_sets: Annotated[
        int, typer.Option("--random-sets", min=1, help="Random sets per layer beside the set.")
    ] = 100,
    multiverse: Annotated[
        bool,
        typer.Option("--multiverse", help="Entanglement over every choice the paper leaves open as well."),
    ] = False,
    prompts: BothKinds = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    reasoning: Reasoning = None,
    out: Out = None,
    requests: Requests = None,
    max_new_tokens: Tokens = 48,
    seed: Annotated[int, typer.Option(help="Of random sets and intervals.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    plan: PlanOnly = False,
    as_json: AsJson = False,
    gate: Gate = True,
) -> None:
    """Which neurons does refusal depend on, what does removing them do, and did tuning move these rather than others?"""
    import torch

    from rim_lens.study import NeuronSettings, NeuronStudy
    from rim_lens.study.neuron_results import PARTS

    if pairs not in ("twins", "intent"):
        raise typer.BadParameter(f"--pairs {pairs}: there are twins and intent")
    question = NeuronStudy(
        model,
        tuned=tuned or [],
        n_requests=requests,
        settings=NeuronSettings(
            pairs=pairs,  # type: ignore[arg-type]
            m=m,
            min_fraction=min_fraction,
            n_random_sets=random_sets,
            max_new_tokens=max_new_tokens,
            gate=gate,
            seed=seed,
            progress=not as_json and errors.is_terminal,
        ),
        parts=PARTS if multiverse else PARTS[:-1],
        device=read_device(device),
        dtype=getattr(torch, read_dtype(dtype)),
        **read_files({"harmful": harmful, "harmless": harmless, "reasoning": reasoning}, prompts),
    )
    folder = out or Path("runs") / f"neurons-{safe_name(model)}"
    result = planned_and_run(question, model, folder, plan_only=plan, as_json=as_json)
    if result is None:
        return
    show_result(result, as_json)
    if not result.gate["passed"] and gate:
        raise typer.Exit(GATE_EXIT)
