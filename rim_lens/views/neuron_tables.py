"""A study of neurons as tables of text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rim_lens.views.tables import Table
from rim_lens.views.words import between, p_value, per_cent, plain, share, signed

if TYPE_CHECKING:
    import pandas as pd

    from rim_lens.measures.entanglement.result import Entanglement
    from rim_lens.measures.neurons.sets import NeuronSet

MOST = 60  # neurons in the table; the folder holds all
_LONG = 24


def set_table(found: NeuronSet, writers: pd.DataFrame | None = None) -> Table:
    """The neurons by falling score, and what each does by itself where that was measured."""
    told: dict[tuple[int, int], Any] = {}
    if writers is not None:
        told = {(int(row["layer"]), int(row["neuron"])): row for row in writers.to_dict("records")}
    rows = []
    for at in found.ranked()[:MOST]:
        row = told.get(at)
        rows.append(
            (
                f"L{at[0]}N{at[1]}",
                plain(None if found.scores is None else float(found.scores[at])),
                plain(None if found.activity is None else float(found.activity[at])),
                "–" if row is None else _with_interval(row, "total"),
                "–" if row is None else _with_interval(row, "direct"),
                "–" if row is None or math.isnan(row["share"]) else plain(row["share"], 2),
                "–" if row is None else "yes" if row["writer"] else "no",
            )
        )
    more = f" The first {MOST} of {len(found)} by score." if len(found) > MOST else ""
    return Table(
        "neurons",
        f"The {len(found)} neurons",
        (
            "neuron",
            "score",
            "activity",
            "total effect, nats [95 %]",
            "direct, nats [95 %]",
            "share",
            "writer",
        ),
        tuple(rows),
        "Score: what they were chosen by (difference between the forms of a pair, mean over pairs). Activity: mean pooled activation."
        " Total: effect of removing that neuron alone on the refusal score of harmful requests; direct: what of it goes straight to"
        f" the logits; a writer's share is half or more.{more}",
        folded=len(rows) > _LONG,
    )


def sweep_table(made_by: dict[str, Any]) -> Table:
    """Set sizes over m and the share of pairs that must agree."""
    rows = tuple(
        (
            str(row["m"]),
            share(row["min_fraction"]),
            str(row["size"]),
            "< 0.001" if row["by_chance"] < 0.001 else plain(row["by_chance"]),
            str(row["n_layers"]),
            str(row["largest_layer"]),
        )
        for row in made_by["sweep"]
    )
    return Table(
        "sweep",
        "How the size of the set hangs on the rule",
        ("m", "share of pairs", "neurons", "by chance", "layers", "most in a layer"),
        rows,
        "By chance: the size to expect if each pair named m neurons at random.",
        folded=len(rows) > _LONG,
    )


def dose_table(table: pd.DataFrame) -> Table:
    """Removal of more and more neurons."""
    rows = tuple(
        (
            str(row["size"]),
            str(row["n_layers"]),
            "difference" if row["measure"] == "specificity" else row["kind"],
            _with_interval(row, "change"),
            p_value(row["p"]),
            _beside(row),
            f"{per_cent(row['percentile'])} of {row['n_controls']}" if row["n_controls"] else "–",
        )
        for row in table.sort_values("size", kind="stable").to_dict("records")
    )
    return Table(
        "dose",
        "Removing more and more neurons, in the order of the ranking",
        ("neurons", "layers", "requests", "change, nats [95 %]", "p", "random sets [95 %]", "larger than"),
        rows,
        "Difference: harmful request minus its twin. p: corrected over sizes. Beyond the chosen set the ranking goes on by score.",
        folded=len(rows) > _LONG,
    )


def entanglement_table(name: str, found: Entanglement) -> Table:
    """RAS and its rivals of the set, beside sets on exchanged labels and random ones."""
    rows = tuple(
        (
            row["metric"].replace("_", " "),
            row["of"],
            plain(row["value"]),
            "–" if math.isnan(row["low"]) else f"[{plain(row['low'])}, {plain(row['high'])}]",
            "–" if math.isnan(row["p"]) else p_value(row["p"]),
            plain(row["exchanged"]),
            "–"
            if math.isnan(row["random"])
            else f"{plain(row['random'])} [{plain(row['random_low'])}, {plain(row['random_high'])}]",
            "–" if math.isnan(row["percentile"]) else per_cent(row["percentile"]),
            row["reason"] or row["unit"],
        )
        for row in found.table.to_dict("records")
    )
    return Table(
        f"entanglement_{name}",
        f"RAS and its rivals, base to {name}",
        (
            "metric",
            "of",
            "value",
            "95 %",
            "p",
            "exchanged labels, mean",
            "random sets [95 %]",
            "larger than",
            "unit, or why not",
        ),
        rows,
        "p: rank among sets chosen on exchanged labels, the test. Larger than: share of random sets matched in activity, a description."
        " Rivals beside RAS are looked at together: their p are not corrected over metrics.",
        folded=len(rows) > _LONG,
    )


def neurons_restored_table(name: str, table: pd.DataFrame) -> Table:
    """What the base's activations bring back."""
    rows = tuple(
        (
            row["kind"],
            row["measure"],
            str(row["n"]),
            f"{plain(row['base'])} / {plain(row['tuned'])} → {plain(row['patched'])}",
            _with_interval(row, "effect"),
            p_value(row["p"]),
            "–"
            if math.isnan(row["restored"])
            else f"{signed(row['restored'])} {between(row['restored_low'], row['restored_high'])}",
            _beside(row),
            str(row["n_controls"]),
        )
        for row in table.to_dict("records")
    )
    return Table(
        f"restored_{name}",
        f"Refusal in {name} with the base's activations put into these neurons",
        (
            *("on", "measure", "n", "base / tuned → patched", "effect [95 %]", "p", "of the loss restored"),
            *("random sets [95 %]", "sets"),
        ),
        rows,
        "Of the loss restored: – where tuning is not shown to have lowered it. An edit that raises twins as well restores nothing.",
    )


def multiverse_table(name: str, table: pd.DataFrame) -> Table:
    """Every combination of what the paper leaves open."""
    rows = tuple(
        (
            row["response"],
            row["pool"],
            row["site"],
            str(row["m"]),
            share(row["min_fraction"]),
            row["average"].replace("_", " "),
            str(row["n_neurons"]),
            plain(row["ras"]),
            plain(row["all"]),
            "–" if math.isnan(row["p"]) else p_value(row["p"]),
            "–" if math.isnan(row["percentile"]) else per_cent(row["percentile"]),
        )
        for row in table.to_dict("records")
    )
    return Table(
        f"multiverse_{name}",
        f"RAS over every choice the paper leaves open, base to {name}",
        (
            *(
                "response",
                "pool",
                "tensor",
                "m",
                "share of pairs",
                "averaged",
                "neurons",
                "RAS",
                "all neurons",
                "p",
            ),
            "larger than",
        ),
        rows,
        "RAS has the unit of what is read: values of different rows do not compare, their p and ranks do. Rows share their prompts.",
        folded=True,
    )


def _with_interval(row: Any, name: str) -> str:
    return f"{signed(row[name])} {between(row[f'{name}_low'], row[f'{name}_high'])}"


def _beside(row: Any) -> str:
    if math.isnan(row["random"]):
        return "–"
    return f"{signed(row['random'])} {between(row['random_low'], row['random_high'])}"
