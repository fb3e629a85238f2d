"""Means over a reference set of prompts, for mean ablation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from rim_lens.chat.spans import ATOMS, SpanBatch
from rim_lens.errors import NotFinite, ReferenceMismatch
from rim_lens.hooks.base import check_vocabulary
from rim_lens.hooks.positions import Positions, chosen_rows, is_word, told
from rim_lens.lens import Model, ModelFacts, Site, hook_name, hooked, last_logits, quiet
from rim_lens.sharing import each, row_groups

# One mean for all rows; one for each atom; one for each place within an atom, counted from its end or start
Per = Literal["all", "span", "position"]


_sharing = threading.local()


@contextmanager
def shared_means() -> Iterator[None]:
    """Within this context means of one reference, at one site and the same rows, are taken once, of all layers.

    For many editors of one model that is not changed meanwhile.
    """
    before = getattr(_sharing, "known", None)
    _sharing.known = {}
    try:
        yield
    finally:
        _sharing.known = before


def slots(
    batch: SpanBatch, per: Per, from_end: bool = True, width: int | None = None
) -> Int[Tensor, "prompt pos"]:
    """Number the rows so that those with one number share a mean; −1 on padding.

    Args:
        batch: The prompts.
        per: "all" (one number), "span" (the atom's) or "position" (the atom's times width, plus the rank within it).
        from_end: Whether ranks count from the atom's end.
        width: Ranks there are; a row beyond gets −1. The batch's own width when None.
    """
    real = batch.attention_mask.bool().cpu()
    if per == "all":
        return torch.where(real, 0, -1)
    width = batch.tokens.shape[1] if width is None else width
    found = torch.full(real.shape, -1)
    for number, atom in enumerate(ATOMS):
        mask = batch.spans[atom].cpu()
        if per == "span":
            found[mask] = number
            continue
        rank = mask.long().cumsum(dim=1) - 1
        if from_end:
            rank = mask.sum(dim=1, keepdim=True) - 1 - rank
        here = mask & (rank < width)
        found[here] = number * width + rank[here]
    return found


def reference_means(
    model: Model,
    facts: ModelFacts,
    reference: SpanBatch,
    site: Site,
    layers: list[int],
    positions: Positions,
    per: Per = "all",
    from_end: bool = True,
) -> dict[int, Tensor]:
    """Mean activation by layer and slot, of the model without any rim_lens component.

    Each row weighs the same, padding left out. With per="all" the rows are the chosen ones of every prompt; else all.

    Returns:
        By layer, [slot, ...] in float64; NaN in slots that no reference row is in.

    Raises:
        ReferenceMismatch: The reference tokens are not of this model's vocabulary, or no row is chosen.
        NotFinite: A mean is NaN or infinite.
    """
    known: dict[tuple[Any, ...], dict[int, Tensor]] | None = getattr(_sharing, "known", None)
    if known is None:
        return _means(model, facts, reference, site, layers, positions, per, from_end)
    rows = positions if isinstance(positions, str) else id(positions)
    key = (id(model), id(reference), site, rows, per, from_end)
    if key not in known:
        every = list(range(facts.n_layers))
        known[key] = _means(model, facts, reference, site, every, positions, per, from_end)
    return {layer: known[key][layer] for layer in layers}


def _means(
    model: Model,
    facts: ModelFacts,
    reference: SpanBatch,
    site: Site,
    layers: list[int],
    positions: Positions,
    per: Per,
    from_end: bool,
) -> dict[int, Tensor]:
    check_vocabulary(model, reference, "the reference set")
    places = reference_slots(reference, positions, per, from_end)
    n_slots = int(places.max()) + 1
    counts = torch.bincount(places[places >= 0], minlength=n_slots)
    homes: dict[int, torch.device] = {}

    def added(rows: list[int]) -> dict[int, Tensor]:
        own: dict[int, Tensor] = {}
        part = reference.select(rows)
        slot = places[rows][:, -part.tokens.shape[1] :]
        hooks = [
            (hook_name(site, layer), partial(_add, sums=own, layer=layer, slot=slot, n_slots=n_slots))
            for layer in layers
        ]
        with quiet(), hooked(model, hooks):
            last_logits(model, part.tokens, part.attention_mask)
        homes.update({layer: total.device for layer, total in own.items()})
        return {layer: total.cpu() for layer, total in own.items()}

    # In float64 and in the same order in every process, so that all have the same means.
    sums: dict[int, Tensor] = {}
    for found in each(row_groups(reference.lengths.tolist()), added, f"mean of {site}"):
        sums = {layer: total + sums[layer] if layer in sums else total for layer, total in found.items()}
    sums = {layer: total.to(homes.get(layer, facts.device)) for layer, total in sums.items()}
    for layer, total in sums.items():
        if not bool(total.isfinite().all()):
            raise NotFinite(
                f"the mean of {site!r} in layer {layer} over the reference prompts is NaN or infinite. Check the weights, or"
                " load the model in float32."
            )
    return {
        layer: total / counts.to(total).view(-1, *[1] * (total.ndim - 1)) for layer, total in sums.items()
    }


def reference_slots(
    reference: SpanBatch, positions: Positions, per: Per, from_end: bool
) -> Int[Tensor, "prompt pos"]:
    """Which mean each reference row enters; −1 where it enters none.

    Raises:
        ReferenceMismatch: No row is chosen, or a mask has another shape.
    """
    places = slots(reference, per, from_end)
    if per == "all":
        if isinstance(positions, Tensor) and positions.shape != reference.tokens.shape:
            raise ReferenceMismatch(
                f"positions is a mask of shape {tuple(positions.shape)}, which cannot pick rows of a reference set of shape"
                f" {tuple(reference.tokens.shape)}. Name a span instead of passing a mask."
            )
        places[~chosen_rows(positions, reference, 0, *reference.tokens.shape)] = -1
    if not (places >= 0).any():
        advice = (
            " These prompts hold no generated token: give what a model wrote, reference=rl.generate(...).batch."
            if is_word(positions, "generated")
            else ""
        )
        raise ReferenceMismatch(
            "no row of the reference set is chosen by"
            f" positions={told(positions)}; a mean over nothing is undefined.{advice}"
        )
    return places


def _add(
    activation: Tensor,
    hook: object,  # noqa: ARG001
    sums: dict[int, Tensor],
    layer: int,
    slot: Int[Tensor, "prompt row"],
    n_slots: int,
) -> None:
    if layer not in sums:
        sums[layer] = activation.new_zeros(n_slots, *activation.shape[2:], dtype=torch.float64)
    taken = (slot >= 0).to(activation.device)
    index = slot.to(activation.device)[taken]
    sums[layer].index_add_(0, index, activation[taken].to(torch.float64))
