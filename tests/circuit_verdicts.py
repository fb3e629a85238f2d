"""docs/circuits.md: what the edges and the shares of `rl.circuit` are worth, where the truth is known and where there is none.

``python -m tests.circuit_verdicts`` measures, writes docs/evidence/circuits.json, and the page from it. The suite holds the same
claims on a sample (tests/test_circuit_verdicts.py). About twenty CPU-minutes, training of toys included; what was measured or trained is
kept under .cache/circuits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import rim_lens as rl
from rim_lens.folder import ResultFolder
from rim_lens.lens import Head, Model, model_facts
from rim_lens.measures.circuits.moving import PAIRS
from rim_lens.measures.circuits.nodes import Edge, edges_between
from rim_lens.measures.circuits.table import Measured, corrected_p
from rim_lens.organisms.planted import planted_truth
from rim_lens.organisms.toy.recipe import FINE_TUNE, TUNED_KINDS, one_thread, toy_rows
from rim_lens.training import FineTuned
from tests.checkpoint_verdicts import base_of, rows
from tests.verdicts import random_toy, share, toy_requests

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "docs" / "evidence" / "circuits.json"
PAGE = ROOT / "docs" / "circuits.md"
KEPT = ROOT / ".cache" / "circuits"

PLANTED_SEEDS = range(
    100, 124
)  # EdgeRule's shares were chosen on seeds 0 to 15, where a tenth let noise through in three
SCALES = (0.2, 0.8)
N_RANDOM = 20  # of each scale
TOY_SEEDS = range(6)
N_NEURONS = 32  # of a toy's 512
CONTRASTS = ("twins", "careful", "filler")
# What the planted words of a request go through, of the spans, heads and sets of neurons that are given.
PLANTED_EDGES = (
    "request → L0H5.v",
    "L0H5 → and L0",
    "and L0 → L1H1.v",
    "think → L1H1.v",
    "L1H1 → refusal",
)

SMALL = rl.CircuitSearch(max_rows=512, limit=20, n_random=20, n_random_senders=2, n_random_receivers=2)
TOY = rl.CircuitSearch(
    max_rows=512, limit=12, n_random=12, n_random_senders=0, n_random_receivers=0, max_new_tokens=2
)
LEAST = rl.CircuitSearch(max_rows=512, limit=12, n_random=0, n_random_senders=0, n_random_receivers=0)
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


def permuted_row(seed: int, folder: Path = KEPT) -> dict[str, Any]:
    """A toy whose labels are exchanged within pairs of swapped words, all ways: how often any edge's p comes to the level."""
    model = rl.load_model(base_of(seed, folder))
    heads, neurons = toy_nodes(model, LEAST)
    found = rl.circuit(
        model, rl.ChatFormat.from_model(model), heads, neurons, *toy_requests(), gate=False, search=LEAST
    )
    senders, hear = ([node for node in found.asked() if node.kind != kind] for kind in ("end", "span"))
    order = {str(edge): edge for edge in edges_between(senders, hear)}
    edges = [order[str(name)] for name in found.effects["edge"].values]
    families = [str(name) for name in found.effects["family"].values]
    labels = sorted(set(families))
    place = np.array([labels.index(name) for name in families])
    ways = list(product((False, True), repeat=len(labels)))
    hits = 0
    for way in ways:
        turned = exchanged(found, edges, np.array(way)[place])
        least = P_ALONE.least(float(turned.reach.mean()))
        p = corrected_p((turned.effect - turned.back) / 2, families, least)
        hits += min(p) <= P_ALONE.alpha
    return {"seed": seed, "n_runs": len(ways), "any": hits}


# --- what emerges in trained toys -------------------------------------------------------------------


def toy_nodes(model: Model, search: rl.CircuitSearch = TOY) -> tuple[list[Head], rl.NeuronSet]:
    """Every head, those with the largest slopes first, and the neurons with the largest, by select requests."""
    chat, n_heads = rl.ChatFormat.from_model(model), len(model_facts(model).heads())
    found = rl.propose_nodes(
        model, chat, *toy_requests(), n_heads=n_heads, n_neurons=N_NEURONS, limit=search.limit
    )
    return found.heads, found.neurons


def toy_circuit(model: Model, nodes: tuple[list[Head], Any], **more: Any) -> rl.Circuit:
    """The whole call on a toy, its gate not asked, questions among what is read."""
    questions = rl.load_prompts("reasoning", language="toy", split="evaluate")
    chat = rl.ChatFormat.from_model(model)
    return rl.circuit(
        model, chat, *nodes, *toy_requests(), reasoning=questions, gate=False, search=TOY, **more
    )


def summary(found: rl.Circuit) -> dict[str, Any]:
    """What a circuit comes to, in plain values."""
    columns = ["contrast", "edge", "effect", "effect_low", "effect_high", "share", "p"]
    reach = found.effects["reach"].mean("prompt").to_series()
    return {
        "gate": found.gate,
        "kept": [node.name for node in found.kept()],
        "reach": {str(name): float(value) for name, value in reach.items()},
        "edges": rows(found.edges[found.edges["in_circuit"]][columns]),
        "tests": rows(found.tests),
    }


def toy_row(seed: int, folder: Path = KEPT) -> dict[str, Any]:
    """What `circuit` says of the toy of one seed in each condition, and what its neurons do while it thinks."""
    model = rl.load_model(base_of(seed, folder))
    nodes = toy_nodes(model)
    found = toy_circuit(model, nodes, contrasts=CONTRASTS)
    found.save(folder / f"base-{seed}")
    evaluate = toy_requests("evaluate")[0]
    thought = rl.neurons_in_thought(
        model, rl.ChatFormat.from_model(model), nodes[1], evaluate, max_new_tokens=12
    )
    return {"seed": seed, **summary(found), "in_thought": rows(thought)}


def tuned_runs(seed: int, folder: Path = KEPT) -> dict[str, FineTuned]:
    """The toy of one seed fine-tuned on harmless sums, once with chains of each kind."""
    return {
        kind: rl.fine_tune(
            base_of(seed, folder),
            toy_rows(kind, "-", seed),
            out=folder / f"tuned-{seed}-{kind}",
            config=FINE_TUNE,
            lora=None,
            seed=seed,
            progress=False,
        )
        for kind in TUNED_KINDS
    }


def tuned_row(seed: int, kind: str, folder: Path = KEPT) -> dict[str, Any]:
    """The same heads and neurons after a fine-tune: the circuit there, which edges changed, and which carry the change."""
    base = rl.load_model(base_of(seed, folder))
    tuned = rl.load_model(tuned_runs(seed, folder)[kind].checkpoints[-1])
    nodes = toy_nodes(base)
    before, after = rl.Circuit.load(folder / f"base-{seed}"), toy_circuit(tuned, nodes)
    changes = rl.compare_circuits(before, after, contrast="twins")
    chat = rl.ChatFormat.from_model(base)
    carried = rl.circuit(
        base,
        chat,
        *nodes,
        *toy_requests(),
        gate=False,
        search=replace(LEAST, limit=TOY.limit),
        contrasts=("tuned",),
        tuned=tuned,
    )
    thought = rl.neurons_in_thought(
        base,
        chat,
        nodes[1],
        toy_requests("evaluate")[0],
        conditions=("off", "careful"),
        tuned=tuned,
        max_new_tokens=12,
    )
    told = changes[(changes["in_base"] | changes["in_tuned"]) & (changes["p"] <= 0.05)]
    return {
        "seed": seed,
        "kind": kind,
        **summary(after),
        "n_changed": int((changes["p"] <= 0.05).sum()),
        "changes": rows(told.head(6)),
        "carried": {
            name: value for name, value in summary(carried).items() if name in ("reach", "edges", "kept")
        },
        "in_thought": rows(thought[thought["model"] == "tuned"]),
    }


def moving(folder: Path = KEPT) -> dict[str, Any]:
    """Heads and neurons at every checkpoint of every run, and whether the two move together."""
    tables = []
    for seed in TOY_SEEDS:
        base = rl.load_model(base_of(seed, folder))
        chat = rl.ChatFormat.from_model(base)
        found = rl.propose_nodes(base, chat, *toy_requests(), n_heads=4, n_neurons=N_NEURONS, limit=TOY.limit)
        runs = tuned_runs(seed, folder)
        table = rl.halves_at_checkpoints(
            {f"{kind} {seed}": run.checkpoints for kind, run in runs.items()},
            chat,
            found.heads,
            found.neurons,
            toy_requests("evaluate")[0],
            base=base,
            steps={f"{kind} {seed}": run.steps for kind, run in runs.items()},
        )
        tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    names = list(dict.fromkeys(table["run"]))
    kinds, units = ({name: name.split()[place] for name in names} for place in (0, 1))
    together = rl.halves_together(table, kinds=kinds, units=units)
    return {
        "table": rows(table),
        "together": rows(together[together["how"] != "run"].drop(columns="run")),
        "by_run": rows(together[together["how"] == "run"][["run", "metric", "outcome", "pearson", "n"]]),
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

**Which edges are measured.** All between the given nodes; or, with `CircuitSearch.n_confirm`, those that a gradient proposes on the requests that choose:
slope of the score at what the receiver makes of its input, times the exact change there. Slopes mislead where attention saturates and are blind to parts that
stand in for each other, so that an edge left out is *not tested*; it is listed with its estimate. `propose_nodes` names heads and neurons in the same way.
No number of a circuit is a gradient: what is told of an edge was measured.

**Yardsticks.** Beside each edge stand random senders of its sender's kind and layer into the same input, and random receivers of its receiver's kind and
layer for the same sender; beside the whole, random circuits with as many heads and neurons in each layer. p does not use them.

**Reasoning questions** are read by the refusal score, by the log-probability of the checked answer and by accuracy of what is written. There is nothing to share
out: look at the change. Parts are replaced on rows of the prompt; what is written after it runs freely.
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
                *_missing_lines(found["missing"]),
                *_planted_lines(found["planted"]),
                *_null_lines(found["random"], found["permuted"]),
                *(_toy_lines(found["toy"]) if found["toy"] else []),
                *(_tuned_lines(found["tuned"]) if found["tuned"] else []),
                *(line for one in found["moving"] for line in _moving_lines(one)),
            ]
        ).rstrip()
        + "\n"
    )


def _missing_lines(missing: Sequence[str]) -> list[str]:
    if not missing:
        return []
    return [f"**Not measured yet** (the command goes on with them): {', '.join(missing)}.", ""]


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
    lines = [
        "## Where there is none: the share of runs in which p of any edge is .05 or less",
        "",
        "Gate off, no size asked for, so that p alone decides.",
        "",
    ]
    if random:
        lines.append(
            f"- **Random weights** in the toy's shape, two random heads and six random neurons of each layer: {share(hits, runs)} ({each})."
        )
    if permuted:
        lines.append(
            f"- **Trained toys**, seeds {_seeds(permuted)}, labels *harmful* and *twin* exchanged within pairs of swapped words, all ways:"
            f" {share(found, ways)}."
        )
    return [*lines, ""]


def _seeds(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(str(row["seed"]) for row in rows)


def _toy_lines(base: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "## Trained toys, failures included",
        "",
        f"Nodes given: all 16 heads, and the {N_NEURONS} of 512 neurons with the largest slopes on select requests (`propose_nodes`), one node for each",
        f"layer, the spans request and think; {TOY.limit} requests on each side, gate not asked. Share in brackets: random circuits with as many heads and",
        f"neurons in each layer ({TOY.n_random}). More than 1: what is outside holds refusal down. A twin differs in its action alone: heads that",
        "read the object do the same on both and carry nothing here, however much refusal needs them ([](howto/circuits.md)).",
        "",
        "| seed | kept heads, layers of neurons | edges under twins | faithfulness | random | completeness | random |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: |",
        *(f"| {row['seed']} | {_circuit_cells(row)} |" for row in base),
        "",
        *_unkept_lines(base),
        "**Each condition.** The same edges under other contrasts: what the edge carries of the difference that a chain of thought makes. Reach: score in",
        "the other condition − score off, nats.",
        "",
        "| seed | contrast | reach | edges of the circuit: effect [95 %], nats |",
        "| ---: | --- | ---: | --- |",
    ]
    for row in base:
        for name in CONTRASTS:
            told = ", ".join(map(_edge_cell, _edges_of(row, name)[:4])) or "none"
            lines.append(f"| {row['seed']} | {name} | {row['reach'][name]:+.1f} | {told} |")
    lines += [
        "",
        "**What parts do to the rest.** The circuit removed: change of refusal on harmful requests and on twins (nats), of the checked answer's",
        "log-probability (nats) and of accuracy on sums, with 95 % intervals.",
        "",
        "| seed | harmful | twins | answer | accuracy before → after |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *(_removed_line(row) for row in base if row["tests"]),
        "",
        "**While it thinks.** Mean activation of the chosen neurons over the think block, − that with an empty block, 95 % interval; given, filler and what the",
        "model writes itself.",
        "",
        "| seed | neurons | off | careful − off | filler − off | self-written − off |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
        *(line for row in base for line in _thought_lines(row)),
        "",
    ]
    return lines


def _unkept_lines(base: Sequence[dict[str, Any]]) -> list[str]:
    without = [row for row in base if not row["kept"]]
    if not without:
        return []
    return [
        f"Of seeds {_seeds(without)} no node is kept, and nothing is tested: on the requests that choose, no node has a way to the refusal score by edges of a tenth of",
        "the difference between the runs or more. Edges further down may be there all the same, as the table shows; what passes them on may be neurons that were not given.",
        "",
    ]


def _tuned_lines(tuned: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"## After fine-tuning: {len(tuned)} runs",
        "",
        "Each toy tuned on harmless sums with chains of three kinds (320 steps). The base's heads and neurons are asked again; changed: edges of either",
        "circuit whose effect under twins is another than before (p ≤ .05 over all edges), tuned − base. Carried: edges by which the tuned model's words in the",
        "base's place move refusal (contrast *tuned*).",
        "",
        "| seed | kind | refuses harmful, twins | kept heads, layers of neurons | edges under twins | faithfulness | random | completeness | random | changed | carried |",
        "| ---: | --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in tuned:
        changed = ", ".join(
            f"{one['edge']} {one['base']:+.1f} → {one['tuned']:+.1f} [{one['change_low']:+.1f}, {one['change_high']:+.1f}]"
            for one in row["changes"][:2]
        )
        carried = ", ".join(map(_edge_cell, row["carried"]["edges"][:2]))
        lines.append(
            f"| {row['seed']} | {row['kind']} | {row['gate']['harmful']:.0%}, {row['gate']['harmless']:.0%} | {_circuit_cells(row)} | {changed or 'none'} | {carried or 'none'} |"
        )
    return [*lines, ""]


def _circuit_cells(row: dict[str, Any]) -> str:
    tests = {test["measure"]: test for test in row["tests"] if test["kind"] == "harmful" and not test["node"]}
    cells = []
    for name in ("faithfulness", "completeness"):
        test = tests.get(name)
        cells += (
            ["–", "–"]
            if test is None
            else [
                f"{test['share']:.2f} [{test['share_low']:.2f}, {test['share_high']:.2f}]",
                "–"
                if test["random"] is None
                else f"{test['random']:.2f} [{test['random_low']:.2f}, {test['random_high']:.2f}]",
            ]
        )
    edges = ", ".join(f"{edge['edge']} {edge['effect']:+.1f}" for edge in _edges_of(row, "twins")[:4])
    return " | ".join([", ".join(row["kept"]) or "none", edges or "none", *cells])


def _edges_of(row: dict[str, Any], contrast: str) -> list[dict[str, Any]]:
    return [edge for edge in row["edges"] if edge["contrast"] == contrast]


def _edge_cell(edge: dict[str, Any]) -> str:
    return f"{edge['edge']} {edge['effect']:+.1f} [{edge['effect_low']:+.1f}, {edge['effect_high']:+.1f}]"


def _removed_line(row: dict[str, Any]) -> str:
    tests = {test["kind"]: test for test in row["tests"] if test["measure"] == "completeness"}
    cells = [
        f"{tests[kind]['change']:+.1f} [{tests[kind]['change_low']:+.1f}, {tests[kind]['change_high']:+.1f}]"
        for kind in ("harmful", "harmless", "reasoning answers")
    ]
    right = tests["reasoning accuracy"]
    return f"| {row['seed']} | {' | '.join(cells)} | {right['full']:.0%} → {right['after']:.0%} |"


def _thought_lines(row: dict[str, Any]) -> list[str]:
    nodes = list(dict.fromkeys(one["node"] for one in row["in_thought"]))
    lines = []
    for node in nodes:
        at = {one["condition"]: one for one in row["in_thought"] if one["node"] == node}
        changes = [
            f"{at[name]['change']:+.2f} [{at[name]['change_low']:+.2f}, {at[name]['change_high']:+.2f}]"
            for name in ("careful", "filler", "open")
        ]
        lines.append(f"| {row['seed']} | {node} | {at['off']['mean']:.2f} | {' | '.join(changes)} |")
    return lines


def _moving_lines(found: dict[str, Any]) -> list[str]:
    runs = list(dict.fromkeys(row["run"] for row in found["table"]))
    last = {row["run"]: row for row in found["table"]}
    names = {
        "heads_effect": "removing the heads",
        "neurons_effect": "removing the neurons",
        "heads_mass": "heads' attention on the request",
        "neurons_activation": "neurons' activation",
        "score": "refusal score",
    }
    lines = [
        f"## Do heads and neurons move together? {len(runs)} runs of {len(TOY_SEEDS)} toys",
        "",
        f"Of each base the four heads and {N_NEURONS} neurons with the largest slopes, at six checkpoints of each run, on evaluate requests, thinking off. *Within*: each",
        "run's own mean taken off; *across*: one point per run. Checkpoints of one run follow each other, so that p exchanges whole runs: all of them, and within kinds",
        "(toys change places, each with its three runs, 720 ways). Both halves carry one refusal: where that goes, removing either does less, and so each is held",
        "against the score as well.",
        "",
        "| heads | with | how | r | least, largest with a run left out | p | p within kinds |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    wanted = {*PAIRS, *((one, "score") for one in PAIRS[0])}
    for row in found["together"]:
        if (row["metric"], row["outcome"]) in wanted and row["how"] in ("within", "across"):
            lines.append(
                f"| {names[row['metric']]} | {names[row['outcome']]} | {row['how']} | {_number(row['pearson'])} | {_number(row['low'])}, {_number(row['high'])}"
                f" | {_p(row['p_pearson'])} | {_p(row['p_pearson_kind'])} |"
            )
    lines += [
        "",
        "At the end of each run, change since the base [95 %]; p over all checkpoints of the toy.",
        "",
        "| run | refusal score | removing the heads | removing the neurons | attention on the request | activation |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in runs:
        row = last[run]
        cells = [
            f"{row[f'{name}_change']:+.{digits}f} [{row[f'{name}_change_low']:+.{digits}f}, {row[f'{name}_change_high']:+.{digits}f}], p = {row[f'{name}_p']:.3f}"
            for name, digits in (
                ("score", 1),
                ("heads_effect", 1),
                ("neurons_effect", 1),
                ("heads_mass", 2),
                ("neurons_activation", 2),
            )
        ]
        lines.append(f"| {run} | {' | '.join(cells)} |")
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 0.0005 else "< 0.001"


def parts() -> dict[str, list[tuple[str, Callable[[], Any]]]]:
    """Everything that is measured, part by part: the file it is kept in, and what measures it."""
    return {
        "planted": [(f"planted-{seed}", partial(planted_row, seed)) for seed in PLANTED_SEEDS],
        "random": [(f"random-{scale}", partial(random_row, scale)) for scale in SCALES],
        "toy": [(f"toy-{seed}", partial(toy_row, seed)) for seed in TOY_SEEDS],
        "permuted": [(f"permuted-{seed}", partial(permuted_row, seed)) for seed in TOY_SEEDS],
        "tuned": [
            (f"tuned-{seed}-{kind}", partial(tuned_row, seed, kind))
            for seed in TOY_SEEDS
            for kind in TUNED_KINDS
        ],
        "moving": [("moving", moving)],
    }


def main() -> None:
    """Measure, and write evidence and page; what was measured before an interruption is kept under .cache/circuits.

    ``--so-far`` measures nothing and writes what is kept; the page says what is missing.
    """
    from rim_lens.provenance import provenance

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--so-far", action="store_true")
    so_far = parser.parse_args().so_far
    kept = ResultFolder(KEPT)
    found = provenance("make evidence-circuits", ("numpy", "torch", "transformers", "transformer-lens"))
    found["missing"] = []
    with one_thread():
        for part, some in parts().items():
            found[part] = []
            for name, measure in some:
                if so_far and not kept.has(f"{name}.json"):
                    found["missing"].append(name)
                else:
                    found[part].append(kept.once(f"{name}.json", measure))
    EVIDENCE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
