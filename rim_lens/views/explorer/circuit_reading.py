"""What the circuit explorer reads of a model: where the circuit's heads look, and what its neurons do, in both runs of a contrast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_lens.capturing import capture
from rim_lens.chat.spans import SpanBatch
from rim_lens.hooks.attention import SpanAttention
from rim_lens.measures.circuits.asking import TUNED, TWINS, Question
from rim_lens.measures.circuits.nodes import Node
from rim_lens.views.explorer.building import packed
from rim_lens.views.explorer.neuron_reading import over_tokens
from rim_lens.views.explorer.page import Arrays, page_bytes
from rim_lens.views.explorer.reading import HeadPatterns
from rim_lens.views.explorer.tokens import token_texts
from rim_lens.views.text import visible

if TYPE_CHECKING:
    from rim_lens.chat import ChatFormat
    from rim_lens.lens import Model

# By node: the neurons that are named, each with its place among all that were read
Members = dict[str, list[tuple[int, tuple[int, int]]]]

MOST_MEMBERS = 12  # neurons of a set that are shown one by one, those that differ most between the runs


@dataclass(frozen=True)
class Run:
    """A model on prompts, as one side of a contrast.

    Attributes:
        name: "off", or the contrast whose other run it is.
        told: In words.
    """

    name: str
    told: str
    model: Model
    batch: SpanBatch


def runs_of(asked: Question) -> list[Run]:
    """The run that is read, and the other one of each contrast, on evaluate requests."""
    batches, here = asked.batches["evaluate"], asked.read_in
    found = [Run(here, f"harmful, {visible(here)}", asked.model, batches[here])]
    for contrast in asked.contrasts:
        if contrast == TUNED:
            assert asked.tuned is not None  # noqa: S101 - the contrast is asked with a model
            found.append(Run(contrast, f"harmful, {visible(here)}, tuned model", asked.tuned, batches[here]))
        elif contrast == TWINS:
            found.append(Run(contrast, f"twins, {visible(here)}", asked.model, batches[TWINS]))
        else:
            found.append(Run(contrast, f"harmful, {visible(contrast)}", asked.model, batches[contrast]))
    return found


def rows_that_fit(runs: Sequence[Run], n_heads: int, shown: int, room: float) -> int:
    """How many last query rows of each head there is room for; none where not even one fits."""
    lengths = [int(length) for run in runs for length in run.batch.lengths[:shown]]

    def taken(window: int) -> int:
        return n_heads * sum(page_bytes(sum(range(max(0, n - window) + 1, n + 1))) for n in lengths)

    low, high = 0, max(lengths, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if taken(middle) <= room else (low, middle - 1)
    return low


def activations_of(runs: Sequence[Run], nodes: Sequence[Node], shown: int) -> list[list[Any]]:
    """Of each prompt that can be looked at, in each run: every neuron of the nodes over its tokens; None without neurons."""
    neurons = [neuron for node in nodes for neuron in node.neurons]
    return [
        [over_tokens(run.model, run.batch, row, neurons) if neurons else None for run in runs]
        for row in range(shown)
    ]


def read_runs(
    chat: ChatFormat,
    runs: Sequence[Run],
    nodes: Sequence[Node],
    activations: Sequence[Sequence[Any]],
    members: Members,
    last: int,
    arrays: Arrays,
) -> list[dict[str, Any]]:
    """What the page holds of each run.

    Args:
        chat: The format.
        runs: Of one circuit.
        nodes: Its heads and sets of neurons.
        activations: See `activations_of`.
        members: The neurons that are named, see `members_of`; the same in all circuits of a page, which are looked at side by side.
        last: How many last query rows of each head are kept; 0 for none.
        arrays: Takes the numbers.
    """
    heads = [node.heads[0] for node in nodes if node.kind == "head"]
    return [
        {
            "name": run.name,
            "told": run.told,
            "n": len(run.batch),
            **_masses(run, nodes, heads, arrays),
            "prompts": [
                _prompt(chat, run, row, nodes, heads, members, activations[row][place], last, arrays)
                for row in range(len(activations))
            ],
        }
        for place, run in enumerate(runs)
    ]


def _masses(run: Run, nodes: Sequence[Node], heads: Sequence[Any], arrays: Arrays) -> dict[str, Any]:
    """Mass of each head of the circuit on every span, from the last prompt token, mean over all prompts."""
    if not heads:
        return {"spans": [], "masses": {}}
    mass = capture(run.model, run.batch, SpanAttention())["attention_mass"].mean("prompt")
    mass = mass.transpose("layer", "head", "span")
    named = [node.name for node in nodes if node.kind == "head"]
    kept = {name: arrays.keep(mass.values[head]) for name, head in zip(named, heads, strict=True)}
    return {"spans": [str(span) for span in mass["span"].values], "masses": kept}


def members_of(nodes: Sequence[Node], activations: Sequence[Sequence[Any]]) -> Members:
    """Of each set, the neurons that differ most between the runs (or are most active): place among all read, and which."""
    found: Members = {}
    start = 0
    for node in nodes:
        places = list(range(start, start + len(node.neurons)))
        start += len(places)
        if not places:
            continue
        peaks = np.array([[one[places].max(axis=1) for one in runs] for runs in activations]).mean(axis=0)
        size = np.ptp(peaks, axis=0) if len(peaks) > 1 else np.abs(peaks[0])
        order = np.argsort(-size, kind="stable")[:MOST_MEMBERS]
        found[node.name] = [(places[int(at)], node.neurons[int(at)]) for at in order]
    return found


def _prompt(
    chat: ChatFormat,
    run: Run,
    row: int,
    nodes: Sequence[Node],
    heads: Sequence[Any],
    members: Members,
    activation: Any,
    last: int,
    arrays: Arrays,
) -> dict[str, Any]:
    one = run.batch.select([row])
    told: dict[str, Any] = {
        "id": visible(one.prompts[0].id),
        "tokens": token_texts(chat, one.tokens[0].tolist()),
        "atoms": one.atoms_of(0),
        "last": int(one.prompt_last[0]),
        "rows": {},
        "activations": {},
    }
    if heads and last:
        patterns = capture(run.model, one, HeadPatterns(heads, last=last))["attention_patterns"].values[0]
        first = len(told["tokens"]) - patterns.shape[1]
        for place, node in enumerate(node for node in nodes if node.kind == "head"):
            told["rows"][node.name] = {"first": first, "values": arrays.keep(packed(patterns[place], first))}
    start = 0
    for node in nodes:
        whole = range(start, start + len(node.neurons))
        start = whole.stop
        if whole:
            shown = members[node.name]
            values = np.vstack([activation[list(whole)].mean(axis=0), activation[[at for at, _ in shown]]])
            told["activations"][node.name] = {
                "names": [f"L{layer}N{neuron}" for _, (layer, neuron) in shown],
                "values": arrays.keep(values),
            }
    return told
