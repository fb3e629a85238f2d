"""docs/circuits.md: what the edges and the shares of `rl.circuit` are worth, where the truth is known and where there is none.

``python -m tests.circuit_verdicts`` measures, writes docs/evidence/circuits.json, and the page from it. The suite holds the same
claims on a sample (tests/test_circuit_verdicts.py). About four CPU-minutes. Toys of other seeds are trained once, as for
tests/verdicts.py: ask for more of them in `TOY_SEEDS`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import rim_lens as rl
from rim_lens.folder import ResultFolder
from rim_lens.lens import Head, Model, model_facts
from rim_lens.measures.circuits.nodes import Edge, edges_between
from rim_lens.measures.circuits.table import Measured, edge_table
from rim_lens.measures.gradients import slopes
from rim_lens.organisms.planted import planted_truth
from rim_lens.organisms.toy.recipe import one_thread
from tests.verdicts import random_toy, share, toy_of_seed, toy_requests

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "docs" / "evidence" / "circuits.json"
PAGE = ROOT / "docs" / "circuits.md"

PLANTED_SEEDS = range(
    100, 124
)  # EdgeRule's shares were chosen on seeds 0 to 15, where a tenth let noise through in three
SCALES = (0.2, 0.8)
N_RANDOM = 20  # of each scale
TOY_SEEDS = range(1)
# What the planted words of a request go through, of the spans, heads and sets of neurons that are given.
PLANTED_EDGES = (
    "request → L0H5.v",
    "L0H5 → and L0",
    "and L0 → L1H1.v",
    "think → L1H1.v",
    "L1H1 → refusal",
)

SMALL = rl.CircuitSearch(limit=20, n_random=8, n_random_senders=2)
LEAST = rl.CircuitSearch(limit=12, n_random=0, n_random_senders=0)
P_ALONE = rl.EdgeRule(
    min_effect=1e6
)  # no size comes to it: p is corrected over all edges, and no node is kept to be tested


# --- where the truth is known -----------------------------------------------------------------------


def planted_circuit(seed: int, search: rl.CircuitSearch = SMALL) -> rl.Circuit:
    """The whole call on one noise seed of `planted`, decoys and sink among the nodes."""
    model, truth = rl.load_model(f"planted:{seed}"), planted_truth(seed)
    heads = [*truth.heads, *truth.decoy_heads, *truth.sink_heads]
    sets = {"and": truth.neurons, "decoy": truth.decoy_neurons}
    return rl.circuit(model, rl.ChatFormat.from_model(model), heads, sets, *toy_requests(), search=search)


def planted_row(seed: int) -> dict[str, Any]:
    """What is found of one noise seed."""
    found = planted_circuit(seed)
    edges, truth = found.edges.set_index("edge"), set(PLANTED_EDGES)
    faithful, complete = (found.row(name, "harmful") for name in ("faithfulness", "completeness"))
    return {
        "seed": seed,
        "edges": sorted(found.top()),
        "exact": set(found.top()) == truth,
        "kept": [node.name for node in found.kept()],
        "smallest_planted": float(edges.loc[list(truth), "effect"].abs().min()),
        "largest_other": float(edges.drop(index=list(truth))["effect"].abs().max()),
        "faithfulness": [faithful[name] for name in ("share", "share_low", "share_high")],
        "completeness": [complete[name] for name in ("share", "share_low", "share_high")],
        "minimality": {
            node.name: float(found.row("minimality", "harmful", node.name)["share"]) for node in found.kept()
        },
        "random": {
            name: [row["random_low"], row["random_high"], row["n_controls"]]
            for name, row in (("faithfulness", faithful), ("completeness", complete))
        },
    }


# --- where there is no refusal ----------------------------------------------------------------------


def random_nodes(seed: int) -> tuple[list[Head], list[tuple[int, int]]]:
    """Two heads of each layer and six neurons of each, drawn."""
    rng = np.random.default_rng(seed)
    heads = [(layer, int(head)) for layer in range(2) for head in rng.choice(8, 2, replace=False)]
    neurons = [(layer, int(place)) for layer in range(2) for place in rng.choice(256, 6, replace=False)]
    return heads, neurons


def random_run(seed: int, scale: float) -> bool:
    """Whether any edge of random nodes of a random model is called the circuit's, the gate off and no size asked for."""
    model = random_toy(seed, scale)
    chat = rl.ChatFormat.from_model(model)
    found = rl.circuit(
        model, chat, *random_nodes(seed), *toy_requests(), gate=False, search=LEAST, rule=P_ALONE
    )
    return bool((found.edges["p"] <= P_ALONE.alpha).any())


def random_row(scale: float, n_runs: int = N_RANDOM) -> dict[str, Any]:
    """How often p of any edge comes to the level, where weights have this standard deviation."""
    hits = sum(random_run(5000 + 1000 * round(10 * scale) + seed, scale) for seed in range(n_runs))
    return {"scale": scale, "n_runs": n_runs, "any": hits}


def exchanged(found: rl.Circuit, edges: Sequence[Edge], changed: np.ndarray) -> Measured:
    """The effects of a circuit as they would be, had the labels *harmful* and *twin* of some pairs been exchanged.

    Such a pair is read the other way round, so that effect and back change places and the reach turns its sign.
    """
    effect, back = (found.effects[name].sel(contrast="twins").values for name in ("effect", "back"))
    reach = found.effects["reach"].sel(contrast="twins").values
    flip = changed[:, None]
    now, then = np.where(flip, back, effect), np.where(flip, effect, back)
    turned = np.where(changed, -reach, reach)
    # The select side is left out of the question: what it would have chosen is chosen.
    return Measured(edges, now, now, then, turned, turned, {})


def permuted_row(seed: int) -> dict[str, Any]:
    """A toy whose labels are exchanged within pairs of swapped words, all ways: how often any edge's p comes to the level."""
    found = toy_circuit(toy_of_seed(seed), LEAST)
    senders, hear = ([node for node in found.asked() if node.kind != kind] for kind in ("end", "span"))
    order = {str(edge): edge for edge in edges_between(senders, hear)}
    edges = [order[str(name)] for name in found.effects["edge"].values]
    families = [str(name) for name in found.effects["family"].values]
    labels = sorted(set(families))
    place = np.array([labels.index(name) for name in families])
    ways = list(product((False, True), repeat=len(labels)))
    hits = 0
    for way in ways:
        table = edge_table(
            "twins",
            exchanged(found, edges, np.array(way)[place]),
            families,
            P_ALONE,
        )
        hits += bool((table["p"] <= 0.05).any())
    return {"seed": seed, "n_runs": len(ways), "any": hits}


# --- what emerges in trained toys -------------------------------------------------------------------


def toy_circuit(model: Model, search: rl.CircuitSearch) -> rl.Circuit:
    """The circuit of the heads and neurons that the select side gives: the four heads and sixteen neurons with the largest effects there."""
    chat = rl.ChatFormat.from_model(model)
    off = chat.render(toy_requests("select")[0][:24], think="off")
    reading = rl.refusal_reading(model, off)
    effects = rl.head_effects(reading, model_facts(model).heads()).mean("prompt")
    order = np.argsort(effects.values)[:4]
    heads = [model_facts(model).heads()[place] for place in order]
    scores = slopes(model, off, "post", "toy_circuit").mean(axis=0)
    flat = np.argsort(scores, axis=None)[:16]
    neurons = [
        (int(layer), int(place)) for layer, place in zip(*np.unravel_index(flat, scores.shape), strict=True)
    ]
    return rl.circuit(
        model,
        chat,
        heads,
        neurons,
        *toy_requests(),
        contrasts=("twins", "careful", "filler"),
        gate=False,
        search=search,
    )


def toy_row(seed: int) -> dict[str, Any]:
    """What `circuit` says of the toy of one seed."""
    found = toy_circuit(toy_of_seed(seed), SMALL)
    columns = ["contrast", "edge", "effect", "effect_low", "effect_high", "share", "p"]
    rows = found.edges[found.edges["in_circuit"]][columns]
    tests = found.tests[found.tests["kind"] == "harmful"]
    return {
        "seed": seed,
        "gate": found.gate,
        "kept": [node.name for node in found.kept()],
        "edges": json.loads(rows.to_json(orient="records")),
        "tests": json.loads(tests.to_json(orient="records")),
    }


# --- page -------------------------------------------------------------------------------------------


WORDS = """
## What an edge, faithfulness and completeness show, and what they do not

**Edge.** What changes in the refusal score when one input of one receiver (queries, keys or values of a head, the MLP input of neurons,
the final norm) is computed as if one sender had said something else, all between them held as it was, and everything after the receiver
runs freely. It is exact, not a gradient. It shows that this receiver uses what this sender writes, by this input, in a way that moves
refusal. It does not show ways through a third part (edges of their own; effects do not add up), senders that must speak together, or what
the words mean. *What is said instead* decides what an edge is about: the twin's words ask what carries harm, another condition's what a
chain of thought changes, zero or a mean what is needed at all. An edge under "twins" that is not there under "careful" is no contradiction.

**Both ways.** The twin's words are put into the harmful run, and the harmful run's into the twin's. Half the difference is tested: exchanging
the labels of a pair turns its sign and nothing else, so that the test by sign flips is exact where labels do not matter.

**Faithfulness.** The share of refusal (score − score with everything replaced) that stays when all heads and neurons outside the circuit say
what they say, on average, on harmless prompts. 1 says that the circuit is enough *given the embeddings and that background*; with a background of
another kind it may differ. A circuit with more of the model in it is more faithful, whatever it is: hold it against random circuits of its shape.

**Completeness.** The share of refusal that goes when the circuit alone is replaced. Much less than 1: something outside does it as well. Two
halves that stand in for each other are each faithful and neither is complete.

**Minimality.** What the circuit loses with one node replaced too. Near 0: it does without that node, or another one makes up for it.
"""


def page(found: dict[str, Any]) -> str:
    """The page, from the file's content."""
    return (
        "\n".join(
            [
                "# Circuits: what edges and shares of `rl.circuit` are worth",
                "",
                f"`{found['command']}`, {found['date']}, TransformerLens {found['versions']['transformer-lens']}, torch"
                f" {found['versions']['torch']} (CPU, one thread). Figures in [evidence/circuits.json](evidence/circuits.json).",
                WORDS,
                *_planted_lines(found["planted"]),
                *_null_lines(found["random"], found["permuted"]),
                *_toy_lines(found["toy"]),
            ]
        ).rstrip()
        + "\n"
    )


def _planted_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    n = len(rows)
    faithful = [row["faithfulness"][0] for row in rows]
    complete = [row["completeness"][0] for row in rows]
    random = [row["random"][name][1] for row in rows for name in ("faithfulness", "completeness")]
    exact = sum(row["exact"] for row in rows)
    return [
        f"## Where it was planted: {n} noise seeds",
        "",
        f"`planted:SEED`, {SMALL.limit} requests and their twins on each side; nodes given: topic head 0.5, reader 1.1, decoy 1.2, sink 0.2, the eight AND",
        "neurons, eight decoy neurons, the spans request and think: 50 edges. Planted: "
        + ", ".join(PLANTED_EDGES)
        + ".",
        "",
        "| | |",
        "| --- | --- |",
        f"| exactly the planted edges | {share(exact, n)} |",
        f"| smallest planted, largest other edge | {min(row['smallest_planted'] for row in rows):.1f}, {max(row['largest_other'] for row in rows):.2f} nats |",
        f"| faithfulness: mean, smallest | {np.mean(faithful):.3f}, {min(faithful):.3f} |",
        f"| completeness: mean, smallest | {np.mean(complete):.3f}, {min(complete):.3f} |",
        f"| smallest minimality of a planted node | {min(min(row['minimality'].values()) for row in rows):.3f} |",
        f"| largest share of a random circuit's 97.5 % end | {max(random):.3f} |",
        "",
        "Weights carry noise, so that other edges have effects too, small ones, which are real and told from 0: what parts them is their size",
        "(`EdgeRule.min_share`), not p. A fifth of the difference between the runs was chosen on seeds 0 to 15, where a tenth let one such edge",
        "(and L0 → refusal) through in three of 16; the seeds of the table are others.",
        "",
    ]


def _null_lines(random: Sequence[dict[str, Any]], permuted: Sequence[dict[str, Any]]) -> list[str]:
    runs, hits = sum(row["n_runs"] for row in random), sum(row["any"] for row in random)
    ways, found = sum(row["n_runs"] for row in permuted), sum(row["any"] for row in permuted)
    each = "; ".join(
        f"{row['any']} of {row['n_runs']} at standard deviation {row['scale']:g}" for row in random
    )
    return [
        "## Where there is none: the share of runs in which p of any edge is .05 or less",
        "",
        "Gate off, no size asked for, so that p alone decides.",
        "",
        f"- **Random weights** in the toy's shape, two random heads and six random neurons of each layer: {share(hits, runs)} ({each}).",
        f"- **Trained toys**, seeds {_seeds(permuted)}, labels *harmful* and *twin* exchanged within pairs of swapped words, all ways:"
        f" {share(found, ways)}.",
        "",
    ]


def _seeds(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(str(row["seed"]) for row in rows)


def _toy_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "## Trained toys",
        "",
        "The four heads and sixteen neurons whose removal lowers refusal most on select requests (neurons by gradient × activation); gate not asked.",
        "",
        "| seed | kept | edges: twins, careful, filler | largest | faithfulness | completeness | random: faithfulness |",
        "| ---: | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        counts = [
            sum(edge["contrast"] == name for edge in row["edges"]) for name in ("twins", "careful", "filler")
        ]
        largest = ", ".join(
            f"{edge['edge']} {edge['effect']:+.1f}"
            for edge in row["edges"][:3]
            if edge["contrast"] == "twins"
        )
        tests = {test["measure"]: test for test in row["tests"] if not test["node"]}
        cells = [
            "–"
            if name not in tests
            else f"{tests[name]['share']:.2f} [{tests[name]['share_low']:.2f}, {tests[name]['share_high']:.2f}]"
            for name in ("faithfulness", "completeness")
        ]
        chance = tests.get("faithfulness", {}).get("random")
        told = "–" if chance is None else f"{chance:.2f}"
        lines.append(
            f"| {row['seed']} | {len(row['kept'])} | {', '.join(map(str, counts))} | {largest or 'none'} | {' | '.join(cells)} | {told} |"
        )
    return lines


def main() -> None:
    """Measure, and write evidence and page; what was measured before an interruption is kept under .cache/circuits."""
    from rim_lens.provenance import provenance

    kept = ResultFolder(ROOT / ".cache" / "circuits")
    with one_thread():
        found = provenance("make evidence-circuits", ("numpy", "torch", "transformers", "transformer-lens"))
        found |= {
            "planted": [
                kept.once(f"planted-{seed}.json", partial(planted_row, seed)) for seed in PLANTED_SEEDS
            ],
            "random": [kept.once(f"random-{scale}.json", partial(random_row, scale)) for scale in SCALES],
            "permuted": [
                kept.once(f"permuted-{seed}.json", partial(permuted_row, seed)) for seed in TOY_SEEDS
            ],
            "toy": [kept.once(f"toy-{seed}.json", partial(toy_row, seed)) for seed in TOY_SEEDS],
        }
    EVIDENCE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
