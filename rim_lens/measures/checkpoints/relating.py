"""Does a measure of entanglement follow lost refusal over checkpoints, better than drift does and than chance?

Checkpoints of one run come one after the other: whatever training moves, and refusal with it, runs along with the steps, and
correlates with everything else that does. Eight checkpoints of one run are therefore one observation and not eight, and
a correlation within a run has no p here. What can be tested is whether *which run* loses refusal goes with which run shows
the measure: the runs' whole courses of lost refusal are exchanged between runs, every way or many ways, and the
correlation of the real pairing is placed among those. What all runs share (the steps) is shared by the exchanged ones too.

Runs of one kind of training differ from those of another in all that the kinds differ in. Where a kind decides the measure and,
for whatever other reason, refusal, exchanging runs of different kinds takes its few differences for as many as there are runs.
So there are two p: one that includes differences between kinds, and one that exchanges only within them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from rim_lens.errors import NotEnoughData, StatisticsError
from rim_lens.measures.checkpoints.exchanging import FEWEST_RUNS, Exchanges, exchanges
from rim_lens.measures.controls import control_p, percentile_among
from rim_lens.measures.stats import Alternative, bootstrap_interval, check_alternative, extremeness

if TYPE_CHECKING:
    import pandas as pd

_TIE = 1e-12


def pearson(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Pearson's correlation; NaN for fewer than three points, or where one side does not vary.

    >>> round(pearson(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0])), 4)
    0.3273
    """
    if len(x) < 3:
        return math.nan
    a, b = x - x.mean(), y - y.mean()
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    flat = min(np.ptp(x), np.ptp(y)) <= _TIE * max(1.0, float(np.abs(x).max()), float(np.abs(y).max()))
    return math.nan if flat or scale == 0 else float(a @ b) / scale


def ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Ranks from 1 on, ties at their mean.

    >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[place])


def correlations(
    table: pd.DataFrame,
    metric: str,
    outcome: str = "lost",
    *,
    groups: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    random: pd.DataFrame | None = None,
    alternative: Alternative = "two-sided",
    n_permutations: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlate a metric with an outcome over checkpoints, in every way that the paper's one number leaves open.

    ==========  ========================================================================================================
    how         what is correlated
    ==========  ========================================================================================================
    pooled      all checkpoints of all runs, as if each stood by itself
    within      all checkpoints, each run's own mean taken off: whether the two move together inside runs
    across      one point per run: its means over checkpoints
    run         the checkpoints of one run (the paper's number); without a p
    ==========  ========================================================================================================

    What p says: that the pairing of runs by metric and outcome is not that of runs that may change places. It exchanges runs of
    different kinds too, so that it is small as well where a kind of training decides the metric and, apart from that, the
    outcome. What p_…_kind says: the same of runs within kinds. With `units`, these change places whole, each with its run of
    every kind, so that neither what a kind nor what a unit (a seed, a base) does to all its runs counts as several witnesses; it
    then says that *which unit* loses more goes with which shows more. Neither shows a cause.

    Args:
        table: Columns run, step, the metric and the outcome; step 0 (the base) is left out.
        metric: A column.
        outcome: A column; "lost" is refusal score of the base − that of the checkpoint.
        groups: Run → group (the seed of its base, say): courses are exchanged within groups only.
        kinds: Run → kind of training; for p_…_kind.
        units: Run → what chance drew (the seed of training, or of the base) and every kind shares; for p_…_kind.
        random: The same columns for random sets of neurons, with a column "set": what their metric correlates.
        alternative: Of the permutation test.
        n_permutations: Where there are more ways than that, so many are drawn.
        seed: Of the drawing.

    Returns:
        how, run ("" for all), metric, outcome, pearson, spearman, n (points), n_runs, n_left_out (points where one of the
        two is NaN), p_pearson and p_spearman (exchanging courses between runs, differences between kinds included; NaN with a
        reason), n_permutations and exact, p_pearson_kind and p_spearman_kind (exchanging within kinds, see above; NaN where
        none were named), n_permutations_kind, low and high (least and largest Pearson correlation with one run left out),
        random (mean Pearson correlation of random sets), percentile and p_random of the set's among theirs, n_random, reason
        and reason_kind.

    Raises:
        StatisticsError: There is no such column, or an option is unknown.
    """
    import pandas as pd

    check_alternative(alternative)
    courses, left_out = _courses(table, metric, outcome)
    lines: list[dict[str, Any]] = []
    for how in ("pooled", "within", "across"):
        x, y, owner = _points(courses, how)
        both = _both(x, y, how, owner)
        line: dict[str, Any] = {"how": how, "run": "", **both, "n": len(x), "n_runs": len(courses)}
        line |= _permuted(courses, how, groups, alternative, n_permutations, seed)
        if kinds is not None:
            beyond = _permuted(courses, how, kinds, alternative, n_permutations, seed, units)
            line |= {f"{name}_kind": value for name, value in beyond.items() if name != "exact"}
        line |= _without_one(courses, how)
        if random is not None:
            line |= _beside_random(both["pearson"], table, random, metric, outcome, how, alternative)
        lines.append({**line, "n_left_out": left_out})
    for run, (_, x, y) in courses.items():
        reason = (
            "checkpoints of one run follow each other: no test"
            if len(x) > 2
            else f"{len(x)} checkpoints carry no correlation"
        )
        lines.append(
            {
                "how": "run",
                "run": run,
                **_both(x, y, "run", np.zeros(len(x), dtype=int)),
                "n": len(x),
                "n_runs": 1,
                "reason": reason,
            }
        )
    columns = (
        *("how", "run", "metric", "outcome", "pearson", "spearman", "n", "n_runs", "n_left_out"),
        *("p_pearson", "p_spearman", "n_permutations", "exact"),
        *("p_pearson_kind", "p_spearman_kind", "n_permutations_kind", "low", "high"),
        *("random", "percentile", "p_random", "n_random", "reason", "reason_kind"),
    )
    found = pd.DataFrame(lines, columns=columns)
    found["metric"], found["outcome"] = metric, outcome
    whole = ["n_left_out", "n_permutations", "n_permutations_kind", "n_random"]
    return found.fillna(dict.fromkeys(whole, 0) | {"exact": False, "reason": "", "reason_kind": ""}).astype(
        dict.fromkeys(whole, "int64") | {"exact": "bool"}
    )


Courses = dict[str, tuple[Int[np.ndarray, " step"], Float[np.ndarray, " step"], Float[np.ndarray, " step"]]]


def _courses(table: pd.DataFrame, metric: str, outcome: str) -> tuple[Courses, int]:
    """Run → steps, metric and outcome, in the order of steps; and how many points were left out."""
    missing = [name for name in ("run", "step", metric, outcome) if name not in table]
    if missing:
        raise StatisticsError(f"column {missing[0]!r} was asked for; there are {', '.join(table.columns)}.")
    rows = table[table["step"] > 0].sort_values("step", kind="stable")
    usable = np.isfinite(rows[[metric, outcome]].to_numpy(dtype=np.float64)).all(axis=1)
    courses: Courses = {}
    for run in dict.fromkeys(table["run"]):
        its = rows[usable & (rows["run"] == run).to_numpy()]
        if len(its):
            x, y = (its[name].to_numpy(dtype=np.float64) for name in (metric, outcome))
            courses[str(run)] = (its["step"].to_numpy(), x, y)
    return courses, int((~usable).sum())


def _points(
    courses: Courses, how: str
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    if not courses:
        return np.empty(0), np.empty(0), np.empty(0, dtype=int)
    xs, ys = ([course[side] for course in courses.values()] for side in (1, 2))
    if how == "across":
        return (
            np.array([x.mean() for x in xs]),
            np.array([y.mean() for y in ys]),
            np.arange(len(xs)),
        )
    if how == "within":
        xs, ys = ([one - one.mean() for one in side] for side in (xs, ys))
    owner = np.repeat(np.arange(len(xs)), [len(x) for x in xs])
    return np.concatenate(xs), np.concatenate(ys), owner


def _both(x: np.ndarray, y: np.ndarray, how: str, owner: np.ndarray) -> dict[str, float]:
    return {"pearson": pearson(x, y), "spearman": pearson(*_ranked(x, y, how, owner))}


def _ranked(x: np.ndarray, y: np.ndarray, how: str, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks over all points; within runs, of each run's own, centred."""
    if how != "within":
        return ranks(x), ranks(y)
    sides = []
    for values in (x, y):
        ranked = np.empty(len(values))
        for run in np.unique(owner):
            its = owner == run
            ranked[its] = ranks(values[its]) - (its.sum() + 1) / 2
        sides.append(ranked)
    return sides[0], sides[1]


def _permuted(
    courses: Courses,
    how: str,
    groups: Mapping[str, str] | None,
    alternative: Alternative,
    n_permutations: int,
    seed: int,
    units: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Place the correlation among those with the outcomes' courses exchanged between runs."""
    runs = list(courses)
    ways = exchanges(runs, groups, units, n_permutations=n_permutations, seed=seed)
    if ways.reason:
        return {"reason": ways.reason}
    if how != "across" and len({tuple(course[0].tolist()) for course in courses.values()}) > 1:
        return {"reason": "runs were measured at different steps, so that their courses cannot be exchanged"}
    x, y, owner = _points(courses, how)
    found: dict[str, Any] = {"n_permutations": len(ways.pairings), "exact": ways.exact}
    for name, (a, b) in (("pearson", (x, y)), ("spearman", _ranked(x, y, how, owner))):
        own = pearson(a, b)
        if math.isnan(own):
            found["reason"] = "one of the two does not vary"
            continue
        ours, theirs = (one.reshape(len(runs), -1) - one.mean() for one in (a, b))
        # Means and norms do not change when courses change places: the sum of products decides.
        products = ours @ theirs.T / (np.linalg.norm(ours) * np.linalg.norm(theirs))
        drawn = products[np.arange(len(runs)), ways.pairings].sum(axis=1)
        own_extreme, others = extremeness(own, alternative), extremeness(drawn, alternative)
        found[f"p_{name}"] = ways.p(int((others >= own_extreme - 1e-9).sum()))
    return found


def _without_one(courses: Courses, how: str) -> dict[str, float]:
    if len(courses) < 3:
        return {}
    found = []
    for left_out in courses:
        x, y, _ = _points({run: course for run, course in courses.items() if run != left_out}, how)
        found.append(pearson(x, y))
    return {"low": float(np.min(found)), "high": float(np.max(found))}


def _beside_random(
    own: float,
    table: pd.DataFrame,
    random: pd.DataFrame,
    metric: str,
    outcome: str,
    how: str,
    alternative: Alternative,
) -> dict[str, Any]:
    if metric not in random or math.isnan(own):
        return {}
    outcomes = table[["run", "step", outcome]]
    found = []
    for _, rows in random[["run", "step", "set", metric]].merge(outcomes, on=["run", "step"]).groupby("set"):
        x, y, _ = _points(_courses(rows, metric, outcome)[0], how)
        found.append(pearson(x, y))
    others = [value for value in found if math.isfinite(value)]
    if not others:
        return {}
    return {
        "random": float(np.mean(others)),
        "percentile": percentile_among(own, others).percentile,
        "p_random": control_p(own, others, alternative),
        "n_random": len(others),
    }


# --- equal drift -------------------------------------------------------------------------------------


def at_drift(drift: Float[np.ndarray, " step"], wanted: float) -> tuple[int, float] | None:
    """Where along a run the drift first comes to a value: the checkpoint before, and the share of the way to the next.

    >>> at_drift(np.array([0.0, 0.5, 1.5]), 0.75), at_drift(np.array([0.0, 0.5]), 0.75)
    ((1, 0.25), None)
    """
    for place in range(len(drift) - 1):
        before, after = float(drift[place]), float(drift[place + 1])
        if before <= wanted <= after:
            return place, 0.0 if after == before else (wanted - before) / (after - before)
    return None


def drift_matched(
    table: pd.DataFrame,
    prompts: pd.DataFrame,
    target: str,
    control: str,
    *,
    by: str = "weight_drift",
    columns: Sequence[str] = (),
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Hold each checkpoint of a run against another run at the point where that had drifted as far.

    Between two checkpoints of the control everything is interpolated linearly in the drift; the base, at drift 0, is the
    first one. A control that never came so far gives NaN, with the reason.

    Args:
        table: Columns run, step and what is to be compared, step 0 (the base) included.
        prompts: Columns run, step, kind, prompt, family, score: what the difference of lost refusal is paired by.
        target: A run.
        control: Another run from the same base.
        by: The drift: a column of the table.
        columns: What to compare.
        n_resamples: Of the interval.
        seed: Of the interval.

    Returns:
        One row per checkpoint of the target: step, drift, control_step (where the control had drifted as far); per column the
        target's value, the control's (``_control``) and ``_difference``; lost_low and lost_high (95 % interval of the
        difference of lost refusal score on harmful requests, over families); reason.

    Raises:
        StatisticsError: There is no such run or column.
    """
    import pandas as pd

    for run in (target, control):
        if run not in set(table["run"]):
            raise StatisticsError(
                f"run {run!r} was asked for; there are {', '.join(dict.fromkeys(table['run']))}."
            )
    missing = [name for name in (by, *columns) if name not in table]
    if missing:
        raise StatisticsError(f"column {missing[0]!r} was asked for; there are {', '.join(table.columns)}.")
    ours, theirs = (
        table[table["run"] == run].sort_values("step", kind="stable").reset_index(drop=True)
        for run in (target, control)
    )
    drift = theirs[by].to_numpy(dtype=np.float64)
    lines = []
    for _, row in ours[ours["step"] > 0].iterrows():
        wanted = float(row[by])
        found = at_drift(drift, wanted) if math.isfinite(wanted) else None
        line: dict[str, Any] = {"step": int(row["step"]), "drift": wanted}
        if found is None:
            reach = f"{np.nanmax(drift):.3g}" if np.isfinite(drift).any() else "nowhere"
            line["reason"] = f"the control's drift reaches {reach}, the target's is {wanted:.3g}"
            line |= {name: float(row[name]) for name in columns}
            lines.append(line)
            continue
        place, share = found
        before, after = theirs.iloc[place], theirs.iloc[min(place + 1, len(theirs) - 1)]

        def between(name: str, before: Any = before, after: Any = after, share: float = share) -> float:
            # A side of no weight may be NaN.
            parts = [(1 - share, float(before[name])), (share, float(after[name]))]
            return sum(weight * value for weight, value in parts if weight > 0)

        line["control_step"] = between("step")
        for name in columns:
            value, other = float(row[name]), between(name)
            line |= {name: value, f"{name}_control": other, f"{name}_difference": value - other}
        line |= _paired(
            prompts,
            (target, int(row["step"])),
            control,
            [(int(before["step"]), 1 - share), (int(after["step"]), share)],
            n_resamples,
            seed,
        )
        lines.append({**line, "reason": ""})
    names = [f"{name}{end}" for name in columns for end in ("", "_control", "_difference")]
    return pd.DataFrame(
        lines, columns=["step", "drift", "control_step", *names, "lost_low", "lost_high", "reason"]
    )


def _paired(
    prompts: pd.DataFrame,
    target: tuple[str, int],
    control: str,
    steps: Sequence[tuple[int, float]],
    n_resamples: int,
    seed: int,
) -> dict[str, float]:
    """Interval of (control − target) refusal scores: how much more the target lost, request by request."""
    harmful = prompts[prompts["kind"] == "harmful"]

    def scores(run: str, step: int) -> pd.Series[float]:
        rows = harmful[(harmful["run"] == run) & (harmful["step"] == step)]
        return rows.set_index("prompt")["score"]

    theirs = sum(weight * scores(control, step) for step, weight in steps if weight > 0)
    gap = (theirs - scores(*target)).dropna()
    families = harmful.drop_duplicates("prompt").set_index("prompt")["family"].reindex(gap.index)
    try:
        found = bootstrap_interval(
            gap.to_numpy(dtype=np.float64), families.to_numpy(), n_resamples=n_resamples, seed=seed
        )
    except NotEnoughData:
        return {"lost_low": math.nan, "lost_high": math.nan}
    return {"lost_low": float(found.low), "lost_high": float(found.high)}


# --- forecast ----------------------------------------------------------------------------------------


def forecast(
    early: Mapping[str, float],
    final: Mapping[str, float],
    *,
    groups: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    n_permutations: int = 9999,
    seed: int = 0,
) -> dict[str, Any]:
    """Predict each run's final outcome from one early number, by a line fitted on the other runs.

    Scored against predicting the mean of the other runs: skill = 1 − squared error / squared error of the mean. 0 is no
    better than the mean, negative is worse, 1 is exact. p: the share of ways to exchange final outcomes between runs of one
    group that give as much skill; where each run is a group of its own, or none are named, between all runs. So what runs of a
    group share (their base) is no evidence; what runs of one kind share is, and p_kind leaves that out as `correlations` does.

    Args:
        early: Run → number.
        final: Run → outcome.
        groups: Run → group; all runs of the group (the same base, say) are held out together.
        kinds: Run → kind of training; for p_kind.
        units: Run → what chance drew and every kind shares; for p_kind.
        n_permutations: Exchanges that are drawn, where there are more.
        seed: Of the drawing.

    Returns:
        skill, rmse, rmse_mean, p, p_kind, n_runs, n_permutations, predicted (run → number), reason (why there is no skill, or
        no p) and reason_kind (why there is no p_kind).

    >>> runs = {"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0}
    >>> found = forecast(runs, {run: 2 * value + 1 for run, value in runs.items()})
    >>> round(found["skill"], 6), found["n_runs"]
    (1.0, 4)
    """
    runs = [run for run in early if run in final and math.isfinite(early[run]) and math.isfinite(final[run])]
    x, y = (np.array([side[run] for run in runs], dtype=np.float64) for side in (early, final))
    labels = np.array([(groups or {}).get(run, run) for run in runs])
    nothing = {
        **dict.fromkeys(("skill", "rmse", "rmse_mean", "p", "p_kind"), math.nan),
        "n_runs": len(runs),
        "n_permutations": 0,
        "predicted": {},
        "reason_kind": "",
    }
    folds = [labels == label for label in dict.fromkeys(labels.tolist())]
    if len(runs) < FEWEST_RUNS or any(int((~fold).sum()) < 3 for fold in folds):
        return {
            **nothing,
            "reason": f"{len(runs)} runs in {len(folds)} groups: a line and its error need at least 4 runs, 3 outside each group",
        }
    predictors = _predictors(x, folds)
    if predictors is None:
        return {**nothing, "reason": "the early number does not vary over the runs"}
    line, mean = predictors

    def errors(outcomes: Float[np.ndarray, "way run"], by: np.ndarray) -> Float[np.ndarray, " way"]:
        return np.asarray(((outcomes - outcomes @ by.T) ** 2).mean(axis=1))

    own, own_mean = (float(errors(y[None], by)[0]) for by in (line, mean))
    if own_mean <= _TIE:
        return {**nothing, "reason": "all runs end alike: there is nothing to predict"}
    skill = 1 - own / own_mean

    def placed(ways: Exchanges) -> float:
        if ways.reason:
            return math.nan
        drawn = y[ways.pairings]
        skills = 1 - errors(drawn, line) / errors(drawn, mean)
        return ways.p(int((skills >= skill - 1e-9).sum()))

    shared: dict[str, Any] = {"n_permutations": n_permutations, "seed": seed}
    ways = exchanges(runs, groups if len(folds) < len(runs) else None, **shared)
    beyond = None if kinds is None else exchanges(runs, kinds, units, **shared)
    return {
        "skill": skill,
        "rmse": math.sqrt(own),
        "rmse_mean": math.sqrt(own_mean),
        "p": placed(ways),
        "p_kind": math.nan if beyond is None else placed(beyond),
        "n_runs": len(runs),
        "n_permutations": len(ways.pairings),
        "predicted": dict(zip(runs, (line @ y).tolist(), strict=True)),
        "reason": ways.reason,
        "reason_kind": "" if beyond is None else beyond.reason,
    }


def _predictors(
    x: Float[np.ndarray, " run"], folds: Sequence[np.ndarray]
) -> tuple[Float[np.ndarray, "run run"], Float[np.ndarray, "run run"]] | None:
    """Matrices that make predictions of outcomes: by a line fitted without one's own fold, and by the mean without it."""
    line, mean = (np.zeros((len(x), len(x))) for _ in range(2))
    for fold in folds:
        known = ~fold
        centred = x[known] - x[known].mean()
        spread = float(centred @ centred)
        if spread <= _TIE * max(1.0, float(x @ x)):
            return None
        mean[np.ix_(fold, known)] = 1 / known.sum()
        line[np.ix_(fold, known)] = 1 / known.sum() + np.outer(x[fold] - x[known].mean(), centred) / spread
    return line, mean
