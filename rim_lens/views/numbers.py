"""The numbers a report is made of, computed from what a study stored. Sentences, tables and pictures all read these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rim_lens.chat.conditions import controls_of, leaves_open
from rim_lens.folder import ResultFolder
from rim_lens.measures.stats import bootstrap_interval, proportion_interval, sign_flip_test

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from rim_lens.measures.heads.result import RefusalHeads
    from rim_lens.study import CheckpointStudyResult, NeuronStudyResult, StudyResult

    AnyResult = StudyResult | NeuronStudyResult | CheckpointStudyResult
    Gated = StudyResult | CheckpointStudyResult

Kind = Literal["harmful", "harmless"]
KINDS: dict[Kind, str] = {"harmful": "harmful requests", "harmless": "harmless twins"}

OUTCOMES = ("refuse", "comply", "other")


def seed_of(result: StudyResult) -> int:
    """The seed of a study's permutations and resamples."""
    return int(result.design["settings"]["seed"])


def pairs(conditions: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Closed conditions to be compared, A − B: each against off, then each chain of thought against its controls.

    >>> pairs(["off", "careful", "filler", "unrelated", "open"])
    (('careful', 'off'), ('filler', 'off'), ('unrelated', 'off'), ('careful', 'filler'), ('careful', 'unrelated'))
    """
    closed = [name for name in conditions if name != "off" and not leaves_open(name)]
    against = [(name, control) for name in closed for control in controls_of(name) if control in conditions]
    return (*((name, "off") for name in closed), *against)


def outcome_shares(result: StudyResult) -> pd.DataFrame:
    """Count outcomes per model, kind and condition.

    Returns:
        Columns model, kind, condition, refuse, comply, other (counts), n, share (refused), low, high (95 % Wilson
        interval, which takes requests as independent), n_families, in_think (refusals found inside the think
        block) and unfinished (replies cut at the token limit).
    """
    import pandas as pd

    families = _families(result)
    rows = []
    for (model, kind, condition), part in result.outcomes.groupby(["model", "kind", "condition"], sort=False):
        counts = {name: int((part["outcome"] == name).sum()) for name in OUTCOMES}
        interval = proportion_interval(counts["refuse"], len(part))
        rows.append(
            {
                "model": model,
                "kind": kind,
                "condition": condition,
                **counts,
                "n": len(part),
                "share": float(interval.estimate),
                "low": float(interval.low),
                "high": float(interval.high),
                "n_families": len({families.get(prompt, prompt) for prompt in part["prompt"]}),
                "in_think": int(((part["outcome"] == "refuse") & (part["where"] == "think")).sum()),
                "unfinished": int((~part["finished"].astype(bool)).sum()),
            }
        )
    return pd.DataFrame(rows)


def tuned_written(result: StudyResult) -> list[str]:
    """Names of the tuned models whose answers are there."""
    there = set(result.outcomes["model"])
    return [name for name in result.tuned if name in there]


def score_means(result: StudyResult) -> pd.DataFrame:
    """Mean refusal score per kind and condition, nats, with a 95 % bootstrap interval over families.

    Returns:
        Columns kind, condition, mean, low, high, n, n_families.
    """
    import pandas as pd

    rows = []
    for (kind, condition), part in result.scores.groupby(["kind", "condition"], sort=False):
        interval = bootstrap_interval(
            part["score"].to_numpy(), families=part["family"].tolist(), seed=seed_of(result)
        )
        rows.append(
            {
                "kind": kind,
                "condition": condition,
                "mean": float(interval.estimate),
                "low": float(interval.low),
                "high": float(interval.high),
                "n": interval.n,
                "n_families": interval.n_families,
            }
        )
    return pd.DataFrame(rows)


def contrasts(result: StudyResult, measure: Literal["refused", "score"], kind: Kind) -> pd.DataFrame:
    """Compare conditions, paired over requests.

    Args:
        result: A finished study.
        measure: "refused" (1 where the model wrote a refusal, else 0; its own CoT included) or "score" (nats;
            closed conditions only).
        kind: "harmful" or "harmless".

    Returns:
        One row per pair A, B: columns a, b, shift (mean of A − B), low, high (95 %, bootstrap over families), p (sign
        flips over families, corrected by the largest statistic over all pairs), n,
        n_families, n_pairs, alike (whether every request shifts by the same, where the interval has no width, which is
        not certainty).
    """
    import pandas as pd

    compared = pairs(result.conditions)
    if measure == "score":
        frame, value = result.scores, "score"
    else:
        frame = result.outcomes[result.outcomes["model"] == "base"]
        frame = frame.assign(refused=(frame["outcome"] == "refuse").astype(float))
        value = "refused"
        compared = (*compared, *((name, "off") for name in result.conditions if leaves_open(name)))
    wide = frame[frame["kind"] == kind].pivot(index="prompt", columns="condition", values=value)
    families = [_families(result).get(prompt, prompt) for prompt in wide.index]
    differences = np.stack([(wide[a] - wide[b]).to_numpy() for a, b in compared], axis=1)
    interval = bootstrap_interval(differences, families=families, seed=seed_of(result))
    test = sign_flip_test(differences, families=families, correction="max", seed=seed_of(result))
    return pd.DataFrame(
        [
            {
                "a": a,
                "b": b,
                "shift": float(interval.estimate[place]),
                "low": float(interval.low[place]),
                "high": float(interval.high[place]),
                "p": float(test.p[place]),
                "n": interval.n,
                "n_families": interval.n_families,
                "n_pairs": len(compared),
                "alike": bool(np.ptp(differences[:, place]) < 1e-9),
            }
            for place, (a, b) in enumerate(compared)
        ]
    )


def head_effects(heads: RefusalHeads) -> pd.DataFrame:
    """The table of heads with a column name ("L0H3"); see `rim_lens.measures.heads.table.head_table`."""
    table = heads.to_dataframe()
    table["name"] = [
        head_name(layer, head) for layer, head in zip(table["layer"], table["head"], strict=True)
    ]
    return table


def attention_mass(result: StudyResult, kind: Kind, condition: str) -> xr.DataArray:
    """Mean attention mass over requests: (layer, head, span), shares; query = the last prompt token."""
    with result.attention(kind, condition) as data:
        n = data.sizes["prompt"]
        mean = data["attention_mass"].mean("prompt").load()
    mean.attrs["n"] = n
    return mean


def attention_changes(
    result: StudyResult, span: str, a: str, b: str, kind: Kind = "harmful", top: int = 10
) -> pd.DataFrame:
    """The heads whose mass on a span differs most between two conditions, each beside what its removal does.

    Where a head looks is a hint; the ablation effect beside it is the evidence, or its lack.

    Returns:
        Columns layer, head, name, mass_a, mass_b, change (A − B), effect_select (nats; NaN where not scanned) and
        verdict (of the test on other requests, or "not tested").
    """
    first = attention_mass(result, kind, a).sel(span=span)
    second = attention_mass(result, kind, b).sel(span=span)
    frame = first.rename("mass_a").drop_vars("span").to_dataframe().reset_index()[["layer", "head", "mass_a"]]
    frame["mass_b"] = second.to_numpy().reshape(-1)
    frame["change"] = frame["mass_a"] - frame["mass_b"]
    frame["name"] = [
        head_name(layer, head) for layer, head in zip(frame["layer"], frame["head"], strict=True)
    ]
    scan = result.heads.scan[["layer", "head", "effect"]].rename(columns={"effect": "effect_select"})
    frame = frame.merge(scan, on=["layer", "head"], how="left")
    tested = {
        (row["layer"], row["head"]): row["verdict"] for row in result.heads.table.to_dict(orient="records")
    }
    frame["verdict"] = [
        tested.get(pair, "not tested") for pair in zip(frame["layer"], frame["head"], strict=True)
    ]
    order = frame["change"].abs().sort_values(ascending=False, kind="stable").index[:top]
    return frame.loc[order].reset_index(drop=True)


def head_name(layer: int, head: int) -> str:
    """The name of a head.

    >>> head_name(0, 3)
    'L0H3'
    """
    return f"L{int(layer)}H{int(head)}"


def files_of(result: AnyResult) -> list[tuple[str, int]]:
    """Every file in the study's folder with its size in bytes, without the report's own."""
    return [
        (path.relative_to(result.path).as_posix(), path.stat().st_size)
        for path in sorted(result.path.rglob("*"))
        if path.is_file() and not path.name.startswith("report.") and path.suffix != ".part"
    ]


def plan_of(result: AnyResult) -> dict[str, Any] | None:
    """The plan the study was begun with, where it was stored."""
    folder = ResultFolder(result.path)
    plan: dict[str, Any] | None = folder.read("plan.json") if folder.has("plan.json") else None
    return plan


def _families(result: StudyResult) -> dict[str, str]:
    return dict(zip(result.scores["prompt"], result.scores["family"], strict=True))
