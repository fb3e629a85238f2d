"""What is said of probes: what separates, and what ablating it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rim_lens.views.finding import Finding
from rim_lens.views.words import between, share, signed

if TYPE_CHECKING:
    import pandas as pd

    from rim_lens.measures.probes.after_ablation import ProbesAfterAblation
    from rim_lens.measures.probes.result import ProbeResult


def probe_findings(harmful: ProbeResult, refusal: ProbeResult) -> list[Finding]:
    """What probes separate, never without what ablating their direction does.

    Args:
        harmful: Probes of harmful against harmless requests.
        refusal: Probes of refused against fulfilled requests.
    """
    lines, lowers = [], False
    for condition in dict.fromkeys(harmful.table["condition"]):
        if condition in harmful.reasons:
            lines.append(f"{condition}: no probe ({harmful.reasons[condition]})")
            continue
        part = harmful.table[harmful.table["condition"] == condition]
        tested = part[part["effect"].notna()]
        row = (tested if len(tested) else part).sort_values("auc_cv", ascending=False).iloc[0]
        ablated = (
            f"without that direction the score changes by {signed(row['effect'])}"
            f" {between(row['effect_low'], row['effect_high'])} nats on harmful requests and by {signed(row['effect_twins'])} on twins"
            if len(tested)
            else "what ablating it does was not tested"
        )
        lowers = lowers or bool(tested["state"].str.endswith("lowers refusal").any())
        lines.append(
            f"{condition}: layer {row['layer']}, {row['place']}, AUC {share(row['auc'])}, and {ablated} ({row['state']})"
        )
    return [
        Finding(
            "Directions that probes find",
            "shown" if lowers else "not shown",
            (
                "In at least one condition refusal depends on"
                if lowers
                else "Refusal is not shown to depend on"
            )
            + " a direction that tells harmful requests from their twins. Best place by condition: "
            + "; ".join(lines)
            + ". That the two can be told apart is true of nearly every model and no sign of refusal.",
        ),
        Finding(
            "Probes of refusal against fulfilment",
            "note" if refusal.probes else "cannot tell",
            "By the model's own responses: "
            + "; ".join(
                f"{condition}: {refusal.reasons[condition]}"
                if condition in refusal.reasons
                else f"{condition}: " + _best_auc(refusal.table[refusal.table["condition"] == condition])
                for condition in dict.fromkeys(refusal.table["condition"])
            )
            + ".",
        ),
    ]


def _best_auc(table: pd.DataFrame) -> str:
    row = table.sort_values("auc_cv", ascending=False).iloc[0]
    return (
        f"layer {row['layer']}, {row['place']}, AUC {share(row['auc'])} on {row['n_positive']} refused and {row['n_negative']}"
        f" fulfilled ({row['state']})"
    )


def after_ablation_finding(result: ProbesAfterAblation | None) -> list[Finding]:
    """Where requests lie on the probes with the found heads removed; nothing where none were found."""
    if result is None:
        return []
    table = result.table[result.table["state"] == "measured"]
    if table.empty:
        return []
    outside = table[(table["after"] < table["random_low"]) | (table["after"] > table["random_high"])]
    largest = table.iloc[int(table["change"].abs().to_numpy().argmax())]
    return [
        Finding(
            "Probes with the found heads removed",
            "note",
            f"The share of requests above the threshold leaves the range of 95 % of {int(table['n_controls'].max())} random sets"
            f" in {len(outside)} of {len(table)} layers and places of both kinds, counted without correction. Largest change:"
            f" {largest['group']} requests at layer {largest['layer']}, {largest['place']}: {share(largest['before'])} →"
            f" {share(largest['after'])}, random sets {share(largest['random'])} [{share(largest['random_low'])},"
            f" {share(largest['random_high'])}]. What the model then answers stands under what it writes without these heads.",
        )
    ]
