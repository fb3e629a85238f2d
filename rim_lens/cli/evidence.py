"""Commands that make the pages of evidence, and the model organisms: measures, direction, organism."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rim_lens.cli.names import CONDITIONS
from rim_lens.cli.options import (
    ASKED,
    LEFT_OUT,
    RESULT,
    SIZE,
    AsJson,
    ModelName,
    Seed,
    called,
    complete_listed,
    errors,
    read_seeds,
    safe_name,
    say,
    show_written,
    whisper,
)

PageFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="For the page (.md) and its numbers (.json). Else runs/COMMAND-MODEL.",
        show_default=False,
        rich_help_panel=RESULT,
    ),
]
PageName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What the page calls the model; a folder's own name else.",
        rich_help_panel=RESULT,
    ),
]
Seeds = Annotated[str, typer.Option(metavar="LIST", help="0-5, or 0,2,4.")]
OrganismFolder = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="For the table of what emerged.")
]

organism = typer.Typer(
    help="Train the model organisms again, from nothing but the recipe.", no_args_is_help=True
)


def measures(
    model: ModelName,
    conditions: Annotated[
        list[str] | None,
        typer.Option(
            "--condition",
            metavar="KIND",
            help="Think condition; repeat for more. If not given: off, careful, filler, unrelated, open.",
            autocompletion=complete_listed(*CONDITIONS),
            rich_help_panel=ASKED,
        ),
    ] = None,
    requests: Annotated[
        int,
        typer.Option(min=2, metavar="N", help="Of each kind, of the evaluate split.", rich_help_panel=SIZE),
    ] = 24,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most tokens of an answer.", rich_help_panel=SIZE)
    ] = 32,
    max_cot_tokens: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Most tokens of a self-written thought.", rich_help_panel=SIZE),
    ] = 96,
    twins: Annotated[
        bool,
        typer.Option(
            " /--no-twins", help="The harmless twins.", show_default=False, rich_help_panel=LEFT_OUT
        ),
    ] = True,
    seed: Seed = 0,
    name: PageName = None,
    out: PageFolder = None,
    as_json: AsJson = False,
) -> None:
    """Read refusal in every way side by side (first token, first word, prefixes, text), and show where they differ.

    Start here with a model of your own: it shows whether it refuses, in which words, and whether a score of the first word sees it.
    """
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
        say=whisper if as_json else say,
    )
    command = f"rim-lens measures {model} --requests {requests} --max-new-tokens {max_new_tokens}"
    command += f" --max-cot-tokens {max_cot_tokens}" + ("" if twins else " --no-twins")
    command += "".join(f" --condition {name}" for name in conditions or ()) + (
        f" --seed {seed}" if seed else ""
    )
    command += f" --name {name}" if name else ""
    told = f"{' and '.join(f'{len(prompts)} {kind}' for kind, prompts in asked.items())} requests of the split evaluate"
    origin = provenance(command, ("transformer-lens", "torch", "transformers"))
    folder = out or Path("runs") / f"measures-{safe_name(called(model))}"
    show_written(write_side_by_side(found, folder, name or called(model), origin, told), as_json)


def direction(
    model: ModelName,
    requests: Annotated[
        int, typer.Option(min=4, metavar="N", help="Of each kind and split.", rich_help_panel=SIZE)
    ] = 24,
    controls: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Control directions of each of the two kinds.", rich_help_panel=SIZE
        ),
    ] = 30,
    candidates: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Candidate directions that are tested.", rich_help_panel=SIZE),
    ] = 32,
    max_kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="Bound on the KL on harmless requests; 0.1 if not given, and 1 for the toy.",
            rich_help_panel=ASKED,
        ),
    ] = None,
    seed: Seed = 0,
    name: PageName = None,
    out: PageFolder = None,
    as_json: AsJson = False,
) -> None:
    """Find the direction that refusal runs along, beside controls, and what refusal owes to single sentences of thought.

    The direction is chosen on some requests; removing and adding it is tested on others, beside random directions.
    """
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
        say=whisper if as_json else say,
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
    folder = out or Path("runs") / f"direction-{safe_name(called(model))}"
    show_written(write_causes(found, folder, name or called(model), origin), as_json)


@organism.command("toy")
def organism_toy(
    seeds: Seeds = "0-5",
    out: OrganismFolder = Path("runs/organism"),
    as_json: AsJson = False,
) -> None:
    """Train the toy for several seeds and tabulate what emerges, failures included (minutes a seed)."""
    from rim_lens.organisms.toy.evidence import evidence

    path = out / "toy_seeds.json"
    evidence(read_seeds(seeds), path)
    show_written([path], as_json)


@organism.command("smollm2")
def organism_smollm2(
    seeds: Seeds = "0-2",
    adapters: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Keep the adapters there.")] = None,
    newline: Annotated[
        bool, typer.Option("--newline", help="The variant that writes a newline before every answer.")
    ] = False,
    out: OrganismFolder = Path("runs/organism"),
    as_json: AsJson = False,
) -> None:
    """Tune smollm2-refusal for several seeds and count what it does on held-out requests (about 15 minutes a seed)."""
    from rim_lens.organisms.smollm2 import recipe

    path = out / ("smollm2-newline.json" if newline else "smollm2-refusal.json")
    recipe.evidence(
        read_seeds(seeds), path, adapters=adapters, recipe=recipe.NEWLINE if newline else recipe.Recipe()
    )
    show_written([path], as_json)
