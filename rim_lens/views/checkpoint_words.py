"""What a study of checkpoints says in plain sentences, each computed from the numbers, each beside drift and chance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rim_lens.measures.checkpoints.ending import REACHED
from rim_lens.views.checkpoint_tables import told_metric
from rim_lens.views.finding import HIGH, LEVEL, Finding, Status
from rim_lens.views.plots.checkpoints import METRICS
from rim_lens.views.verdict import gate_finding
from rim_lens.views.words import listed, p_value, per_cent, plain, share, signed

if TYPE_CHECKING:
    import pandas as pd

    from rim_lens.study import CheckpointStudyResult

LIMITS: tuple[str, ...] = (
    "Checkpoints of one run follow each other: whatever training moves goes with whatever else it moves. Eight checkpoints of one run"
    " are one observation, and a correlation within a run has no p here.",
    "A p over runs holds for runs like these: one base, one recipe, these rows. Runs of one kind differ from those of another in"
    " all that their rows differ in, so that a metric that tells kinds apart correlates with whatever else does, and the p over all"
    " runs takes it for so many runs. The p within kinds exchanges whole seeds and leaves that out: without it nothing is called shown.",
    "RAS is not established as specific: any drift of the weights moves activations both ways. It is told beside random sets, sets"
    " chosen alike for no reason, and plain weight drift, and says neither that refusal got worse nor that these neurons did it."
    " Freezing them in training asks that (rl.freezing).",
    "A control at equal drift is a careful run that went on, or between two of its checkpoints: as far in the weights is not as far in"
    " every other respect, nor after as many steps.",
    "The refusal score reads the first word only; what is written is judged by its opening words, and not refusing is not complying.",
    "Everything holds for these requests, this template and greedy decoding.",
)


def checkpoint_question(result: CheckpointStudyResult) -> str:
    """What the study asks."""
    kinds = list(dict.fromkeys(result.runs.values()))
    what = f"fine-tuning on {listed(kinds)} chains of thought" if result.design["train"] else listed(kinds)
    return (
        f"What does {what} do to refusal in {result.design['model']}, and does entanglement follow it better than plain drift and"
        " random neurons do?"
    )


def checkpoint_findings(result: CheckpointStudyResult) -> list[Finding]:
    """Say what was found, in order, and what is missing yet. A study stopped at its gate has one finding: why."""
    said = [gate_finding(result.gate, asked=bool(result.design["settings"]["gate"]))]
    if result.stopped:
        return said
    if result.missing:
        left = result.missing[:4]
        more = f" and {len(result.missing) - len(left)} more" if len(result.missing) > len(left) else ""
        return [*said, Finding("Interrupted", "note", f"Not measured yet: {', '.join(left)}{more}.")]
    said.append(_neurons(result))
    kinds = list(dict.fromkeys(result.runs.values()))
    said += [_lost(result, kind) for kind in kinds]
    said += [_beyond(result, kind) for kind in kinds if kind != result.control]
    said += [_followed(result), *_chance(result), _foretold(result)]
    return [*said, *_gradients(result)]


def _neurons(result: CheckpointStudyResult) -> Finding:
    found = result.neurons
    topic = "The neurons that entanglement is read on"
    if found is None or not len(found):
        why = (
            "pairs agree on none by this rule"
            if found is None or "not_chosen" not in found.made_by
            else (found.made_by["not_chosen"])
        )
        return Finding(
            topic,
            "cannot tell",
            f"None: {why}. RAS is of all neurons, and no random set can stand beside it.",
        )
    layers = ", ".join(
        f"{count} in layer {layer}" for layer, count in enumerate(found.per_layer.tolist()) if count
    )
    verdict = "not tested" if found.effects is None else found.effects.verdict
    told = {
        "refusal": "removing them moves refusal of harmful requests, beyond twins and random sets",
        "like random": "removing them moves refusal, but random sets do as much",
        "general": "removing them moves harmful requests and twins alike",
        "none": "removing them is not shown to move refusal",
    }.get(verdict, "what removing them does was not tested, or cannot be by so few families and sets")
    status: Status = "shown" if verdict == "refusal" else "note"
    return Finding(
        topic,
        status,
        f"{len(found)} neurons of the base ({layers}), chosen on the select side; {told} (verdict: {verdict}).",
    )


def _lost(result: CheckpointStudyResult, kind: str) -> Finding:
    ends = result.ends[result.ends["run"].map(result.runs) == kind]
    fell = ends[(ends["lost_rate"] > 0) & (ends["lost_rate_p"] <= LEVEL)]
    finest = 2.0 ** (1 - int(ends["lost_rate_families"].max()))
    status: Status = "shown" if len(fell) == len(ends) else "cannot tell" if finest > LEVEL else "not shown"
    rates = "; ".join(
        f"{row['run']} {share(row['lost_rate_before'])} → {share(row['lost_rate_after'])} ({p_value(row['lost_rate_p'])})"
        for row in ends.to_dict("records")
    )
    many = (
        f"{len(fell)} of {len(ends)} runs are"
        if len(ends) > 1
        else f"The run is{'' if len(fell) else ' not'}"
    )
    told = f"{many} shown to refuse fewer harmful requests than the base: {rates}."
    score = f" The refusal score falls by {_range(ends['lost'])} nats"
    twins = (
        f"; twins refused {share(ends['lost_rate_harmless_before'].iloc[0])} → {_span(ends['lost_rate_harmless_after'])}"
        if ends["lost_rate_harmless_before"].notna().any()
        else ""
    )
    right = (
        f"; questions right {share(ends['lost_right_before'].iloc[0])} → {_span(ends['lost_right_after'])}"
        if ends["lost_right_before"].notna().any()
        else ""
    )
    what = f"after training on {kind} chains" if result.design["train"] else f"in {kind}"
    return Finding(
        f"Refusal {what}",
        status,
        f"{told}{score}{twins}{right}. p is over requests, for each run by itself.",
    )


def _beyond(result: CheckpointStudyResult, kind: str) -> Finding:
    topic = f"Beyond plain drift: {kind}"
    table = result.beyond_drift
    mine = table[table["kind"] == kind] if len(table) else table
    if result.control is None or mine.empty:
        return Finding(
            topic,
            "cannot tell",
            "No run is a control, so that nothing tells what was lost from what any drift as far would have lost.",
        )
    by = {str(row["by"]): row for row in mine.to_dict("records")}
    row = by["weights"]
    if not row["n_runs"]:
        return Finding(
            topic, "cannot tell", f"No control ({result.control}) drifted far enough to stand beside a run."
        )
    n = int(row["n_runs"])
    reached = float(row.get("least_share", math.nan))
    status: Status = (
        "cannot tell"
        if row["finest"] > LEVEL or not reached >= REACHED
        else "shown"
        if row["p"] <= LEVEL and row["mean"] != 0
        else "not shown"
    )
    lead = {
        "shown": f"At equal weight drift, {kind} {'loses more' if row['mean'] > 0 else 'loses less'} refusal than {result.control}",
        "not shown": f"At equal weight drift, {kind} is not shown to lose more refusal than {result.control}, or less",
        "cannot tell": f"{_runs(n)} cannot show a difference between kinds (no p below {plain(row['finest'])})"
        if row["finest"] > LEVEL
        else f"Where {kind} ends is not told: {result.control} came to {share(reached)} of a run's drift only, and is held against it"
        " on the way",
    }[status]
    matched = result.drift_matched
    whole = matched[(matched["kind"] == kind) & (matched["by"] == "weights")]["lost_difference"].dropna()
    kl = by.get("kl")
    by_kl = (
        f" At equal KL: {signed(kl['mean'])} nats over {_runs(int(kl['n_runs']))} ({p_value(kl['p'])}), at {share(kl['share_of_drift'])}"
        " of the way."
        if kl is not None and kl["n_runs"]
        else " At equal KL no control came so far."
    )
    over = (
        f", {signed(row['least'])} to {signed(row['most'])} over {n} runs ({p_value(row['p'])} over runs)"
        if n > 1
        else ""
    )
    return Finding(
        topic,
        status,
        f"{lead}: difference in lost score {signed(row['mean'])} nats{over}, at {share(row['share_of_drift'])} of the way; by requests, {int(row['n_above'])} of {n} lie above 0 and"
        f" {int(row['n_below'])} below. Over all"
        f" checkpoints with a control as far, {int((whole > 0).sum())} of {len(whole)} differences are positive.{by_kl}",
    )


def _followed(result: CheckpointStudyResult) -> Finding:
    topic = "Does entanglement follow lost refusal?"
    table = result.correlations[result.correlations["outcome"] == "lost"]
    pooled = {str(row["metric"]): row for row in table[table["how"] == "pooled"].to_dict("records")}
    if "ras" not in pooled:
        return Finding(topic, "cannot tell", "RAS has no number at any checkpoint.")
    ras = pooled["ras"]
    across, within = (
        table[(table["metric"] == "ras") & (table["how"] == how)].iloc[0] for how in ("across", "within")
    )
    if math.isnan(ras["pearson"]):
        why = ras["reason"] or "fewer than three checkpoints with a number, or none that differ"
        return Finding(topic, "cannot tell", f"There is no correlation: {why}.")
    numbers = (
        f"RAS against lost score: pooled r = {signed(ras['pearson'])} over {int(ras['n'])} checkpoints of {int(ras['n_runs'])} runs"
        f" ({p_value(ras['p_pearson'])} including differences between kinds, {_within_kinds(ras, 'p_pearson_kind')}), within runs"
        f" {signed(within['pearson'])} ({p_value(within['p_pearson'])}, {_within_kinds(within, 'p_pearson_kind')}), across runs"
        f" {signed(across['pearson'])} ({p_value(across['p_pearson'])}, {_within_kinds(across, 'p_pearson_kind')})"
    )
    chance = (
        f"; random sets reach {signed(ras['random'])} on average, and RAS lies above {per_cent(ras['percentile'])} of"
        f" {int(ras['n_random'])} ({p_value(ras['p_random'])})"
        if ras["n_random"]
        else "; no random set stands beside it"
    )
    rivals = {
        name: float(pooled[name]["pearson"])
        for name in ("weight_drift", "kl", "ras_all", "arithmetic", "geometric")
        if name in pooled
    }
    beside = "; ".join(f"{METRICS[name]} {signed(value)}" for name, value in rivals.items())
    numbers += f"{chance}. Pooled r of others: {beside}."
    if math.isnan(ras["p_pearson"]):
        return Finding(topic, "cannot tell", f"{numbers} No p: {ras['reason']}.")
    goes = ras["p_pearson"] <= LEVEL and ras["pearson"] > 0
    specific = bool(ras["n_random"]) and ras["p_random"] <= LEVEL
    better = abs(ras["pearson"]) > abs(rivals.get("weight_drift", 0.0))
    beyond = _kind(ras, "p_pearson_kind")
    if goes and specific and better and math.isnan(beyond):
        return Finding(
            topic,
            "cannot tell",
            f"Kinds that lose refusal show RAS; whether runs of a kind do cannot be told ({_why(ras)}). {numbers}",
        )
    if goes and specific and better and beyond <= LEVEL:
        return Finding(
            topic,
            "shown",
            "Which run loses refusal goes with which shows RAS, within kinds too, more than with random sets and with weight drift."
            f" {numbers}",
        )
    lacks = [
        what
        for what, there in (
            ("which run loses refusal is not shown to go with which shows RAS", goes),
            (
                "within kinds, which seed loses refusal is not shown to go with which shows RAS",
                math.isnan(beyond) or beyond <= LEVEL,
            ),
            ("the chosen neurons are not set apart from random ones", specific),
            ("plain weight drift follows it as well", better),
        )
        if not there
    ]
    return Finding(topic, "not shown", f"Not specific: {listed(lacks)}. {numbers}")


def _chance(result: CheckpointStudyResult) -> list[Finding]:
    table = result.studied.table
    if "ras_p" not in table or table["ras_p"].notna().sum() == 0:
        return []
    tuned = table[(table["step"] > 0) & table["ras_p"].notna()]
    last = tuned.sort_values("step").groupby("run", sort=False).tail(1)
    low, high = (tuned["ras_p"] <= LEVEL), (tuned["ras_percentile"] >= HIGH)
    return [
        Finding(
            "RAS against chance",
            "note",
            f"RAS lies above {HIGH:.0f} % of random sets at {int(high.sum())} of {len(tuned)} checkpoints, and p among sets chosen on"
            f" exchanged labels is at most {LEVEL} at {int(low.sum())}; at the last ones of {len(last)} runs, {int((last['ras_percentile'] >= HIGH).sum())}"
            f" and {int((last['ras_p'] <= LEVEL).sum())}. Counted without correction: about one in twenty is to be expected where"
            " nothing is.",
        )
    ]


def _foretold(result: CheckpointStudyResult) -> Finding:
    topic = "Can the loss be foretold?"
    table = result.forecast
    rows = table[(table["outcome"] == "lost") & (table["first"] > 0)] if len(table) else table
    if rows.empty or "ras" not in set(rows["metric"]):
        return Finding(topic, "cannot tell", "Runs have one checkpoint each: there is no earlier one.")
    by = rows.set_index("metric")
    ras, so_far, drift = by.loc["ras"], by.loc["lost"], by.loc["weight_drift"]
    if math.isnan(ras["skill"]):
        return Finding(topic, "cannot tell", f"{ras['reason']}.")
    better = ras["skill"] > max(0.0, so_far["skill"], drift["skill"])
    untold = math.isnan(ras["p"]) or (bool(ras["p"] <= LEVEL) and math.isnan(_kind(ras, "p_kind")))
    shown = bool(ras["p"] <= LEVEL and _kind(ras, "p_kind") <= LEVEL and better)
    numbers = (
        f"From the first {'checkpoint' if ras['first'] == 1 else str(int(ras['first'])) + ' checkpoints'}, skill {signed(ras['skill'])} by RAS"
        f" ({p_value(ras['p'])} including differences between kinds, {_within_kinds(ras, 'p_kind')}), {signed(drift['skill'])} by weight drift"
        f" ({p_value(drift['p'])}), {signed(so_far['skill'])} by what was lost so far ({p_value(so_far['p'])}); {int(ras['n_runs'])}"
        " runs, each held out in turn. Runs of its kind are among the others"
    )
    if better and untold:
        why = ras["reason"] if math.isnan(ras["p"]) else _why(ras)
        return Finding(
            topic,
            "cannot tell",
            f"RAS foretells the final loss better than drift and than the loss so far, and whether by more than kinds or chance"
            f" cannot be told ({why}). {numbers}.",
        )
    lead = (
        "RAS foretells the final loss better than drift and than the loss so far, within kinds too"
        if shown
        else "RAS is not shown to foretell the final loss better than drift and than the loss so far"
    )
    return Finding(topic, "shown" if shown else "not shown", f"{lead}. {numbers}.")


def _kind(row: Any, name: str) -> float:
    """A p within kinds; NaN too where the tables are of a version that had none."""
    return float(row.get(name, math.nan))


def _within_kinds(row: Any, name: str) -> str:
    value = _kind(row, name)
    return "no p within kinds" if math.isnan(value) else f"{p_value(value)} within kinds"


def _why(row: Any) -> str:
    return str(row.get("reason_kind", "")) or "no p within kinds was measured"


def _gradients(result: CheckpointStudyResult) -> list[Finding]:
    if result.gradients is None or result.forecast.empty:
        return []
    rows = result.forecast[(result.forecast["outcome"] == "lost") & (result.forecast["first"] == 0)]
    if rows.empty or rows["skill"].isna().all():
        return []
    told = "; ".join(
        f"{told_metric(row['metric'])} {signed(row['skill'])} ({p_value(row['p'])}, {_within_kinds(row, 'p_kind')})"
        for row in rows.to_dict("records")
    )
    return [
        Finding(
            "Before training",
            "note",
            f"Skill of gradients in the base, the first p including differences between kinds: {told}. Runs of one kind have nearly one gradient, so that this tells kinds apart at best.",
        )
    ]


def _runs(n: int) -> str:
    return "1 run" if n == 1 else f"{n} runs"


def _range(values: pd.Series[Any]) -> str:
    low, high = float(values.min()), float(values.max())
    told = [signed(value).removeprefix("+") for value in (low, high)]
    return told[0] if len(values) == 1 else " to ".join(told)


def _span(values: pd.Series[Any]) -> str:
    low, high = float(values.min()), float(values.max())
    return share(low) if share(low) == share(high) else f"{share(low)} to {share(high)}"
