"""Effects along direct paths: what changes when one receiver alone hears one sender alone say something else.

A sender (a head, neurons of a layer, a span) writes into the residual stream, and every later part of the model reads the
sum. An *edge* goes from one sender to one input of one receiver: queries, keys or values of a head, the MLP input of
neurons, the final norm and unembedding. Its effect is exact path patching (Wang et al. 2211.00593, section 3.1, with all between
sender and receiver held as it was): the receiver's input is computed anew, by the model's own norm and projection, from the
stream − what the sender writes + what it writes instead; what the receiver then puts out goes in place, and everything
after it runs freely. What it says instead is another run's (`patched`) or nothing of its own (`ablated`).

effect = edited − baseline, in nats of refusal log-odds: negative where the edge, as it is, carries refusal.

`transformer_lens.patching.get_act_patch_direct_path` does this for heads on a bridge without grouped keys and values, one
pass an edge, without an attention mask; its edge attribution and faithfulness refuse grouped-query models and work on one
prompt at a time. Hence this module, which is held against it where both work (tests/measures/circuits/test_paths.py).

What an edge does not show: ways through parts in between (each an edge of its own, and their effects do not add up); what
the receiver's other inputs would have made good; and that the sender means by it what the words suggest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from rim_lens.batching import MAX_ROWS
from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import StatisticsError
from rim_lens.hooks import BlockAttention, Component
from rim_lens.hooks.putting import Put
from rim_lens.lens import Model, ModelFacts, Site, verify
from rim_lens.measures.circuits.instead import Instead, edited
from rim_lens.measures.circuits.nodes import Edge, Input, Node, checked_nodes, edges_between
from rim_lens.measures.circuits.reading import Receiver, one_after_another, spots_proven, spots_read
from rim_lens.measures.circuits.settling import next_word_odds, settled
from rim_lens.measures.circuits.writing import Writing, recorded_spots, spots_written
from rim_lens.measures.ending import Ending, read_ending
from rim_lens.measures.refusal.first_word import Skip
from rim_lens.measures.refusal.rates import families_of

if TYPE_CHECKING:
    import xarray as xr

_EDITED: dict[str, tuple[Site, ...]] = {"head": ("q", "k", "v", "z"), "neurons": ("post",)}


def path_effects(
    model: Model,
    batch: SpanBatch,
    senders: Iterable[Node],
    receivers: Iterable[Node],
    instead: Instead,
    *,
    edges: Iterable[Edge] | None = None,
    openers: Iterable[str] | None = None,
    skip: Skip = "greedy",
    whitespace: str | None = None,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> xr.Dataset:
    """Effect of every edge from senders to receivers on the refusal score, prompt by prompt.

    Edges into the refusal score itself need no pass: final norm and unembedding are computed exactly, as `direct_effects`
    does. All others of one receiver run as one batch, with a row for each edge and prompt.

    An edge shows that this receiver uses what this sender writes, by this input. It does not show ways through third parts, senders
    that must speak together, or what the words mean; see docs/circuits.md.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts whose think block is closed.
        senders: Nodes that say something else (`head_node`, `neuron_nodes`, `span_node`).
        receivers: Nodes that hear it: heads, neurons, `end_node()`; or a `direction_node`, of which the effect is the change
            of the last row's projection, in units of the residual stream.
        instead: What is said instead, `patched` or `ablated`.
        edges: Only these; every edge between them when None.
        openers: See `refusal_score`.
        skip: Which whitespace is passed over before the answer; see `settled`.
        whitespace: See `refusal_score`.
        max_rows: Most prompts in one pass.
        progress: Show a progress bar.

    Returns:
        Dataset with ``effect`` (prompt, edge), edited − baseline in nats, ``baseline`` (prompt), and coordinates ``edge``
        (its name), ``sender``, ``receiver``, ``input`` (edge) and ``family`` (prompt). NaN for keys of a span whose values are
        zeroed: keys of zero would be keys as others.

    Raises:
        UnsupportedModel: The stream is not the sum of what is written, or is not read by norm and projection.
        UnknownHead, UnknownNeuron, UnknownSpan: The model or the prompts lack a node.
        StatisticsError: Nothing sends or nothing receives, two nodes share a name, or no edge runs between them.
        ReferenceMismatch: What is sent instead is of other prompts or shapes.
        ConditionError: The think block is open.
        NotFinite: NaN or infinity in logits or activations.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> asked, twins = (rl.load_prompts(kind, language="toy", split="select")[:2] for kind in ("harmful", "harmless"))
    >>> off, other = (chat.render(prompts, think="off") for prompts in (asked, twins))
    >>> reader, decoy = rl.head_node((1, 1)), rl.head_node((1, 2))
    >>> found = rl.path_effects(model, off, [reader, decoy], [rl.end_node()], rl.patched(other))
    >>> (found["effect"].mean("prompt") < -10).to_series().to_dict()
    {'L1H1 → refusal': True, 'L1H2 → refusal': False}
    """
    import xarray as xr

    run = PathRun(model, batch, senders, receivers, instead, openers, skip, whitespace, max_rows)
    asked = list(edges_between(run.senders, run.receivers) if edges is None else edges)
    effects = run.effects(asked, progress)
    return xr.Dataset(
        {
            "effect": (
                ("prompt", "edge"),
                effects,
                {"units": "nats", "sign": "edited − baseline", "instead": repr(instead)},
            ),
            "baseline": (("prompt",), run.ending.baseline, {"units": "nats"}),
        },
        coords={
            "prompt": [prompt.id for prompt in batch.prompts],
            "family": ("prompt", families_of(batch.prompts)),
            "edge": [str(edge) for edge in asked],
            "sender": ("edge", [edge.sender.name for edge in asked]),
            "receiver": ("edge", [edge.receiver.name for edge in asked]),
            "input": ("edge", [edge.input for edge in asked]),
        },
        attrs={"condition": batch.name, "skip": skip},
    )


class PathRun:
    """A run that is read along its paths; see `path_effects`."""

    def __init__(
        self,
        model: Model,
        batch: SpanBatch,
        senders: Iterable[Node],
        receivers: Iterable[Node],
        instead: Instead,
        openers: Iterable[str] | None = None,
        skip: Skip = "greedy",
        whitespace: str | None = None,
        max_rows: int = MAX_ROWS,
    ) -> None:
        told, hear = list(senders), list(receivers)
        reads: list[Site] = ["z", "attn_out", "mlp_out", "resid_pre", "resid_post"]
        edits = {site for node in hear for site in _EDITED.get(node.kind, ())}
        if "neurons" in {node.kind for node in told}:
            reads.append("post")
        self.facts: ModelFacts = verify(model, reads=reads, edits=sorted(edits))
        self.senders = checked_nodes(told, self.facts)
        self.receivers = checked_nodes(hear, self.facts)
        checked_nodes([*self.senders, *self.receivers], self.facts)
        settle = {"skip": skip, "whitespace": whitespace, "max_rows": max_rows}
        self.model, self.max_rows = model, max_rows
        self.batch = settled(model, batch, what="path_effects", **settle)  # type: ignore[arg-type]
        if instead.source is not None:
            source = settled(
                instead.source_model or model,
                instead.source,
                what="path_effects",
                **settle,  # type: ignore[arg-type]
            )
            instead = instead.with_source(source)
        self.instead = instead
        writers = [node for node in self.senders if node.kind in ("head", "neurons")]
        self.ending: Ending = read_ending(
            model,
            self.facts,
            self.batch,
            openers,
            skip="none",
            whitespace=None,
            max_rows=max_rows,
            also=Writing.needs(writers),
            what="path_effects",
        )
        spots = spots_written(writers) | spots_read(self.receivers)
        self.recorded = recorded_spots(model, self.batch, spots) if spots else {}
        proven = spots_proven(self.receivers)
        self.proof = recorded_spots(model, self.batch.select([0]), proven) if proven else {}
        self.writing = (
            Writing(model, self.facts, self.batch, writers, instead, self.ending, self.recorded)
            if writers
            else None
        )

    def effects(self, edges: Sequence[Edge], progress: bool = False) -> Float[np.ndarray, "prompt edge"]:
        """Effect of each edge, edited − baseline, nats."""
        possible = set(edges_between(self.senders, self.receivers))
        strange = [edge for edge in edges if edge not in possible]
        if strange or not edges:
            raise StatisticsError(
                f"the edge {strange[0]} was asked for, and no such way exists between these nodes."
                if strange
                else "no edge runs from these senders to these receivers: a receiver comes after what it hears, a span is heard"
                " by heads alone."
            )
        effects = np.full((len(self.batch), len(edges)), np.nan)
        groups: dict[Node, list[int]] = {}
        for place, edge in enumerate(edges):
            groups.setdefault(edge.receiver, []).append(place)
        for node, places in tqdm(groups.items(), desc=f"paths {self.batch.name}", disable=not progress):
            hears = [edges[place] for place in places]
            if node.kind in ("end", "direction"):
                effects[:, places] = self._at_last_row(node, hears)
                continue
            effects[:, places] = self._at(self.receiver(node), hears)
        return effects

    def receiver(self, node: Node) -> Receiver:
        """A head or neurons that hear, on these prompts."""
        return Receiver(self.model, self.facts, node, self.recorded, self.proof)

    def _at_last_row(self, node: Node, edges: Sequence[Edge]) -> Float[np.ndarray, "prompt edge"]:
        assert self.writing is not None  # noqa: S101 - a span reaches heads alone
        changes = torch.stack([self.writing.change(edge.sender)[:, -1] for edge in edges], dim=1)
        if node.kind == "direction":
            return (changes.double() @ torch.tensor(node.vector, dtype=torch.float64)).numpy()
        return self.ending.effects(-changes)

    def _at(self, receiver: Receiver, edges: Sequence[Edge]) -> Float[np.ndarray, "prompt edge"]:
        found = np.zeros((len(self.batch), len(edges)))
        streams: dict[Node, Tensor] = {}
        moved: dict[Input, list[int]] = {}
        for place, edge in enumerate(edges):
            if edge.sender.kind == "span" and self.instead.method == "zero":
                found[:, place] = self._without_span(edge)
                continue
            if edge.sender not in streams:
                streams[edge.sender] = self.stream(receiver, edge.sender)
            # What is not changed has no effect, and needs no pass to say so.
            if not torch.equal(streams[edge.sender], receiver.stream):
                moved.setdefault(edge.input, []).append(place)
        if moved:
            parts = [
                receiver.values(way, torch.stack([streams[edges[place].sender] for place in places]))
                for way, places in moved.items()
            ]
            places = [place for some in moved.values() for place in some]
            repeated = self.batch.select([*range(len(self.batch))] * len(places))
            scores = self._scores(repeated, [Put(one_after_another(parts))])
            found[:, places] = (scores.reshape(len(places), -1) - self.ending.baseline).T
        return found

    def stream(self, receiver: Receiver, sender: Node) -> Float[Tensor, "prompt pos d_model"]:
        """What a receiver reads where the sender sends something else."""
        if sender.kind != "span":
            assert self.writing is not None  # noqa: S101 - made where a head or neurons send
            change = self.writing.change(sender)
            return (receiver.stream.float() + change).to(receiver.stream.dtype)
        return self.with_span(receiver.stream, receiver.node.layer, sender)

    def with_span(
        self, stream: Float[Tensor, "prompt pos d_model"], layer: int, span: Node
    ) -> Float[Tensor, "prompt pos d_model"]:
        """A stream before a layer, in the rows of a span as it is in the other run."""
        layers = sorted({node.layer for node in self.receivers if node.kind == "head"})
        spot: tuple[Site, int] = ("resid_pre", layer)
        editor = self.instead.stream(self.model, layers, layer, span.name)
        editor.check_prompts(self.batch)
        return edited(editor, self.model, self.facts, self.batch, {spot: stream})[spot]

    def _without_span(self, edge: Edge) -> Float[np.ndarray, " prompt"]:
        """The head loses the span's values; to zero keys would be to make them any keys, so that these have no effect."""
        if edge.input == "k":
            return np.full(len(self.batch), np.nan)
        blocking = BlockAttention("all", edge.sender.name, edge.receiver.heads, mute=True)
        return self._scores(self.batch, [blocking]) - self.ending.baseline

    def _scores(self, batch: SpanBatch, components: Sequence[Component]) -> Float[np.ndarray, " prompt"]:
        return next_word_odds(self.model, batch, components, self.ending.ids, self.max_rows)
