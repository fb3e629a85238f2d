"""docs/neurons.md: what `rl.safety_neurons` finds where the truth is known, and what it calls refusal where there is none.

``python -m tests.neuron_verdicts`` measures, writes docs/evidence/neurons.json, and the page from it and from
docs/evidence/entanglement_nulls.json. The suite holds the same claims on a sample (tests/measures/neurons/test_safety.py). Two
CPU-minutes, and four more the first time, to train toys of other seeds, which are kept under .cache/toy.

Nulls, the gate off, the whole call each time (choice on one side, test on the other), so that what is counted is the verdict:

- permuted: `planted` of another noise seed in each run, and the two sides of pairs exchanged for a random half of the pairs of
  swapped words (six in the toy language), the same ones where neurons are chosen and where they are tested. A draw that
  exchanges none or all of them is the truth or its mirror, and counts like any other.
- random: models of random weights in the toy's shape, norms included, at four scales, by the requests as they are. Such models
  react to particular words, and so to one side of particular pairs.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import rim_lens as rl
from rim_lens.lens import Model
from rim_lens.measures.heads.table import HeadRule
from rim_lens.measures.neurons.choosing import chosen
from rim_lens.measures.neurons.effects import neuron_effects
from rim_lens.measures.neurons.pairs import Pair, counterfactual_pairs
from rim_lens.measures.neurons.scoring import effect_size
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.measures.pages import write_json
from rim_lens.measures.stats import proportion_interval
from rim_lens.organisms.planted import planted_truth
from rim_lens.organisms.toy.recipe import one_thread
from rim_lens.provenance import provenance
from tests.verdicts import random_toy, share, toy_of_seed, toy_requests

DOCS = Path(__file__).resolve().parents[1] / "docs"
EVIDENCE = DOCS / "evidence" / "neurons.json"
NULLS = DOCS / "evidence" / "entanglement_nulls.json"
PAGE = DOCS / "neurons.md"
COMMAND = "make evidence-neurons"

N_PLANTED = 24
N_PERMUTED = 104
SCALES = (0.1, 0.2, 0.4, 0.8)
N_RANDOM = 26  # of each scale
M, SCOPE, MIN_FRACTION = 8, "model", 0.5
TOY_SEEDS = range(6)
TOY_M = 13  # 5 % of a layer, what `rl.NeuronStudy` takes
DOSES = (13, 26, 50, 100)
MS = (2, 4, 6, 7, 8, 9, 10, 12, 16, 24, 32)
N_SETS = 20


def pairs_of(every: int = 1) -> list[Pair]:
    """Twins of both sides, every so many of them (five share a conjunction)."""
    made = counterfactual_pairs(*toy_requests(), "twins")
    return [pair for pair in made if pair.more.split in ("select", "evaluate")][::every]


# --- where the truth is known -------------------------------------------------------------------------


def planted_row(seed: int) -> dict[str, Any]:
    """What is found in one noise seed of `planted`, at the stated m and at others."""
    model = rl.load_model(f"planted:{seed}")
    chat = rl.ChatFormat.from_model(model)
    pairs = pairs_of(2)
    rule: dict[str, Any] = {"m": M, "scope": SCOPE, "min_fraction": MIN_FRACTION}
    found = rl.safety_neurons(model, chat, pairs, **rule, n_random_sets=N_SETS)
    by_gradient = rl.safety_neurons(model, chat, pairs, **rule, by="gradient", test=False)
    truth, decoys = planted_truth(seed).neurons, planted_truth(seed).decoy_neurons
    select = [pair for pair in pairs if pair.more.split == "select"]
    more, less = (
        rl.pooled_activations(model, chat, [getattr(pair, side) for pair in select]).values
        for side in ("more", "less")
    )
    effects = {kind: found.effects.row("score", kind, "off") for kind in ("harmful", "harmless")}
    specific = found.effects.row("specificity", "harmful − harmless", "off")
    return {
        "seed": seed,
        **against(set(found), truth),
        "gradient": against(set(by_gradient), truth),
        "decoys_chosen": len(set(found) & set(decoys)),
        "verdict": found.effects.verdict,
        "effect": effects["harmful"]["change"],
        "effect_twins": effects["harmless"]["change"],
        "specificity": specific["change"],
        "percentile": specific["percentile"],
        "jaccard_of_halves": found.made_by["stability"]["jaccard"],
        "sweep": list(swept(more - less, effect_size(more, less)[None], truth)),
    }


def against(found: set[tuple[int, int]], truth: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Size, precision and recall.

    >>> against({(0, 1), (0, 2)}, [(0, 1)])
    {'size': 2, 'precision': 0.5, 'recall': 1.0}
    """
    hits = len(found & set(truth))
    return {
        "size": len(found),
        "precision": hits / len(found) if found else None,
        "recall": hits / len(truth),
    }


def swept(rises: np.ndarray, sizes: np.ndarray, truth: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Precision and recall over m, scope, vote and criterion."""
    rules: list[tuple[str, np.ndarray, float]] = [
        ("contrast", rises, 1.0),
        ("contrast", rises, 0.5),
        ("effect_size", sizes, 1.0),
    ]
    for by, evidence, vote in rules:
        for scope in ("model", "layer"):
            for m in MS:
                mask = chosen(evidence, m, scope, vote).mask  # type: ignore[arg-type]
                names = {(int(layer), int(neuron)) for layer, neuron in np.argwhere(mask)}
                yield {"by": by, "min_fraction": vote, "scope": scope, "m": m, **against(names, truth)}


# --- where there is none ------------------------------------------------------------------------------


def null_run(model: Model, pairs: Sequence[Pair], seed: int, min_fraction: float) -> dict[str, Any]:
    """The whole call with the gate off; random sets are drawn where the verdict hangs on them."""
    chat = rl.ChatFormat.from_model(model)
    found = rl.safety_neurons(
        model,
        chat,
        pairs,
        m=M,
        scope=SCOPE,
        min_fraction=min_fraction,
        response="none",
        gate=False,
        n_random_sets=0,
        seed=seed,
    )
    if not len(found):
        return {"size": 0, "specific": False, "verdict": "empty"}
    specific = _specific(found)
    verdict = "not refusal"
    if specific:
        evaluate = [pair for pair in pairs if pair.more.split == "evaluate"]
        full = neuron_effects(
            model,
            chat,
            found,
            [pair.more for pair in evaluate],
            [pair.less for pair in evaluate],
            n_random_sets=N_SETS,
            seed=seed,
        )
        verdict = full.verdict
    return {"size": len(found), "specific": specific, "verdict": verdict}


def _specific(found: NeuronSet) -> bool:
    """Whether all but random sets would call it refusal."""
    effect, twins = (found.effects.row("score", kind, "off") for kind in ("harmful", "harmless"))
    gap = found.effects.row("specificity", "harmful − harmless", "off")
    row = {
        "tested": True,
        "effect": effect["change"],
        "p": effect["p"],
        "effect_twins": twins["change"],
        "p_twins": twins["p"],
        "specificity": gap["change"],
        "p_specific": gap["p"],
    }
    return HeadRule().verdict(row) == "refusal"


def exchanged(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Pairs of which the texts of the two sides are exchanged for each swapped verb by a coin of its own."""
    verbs = sorted({pair.more.text.split()[0] for pair in pairs})
    coins = dict(zip(verbs, np.random.default_rng(seed).random(len(verbs)) < 0.5, strict=True))
    return [
        Pair(replace(pair.less, text=pair.more.text), replace(pair.more, text=pair.less.text), "twins")
        if coins[pair.more.text.split()[0]]
        else pair
        for pair in pairs
    ]


def permuted_rows(n_runs: int = N_PERMUTED) -> dict[str, Any]:
    """Labels permuted within pairs; draws that exchange none or all of them are the truth or its mirror."""
    pairs = pairs_of(5)
    runs = []
    for run in range(n_runs):
        made = exchanged(pairs, run)
        turned = {one.more.text == other.less.text for one, other in zip(made, pairs, strict=True)}
        found = null_run(rl.load_model(f"planted:{1000 + run}"), made, run, 0.4)
        runs.append({**found, "mixed": len(turned) == 2})
    mixed = [run for run in runs if run["mixed"]]
    return {**_counted(runs), "mixed": _counted(mixed)}


def random_rows(n_runs: int = N_RANDOM) -> list[dict[str, Any]]:
    """Random weights, by scale."""
    pairs = pairs_of(5)
    return [
        {
            "scale": scale,
            **_counted(
                [
                    null_run(random_toy(7000 + 1000 * place + run, scale), pairs, run, 0.2)
                    for run in range(n_runs)
                ]
            ),
        }
        for place, scale in enumerate(SCALES)
    ]


def toy_row(seed: int) -> dict[str, Any]:
    """What is chosen in the toy of one seed by the rule of a study, and what removing it and more does."""
    model = toy_of_seed(seed)
    chat = rl.ChatFormat.from_model(model)
    found = rl.safety_neurons(model, chat, pairs_of(), m=TOY_M, min_fraction=MIN_FRACTION, n_random_sets=100)
    row: dict[str, Any] = {
        "seed": seed,
        "size": len(found),
        "per_layer": found.per_layer.tolist(),
        "jaccard_of_halves": found.made_by["stability"].get("jaccard"),
        "sweep": found.made_by["sweep"],
    }
    if found.effects is None:
        return row | {"verdict": "not tested"}
    evaluate = [pair for pair in pairs_of() if pair.more.split == "evaluate"]
    sides = [pair.more for pair in evaluate], [pair.less for pair in evaluate]
    curve = rl.dose_curve(model, chat, found, *sides, DOSES, n_random_sets=N_SETS)
    shown = ("change", "change_low", "change_high", "p", "random", "percentile")
    return row | {
        "verdict": found.effects.verdict,
        "writers": len(rl.direct_to_logits(model, chat, found, sides[0]).attrs["writers"]),
        **{
            name: {column: found.effects.row(measure, kind, "off")[column] for column in shown}
            for name, measure, kind in LINES
        },
        "doses": [
            {
                "size": size,
                **{
                    name: {column: line[column] for column in shown}
                    for name, measure, kind in LINES
                    for line in curve[
                        (curve["size"] == size) & (curve["measure"] == measure) & (curve["kind"] == kind)
                    ].to_dict("records")
                },
            }
            for size in DOSES
        ],
    }


LINES = (
    ("harmful", "score", "harmful"),
    ("twins", "score", "harmless"),
    ("specificity", "specificity", "harmful − harmless"),
)


def _counted(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    hits = sum(run["verdict"] == "refusal" for run in runs)
    found = proportion_interval(hits, len(runs))
    return {
        "n_runs": len(runs),
        "refusal": hits,
        "share": float(found.estimate),
        "low": float(found.low),
        "high": float(found.high),
        "before_random_sets": sum(run["specific"] for run in runs),
        "verdicts": dict(Counter(run["verdict"] for run in runs)),
        "mean_size": float(np.mean([run["size"] for run in runs])),
    }


# --- page ---------------------------------------------------------------------------------------------


def page(found: dict[str, Any], nulls: dict[str, Any]) -> str:
    """The page, from the two files' content."""
    lines = [
        "# Neurons: what the choice, its verdict, and p of entanglement are worth",
        "",
        f"`{found['command']}`, {found['date']}, TransformerLens {found['versions']['transformer-lens']}, torch"
        f" {found['versions']['torch']} (CPU, one thread). Figures in [evidence/neurons.json](evidence/neurons.json) and",
        "[evidence/entanglement_nulls.json](evidence/entanglement_nulls.json). Effects are of zeroing neurons, in nats of refusal log-odds.",
        "",
        *_planted_lines(found["planted"]),
        *_null_lines(found["permuted"], found["random"]),
        *_entanglement_lines(nulls),
        *_toy_lines(found["toy"]),
    ]
    return "\n".join(lines) + "\n"


def _planted_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    exact = sum(row["precision"] == row["recall"] == 1 for row in rows)
    gradient = sum(row["gradient"]["precision"] == row["gradient"]["recall"] == 1 for row in rows)
    lines = [
        f"## Where it was planted: {len(rows)} noise seeds",
        "",
        f"`planted:SEED` has eight neurons that carry refusal, and as many decoys that are as active and move nothing. The rule: m = {M}"
        f" over the model, named by {MIN_FRACTION:.0%} of the pairs.",
        "That vote was set after the paper's own, all pairs, had been seen to miss a neuron in some of these seeds; both stand below.",
        "",
        "| | |",
        "| --- | --- |",
        f"| precision and recall both 1.0 | {exact} of {len(rows)} seeds |",
        f"| the same by gradient × activation | {gradient} of {len(rows)} |",
        f"| verdict *refusal* on other requests | {sum(row['verdict'] == 'refusal' for row in rows)} of {len(rows)} |",
        f"| decoys chosen | {sum(row['decoys_chosen'] for row in rows)} |",
        f"| effect on harmful requests, range over seeds | {_range(rows, 'effect')} nats |",
        f"| effect on their twins | {_range(rows, 'effect_twins')} nats |",
        f"| least Jaccard between sets that halves of the pairs choose | {min(row['jaccard_of_halves'] for row in rows):.2f} |",
        "",
        "Over other m, mean precision / recall over seeds. With m per layer, the layer",
        "without planted neurons gives its m as well. Effect size d ranks small even rises high, and does not single out what was planted.",
        "",
        "| m | "
        + " | ".join(f"{by.replace('_', ' ')}, {vote:.0%}, per {scope}" for by, vote, scope in _rules(rows))
        + " |",
        "| ---: |" + " --- |" * len(_rules(rows)),
    ]
    for m in MS:
        cells = []
        for by, vote, scope in _rules(rows):
            at = [
                one
                for row in rows
                for one in row["sweep"]
                if (one["by"], one["min_fraction"], one["scope"], one["m"]) == (by, vote, scope, m)
            ]
            precisions = [one["precision"] for one in at if one["precision"] is not None]
            precision = f"{np.mean(precisions):.2f}" if precisions else "–"
            cells.append(f"{precision} / {np.mean([one['recall'] for one in at]):.2f}")
        lines.append(f"| {m} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _rules(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float, str]]:
    return list(dict.fromkeys((one["by"], one["min_fraction"], one["scope"]) for one in rows[0]["sweep"]))


def _range(rows: Sequence[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows]
    return f"{min(values):+.2f} to {max(values):+.2f}".replace("-", "−")


def _null_lines(permuted: dict[str, Any], random: Sequence[dict[str, Any]]) -> list[str]:
    runs = sum(row["n_runs"] for row in random)
    mixed = permuted["mixed"]
    return [
        "## Where there is none: the share of runs in which the set is called *refusal*",
        "",
        "The whole call, choice on one side and test on the other, the gate off. The level is .05; the verdict asks for more than one such p.",
        "",
        "| | runs | *refusal* | before random sets |",
        "| --- | ---: | ---: | ---: |",
        f"| `planted`, labels exchanged by swapped words | {mixed['n_runs']} | {share(mixed['refusal'], mixed['n_runs'])} |"
        f" {mixed['before_random_sets']} |",
        *(
            f"| random weights, standard deviation {row['scale']} | {row['n_runs']} | {row['refusal']} | {row['before_random_sets']} |"
            for row in random
        ),
        f"| random weights, all | {runs} | {share(sum(row['refusal'] for row in random), runs)} |"
        f" {sum(row['before_random_sets'] for row in random)} |",
        "",
        f"Of {permuted['n_runs']} draws of labels, {permuted['n_runs'] - mixed['n_runs']} exchanged none or all of the six swaps, which is the"
        f" truth or its mirror; {permuted['refusal'] - mixed['refusal']} of these were called *refusal*, and are left out above.",
        "",
    ]


def _entanglement_lines(nulls: dict[str, Any]) -> list[str]:
    names = {
        "labels": "toy against its fine-tunes, labels exchanged before choosing",
        "noise, toy": "toy against itself with weight noise",
        "noise, random": "random models against themselves with weight noise",
    }
    columns = {
        "exchanged, pairs that chose": "pairs that chose (`pairs=`)",
        "exchanged, requests read": "requests measured (the fallback)",
        "random, activity": "random sets, matched in activity",
        "random, per layer": "random sets, per layer",
    }
    lines = [
        "## Entanglement where there is none: the share of runs with p ≤ .05",
        "",
        f"`{nulls['command']}`, {nulls['date']}; {nulls['n_sets']} sets beside each. p of `rl.entanglement` is the rank among sets chosen on"
        " exchanged labels; a rank among random sets",
        "is no test, and stands here to show why.",
        "",
        "| | runs | metric | " + " | ".join(columns.values()) + " |",
        "| --- | ---: | --- |" + " --- |" * len(columns),
    ]
    for situation, one in nulls["situations"].items():
        for metric in ("ras", "safety_drop", "reasoning_rise", "minimum"):
            cells = [
                share(round(one["shares"][column][metric]["0.05"] * one["n_runs"]), one["n_runs"])
                for column in columns
            ]
            lines.append(
                f"| {names[situation]} | {one['n_runs']} | {metric.replace('_', ' ')} | {' | '.join(cells)} |"
            )
    return [*lines, ""]


def _toy_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "## The toy, whose neurons nobody planted",
        "",
        f"The rule of a study (m = {TOY_M} of 256 in each layer, half of the pairs), tested on 50 requests of 10 conjunctions and their"
        " twins, which swap six pairs of words.",
        "",
        "| seed | neurons | Jaccard of halves | verdict | harmful | twins | difference, p | larger than | writers |",
        "| ---: | ---: | ---: | --- | --- | --- | --- | ---: | ---: |",
    ]
    for row in rows:
        if row["verdict"] == "not tested":
            lines.append(f"| {row['seed']} | {row['size']} | – | not tested | – | – | – | – | – |")
            continue
        gap = row["specificity"]
        lines.append(
            f"| {row['seed']} | {row['size']} | {row['jaccard_of_halves']:.2f} | {row['verdict']} | {_told(row['harmful'])} |"
            f" {_told(row['twins'])} | {_told(gap)}, {gap['p']:.2g} | {gap['percentile']:.0f} % | {row['writers']} |"
        )
    lines += [
        "",
        "The same ranking, removed further: change on harmful requests / on twins, and p of the difference over sizes.",
        "",
        "| seed | " + " | ".join(f"{size} neurons" for size in DOSES) + " |",
        "| ---: |" + " --- |" * len(DOSES),
    ]
    for row in rows:
        if "doses" in row:
            cells = (
                f"{dose['harmful']['change']:+.1f} / {dose['twins']['change']:+.1f}, {dose['specificity']['p']:.2g}"
                for dose in row["doses"]
            )
            lines.append(f"| {row['seed']} | {' | '.join(cells).replace('-', '−')} |")
    called = sum(row["verdict"] == "refusal" for row in rows)
    return [
        *lines,
        "",
        f"In {called} of {len(rows)} seeds the set is called *refusal*. A set by the paper's criterion need not do what its name says: neurons"
        " that answer to harm are not",
        "yet neurons that refusal rests on, and removing many costs twins as well.",
        "",
    ]


def _told(line: dict[str, float]) -> str:
    return f"{line['change']:+.2f} [{line['change_low']:+.2f}, {line['change_high']:+.2f}]".replace("-", "−")


def main() -> None:
    """Measure, and write evidence and page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--page", action="store_true", help="write the page anew from what was measured before"
    )
    if not parser.parse_args().page:
        measure()
    PAGE.write_text(page(json.loads(EVIDENCE.read_text()), json.loads(NULLS.read_text())), encoding="utf-8")


def measure() -> None:
    """Write docs/evidence/neurons.json."""
    with one_thread():
        content = {
            **provenance(COMMAND, ("torch", "transformers", "transformer-lens")),
            "rule": {
                "m": M,
                "scope": SCOPE,
                "min_fraction": MIN_FRACTION,
                "n_random_sets": N_SETS,
                "alpha": HeadRule().alpha,
            },
            "planted": [planted_row(seed) for seed in range(N_PLANTED)],
            "permuted": permuted_rows(),
            "random": random_rows(),
            "toy": [toy_row(seed) for seed in TOY_SEEDS],
        }
    write_json(EVIDENCE, content)


if __name__ == "__main__":
    main()
