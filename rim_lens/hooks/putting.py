"""Numbers computed elsewhere, put in place of what a pass computes, row for row of the prompts that are read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rim_lens.errors import SpanError, WrongHookShape
from rim_lens.hooks.base import Component, Edit
from rim_lens.lens import Model, ModelFacts, Site, hook_name

# (site, layer) → which columns (heads, key-value heads, neurons), and their values
Values = Mapping[tuple[Site, int], tuple[list[int], Float[Tensor, "prompt pos column ..."]]]


class Put(Component):
    """Put given values in chosen columns of activations, at every position of whole prompts.

    Values have one row per prompt of the bound batch. Where a value is NaN, the pass keeps its own. Padding is overwritten too,
    which nothing reads. What is written after the prompts, under a key-value cache, stays as it is.

    Args:
        values: By (site, layer).
    """

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def __repr__(self) -> str:
        return f"Put({sorted(self.values)})"

    @override
    def sites(self) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        return (), tuple(dict.fromkeys(site for site, _ in self.values))

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        return [
            (hook_name(site, layer), partial(self._put, torch.tensor(columns), values))
            for (site, layer), (columns, values) in self.values.items()
            if columns
        ]

    def _put(self, columns: Tensor, values: Tensor, activation: Tensor) -> Tensor:
        if self._members is None or self._batch is None:
            raise SpanError("Put does not know which prompts are read; bind them (rim_lens.hooks.bound).")
        width, whole = activation.shape[1], self._batch.tokens.shape[1]
        if width == 1 < whole:  # a step under a key-value cache
            return activation
        if (len(self._members), whole) != tuple(activation.shape[:2]) or whole > values.shape[1]:
            raise WrongHookShape(
                f"Put holds values for {values.shape[1]} positions, and this pass has {activation.shape[0]} prompts of {width}"
                f" where {len(self._members)} of {whole} are bound. Bind the batch that is read, and read it whole."
            )
        edited, index = activation.clone(), columns.to(activation.device)
        new = values[self._members, -width:].to(edited)
        edited[:, :, index] = torch.where(new.isnan(), edited[:, :, index], new)
        return edited
