"""How the neuron explorer's page is filled: what is worth the room, and what is said of the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from rim_lens.chat.spans import ATOMS
from rim_lens.errors import ViewTooLarge
from rim_lens.views.explorer.neuron_columns import Columns, Effects
from rim_lens.views.explorer.neuron_reading import Neuron, Source, over_tokens, tokens_of, top_prompts
from rim_lens.views.explorer.page import FORMAT_VERSION, Arrays, page_bytes, palette
from rim_lens.views.text import visible

if TYPE_CHECKING:
    from rim_lens.chat import ChatFormat
    from rim_lens.lens import Model

SHOWN_SETS = 20  # random sets that can be coloured, where all neurons are drawn
_DRAWN_SHARE = 0.6  # of the page goes to numbers of neurons, at most
_CAVEAT = (
    "Where a neuron stands says how it moved or when it is active, not what it does; its effect says that, where it was tested."
    " Any change of the weights moves neurons both ways: compare with random sets of the same layers."
)


@dataclass(frozen=True)
class Budget:
    """How much may be shown.

    Attributes:
        n_top: Prompts of each kind for each neuron.
        n_read: Neurons over tokens.
        n_drawn: Neurons drawn.
        max_bytes: Of the page.
    """

    n_top: int
    n_read: int
    n_drawn: int
    max_bytes: int


@dataclass(frozen=True)
class Reading:
    """What activations over tokens are read with.

    Attributes:
        chat: The format.
        models: One for each source.
        keep_text: Whether what was written to harmful requests is shown in full.
    """

    chat: ChatFormat
    models: Sequence[Model]
    keep_text: bool

    def prompt(self, sources: Sequence[Source], kind: str, row: int) -> dict[str, Any]:
        """One prompt as each model read it."""
        redacted = kind == "harmful" and not self.keep_text
        return {
            "id": visible(sources[0].batches[kind].prompts[row].id),
            "kind": kind,
            "roles": [tokens_of(self.chat, one.batches[kind], row, redacted=redacted) for one in sources],
        }


def places(neurons: Iterable[Neuron], width: int) -> Int[np.ndarray, " member"]:
    """Places among all neurons, layer by layer."""
    return np.array([layer * width + neuron for layer, neuron in neurons], dtype=np.int64)


def page_data(
    sources: Sequence[Source],
    columns: Columns,
    chosen: Sequence[Neuron],
    sets: Sequence[Sequence[Neuron]],
    effects: Effects,
    shape: tuple[int, int],
    budget: Budget,
    reading: Reading | None,
    name: str,
    tested: str,
) -> tuple[dict[str, Any], Arrays]:
    """Values and arrays of a page.

    Args:
        sources: What was read.
        columns: Numbers of every neuron.
        chosen: The set, best first.
        sets: Random sets.
        effects: Of single neurons.
        shape: Layers, and neurons in each.
        budget: How much may be shown.
        reading: What tokens are read with; None where there is no model.
        name: Of the model, where no source tells.
        tested: What is known of the set as a whole, in words.

    Raises:
        ViewTooLarge: The set alone does not fit.
    """
    n_layers, width = shape
    members, random = places(chosen, width), [places(one, width) for one in sets]
    size = _sizes(columns)
    first = [members, np.array(effects.places, dtype=np.int64), *random[:1]]
    drawn = _drawn(first, size, _most_drawn(columns, budget, len(members)))
    whole = len(drawn) == len(size)
    arrays = Arrays()
    data: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "caveat": _CAVEAT,
        "model": {"n_layers": n_layers, "d_mlp": width},
        "palette": palette(),
        "atoms": list(ATOMS),
        "roles": [{"role": one.role, "name": one.name} for one in sources],
        "n_neurons": len(size),
        "left_out": len(size) - len(drawn),
        "drawn": None if whole else arrays.keep(drawn),
        "columns": [_column(one, drawn, arrays) for one in columns.columns],
        "scatters": [_scatter(one, columns, drawn, len(size)) for one in columns.scatters],
        "numbers": columns.numbers,
        "set": arrays.keep(members),
        "random": [
            {"members": arrays.keep(one), **(columns.of_sets[place] if columns.of_sets else {})}
            for place, one in enumerate(random[: SHOWN_SETS if whole else 1])
        ],
        "n_random": len(random),
        "effects": [
            {
                "name": told,
                "unit": unit,
                "places": arrays.keep(np.array(list(found), dtype=np.float64)),
                "values": arrays.keep(np.array(list(found.values()), dtype=np.float64)),
            }
            for told, unit, found in effects.maps
        ],
        "tested": tested,
        "start": int(members[0]),
    }
    n_read = 0
    data |= {"prompts": [], "read": {}, "activations": None}
    if reading is not None:
        order = _first_then_largest(first, size)[: budget.n_read]
        room = budget.max_bytes - sum(page_bytes(one.size) for one in arrays)
        n_read = _read(data, arrays, sources, order, width, budget.n_top, room, reading)
    named = " and ".join(one.name for one in sources) or visible(name)
    data["title"] = (
        f"What tuning moved: neurons of {sources[0].name}" if len(sources) == 2 else f"Neurons of {named}"
    )
    data["about"] = _about(data, sources, len(drawn), n_read, budget.n_top, len(members), reading is not None)
    return data, arrays


# --- which neurons ---------------------------------------------------------------------------------------


def _sizes(columns: Columns) -> Float[np.ndarray, " neuron"]:
    """How far each neuron stands from the origin of the first scatter, axes scaled to the farthest."""
    first = columns.scatters[0]
    both = [np.abs(columns.columns[place].values) for place in (first.x, first.y)]
    scaled: np.ndarray = np.max([one / max(float(one.max()), 1e-30) for one in both], axis=0)
    return scaled


def _first_then_largest(
    first: Sequence[Int[np.ndarray, " member"]], size: Float[np.ndarray, " neuron"]
) -> Int[np.ndarray, " neuron"]:
    """All neurons: those named first, in their order, then by falling size."""
    order = np.concatenate([*first, np.argsort(-size, kind="stable")])
    _, place = np.unique(order, return_index=True)
    found: np.ndarray = order[np.sort(place)]
    return found


def _drawn(
    first: Sequence[Int[np.ndarray, " member"]], size: Float[np.ndarray, " neuron"], most: int
) -> Int[np.ndarray, " neuron"]:
    """The neurons drawn, sorted: all where they fit, else those named first and the largest."""
    if len(size) <= most:
        return np.arange(len(size))
    return np.sort(_first_then_largest(first, size)[:most])


def _most_drawn(columns: Columns, budget: Budget, n_members: int) -> int:
    kept = 1 + sum(one.minus is None for one in columns.columns)
    fits = int(_DRAWN_SHARE * budget.max_bytes / page_bytes(kept * 3) * 3)
    if fits < n_members:
        raise ViewTooLarge(
            f"the set's {n_members} neurons alone do not fit in a page of {budget.max_bytes / 1e6:.1f} MB; raise max_bytes or look at"
            " fewer neurons."
        )
    return max(n_members, min(budget.n_drawn, fits))


# --- numbers ---------------------------------------------------------------------------------------------


def _column(one: Any, drawn: Int[np.ndarray, " neuron"], arrays: Arrays) -> dict[str, Any]:
    told: dict[str, Any] = {"name": one.name, "unit": one.unit}
    return (
        {**told, "minus": list(one.minus)}
        if one.minus
        else {**told, "values": arrays.keep(one.values[drawn])}
    )


def _scatter(one: Any, columns: Columns, drawn: Int[np.ndarray, " neuron"], n: int) -> dict[str, Any]:
    box = None
    if len(drawn) < n:
        rest = np.setdiff1d(np.arange(n), drawn)
        sides = [columns.columns[place].values[rest] for place in (one.x, one.y)]
        box = [float(bound) for side in sides for bound in (side.min(), side.max())]
    return {
        "name": one.name,
        "x": one.x,
        "y": one.y,
        "positive": one.positive,
        "note": one.note,
        "diagonal": one.diagonal,
        "box": box,
    }


# --- over tokens -----------------------------------------------------------------------------------------


def _read(
    data: dict[str, Any],
    arrays: Arrays,
    sources: Sequence[Source],
    order: Int[np.ndarray, " neuron"],
    width: int,
    n_top: int,
    room: int,
    reading: Reading,
) -> int:
    """Fill in prompts and activations over their tokens, of as many neurons as there is room for."""
    wanted = wanted_prompts(sources[0], order, n_top)
    lengths = {
        at: [int(one.batches[at[0]].lengths[at[1]]) for one in sources]
        for at in {at for one in wanted for at in one}
    }
    taken, n_read = 0, 0
    for one in wanted:
        taken += page_bytes(sum(sum(lengths[at]) for at in one)) + 60 * len(one)
        if taken > 0.9 * room:
            break
        n_read += 1
    by_prompt: dict[tuple[str, int], list[tuple[int, int]]] = {}  # neurons, and which of its prompts it is
    for place, ats in zip(order[:n_read].tolist(), wanted, strict=False):
        data["read"][str(place)] = [None] * len(ats)
        for rank, at in enumerate(ats):
            by_prompt.setdefault(at, []).append((place, rank))
    kept: list[np.ndarray] = []
    start = 0
    for number, (at, its) in enumerate(sorted(by_prompt.items())):
        data["prompts"].append(reading.prompt(sources, *at))
        neurons = [divmod(place, width) for place, _ in its]
        starts = []
        for source, model in zip(sources, reading.models, strict=True):
            values = over_tokens(model, source.batches[at[0]], at[1], neurons)
            starts.append([start + one * values.shape[1] for one in range(len(its))])
            start += values.size
            kept.append(values.reshape(-1))
        for (place, rank), *own in zip(its, *starts, strict=True):
            data["read"][str(place)][rank] = [number, own]
    if kept:
        data["activations"] = arrays.keep(np.concatenate(kept))
    return n_read


def wanted_prompts(
    source: Source, order: Int[np.ndarray, " neuron"], n_top: int
) -> list[list[tuple[str, int]]]:
    """The prompts of each neuron, kind by kind, where it is most active first."""
    top = top_prompts(source, order, n_top)
    return [
        [(kind, int(row)) for kind, rows in top.items() for row in rows[:, rank]]
        for rank in range(len(order))
    ]


# --- words -----------------------------------------------------------------------------------------------


def _about(
    data: dict[str, Any],
    sources: Sequence[Source],
    n_drawn: int,
    n_read: int,
    n_top: int,
    n_members: int,
    with_model: bool,
) -> str:
    from rim_lens import __version__

    n_layers, width = data["model"]["n_layers"], data["model"]["d_mlp"]
    told = [f"{n_layers} layers × {width} neurons; the set has {n_members}."]
    if len(sources) == 2:
        told.append(f"Base: {sources[0].name}; tuned: {sources[1].name}.")
    if sources:
        counts = ", ".join(f"{len(values)} {kind}" for kind, values in sources[0].pooled.items())
        told.append(f"Prompts: {counts}. Activations: {sources[0].pool} over tokens, mean over prompts.")
    if data["left_out"]:
        told.append(
            f"Drawn: {n_drawn} neurons, the set and those farthest from the origin; the other {data['left_out']} lie in the hatched box."
        )
    if n_read:
        told.append(
            f"Over tokens: {n_read} neurons, on the {n_top} {'prompt' if n_top == 1 else 'prompts'} of each kind where"
            f" {'the base' if len(sources) == 2 else 'it'} is most active."
        )
    elif not with_model:
        told.append("Activations over tokens are not kept by a study.")
    if not data["effects"]:
        told.append("No single neuron was tested by removal here.")
    return " ".join([*told, f"rim_lens {__version__}."])
