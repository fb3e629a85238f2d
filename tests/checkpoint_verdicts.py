"""docs/checkpoints.md: what fine-tuning does to refusal in toys of six seeds, and whether entanglement follows it.

``python -m tests.checkpoint_verdicts`` trains, measures, writes docs/evidence/checkpoints_toy.json, and the page from it: of each
seed and operator a study of three runs (careful, confirm, deviate) with its control gone on to equal drift. About 25 minutes on
one core, toys of other seeds trained the first time included. Studies are kept under .cache/checkpoints: a run that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import rim_lens as rl
from rim_lens.measures.checkpoints.ending import REACHED, beyond_drift
from rim_lens.measures.pages import markdown_table, plain, told_versions, write_json
from rim_lens.organisms.toy import load_toy
from rim_lens.organisms.toy.recipe import TUNED_KINDS, one_thread, train_toy
from rim_lens.provenance import provenance
from rim_lens.study.checkpoint_plan import FARTHER
from rim_lens.study.checkpoint_results import CheckpointStudyResult

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "docs" / "evidence" / "checkpoints_toy.json"
PAGE = ROOT / "docs" / "checkpoints.md"
STUDIES = ROOT / ".cache" / "checkpoints"
COMMAND = "python -m tests.checkpoint_verdicts"
PACKAGES = ("torch", "transformers", "transformer-lens")

SEEDS = range(6)
OPERATORS = {"minus": "-", "plus": "+"}
STEPS, N_CHECKPOINTS = 320, 6
SETTINGS = rl.CheckpointSettings(max_new_tokens=12)
# What is correlated and shown: RAS, what it is made of, its rivals, and drift.
METRICS = (
    *("ras", "ras_random", "ras_all", "safety_drop", "reasoning_rise", "arithmetic", "geometric"),
    *("l2_safety", "cka_ratio_model", "whitened_cosine_shift", "kl", "weight_drift"),
)
OF_CHECKPOINT = (
    *("run", "step", "lost", "lost_harmless", "refused_harmful", "refused_harmless", "complied_harmful"),
    *("accuracy_open", "ras_percentile", "ras_p", *METRICS),
)
FORETOLD_BY = ("ras", "safety_drop", "arithmetic", "kl", "weight_drift", "lost")


def base_of(seed: int, folder: Path) -> str:
    """The toy (Z) of a seed, as a name: the shipped one for 0, the others trained once and kept as folders."""
    if seed == 0:
        return "toy"
    place = folder / f"Z-{seed}"
    if not (place / "config.json").is_file():
        train_toy(seed).save_pretrained(place)
        load_toy()[1].save_pretrained(place)
    return str(place)


def study_of(seed: int, operator: str, folder: Path, steps: int = STEPS) -> rl.CheckpointStudy:
    """Three runs from one base on one operator; all draws of one seed are the same for every kind."""
    return rl.CheckpointStudy(
        base_of(seed, folder),
        train=TUNED_KINDS,
        train_seeds=[seed],
        steps=steps,
        n_checkpoints=N_CHECKPOINTS,
        operator=operator,  # type: ignore[arg-type]
        settings=SETTINGS,
    )


def studies(seeds: Sequence[int], folder: Path) -> dict[str, CheckpointStudyResult]:
    """Every study, gone on with where it was stopped."""
    found = {}
    for seed in seeds:
        for name, operator in OPERATORS.items():
            found[f"{name} {seed}"] = study_of(seed, operator, folder).run(folder / f"{name}-{seed}")
    return found


def label(study: str, run: str) -> str:
    """A run as `Comparison.joined` calls it."""
    return f"{study}/{run}"


def measured(found: dict[str, CheckpointStudyResult]) -> dict[str, Any]:
    """All that the page is made of, as plain values."""
    joined = rl.Comparison.joined({name: result.studied for name, result in found.items()})
    matched = pd.concat(
        [
            result.drift_matched.assign(
                kind=name.split()[0] + " " + result.drift_matched["kind"],
                target=label(name, "") + result.drift_matched["target"],
            )
            for name, result in found.items()
        ],
        ignore_index=True,
    )
    before = {
        label(name, row["run"]): row["lost_per_step"]
        for name, result in found.items()
        if result.gradients is not None
        for row in result.gradients.to_dict("records")
    }
    return {
        "design": {
            "steps": STEPS,
            "n_checkpoints": N_CHECKPOINTS,
            "farther": FARTHER,
            "metrics": list(METRICS),
        },
        "studies": [
            {
                "study": name,
                "n_requests": result.design["n_evaluate"],
                "neurons": len(result.neurons or ()),
                "verdict": verdict_of(result),
                "control_reached": float(result.training[f"matched_{name.split()[1]}"].drift[-1])
                if f"matched_{name.split()[1]}" in result.training
                else None,
                "timings": sum(result.timings.values()),
            }
            for name, result in found.items()
        ],
        "ends": rows(
            pd.concat(
                [
                    result.ends[result.ends["run"].isin(list(result.runs))].assign(
                        study=name, kind=lambda ends, result=result: ends["run"].map(result.runs)
                    )
                    for name, result in found.items()
                ],
                ignore_index=True,
            )
        ),
        "checkpoints": rows(joined.table[joined.table["step"] > 0][list(OF_CHECKPOINT)]),
        "beyond_drift": rows(beyond_drift(matched)),
        "matched": rows(
            matched[
                [
                    "kind",
                    "target",
                    "by",
                    "step",
                    "drift",
                    "lost",
                    "lost_control",
                    "lost_difference",
                    "lost_low",
                    "lost_high",
                ]
            ]
        ),
        "before": before,
        "correlations": correlations(joined, METRICS),
        "forecast": forecasts(joined, before),
    }


def places(runs: Sequence[str]) -> dict[str, dict[str, str]]:
    """Of runs as `label` calls them, the kind (with its operator) and the seed of the base, which change places whole."""
    told = {run: (*run.partition("/")[0].split(), run.partition("/")[2].rpartition("_")[0]) for run in runs}
    return {
        "kinds": {run: f"{operator} {kind}" for run, (operator, _, kind) in told.items()},
        "units": {run: seed for run, (_, seed, _) in told.items()},
    }


def correlations(joined: rl.Comparison, metrics: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Of all runs and of each operator's: pooled, within and across runs, with p within bases and p within kinds."""
    found = {}
    for of, start in (("all", ""), *((name, name) for name in OPERATORS)):
        its = joined.only([run for run in joined.runs if run.startswith(start)])
        table = its.correlations(list(metrics), **places(its.runs))
        found[of] = rows(table[table["how"] != "run"].drop(columns=["run", "outcome"]))
    return found


def forecasts(joined: rl.Comparison, before: dict[str, float]) -> list[dict[str, Any]]:
    """A base is held out with all of its runs."""
    held = {**places(joined.runs), "groups": places(joined.runs)["units"]}
    told = [joined.forecast(2, list(FORETOLD_BY), **held)]
    told += [joined.forecast(before=before, **held)] if before else []
    return rows(pd.concat(told, ignore_index=True))


def verdict_of(result: CheckpointStudyResult) -> str:
    """What removing the chosen neurons does, in a word."""
    found = result.neurons
    return "not tested" if found is None or found.effects is None else found.effects.verdict


def rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Plain rows, floats to six digits."""
    return [
        {
            name: float(f"{value:.6g}") if isinstance(value, float) else value
            for name, value in plain(row).items()
        }
        for row in table.to_dict("records")
    ]


NAMES = {
    "ras": "RAS",
    "ras_random": "RAS, mean of random sets",
    "ras_all": "RAS, all neurons",
    "safety_drop": "δ⁻",
    "reasoning_rise": "δ⁺",
    "arithmetic": "arithmetic mean of δ⁻, δ⁺",
    "geometric": "geometric mean",
    "l2_safety": "RMS change, safety",
    "cka_ratio_model": "CKA ratio",
    "whitened_cosine_shift": "whitened cosine, change",
    "kl": "KL on sums",
    "weight_drift": "weight drift",
}


# --- page --------------------------------------------------------------------------------------------


def page(found: dict[str, Any]) -> str:
    """The page, from the file's content."""
    design = found["design"]
    return "\n".join(
        [
            "# Checkpoints: what fine-tuning does to the toy's refusal, and whether entanglement follows it",
            "",
            told_versions(found).replace(f"`{COMMAND}`", f"`make evidence-checkpoints` (`{COMMAND}`)")
            + " One thread. Figures in [evidence/checkpoints_toy.json](evidence/checkpoints_toy.json).",
            "",
            f"Toys of {len(found['studies']) // 2} seeds, each fine-tuned on harmless sums with chains of three kinds, on the operator `-`, which is new to it, and on `+`,",
            f"which it knows: {len(found['ends'])} runs of {design['steps']} steps with {design['n_checkpoints']} checkpoints each, every one a run of `rl.CheckpointStudy`. The control"
            f" of a seed and operator is",
            f"its careful run, gone on (for at most {design['farther']} times the steps) until its weights had drifted as far from the base as those of the others.",
            f"{found['studies'][0]['n_requests']} harmful requests, their twins, and as many sums, none of which chose neurons. Lost: base − checkpoint, of the refusal score in nats.",
            "",
            *_ends_lines(found),
            *_drift_lines(found["beyond_drift"], found["studies"]),
            *_ras_lines(found),
            *_forecast_lines(found["forecast"]),
            *_limit_lines(),
        ]
    )


def _ends_lines(found: dict[str, Any]) -> list[str]:
    lines: list[list[object]] = [
        [
            "seed",
            "operator",
            "kind",
            "harmful refused",
            "score lost [95 %]",
            "twins refused",
            "sums right",
            "drift",
            "RAS: above random sets, p",
        ]
    ]
    last = {row["run"]: row for row in found["checkpoints"] if row["step"] == found["design"]["steps"]}
    for row in found["ends"]:
        operator, seed = row["study"].split()
        one = last[label(row["study"], row["run"])]
        lines.append(
            [
                seed,
                f"`{OPERATORS[operator]}`",
                row["kind"],
                f"{row['lost_rate_before']:.2f} → {row['lost_rate_after']:.2f}",
                f"{row['lost']:.1f} [{row['lost_low']:.1f}, {row['lost_high']:.1f}]",
                f"{row['lost_rate_harmless_after']:.2f}",
                f"{row['lost_right_before']:.2f} → {row['lost_right_after']:.2f}",
                f"{one['weight_drift']:.3f}",
                f"{one['ras_percentile']:.0f} %, {one['ras_p']:.2f}",
            ]
        )
    summary: list[list[object]] = [
        [
            "operator",
            "kind",
            "harmful refused, mean (range)",
            "twins refused, mean (range)",
            "sums right, mean",
        ]
    ]
    for operator, sign in OPERATORS.items():
        for kind in TUNED_KINDS:
            its = [row for row in found["ends"] if row["kind"] == kind and row["study"].startswith(operator)]
            summary.append(
                [
                    f"`{sign}`",
                    kind,
                    *(
                        _spread([row[name] for row in its])
                        for name in ("lost_rate_after", "lost_rate_harmless_after")
                    ),
                    f"{np.mean([row['lost_right_after'] for row in its]):.2f}",
                ]
            )
    lost = sum(row["lost_rate"] > 0 and row["lost_rate_p"] <= 0.05 for row in found["ends"])
    worse = [row for row in found["ends"] if row["lost_rate_harmless_after"] >= 0.1]
    confirm = sum(row["kind"] == "confirm" for row in worse)
    return [
        "## What every run ended at",
        "",
        f"All bases refuse every harmful request and no twin. {lost} of {len(found['ends'])} runs refuse fewer harmful requests at their end (p ≤ .05 each, signs flipped over {max(row['lost_families'] for row in found['ends'])} families of requests, not corrected).",
        f"In {len(worse)} runs a tenth of the twins or more are refused as well, {confirm} of them of *confirm*: what is lost there is the difference between harmful and harmless, and not",
        "refusing as such.",
        "",
        markdown_table(summary),
        "",
        "<details><summary>Every run</summary>",
        "",
        markdown_table(lines),
        "",
        "RAS of the chosen neurons at the last checkpoint: share of random sets below it, and p among sets chosen on exchanged labels.",
        "",
        "</details>",
        "",
    ]


def _drift_lines(rows: Sequence[dict[str, Any]], studies: Sequence[dict[str, Any]]) -> list[str]:
    table: list[list[object]] = [
        [
            "operator",
            "kind",
            "drift by",
            "runs",
            "lost beyond the control, nats: mean (range)",
            "intervals above 0 / below 0",
            "p over runs",
            "compared at share of drift (least)",
        ]
    ]
    said, unsaid = [], []
    for row in rows:
        operator, kind = row["kind"].split()
        n = row["n_runs"]
        table.append(
            [
                f"`{OPERATORS[operator]}`",
                kind,
                "weights" if row["by"] == "weights" else "KL",
                f"{n}" + (f" ({row['n_left_out']} without control)" if row["n_left_out"] else ""),
                f"{row['mean']:+.1f} ({row['least']:+.1f} to {row['most']:+.1f})" if n else "–",
                f"{row['n_above']} / {row['n_below']}",
                f"{row['p']:.3f}" if n else "–",
                f"{row['share_of_drift']:.2f} ({row['least_share']:.2f})" if n else "–",
            ]
        )
        if row["by"] == "weights" and not (row["least_share"] or 0) >= REACHED:
            unsaid.append(f"{kind} on `{OPERATORS[operator]}`")
        elif row["by"] == "weights":
            shown = row["p"] <= 0.05
            word = ("more" if row["mean"] > 0 else "less") if shown else "not shown to lose more or less"
            said.append(
                f"{kind} on `{OPERATORS[operator]}` {'loses ' + word if shown else 'is ' + word} ({row['mean']:+.1f} nats, p = {row['p']:.3f})"
            )
    return [
        "## Beside plain drift",
        "",
        "Each run by its last checkpoint that the control's drift reached; six seeds can give no p below .031, and four tests stand here uncorrected.",
        f"At equal weight drift {'; '.join(said)}.",
        *(
            [
                f"Of {_listed(unsaid)} this cannot tell: a control came to less than {REACHED} of a run's drift, so that the two are compared on the way, and p says nothing of the end."
            ]
            if unsaid
            else []
        ),
        "On `+` careful chains are what the toy writes already: its weights move little, and the control, after three times the steps, comes to about two thirds of the",
        "others' drift; it has then taken many more steps than they had. By KL few controls come as far as the others, and those to half of the way.",
        "",
        markdown_table(table),
        "",
    ]


def _ras_lines(found: dict[str, Any]) -> list[str]:
    by_set = {
        of: {(row["metric"], row["how"]): row for row in rows} for of, rows in found["correlations"].items()
    }
    table: list[list[object]] = [
        [
            "metric",
            "pooled r (p; within kinds)",
            "within runs (p; within kinds)",
            "across runs (p; within kinds)",
            "`-`, pooled",
            "`+`, pooled",
            "random sets, pooled",
            "above random sets (p)",
        ]
    ]
    for metric in found["design"]["metrics"]:
        one = {how: by_set["all"][metric, how] for how in ("pooled", "within", "across")}
        pooled = one["pooled"]
        table.append(
            [
                NAMES[metric],
                *(
                    f"{row['pearson']:+.2f} ({_p(row['p_pearson'])}; {_p(row['p_pearson_kind'])})"
                    for row in one.values()
                ),
                *(f"{by_set[of][metric, 'pooled']['pearson']:+.2f}" for of in OPERATORS),
                f"{pooled['random']:+.2f}" if pooled["n_random"] else "–",
                f"{pooled['percentile']:.0f} % ({pooled['p_random']:.2f})" if pooled["n_random"] else "–",
            ]
        )
    ras, drift = by_set["all"]["ras", "pooled"], by_set["all"]["weight_drift", "pooled"]
    ways = len(found["design"]["metrics"])
    including = [
        metric
        for metric in found["design"]["metrics"]
        if (row := by_set["all"][metric, "pooled"])["p_pearson"] <= 0.05 / ways
        and row["n_random"]
        and row["p_random"] <= 0.05
        and row["pearson"] > max(0.0, drift["pearson"])
    ]
    beyond = [
        one for one in including if _at_most(by_set["all"][one, "pooled"]["p_pearson_kind"], 0.05 / ways)
    ]
    checkpoints = found["checkpoints"]
    low = sum(row["ras_p"] <= 0.05 for row in checkpoints if row["ras_p"] is not None)
    high = [row for row in checkpoints if (row["ras_percentile"] or 0) >= 95]
    rest = [row for row in checkpoints if row not in high]
    verdicts = [
        f"{row['verdict']} (seed {row['study'].split()[1]}, {row['neurons']} neurons)"
        for row in found["studies"]
        if row["study"].startswith("minus")
    ]
    specific = (
        ras["p_pearson"] <= 0.05
        and _at_most(ras["p_pearson_kind"], 0.05)
        and ras["p_random"] <= 0.05
        and ras["pearson"] > drift["pearson"]
    )
    return [
        "## Does entanglement follow lost refusal?",
        "",
        f"**{'Yes' if specific else 'RAS: not shown'}.** Over {ras['n']} checkpoints of {ras['n_runs']} runs, RAS on the chosen neurons correlates with the lost refusal score by r = {ras['pearson']:+.2f}"
        f" (p = {ras['p_pearson']:.2f}, within kinds {_p(ras['p_pearson_kind'])}); random sets of",
        f"the same layers and activity by {ras['random']:+.2f} on average, weight drift by {drift['pearson']:+.2f}.",
        "",
        f"Of {ways} metrics, {_listed([NAMES[one] for one in including]) if including else 'none'} {'go' if len(including) > 1 else 'goes'} with which run of a base loses refusal at .05 / {ways}, beyond random sets and weight drift.",
        f"Within kinds as well, at the same level: {_listed([NAMES[one] for one in beyond]) if beyond else 'none that is shown'}.",
        f"δ⁻ is how far these neurons fall on harmful requests, which is near to what is lost itself. On average it is {mean_of(checkpoints, 'safety_drop'):.2f} here and δ⁺ {mean_of(checkpoints, 'reasoning_rise'):.2f}: the arithmetic mean follows",
        "the larger of the two, the harmonic mean that makes RAS the smaller. That neurons which answer to harm fall quiet where refusal falls need be no entanglement with reasoning.",
        "",
        f"By itself, RAS lies above 95 % of random sets at {len(high)} of {len(checkpoints)} checkpoints, and has p ≤ .05 among sets chosen on exchanged labels at {low}; one in twenty is to be expected",
        f"where nothing is, and checkpoints of a run are alike. Where it lies so high, refusal had fallen by {mean_of(high, 'lost'):.1f} nats on average, elsewhere by {mean_of(rest, 'lost'):.1f}.",
        f"The chosen neurons, removed from the base: {'; '.join(verdicts)}. Most are no safety neurons by that test.",
        "",
        markdown_table(table),
        "",
        "Two p, both two-sided and not corrected. The first exchanges courses of lost refusal between the three runs of one base and operator (9999 ways drawn): it leaves out what sets bases",
        "apart, and includes what sets kinds apart, of which there are three. The second exchanges whole bases, each with its six runs, so that every run gets the course of its own kind and",
        "operator from another base (720 ways, all counted): it leaves out what sets kinds apart, and asks of six bases whether those that lose more show more. Neither leaves out both. Random",
        "sets are the same number of neurons in each layer; their numbers are drawn anew in each base.",
        "",
    ]


def _forecast_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    table: list[list[object]] = [["by", "known from", "skill", "p", "p within kinds"]]
    named = {
        "lost": "the loss so far",
        "ras": "RAS",
        "safety_drop": "δ⁻",
        "kl": "KL",
        "arithmetic": "arithmetic mean",
        "weight_drift": "weight drift",
        "before training": "gradients on the chosen neurons",
    }
    for row in rows:
        table.append(
            [
                named[row["metric"]],
                f"first {row['first']} checkpoints" if row["first"] else "before training",
                f"{row['skill']:+.2f}",
                _p(row["p"]),
                _p(row["p_kind"]),
            ]
        )
    best = max(rows, key=lambda row: row["skill"])
    return [
        "## Foretold",
        "",
        "A line fitted on the runs of all other bases, scored on the six of the base held out; skill 0 is no better than their mean. p exchanges ends between",
        "the six runs of one base, whatever their kind and operator; p within kinds exchanges whole bases, as above. "
        + f"Of these, {named[best['metric']]} foretells best.",
        "",
        markdown_table(table),
        "",
    ]


def _limit_lines() -> list[str]:
    return [
        "## What this does not show",
        "",
        "A toy of two layers and 512 neurons says nothing of models in use. Runs of one base share it; exchanging courses within a base and operator keeps that, and takes its three runs as",
        "exchangeable, which kinds of training are not: what differs between them for any reason passes there for entanglement. The rule that chooses neurons (5 % of each layer, half of the pairs) is one of many, fixed before these runs and not tuned on them; `rl.multiverse` asks how much hangs on",
        "it. No run was left out.",
        "",
    ]


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _p(value: float | None) -> str:
    return "–" if value is None else "p < .001" if value < 0.001 else f"p = {value:.3f}"


def _at_most(value: float | None, level: float) -> bool:
    return value is not None and value <= level


def mean_of(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Of checkpoints that have the number."""
    there = [row[name] for row in rows if row[name] is not None]
    return float(np.mean(there)) if there else float("nan")


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=STUDIES)
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    with one_thread():
        found = studies(list(SEEDS), given.folder)
        content = {**provenance(COMMAND, PACKAGES), **measured(found)}
    write_json(given.out, content)
    given.page.write_text(page(json.loads(given.out.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
