"""The command that measures a circuit: circuit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

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
    Seed,
    called,
    complete_listed,
    complete_model,
    console,
    errors,
    going_on_later,
    read_device,
    read_dtype,
    read_files,
    safe_name,
    say,
    show_written,
    whisper,
)

_HEAD = re.compile(r"L?(\d+)[H.](\d+)")


def circuit(
    model: ModelName,
    heads: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Heads that are asked whatever gradients say: L1H5,L14H2.",
            rich_help_panel=ASKED,
        ),
    ] = "",
    n_heads: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Heads in all; gradients name the rest.", rich_help_panel=ASKED
        ),
    ] = 12,
    n_neurons: Annotated[
        int, typer.Option(min=0, metavar="N", help="Neurons, which gradients name.", rich_help_panel=ASKED)
    ] = 128,
    neuron_layers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Layers they may lie in, each one node.", rich_help_panel=ASKED
        ),
    ] = None,
    contrasts: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="What runs differ in: twins, or a closed condition; tuned is added with --tuned.",
            autocompletion=complete_listed("twins", *CONDITIONS),
            rich_help_panel=ASKED,
        ),
    ] = "twins",
    tuned: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A fine-tuned variant whose words are put in the model's place.",
            autocompletion=complete_model,
            rich_help_panel=ASKED,
        ),
    ] = None,
    outside: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="What is outside the circuit says: mean, or resample.",
            autocompletion=complete_listed("mean", "resample"),
            rich_help_panel=ASKED,
        ),
    ] = "mean",
    min_share: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Of the difference between the runs, what an edge of the circuit carries at least; half of it keeps a node.",
            rich_help_panel=ASKED,
        ),
    ] = 0.2,
    min_effect: Annotated[
        float,
        typer.Option(
            metavar="NATS",
            help="And in nats; with both at 0 every node is kept that has any way to refusal.",
            rich_help_panel=ASKED,
        ),
    ] = 0.25,
    scope: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="What is outside the circuit: all other heads and neurons, or other heads alone.",
            autocompletion=complete_listed("all", "heads"),
            rich_help_panel=ASKED,
        ),
    ] = "all",
    prompts: BothKinds = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    reasoning: Reasoning = None,
    requests: Annotated[
        int,
        typer.Option(min=4, metavar="N", help="At most so many of each kind and side.", rich_help_panel=SIZE),
    ] = 16,
    confirm: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Edges into heads and neurons that are measured, those with the largest gradients; all if not given.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    random_circuits: Annotated[
        int, typer.Option(min=0, metavar="N", help="Random circuits of the same shape.", rich_help_panel=SIZE)
    ] = 20,
    random_nodes: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Random senders, and receivers, beside each edge.", rich_help_panel=SIZE
        ),
    ] = 2,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Of answers to questions; 0 leaves accuracy out.", rich_help_panel=SIZE
        ),
    ] = 16,
    questions: Annotated[
        bool,
        typer.Option(
            " /--no-questions",
            help="Reasoning questions: what the circuit does to them.",
            show_default=False,
            rich_help_panel=LEFT_OUT,
        ),
    ] = True,
    gate: Gate = True,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    plan: PlanOnly = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Who reads from whom, is that circuit enough for refusal, and is each part of it needed?

    Heads and neurons are proposed by gradients on some requests; edges between them are measured exactly, and the whole is held against random circuits, on others.
    """
    import torch

    from rim_lens.chat import ChatFormat
    from rim_lens.folder import ResultFolder
    from rim_lens.lens import weights_digest
    from rim_lens.measures.circuits import asking, finding, page, proposing, table
    from rim_lens.measures.held_out import text_digest
    from rim_lens.organisms import load_model
    from rim_lens.prompts import load_prompts
    from rim_lens.provenance import provenance

    if outside not in ("mean", "resample"):
        raise typer.BadParameter(f"--outside {outside}: there are mean and resample")
    if scope not in ("all", "heads"):
        raise typer.BadParameter(f"--scope {scope}: there are all and heads")
    of: Literal["all", "heads"] = "all" if scope == "all" else "heads"
    named_heads = read_heads(heads)
    how: Literal["mean", "resample"] = "mean" if outside == "mean" else "resample"
    told = typed(
        model,
        {
            "heads": heads,
            "n-heads": n_heads,
            "n-neurons": n_neurons,
            "neuron-layers": neuron_layers,
            "contrasts": contrasts,
            "tuned": tuned,
            "outside": None if outside == "mean" else outside,
            "min-share": min_share,
            "min-effect": None if min_effect == 0.25 else min_effect,
            "scope": None if scope == "all" else scope,
            "requests": requests,
            "confirm": confirm,
            "random-circuits": random_circuits,
            "random-nodes": random_nodes,
            "max-new-tokens": max_new_tokens,
            "seed": seed or None,
        },
        {"questions": questions, "gate": gate},
    )
    place, kind = read_device(device), getattr(torch, read_dtype(dtype))
    base, other = (
        None if name is None else load_model(name, device=place, dtype=kind) for name in (model, tuned)
    )
    chat = ChatFormat.from_model(base)
    given = read_files({"harmful": harmful, "harmless": harmless, "reasoning": reasoning}, prompts)
    language = "toy" if chat.name == "toy" else "en"
    asked = {
        one: given.get(one) or load_prompts(one, language=language)
        for one in ("harmful", "harmless", "reasoning")
    }
    named = [one for one in (word.strip() for word in contrasts.split(",")) if one]
    search = asking.CircuitSearch(
        scope=of,
        outside=how,
        n_random=random_circuits,
        n_random_senders=random_nodes,
        n_random_receivers=random_nodes,
        n_confirm=confirm,
        max_new_tokens=max_new_tokens,
        limit=requests,
        seed=seed,
        progress=errors.is_terminal,
    )
    rule = table.EdgeRule(min_effect=min_effect, min_share=min_share, keep_share=min_share / 2)
    folder = out or Path("runs") / f"circuit-{safe_name(called(model))}"
    kept = ResultFolder(folder)
    tell = whisper if as_json else say
    if not plan:
        kept.claim(
            {
                "command": told,
                "weights_digest": weights_digest(base),
                "tuned_digest": None if other is None else weights_digest(other),
                "requests": [text_digest(one) for some in asked.values() for one in some],
            },
            "asked.json",
        )
    tell("which heads and neurons to ask")
    proposed = proposing.propose_nodes(
        base,
        chat,
        asked["harmful"],
        asked["harmless"],
        n_heads=n_heads,
        n_neurons=n_neurons,
        n_neuron_layers=neuron_layers,
        heads=named_heads,
        limit=requests,
        seed=seed,
    )
    call: dict[str, Any] = {
        "reasoning": asked["reasoning"] if questions else (),
        "contrasts": [*named, *(["tuned"] if tuned and "tuned" not in named else [])],
        "tuned": other,
        "search": search,
    }
    nodes = (base, chat, proposed.heads, proposed.neurons, asked["harmful"], asked["harmless"])
    planned = finding.plan_circuit(*nodes, **call)
    if as_json and plan:
        console.print_json(data=asdict(planned))
    else:
        tell(f"plan: {planned}")
    if plan:
        return
    with going_on_later(folder), stopping_at_the_gate():
        found = finding.circuit(
            *nodes, **call, gate=gate, rule=rule, remember=kept.lines("measured.jsonl").get
        )
    found.save(folder)
    origin = provenance(told, ("transformer-lens", "torch", "transformers"))
    if not as_json:
        for line in page.sentences(found):
            console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)
    show_written(page.write_circuit(found, folder, called(model), origin), as_json)


@contextmanager
def stopping_at_the_gate() -> Iterator[None]:
    """Leave with words and the gate's exit code where the model does not refuse in the first place."""
    from rim_lens.errors import GateNotPassed

    try:
        yield
    except GateNotPassed as stopped:
        errors.print(str(stopped), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(GATE_EXIT) from None


def typed(model: str, options: Mapping[str, Any], parts: Mapping[str, bool]) -> str:
    """The command, so that it can be typed again; files of requests are not among it.

    >>> typed("toy", {"n-heads": 4, "tuned": None}, {"gate": False})
    'rim-lens circuit toy --n-heads 4 --no-gate'
    """
    given = "".join(f" --{name} {value}" for name, value in options.items() if value not in (None, ""))
    return f"rim-lens circuit {called(model)}{given}" + "".join(
        f" --no-{name}" for name, on in parts.items() if not on
    )


def read_heads(text: str) -> list[tuple[int, int]]:
    """Heads as L1H5,L14H2 or 1.5,14.2.

    >>> read_heads("L1H5, 14.2")
    [(1, 5), (14, 2)]
    """
    found = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        match = _HEAD.fullmatch(word)
        if match is None:
            raise typer.BadParameter(f"--heads {word}: write heads as L1H5,L14H2")
        found.append((int(match[1]), int(match[2])))
    return found
