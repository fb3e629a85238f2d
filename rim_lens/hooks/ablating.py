"""What ablations of heads and of neurons share: chosen columns of an activation are taken from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from rim_lens.chat.spans import ATOMS, SpanBatch
from rim_lens.errors import EmptySpan, ReferenceMismatch
from rim_lens.hooks.alignment import Align, check_rule
from rim_lens.hooks.base import Edit, describe
from rim_lens.hooks.editing import AligningEditor, Change, Rows
from rim_lens.hooks.own_pass import OwnPass
from rim_lens.hooks.pairing import Pairing, require_batch
from rim_lens.hooks.positions import Positions, chosen_rows
from rim_lens.hooks.recording import record
from rim_lens.hooks.reference import Per, reference_means, reference_slots, slots
from rim_lens.lens import Model, ModelFacts, Site

Method = Literal["zero", "mean", "resample"]


class Ablation(AligningEditor):
    """Replace columns of an activation, at chosen rows, by zero, by a mean, or by those of another prompt."""

    site: ClassVar[Site]

    def __init__(
        self,
        method: Method,
        reference: SpanBatch | None,
        positions: Positions,
        per: Per,
        align: Align,
        seed: int,
    ) -> None:
        super().__init__(positions)
        if method not in ("zero", "mean", "resample"):
            raise ValueError(f"method {method!r} was asked for; there are 'zero', 'mean' and 'resample'.")
        if (method != "zero") != (reference is not None):
            raise ReferenceMismatch(
                f"method={method!r} with reference={'a batch' if reference is not None else None}: a mean and a resampling"
                " need the prompts they are taken from (reference=batch), and zero takes none."
            )
        if per not in ("all", "span", "position"):
            raise ValueError(f"per={per!r} was asked for; there are 'all', 'span' and 'position'.")
        if per != "all" and method != "mean":
            raise ValueError(
                f"per={per!r} says what a mean is taken over, but method is {method!r}; leave it out."
            )
        check_rule(align)
        if align == "stretch" and per == "position":
            raise ValueError(
                "align='stretch' has no fixed places within a span that prompts of unequal length could be averaged at;"
                " use 'end' or 'start'."
            )
        self.method = method
        self.reference = reference
        self.per = per
        self.align = align
        self.seed = seed
        self._pairing = (
            Pairing(reference, align, seed) if reference is not None and method == "resample" else None
        )

    def what(self) -> list[tuple[int, int]]:
        """The heads or neurons as given. Override this."""
        raise NotImplementedError

    def chosen(self, facts: ModelFacts) -> dict[int, list[int]]:
        """Columns to replace, by layer. Override this."""
        raise NotImplementedError

    def __repr__(self) -> str:
        told = f"{self.what()}, {self.method!r}"
        if self.reference is not None:
            told += f", reference={describe(self.reference)}"
        if self.per != "all":
            told += f", per={self.per!r}"
        if self.method == "resample":
            told += f", seed={self.seed}"
        if self.method == "resample" or self.per == "position":
            told += f", align={self.align!r}"
        return f"{type(self).__name__}({told}, positions={describe(self.positions)})"

    @override
    def edited_sites(self) -> tuple[Site, ...]:
        return (self.site,)

    @property
    @override
    def by_row(self) -> bool:
        return self.method == "resample" or self.per != "all"

    @override
    def check_prompts(self, batch: SpanBatch) -> None:
        super().check_prompts(batch)
        if self._pairing is not None:
            self._unaligned = self._pairing.check(batch, self.positions, type(self).__name__)
        elif self.by_row:
            self._unaligned = self._check_means(batch)
        else:
            self._unaligned = torch.zeros(len(batch), dtype=torch.long)

    def _check_means(self, batch: SpanBatch) -> Int[Tensor, " prompt"]:
        assert self.reference is not None  # noqa: S101 - told to the type checker: __init__ saw to it
        places = self._slots(batch)
        taken = reference_slots(self.reference, self.positions, self.per, self.align == "end")
        known = torch.isin(places, taken[taken >= 0])
        rows = chosen_rows(self.positions, batch, 0, *batch.tokens.shape) & batch.attention_mask.bool().cpu()
        if self.per == "span" and (rows & ~known).any():
            prompt, pos = (rows & ~known).nonzero()[0].tolist()
            raise EmptySpan(
                f"the span {ATOMS[int(places[prompt, pos])]!r} of prompt {batch.prompts[prompt].id!r} has no token in any"
                f" of the {len(self.reference)} reference prompts, so it has no mean. Give reference prompts that have it,"
                " or name the positions to edit."
            )
        bare = (~(rows & known).any(dim=1)).nonzero().flatten().tolist()
        if bare:
            raise EmptySpan(
                f"positions={describe(self.positions)} has no row with a mean of its own (per={self.per!r}) in {len(bare)}"
                f" of {len(batch)} prompts (first: {batch.prompts[bare[0]].id!r}); generated rows are in no span. Use"
                " per='all', or name other positions."
            )
        return (rows & ~known).sum(dim=1)

    def _slots(self, batch: SpanBatch) -> Tensor:
        assert self.reference is not None  # noqa: S101
        return slots(batch, self.per, self.align == "end", self.reference.tokens.shape[1])

    @override
    def changes(self, model: Model, facts: ModelFacts) -> dict[tuple[Site, int], Change]:
        columns = {layer: torch.tensor(chosen) for layer, chosen in self.chosen(facts).items()}
        if self.reference is None:
            return {(self.site, layer): partial(_zero, index) for layer, index in columns.items()}
        layers = sorted(columns)
        if self._pairing is not None:
            recording = record(model, self.reference, [self.site], layers)
            return {
                (self.site, layer): partial(
                    self._resample, index, recording.activations[self.site, layer][:, :, index]
                )
                for layer, index in columns.items()
            }
        means = reference_means(
            model, facts, self.reference, self.site, layers, self.positions, self.per, self.align == "end"
        )
        return {
            (self.site, layer): partial(self._mean, index, means[layer][:, index.to(means[layer].device)])
            for layer, index in columns.items()
        }

    @override
    def own_pass(self, model: Model) -> list[tuple[str, Edit]]:
        return OwnPass(model, type(self).__name__, self._prompts).hooks() if self.by_row else []

    def _prompts(self) -> SpanBatch:
        told = f"per={self.per!r}" if self.method == "mean" else f"method={self.method!r}"
        return require_batch(self._batch, f"{type(self).__name__}({told})")

    def _mean(
        self, index: Tensor, means: Float[Tensor, "slot column ..."], values: Tensor, rows: Rows
    ) -> Tensor:
        if self.per == "all":
            values[:, index.to(values.device)] = means[0].to(values)
            return values
        places = self._slots(self._prompts()).to(values.device)
        inside = rows.pos < places.shape[1]
        slot = torch.where(inside, places[rows.prompt, rows.pos.clamp(max=places.shape[1] - 1)], -1)
        # Rows in no span (padding, generated) and places that no reference prompt has stay as they are.
        found = (slot >= 0) & (slot < len(means))
        new = means[slot.clamp(0, len(means) - 1)]
        found &= ~new.flatten(1).isnan().any(dim=1)
        return put(values, index, found, new[found])

    def _resample(
        self, index: Tensor, recorded: Float[Tensor, "prompt pos column ..."], values: Tensor, rows: Rows
    ) -> Tensor:
        assert self._pairing is not None  # noqa: S101
        assert self._members is not None  # noqa: S101 - bound together with the batch
        found = self._pairing.find(self._prompts(), self._members, rows)
        return put(values, index, found.rows, recorded[found.prompt.cpu(), found.pos.cpu()])


def put(values: Tensor, index: Tensor | None, rows: Tensor, new: Tensor) -> Tensor:
    """Write new values [row, column, ...] into some rows, at all columns or those given."""
    if index is None:
        values[rows] = new.to(values)
        return values
    values[rows.nonzero(), index.to(values.device)] = new.to(values)
    return values


def _zero(index: Tensor, values: Tensor, rows: Rows) -> Tensor:  # noqa: ARG001
    values[:, index.to(values.device)] = 0
    return values


def by_layer(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Group (layer, index) pairs.

    >>> by_layer([(1, 3), (0, 2), (1, 0)])
    {0: [2], 1: [0, 3]}
    """
    layers: dict[int, list[int]] = {}
    for layer, index in pairs:
        layers.setdefault(layer, []).append(index)
    return {layer: sorted(indices) for layer, indices in sorted(layers.items())}


def check_factor(factor: float) -> float:
    """Return the factor, or raise ValueError unless it is a finite number."""
    if not math.isfinite(factor):
        raise ValueError(f"factor={factor!r} was asked for; give a finite number.")
    return float(factor)
