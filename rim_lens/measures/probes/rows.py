"""The table of probes: what separates on held-out requests, what ablation did, and what may be said of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_lens.measures.heads.table import HeadRule
from rim_lens.measures.probes.fitting import Probes, taken
from rim_lens.measures.probes.groups import Groups
from rim_lens.measures.probes.separating import cross_validate, separation

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

COLUMNS = (
    *("condition", "layer", "place", "n_positive", "n_negative", "auc", "auc_low", "auc_high", "accuracy"),
    *("share_positive", "share_negative", "auc_cv", "auc_cv_low", "auc_cv_high", "accuracy_cv"),
    *(
        "baseline",
        "effect",
        "effect_low",
        "effect_high",
        "effect_twins",
        "effect_twins_low",
        "effect_twins_high",
    ),
    *("specificity", "specificity_low", "specificity_high", "percentile", "n_controls", "state"),
)
_TEXT = ("condition", "place", "state")
_COUNTS = ("layer", "n_positive", "n_negative", "n_controls")


def separations(
    probes: Probes,
    train: Sequence[xr.DataArray],
    held_out: Sequence[xr.DataArray | None],
    select: Groups,
    evaluate: Groups,
    groups: tuple[str, str],
    folds: int,
    seed: int,
) -> list[dict[str, Any]]:
    """A row per layer and place: cross-validated on select, and held against evaluate samples (None: none there)."""
    places = list(probes.places)
    families = select.families(groups[0]), select.families(groups[1])
    positive, negative = (taken(side, places) for side in train)
    inside = cross_validate(positive, negative, families, folds, seed=seed)
    n_layers, d_model = probes.direction.shape[0], probes.direction.shape[2]
    tested = [
        np.empty((0, n_layers, len(places), d_model))
        if streams is None
        else streams.reindex(place=places).values
        for streams in held_out
    ]
    outside = separation(
        probes,
        tested[0],
        tested[1],
        (evaluate.families(groups[0]), evaluate.families(groups[1])),
        seed=seed,
    )
    shares = [probes.score_share(streams) for streams in tested]
    counts = [np.isfinite(streams[:, 0, :, 0]).sum(axis=0) for streams in tested]
    return [
        blank(probes.condition, layer, place)
        | {
            "n_positive": int(counts[0][column]),
            "n_negative": int(counts[1][column]),
            "auc": float(outside.auc[layer, column]),
            "auc_low": float(outside.low[layer, column]),
            "auc_high": float(outside.high[layer, column]),
            "accuracy": float(outside.accuracy[layer, column]),
            "share_positive": float(shares[0][layer, column]),
            "share_negative": float(shares[1][layer, column]),
            "auc_cv": float(inside.auc[layer, column]),
            "auc_cv_low": float(inside.low[layer, column]),
            "auc_cv_high": float(inside.high[layer, column]),
            "accuracy_cv": float(inside.accuracy[layer, column]),
            "_gap": float(inside.gap[layer, column]),
            "_empty": not probes.direction[layer, column].any(),
        }
        for layer in range(n_layers)
        for column, place in enumerate(places)
    ]


def blank(condition: str, layer: int, place: str) -> dict[str, Any]:
    """A row in which nothing was measured."""
    return {
        **dict.fromkeys(COLUMNS, float("nan")),
        **{"condition": condition, "layer": layer, "place": place},
        **{"n_positive": 0, "n_negative": 0, "n_controls": 0, "state": "not tested"},
    }


def without(
    condition: str, n_layers: int, places: Sequence[str], evaluate: Groups, groups: tuple[str, str], why: str
) -> list[dict[str, Any]]:
    """Rows of a condition in which no probe could be trained."""
    counts = {
        "n_positive": len(evaluate.batches[groups[0]]),
        "n_negative": len(evaluate.batches[groups[1]]),
    }
    return [
        blank(condition, layer, place) | counts | {"state": why}
        for layer in range(n_layers)
        for place in places
    ]


def state(row: dict[str, Any], min_effect: float, evaluate: Groups, groups: tuple[str, str]) -> str:
    """What a row says in words: never of refusal without an ablation."""
    if math.isnan(row["auc"]):
        of = sum(evaluate.outcomes.values())
        lacking = groups[0] if row["n_positive"] == 0 else groups[1]
        return f"not evaluated: 0 of {of} {lacking}" if of else "not evaluated: no token there"
    if row["_empty"]:
        return "both classes read the same"
    if math.isnan(row["auc_low"]):
        separates = "one family, no interval"
    else:
        separates = "separates" if row["auc_low"] > 0.5 else "does not separate"
    if math.isnan(row["effect"]):
        return f"{separates}, not tested{f' ({evaluate.unscored})' if evaluate.unscored else ''}"
    return f"{separates}, {_moves(row, min_effect)}"


def _moves(row: dict[str, Any], min_effect: float) -> str:
    if abs(row["effect"]) < min_effect or not _away(row, "effect"):
        return "refusal unmoved"
    if row["n_controls"] and row["percentile"] < 95:
        return "moves refusal no more than controls do"
    if not _specific(row):
        return "not shown to move harmless requests less"
    if row["effect"] > 0:
        return "raises refusal"
    return "lowers refusal" if row["baseline"] > 0 else "no refusal to lower"


def _specific(row: dict[str, Any]) -> bool:
    """Whether harmful requests move further than harmless ones, by the smallest share that a head's verdict asks for too."""
    low, gap, high = (row[f"specificity{end}"] for end in ("_low", "", "_high"))
    if math.isnan(gap):  # no request has its twin here, and the harmless ones stand for them
        low, gap, high = (row["effect"] - row[f"effect_twins{end}"] for end in ("_high", "", "_low"))
    return bool((low > 0 or high < 0) and gap / row["effect"] >= HeadRule().min_specific)


def _away(row: dict[str, Any], name: str) -> bool:
    return bool(row[f"{name}_low"] > 0 or row[f"{name}_high"] < 0)


def frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows as a table, counts as whole numbers."""
    import pandas as pd

    table = pd.DataFrame(rows, columns=list(COLUMNS))
    kinds = {name: str if name in _TEXT else int if name in _COUNTS else float for name in COLUMNS}
    return table.astype({name: kind for name, kind in kinds.items() if kind is not str})
