"""What a circuit is asked of: nodes, sides, rendered prompts, and what it will cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, SpanBatch, render_conditions
from rim_lens.errors import ConditionError, NotEnoughData, StatisticsError
from rim_lens.lens import Head, Model, ModelFacts, verify
from rim_lens.measures.circuits.instead import Instead, patched
from rim_lens.measures.circuits.nodes import (
    END,
    Edge,
    Neuron,
    Node,
    checked_nodes,
    edges_between,
    head_node,
    neuron_nodes,
    span_node,
)
from rim_lens.measures.controls import random_neurons_per_layer
from rim_lens.measures.heads.held_out import heads_to_ask
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.neurons.beside import neurons_to_edit
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.measures.removal_table import shuffled
from rim_lens.measures.twins import families_by_swap
from rim_lens.measures.two_sides import Side, named, paired, two_sides
from rim_lens.prompts import Prompt, spread

TWINS, TUNED = "twins", "tuned"
Neurons = NeuronSet | Iterable[Neuron]
RandomEdges = dict[Edge, list[Edge]]


@dataclass(frozen=True, slots=True)
class CircuitSearch:
    """How much of a circuit is measured.

    Attributes:
        scope: What counts as outside the circuit: "all" other heads and neurons, or other "heads" alone.
        outside: What they say instead: their "mean" over harmless select prompts, place by place, or what they say on a harmless
            donor ("resample").
        n_random: Random circuits with as many heads and neurons in each layer.
        n_random_senders: Random senders beside each, of its kind and layer.
        n_random_receivers: Random receivers beside each, likewise.
        n_confirm: Edges into heads and neurons that are measured: those with the largest gradient estimates on select requests, of
            any contrast (`estimates`). None: all. Edges into the refusal score cost nothing and are always measured.
        max_new_tokens: Of answers to reasoning questions, judged right or wrong; 0 leaves accuracy out.
        limit: At most so many requests of each kind and side, taken evenly; None for all.
        seed: Of halves, permutations, intervals and random sets.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.
    """

    scope: Literal["all", "heads"] = "all"
    outside: Literal["mean", "resample"] = "mean"
    n_random: int = 20
    n_random_senders: int = 3
    n_random_receivers: int = 3
    n_confirm: int | None = None
    max_new_tokens: int = 16
    limit: int | None = 32
    seed: int = 0
    max_rows: int = MAX_ROWS
    progress: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            StatisticsError: A number is negative, or a word is unknown.
        """
        if self.scope not in ("all", "heads") or self.outside not in ("mean", "resample"):
            raise StatisticsError(
                f"scope={self.scope!r} and outside={self.outside!r} were asked for; scope is 'all' or 'heads', outside 'mean' or"
                " 'resample'."
            )
        counts = ("n_random", "n_random_senders", "n_random_receivers", "n_confirm", "max_new_tokens")
        wrong = [name for name in counts if (getattr(self, name) or 0) < 0]
        if wrong:
            raise StatisticsError(
                f"{wrong[0]}={getattr(self, wrong[0])} was asked for; it is a count, 0 or more."
            )


@dataclass(frozen=True)
class CircuitPlan:
    """What a circuit will cost at most.

    Attributes:
        n_nodes: Heads, nodes of neurons and spans.
        n_edges: Edges among them and into the refusal score, for each contrast.
        n_batches: Batches of edges, one for each receiver, in which all its senders and inputs run together, beside one pass
            that records. Edges into the refusal score need none; with `CircuitSearch.n_confirm` there may be fewer.
        n_rows: Prompts read in all, one forward pass each; edges whose sender sends the same in both runs are not run.
        n_tokens: Tokens in all.
    """

    n_nodes: int
    n_edges: int
    n_batches: int
    n_rows: int
    n_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.n_nodes} nodes, {self.n_edges} edges a contrast in {self.n_batches} batches; at most {self.n_rows} prompts"
            f" ({self.n_tokens} tokens) are read"
        )


class Question:
    """A circuit asked for: checked before any pass."""

    def __init__(
        self,
        model: Model,
        chat: ChatFormat,
        heads: RefusalHeads | Iterable[Head],
        neurons: Neurons | Mapping[str, Neurons],
        harmful: Sequence[Prompt | str],
        harmless: Sequence[Prompt | str],
        reasoning: Sequence[Prompt | str],
        spans: Sequence[str],
        contrasts: Sequence[str],
        tuned: Model | None,
        read_in: str,
        search: CircuitSearch,
    ) -> None:
        self.model, self.search, self.tuned, self.read_in = model, search, tuned, read_in
        self.facts: ModelFacts = verify(model, reads=["z", "attn_out", "mlp_out", "resid_pre", "resid_post"])
        self.select, self.evaluate = (
            paired(side) for side in two_sides(harmful, harmless, search.limit, search.seed)
        )
        self.families = families_by_swap(self.evaluate.harmful, self.evaluate.harmless)
        asked = [*self.evaluate.harmful, *self.evaluate.harmless]
        heads = heads_to_ask(heads, asked)
        sets = dict(neurons) if isinstance(neurons, Mapping) else {"neurons": neurons}
        self.nodes = checked_nodes(
            [
                *map(head_node, self.facts.check_heads(heads)),
                *(node for name, one in sets.items() for node in _neuron_nodes(name, one, self.facts, asked)),
            ],
            self.facts,
        )
        self.spans = [span_node(span) for span in spans]
        self.receivers = [*self.nodes, END]
        self.edges = edges_between([*self.nodes, *self.spans], self.receivers)
        self.contrasts = _contrasts(contrasts, tuned, read_in)
        names = list(
            dict.fromkeys([read_in, *(name for name in self.contrasts if name not in (TWINS, TUNED))])
        )
        self.batches = {
            name: self._rendered(chat, side, names)
            for name, side in (("select", self.select), ("evaluate", self.evaluate))
        }
        for name, batch in self.batches["evaluate"].items():
            if batch.think == "open":
                raise ConditionError(
                    f"{name!r} leaves the think block open: the model thinks next and the answer is far. Name closed conditions"
                    " ('off', 'careful', 'filler' …)."
                )
            for span in spans:
                batch.spans.require(span)
        questions = [one for one in named(reasoning, "reasoning") if one.split in (None, "evaluate")]
        self.reasoning = chat.render(spread(questions, search.limit), think="off") if questions else None

    def _rendered(self, chat: ChatFormat, side: Side, names: Sequence[str]) -> dict[str, SpanBatch]:
        found = dict(render_conditions(chat, side.harmful, names))
        return {**found, TWINS: render_conditions(chat, side.harmless, [self.read_in])[self.read_in]}

    def runs(self, contrast: str, side: str, back: bool = False) -> tuple[Model, SpanBatch, Instead]:
        """The model and the prompts that are read in a contrast, and what is said instead.

        Args:
            contrast: "twins", "tuned" or a condition.
            side: "select" or "evaluate".
            back: The other way round.
        """
        batches = self.batches[side]
        here, there = batches[self.read_in], batches[self.read_in if contrast == TUNED else contrast]
        model, other = self.model, self.tuned if contrast == TUNED else self.model
        if back:
            here, there, model, other = there, here, other, model
        return model, here, patched(there, source_model=None if other is model else other)

    def random_nodes(self) -> dict[Node, list[Node]]:
        """For each head and node of neurons, others of its layer with as many members, none of them given where there are enough."""
        found: dict[Node, list[Node]] = {}
        count, seed = max(self.search.n_random_senders, self.search.n_random_receivers), self.search.seed
        taken = {head for node in self.nodes for head in node.heads}
        held = [neuron for node in self.nodes for neuron in node.neurons]
        for node in self.nodes if count else []:
            if node.kind == "head":
                layer = [(node.layer, head) for head in range(self.facts.n_heads)]
                rest = [head for head in layer if head not in taken]
                order = np.random.default_rng([seed, node.layer, *node.members]).permutation(len(rest))
                others = [head_node(rest[place]) for place in order]
            else:
                try:
                    drawn = random_neurons_per_layer(node.neurons, self.facts.d_mlp, count, seed, avoid=held)
                except NotEnoughData:  # all neurons of its layer: no other set is as large
                    drawn = []
                sets = shuffled(drawn, seed) if drawn else []
                others = [
                    Node(f"{node.name} ~{number}", "neurons", node.layer, tuple(place for _, place in one))
                    for number, one in enumerate(sets)
                ]
            found[node] = others[:count]
        return found

    def random_edges(self, edges: Sequence[Edge]) -> tuple[RandomEdges, RandomEdges]:
        """For each edge, those of random senders like its own into the same input; and its sender's into random receivers."""
        nodes = self.random_nodes()
        n_senders, n_receivers = self.search.n_random_senders, self.search.n_random_receivers
        senders = {
            edge: [Edge(one, edge.receiver, edge.input) for one in nodes.get(edge.sender, [])[:n_senders]]
            for edge in edges
        }
        receivers = {
            edge: [Edge(edge.sender, one, edge.input) for one in nodes.get(edge.receiver, [])[:n_receivers]]
            for edge in edges
        }
        return senders, receivers

    def plan(self) -> CircuitPlan:
        """What it will cost at most."""
        heard = [edge for edge in self.edges if edge.receiver is not END]
        n_confirm = self.search.n_confirm
        n_heard = len(heard) if n_confirm is None else min(n_confirm, len(heard))
        # Which edges will be measured hangs on estimates: those with most random ones beside them are counted.
        beside = sorted(
            (
                len(set(senders[edge]) | set(receivers[edge]))
                for senders, receivers in [self.random_edges(heard)]
                for edge in heard
            ),
            reverse=True,
        )
        groups = {edge.receiver for edge in heard}
        # A pass with gradients costs about three without.
        estimated = 0 if n_confirm is None else 3 * (1 + len(groups))
        kinds = {node.kind for node in (*self.nodes, *self.spans)}
        # Settled twice, read to the end, recorded and proven, scored, and the source recorded for each kind of sender.
        once = 6 + len(kinds)
        widths = {side: self.batches[side] for side in self.batches}
        rows = tokens = 0

        def add(batch: SpanBatch, times: int) -> None:
            nonlocal rows, tokens
            rows += times * len(batch)
            tokens += times * int(batch.lengths.sum())

        for contrast in self.contrasts:
            here = {side: widths[side][self.read_in] for side in widths}
            there = widths["evaluate"][self.read_in if contrast == TUNED else contrast]
            add(here["select"], once + n_heard + estimated)
            add(here["evaluate"], once + n_heard + sum(beside[:n_heard]))
            add(there, once + n_heard)
        reads = 4 + len(self.nodes)
        add(widths["evaluate"][self.read_in], reads + 2 * self.search.n_random + 1)
        add(widths["evaluate"][TWINS], reads + 1)
        for _ in range(2):
            add(widths["select"][TWINS], 2)
        if self.reasoning is not None:
            # By score, by the checked answer, and by what is written, token by token.
            written = self.search.max_new_tokens
            add(self.reasoning, (2 + min(written, 1)) * 5)
            tokens += 5 * written * len(self.reasoning)
            add(widths["select"][TWINS], 4 + 2 * min(written, 1))
        add(widths["select"][TWINS], 2)
        n_nodes = len(self.nodes) + len(self.spans)
        return CircuitPlan(n_nodes, len(self.edges), len(groups), rows, tokens)

    def settings(self) -> dict[str, Any]:
        """What is asked, as plain values, for the result."""
        here = self.batches["evaluate"][self.read_in]
        return {
            "read_in": self.read_in,
            "contrasts": list(self.contrasts),
            "n_select": len(self.select.harmful),
            "n_evaluate": len(here),
            "n_families_evaluate": len(set(self.families)),
            "evaluate_digest": here.digest,
            "twins_digest": self.batches["evaluate"][TWINS].digest,
            "n_reasoning": 0 if self.reasoning is None else len(self.reasoning),
        }


def _neuron_nodes(name: str, neurons: Neurons, facts: ModelFacts, asked: Sequence[Prompt]) -> list[Node]:
    given = neurons if isinstance(neurons, NeuronSet) else list(neurons)
    if not len(given):
        return []
    return neuron_nodes(name, neurons_to_edit(given, facts, asked))


def _contrasts(contrasts: Sequence[str], tuned: Model | None, read_in: str) -> list[str]:
    asked = [contrasts] if isinstance(contrasts, str) else list(dict.fromkeys(contrasts))
    if not asked:
        raise NotEnoughData("no contrast was given; name 'twins', a closed condition, or both.")
    if (TUNED in asked) != (tuned is not None):
        raise StatisticsError(
            f"contrasts={asked} with tuned={'a model' if tuned is not None else None}: 'tuned' compares with another model, so give"
            " both or neither."
        )
    if read_in in asked:
        raise ConditionError(f"{read_in!r} is what is read; a contrast is with another condition.")
    return asked
