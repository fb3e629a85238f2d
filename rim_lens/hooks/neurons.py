"""Editors of MLP neurons: `hook_post`, the input of the down-projection, removed, replaced, scaled or clamped."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import UnknownNeuron
from rim_lens.hooks.ablating import Ablation, Method, by_layer, check_factor
from rim_lens.hooks.alignment import Align
from rim_lens.hooks.editing import Change, RowEditor, Rows
from rim_lens.hooks.positions import Positions
from rim_lens.hooks.reference import Per
from rim_lens.lens import Model, ModelFacts, Site


class AblateNeurons(Ablation):
    """Set MLP neurons (`hook_post`, the input of the down-projection) to zero, a mean, or another prompt's.

    Zero is the paper's causal check (section 4). Controls must be matched per layer: neurons of the last
    layers write straight into the logits, and a set drawn from them differs from one drawn anywhere.

    Args:
        neurons: (layer, neuron) pairs across any layers, at least one.
        method: "zero", "mean" or "resample".
        reference: Prompts the mean or the donors are taken from; see `AblateHeads`.
        positions: "all", "prompt_last", "generated", a span's name, or a mask [prompt, pos].
        per: What a mean is taken over: "all", "span" or "position"; see `AblateHeads`.
        align: How places within a span correspond, for per="position" and for resampling; see `align`.
        seed: Of the donors.

    Raises:
        UnknownNeuron: No neuron was named; or, on attaching, the model lacks one.
        UnsupportedModel: The MLP is a mixture of experts.
        ReferenceMismatch: method and reference do not go together, the reference is of another vocabulary, or holds
            no other prompt to resample from.
        EmptySpan: When prompts are bound: a span to be edited is in no reference prompt (per="span"), or nothing in
            some prompt would be edited.
    """

    site = "post"

    def __init__(
        self,
        neurons: Iterable[tuple[int, int]],
        method: Method = "zero",
        reference: SpanBatch | None = None,
        positions: Positions = "all",
        per: Per = "all",
        align: Align = "end",
        seed: int = 0,
    ) -> None:
        super().__init__(method, reference, positions, per, align, seed)
        self.neurons = some_neurons(neurons)

    @override
    def what(self) -> list[tuple[int, int]]:
        return self.neurons

    @override
    def chosen(self, facts: ModelFacts) -> dict[int, list[int]]:
        return by_layer(facts.check_neurons(self.neurons))


class ScaleNeurons(RowEditor):
    """Multiply MLP neurons by a factor, then hold them within bounds.

    Without bounds it equals scaling the neurons' rows of the down-projection.

    Args:
        neurons: (layer, neuron) pairs across any layers, at least one.
        factor: Any finite number.
        clamp: (low, high), either of which may be infinite; applied after the factor. None: no bounds.
        positions: "all", "prompt_last", "generated", a span's name, or a mask [prompt, pos].

    Raises:
        UnknownNeuron: No neuron was named; or, on attaching, the model lacks one.
        UnsupportedModel: The MLP is a mixture of experts.
        ValueError: factor or clamp is no number, or low is above high.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:2], think="off")
    >>> with rl.ScaleNeurons([(0, 3), (1, 5)], clamp=(0, 0.5)).on(model):
    ...     logits = model(off.tokens, attention_mask=off.attention_mask)
    """

    def __init__(
        self,
        neurons: Iterable[tuple[int, int]],
        factor: float = 1.0,
        clamp: tuple[float, float] | None = None,
        positions: Positions = "all",
    ) -> None:
        super().__init__(positions)
        self.neurons = some_neurons(neurons)
        self.factor = check_factor(factor)
        if clamp is not None:
            low, high = clamp
            if math.isnan(low) or math.isnan(high) or low > high:
                raise ValueError(f"clamp={clamp!r} was asked for; give (low, high) with low ≤ high.")
        self.clamp = clamp

    @override
    def edited_sites(self) -> tuple[Site, ...]:
        return ("post",)

    @override
    def changes(self, model: Model, facts: ModelFacts) -> dict[tuple[Site, int], Change]:
        columns = by_layer(facts.check_neurons(self.neurons))
        return {
            ("post", layer): partial(self._scale, torch.tensor(chosen)) for layer, chosen in columns.items()
        }

    def _scale(self, index: Tensor, values: Tensor, rows: Rows) -> Tensor:  # noqa: ARG002
        index = index.to(values.device)
        scaled = values[:, index] * self.factor
        values[:, index] = scaled if self.clamp is None else scaled.clamp(*self.clamp)
        return values


def some_neurons(neurons: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the neurons as a list, or raise UnknownNeuron where there is none."""
    named = list(neurons)
    if not named:
        raise UnknownNeuron("no neuron was named, so nothing would be edited; give (layer, neuron) pairs.")
    return named
