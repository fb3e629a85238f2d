"""A model reduced to some of its heads and neurons, all others made to say what they say on other prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rim_lens.chat.spans import SpanBatch
from rim_lens.hooks.ablating import by_layer
from rim_lens.hooks.putting import Put
from rim_lens.lens import Head, Model, ModelFacts, Site
from rim_lens.measures.circuits.instead import Instead, edited
from rim_lens.measures.circuits.nodes import Neuron, Node


class Replacements:
    """What every head and neuron of a batch would be replaced by, worked out once.

    Rows that have no counterpart (a place that no reference prompt has) are left to the model.

    Attributes:
        values: By (site, layer), every head's z and every neuron's activation, NaN where there is no counterpart.

    Args:
        model: The model.
        facts: Of the model.
        batch: Prompts that will be read.
        instead: What is put in place.
        with_neurons: Of neurons too, and not of heads alone.

    Attributes:
        values: By (site, layer), [prompt, pos, head or neuron, ...]; NaN where a row has no counterpart.
    """

    def __init__(
        self, model: Model, facts: ModelFacts, batch: SpanBatch, instead: Instead, with_neurons: bool
    ) -> None:
        self.facts = facts
        shape = batch.tokens.shape
        blank: dict[tuple[Site, int], Tensor] = {}
        for layer in range(facts.n_layers):
            blank["z", layer] = torch.full(
                (*shape, facts.n_heads, facts.d_head), torch.nan, dtype=facts.dtype
            )
            if with_neurons:
                blank["post", layer] = torch.full((*shape, facts.d_mlp), torch.nan, dtype=facts.dtype)
        editor = instead.heads(facts.heads())
        editor.check_prompts(batch)
        self.values = edited(editor, model, facts, batch, blank)
        if with_neurons:
            editor = instead.neurons(every_neuron(facts))
            editor.check_prompts(batch)
            self.values |= edited(editor, model, facts, batch, blank)

    def of(self, heads: Iterable[Head], neurons: Iterable[Neuron]) -> list[Put]:
        """An editor that replaces these, in a list; none where nothing is named."""
        values: dict[tuple[Site, int], tuple[list[int], Float[Tensor, "prompt pos column ..."]]] = {}
        for site, units in (("z", heads), ("post", neurons)):
            for layer, columns in by_layer(units).items():
                spot: tuple[Site, int] = (site, layer)  # type: ignore[assignment]
                values[spot] = (columns, self.values[spot][:, :, columns])
        return [Put(values)] if values else []


def every_neuron(facts: ModelFacts) -> list[Neuron]:
    """All (layer, neuron) of a model."""
    return [(layer, neuron) for layer in range(facts.n_layers) for neuron in range(facts.d_mlp)]


def members(nodes: Sequence[Node]) -> tuple[list[Head], list[Neuron]]:
    """The heads and the neurons of some nodes, each once."""
    heads = {head for node in nodes for head in node.heads}
    neurons = {neuron for node in nodes for neuron in node.neurons}
    return sorted(heads), sorted(neurons)
