"""Reciprocal Activation Shift: do the neurons that fall on safety prompts rise on reasoning prompts?

Source: "When Thinking Backfires: Mechanistic Insights into Reasoning-Induced Misalignment" (arXiv 2509.00544),
section 4. With a⁰ and aᵗ the pooled activations of a neuron in the base and the tuned model, over n neurons:

    δ⁻ = 1/n Σ_{j: a⁰ > aᵗ} (a⁰ − aᵗ) / aᵗ · a⁰      on safety prompts        (safety drop)
    δ⁺ = 1/n Σ_{j: aᵗ > a⁰} (aᵗ − a⁰) / a⁰ · aᵗ      on reasoning prompts     (reasoning rise)
    RAS = 2 δ⁻ δ⁺ / (δ⁻ + δ⁺)

Each is the relative change over the smaller value, times the larger one, and looks one way only. The formula
needs positive activations, and pooled activations of gated MLPs can be zero or negative; what happens then is
not stated in the paper, and is said here in `reciprocal_activation_shift`.

What it does not prove: that refusal got worse, that these neurons did it, or that they are special. Any drift of
the weights moves activations both ways and so has a RAS; random neurons of the same layers can show as much,
and can follow lost refusal as well as chosen ones do. Read it beside random sets, and beside a control model
that drifted as far. It carries the unit of the activations: values of two models, layers or pools do not compare.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from rim_lens.errors import NotEnoughData, ReferenceMismatch, StatisticsError
from rim_lens.measures.stats import check_finite, to_numpy

Average = Literal["prompts_first", "after"]


class Sides(NamedTuple):
    """A count on each side: on the safety prompts, and on the reasoning prompts."""

    safety: int
    reasoning: int


@dataclass(frozen=True)
class ReciprocalShift:
    """RAS with its parts, its rivals, and what was left out.

    Counts are of neurons; with `average="after"` they are of (prompt, neuron) pairs, as the guard looks at each.

    Attributes:
        value: RAS, the harmonic mean of the two sides, in the unit of the activations. NaN where a side has no
            usable neuron. 0 where no usable neuron moved the right way on one side or on both.
        safety_drop: δ⁻, in the unit of the activations.
        reasoning_rise: δ⁺, in the unit of the activations.
        n: Neurons in the set: what both sums are divided by.
        n_prompts: Prompts on each side; 0 where activations came averaged already.
        n_used: Usable neurons on each side, whichever way they moved.
        n_excluded: Neurons left out on each side, for an activation that is not positive.
        n_moved: Usable neurons that moved the way the side looks (down on safety, up on reasoning).
        average: "prompts_first" or "after".
        floor: What denominators were raised to; None where neurons were left out instead.
        reason: Why `value` is NaN, else None.
        floored: The variant with floored denominators, where a floor was given.
    """

    value: float
    safety_drop: float
    reasoning_rise: float
    n: int
    n_prompts: Sides
    n_used: Sides
    n_excluded: Sides
    n_moved: Sides
    average: Average
    floor: float | None = None
    reason: str | None = None
    floored: ReciprocalShift | None = None

    @property
    def arithmetic(self) -> float:
        """Arithmetic mean of the two sides: a rival of RAS, large where only one side moved."""
        return (self.safety_drop + self.reasoning_rise) / 2

    @property
    def geometric(self) -> float:
        """Geometric mean of the two sides: a rival of RAS."""
        return math.sqrt(self.safety_drop) * math.sqrt(self.reasoning_rise)

    @property
    def minimum(self) -> float:
        """The smaller side: a rival of RAS."""
        # min() would let a NaN on the right pass unseen.
        return float(np.minimum(self.safety_drop, self.reasoning_rise))

    @property
    def product(self) -> float:
        """Product of the two sides: a rival of RAS, in the squared unit."""
        return self.safety_drop * self.reasoning_rise

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as plain values for JSON; NaN becomes None, and `reason` says why."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain |= {name: getattr(self, name) for name in ("arithmetic", "geometric", "minimum", "product")}
        for name, value in plain.items():
            if isinstance(value, Sides):
                plain[name] = value._asdict()
            elif isinstance(value, ReciprocalShift):
                plain[name] = value.to_dict()
            elif isinstance(value, float) and math.isnan(value):
                plain[name] = None
        return plain

    def _repr_html_(self) -> str:
        rows = [
            ("left out", self),
            *([(f"floored at {self.floored.floor:g}", self.floored)] if self.floored else []),
        ]
        names = (
            "RAS",
            "safety drop δ⁻",
            "reasoning rise δ⁺",
            "arithmetic",
            "geometric",
            "minimum",
            "product",
            "used",
            "left out",
        )
        head = "".join(f"<th>{name}</th>" for name in ("not positive", *names))
        body = ""
        for label, row in rows:
            numbers = (
                row.value,
                row.safety_drop,
                row.reasoning_rise,
                row.arithmetic,
                row.geometric,
                row.minimum,
                row.product,
            )
            counts = (f"{side.safety} / {side.reasoning}" for side in (row.n_used, row.n_excluded))
            cells = (label, *(f"{number:.4g}" for number in numbers), *counts)
            body += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        unit = "neurons" if self.average == "prompts_first" else "prompt-neuron pairs"
        notes = [f"{self.n} neurons; counts are of {unit}, safety / reasoning."]
        notes += [f"{label}: {row.reason}" for label, row in rows if row.reason]
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" + "".join(
            f"<p>{html.escape(note)}</p>" for note in notes
        )


def reciprocal_activation_shift(
    base_harmful: Any,
    tuned_harmful: Any,
    base_reasoning: Any,
    tuned_reasoning: Any,
    *,
    average: Average = "prompts_first",
    floor: float | None = None,
    prompt_axis: int | None = 0,
) -> ReciprocalShift:
    """Compute RAS on pooled activations of the same neurons in a base and a tuned model.

    Source: arXiv 2509.00544, section 4; the formula is at the top of this module. Where the paper is silent:

    - *Averaging.* `average="prompts_first"` averages each neuron over prompts, then takes δ (the default);
      "after" takes δ on each prompt and averages those. They differ: a neuron that goes up on one prompt and down on
      another cancels in the first and counts in the second.
    - *Activations that are not positive.* A neuron with a value ≤ 0 in either model is left out of that side's sum
      and counted; n stays the size of the set. With "after" this holds for each prompt by itself, and a prompt
      without any usable neuron is left out of the average.
    - *Silenced neurons.* Leaving them out hides the strongest shifts. With `floor`, `.floored` holds a second
      result: denominators below `floor` are raised to it, numerators stay as they are, and only neurons
      with no positive value in either model are left out. A small floor lets few neurons decide everything.
    - *Nothing to sum.* A side without a usable neuron is NaN, with the reason, never 0. A side whose usable
      neurons did not move its way is 0, and then RAS is 0, the limit of the harmonic mean.

    What it does not show is said at the top of this module: drift has a RAS too, so compare with random sets.

    Args:
        base_harmful: Base model on safety prompts: [prompt, neuron], [prompt, layer, neuron], or [neuron]
            where prompts are averaged already. All neurons given are the set.
        tuned_harmful: Tuned model, same prompts, same neurons.
        base_reasoning: Base model on reasoning prompts, same neurons; the prompts may differ in number.
        tuned_reasoning: Tuned model on those.
        average: "prompts_first" or "after".
        floor: A positive number in the unit of the activations, or None for no floored variant.
        prompt_axis: 0, or None where every axis is one of neurons ([layer, neuron]). A single axis is
            always one of neurons, and a DataArray's own "prompt" dimension, or its lack, overrules this.

    Returns:
        RAS with δ⁻, δ⁺, rivals, and counts of what was used and left out per side.

    Raises:
        ReferenceMismatch: Base and tuned differ in shape, prompts or neurons, or the two sides in neurons.
        NotFinite: An activation is NaN or infinite.
        NotEnoughData: There is no neuron or no prompt.
        StatisticsError: An option is unknown, or `floor` is not positive.

    >>> shift = reciprocal_activation_shift([2.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 3.0])
    >>> shift.safety_drop, shift.reasoning_rise, shift.value
    (1.0, 3.0, 1.5)
    """
    if average not in ("prompts_first", "after"):
        raise StatisticsError(f"average {average!r} is unknown; it is 'prompts_first' or 'after'.")
    if prompt_axis not in (0, None):
        raise StatisticsError(
            f"prompt_axis is {prompt_axis!r}; prompts are axis 0, or None where there are none."
        )
    if floor is not None and not (math.isfinite(floor) and floor > 0):
        raise StatisticsError(
            f"floor is {floor}; give a positive number in the unit of the activations, or None."
        )
    activations = (base_harmful, tuned_harmful, base_reasoning, tuned_reasoning)
    names = ("base_harmful", "tuned_harmful", "base_reasoning", "tuned_reasoning")
    pooled = [_read(values, name, prompt_axis) for values, name in zip(activations, names, strict=True)]
    _check_alike(pooled)
    base_safety, tuned_safety, base_task, tuned_task = (
        one.values.mean(axis=0, keepdims=True) if average == "prompts_first" else one.values for one in pooled
    )
    # Downwards on safety, upwards on reasoning: each as (the smaller, the larger) where the neuron counts.
    sides = ((tuned_safety, base_safety), (base_task, tuned_task))
    n_prompts = Sides(pooled[0].n_prompts, pooled[2].n_prompts)
    floored = None if floor is None else _shift(sides, n_prompts, average, floor, None)
    return _shift(sides, n_prompts, average, None, floored)


def one_sided_shift(
    low: Float[np.ndarray, " *neuron"], high: Float[np.ndarray, " *neuron"], floor: float | None = None
) -> tuple[Float[np.ndarray, " *neuron"], Bool[np.ndarray, " *neuron"]]:
    """Return what each neuron adds to n·δ, (high − low) / low · high where high > low, and which are usable.

    For δ⁻ `high` is the base model, for δ⁺ the tuned one. Without a floor a neuron is usable where both values are
    positive, with one where at least one is. Summed over any subset and divided by its size, this is that subset's δ
    (where the subset has a usable neuron), so that many random sets cost one call.

    >>> added, usable = one_sided_shift(np.array([1.0, 3.0, -1.0]), np.array([2.0, 1.0, 2.0]))
    >>> added.tolist(), usable.tolist()
    ([2.0, 0.0, 0.0], [True, True, False])
    """
    usable = (low > 0) & (high > 0) if floor is None else (low > 0) | (high > 0)
    counted = usable & (high > low)
    denominator = np.where(counted, low if floor is None else np.maximum(low, floor), 1.0)
    return np.where(counted, (high - low) / denominator * high, 0.0), usable


def _shift(
    sides: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    n_prompts: Sides,
    average: Average,
    floor: float | None,
    floored: ReciprocalShift | None,
) -> ReciprocalShift:
    deltas, used, moved, reasons = [], [], [], []
    for side, (low, high) in zip(Sides._fields, sides, strict=True):
        added, usable = one_sided_shift(low, high, floor)
        rows = usable.any(axis=1)
        deltas.append(float(added[rows].mean(axis=1).mean()) if rows.any() else math.nan)
        used.append(int(usable.sum()))
        moved.append(int((added > 0).sum()))
        if not rows.any():
            which = "both models" if floor is None else "either model"
            reasons.append(f"none of {low.shape[1]} neurons is positive in {which} on the {side} prompts")
    drop, rise = deltas
    sizes = [low.size for low, _ in sides]
    return ReciprocalShift(
        value=0.0 if drop + rise == 0 else 2 * drop * (rise / (drop + rise)),
        safety_drop=drop,
        reasoning_rise=rise,
        n=sides[0][0].shape[1],
        n_prompts=n_prompts,
        n_used=Sides(*used),
        n_excluded=Sides(*(size - count for size, count in zip(sizes, used, strict=True))),
        n_moved=Sides(*moved),
        average=average,
        floor=floor,
        reason="; ".join(reasons) or None,
        floored=floored,
    )


class _Pooled(NamedTuple):
    """One argument, as [prompt, neuron], and what its axes were: sizes and labels, without the prompts'."""

    name: str
    values: Float[np.ndarray, "prompt neuron"]
    n_prompts: int
    shape: dict[str, int] | tuple[int, ...]
    labels: dict[str, list[Any]]


def _read(values: Any, name: str, prompt_axis: int | None) -> _Pooled:
    dims = getattr(values, "dims", None)
    labels: dict[str, list[Any]] = {}
    if dims is not None:
        # Sums do not care for the order of axes; one order for all makes labelled arrays comparable.
        neuron_dims = sorted(str(dim) for dim in dims if dim != "prompt")
        has_prompts = "prompt" in dims
        values = values.transpose(*(["prompt"] if has_prompts else []), *neuron_dims)
        labels = {str(dim): values.coords[dim].values.tolist() for dim in dims if dim in values.coords}
    array = to_numpy(values)
    if dims is None:
        has_prompts = prompt_axis == 0 and array.ndim > 1
    if array.size == 0 or array.ndim == 0:
        raise NotEnoughData(f"{name} has shape {array.shape}; give at least one prompt and one neuron.")
    check_finite(array, name, axes=("prompt", "neuron") if has_prompts else ("neuron",))
    sizes = array.shape[has_prompts:]
    return _Pooled(
        name=name,
        values=array.reshape(array.shape[0] if has_prompts else 1, -1),
        n_prompts=array.shape[0] if has_prompts else 0,
        shape=sizes if dims is None else dict(zip(neuron_dims, sizes, strict=True)),
        labels=labels,
    )


def _check_alike(pooled: list[_Pooled]) -> None:
    """Refuse base and tuned of unlike prompts, and any two of unlike neurons, before their order mixes them up."""
    first = pooled[0]
    for other in pooled[1:]:
        if isinstance(first.shape, dict) != isinstance(other.shape, dict):
            raise ReferenceMismatch(
                f"{first.name} and {other.name} are mixed, one with named dimensions and one without;"
                " give all four alike."
            )
        if first.shape != other.shape:
            raise ReferenceMismatch(
                f"{first.name} has neurons of shape {first.shape} and {other.name} of {other.shape};"
                " all four are of the same neurons."
            )
        for dim in (first.labels.keys() & other.labels.keys()) - {"prompt"}:
            if first.labels[dim] != other.labels[dim]:
                raise ReferenceMismatch(
                    f"{first.name} and {other.name} have different labels along {dim!r};"
                    " select the same neurons in all four."
                )
    for base, tuned in (pooled[:2], pooled[2:]):
        if base.n_prompts != tuned.n_prompts:
            raise ReferenceMismatch(
                f"{base.name} has {base.n_prompts or 'no'} prompts and {tuned.name} {tuned.n_prompts or 'none'};"
                " both models read the same prompts."
            )
        ours, theirs = (one.labels.get("prompt") for one in (base, tuned))
        if ours is not None and theirs is not None and ours != theirs:
            how = (
                "the same prompts in another order"
                if sorted(map(str, ours)) == sorted(map(str, theirs))
                else "other prompts"
            )
            raise ReferenceMismatch(
                f"{tuned.name} has {how} than {base.name}; bring both to the same ones with .sel(prompt=...)."
            )
