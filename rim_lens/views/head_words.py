"""What is said of heads: found by ablation, removed, and edited under a chain of thought."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rim_lens.chat.conditions import is_control
from rim_lens.measures.removal_table import DIFFERENCE
from rim_lens.views import numbers
from rim_lens.views.finding import (
    HIGH,
    LEVEL,
    SPECIFIC,
    Finding,
    Status,
    excludes_zero,
    refused_of,
    share_of,
)
from rim_lens.views.words import between, listed, p_value, per_cent, plain, share, signed

if TYPE_CHECKING:
    import pandas as pd

    from rim_lens.measures.heads.removal import RemovalEffects
    from rim_lens.measures.heads.result import RefusalHeads


def head_findings(heads: RefusalHeads, design: Mapping[str, Any]) -> list[Finding]:
    """The heads found by ablation: together beside random sets, and one by one.

    Args:
        heads: `StudyResult.heads`.
        design: `StudyResult.design`.
    """
    from rim_lens.measures.heads.finding import find_heads

    n_select, settings = design["n_select"], design["settings"]
    if not heads.found:
        smallest = inspect.signature(find_heads).parameters["min_gain"].default
        return [
            Finding(
                "Heads found by ablation",
                "not shown",
                f"None. On {n_select} select requests, zeroing no single head lowers the mean refusal score by"
                f" {smallest:g} nats, so that no set was begun (at most {settings['max_heads']} heads were looked for)."
                " Heads that fully stand in for each other would be missed.",
            )
        ]
    names = [numbers.head_name(layer, head) for layer, head in heads.found]
    return [
        _set_finding(names, heads.set, n_select, settings["n_random_sets"]),
        _single_heads(heads.table.to_dict("records")),
    ]


def _set_finding(names: list[str], effect: Mapping[str, Any], n_select: int, n_asked: int) -> Finding:
    whole, gap, n_controls = effect["effect"], effect["specificity"], effect["n_controls"]
    real = excludes_zero(whole)
    specific = excludes_zero(gap) and gap["estimate"] / whole["estimate"] >= SPECIFIC if real else False
    apart = n_controls > 0 and effect["percentile"] >= HIGH
    sets = (
        f"all {n_controls} other sets with as many heads in each layer"
        if n_controls < n_asked
        else f"{n_controls} random sets with as many heads in each layer"
    )
    status: Status
    if not real:
        lead, status = "removal has no effect that its interval sets apart from zero", "not shown"
    elif not specific:
        lead, status = (
            "removal is not shown to shift harmful requests more than their harmless twins",
            "not shown",
        )
    elif not n_controls:
        lead, status = "the effect is specific, and there is no other set to hold it against", "cannot tell"
    elif not apart:
        lead, status = (
            "the effect is specific to harmful requests, but not shown to be more than random heads of the same layers have",
            "not shown",
        )
    elif whole["estimate"] > 0:
        lead, status = "removal raises refusal on requests that did not choose them", "not shown"
    else:
        lead, status = "refusal depends on this, specifically and beyond random heads", "shown"
    beside = (
        f"The effect is larger in size than that of {per_cent(effect['percentile'])} of {sets}"
        f" ({p_value(effect['control_p'])}; so many sets allow no p below 1/{n_controls + 1})."
        if n_controls
        else "The set holds all heads of its layers, so that no other has as many there."
    )
    return Finding(
        "Heads found by ablation",
        status,
        f"{listed(names)}, chosen on {n_select} requests of the select side: {lead}. On {whole['n']} other requests, zeroing"
        f" {'it' if len(names) == 1 else 'them together'} changes the refusal score by {signed(whole['estimate'])} nats"
        f" {between(whole['low'], whole['high'])} on harmful requests and by {signed(effect['effect_twins'])} on their twins"
        f" (specificity {signed(gap['estimate'])} {between(gap['low'], gap['high'])}). Share of harmful requests leaning to"
        f" refusal: {share(effect['refusing_before'])} before, {share(effect['refusing_after'])} after. {beside}",
    )


def _single_heads(table: list[Mapping[str, Any]]) -> Finding:
    lines = [
        f"{numbers.head_name(row['layer'], row['head'])} {signed(row['effect'])} {between(row['effect_low'], row['effect_high'])}"
        f" on harmful, {signed(row['effect_twins'])} on twins, {p_value(row['p'])}, larger than"
        f" {per_cent(row['percentile'])} of n = {row['n_controls']} other heads of its layer: {_WORDS[row['verdict']]}"
        for row in table
        if row["found"]
    ]
    specific = any(row["verdict"] == "refusal" for row in table if row["found"])
    return Finding(
        "Each found head alone",
        "shown" if specific else "not shown",
        "Zeroed one by one, in nats of refusal log-odds, p corrected over the tested heads: "
        + "; ".join(lines)
        + ". Heads that stand in for each other can have little effect alone and much together.",
    )


_WORDS = {
    "refusal": "specific to harmful requests",
    "general": "an effect, not shown to be specific to harmful requests",
    "positional": "no effect shown; it moves its attention on every kind of request",
    "sink": "no effect shown; it rests on the first token",
    "none": "no effect shown",
    "not tested": "not tested",
}


def without_heads_finding(shares: pd.DataFrame) -> list[Finding]:
    """What the model writes with the found heads removed; nothing where none were found."""
    if not ((shares["model"] == "without_heads") & (shares["kind"] == "harmful")).any():
        return []
    off, without = (share_of(shares, model, "harmful", "off") for model in ("base", "without_heads"))
    broken = (
        " Most replies are neither refusal nor compliance: the removal may break the reply rather than lift refusal."
        if without["other"] > without["n"] / 2
        else ""
    )
    twins = share_of(shares, "without_heads", "harmless", "off")
    return [
        Finding(
            "What it writes without these heads",
            "note",
            f"With thinking off and the found heads removed, the model refused {refused_of(without, 'harmful requests')} where it"
            f" had refused {refused_of(off)}, complied with {int(without['comply'])} and did neither for {int(without['other'])}. Of the twins it"
            f" refused {refused_of(twins)} and did neither for {int(twins['other'])}.{broken}",
        )
    ]


def removal_findings(removal: RemovalEffects | None, restored: pd.DataFrame | None) -> list[Finding]:
    """What removing the found heads does besides refusal, and whether editing them restores it; nothing where neither was measured."""
    said = []
    if removal is not None:
        said.append(besides_finding(removal.table, "these heads"))
    if restored is not None:
        said.append(_restored_finding(restored[restored["state"] == "measured"]))
    return said


def besides_finding(table: pd.DataFrame, what_removed: str) -> Finding:
    """What else changes without a set, of a table of `EffectTables`."""
    changed: list[str] = []
    still: dict[str, list[str]] = {}
    for row in table[~table["kind"].isin(["harmful", DIFFERENCE])].to_dict("records"):
        what = _BESIDES.get((row["measure"], row["kind"]), f"{row['measure']} on {row['kind']}")
        low, high = row["change_low"], row["change_high"]
        # A divergence has no test of its own: it is never below 0.
        if row["p"] <= LEVEL or (math.isnan(row["p"]) and (low > 0 or high < 0)):
            changed.append(
                f"{what}, {row['condition']}: {plain(row['before'])} → {plain(row['after'])} (change"
                f" {signed(row['change'], 3)} {between(low, high, 3)}, random sets {signed(row['random'], 3)})"
            )
        else:
            still.setdefault(what, []).append(f"{row['condition']} {signed(row['change'])}")
    unmoved = "; ".join(f"{what} ({', '.join(where)})" for what, where in still.items())
    return Finding(
        f"What removing {what_removed} does besides",
        "note",
        (f"Changed: {'; '.join(changed)}. " if changed else "")
        + (f"Not shown to change: {unmoved}. " if still else "")
        + "Tests are corrected over the conditions of a measure, not over measures; KL goes by its interval.",
    )


_BESIDES = {
    ("refuse", "harmless"): "harmless requests refused",
    ("comply", "harmless"): "harmless requests complied with",
    ("other", "harmless"): "harmless requests with neither",
    ("empty", "harmless"): "harmless requests with an empty answer",
    ("refuse_in_think", "harmless"): "harmless requests refused in thought",
    ("score", "harmless"): "refusal score of harmless requests, nats",
    ("correct", "reasoning"): "reasoning questions answered rightly",
    ("answer", "reasoning"): "log-probability of the right answer, nats",
    ("kl", "neutral"): "KL on neutral text, nats per token",
}


def _restored_finding(table: pd.DataFrame) -> Finding:
    rows = {
        (row["kind"], row["condition"], row["edit"]): row
        for row in table[table["measure"].isin(["score", "specificity"])].to_dict("records")
    }
    harmful = [(condition, edit) for kind, condition, edit in rows if kind == "harmful"]
    thoughts = {condition for condition, _ in harmful if not is_control(condition)}
    if not thoughts:
        return Finding(
            "Restoring refusal under a CoT",
            "cannot tell",
            "No edit of these heads was possible under a chain of thought.",
        )
    told = []
    for place in harmful:
        row, twins = rows["harmful", *place], rows.get(("harmless", *place), {"effect": math.nan})
        told.append(
            f"{place[1]} in {place[0]}: {signed(row['effect'])} {between(row['effect_low'], row['effect_high'])} nats"
            f" (twins {signed(twins['effect'])}, random sets {signed(row['random'])})"
        )
    level = LEVEL / len(thoughts)
    passed = max(
        _restoring_steps(rows["harmful", *place], rows.get((DIFFERENCE, *place)), level)
        for place in harmful
        if place[0] in thoughts
    )
    return Finding(
        "Restoring refusal under a CoT",
        "shown" if passed == len(_RESTORED) - 1 else "not shown",
        f"{_RESTORED[passed]}: {'; '.join(told)}. Corrected over edits and chains of thought ({len(thoughts)}). What filler"
        " shows as well is not about what the CoT says.",
    )


def _restoring_steps(row: Mapping[str, Any], gap: Mapping[str, Any] | None, level: float) -> int:
    """How many of the steps from nothing lost to refusal restored an edit passes, in their order, see `_RESTORED`."""
    steps = (
        not math.isnan(row["restored"]),
        row["p"] <= level and row["restored_low"] > 0 and row["effect"] > row["random_high"],
        gap is not None
        and gap["p"] <= level
        and gap["effect_low"] > 0
        and gap["effect"] >= SPECIFIC * row["effect"],
    )
    return steps.index(False) if False in steps else len(steps)


_RESTORED = (
    "There is nothing to bring back, as no chain of thought is shown to lower the score",
    "No edit of these heads is shown to bring back lost score beyond random heads",
    "Editing these heads brings back part of the lost score beyond random heads, but is not shown to raise it more than on"
    " harmless twins, so that it need not be refusal that comes back",
    "Editing these heads brings back part of the lost score beyond random heads, and not as much on twins",
)
