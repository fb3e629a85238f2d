"""What senders write into the residual stream, and by how much it changes where they send something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rim_lens.chat.spans import SpanBatch
from rim_lens.hooks import record
from rim_lens.lens import Model, ModelFacts, Site
from rim_lens.measures.circuits.instead import Instead, edited
from rim_lens.measures.circuits.nodes import Node
from rim_lens.measures.ending import Ending, require_close


def recorded_spots(
    model: Model, batch: SpanBatch, spots: Iterable[tuple[Site, int]]
) -> dict[tuple[Site, int], Float[Tensor, "prompt pos ..."]]:
    """Activations of a plain run at (site, layer), in one pass; meanwhile every site of every layer named is in memory."""
    wanted = sorted(set(spots))
    found = record(
        model, batch, list(dict.fromkeys(site for site, _ in wanted)), {layer for _, layer in wanted}
    )
    return {spot: found.activations[spot] for spot in wanted}


class Writing:
    """The senders of one run: what each writes when it sends something else, minus what it writes as it is.

    Args:
        model: The model.
        facts: Of the model.
        batch: The prompts that are read.
        senders: Heads and nodes of neurons.
        instead: What they are made to send.
        ending: Of the batch; the sites that `Writing.needs` names among what it keeps.
        recorded: Activations of the run at `spots_written`, at least.

    Raises:
        UnsupportedModel: What heads or neurons write is not z W_O, or their activations × W_out, as this model normalises or
            scales it elsewhere.
    """

    def __init__(
        self,
        model: Model,
        facts: ModelFacts,
        batch: SpanBatch,
        senders: Sequence[Node],
        instead: Instead,
        ending: Ending,
        recorded: Mapping[tuple[Site, int], Float[Tensor, "prompt pos ..."]],
    ) -> None:
        self.model, self.facts = model, facts
        self.before = {spot: recorded[spot] for spot in spots_written(senders)}
        heads = [head for sender in senders for head in sender.heads]
        neurons = [neuron for sender in senders for neuron in sender.neurons]
        # What has no counterpart stays NaN.
        blank = {spot: torch.full_like(values, torch.nan) for spot, values in self.before.items()}
        self.after: dict[tuple[Site, int], Tensor] = {}
        if heads:
            self.after |= edited(instead.heads(heads), model, facts, batch, blank)
        if neurons:
            self.after |= edited(instead.neurons(neurons), model, facts, batch, blank)
        self._source_model = instead.source_model or model
        self._known: dict[str, Tensor] = {}
        for spot in self.before:
            self._prove(spot, ending)

    @staticmethod
    def needs(senders: Sequence[Node]) -> list[tuple[Site, int]]:
        """What an `Ending` must keep besides, for the proof."""
        return [
            (site, layer)
            for kind, layer in sorted(spots_written(senders))
            if kind == "post"
            for site in ("post", "mlp_out")
        ]

    def at(
        self,
        before: Mapping[tuple[Site, int], Float[Tensor, "prompt pos ..."]],
        after: Mapping[tuple[Site, int], Float[Tensor, "prompt pos ..."]] | None = None,
    ) -> Writing:
        """The same senders in an edited run, or, with what they send instead (by this model), on other prompts."""
        other = copy(self)
        other.before, other._known = dict(before), {}
        if after is not None:
            other.after, other._source_model = dict(after), self.model
        return other

    def change(self, sender: Node) -> Float[Tensor, "prompt pos d_model"]:
        """What the sender writes instead, minus what it writes; 0 where it sends the same, or has nothing to send instead.

        Another model's sender writes with its own weights; a norm behind the sender's layer is this model's.
        """
        if sender.name not in self._known:
            spot: tuple[Site, int] = ("z" if sender.kind == "head" else "post", sender.layer)
            columns = list(sender.members)
            after = self.after[spot][:, :, columns]
            change = _written(self._source_model, spot, after, columns) - _written(
                self.model, spot, self.before[spot][:, :, columns], columns
            )
            norm = _norm_after(self.model, spot)
            if norm is not None:
                whole = self._whole(spot, self.before[spot])
                with torch.no_grad():
                    change = norm(whole + change) - norm(whole)
            bare = after.flatten(2).isnan().any(dim=-1)
            self._known[sender.name] = change.float().cpu().masked_fill(bare[:, :, None], 0.0)
        return self._known[sender.name]

    def _whole(self, spot: tuple[Site, int], values: Tensor) -> Float[Tensor, "prompt pos d_model"]:
        """What all heads, or all neurons, of a layer write together, before any norm."""
        site, layer = spot
        block = self.model.blocks[layer]
        written = _written(self.model, spot, values, None)
        bias = getattr(block.attn, "b_O", None) if site == "z" else getattr(block.mlp, "b_out", None)
        return written if bias is None else written + bias.detach()

    def _prove(self, spot: tuple[Site, int], ending: Ending) -> None:
        site, layer = spot
        what = "heads of" if site == "z" else "neurons of"
        with torch.no_grad():
            whole = self._whole(spot, self.before[spot][:, -1:])
            norm = _norm_after(self.model, spot)
            whole = whole if norm is None else norm(whole)
        require_close(
            whole[:, 0].float().cpu(),
            ending.last.kept["attn_out" if site == "z" else "mlp_out", layer],
            self.facts,
            f"what the {what} layer {layer} write is not their activations × weights (something stands between them and the"
            " residual stream)",
        )


def _written(
    model: Model, spot: tuple[Site, int], values: Tensor, columns: list[int] | None
) -> Float[Tensor, "prompt pos d_model"]:
    """Activations [prompt, pos, column, ...] × their output weights."""
    site, layer = spot
    block = model.blocks[layer]
    weight = (block.attn.W_O if site == "z" else block.mlp.W_out).detach()
    weight = weight if columns is None else weight[columns]
    return values.to(weight).flatten(2) @ weight.flatten(0, -2)


def _norm_after(model: Model, spot: tuple[Site, int]) -> Any:
    """The norm that some models have between a layer's attention, or MLP, and the stream."""
    return getattr(model.blocks[spot[1]], "ln1_post" if spot[0] == "z" else "ln2_post", None)


def spots_written(nodes: Sequence[Node]) -> set[tuple[Site, int]]:
    """Where what these nodes send is read off."""
    return {
        ("z" if node.kind == "head" else "post", node.layer)
        for node in nodes
        if node.kind in ("head", "neurons")
    }
