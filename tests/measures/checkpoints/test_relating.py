"""Correlations, equal drift and forecasts on arrays made by hand: against SciPy, against loops, and on nulls."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pandas as pd
import pytest

from rim_lens.errors import StatisticsError
from rim_lens.measures.checkpoints import relating
from rim_lens.measures.checkpoints.result import Comparison
from tests.chance import assert_level_held

stats = pytest.importorskip("scipy.stats")


def drawn(n_runs, n_steps, seed, trend, link=0.0):
    """Metric and outcome [run, step] that share a course over steps; `link` ties them run by run."""
    rng = np.random.default_rng(seed)
    course = np.linspace(0.2, 1, n_steps) * trend
    own = rng.normal(size=(n_runs, 1)) + 0.3 * rng.normal(size=(n_runs, n_steps))
    other = rng.normal(size=(n_runs, 1)) + 0.3 * rng.normal(size=(n_runs, n_steps))
    return course + own, course + link * own + (1 - link) * other


def made(n_runs=5, n_steps=4, seed=0, trend=1.0, link=0.0):
    metric, lost = drawn(n_runs, n_steps, seed, trend, link)
    return pd.DataFrame(
        {
            "run": np.repeat([f"r{place}" for place in range(n_runs)], n_steps + 1),
            "step": np.tile(np.arange(n_steps + 1) * 10, n_runs),
            "ras": np.concatenate([[0.0, *row] for row in metric]),
            "lost": np.concatenate([[0.0, *row] for row in lost]),
        }
    )


def blocks(table, how):
    tuned = table[table["step"] > 0]
    x, y = ([rows[name].to_numpy() for _, rows in tuned.groupby("run")] for name in ("ras", "lost"))
    if how == "across":
        return [np.array([one.mean()]) for one in x], [np.array([one.mean()]) for one in y]
    if how == "within":
        return [one - one.mean() for one in x], [one - one.mean() for one in y]
    return x, y


@pytest.mark.parametrize("how", ["pooled", "within", "across"])
def test_correlations_are_scipys_and_p_counts_every_exchange_of_courses(how):
    table = made()
    found = relating.correlations(table, "ras").set_index("how").loc[how]
    x, y = blocks(table, how)
    assert found["pearson"] == pytest.approx(stats.pearsonr(np.concatenate(x), np.concatenate(y))[0])
    values = [
        stats.pearsonr(np.concatenate(x), np.concatenate([y[place] for place in way]))[0]
        for way in permutations(range(5))
    ]
    assert found["p_pearson"] == pytest.approx(np.mean(np.abs(values) >= abs(found["pearson"]) - 1e-9))
    if how != "within":
        ranked = [
            stats.spearmanr(np.concatenate(x), np.concatenate([y[place] for place in way]))[0]
            for way in permutations(range(5))
        ]
        assert found["spearman"] == pytest.approx(ranked[0])
        assert found["p_spearman"] == pytest.approx(np.mean(np.abs(ranked) >= abs(ranked[0]) - 1e-9))
    without = [
        stats.pearsonr(np.concatenate(x[:run] + x[run + 1 :]), np.concatenate(y[:run] + y[run + 1 :]))[0]
        for run in range(5)
    ]
    assert (found["low"], found["high"]) == (pytest.approx(min(without)), pytest.approx(max(without)))
    assert found["exact"]
    assert found["n_permutations"] == 120
    assert found["n"] == (5 if how == "across" else 20)


def test_within_ranks_each_run_by_itself():
    table = made()
    x, y = blocks(table, "pooled")
    by_hand = stats.pearsonr(
        *(np.concatenate([stats.rankdata(one) - 2.5 for one in side]) for side in (x, y))
    )[0]
    found = relating.correlations(table, "ras").set_index("how").loc["within", "spearman"]
    assert found == pytest.approx(by_hand)


def test_a_run_alone_has_its_correlation_and_no_p():
    table = made()
    found = relating.correlations(table, "ras")
    rows = found[found["how"] == "run"]
    tuned = table[(table["run"] == "r2") & (table["step"] > 0)]
    line = rows[rows["run"] == "r2"].iloc[0]
    assert line["pearson"] == pytest.approx(stats.pearsonr(tuned["ras"], tuned["lost"])[0])
    assert line["spearman"] == pytest.approx(stats.spearmanr(tuned["ras"], tuned["lost"])[0])
    assert rows["p_pearson"].isna().all()
    assert rows["reason"].str.contains("no test").all()


def test_a_shared_course_alone_correlates_and_is_not_significant():
    """What every run does at every step correlates to nearly 1 and says nothing of entanglement: the p stays level."""
    found = [
        relating.correlations(made(6, 4, seed, trend=8.0), "ras").set_index("how").loc["pooled"]
        for seed in range(12)
    ]
    assert np.mean([one["pearson"] for one in found]) > 0.8
    assert np.mean([one["p_pearson"] <= 0.05 for one in found]) <= 0.25


@pytest.mark.parametrize("how", ["pooled", "within", "across"])
def test_exchanging_courses_holds_its_level_on_null_runs(how):
    p = []
    for seed in range(2000):
        metric, lost = drawn(4, 3, seed, trend=3.0)
        courses = {str(run): (np.arange(3), metric[run], lost[run]) for run in range(4)}
        p.append(relating._permuted(courses, how, None, "two-sided", 999, 0)["p_pearson"])
    assert_level_held(p)
    assert min(p) == pytest.approx(1 / 24)


def test_a_true_link_between_runs_is_found():
    p = [
        relating.correlations(made(6, 4, seed, link=0.95), "ras").set_index("how").loc["across", "p_pearson"]
        for seed in range(12)
    ]
    assert np.mean(np.array(p) <= 0.05) > 0.9


def test_groups_exchange_only_among_themselves_and_drawn_ways_agree_with_all():
    table = made(6, 3)
    groups = {f"r{place}": "ab"[place % 2] for place in range(6)}
    grouped = relating.correlations(table, "ras", groups=groups).set_index("how").loc["pooled"]
    assert grouped["n_permutations"] == 36
    x, y = blocks(table, "pooled")
    values = [
        stats.pearsonr(
            np.concatenate(x),
            np.concatenate([y[{0: even, 1: odd}[place % 2][place // 2]] for place in range(6)]),
        )[0]
        for even in permutations((0, 2, 4))
        for odd in permutations((1, 3, 5))
    ]
    assert grouped["p_pearson"] == pytest.approx(np.mean(np.abs(values) >= abs(grouped["pearson"]) - 1e-9))
    courses, _ = relating._courses(made(8, 3), "ras", "lost")
    every, drawn = (
        relating._permuted(courses, "pooled", None, "greater", n, 1)["p_pearson"] for n in (40320, 4000)
    )
    assert drawn == pytest.approx(every, abs=0.04)


def crossed(rng, n_kinds=3, n_seeds=4, n_steps=3, of_kind=1.0, of_seed=0.0, own=0.3):
    """Runs of kinds × seeds; kind and seed decide metric and outcome, each by draws of its own: nothing links the two."""
    kinds = {f"{kind}_{seed}": str(kind) for kind in range(n_kinds) for seed in range(n_seeds)}
    seeds = {run: run[2:] for run in kinds}
    sides = [
        of_kind * rng.normal(size=(n_kinds, 1))
        + of_seed * rng.normal(size=(1, n_seeds))
        + own * rng.normal(size=(n_kinds, n_seeds))
        for _ in range(2)
    ]
    metric, lost = (np.outer(side.reshape(-1), np.arange(1, n_steps + 1)) for side in sides)
    return metric, lost, kinds, seeds


def shares(of_seed, n=200, **changes):
    """How often p is at most .05: over runs, within kinds run by run, and within kinds with seeds whole."""
    rng = np.random.default_rng(1)
    found = {"runs": [], "kinds": [], "units": []}
    for _ in range(n):
        metric, lost, kinds, seeds = crossed(rng, of_seed=of_seed, **changes)
        courses = {run: (np.arange(3), metric[place], lost[place]) for place, run in enumerate(kinds)}
        for name, groups, units in (
            ("runs", None, None),
            ("kinds", kinds, None),
            ("units", kinds, seeds),
        ):
            p = relating._permuted(courses, "across", groups, "two-sided", 199, 0, units)
            found[name].append(p["p_pearson"])
    return found


def test_kinds_that_decide_both_sides_do_not_pass_for_runs():
    found = shares(of_seed=0.0)
    assert np.mean(np.array(found["runs"]) <= 0.05) > 0.3  # what the p over runs includes
    assert_level_held(found["kinds"], fewest=200)
    assert_level_held(found["units"], fewest=200)


def test_seeds_that_decide_both_sides_do_not_pass_for_runs_where_they_change_places_whole():
    found = shares(of_seed=1.0, n_seeds=5)
    assert np.mean(np.array(found["kinds"]) <= 0.05) > 0.2
    assert_level_held(found["units"], fewest=200)


def test_correlations_give_both_p_and_say_why_one_is_not_there():
    metric, lost, kinds, seeds = crossed(np.random.default_rng(5))
    table = pd.DataFrame(
        [
            {"run": run, "step": step + 1, "ras": metric[place, step], "lost": lost[place, step]}
            for place, run in enumerate(kinds)
            for step in range(3)
        ]
    )
    found = relating.correlations(table, "ras", kinds=kinds, units=seeds).set_index("how").loc["across"]
    x, y = (side.mean(axis=1).reshape(3, 4) for side in (metric, lost))
    values = [stats.pearsonr(x.ravel(), y[:, way].ravel())[0] for way in permutations(range(4))]
    assert found["n_permutations_kind"] == 24
    assert found["p_pearson_kind"] == pytest.approx(np.mean(np.abs(values) >= abs(values[0]) - 1e-9))
    assert (
        found["p_pearson"] == relating.correlations(table, "ras").set_index("how").loc["across", "p_pearson"]
    )
    three = table[table["run"].str[2:] != "3"]
    found = relating.correlations(three, "ras", kinds=kinds, units=seeds).set_index("how").loc["pooled"]
    assert math.isnan(found["p_pearson_kind"])
    assert "3 units can be paired in 6 ways" in found["reason_kind"]
    assert found["p_pearson"] > 0
    torn = table[table["run"] != "0_0"]
    found = relating.correlations(torn, "ras", kinds=kinds, units=seeds).set_index("how").loc["pooled"]
    assert "one run of each kind" in found["reason_kind"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: table[table["run"].isin(["r0", "r1", "r2"])], "3 runs can be paired in 6 ways"),
        (lambda table: table[~((table["run"] == "r0") & (table["step"] == 10))], "different steps"),
        (lambda table: table.assign(ras=1.0), "does not vary"),
    ],
)
def test_where_nothing_can_be_tested_no_p_is_given_and_the_reason_is(change, reason):
    found = relating.correlations(change(made()), "ras").set_index("how").loc["pooled"]
    assert math.isnan(found["p_pearson"])
    assert reason in found["reason"]


def test_what_is_not_a_number_is_left_out_and_counted():
    table = made()
    table.loc[2, "ras"] = np.nan
    found = relating.correlations(table, "ras").set_index("how").loc["pooled"]
    tuned = table[(table["step"] > 0) & table["ras"].notna()]
    assert (found["n"], found["n_left_out"]) == (19, 1)
    assert found["pearson"] == pytest.approx(stats.pearsonr(tuned["ras"], tuned["lost"])[0])
    with pytest.raises(StatisticsError, match="there are run, step"):
        relating.correlations(table, "raz")


def test_a_correlation_stands_among_those_of_random_sets():
    table = made(4, 3, link=0.9)
    rng = np.random.default_rng(1)
    tuned = table[table["step"] > 0]
    random = pd.concat(
        [tuned[["run", "step"]].assign(set=number, ras=rng.normal(size=len(tuned))) for number in range(9)]
    )
    found = relating.correlations(table, "ras", random=random).set_index("how").loc["pooled"]
    others = [
        stats.pearsonr(rows.sort_values(["run", "step"])["ras"], tuned["lost"])[0]
        for _, rows in random.groupby("set")
    ]
    assert found["random"] == pytest.approx(np.mean(others))
    assert found["n_random"] == 9
    assert found["p_random"] == pytest.approx((1 + sum(np.abs(others) >= abs(found["pearson"]))) / 10)


def drifting():
    table = pd.DataFrame(
        {
            "run": ["t"] * 3 + ["c"] * 4,
            "step": [0, 10, 20, 0, 10, 20, 30],
            "weight_drift": [0.0, 0.3, 0.9, 0.0, 0.2, 0.4, 0.8],
            "lost": [0.0, 4.0, 6.0, 0.0, 1.0, 2.0, 4.0],
            "accuracy": [0.5, 0.6, 0.7, 0.5, np.nan, 0.7, 0.9],
        }
    )
    base = np.array([5.0, 6.0, 7.0, 8.0])
    prompts = [
        {
            "run": run,
            "step": step,
            "kind": "harmful",
            "prompt": str(place),
            "family": f"f{place // 2}",
            "score": score,
        }
        for run, step, lost in zip(table["run"], table["step"], table["lost"], strict=True)
        for place, score in enumerate(
            base - lost - (np.array([0.0, 1.0, 0.0, -1.0]) if run == "t" and lost else 0)
        )
    ]
    return table, pd.DataFrame(prompts)


def test_equal_drift_is_interpolated_by_hand():
    table, prompts = drifting()
    found = relating.drift_matched(table, prompts, "t", "c", columns=["lost", "accuracy"]).set_index("step")
    first = found.loc[10]  # drift 0.3, half way from 0.2 to 0.4
    assert first["control_step"] == pytest.approx(15)
    assert first["lost_control"] == pytest.approx(1.5)
    assert first["lost_difference"] == pytest.approx(2.5)
    assert math.isnan(first["accuracy_control"])
    # by family the target lost 2.5 + (0, .5) … of four requests in two families: 3.0 and 2.0
    assert first["lost_low"] == pytest.approx(2.0)
    assert first["lost_high"] == pytest.approx(3.0)
    last = found.loc[20]
    assert math.isnan(last["lost_control"])
    assert "reaches 0.8" in last["reason"]
    with pytest.raises(StatisticsError, match="there are t, c"):
        relating.drift_matched(table, prompts, "t", "x")


def test_a_run_against_itself_differs_by_nothing():
    table, prompts = drifting()
    found = relating.drift_matched(table, prompts, "c", "c", columns=["lost"])
    np.testing.assert_allclose(found["control_step"], [10, 20, 30])
    np.testing.assert_allclose(found["lost_difference"], 0, atol=1e-12)
    np.testing.assert_allclose(found[["lost_low", "lost_high"]], 0, atol=1e-12)


def test_a_forecast_fits_its_line_without_the_run_it_predicts():
    rng = np.random.default_rng(3)
    x = rng.normal(size=6)
    y = 2 * x + 0.3 * rng.normal(size=6)
    early, final = ({str(place): value for place, value in enumerate(side)} for side in (x, y))
    found = relating.forecast(early, final)
    errors, of_mean = [], []
    for run in range(6):
        known = np.arange(6) != run
        slope, start = np.polyfit(x[known], y[known], 1)
        assert found["predicted"][str(run)] == pytest.approx(slope * x[run] + start)
        errors.append((slope * x[run] + start - y[run]) ** 2)
        of_mean.append((y[known].mean() - y[run]) ** 2)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean(errors)))
    assert found["rmse_mean"] == pytest.approx(np.sqrt(np.mean(of_mean)))
    assert found["skill"] == pytest.approx(1 - np.sum(errors) / np.sum(of_mean))
    assert found["p"] <= 0.05


def test_a_forecast_holds_out_whole_groups():
    x, y = np.arange(6.0), np.array([0.0, 1.5, 2.0, 2.5, 4.5, 5.0])
    early, final = ({str(place): value for place, value in enumerate(side)} for side in (x, y))
    found = relating.forecast(early, final, groups={str(place): str(place // 2) for place in range(6)})
    slope, start = np.polyfit(x[2:], y[2:], 1)
    assert found["predicted"]["0"] == pytest.approx(start)
    assert found["predicted"]["1"] == pytest.approx(slope + start)


def test_a_forecast_of_noise_holds_its_level_and_says_when_it_cannot_be_made():
    rng = np.random.default_rng(0)
    p = []
    for _ in range(2000):
        early, final = (
            {str(place): value for place, value in enumerate(rng.normal(size=4))} for _ in range(2)
        )
        p.append(relating.forecast(early, final)["p"])
    assert_level_held(p)
    assert "at least 4 runs" in relating.forecast({"a": 1.0}, {"a": 2.0})["reason"]
    runs = "abcd"
    assert (
        "does not vary"
        in relating.forecast(dict.fromkeys(runs, 1.0), dict(zip(runs, range(4), strict=True)))["reason"]
    )
    assert (
        "end alike"
        in relating.forecast(dict(zip(runs, range(4), strict=True)), dict.fromkeys(runs, 1.0))["reason"]
    )


def test_bases_that_decide_both_sides_do_not_pass_for_a_forecast():
    """Six bases of three runs; metric and outcome of a base are drawn apart, and its runs are alike."""
    rng = np.random.default_rng(0)
    p = []
    for _ in range(300):
        x, y = (rng.normal(size=(6, 1)) + 0.1 * rng.normal(size=(6, 3)) for _ in range(2))
        early, final = (
            {f"{base}/{run}": side[base, run] for base in range(6) for run in range(3)} for side in (x, y)
        )
        groups = {run: run[0] for run in early}
        p.append(relating.forecast(early, final, groups=groups, n_permutations=199)["p"])
    assert_level_held(p, fewest=300)


def test_kinds_that_decide_both_sides_do_not_pass_for_a_forecast_within_kinds():
    rng = np.random.default_rng(2)
    found = []
    for _ in range(200):
        metric, lost, kinds, seeds = crossed(rng, of_seed=0.5)
        early, final = (dict(zip(kinds, side[:, 0], strict=True)) for side in (metric, lost))
        found.append(relating.forecast(early, final, kinds=kinds, units=seeds, n_permutations=199))
    assert np.mean([one["p"] <= 0.05 for one in found]) > 0.15
    assert_level_held([one["p_kind"] for one in found], fewest=200)


def test_a_forecast_without_enough_ways_keeps_its_skill_and_says_why_it_has_no_p():
    early = {f"{base}/{run}": base + 0.1 * run for base in range(4) for run in range(2)}
    groups = {run: run[0] for run in early}
    found = relating.forecast(early, early, groups=groups, kinds={run: run for run in early})
    assert found["skill"] == pytest.approx(1)
    assert math.isnan(found["p"])
    assert "8 runs can be paired in 16 ways" in found["reason"]
    assert math.isnan(found["p_kind"])
    assert "8 runs can be paired in 1 ways" in found["reason_kind"]
    alone = {run: value for run, value in early.items() if run.endswith("0")}
    assert relating.forecast(alone, alone, groups=groups)["p"] == pytest.approx(1 / 24, abs=0.05)


def test_one_checkpoint_a_run_cannot_forecast_itself():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"run": np.repeat(list("abcdef"), 2), "step": [0, 10] * 6, "lost": rng.normal(size=12)}
    )
    comparison = Comparison(table, pd.DataFrame(), pd.DataFrame(), {})
    with pytest.raises(StatisticsError, match="a run has 1: none comes before its last"):
        comparison.forecast(1, ["lost"])
    with pytest.raises(StatisticsError, match="give 1 to 2"):
        Comparison(made(5, 3), pd.DataFrame(), pd.DataFrame(), {}).forecast(3, ["lost"])
    assert len(comparison.forecast(before=dict(zip("abcdef", range(6), strict=True)))) == 1
