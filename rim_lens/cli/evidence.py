"""Commands that make the pages of evidence, and the model organisms: measures, direction, organism."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rim_lens.cli.options import called, console, errors, read_seeds

organism = typer.Typer(
    help="Train the model organisms again, from nothing but the recipe.", no_args_is_help=True
)


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
    for path in write_side_by_side(found, out, name or called(model), origin, told):
        console.print(f"written: {path}", highlight=False, soft_wrap=True)


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
    for path in write_causes(found, out, name or called(model), origin):
        console.print(f"written: {path}", highlight=False, soft_wrap=True)


@organism.command("toy")
def organism_toy(
    seeds: Annotated[str, typer.Option(help="Seeds: 0-5, or 0,2,4.")] = "0-5",
    out: Annotated[Path, typer.Option(help="Folder for the table of what emerged.")] = Path("docs/evidence"),
) -> None:
    """Train the toy for several seeds and tabulate what emerges, failures included (minutes a seed)."""
    from rim_lens.organisms.toy import recipe

    recipe.evidence(read_seeds(seeds), out / "toy_seeds.json")
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
        read_seeds(seeds), path, adapters=adapters, recipe=recipe.NEWLINE if newline else recipe.Recipe()
    )
    console.print(f"written: {path}")
