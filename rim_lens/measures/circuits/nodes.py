"""Nodes of a circuit and the order in which they read and write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rim_lens.chat.spans import ATOMS, COMPOSITES
from rim_lens.errors import StatisticsError, UnknownNeuron, UnknownSpan
from rim_lens.hooks.ablating import by_layer
from rim_lens.lens import Head, ModelFacts
from rim_lens.measures.heads.effects import head_name

Kind = Literal["head", "neurons", "span", "end", "direction"]
Input = Literal["q", "k", "v", "mlp", "logits", "projection"]
Neuron = tuple[int, int]
HEAD_INPUTS: tuple[Input, ...] = ("q", "k", "v")


@dataclass(frozen=True, slots=True)
class Node:
    """A part of the model that sends, receives, or both.

    Attributes:
        name: "L0H5", "and L0", "request", "refusal".
        kind: A "head"; "neurons" of one layer, taken together; a "span" of the prompt, which heads read; the "end", the
            refusal score; or a "direction" of the stream.
        layer: Of a head or of neurons; of a direction, the one whose input it is read in; −1 for the others.
        members: The head's number, or the neurons'.
        vector: Of a direction, a unit vector.

    >>> head_node((0, 5)).name, END.name, span_node("request").kind
    ('L0H5', 'refusal', 'span')
    """

    name: str
    kind: Kind
    layer: int = -1
    members: tuple[int, ...] = ()
    vector: tuple[float, ...] = field(default=(), repr=False)

    @property
    def heads(self) -> list[Head]:
        """The head, in a list; empty for other kinds."""
        return [(self.layer, head) for head in self.members] if self.kind == "head" else []

    @property
    def neurons(self) -> list[Neuron]:
        """The neurons; none for other kinds."""
        return [(self.layer, neuron) for neuron in self.members] if self.kind == "neurons" else []

    def inputs(self) -> tuple[Input, ...]:
        """The ways in which it reads the residual stream."""
        ways: dict[Kind, tuple[Input, ...]] = {
            "head": HEAD_INPUTS,
            "neurons": ("mlp",),
            "end": ("logits",),
            "direction": ("projection",),
        }
        return ways.get(self.kind, ())


END = Node("refusal", "end")


def end_node() -> Node:
    """The refusal score as a node.

    >>> end_node().name
    'refusal'
    """
    return END


def head_node(head: Head) -> Node:
    """A head as a node.

    Args:
        head: (layer, head).
    """
    return Node(head_name(head), "head", int(head[0]), (int(head[1]),))


def neuron_nodes(name: str, neurons: Iterable[Neuron]) -> list[Node]:
    """A set of neurons as nodes, one for each layer: a layer's neurons read and write at one place.

    Args:
        name: The set's name.
        neurons: (layer, neuron) pairs.

    >>> [node.name for node in neuron_nodes("safety", [(0, 3), (1, 2), (0, 1)])]
    ['safety L0', 'safety L1']
    """
    return [
        Node(f"{name} L{layer}", "neurons", layer, tuple(places))
        for layer, places in by_layer(neurons).items()
    ]


def span_node(span: str) -> Node:
    """A span of the prompt as a node, which heads read by keys and values.

    Args:
        span: Its name.

    Raises:
        UnknownSpan: No span bears that name.
    """
    if span not in (*ATOMS, *COMPOSITES):
        raise UnknownSpan(f"no span is called {span!r}; there are {', '.join((*ATOMS, *COMPOSITES))}.")
    return Node(span, "span")


def checked_nodes(nodes: Iterable[Node], facts: ModelFacts) -> list[Node]:
    """Distinct nodes that the model has.

    Raises:
        UnknownHead: It lacks a head.
        UnknownNeuron: It lacks a neuron, or a node of neurons has none.
        StatisticsError: Two nodes bear one name, or there is none.
    """
    found = list(dict.fromkeys(nodes))
    if not found:
        raise StatisticsError("no node was given; give heads, neurons or both.")
    for node in found:
        facts.check_heads(node.heads)
        if node.kind == "neurons":
            if not node.members:
                raise UnknownNeuron(f"node {node.name!r} holds no neuron; leave it out.")
            facts.check_neurons(node.neurons)
    names = [node.name for node in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise StatisticsError(
            f"two nodes are called {twice[0]!r} and are not the same; edges are told by names, so rename one."
        )
    return found


def comes_before(sender: Node, receiver: Node) -> bool:
    """Whether what a sender writes can reach a receiver without anything between them.

    A head reads the stream before its layer, neurons read it after their layer's heads. A span is read by heads alone.

    >>> comes_before(head_node((0, 1)), Node("n", "neurons", 0, (3,))), comes_before(head_node((0, 1)), head_node((0, 2)))
    (True, False)
    """
    if sender.kind == "span":
        return receiver.kind == "head"
    if sender.kind not in ("head", "neurons"):
        return False
    if receiver.kind == "end":
        return True
    if sender.kind == "head" and receiver.kind == "neurons":
        return sender.layer <= receiver.layer
    return receiver.kind != "span" and sender.layer < receiver.layer


@dataclass(frozen=True, slots=True)
class Edge:
    """A way from a sender to one input of a receiver.

    >>> str(Edge(head_node((0, 5)), END, "logits"))
    'L0H5 → refusal'
    """

    sender: Node
    receiver: Node
    input: Input

    def __str__(self) -> str:
        told = f".{self.input}" if self.receiver.kind == "head" else ""
        return f"{self.sender.name} → {self.receiver.name}{told}"


def edges_between(senders: Sequence[Node], receivers: Sequence[Node]) -> list[Edge]:
    """Every edge from a sender to a receiver after it; a span reaches a head by its keys and values.

    >>> [str(edge) for edge in edges_between([head_node((0, 5)), span_node("request")], [head_node((1, 1)), END])]
    ['L0H5 → L1H1.q', 'L0H5 → L1H1.k', 'L0H5 → L1H1.v', 'request → L1H1.k', 'request → L1H1.v', 'L0H5 → refusal']
    """
    return [
        Edge(sender, receiver, way)
        for receiver in receivers
        for sender in senders
        if comes_before(sender, receiver)
        for way in receiver.inputs()
        if sender.kind != "span" or way in ("k", "v")
    ]
