"""The command that runs a study of neurons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rim_lens.cli.options import (
    ASKED,
    GATE_EXIT,
    AsJson,
    BothKinds,
    Device,
    Dtype,
    Gate,
    Harmful,
    Harmless,
    ModelName,
    Neurons,
    Out,
    PlanOnly,
    RandomSets,
    Reasoning,
    Requests,
    Seed,
    Tokens,
    Tuned,
    complete_listed,
    errors,
    planned_and_run,
    read_device,
    read_dtype,
    read_files,
    safe_name,
    show_result,
)


def neurons(
    model: ModelName,
    tuned: Tuned = None,
    pairs: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="What chooses: twins, or intent (a sentence of malicious intent, as in the paper).",
            autocompletion=complete_listed("twins", "intent"),
            rich_help_panel=ASKED,
        ),
    ] = "twins",
    m: Neurons = None,
    min_fraction: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Of the pairs, how many must name a neuron; the paper takes all, 1.0.",
            rich_help_panel=ASKED,
        ),
    ] = 0.5,
    multiverse: Annotated[
        bool,
        typer.Option(
            "--multiverse",
            help="Entanglement over every choice the paper leaves open.",
            rich_help_panel=ASKED,
        ),
    ] = False,
    prompts: BothKinds = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    reasoning: Reasoning = None,
    requests: Requests = None,
    random_sets: RandomSets = 100,
    max_new_tokens: Tokens = 48,
    gate: Gate = True,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    plan: PlanOnly = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Which neurons does refusal depend on, what does removing them do, and did tuning move these rather than others?

    Neurons are chosen by pairs of requests, tested on other requests beside random sets of the same layers, and held against tuned models: RAS with its rivals, and what putting the old activations back restores.
    """
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
            progress=errors.is_terminal,
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
