"""Gradient estimates of edges, heads and neurons: which to measure first. They rank and confirm nothing.

An estimate is a slope of the refusal score times a change: of what a receiver makes of its edited input (exactly, norm and projection
included), or of what a head or neuron puts out. One backward pass gives the slopes of many edges at once (attribution
patching, Syed et al. 2310.10348; TransformerLens's own refuses grouped-query models). It is right for small changes: where attention
saturates, or an edge makes a difference only past a threshold, it is wrong in size or sign, and of two parts that stand in for each other
it sees neither. What was estimated and not measured is *not tested*, not small.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rim_lens.batching import micro_batches
from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import NotFinite
from rim_lens.lens import Head, Model, ModelFacts, Site, hook_name, hooked, last_logits
from rim_lens.measures.circuits.nodes import Edge, Node
from rim_lens.measures.circuits.paths import PathRun
from rim_lens.measures.circuits.reading import siblings
from rim_lens.measures.gradients import GRADIENT_ROWS, gradients_of_activations_only, tracked
from rim_lens.measures.refusal.score import log_odds

Spot = tuple[Site, int]
Slopes = dict[Spot, Float[Tensor, "prompt pos ..."]]


def score_slopes(
    model: Model,
    facts: ModelFacts,
    batch: SpanBatch,
    spots: Iterable[Spot],
    ids: Int[Tensor, " opener"],
    *,
    alone: Head | None = None,
    max_rows: int = GRADIENT_ROWS,
) -> Slopes:
    """Gradient of the log-odds that the very next token is an opener, at chosen (site, layer); 0 at padding.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        facts: Of the model.
        batch: Settled prompts, see `settled`.
        spots: Where.
        ids: Of openers.
        alone: A head whose key-value head is shared: the others that share it are held, so that slopes at keys and values are
            this head's alone.
        max_rows: Most prompts in one pass.

    Raises:
        NotFinite: A gradient is NaN or infinite.
    """
    wanted = sorted(set(spots))
    found: Slopes = {}
    shared = siblings(facts, alone) if alone else []
    for rows in micro_batches(batch.lengths.tolist(), max_rows=max_rows):
        part = batch.select(rows)
        outputs: dict[Spot, Tensor] = {}
        hooks: list[Any] = [
            (hook_name(*spot), partial(tracked, outputs=outputs, key=spot)) for spot in wanted
        ]
        if alone and shared:
            hooks.append((hook_name("z", alone[0]), partial(_held, columns=shared)))
        with gradients_of_activations_only(model), hooked(model, hooks):
            logits = last_logits(model, part.tokens.clone(), part.attention_mask.clone(), gradients=True)
            score = log_odds(logits, ids.clone().to(logits.device)).sum()
            slopes = torch.autograd.grad(score, [outputs[spot] for spot in wanted])
        real, width = part.attention_mask.bool().cpu(), part.tokens.shape[1]
        for spot, slope in zip(wanted, slopes, strict=True):
            here = slope.detach().float().cpu().flatten(2)
            here = torch.where(real[:, :, None], here, 0.0).view(slope.shape)
            if not bool(here.isfinite().all()):
                raise NotFinite(
                    f"NaN or infinity in the gradients at {spot[0]} of layer {spot[1]}. Load the model in float32."
                )
            if spot not in found:
                found[spot] = torch.zeros(*batch.tokens.shape, *here.shape[2:])
            found[spot][rows, -width:] = here
    return found


def estimates(run: PathRun, edges: Sequence[Edge]) -> Float[np.ndarray, "prompt edge"]:
    """Estimated effect of each edge of a run, nats, prompt by prompt; exact for edges into the refusal score or a direction.

    NaN for edges from a span whose values are zeroed.

    Costs a forward and a backward pass for all neurons together, and heads with keys of their own; and one for each head
    that shares its keys.
    """
    found = np.full((len(run.batch), len(edges)), np.nan)
    groups: dict[Node, list[int]] = {}
    for place, edge in enumerate(edges):
        groups.setdefault(edge.receiver, []).append(place)
    slopes = _Slopes(run, [node for node in groups if node.kind in ("head", "neurons")])
    for node, places in groups.items():
        if node.kind in ("end", "direction"):
            found[:, places] = run.effects([edges[place] for place in places])
            continue
        receiver, at = run.receiver(node), slopes.of(node)
        streams: dict[Node, Tensor] = {}
        for place in places:
            edge = edges[place]
            if edge.sender.kind == "span" and run.instead.method == "zero":
                continue
            if edge.sender not in streams:
                streams[edge.sender] = run.stream(receiver, edge.sender)
            moved = receiver.heard(edge.input, streams[edge.sender]) - receiver.heard(
                edge.input, receiver.stream
            )
            spot, columns = receiver.spot(edge.input)
            product = at[spot][:, :, columns].double() * moved.double()
            found[:, place] = product.flatten(1).sum(dim=1).numpy()
    return found


class _Slopes:
    """Slopes at what receivers make of their inputs."""

    def __init__(self, run: PathRun, nodes: Sequence[Node]) -> None:
        self._run = run
        self._shared = [node for node in nodes if node.kind == "head" and siblings(run.facts, node.heads[0])]
        own = [node for node in nodes if node not in self._shared]
        spots: set[Spot] = set()
        for node in own:
            sites: tuple[Site, ...] = ("q", "k", "v") if node.kind == "head" else ("post",)
            spots |= {(site, node.layer) for site in sites}
        self._known = self._at(spots, None) if spots else {}

    def of(self, node: Node) -> Slopes:
        if node not in self._shared:
            return self._known
        return self._at({("q", node.layer), ("k", node.layer), ("v", node.layer)}, node.heads[0])

    def _at(self, spots: set[Spot], alone: Head | None) -> Slopes:
        run = self._run
        rows = min(run.max_rows, GRADIENT_ROWS)
        return score_slopes(
            run.model, run.facts, run.batch, spots, run.ending.ids, alone=alone, max_rows=rows
        )


def _held(value: Tensor, hook: Any, columns: list[int]) -> Tensor:  # noqa: ARG001
    held = value.clone()
    held[:, :, columns] = value[:, :, columns].detach()
    return held
