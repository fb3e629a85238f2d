"""docs/evidence/neurons.json: what `rl.safety_neurons` finds where the truth is known, and what it calls refusal where there is none.

``python -m tests.neuron_verdicts`` measures and writes; the suite holds the same claims on a sample
(tests/measures/neurons/test_safety.py). Some minutes on one core.

Nulls, the gate off, the whole call each time (choice on one side, test on the other), so that what is counted is the verdict:

- permuted: `planted` of another noise seed in each run, and the two sides of pairs exchanged for a random half of the pairs of
  swapped words (six in the toy language), the same ones where neurons are chosen and where they are tested. A draw that
  exchanges none or all of them is the truth or its mirror, and counts like any other.
- random: models of random weights in the toy's shape, norms included, at four scales, by the requests as they are. Such models
  react to particular words, and so to one side of particular pairs.
"""

from __future__ import annotations

import argparse
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
from tests.verdicts import random_toy, toy_requests

EVIDENCE = Path(__file__).resolve().parents[1] / "docs" / "evidence" / "neurons.json"
COMMAND = "python -m tests.neuron_verdicts"

N_PLANTED = 24
N_PERMUTED = 104
SCALES = (0.1, 0.2, 0.4, 0.8)
N_RANDOM = 26  # of each scale
M, SCOPE = 8, "model"
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
    found = rl.safety_neurons(model, chat, pairs, m=M, scope=SCOPE, n_random_sets=N_SETS)
    by_gradient = rl.safety_neurons(model, chat, pairs, m=M, scope=SCOPE, by="gradient", test=False)
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
    for by, evidence, share in rules:
        for scope in ("model", "layer"):
            for m in MS:
                mask = chosen(evidence, m, scope, share).mask  # type: ignore[arg-type]
                names = {(int(layer), int(neuron)) for layer, neuron in np.argwhere(mask)}
                yield {"by": by, "min_fraction": share, "scope": scope, "m": m, **against(names, truth)}


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
    """Labels permuted within pairs."""
    pairs = pairs_of(5)
    return _counted(
        [
            null_run(rl.load_model(f"planted:{1000 + run}"), exchanged(pairs, run), run, 0.4)
            for run in range(n_runs)
        ]
    )


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


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    out: Path = parser.parse_args().out
    with one_thread():
        planted = [planted_row(seed) for seed in range(N_PLANTED)]
        content = {
            **provenance(COMMAND, ("torch", "transformers", "transformer-lens")),
            "rule": {
                "m": M,
                "scope": SCOPE,
                "min_fraction": 1.0,
                "n_random_sets": N_SETS,
                "alpha": HeadRule().alpha,
            },
            "planted": planted,
            "permuted": permuted_rows(),
            "random": random_rows(),
        }
    exact = sum(row["precision"] == row["recall"] == 1 for row in planted)
    content["summary"] = {
        "planted_exact": f"{exact} of {len(planted)}",
        "planted_refusal": sum(row["verdict"] == "refusal" for row in planted),
        "null_refusal": content["permuted"]["refusal"] + sum(row["refusal"] for row in content["random"]),
        "null_runs": content["permuted"]["n_runs"] + sum(row["n_runs"] for row in content["random"]),
    }
    write_json(out, content)


if __name__ == "__main__":
    main()
