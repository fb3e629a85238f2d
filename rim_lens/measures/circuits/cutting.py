"""Edges cut together: each receiver hears its senders say something else, in a run in which all else goes on as it then does.

One edge cut is one edge of `path_effects`. Of several, what is heard is worked out in the run as it has become: an edge from a
head whose own input is cut as well carries what that head says now. Hence receivers one stage after another, each with a
pass that records what its senders write by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rim_lens.chat.spans import SpanBatch
from rim_lens.hooks.base import Component
from rim_lens.hooks.base import Edit as Hook
from rim_lens.hooks.putting import Put
from rim_lens.lens import Model, ModelFacts, Site, hook_name
from rim_lens.measures.circuits.nodes import Edge, Input, Node
from rim_lens.measures.circuits.paths import PathRun
from rim_lens.measures.circuits.reading import Receiver, spots_read
from rim_lens.measures.circuits.settling import next_word_odds
from rim_lens.measures.circuits.writing import spots_written

Spots = Mapping[tuple[Site, int], Float[Tensor, "prompt pos ..."]]


class Keep(Component):
    """Keeps activations of whole prompts as those components leave them that were attached before it.

    Args:
        spots: (site, layer).

    Attributes:
        kept: By spot, [prompt, pos, ...], right-aligned as the prompts are.
    """

    def __init__(self, spots: Iterable[tuple[Site, int]]) -> None:
        super().__init__()
        self.spots = sorted(set(spots))
        self.kept: dict[tuple[Site, int], Tensor] = {}
        self._shape = (0, 0)

    @override
    def sites(self) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        return tuple(dict.fromkeys(site for site, _ in self.spots)), ()

    @override
    def check_prompts(self, batch: SpanBatch) -> None:
        self._shape = (batch.tokens.shape[0], batch.tokens.shape[1])

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Hook]]:
        return [(hook_name(site, layer), partial(self._keep, (site, layer))) for site, layer in self.spots]

    def _keep(self, spot: tuple[Site, int], tensor: Tensor) -> None:
        value = tensor.detach().cpu()
        whole = self.kept.setdefault(spot, value.new_zeros(*self._shape, *value.shape[2:]))
        whole[self._members, -value.shape[1] :] = value


class Cutting:
    """Prompts on which edges can be cut.

    Args:
        run: The run whose edges they are: it proves how senders write and receivers read.
        batch: The prompts; the run's own, or others.
        after: On other prompts, what heads and neurons send instead, see `Replacements.values`; there, edges from spans stay.
    """

    def __init__(self, run: PathRun, batch: SpanBatch, after: Spots | None = None) -> None:
        self.run, self.batch, self.after = run, batch, after
        self._receivers: dict[Node, Receiver] = {}

    def cuts(self, edge: Edge) -> bool:
        """Whether there is anything to be heard instead."""
        return self.after is None or edge.sender.kind != "span"

    def components(self, edges: Sequence[Edge], given: Sequence[Component]) -> list[Component]:
        """Components with which these edges are cut.

        Args:
            edges: Of the run.
            given: What is in force besides; it stands before them in what is returned.
        """
        found = list(given)
        stages: dict[tuple[int, int], dict[Node, list[Edge]]] = {}
        for edge in filter(self.cuts, edges):
            node = edge.receiver
            stage = (
                (self.run.facts.n_layers, 0) if node.kind == "end" else (node.layer, int(node.kind != "head"))
            )
            stages.setdefault(stage, {}).setdefault(node, []).append(edge)
        for (layer, _), receivers in sorted(stages.items()):
            end = layer == self.run.facts.n_layers
            senders = [
                edge.sender for its in receivers.values() for edge in its if edge.sender.kind != "span"
            ]
            reads: set[tuple[Site, int]] = {("resid_post", layer - 1)} if end else spots_read([*receivers])
            now = self._pass(found, spots_written(senders) | reads)
            if end:
                (hears,) = receivers.values()
                stream = self._heard(now["resid_post", layer - 1], hears, now)
                every = list(range(self.run.facts.d_model))
                found = [*found, Put({("resid_post", layer - 1): (every, stream)})]
            else:
                found = [*found, *(self._said(node, its, now, found) for node, its in receivers.items())]
        return found

    def _said(self, node: Node, edges: Sequence[Edge], now: Spots, found: Sequence[Component]) -> Put:
        """What a receiver puts out, having heard its senders say something else."""
        if node not in self._receivers:
            run = self.run
            self._receivers[node] = Receiver(run.model, run.facts, node, run.recorded, run.proof)
        receiver = self._receivers[node].at(now)
        ways: dict[Input, list[Edge]] = {}
        for edge in edges:
            ways.setdefault(edge.input, []).append(edge)
        values: dict[tuple[Site, int], tuple[list[int], Tensor]] = {}
        for way, its in ways.items():
            values |= receiver.values(way, self._heard(receiver.stream, its, now)[None])
        if node.kind != "head":
            return Put(values)
        # Keys and values may be shared with other heads: what this head makes of them goes in place, and they stay.
        spot: tuple[Site, int] = ("z", node.layer)
        members = list(node.members)
        return Put({spot: (members, self._pass([*found, Put(values)], [spot])[spot][:, :, members])})

    def _heard(
        self, stream: Tensor, edges: Sequence[Edge], now: Spots
    ) -> Float[Tensor, "prompt pos d_model"]:
        heard = stream.float()
        for edge in edges:
            if edge.sender.kind != "span":
                assert self.run.writing is not None  # noqa: S101 - made where a head or neurons send
                written = self.run.writing.at(
                    {spot: now[spot] for spot in spots_written([edge.sender])}, self.after
                )
                heard = heard + written.change(edge.sender)
        heard = heard.to(stream.dtype)
        for edge in edges:  # the other run's rows hold what senders write there
            if edge.sender.kind == "span":
                heard = self.run.with_span(heard, edge.receiver.layer, edge.sender)
        return heard

    def _pass(
        self, components: Sequence[Component], spots: Iterable[tuple[Site, int]]
    ) -> dict[tuple[Site, int], Tensor]:
        keep = Keep(spots)
        next_word_odds(
            self.run.model, self.batch, [*components, keep], self.run.ending.ids, self.run.max_rows
        )
        return keep.kept
