"""What receivers make of an edited input: their own norm and projections, proven to be the model's on the run as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rim_lens.errors import UnsupportedModel
from rim_lens.hooks.putting import Values
from rim_lens.lens import Head, Model, ModelFacts, Site, hook_name, hooked, quiet
from rim_lens.measures.circuits.nodes import Input, Node
from rim_lens.measures.ending import require_close

Recorded = Mapping[tuple[Site, int], Float[Tensor, "prompt pos ..."]]


def siblings(facts: ModelFacts, head: Head) -> list[int]:
    """The other heads of a layer that share a head's keys and values."""
    group = facts.n_heads // facts.n_key_value_heads
    first = head[1] // group * group
    return [other for other in range(first, first + group) if other != head[1]]


def spots_read(nodes: Sequence[Node]) -> set[tuple[Site, int]]:
    """Where what these nodes read stands, and what the other heads of their layers put out."""
    sites: dict[str, tuple[Site, ...]] = {"head": ("resid_pre", "z"), "neurons": ("resid_mid",)}
    return {(site, node.layer) for node in nodes for site in sites.get(node.kind, ())}


def spots_proven(nodes: Sequence[Node]) -> set[tuple[Site, int]]:
    """What their reading is held against."""
    sites: dict[str, tuple[Site, ...]] = {"head": ("q", "k", "v"), "neurons": ("post",)}
    return {(site, node.layer) for node in nodes for site in sites.get(node.kind, ())}


class Receiver:
    """A head, or neurons of one layer, on a batch.

    Args:
        model: The model.
        facts: Of the model.
        node: The head or neurons.
        recorded: The run at `spots_read`, at least.
        proof: The first prompt of it at `spots_proven`.

    Raises:
        UnsupportedModel: The model does not read its stream by norm and projection (attention and MLP side by side, shared
            inputs, projections in one piece).
    """

    def __init__(
        self, model: Model, facts: ModelFacts, node: Node, recorded: Recorded, proof: Recorded
    ) -> None:
        self.model, self.facts, self.node, self.recorded = model, facts, node, recorded
        self.stream = recorded[self._reads]
        self._prove(proof)

    def at(self, recorded: Recorded) -> Receiver:
        """The same receiver in another run of the model: an edited one, or one on other prompts."""
        other = copy(self)
        other.recorded, other.stream = recorded, recorded[self._reads]
        return other

    @property
    def _reads(self) -> tuple[Site, int]:
        return ("resid_pre" if self.node.kind == "head" else "resid_mid", self.node.layer)

    def values(self, way: Input, streams: Float[Tensor, "run prompt pos d_model"]) -> Values:
        """What to put in place so that this node alone reads these streams, by one of its inputs.

        Rows are those of the first stream, then the second, and so on. The other heads that share a key-value head keep their z.
        """
        n_runs = len(streams)
        spot, columns = self.spot(way)
        values = {spot: (columns, self.heard(way, streams.flatten(0, 1)))}
        others = siblings(self.facts, self.node.heads[0]) if way in ("k", "v") else []
        if not others:
            return values
        kept = self.recorded["z", self.node.layer][:, :, others]
        return {**values, ("z", self.node.layer): (others, kept.repeat(n_runs, *[1] * (kept.ndim - 1)))}

    def spot(self, way: Input) -> tuple[tuple[Site, int], list[int]]:
        """Where what it makes of an input stands, and in which columns."""
        layer, members = self.node.layer, list(self.node.members)
        if way == "mlp":
            return ("post", layer), members
        site: Site = way  # type: ignore[assignment]
        return (site, layer), [self._column(way)]

    def heard(
        self, way: Input, stream: Float[Tensor, "prompt pos d_model"]
    ) -> Float[Tensor, "prompt pos column ..."]:
        """What it makes of a stream by one of its inputs."""
        _, columns = self.spot(way)
        found = self._post(stream) if way == "mlp" else self._projected(way, stream)
        return found[:, :, columns]

    def _column(self, way: Input) -> int:
        head = self.node.members[0]
        return head if way == "q" else head // (self.facts.n_heads // self.facts.n_key_value_heads)

    def _projected(
        self, way: Input, stream: Float[Tensor, "prompt pos d_model"]
    ) -> Float[Tensor, "prompt pos head d_head"]:
        """Queries, keys or values of a stream, before norms and rotation of their own."""
        block = self.model.blocks[self.node.layer]
        weight = getattr(block.attn, f"W_{way.upper()}").detach()
        bias = getattr(block.attn, f"b_{way.upper()}", None)
        n_heads = self.facts.n_heads if way == "q" else self.facts.n_key_value_heads
        # HookedTransformer repeats key-value heads for each query head that shares them.
        weight = weight[:: weight.shape[0] // n_heads]
        with torch.no_grad(), quiet():
            normed = block.ln1(stream.to(weight))
            found = torch.einsum("psm,hmd->pshd", normed, weight)
            if bias is not None:
                found = found + bias[:: bias.shape[0] // n_heads]
        return found.cpu()

    def _post(self, stream: Float[Tensor, "prompt pos d_model"]) -> Float[Tensor, "prompt pos neuron"]:
        block = self.model.blocks[self.node.layer]
        kept: list[Tensor] = []
        hook = (hook_name("post", self.node.layer), partial(_keep, kept=kept))
        with torch.no_grad(), quiet(), hooked(self.model, [hook]):
            block.mlp(block.ln2(stream.to(device=self.facts.device, dtype=self.facts.dtype)))
        return kept[-1].detach().cpu()

    def _prove(self, proof: Recorded) -> None:
        layer = self.node.layer
        ways: tuple[Input, ...] = self.node.inputs()
        sites: list[Site] = ["post" if way == "mlp" else way for way in ways]  # type: ignore[misc]
        width = proof[sites[0], layer].shape[1]
        stream = self.stream[:1, -width:]
        for way, site in zip(ways, sites, strict=True):
            try:
                found = self._post(stream) if way == "mlp" else self._projected(way, stream)
                if found.shape != proof[site, layer].shape:
                    raise ValueError(f"shape {tuple(found.shape)}")
            except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as problem:
                raise UnsupportedModel(
                    f"{self.node.name} of this {self.facts.architecture or 'model'} was to be given an edited input, and its"
                    f" {way} cannot be computed from the residual stream by the model's own norm and projection ({problem})."
                    " Use ablations (rl.head_effects, rl.neuron_effects) instead."
                ) from problem
            require_close(
                found.float(),
                proof[site, layer].float(),
                self.facts,
                f"{way} of {self.node.name} is not norm and projection of the residual stream before it",
            )


def one_after_another(parts: Sequence[Values]) -> Values:
    """Values for the rows of the first part, then of the second, and so on; NaN, which leaves the pass its own, where a part has none."""
    counts = [len(next(iter(part.values()))[1]) for part in parts]
    found: dict[tuple[Site, int], tuple[list[int], Tensor]] = {}
    for spot in dict.fromkeys(spot for part in parts for spot in part):
        columns, like = next(part[spot] for part in parts if spot in part)
        rows = [
            part[spot][1] if spot in part else like.new_full((count, *like.shape[1:]), torch.nan)
            for part, count in zip(parts, counts, strict=True)
        ]
        found[spot] = (columns, torch.cat(rows))
    return found


def _keep(value: Tensor, hook: Any, kept: list[Tensor]) -> None:  # noqa: ARG001
    kept.append(value)
