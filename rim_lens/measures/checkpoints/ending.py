"""What runs of checkpoints ended at: refusal lost, request by request, and how much of it a control at equal drift did not lose."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_lens.errors import NotEnoughData
from rim_lens.measures.stats import bootstrap_interval, sign_flip_test

if TYPE_CHECKING:
    import pandas as pd

    from rim_lens.measures.checkpoints.result import Comparison

# A control that came to less of a run's drift is held against it on the way, and tells nothing of where it ends.
REACHED = 0.9

# name of the change → kind of request, column of the lines, and what counts as 1 (None: the number itself)
_CHANGES: dict[str, tuple[str, str, str | None]] = {
    "lost": ("harmful", "score", None),
    "lost_rate": ("harmful", "outcome", "refuse"),
    "lost_harmless": ("harmless", "score", None),
    "lost_rate_harmless": ("harmless", "outcome", "refuse"),
    "lost_right": ("reasoning", "outcome", "right"),
}


def at_the_end(comparison: Comparison, *, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Hold the last checkpoint of each run against the base, paired over requests.

    What it does not show: that another training of the same kind would end there. Requests are the units here, the run is one.

    Args:
        comparison: What `rl.compare` found.
        n_resamples: Of the intervals.
        seed: Of intervals and flips.

    Returns:
        One row per run: run, step; and for each of lost (refusal score of harmful requests, nats), lost_rate (share of them
        refused), lost_harmless and lost_rate_harmless (the same of twins) and lost_right (share of reasoning questions
        answered right, in the first condition of accuracy): base − last checkpoint, with _before, _after, _low, _high
        (bootstrap over families), _p (sign flips by family, two-sided, for each by itself), _n and _families (of
        `Comparison.prompts`, so that twins which swap the same words are one); NaN where it was not measured.
    """
    import pandas as pd

    rows = []
    for run in comparison.runs:
        table = comparison.table[comparison.table["run"] == run]
        step = int(table["step"].max())
        lines = comparison.prompts[comparison.prompts["run"] == run]
        row: dict[str, Any] = {"run": run, "step": step}
        for name, (kind, column, hit) in _CHANGES.items():
            row |= _change(name, lines[lines["kind"] == kind], step, column, hit, n_resamples, seed)
        rows.append(row)
    return pd.DataFrame(rows)


def _change(
    name: str, lines: pd.DataFrame, step: int, column: str, hit: str | None, n_resamples: int, seed: int
) -> dict[str, Any]:
    sides = []
    for at in (0, step):
        values = lines[lines["step"] == at].set_index("prompt")[column]
        sides.append(values.astype(float) if hit is None else (values == hit).astype(float))
    before, after = sides[0], sides[1].reindex(sides[0].index)
    gap = (before - after).dropna()
    asked = hit != "right" or bool(lines["outcome"].isin(["right", "wrong"]).any())
    if gap.empty or not asked:
        cells = ("before", "after", "low", "high", "p")
        return {name: math.nan, **{f"{name}_{cell}": math.nan for cell in cells}, f"{name}_n": 0}
    families = lines.drop_duplicates("prompt").set_index("prompt")["family"].reindex(gap.index).tolist()
    low = high = math.nan
    try:
        found = bootstrap_interval(gap.to_numpy(), families, n_resamples=n_resamples, seed=seed)
        low, high = float(found.low), float(found.high)
    except NotEnoughData:
        pass
    return {
        name: float(gap.mean()),
        f"{name}_before": float(before[gap.index].mean()),
        f"{name}_after": float(after[gap.index].mean()),
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_p": float(sign_flip_test(gap.to_numpy(), families=families, seed=seed).p),
        f"{name}_n": len(gap),
        f"{name}_families": len(set(families)),
    }


def beyond_drift(matched: pd.DataFrame) -> pd.DataFrame:
    """Sum up what runs lost more than their controls did at equal drift, one number a run.

    A run counts by its last checkpoint that the control's drift reached. Where the control came to a part of the run's drift only,
    that is a checkpoint on the way, and says nothing of where the run ends: see least_share before p.

    What it does not show: why. Runs of one kind share their rows or the way these are drawn, and the base; p is over runs as
    they were trained here.

    Args:
        matched: Rows of `drift_matched`, with the columns kind, target and by.

    Returns:
        One row per kind and drift: kind, by, n_runs, mean, least and most (difference in lost refusal score, nats; positive:
        the kind lost more than its control), n_above and n_below (runs whose interval over requests lies above or below 0),
        p (two-sided sign flips over runs), finest (the least p that so many runs can give), share_of_drift (mean over runs:
        at which share of the target's whole drift they were compared), least_share (the least of these), n_left_out (runs without
        a control that far).
    """
    import pandas as pd

    lines = []
    for (kind, by), part in matched.groupby(["kind", "by"], sort=False):
        ends = []
        for _, rows in part.groupby("target", sort=False):
            there = rows[np.isfinite(rows["lost_difference"].to_numpy(dtype=float))]
            if len(there):
                last = there.sort_values("step").iloc[-1]
                ends.append({**last, "share": float(last["drift"]) / float(rows["drift"].max())})
        differences = np.array([one["lost_difference"] for one in ends], dtype=np.float64)
        test = sign_flip_test(differences) if ends else None
        lines.append(
            {
                "kind": kind,
                "by": by,
                "n_runs": len(ends),
                "mean": float(differences.mean()) if ends else math.nan,
                "least": float(differences.min()) if ends else math.nan,
                "most": float(differences.max()) if ends else math.nan,
                "n_above": sum(one["lost_low"] > 0 for one in ends),
                "n_below": sum(one["lost_high"] < 0 for one in ends),
                "p": float(test.p) if test else math.nan,
                "finest": float(test.finest) if test else math.nan,
                "share_of_drift": float(np.mean([one["share"] for one in ends])) if ends else math.nan,
                "least_share": min((one["share"] for one in ends), default=math.nan),
                "n_left_out": part["target"].nunique() - len(ends),
            }
        )
    return pd.DataFrame(lines)
