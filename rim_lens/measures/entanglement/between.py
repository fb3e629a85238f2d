"""Two readings held against each other: sets of neurons, their random sets, residual streams, predictions and weights.

What the numbers are is said in `rim_lens.measures.entanglement.entangling`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from rim_lens.errors import (
    NotEnoughData,
    ReferenceMismatch,
    StatisticsError,
    UnknownNeuron,
)
from rim_lens.measures.controls import control_p, percentile_among, random_neurons_per_layer
from rim_lens.measures.entanglement.matching import alike_sets, exchanged_sets
from rim_lens.measures.entanglement.reading import (
    ModelReading,
    check_comparable,
)
from rim_lens.measures.entanglement.residual import COSINES, Estimate, angles, interval, likeness
from rim_lens.measures.entanglement.result import Entanglement
from rim_lens.measures.entanglement.shifting import (
    COUNTS,
    SHIFTS,
    Sides,
    family_weights,
    resampled_shifts,
    shifts_of,
)
from rim_lens.measures.entanglement.similarity import distance, moved_ratio, u_centred
from rim_lens.measures.shift import Average
from rim_lens.measures.stats import bootstrap_interval, check_finite

Neuron = tuple[int, int]
UNITS = {
    "product": "activation²",
    "cka_ratio": "",
    "weight_drift": "of the base's norm",
    "kl": "nats per task token",
    "refusal_change_harmful": "nats",
    "refusal_change_harmless": "nats",
}
# The floored variant's denominators where no floor was given: this share of the mean positive activation of the base.
AUTO_FLOOR = 0.01


def entangled(
    base: ModelReading,
    tuned: ModelReading,
    neurons: Iterable[Neuron],
    *,
    controls: Sequence[Iterable[Neuron]] | None = None,
    n_random_sets: int = 100,
    matched: Literal["activity"] | None = "activity",
    difference: Float[np.ndarray, "pair layer neuron"] | None = None,
    difference_families: Sequence[str] | None = None,
    average: Average = "prompts_first",
    floor: float | Literal["auto"] | None = "auto",
    n_boot: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Entanglement:
    """Hold two readings against each other; runs no model. See `entanglement` for what the numbers are.

    Args:
        base: Reading of the base model.
        tuned: Reading of the tuned one against it, of the same prompts.
        neurons: A `NeuronSet`, or (layer, neuron) pairs. They must have been chosen on other prompts.
        controls: Control sets of your own instead of random ones (sets chosen on exchanged labels, say).
        n_random_sets: Random sets at most; all of them where fewer exist.
        matched: "activity" or None (number per layer alone); see `rim_lens.measures.entanglement.entangling`.
        difference: Activations of the base model on the more refused minus the less refused side of the pairs that chose the
            neurons, for the sets on exchanged labels. None: of the readings' own harmful requests and their twins.
        difference_families: One label per pair of `difference`.
        average: "prompts_first" or "after", see `reciprocal_activation_shift`.
        floor: Of the floored RAS, in the unit of the activations; "auto": 1 % of the base's mean positive activation;
            None: no floored variant.
        n_boot: Resamples of the intervals.
        level: Their coverage.
        seed: Of random sets and resamples.

    Raises:
        ReferenceMismatch: The readings do not compare.
        NotEnoughData: There is no neuron, no control, or no prompt of a kind.
        UnknownNeuron: A neuron that the models lack.
        NotFinite: An activation is NaN or infinite.
        StatisticsError: An option is unknown or out of range.
    """
    check_options(n_random_sets, matched, average, floor, n_boot, level)
    check_comparable(base.settings, tuned.settings)
    kinds = _check_readings(base, tuned)
    n_layers, width = (base.activations["harmful"].sizes[dim] for dim in ("layer", "neuron"))
    chosen = _pairs(neurons, n_layers, width)
    sides = sides_of(base, tuned)
    notes: list[str] = []
    own = controls is not None
    if controls is not None:
        sets = [_pairs(control, n_layers, width) for control in controls]
        if not sets:
            raise NotEnoughData("controls= has no set in it; give at least one, or None for random ones.")
    else:
        sets, told = random_beside(chosen, sides, (n_layers, width), n_random_sets, matched, seed)
        notes += [told] if told else []
    labels, told = _exchanged(
        base, chosen, (n_layers, width), difference, difference_families, n_random_sets, seed
    )
    notes += [told] if told else []
    limit = _floor(sides, floor)
    families = {kind: base.families(kind) for kind in kinds}
    weights = family_weights({kind: families[kind] for kind in ("harmful", "reasoning")}, n_boot, seed)
    if weights is None:
        notes.append(
            "Prompts of some kind are of one family: there is nothing to resample, and intervals are missing."
        )
    if base.settings.get("weights_digest") and _digest(base) == _digest(tuned):
        notes.append("Both readings are of the same weights: nothing moved.")

    everyone = np.arange(n_layers * width)
    members = [_places(one, width) for one in (chosen, *sets, *labels)]
    random, exchanged = slice(2, 2 + len(sets)), slice(2 + len(sets), None)
    numbers = shifts_of(sides, [everyone, *members], average, limit)
    numbers["cka_ratio"] = np.array(_ratios(base, tuned, [everyone, *members]))
    lines: list[dict[str, Any]] = []
    for of, place in (("all", 0), ("set", 1)):
        drawn: Mapping[str, np.ndarray] = {}
        if weights is not None:
            part = sides if of == "all" else sides.only(members[0])
            drawn = resampled_shifts(part, weights["harmful"], weights["reasoning"], average, limit)
        for metric in SHIFTS:
            value = float(numbers[metric][place])
            low, high = interval(drawn[metric], level) if drawn else (np.nan, np.nan)
            reason = _reason(metric, numbers, place, limit) if np.isnan(value) else ""
            others = (numbers[metric][random], numbers[metric][exchanged]) if of == "set" else None
            lines.append(_line(metric, of, Estimate(value, low, high, reason), others))
        where = everyone if of == "all" else members[0]
        found = _ratio_of(base, tuned, where, families, n_boot, level, seed)
        others = (numbers["cka_ratio"][random], numbers["cka_ratio"][exchanged]) if of == "set" else None
        lines.append(_line("cka_ratio", of, found, others))
    columns, estimates = _between(base, tuned, kinds, families, n_boot, level, seed)
    estimates |= _moved(base, tuned, families, n_boot, level, seed)
    lines += [_line(metric, "model", found, None) for metric, found in estimates.items()]
    return _result(
        lines,
        numbers,
        [everyone, *members],
        columns,
        (base, tuned),
        {
            "neurons": [list(one) for one in chosen],
            "n_neurons": len(chosen),
            "controls": [[list(one) for one in control] for control in sets],
            "n_exchanged": len(labels),
            "controls_are": "given"
            if own
            else f"random, matched per layer{' and in activity' if matched else ''}",
            "matched": None if own else matched,
            "average": average,
            "floor": limit,
            "n_boot": n_boot,
            "level": level,
            "seed": seed,
            "n": {kind: len(families[kind]) for kind in kinds},
            "n_families": {kind: len(set(families[kind])) for kind in kinds},
            "base": dict(base.settings),
            "tuned": dict(tuned.settings),
            "notes": notes,
        },
    )


def check_options(
    n_random_sets: int, matched: str | None, average: str, floor: object, n_boot: int, level: float
) -> None:
    """Refuse options of `entangled` that are unknown or out of range.

    Raises:
        StatisticsError: One is.
    """
    if matched not in ("activity", None):
        raise StatisticsError(f"matched={matched!r} was asked for; it is 'activity' or None.")
    if average not in ("prompts_first", "after"):
        raise StatisticsError(f"average {average!r} is unknown; it is 'prompts_first' or 'after'.")
    if n_random_sets < 1 or n_boot < 1 or not 0 < level < 1:
        raise StatisticsError(
            f"n_random_sets={n_random_sets}, n_boot={n_boot} and level={level} were asked for; the first two are at least 1,"
            " the level lies between 0 and 1."
        )
    if floor not in ("auto", None) and not (
        isinstance(floor, int | float) and np.isfinite(floor) and floor > 0
    ):
        raise StatisticsError(
            f"floor is {floor!r}; give a positive number in the unit of the activations, 'auto', or None."
        )


def _check_readings(base: ModelReading, tuned: ModelReading) -> list[str]:
    """Refuse readings of unlike shapes or prompts; return the kinds that both have."""
    for kind in ("harmful", "reasoning"):
        for name, reading in (("base", base), ("tuned", tuned)):
            if kind not in reading.activations or not reading.activations[kind].sizes["prompt"]:
                raise NotEnoughData(
                    f"the {name} reading has no {kind} prompts; entanglement holds what moved on reasoning against what moved on"
                    " safety, and needs both."
                )
    kinds = [kind for kind in base.activations if kind in tuned.activations]
    shape = base.activations["harmful"].shape[1:]
    for kind in kinds:
        ours, theirs = base.activations[kind], tuned.activations[kind]
        if ours.shape != theirs.shape or ours.shape[1:] != shape:
            raise ReferenceMismatch(
                f"{kind} activations have shape {ours.shape} in the base's reading and {theirs.shape} in the tuned model's, and"
                f" neurons of shape {shape} were expected; read the same prompts in models of one architecture."
            )
        labels = [one["prompt"].values.tolist() for one in (ours, theirs) if "prompt" in one.coords]
        if len(labels) == 2 and labels[0] != labels[1]:
            raise ReferenceMismatch(
                f"the two readings have other {kind} prompts, or the same in another order; read both models on the same list."
            )
        for name, one in (("base", ours), ("tuned", theirs)):
            check_finite(
                np.asarray(one.values), f"{kind} activations of the {name} model", ("prompt", "neuron")
            )
    return kinds


def _pairs(neurons: Any, n_layers: int, width: int) -> list[Neuron]:
    """Sorted distinct pairs, each of which these activations have."""
    its = getattr(neurons, "n_layers", n_layers), getattr(neurons, "d_mlp", width)
    if its != (n_layers, width):
        raise ReferenceMismatch(
            f"the set of neurons is of a model with {its[0]} layers of {its[1]}, and the readings have {n_layers} of {width}."
        )
    chosen: set[Neuron] = set()
    for item in getattr(neurons, "neurons", neurons):
        layer, neuron = (int(number) for number in item)
        if not (0 <= layer < n_layers and 0 <= neuron < width):
            raise UnknownNeuron(
                f"neuron {(layer, neuron)} was given; the readings have layers 0 to {n_layers - 1} with neurons 0 to {width - 1}."
            )
        chosen.add((layer, neuron))
    if not chosen:
        raise NotEnoughData(
            "entanglement of an empty set of neurons was asked for; give at least one neuron."
        )
    return sorted(chosen)


def _places(neurons: Iterable[Neuron], width: int) -> Int[np.ndarray, " member"]:
    return np.array([layer * width + neuron for layer, neuron in neurons], dtype=np.int64)


def _flat(activations: Any) -> Float[np.ndarray, "prompt neuron"]:
    values = np.asarray(activations.transpose("prompt", "layer", "neuron").values, dtype=np.float64)
    return values.reshape(len(values), -1)


def sides_of(base: ModelReading, tuned: ModelReading) -> Sides:
    """Pooled activations of both readings on safety and on reasoning prompts; neurons layer by layer."""
    return Sides(
        *(_flat(reading.activations[kind]) for kind in ("harmful", "reasoning") for reading in (base, tuned))
    )


def random_beside(
    chosen: Sequence[Neuron],
    sides: Sides,
    shape: tuple[int, int],
    n_sets: int,
    matched: str | None,
    seed: int,
) -> tuple[list[list[Neuron]], str]:
    """The random sets that `entangled` holds a set against, or why there are none.

    Args:
        chosen: The set.
        sides: Activations of all neurons; the base's decide what is alike.
        shape: Layers, and neurons in each.
        n_sets: How many at most.
        matched: "activity" or None.
        seed: Of the draws.
    """
    try:
        if matched is None:
            return random_neurons_per_layer(chosen, shape[1], n_sets, seed), ""
        features = np.stack([sides.base_safety.mean(axis=0), sides.base_reasoning.mean(axis=0)], axis=-1)
        return alike_sets(chosen, features.reshape(*shape, 2), n_sets, seed), ""
    except NotEnoughData as problem:
        return [], f"No random set stands beside this one: {problem}"


def _floor(sides: Sides, floor: float | Literal["auto"] | None) -> float | None:
    if floor != "auto":
        return floor
    means = np.concatenate([sides.base_safety.mean(axis=0), sides.base_reasoning.mean(axis=0)])
    positive = means[means > 0]
    return float(AUTO_FLOOR * positive.mean()) if len(positive) else None


def _digest(reading: ModelReading) -> str:
    return str(reading.settings.get("weights_digest"))


def _reason(
    metric: str, numbers: Mapping[str, Float[np.ndarray, " set"]], place: int, floor: float | None
) -> str:
    if metric == "floored_ras":
        return (
            "no floor was given"
            if floor is None
            else "no activation on some side is positive in either model"
        )
    empty = [side for side in ("safety", "reasoning") if numbers[f"used_{side}"][place] == 0]
    return f"no neuron is positive in both models on the {' and the '.join(empty)} prompts"


def _line(
    metric: str, of: str, found: Estimate, others: tuple[np.ndarray, np.ndarray] | None
) -> dict[str, Any]:
    """A row of the table; `others` are random sets' and exchanged labels' values, of which undefined ones are left out."""
    there, exchanged = [one[~np.isnan(one)] for one in others] if others is not None else [np.array([])] * 2
    reasons = [found.reason] if found.reason else []
    if others is not None and len(there) < len(others[0]):
        reasons.append(f"undefined in {len(others[0]) - len(there)} of {len(others[0])} random sets")
    here = not np.isnan(found.value)
    low, high = np.quantile(there, [0.025, 0.975]) if len(there) else (np.nan, np.nan)
    return {
        "metric": metric,
        "of": of,
        "value": found.value,
        "unit": UNITS.get(metric, "activation" if metric in SHIFTS else ""),
        "low": found.low,
        "high": found.high,
        "p": control_p(found.value, exchanged, "greater") if here and len(exchanged) else np.nan,
        "exchanged": float(exchanged.mean()) if len(exchanged) else np.nan,
        "n_exchanged": len(exchanged),
        "p_random": control_p(found.value, there, "greater") if here and len(there) else np.nan,
        "percentile": percentile_among(found.value, there).percentile if here and len(there) else np.nan,
        "random": float(there.mean()) if len(there) else np.nan,
        "random_low": float(low),
        "random_high": float(high),
        "n_controls": len(there),
        "reason": "; ".join(reasons),
    }


def _exchanged(
    base: ModelReading,
    chosen: list[Neuron],
    shape: tuple[int, int],
    difference: Float[np.ndarray, "pair layer neuron"] | None,
    families: Sequence[str] | None,
    n_sets: int,
    seed: int,
) -> tuple[list[list[Neuron]], str]:
    """Sets chosen on exchanged labels, or why there are none."""
    if difference is not None:
        given = np.asarray(difference, dtype=np.float64)
        if given.ndim != 3 or given.shape[1:] != shape or not len(given):
            raise ReferenceMismatch(
                f"difference has shape {given.shape}; give [pair, {shape[0]} layers, {shape[1]} neurons] of the base model."
            )
        return exchanged_sets(given, chosen, n_sets, families, seed), ""
    pairs = base.settings.get("twins") or []
    if not pairs or "harmless" not in base.activations:
        return [], (
            "No p: without harmless twins there are no labels to exchange. Give the twins as harmless=, or difference= of the"
            " pairs that chose the neurons."
        )
    asked, twins = (list(side) for side in zip(*pairs, strict=True))
    rises = base.activations["harmful"].values[asked] - base.activations["harmless"].values[twins]
    labels = [base.families("harmful")[place] for place in asked]
    return exchanged_sets(np.asarray(rises, dtype=np.float64), chosen, n_sets, labels, seed), ""


def _kinds_of(reading: ModelReading, kinds: Iterable[str]) -> dict[str, Float[np.ndarray, "prompt neuron"]]:
    return {kind: _flat(reading.activations[kind]) for kind in kinds}


def _ratios(
    base: ModelReading, tuned: ModelReading, members: Sequence[Int[np.ndarray, " member"]]
) -> list[float]:
    """The CKA ratio of the activations of each set's members; NaN where it is undefined."""
    kinds = ("harmful", "harmless")
    if any(
        kind not in one.activations or one.activations[kind].sizes["prompt"] < 4
        for kind in kinds
        for one in (base, tuned)
    ):
        return [float("nan")] * len(members)
    ours, theirs = _kinds_of(base, kinds), _kinds_of(tuned, kinds)
    return [
        moved_ratio(
            *(distance(u_centred(ours[kind][:, one]), u_centred(theirs[kind][:, one])) for kind in kinds)
        )[0]
        for one in members
    ]


def _ratio_of(
    base: ModelReading,
    tuned: ModelReading,
    members: Int[np.ndarray, " member"],
    families: Mapping[str, Sequence[str]],
    n_boot: int,
    level: float,
    seed: int,
) -> Estimate:
    kinds = [
        kind for kind in ("harmful", "harmless") if kind in base.activations and kind in tuned.activations
    ]
    ours, theirs = (
        {kind: values[:, None, members] for kind, values in _kinds_of(reading, kinds).items()}
        for reading in (base, tuned)
    )
    return likeness(ours, theirs, families, n_boot, level, seed)[1]["cka_ratio"]


def _between(
    base: ModelReading,
    tuned: ModelReading,
    kinds: Sequence[str],
    families: Mapping[str, Sequence[str]],
    n_boot: int,
    level: float,
    seed: int,
) -> tuple[dict[str, Float[np.ndarray, " layer"]], dict[str, Estimate]]:
    """What compares the residual streams: columns by layer, and numbers of the model as a whole."""
    if any(kind not in reading.residual for reading in (base, tuned) for kind in kinds):
        missing = Estimate(float("nan"), reason="the residual stream was not read")
        return {}, dict.fromkeys((*(f"cka_{kind}" for kind in kinds), "cka_ratio", *COSINES), missing)
    ours, theirs = (
        {kind: np.asarray(reading.residual[kind].values, dtype=np.float64) for kind in kinds}
        for reading in (base, tuned)
    )
    for name, arrays in (("base", ours), ("tuned", theirs)):
        for kind, values in arrays.items():
            check_finite(
                values, f"{kind} residual stream of the {name} model", ("prompt", "layer", "d_model")
            )
    columns, estimates = likeness(ours, theirs, families, n_boot, level, seed)
    more_columns, more = angles(ours, theirs, families, n_boot, level, seed)
    return columns | more_columns, estimates | more


def _moved(
    base: ModelReading,
    tuned: ModelReading,
    families: Mapping[str, Sequence[str]],
    n_boot: int,
    level: float,
    seed: int,
) -> dict[str, Estimate]:
    """KL, weight drift and the change in refusal."""
    nothing = float("nan")
    found = {}
    if tuned.divergence is None:
        found["kl"] = Estimate(nothing, reason="log-probabilities on task tokens were not read")
    else:
        of = dict(
            zip(tuned.activations["reasoning"]["prompt"].values.tolist(), families["reasoning"], strict=True)
        )
        labels = [of[prompt] for prompt in tuned.divergence["prompt"].values.tolist()]
        found["kl"] = _mean_of(tuned.divergence.values, labels, n_boot, level, seed)
    reason = tuned.settings.get("reasons", {}).get("drift", "") or "weights were not read"
    found["weight_drift"] = (
        Estimate(nothing, reason=reason)
        if tuned.drift is None
        else Estimate(tuned.drift.relative, reason="one number, no sample")
    )
    for kind in ("harmful", "harmless"):
        if kind not in base.refusal or kind not in tuned.refusal:
            found[f"refusal_change_{kind}"] = Estimate(nothing, reason="refusal scores were not read")
            continue
        change = tuned.refusal[kind].values - base.refusal[kind].values
        found[f"refusal_change_{kind}"] = _mean_of(change, families[kind], n_boot, level, seed)
    return found


def _mean_of(
    values: Float[np.ndarray, " prompt"], families: Sequence[str], n_boot: int, level: float, seed: int
) -> Estimate:
    if len(set(families)) < 2:
        return Estimate(float(values.mean()), reason="no interval: the prompts are of one family")
    found = bootstrap_interval(values, list(families), level=level, n_resamples=n_boot, seed=seed)
    return Estimate(float(found.estimate), float(found.low), float(found.high))


def _result(
    lines: list[dict[str, Any]],
    numbers: Mapping[str, Float[np.ndarray, " set"]],
    members: Sequence[Int[np.ndarray, " member"]],
    columns: Mapping[str, Float[np.ndarray, " layer"]],
    readings: tuple[ModelReading, ModelReading],
    settings: dict[str, Any],
) -> Entanglement:
    import pandas as pd

    base, tuned = readings
    n_exchanged = settings["n_exchanged"]
    n_random = len(members) - 2 - n_exchanged
    word = "control" if settings["controls_are"] == "given" else "random"
    sets = pd.DataFrame(
        {
            "of": ["all", "set", *[word] * n_random, *["exchanged"] * n_exchanged],
            "number": [0, 0, *range(n_random), *range(n_exchanged)],
            "n": [len(one) for one in members],
            **{metric: numbers[metric] for metric in (*SHIFTS, "cka_ratio", *COUNTS)},
        }
    )
    layers = pd.DataFrame(dict(columns))
    layers.insert(0, "layer", np.arange(len(layers)))
    kl = {} if tuned.divergence is None else _by_id(tuned.divergence)
    rows = []
    for kind in settings["n"]:
        scores = [_by_id(one.refusal[kind]) if kind in one.refusal else {} for one in readings]
        ids = (
            [str(one) for one in base.activations[kind]["prompt"].values]
            if "prompt" in base.activations[kind].coords
            else []
        )
        for place, family in enumerate(base.families(kind)):
            prompt = ids[place] if ids else str(place)
            rows.append(
                {
                    "kind": kind,
                    "prompt": prompt,
                    "family": family,
                    "refusal_base": scores[0].get(prompt, np.nan),
                    "refusal_tuned": scores[1].get(prompt, np.nan),
                    "kl": kl.get(prompt, np.nan) if kind == "reasoning" else np.nan,
                }
            )
    return Entanglement(pd.DataFrame(lines), sets, layers, pd.DataFrame(rows), settings)


def _by_id(array: Any) -> dict[str, float]:
    return dict(zip(map(str, array["prompt"].values), array.values.tolist(), strict=True))
