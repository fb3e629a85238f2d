"""What the tests of a circuit say, in sentences and as bars."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rim_lens.measures.circuits.asking import TUNED, TWINS
from rim_lens.views import words
from rim_lens.views.text import visible

if TYPE_CHECKING:
    from rim_lens.measures.circuits.result import Circuit

OTHER_RUN = {TWINS: "its harmless twin", TUNED: "the tuned model"}


def other_run(contrast: str) -> str:
    """What is heard instead in a contrast, in words.

    >>> other_run("twins"), other_run("careful")
    ('its harmless twin', 'the same request in “careful”')
    """
    return OTHER_RUN.get(contrast, f"the same request in “{visible(contrast)}”")


def shares(circuit: Circuit) -> list[dict[str, Any]]:
    """Faithfulness, completeness and each node's minimality on harmful requests: name, a sentence, and what its bar needs.

    Each: name, node, share, low, high, n, n_families; random, random_low, random_high, n_random (NaN and 0 where none was
    drawn); told. Empty where no node is kept, or the circuit was selected by hand and not tested.
    """
    table = circuit.tests
    found = []
    for row in table[table["kind"] == "harmful"].to_dict("records"):
        found.append(
            {
                "name": row["measure"],
                "node": visible(row["node"]),
                "share": row["share"],
                "low": row["share_low"],
                "high": row["share_high"],
                "n": int(row["n"]),
                "n_families": int(row["n_families"]),
                "random": row["random"],
                "random_low": row["random_low"],
                "random_high": row["random_high"],
                "n_random": 0 if math.isnan(row["random"]) else int(row["n_controls"]),
                "told": _sentence(row, len(circuit.kept())),
            }
        )
    return found


def elsewhere(circuit: Circuit) -> list[dict[str, Any]]:
    """What removing the circuit, or all else, does on other prompts: measure, kind, unit, change with its interval, p."""
    table = circuit.tests
    rows = table[(table["kind"] != "harmful") & (table["measure"] != "minimality")]
    keys = ("measure", "kind", "unit", "n", "full", "after", "change", "change_low", "change_high", "p")
    return [{key: row[key] for key in keys} for row in rows.to_dict("records")]


def _sentence(row: dict[str, Any], n_kept: int) -> str:
    low, high = words.share(row["share_low"]), words.share(row["share_high"])
    share = f"{words.share(row['share'])} ({low} to {high})"
    own = "1 node" if n_kept == 1 else f"{n_kept} nodes"
    if row["measure"] == "minimality":
        return f"Without {visible(row['node'])} too, the circuit loses {share} of refusal."
    if row["measure"] == "faithfulness":
        told = f"With all but the circuit's {own} replaced, {share} of refusal stays."
    else:
        told = f"With the circuit's {own} replaced, {share} of refusal goes."
    if math.isnan(row["random"]):
        return f"{told} No random circuit was drawn beside it."
    random = words.share(row["random"])
    if row["n_controls"] > 1:
        random += f", {words.share(row['random_low'])} to {words.share(row['random_high'])}"
    return f"{told} Of {int(row['n_controls'])} random circuits of its shape: {random}."
