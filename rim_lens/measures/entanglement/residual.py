"""What training moved in the residual stream: likeness of both models by layer, and the angle of safety and reasoning.

Directions of a model, at the last prompt token of each layer: *safety* = mean of harmful − mean of harmless requests;
*reasoning* = mean of reasoning prompts − mean of harmless requests. Each takes another half of the harmless requests (by
family, and both ways round), as a chance deviation of one shared mean would lean both the same way. *Shift* = mean of the
reasoning prompts in the tuned model − in the base, against the base's safety direction: whether what training moved on
reasoning prompts lies along safety. The formulas are in `rim_lens.measures.entanglement.similarity`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rim_lens.errors import NotEnoughData
from rim_lens.measures.entanglement.shifting import family_weights
from rim_lens.measures.entanglement.similarity import (
    UNMOVED,
    Whitener,
    distance,
    half_samples,
    moved_ratio,
    recentred,
    u_centred,
)
from rim_lens.measures.stats import family_index

Kinds = Mapping[str, Float[np.ndarray, "prompt layer dim"]]
COSINES = ("whitened_cosine_base", "whitened_cosine_tuned", "whitened_cosine_shift")


class Estimate(NamedTuple):
    """A number, its interval, and why one of them is missing."""

    value: float
    low: float = float("nan")
    high: float = float("nan")
    reason: str = ""


def interval(draws: Float[np.ndarray, " draw"], level: float) -> tuple[float, float]:
    """The middle `level` of the draws that are defined; NaN where none is."""
    there = draws[~np.isnan(draws)]
    if not len(there):
        return float("nan"), float("nan")
    low, high = np.quantile(there, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def likeness(
    base: Kinds, tuned: Kinds, families: Mapping[str, Sequence[str]], n_samples: int, level: float, seed: int
) -> tuple[dict[str, Float[np.ndarray, " layer"]], dict[str, Estimate]]:
    """Debiased CKA of base and tuned by layer and kind, and the CKA ratio, with half-sample intervals over families.

    Args:
        base: Kind → activations of the base, [prompt, layer, dim].
        tuned: The tuned model's.
        families: Kind → one label per prompt.
        n_samples: Half samples.
        level: Coverage.
        seed: Of the half samples.

    Returns:
        Column → one number per layer, and metric → its mean over layers (the ratio: of the sums over layers).
    """
    columns: dict[str, Float[np.ndarray, " layer"]] = {}
    estimates: dict[str, Estimate] = {}
    apart: dict[str, np.ndarray] = {}
    grams: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for kind in base:
        n, n_layers = base[kind].shape[:2]
        if n < 4:
            estimates[f"cka_{kind}"] = Estimate(
                float("nan"), reason=f"{n} {kind} prompts, and debiased CKA takes at least 4"
            )
            continue
        grams[kind] = [
            (u_centred(base[kind][:, layer]), u_centred(tuned[kind][:, layer])) for layer in range(n_layers)
        ]
        apart[kind] = np.array([distance(*pair) for pair in grams[kind]])
        columns[f"cka_{kind}"] = 1 - apart[kind]
    halves = half_samples({kind: families[kind] for kind in grams}, n_samples, seed) if grams else []
    drawn = {kind: np.full((n_samples, len(pairs)), np.nan) for kind, pairs in grams.items()}
    for place, half in enumerate(halves):
        for kind, rows in half.items():
            if len(rows) >= 4:
                block = np.ix_(rows, rows)
                # A U-centred Gram matrix differs from the plain one by sums of row and column, which centring takes out.
                drawn[kind][place] = [
                    distance(*(recentred(gram[block]) for gram in pair)) for pair in grams[kind]
                ]
    for kind, values in apart.items():
        low, high = interval(_mean(1 - drawn[kind]), level)
        reason = "" if not np.isnan(values).all() else "activations do not vary over the prompts"
        estimates[f"cka_{kind}"] = Estimate(float(_mean(1 - values)), low, high, reason or _narrow(low, kind))
    if "harmful" in apart and "harmless" in apart:
        pairs = list(zip(apart["harmful"], apart["harmless"], strict=True))
        columns["cka_ratio"] = np.array([moved_ratio(*pair)[0] for pair in pairs])
        value, reason = moved_ratio(*(float(_mean(apart[kind])) for kind in ("harmful", "harmless")))
        both = [_mean(drawn[kind]) for kind in ("harmful", "harmless")]
        fit = both[1] > UNMOVED
        low, high = interval(np.where(fit, both[0] / np.where(fit, both[1], 1.0), np.nan), level)
        if reason:
            low = high = float("nan")
        estimates["cka_ratio"] = Estimate(value, low, high, reason or _narrow(low, "harmful and harmless"))
    else:
        missing = "harmless requests" if "harmless" not in base else "four prompts of each kind"
        estimates["cka_ratio"] = Estimate(
            float("nan"), reason=f"the ratio takes {missing}, which were not given"
        )
    return columns, estimates


def angles(
    base: Kinds, tuned: Kinds, families: Mapping[str, Sequence[str]], n_boot: int, level: float, seed: int
) -> tuple[dict[str, Float[np.ndarray, " layer"]], dict[str, Estimate]]:
    """Whitened cosines of safety and reasoning directions by layer, with bootstrap intervals over families.

    The covariance, and which half of the harmless requests a family is in, stay as they are in every resample.

    Arguments are those of `likeness`.
    """
    nothing = float("nan")
    if "harmless" not in base:
        reason = "directions take harmless requests, and none were given"
        return {}, {name: Estimate(nothing, reason=reason) for name in COSINES}
    index, n_families = family_index(list(families["harmless"]), len(families["harmless"]))
    if n_families < 2:
        reason = "the harmless requests are of one family, and each direction takes half of the families"
        return {}, {name: Estimate(nothing, reason=reason) for name in COSINES}
    half = np.isin(index, np.random.default_rng(seed).permutation(n_families)[: n_families // 2])
    weights = family_weights({kind: families[kind] for kind in base}, n_boot, seed)
    whole = {kind: np.ones((1, len(families[kind]))) for kind in base}
    n_layers = base["harmful"].shape[1]
    columns = {name: np.full(n_layers, np.nan) for name in COSINES}
    drawn = {name: np.full((n_boot, n_layers), np.nan) for name in COSINES}
    for layer in range(n_layers):
        ours = {kind: values[:, layer] for kind, values in base.items()}
        theirs = {kind: values[:, layer] for kind, values in tuned.items()}
        for which, used in (("value", whole), ("draw", weights)):
            if used is None:
                continue
            found = dict(zip(COSINES, _cosines(ours, theirs, half, used), strict=True))
            for name, values in found.items():
                if which == "value":
                    columns[name][layer] = values[0]
                else:
                    drawn[name][:, layer] = values
    estimates = {}
    for name, values in columns.items():
        low, high = interval(_mean(drawn[name]), level)
        empty = np.isnan(values).all()
        if empty:
            low = high = nothing
        reason = (
            "one of the directions is zero: nothing moved, or nothing varies"
            if empty
            else _narrow(low, "a kind of")
        )
        estimates[name] = Estimate(float(_mean(values)), low, high, reason)
    return columns, estimates


def _cosines(
    base: Mapping[str, np.ndarray],
    tuned: Mapping[str, np.ndarray],
    half: np.ndarray,
    weights: Mapping[str, np.ndarray],
) -> list[np.ndarray]:
    """The three cosines of one layer, one of each per row of the weights."""
    found = []
    whitened_base: Whitener | None = None
    n = len(weights["harmful"])
    for model in (base, tuned):
        try:
            whitener = Whitener(np.concatenate([rows - rows.mean(axis=0) for rows in model.values()]))
        except NotEnoughData:
            found.append(np.full(n, np.nan))
            continue
        if model is base:
            whitened_base = whitener
        rows = {kind: whitener(values) for kind, values in model.items()}
        harmful, reasoning = (_average(rows[kind], weights[kind]) for kind in ("harmful", "reasoning"))
        halves = [_average(rows["harmless"][part], weights["harmless"][:, part]) for part in (half, ~half)]
        both = [_angle(harmful - halves[one], reasoning - halves[1 - one]) for one in (0, 1)]
        found.append(np.mean(both, axis=0))
    if whitened_base is None:
        return [*found, np.full(n, np.nan)]
    safety = _average(whitened_base(base["harmful"]), weights["harmful"]) - _average(
        whitened_base(base["harmless"]), weights["harmless"]
    )
    change = _average(whitened_base(tuned["reasoning"] - base["reasoning"]), weights["reasoning"])
    return [*found, _angle(safety, change)]


def _average(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = weights.sum(axis=1, keepdims=True)
    return np.where(total > 0, weights @ rows / np.where(total > 0, total, 1.0), np.nan)


def _angle(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    fit = lengths > 0
    return np.where(fit, (first * second).sum(axis=1) / np.where(fit, lengths, 1.0), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over layers, those left out that are undefined; NaN where all are."""
    there = ~np.isnan(values)
    counts = there.sum(axis=-1)
    return np.where(counts > 0, np.where(there, values, 0.0).sum(axis=-1) / np.maximum(counts, 1), np.nan)


def _narrow(low: float, kinds: str) -> str:
    return f"no interval: too few families of {kinds} prompts" if np.isnan(low) else ""
