"""Editors of directions in the residual stream: ablate one, add one, or hold a projection within limits.

A direction is a vector of the residual stream, or one for each layer; its length never matters here, as it is
normalised inside. ``rl.refusal_direction`` finds one.

Where an architecture normalises a sublayer's output before adding it (Gemma 2 and 3), `hook_attn_out` and
`hook_mlp_out` come after that norm: what is edited is what the stream receives, so ablation is exact there too, but it
no longer equals a change of W_O and W_out. A direction belongs to the weights it was found on as they are: TransformerLens's
processed weights (centred, folded) have another stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rim_lens.errors import ImpossibleEdit
from rim_lens.hooks.base import describe
from rim_lens.hooks.editing import Change, RowEditor, Rows
from rim_lens.hooks.positions import Positions
from rim_lens.lens import Model, ModelFacts, Site

Direction = Float[Tensor, " d_model"] | Float[Tensor, "layer d_model"]


class _DirectionEditor(RowEditor):
    """Changes the residual stream along one direction."""

    def __init__(self, direction: Direction, positions: Positions) -> None:
        super().__init__(positions)
        # Private: `bound` cuts public masks to the prompts at hand, and would take [layer, d_model] for one.
        self._direction = direction = torch.as_tensor(direction).detach()
        if direction.ndim not in (1, 2) or not direction.is_floating_point():
            raise ImpossibleEdit(
                f"{type(self).__name__} needs a direction of floating-point numbers [d_model] or [layer, d_model]; it got"
                f" {direction.dtype} of shape {tuple(direction.shape)}."
            )
        if not bool(direction.isfinite().all()):
            raise ImpossibleEdit(f"{type(self).__name__} was given a direction that holds NaN or infinity.")
        if not bool(direction.any()):
            raise ImpossibleEdit(
                f"{type(self).__name__} was given the zero vector, which points nowhere. A difference of means is zero"
                " where both sets read the same (the embeddings of a template token): take another layer."
            )

    def __repr__(self) -> str:
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        told = "".join(f", {name}={describe(value)}" for name, value in settings.items())
        return f"{type(self).__name__}({describe(self._direction)}{told})"

    @override
    def edited_sites(self) -> tuple[Site, ...]:
        return ("resid_pre",)

    def unit(self, facts: ModelFacts, layer: int) -> Float[Tensor, " d_model"]:
        """The direction of a layer at length 1, in float32."""
        expected = (facts.d_model,) if self._direction.ndim == 1 else (facts.n_layers, facts.d_model)
        if tuple(self._direction.shape) != expected:
            raise ImpossibleEdit(
                f"the direction has shape {tuple(self._direction.shape)}; this model has {facts.n_layers} layers of width"
                f" {facts.d_model}. It was taken from another model."
            )
        direction = (self._direction if self._direction.ndim == 1 else self._direction[layer]).double()
        if not bool(direction.any()):
            raise ImpossibleEdit(f"the direction of layer {layer} is the zero vector, which points nowhere.")
        return (direction / direction.norm()).float()


class AblateDirection(_DirectionEditor):
    """Remove a direction: x − (x·r̂) r̂, at every write to the residual stream or before chosen layers.

    By default at every write: the embeddings, and what each attention and each MLP adds (Arditi et al. 2406.11717,
    section 2.4). Then the stream never has a component along r̂, which in models that normalise before a sublayer
    equals making W_E, W_pos, W_O, W_out and their biases orthogonal to r̂ (their section 4.1).

    With `layers` the component is removed from the stream as those layers read it; later layers may write it anew.

    An effect shows that the model, as it stands, uses what lies along the direction. It does not show that the
    direction is the only one, nor that it means refusal and nothing else: hold it against random directions and
    against harmless twins.

    Args:
        direction: [d_model], or with `layers` also [layer, d_model].
        layers: Layers before which it is removed; None for every write.
        positions: "all", "prompt_last", "generated", a span's name, or a mask [prompt, pos].

    Raises:
        ImpossibleEdit: The direction is zero, not finite, of another width, or one per layer without `layers`.
        UnknownLayer: On attaching to a model that lacks one of the layers.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:2], think="off")
    >>> scores = rl.refusal_score(model, off, rl.AblateDirection(torch.ones(64)))
    """

    def __init__(
        self, direction: Direction, layers: Iterable[int] | None = None, positions: Positions = "all"
    ) -> None:
        super().__init__(direction, positions)
        self.layers = None if layers is None else list(layers)
        if self.layers is None and self._direction.ndim == 2:
            raise ImpossibleEdit(
                "a direction per layer was given for every write: the stream is the sum of all writes, and taking another"
                " direction from each leaves it with none removed. Give one direction, or layers=range(n_layers)."
            )

    @override
    def edited_sites(self) -> tuple[Site, ...]:
        return ("resid_pre",) if self.layers is not None else ("resid_pre", "attn_out", "mlp_out")

    @override
    def changes(self, model: Model, facts: ModelFacts) -> dict[tuple[Site, int], Change]:
        if self.layers is not None:
            layers = [facts.check_layer(layer) for layer in self.layers]
            return {("resid_pre", layer): partial(_project_out, self.unit(facts, layer)) for layer in layers}
        change = partial(_project_out, self.unit(facts, 0))
        writes: list[tuple[Site, int]] = [("resid_pre", 0)]
        for layer in range(facts.n_layers):
            writes += [("attn_out", layer), ("mlp_out", layer)]
        return dict.fromkeys(writes, change)


class ClampDirection(_DirectionEditor):
    """Hold the projection of the residual stream on a direction within limits; ``low == high`` sets it.

    x + (clamp(x·r̂, low, high) − x·r̂) r̂, in the stream as the chosen layers read it. It stands apart from
    `AblateDirection`, as a value can be given to the stream, but not to each of its writes.

    Args:
        direction: [d_model] or [layer, d_model].
        low: Smallest projection allowed, in units of the residual stream; None for no limit.
        high: Largest projection allowed; None for no limit.
        layers: Layers before which this is done; None for every layer.
        positions: "all", "prompt_last", "generated", a span's name, or a mask [prompt, pos].

    Raises:
        ImpossibleEdit: No limit, limits that are not finite or cross, or a direction that is none.
        UnknownLayer: On attaching to a model that lacks one of the layers.
    """

    def __init__(
        self,
        direction: Direction,
        low: float | None = None,
        high: float | None = None,
        layers: Iterable[int] | None = None,
        positions: Positions = "all",
    ) -> None:
        super().__init__(direction, positions)
        limits = [limit for limit in (low, high) if limit is not None]
        if not limits or limits != sorted(limits) or not bool(torch.tensor(limits).isfinite().all()):
            raise ImpossibleEdit(
                f"ClampDirection(low={low}, high={high}) was asked for; give at least one finite limit, and low ≤ high."
            )
        self.low, self.high = low, high
        self.layers = None if layers is None else list(layers)

    @override
    def changes(self, model: Model, facts: ModelFacts) -> dict[tuple[Site, int], Change]:
        layers = range(facts.n_layers) if self.layers is None else map(facts.check_layer, self.layers)
        return {
            ("resid_pre", layer): partial(_clamp, self.unit(facts, layer), self.low, self.high)
            for layer in layers
        }


class AddDirection(_DirectionEditor):
    """Add a direction to the residual stream as one layer reads it (activation addition).

    x + coefficient · r̂. Arditi et al. (2406.11717, section 2.4) add the difference of means itself, at all
    positions: that is ``coefficient=float(direction.norm())``. At a layer above 0 it equals a bias on what the
    layer before writes.

    A refusal induced so shows that the direction suffices at this strength, which may be one that no prompt
    reaches; compare with the projections that prompts have.

    Args:
        direction: [d_model], or [layer, d_model], of which the layer's own is taken.
        layer: The layer before which it is added.
        coefficient: How much, in units of the residual stream; may be negative.
        positions: "all", "prompt_last", "generated", a span's name, or a mask [prompt, pos].

    Raises:
        ImpossibleEdit: The coefficient is not finite, or the direction is none.
        UnknownLayer: On attaching to a model that lacks the layer.
    """

    def __init__(
        self, direction: Direction, layer: int, coefficient: float, positions: Positions = "all"
    ) -> None:
        super().__init__(direction, positions)
        if not bool(torch.tensor(float(coefficient)).isfinite()):
            raise ImpossibleEdit(
                f"AddDirection(coefficient={coefficient}) was asked for; give a finite number."
            )
        self.layer = layer
        self.coefficient = float(coefficient)

    @override
    def changes(self, model: Model, facts: ModelFacts) -> dict[tuple[Site, int], Change]:
        layer = facts.check_layer(self.layer)
        return {("resid_pre", layer): partial(_add, self.coefficient * self.unit(facts, layer))}


def _project_out(unit: Tensor, rows: Float[Tensor, "row d_model"], which: Rows) -> Tensor:  # noqa: ARG001
    wide, unit = rows.float(), unit.to(rows.device)
    return (wide - (wide @ unit)[:, None] * unit).to(rows.dtype)


def _clamp(
    unit: Tensor,
    low: float | None,
    high: float | None,
    rows: Float[Tensor, "row d_model"],
    which: Rows,  # noqa: ARG001
) -> Tensor:
    wide, unit = rows.float(), unit.to(rows.device)
    found = wide @ unit
    return (wide + (found.clamp(low, high) - found)[:, None] * unit).to(rows.dtype)


def _add(shift: Tensor, rows: Float[Tensor, "row d_model"], which: Rows) -> Tensor:  # noqa: ARG001
    return (rows.float() + shift.to(rows.device)).to(rows.dtype)
