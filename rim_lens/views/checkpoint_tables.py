"""A study of checkpoints as tables of text."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rim_lens.measures.checkpoints.ending import REACHED
from rim_lens.views.neuron_tables import set_table
from rim_lens.views.plots.checkpoints import LOST, METRICS
from rim_lens.views.tables import Table
from rim_lens.views.words import between, p_value, per_cent, plain, share, signed

if TYPE_CHECKING:
    import pandas as pd

    from rim_lens.measures.neurons.sets import NeuronSet
    from rim_lens.study import CheckpointStudyResult

_LONG = 24
GRADIENTS = {
    "lost_per_step, by gradients": "loss by the chosen neurons' weights, by gradients",
    "share, by gradients": "share of the gradient on them",
    "lost_per_step_all, by gradients": "loss by all weights, by gradients",
}
_DRIFTS = {"weights": "weights", "kl": "KL"}


def ends_table(result: CheckpointStudyResult) -> Table:
    """What each run lost by its last checkpoint."""
    ends = result.ends[result.ends["run"].isin(list(result.runs))]
    rows = tuple(
        (
            str(row["run"]),
            str(int(row["step"])),
            plain(result.comparison.row(row["run"], int(row["step"]))["weight_drift"]),
            _from_to(row, "lost_rate"),
            _change(row, "lost_rate"),
            _change(row, "lost"),
            _from_to(row, "lost_rate_harmless"),
            _change(row, "lost_harmless"),
            _from_to(row, "lost_right"),
        )
        for row in ends.to_dict("records")
    )
    columns = (
        *("run", "step", "weight drift", "harmful refused", "lost [95 %] (p)", "score lost, nats [95 %] (p)"),
        *("twins refused", "their score lost, nats [95 %] (p)", "questions right"),
    )
    return Table(
        "ends",
        "Base → last checkpoint of each run",
        columns,
        rows,
        "Lost: base minus last checkpoint, paired over the same requests; p by flipping signs by family (one, where twins swap the"
        " same words), each for itself. An interval of no width: every request moved alike.",
    )


def checkpoints_table(result: CheckpointStudyResult) -> Table:
    """Every checkpoint."""
    table = result.comparison.table
    accuracy = [name for name in table if name.startswith("accuracy_")]
    shown = ["refused_harmful", "complied_harmful", "refused_harmless", *accuracy]
    there = [name for name in shown if name in table]
    rows = tuple(
        (
            str(row["run"]),
            str(int(row["step"])),
            signed(row["score_harmful"]),
            *(share(row[name]) for name in there),
            plain(row["weight_drift"]),
            plain(row["kl"]),
            plain(row["ras"]),
            plain(row.get("ras_random", math.nan)),
            plain(row.get("ras_all", math.nan)),
        )
        for row in table.to_dict("records")
    )
    titles = {
        "refused_harmful": "harmful refused",
        "complied_harmful": "complied with",
        "refused_harmless": "twins refused",
        **{name: f"right, {name.removeprefix('accuracy_')}" for name in accuracy},
    }
    return Table(
        "checkpoints",
        "Every checkpoint",
        (
            *("run", "step", "refusal score, nats"),
            *(titles[name] for name in there),
            *("weight drift", "KL, nats/token", "RAS", "random sets", "all neurons"),
        ),
        rows,
        "Step 0 is the base. KL on reasoning questions. RAS in the unit of activations: values of different bases do not compare.",
        folded=len(rows) > _LONG,
    )


def matched_table(result: CheckpointStudyResult) -> Table:
    """Each checkpoint beside its control at equal drift."""
    there = result.drift_matched.dropna(subset=["lost_difference"])
    accuracy = next(
        (
            name
            for name in result.drift_matched
            if name.startswith("accuracy_") and name.endswith("_difference")
        ),
        None,
    )
    rows = tuple(
        (
            str(row["target"]),
            str(row["control"]),
            _DRIFTS[row["by"]],
            str(int(row["step"])),
            plain(row["drift"]),
            signed(row["lost"]),
            signed(row["lost_control"]),
            f"{signed(row['lost_difference'])} {between(row['lost_low'], row['lost_high'])}",
            signed(row["lost_rate_difference"]),
            signed(row[accuracy]) if accuracy else "–",
        )
        for row in there.to_dict("records")
    )
    out = len(result.drift_matched) - len(there)
    left = f" Left out: {out} rows whose drift no control came to." if out else ""
    return Table(
        "matched",
        "Lost refusal beside a control that drifted as far",
        (
            *("run", "control", "drift by", "step", "drift", "score lost, nats", "control's"),
            *("difference [95 %]", "difference, share refused lost", "difference, questions right"),
        ),
        rows,
        "The control between two checkpoints: interpolated in the drift. Positive: this run lost more refusal than plain drift as"
        f" far by the control did. Interval over families of requests: the runs are one each.{left}",
        folded=len(rows) > _LONG,
    )


def beyond_table(result: CheckpointStudyResult) -> Table:
    """The same summed up over runs."""
    rows = tuple(
        (
            str(row["kind"]),
            _DRIFTS[row["by"]],
            str(int(row["n_runs"])),
            f"{signed(row['mean'])} ({signed(row['least'])} to {signed(row['most'])})"
            if row["n_runs"]
            else "–",
            str(int(row["n_above"])),
            str(int(row["n_below"])),
            p_value(row["p"]),
            plain(row["finest"]),
            share(row["share_of_drift"]),
            share(row.get("least_share", math.nan)),
            str(int(row["n_left_out"])),
        )
        for row in result.beyond_drift.to_dict("records")
    )
    return Table(
        "beyond",
        "Refusal lost beyond equal drift, over runs",
        (
            *(
                "kind",
                "drift by",
                "runs",
                "score lost beyond the control, nats: mean (range)",
                "runs above 0",
            ),
            *(
                "runs below 0",
                "p over runs",
                "least p possible",
                "at share of drift",
                "least of these",
                "without control",
            ),
        ),
        rows,
        f"Each run by its last checkpoint that the control's drift reached; below {REACHED} of the way that is no end. Above, below: its interval over requests leaves 0 on that"
        " side.",
    )


def metrics_table(result: CheckpointStudyResult, outcome: str = "lost") -> Table:
    """The paper's Table 3: how each metric correlates with lost refusal, with what its one number leaves out."""
    found = result.correlations[result.correlations["outcome"] == outcome]
    rows = []
    for metric in dict.fromkeys(found["metric"]):
        its = found[found["metric"] == metric]
        one = {how: its[its["how"] == how].iloc[0] for how in ("pooled", "within", "across")}
        each = its[its["how"] == "run"]["pearson"].dropna().tolist()
        rows.append(
            (
                METRICS.get(metric, metric),
                f"{signed(sum(each) / len(each))} ({signed(min(each))} to {signed(max(each))})"
                if each
                else "–",
                *(
                    f"{signed(one[how]['pearson'])} ({p_value(one[how]['p_pearson'])})"
                    for how in ("pooled", "within", "across")
                ),
                p_value(one["pooled"].get("p_pearson_kind", math.nan)),
                f"{signed(one['pooled']['random'])}",
                f"{per_cent(one['pooled']['percentile'])}"
                if not math.isnan(one["pooled"]["percentile"])
                else "–",
                p_value(one["pooled"]["p_random"]) if one["pooled"]["n_random"] else "–",
            )
        )
    first = found[found["how"] == "pooled"].iloc[0] if len(found) else None
    n = f"{int(first['n'])} checkpoints of {int(first['n_runs'])} runs" if first is not None else "nothing"
    reasons = [first.get(name, "") for name in ("reason", "reason_kind")] if first is not None else []
    reason = "".join(f" {one}." for one in reasons if one)
    return Table(
        f"metrics_{outcome}",
        f"Metrics against the {LOST[outcome].replace(', nats', '')}: Pearson correlation over {n}",
        (
            *("metric", "in one run: mean (range)", "pooled", "within runs", "across runs"),
            *("p within kinds, pooled", "random sets, pooled", "above random sets", "p among random sets"),
        ),
        tuple(rows),
        "In one run: the paper's number, without a p, as checkpoints of a run follow each other. p: whole runs' courses"
        " exchanged, of whatever kind, so that differences between kinds are included; within kinds: seeds exchanged, each with its run"
        f" of every kind. None is corrected for the number of metrics.{reason}",
    )


def ras_table(result: CheckpointStudyResult) -> Table:
    """RAS of the set at the last checkpoint of each run, beside random sets."""
    rows = []
    for run in result.runs:
        table = result.studied.table
        row = result.studied.row(run, int(table[table["run"] == run]["step"].max()))
        rows.append(
            (
                run,
                f"{plain(row['ras'])} [{plain(row.get('ras_low'))}, {plain(row.get('ras_high'))}]",
                plain(row.get("safety_drop")),
                plain(row.get("reasoning_rise")),
                plain(row.get("ras_random")),
                per_cent(row["ras_percentile"]) if _there(row, "ras_percentile") else "–",
                p_value(row["ras_p"]) if _there(row, "ras_p") else "–",
                plain(row.get("ras_all")),
                signed(row["lost"]),
            )
        )
    return Table(
        "ras",
        "RAS at the last checkpoint",
        (
            *("run", "RAS [95 %]", "safety drop δ⁻", "reasoning rise δ⁺", "random sets, mean"),
            *("above random sets", "p among exchanged labels", "all neurons", "score lost, nats"),
        ),
        tuple(rows),
        "Random sets: as many neurons in each layer, about as active. p: among sets chosen by the same pairs with labels exchanged.",
    )


def neurons_table(found: NeuronSet) -> Table:
    """The chosen neurons; what each does by itself is for a study of neurons."""
    whole = set_table(found)
    note = whole.note.partition(" Total:")[0] + " What each does by itself: rim-lens neurons."
    return replace(whole, columns=whole.columns[:3], rows=tuple(row[:3] for row in whole.rows), note=note)


def forecast_table(result: CheckpointStudyResult) -> Table:
    """How well the end was foretold."""
    rows = tuple(
        (
            METRICS.get(
                str(row["metric"]), LOST.get(str(row["metric"]), str(row["metric"]).replace("_", " "))
            ),
            "before training" if row["first"] == 0 else f"first {int(row['first'])}",
            LOST[str(row["outcome"])],
            signed(row["skill"]) if not math.isnan(row["skill"]) else str(row["reason"]),
            plain(row["rmse"]),
            plain(row["rmse_mean"]),
            p_value(row["p"]),
            p_value(row.get("p_kind", math.nan)),
            str(int(row["n_runs"])),
        )
        for row in result.forecast.to_dict("records")
    )
    return Table(
        "forecast",
        "The last checkpoint of each run, foretold from the other runs",
        ("by", "known from", "outcome", "skill", "error", "error of the mean", "p", "p within kinds", "runs"),
        rows,
        "Each run in turn is held out. Skill: 1 − squared error / that of foretelling the others' mean; 0 is no better. Runs of the"
        " same kind are among the others: what a metric knows may be no more than which kind a run is of. p within kinds, where seeds"
        " change places with all their runs, leaves that out.",
        folded=len(rows) > _LONG,
    )


def gradients_table(table: pd.DataFrame) -> Table:
    """What gradients said before training."""
    rows = tuple(
        (
            str(row["run"]),
            plain(row["loss"]),
            plain(row["share"]),
            plain(row["share_random"]),
            p_value(row["share_p"]),
            plain(row["lost_per_step"]),
            plain(row["lost_random"]),
            p_value(row["lost_p"]),
            plain(row["lost_per_step_all"]),
        )
        for row in table.to_dict("records")
    )
    return Table(
        "gradients",
        "Gradients before training",
        (
            *("run", "loss, nats/token", "share of the gradient on the set", "random sets", "p"),
            *("refusal lost per unit of weight, by the set", "random sets", "p", "by all weights"),
        ),
        rows,
        "In the base, a small step along the task's gradient; see gradient_forecast for what it does not show.",
        folded=len(rows) > _LONG,
    )


def told_metric(name: str) -> str:
    """A metric, an outcome so far, or what gradients say, in words."""
    return METRICS.get(name) or LOST.get(name) or GRADIENTS.get(name, name)


def _there(row: dict[str, Any], name: str) -> bool:
    return name in row and not math.isnan(row[name])


def _from_to(row: Any, name: str) -> str:
    return (
        "–"
        if math.isnan(row[f"{name}_before"])
        else f"{share(row[f'{name}_before'])} → {share(row[f'{name}_after'])}"
    )


def _change(row: Any, name: str) -> str:
    if math.isnan(row[name]):
        return "–"
    return f"{signed(row[name])} {between(row[f'{name}_low'], row[f'{name}_high'])} ({p_value(row[f'{name}_p'])})"
