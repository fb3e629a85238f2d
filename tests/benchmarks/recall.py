"""How well gradients find the strongest heads: every head of three models is ablated, and the ranking is held against that.

``python -m tests.benchmarks.recall`` measures (40 CPU-minutes; a reading named behind it is measured alone), writes docs/evidence/recall.json,
and with it a section of docs/speed.md (`make bench` writes the others). Models: SmolLM2 as shipped, taught to refuse, and the latter with the last layers'
weights drawn anew, in which nothing was learned that a gradient could follow. Readings: the answer's first token as it stands, as the loop
of `make bench` reads it, and after whitespace that the model writes first (the default of `refusal_score`), where an ablation may change
what is skipped, which no slope tells.

Truth and estimate are those of the same draw of prompts: this is about a ranking standing in for ablations of these prompts, not about
whether heads found on some prompts matter on others.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

import rim_lens as rl
from rim_lens.lens import Model, model_facts
from rim_lens.measures.refusal.first_word import Skip
from rim_lens.prompts import spread
from rim_lens.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "docs" / "evidence" / "recall.json"
COMMAND = "python -m tests.benchmarks.recall"

READINGS: dict[Skip, str] = {
    "none": "the first token as it stands, as the loop reads it",
    "greedy": "the first token after whitespace the model writes, the default of `refusal_score`; where it writes some, as the shipped model does,"
    " an ablation may change what is skipped, which no slope tells",
}
N_PROMPTS = 40
N_DRAWN = 24  # prompts in a draw, as many as `make bench` scans
N_DRAWS = 500
TOP = 10
CONFIRMED = (10, 15, 20, 27, 38, 54, 81, 100)
GOAL = 0.95
# What is truly strongest, and how many layers, from the first, are confirmed whatever their estimate.
KINDS = (("size", 1), ("size", 3), ("mean", 1))
RANDOM_LAYERS = 5
SCREENED, SCREENED_ON, THEN_CONFIRMED = 45, 8, 27
SEED = 0


def random_tail(seed: int = SEED) -> Model:
    """smollm2-refusal, its last layers' matrices replaced by random ones of the same spread."""
    model = rl.load_model("smollm2-refusal")
    draw = torch.Generator().manual_seed(seed)
    n_layers = model_facts(model).n_layers
    with torch.no_grad():
        for layer in range(n_layers - RANDOM_LAYERS, n_layers):
            for matrix in model.original_model.model.layers[layer].parameters():
                if matrix.ndim == 2:
                    matrix.copy_(torch.randn(matrix.shape, generator=draw) * matrix.std())
    return model


MODELS = {
    "smollm2": lambda: rl.load_model("smollm2"),
    "smollm2-refusal": lambda: rl.load_model("smollm2-refusal"),
    "smollm2-refusal, random tail": random_tail,
}


def recalls(
    effects: Float[np.ndarray, "prompt layer head"],
    estimates: Float[np.ndarray, "prompt layer head"],
    n_confirm: int,
    early: int,
    draws: list[np.ndarray],
    by: str,
) -> Float[np.ndarray, " draw"]:
    """Of each draw, the share of the truly strongest heads that the ranking would have confirmed.

    Args:
        effects: What ablation of each head does to each prompt's score, nats.
        estimates: What the gradients say of it.
        n_confirm: How many heads of the ranking are confirmed.
        early: How many layers, from the first, are confirmed besides.
        draws: Places of the prompts of each draw.
        by: "size" ranks heads truly by the mean of their effects' size, "mean" by the size of their mean effect.

    >>> effects = np.array([[[5.0, 0, 0], [4.0, 0, 3.0]]])
    >>> estimates = np.array([[[0.0, 0, 0], [9.0, 8.0, 0]]])
    >>> recalls(effects, estimates, 2, 1, [np.array([0])], "size")  # (0, 0) is of an early layer, (1, 2) is missed; ten are asked for of six
    array([0.83333333])
    """
    found = []
    for draw in draws:
        truth = np.abs(effects[draw]).mean(0) if by == "size" else np.abs(effects[draw].mean(0))
        found.append(_confirmed(estimates[draw], n_confirm, early).flat[_first(truth, TOP)].mean())
    return np.array(found)


def screened_recalls(
    effects: Float[np.ndarray, "prompt layer head"],
    estimates: Float[np.ndarray, "prompt layer head"],
    draws: list[np.ndarray],
) -> Float[np.ndarray, " draw"]:
    """The same where the first of the ranking and layer 0 are ablated on a few prompts of the draw, and the strongest there on all of them.

    >>> effects, estimates = np.zeros((8, 30, 9)), np.ones((8, 30, 9))
    >>> effects[:, 29, :] = np.arange(9)
    >>> effects[:, 0, 3] = 99  # the ranking is level: layer 29 is beyond its first heads
    >>> screened_recalls(effects, estimates, [np.arange(8)])
    array([0.2])
    """
    found = []
    for draw in draws:
        seen = _confirmed(estimates[draw], SCREENED, 1)
        few = np.where(seen, np.abs(effects[draw[:SCREENED_ON]]).mean(0), -1.0)
        strongest = _first(np.abs(effects[draw]).mean(0), TOP)
        found.append(np.isin(strongest, _first(few, THEN_CONFIRMED)).mean())
    return np.array(found)


def _first(sizes: Float[np.ndarray, "layer head"], count: int) -> np.ndarray:
    """Places of the largest."""
    return np.argsort(-sizes, axis=None, kind="stable")[:count]


def _confirmed(
    estimates: Float[np.ndarray, "prompt layer head"], count: int, early: int
) -> Bool[np.ndarray, "layer head"]:
    """The first of the ranking, and the early layers."""
    sizes = np.abs(estimates).mean(0)
    kept = np.zeros(sizes.shape, dtype=bool)
    kept.flat[_first(sizes, count)] = True
    kept[:early] = True
    return kept


def measured(name: str, skip: Skip) -> dict[str, Any]:
    """All heads of one model, by ablation and by gradients, in one reading."""
    model = MODELS[name]()
    chat = rl.ChatFormat.from_model(model)
    batch = chat.render(spread(rl.load_prompts("harmful", language="en"), N_PROMPTS), think="off")
    reading = rl.refusal_reading(model, batch, skip=skip)
    facts = model_facts(model)
    found = rl.head_effects(reading, facts.heads())
    effects = found.values.reshape(len(batch), facts.n_layers, facts.n_heads)
    estimates = rl.gradient_scores(model, batch, skip=skip, max_rows=4).values
    return {
        "model": name,
        "skip": skip,
        "scan": found.attrs["scan"],
        "effects": effects.round(3).tolist(),
        "estimates": estimates.round(3).tolist(),
    }


def summary(found: Mapping[str, Any], skip: str) -> dict[tuple[str, int], dict[str, list[list[float]]]]:
    """By kind of truth, early layers and model, for each number of confirmed heads: mean recall over draws, its 5th percentile."""
    draws = _draws(found)
    tables: dict[tuple[str, int], dict[str, list[list[float]]]] = {}
    for (by, early), one in product(KINDS, found["models"]):
        if one["skip"] != skip:
            continue
        effects, estimates = np.array(one["effects"]), np.array(one["estimates"])
        values = [recalls(effects, estimates, n_confirm, early, draws, by) for n_confirm in CONFIRMED]
        tables.setdefault((by, early), {})[one["model"]] = [
            [float(row.mean()), float(np.quantile(row, 0.05))] for row in values
        ]
    return tables


def _draws(found: Mapping[str, Any]) -> list[np.ndarray]:
    draw = np.random.default_rng(SEED)
    return [draw.permutation(found["n_prompts"])[: found["n_drawn"]] for _ in range(found["n_draws"])]


def enough(table: Mapping[str, list[list[float]]]) -> int | None:
    """The fewest heads that keep mean recall at the goal in every model; None where none of those tried does."""
    for place, n_confirm in enumerate(CONFIRMED):
        if all(rows[place][0] >= GOAL for rows in table.values()):
            return n_confirm
    return None


def section(found: Mapping[str, Any]) -> str:
    """What docs/speed.md says of it."""
    lines = [
        "## Gradients first: how many heads to confirm",
        "",
        f"`{found['command']}`, {found['date']}: every head of three models ablated at all rows on n = {found['n_prompts']} harmful requests, and ranked by",
        f"gradient × activation (mean of its size over prompts). Of {found['n_draws']} draws of {found['n_drawn']} of these prompts (seed {SEED}), the share of the draw's {TOP} truly",
        "strongest heads that are among the first of the ranking or in the first layers: mean (5th percentile). Draws share prompts, so their",
        "spread is not that over new requests; and how many heads the tables ask about was chosen after a look at these draws.",
    ]
    titles = {
        "size": "Truly strongest by the mean of effects' size",
        "mean": "Truly strongest by the size of the mean effect",
    }
    draws = _draws(found)
    for skip, told in READINGS.items():
        lines += ["", f"**skip={skip!r}**: {told}."]
        for (by, early), table in summary(found, skip).items():
            few = enough(table)
            says = (
                f"{few} of the ranking keep a mean recall of {GOAL:g} in all three"
                if few
                else f"none of these numbers keeps {GOAL:g} in all three"
            )
            lines += [
                "",
                f"{titles[by]}, {'layer 0' if early == 1 else f'layers 0 to {early - 1}'} always confirmed: {says}.",
                "",
                "| heads of the ranking | " + " | ".join(map(str, CONFIRMED)) + " |",
                "| --- |" + " ---: |" * len(CONFIRMED),
                *(
                    f"| {name} | " + " | ".join(f"{mean:.2f} ({low:.2f})" for mean, low in rows) + " |"
                    for name, rows in table.items()
                ),
            ]
        screened = [
            screened_recalls(np.array(one["effects"]), np.array(one["estimates"]), draws).mean()
            for one in found["models"]
            if one["skip"] == skip
        ]
        lines += [
            "",
            f"Tried as well: the first {SCREENED} and layer 0 on {SCREENED_ON} of the {found['n_drawn']} prompts, and the {THEN_CONFIRMED} strongest there on all, which costs"
            f" about as much as {_cost(found['n_drawn'])} on all: mean recall {', '.join(f'{value:.2f}' for value in screened)}.",
        ]
    return "\n".join([*lines, "", "What is not confirmed is *not tested*, never small.", ""])


def _cost(n_drawn: int) -> int:
    """Of screening, in heads that are ablated on all prompts of a draw."""
    return round((SCREENED * SCREENED_ON + THEN_CONFIRMED * (n_drawn - SCREENED_ON)) / n_drawn)


def main(skips: list[str]) -> None:
    """Measure these readings, and write the evidence; what is there of others stays."""
    torch.set_num_threads(1)
    for skip, name in product([skip for skip in READINGS if skip in skips], MODELS):
        one = measured(name, skip)
        print(name, skip, one["scan"], flush=True)  # noqa: T201 - it takes minutes
        sizes = {"n_prompts": N_PROMPTS, "n_drawn": N_DRAWN, "n_draws": N_DRAWS}
        told = provenance(COMMAND, ("torch", "transformers", "transformer-lens"))
        # Read anew: another reading may be measured meanwhile.
        there = json.loads(EVIDENCE.read_text(encoding="utf-8"))
        kept = [
            other
            for other in there["models"]
            if there["n_prompts"] == N_PROMPTS and (other["model"], other["skip"]) != (name, skip)
        ]
        models = sorted([*kept, one], key=lambda other: list(MODELS).index(other["model"]))
        whole = told | sizes | {"load": os.getloadavg()[0], "models": models}
        # Of 130 000 numbers, a line each would be most of the file.
        EVIDENCE.write_text(json.dumps(whole, separators=(",", ":")) + "\n", encoding="utf-8")
    from tests.benchmarks.page import PAGE, written

    PAGE.write_text(written(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or list(READINGS))
