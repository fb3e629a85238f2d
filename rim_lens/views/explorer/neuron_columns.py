"""Numbers of every neuron, which of them are drawn against each other, and the set's own beside random sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from rim_lens.errors import CaptureError
from rim_lens.measures.controls import percentile_among
from rim_lens.measures.entanglement.shifting import Sides, shifts_of
from rim_lens.measures.shift import one_sided_shift
from rim_lens.views.explorer.neuron_reading import Neuron, Source
from rim_lens.views.text import visible

if TYPE_CHECKING:
    from rim_lens.measures.entanglement.result import Entanglement
    from rim_lens.measures.neurons.sets import NeuronSet

UNIT = "activation"
METRICS = {"safety_drop": "safety drop δ⁻", "reasoning_rise": "reasoning rise δ⁺", "ras": "RAS"}


@dataclass(frozen=True)
class Column:
    """A number of every neuron: kept, or the difference of two that are."""

    name: str
    unit: str
    values: Float[np.ndarray, " neuron"]
    minus: tuple[int, int] | None = None  # places of the two columns it is the difference of


@dataclass(frozen=True)
class Scatter:
    """Which columns are drawn against each other.

    Attributes:
        name: In the menu.
        x: Place of a column.
        y: Place of a column.
        positive: Columns that must be positive for a neuron to count in x, and in y; it adds 0 where one is not.
        note: What is to be known in reading it.
        diagonal: Whether both are of one kind, so that a line of equals says something.
    """

    name: str
    x: int
    y: int
    positive: tuple[tuple[int, int], tuple[int, int]] | None = None
    note: str = ""
    diagonal: bool = False


@dataclass(frozen=True)
class Columns:
    """All of it.

    Attributes:
        columns: Numbers of every neuron.
        scatters: What is drawn, the first to begin with.
        numbers: Rows of the set's own numbers beside all neurons and random sets, as plain values.
        of_sets: The same metrics of each random set.
    """

    columns: list[Column] = field(default_factory=list)
    scatters: list[Scatter] = field(default_factory=list)
    numbers: list[dict[str, Any]] = field(default_factory=list)
    of_sets: list[dict[str, float | None]] = field(default_factory=list)

    def joined(self, other: Columns) -> Columns:
        """These, then others."""
        n = len(self.columns)
        moved = [
            Scatter(one.name, one.x + n, one.y + n, None, one.note, one.diagonal) for one in other.scatters
        ]
        return Columns([*self.columns, *other.columns], [*self.scatters, *moved], self.numbers, self.of_sets)


def shifts_between(
    sources: Sequence[Source],
    sides: Sides,
    members: Sequence[Int[np.ndarray, " member"]],
    entangled: Entanglement | None = None,
) -> Columns:
    """Terms of RAS and changes of activation between a base and a tuned model, by the functions of `entanglement`.

    Args:
        sources: Base and tuned.
        sides: Their activations.
        members: Places of the set's neurons, and of each random set's.
        entangled: Where p on exchanged labels is known from.
    """
    base, tuned = sources
    mean = sides.averaged()
    drop, _ = one_sided_shift(mean.tuned_safety[0], mean.base_safety[0])
    rise, _ = one_sided_shift(mean.base_reasoning[0], mean.tuned_reasoning[0])
    columns = [
        Column("term of δ⁻ (safety drop)", UNIT, drop),
        Column("term of δ⁺ (reasoning rise)", UNIT, rise),
    ]
    at: dict[str, tuple[int, int]] = {}
    for kind in base.pooled:
        at[kind] = (len(columns), len(columns) + 1)
        columns += [Column(f"{kind}, {one.role}", UNIT, one.means(kind)) for one in (base, tuned)]
    safety, reasoning = at["harmful"], at["reasoning"][::-1]
    for name, (first, second) in (("harmful: base − tuned", safety), ("reasoning: tuned − base", reasoning)):
        values = columns[first].values - columns[second].values
        columns.append(Column(name, UNIT, values, (first, second)))
    terms = Scatter(
        "terms of RAS",
        0,
        1,
        (safety, reasoning),
        "The mean of a set's terms is its δ. A neuron that moved the other way adds 0; so does one that is not positive in both"
        " models, and it is left out of that side.",
    )
    n = len(columns)
    change = Scatter(
        "change of activation",
        n - 2,
        n - 1,
        None,
        "Both ways, with no guard and no division. Right: falls on harmful; up: rises on reasoning.",
    )
    numbers, of_sets = _numbers(sides, members, entangled)
    return Columns(columns, [terms, change], numbers, of_sets)


def activations_of_one(source: Source) -> Columns:
    """Mean pooled activations of one model by kind of prompts, harmful against each of the others."""
    kinds = list(source.pooled)
    columns = [Column(kind, UNIT, source.means(kind)) for kind in kinds]
    note = "Mean of the pooled activation over the prompts of each kind. On the dotted line a neuron does not tell them apart."
    scatters = [
        Scatter(f"harmful against {kind}", place, 0, None, note, diagonal=True)
        for place, kind in enumerate(kinds)
        if place
    ]
    return Columns(columns, scatters)


def known_of_set(neurons: NeuronSet) -> Columns:
    """What a set knows of all neurons: what it was chosen by, and how active each is."""
    known = {
        "activity (mean pooled activation)": (UNIT, neurons.activity),
        "score the set was chosen by": ("of the choice", neurons.scores),
    }
    columns = [
        Column(name, unit, values.reshape(-1)) for name, (unit, values) in known.items() if values is not None
    ]
    note = "On the requests that chose the set: it stands high because it was chosen so, which is no test."
    return Columns(
        columns, [Scatter("score against activity", 0, 1, None, note)] if len(columns) == 2 else []
    )


@dataclass(frozen=True)
class Effects:
    """Effects of removing single neurons: name, unit, and value by place among all neurons."""

    maps: list[tuple[str, str, dict[int, float]]] = field(default_factory=list)

    @property
    def places(self) -> list[int]:
        """All neurons that were tested."""
        return sorted({place for _, _, found in self.maps for place in found})


def effects_of(given: Any, unit: str, n_layers: int, width: int) -> Effects:
    """Effects in any of the forms that `neuron_view` takes.

    Raises:
        CaptureError: One of a neuron that the model lacks, or a table without effects.
    """
    if given is None:
        return Effects()
    if isinstance(given, Mapping) and given and all(isinstance(name, str) for name in given):
        parts = [effects_of(one, unit, n_layers, width).maps for one in given.values()]
        return Effects(
            [
                (f"{visible(name)}: {what}" if len(maps) > 1 else visible(name), its, found)
                for name, maps in zip(given, parts, strict=True)
                for what, its, found in maps
            ]
        )
    named: dict[str, dict[Neuron, float]] = {"effect of removing it": {}}
    if hasattr(given, "columns"):
        words = {
            "effect": "effect of removing it",
            "total": "effect of removing it",
            "direct": "of that, straight into the logits",
        }
        there = {column: name for column, name in words.items() if column in given.columns}
        if not there or not {"layer", "neuron"} <= set(given.columns):
            raise CaptureError(
                f"a table with columns {', '.join(map(str, given.columns))} was given as effects; layer, neuron, and effect or total"
                " are needed."
            )
        named = {
            name: {
                (int(layer), int(neuron)): float(value)
                for layer, neuron, value in zip(given["layer"], given["neuron"], given[column], strict=True)
            }
            for column, name in there.items()
        }
    else:
        named["effect of removing it"] = {
            (int(layer), int(neuron)): float(value) for (layer, neuron), value in given.items()
        }
    for found in named.values():
        for layer, neuron in found:
            if not (0 <= layer < n_layers and 0 <= neuron < width):
                raise CaptureError(
                    f"an effect of neuron ({layer}, {neuron}) was given; the model has {n_layers} layers of {width} neurons."
                )
    return Effects(
        [
            (
                name,
                unit,
                {
                    layer * width + neuron: value
                    for (layer, neuron), value in found.items()
                    if np.isfinite(value)
                },
            )
            for name, found in named.items()
        ]
    )


def _numbers(
    sides: Sides, members: Sequence[Int[np.ndarray, " member"]], entangled: Entanglement | None
) -> tuple[list[dict[str, Any]], list[dict[str, float | None]]]:
    """Rows of the set beside all neurons and random sets; and each random set."""
    everyone = np.arange(sides.base_safety.shape[1])
    found = shifts_of(sides, [everyone, *members], "prompts_first", None)
    lines: list[dict[str, Any]] = []
    for metric, told in METRICS.items():
        whole, own, *others = found[metric].tolist()
        there = np.array([value for value in others if np.isfinite(value)])
        line: dict[str, Any] = {"metric": told, "set": own, "all": whole, "n_random": len(there)}
        if len(there):
            low, high = np.quantile(there, [0.025, 0.975])
            line |= {"random": there.mean(), "low": low, "high": high}
            if np.isfinite(own):
                line["percentile"] = percentile_among(own, there).percentile
        if entangled is not None:
            line["p"] = entangled.row(metric)["p"]
        lines.append({key: _plain(value) for key, value in line.items()})
    of_sets = [
        {metric: _plain(found[metric][place]) for metric in METRICS} for place in range(2, 1 + len(members))
    ]
    return lines, of_sets


def _plain(value: Any) -> Any:
    """A value for JSON; what is undefined is None."""
    if isinstance(value, str | int):
        return value
    return float(value) if np.isfinite(value) else None
