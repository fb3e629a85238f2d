"""Means over a reference set of prompts, for mean ablation."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rim_lens.batching import micro_batches
from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import ReferenceMismatch
from rim_lens.hooks.positions import Positions, chosen_rows
from rim_lens.lens import Model, ModelFacts, Site, hook_name, hooked, last_logits, quiet


def reference_means(
    model: Model,
    facts: ModelFacts,
    reference: SpanBatch,
    site: Site,
    layers: list[int],
    positions: Positions,
) -> dict[int, Tensor]:
    """Mean activation over prompts and rows, by layer, of the model without any rim_lens component.

    Rows are the chosen ones of every prompt, padding left out; each row weighs the same.

    Raises:
        ReferenceMismatch: The reference tokens are not of this model's vocabulary, or no row is chosen.
    """
    top = int(reference.tokens.max())
    if top >= facts.d_vocab:
        raise ReferenceMismatch(
            f"the reference set holds token {top}, but this model's vocabulary ends at {facts.d_vocab - 1}: it was"
            " rendered for another model. Render the reference prompts with this model's ChatFormat."
        )
    if isinstance(positions, Tensor) and positions.shape != reference.tokens.shape:
        raise ReferenceMismatch(
            f"positions is a mask of shape {tuple(positions.shape)}, which cannot pick rows of a reference set of shape"
            f" {tuple(reference.tokens.shape)}. Name a span instead of passing a mask."
        )
    sums: dict[int, Tensor] = {}
    count = 0
    for rows in micro_batches(reference.lengths.tolist()):
        part = reference.select(rows)
        mask = positions[rows][:, -part.tokens.shape[1] :] if isinstance(positions, Tensor) else positions
        chosen = chosen_rows(mask, part, 0, *part.tokens.shape) & part.attention_mask.bool()
        count += int(chosen.sum())
        hooks = [
            (hook_name(site, layer), partial(_add, sums=sums, layer=layer, rows=chosen)) for layer in layers
        ]
        with quiet(), hooked(model, hooks):
            last_logits(model, part.tokens, part.attention_mask)
    if count == 0:
        raise ReferenceMismatch(
            "no row of the reference set is chosen by positions; a mean over nothing is undefined."
        )
    return {layer: total / count for layer, total in sums.items()}


def _add(activation: Tensor, hook: object, sums: dict[int, Tensor], layer: int, rows: Tensor) -> None:  # noqa: ARG001
    part = activation[rows.to(activation.device)].to(torch.float64).sum(dim=0)
    sums[layer] = sums[layer] + part if layer in sums else part
