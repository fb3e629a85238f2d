"""docs/statistics.md: how often the tests cry wolf where there is nothing, and whether they see what was planted.

``python -m tests.calibration`` simulates, writes docs/evidence/statistics.json, and the page from it. The suite holds
the same levels by tests of its own (tests/measures/test_stats.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rim_lens.measures.stats import benjamini_hochberg, sign_flip_test

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "docs" / "evidence" / "statistics.json"
PAGE = ROOT / "docs" / "statistics.md"

ALPHAS = (0.01, 0.05, 0.1, 0.2)
N_RUNS = 4000
N_MODELS = 20
FAMILIES = (4, 5, 6, 8, 10)

Null = Callable[[np.random.Generator], float]


def one_head(n: int, draw: Callable[[np.random.Generator, int], np.ndarray]) -> Null:
    """p of one head on n independent requests."""
    return lambda rng: float(sign_flip_test(draw(rng, n)).p)


def clustered(rng: np.random.Generator, by_family: bool) -> float:
    """Six families of six requests that are nearly copies of each other."""
    families = np.repeat(np.arange(6), 6)
    values = rng.normal(size=6)[families] + 0.2 * rng.normal(size=36)
    return float(sign_flip_test(values, families=families if by_family else None, n_permutations=499).p)


def any_head(rng: np.random.Generator) -> float:
    """The smallest corrected p of 20 heads that lean the same way on each request."""
    values = rng.normal(size=(10, 1)) + rng.normal(size=(10, 20))
    return float(np.min(sign_flip_test(values, correction="max").p))


SITUATIONS: dict[str, Null] = {
    "one head, 5 requests": one_head(5, lambda rng, n: rng.normal(size=n)),
    "one head, 12 requests": one_head(12, lambda rng, n: rng.normal(size=n)),
    "one head, 12 requests, long tails": one_head(12, lambda rng, n: rng.standard_t(2, size=n)),
    "one head, 6 requests, exact ties": one_head(6, lambda rng, n: rng.integers(-1, 2, size=n).astype(float)),
    "6 families of 6, by family": lambda rng: clustered(rng, by_family=True),
    "any of 20 correlated heads, 10 requests, max-corrected": any_head,
}
# What the labels are for: the same data without them.
WRONG = {"6 families of 6, taken as 36 requests": lambda rng: clustered(rng, by_family=False)}


def levels(n_runs: int = N_RUNS, seed: int = 0) -> dict[str, dict[str, float]]:
    """Situation without any effect → level → share of runs with p at most that."""
    found = {}
    for name, null in (SITUATIONS | WRONG).items():
        rng = np.random.default_rng(seed)
        p = np.array([null(rng) for _ in range(n_runs)])
        found[name] = {str(alpha): float(np.mean(p <= alpha + 1e-12)) for alpha in ALPHAS}
    return found


def false_discoveries(n_runs: int = 1000, seed: int = 0) -> dict[str, float]:
    """20 heads of which 5 have an effect: share of false ones among those found at .1, and of true ones found."""
    rng = np.random.default_rng(seed)
    false, true = [], []
    for _ in range(n_runs):
        values = rng.normal(size=(12, 20))
        values[:, :5] += 1.5
        found = benjamini_hochberg(sign_flip_test(values).p) <= 0.1
        false.append(found[5:].sum() / max(1, found.sum()))
        true.append(found[:5].mean())
    return {"false": float(np.mean(false)), "found": float(np.mean(true)), "n_runs": n_runs}


def planted_effects(seed: int) -> tuple[dict[tuple[int, int], np.ndarray], list[str]]:
    """Effect of zeroing each head of `planted` on the refusal score, and the family of each request."""
    from rim_lens.chat import ChatFormat
    from rim_lens.lens import load_model, model_facts
    from rim_lens.measures.heads.finding import scorer
    from rim_lens.prompts import load_prompts

    model = load_model(f"planted:{seed}")
    requests = load_prompts("harmful", language="toy", split="evaluate")
    score = scorer(model, ChatFormat.from_model(model).render(requests, think="off"))
    base = score([])
    effects = {head: score([head]) - base for head in model_facts(model).heads()}
    return effects, [request.family for request in requests]


def power(n_models: int = N_MODELS) -> list[dict[str, Any]]:
    """By number of families: share of models in which the test, corrected over all heads, sees what was planted."""
    from rim_lens.organisms.planted import DECOY_HEAD, READER, TOPIC_HEAD

    rows: dict[int, dict[str, list[float]]] = {
        n: {"both": [], "decoy": [], "true_size": [], "decoy_size": [], "other_size": []} for n in FAMILIES
    }
    for seed in range(n_models):
        effects, families = planted_effects(seed)
        heads, names = list(effects), sorted(set(families))
        for n, row in rows.items():
            chosen = [i for i, family in enumerate(families) if family in names[:n]]
            values = np.stack([effects[head][chosen] for head in heads], axis=1)
            test = sign_flip_test(values, families=[families[i] for i in chosen], correction="max")
            p, size = (
                dict(zip(heads, test.p, strict=True)),
                dict(zip(heads, np.abs(test.statistic), strict=True)),
            )
            row["both"].append(p[READER] <= 0.05 and p[TOPIC_HEAD] <= 0.05)
            row["decoy"].append(p[DECOY_HEAD] <= 0.05)
            row["true_size"].append(min(size[READER], size[TOPIC_HEAD]))
            row["decoy_size"].append(size[DECOY_HEAD])
            row["other_size"].append(max(size[head] for head in heads if head not in (READER, TOPIC_HEAD)))
    return [
        {
            "families": n,
            "n_models": n_models,
            "both_found": float(np.mean(row["both"])),
            "decoy_found": float(np.mean(row["decoy"])),
            "smallest_true_effect": float(np.min(row["true_size"])),
            "largest_decoy_effect": float(np.max(row["decoy_size"])),
            "largest_other_effect": float(np.max(row["other_size"])),
        }
        for n, row in rows.items()
    ]


def page(found: dict[str, Any]) -> str:
    """The page, from the file's content."""
    heads = " | ".join(f"p ≤ {alpha:g}" for alpha in ALPHAS)
    error = max((alpha * (1 - alpha) / found["n_runs"]) ** 0.5 for alpha in ALPHAS)
    lines = [
        "# Statistics: what a p-value here is worth",
        "",
        f"`{found['command']}`, {found['date']}, seed 0, {found['n_runs']} runs a line (standard error at most {error:.3f}).",
        "",
        "## Where there is no effect",
        "",
        "Share of runs in which `sign_flip_test` gives a p at most so large. It must not exceed the level but by the error of the",
        "simulation; with few requests or ties it stays below, as p cannot be finer than the sign vectors allow.",
        "",
        f"| Situation | {heads} |",
        "| --- |" + " ---: |" * len(ALPHAS),
    ]
    for name, shares in found["levels"].items():
        told = " | ".join(f"{shares[str(alpha)]:.3f}" for alpha in ALPHAS)
        lines.append(f"| {'**wrong:** ' if name in WRONG else ''}{name} | {told} |")
    discoveries = found["false_discoveries"]
    lines += [
        "",
        "The last line is why requests of one verb or frame flip together: taken as independent, near copies turn noise into",
        "findings.",
        "",
        f"`benjamini_hochberg` at .1 on 20 heads of which 5 have an effect (1.5 standard deviations, 12 requests): {discoveries['false']:.1%}"
        f" of the heads found are false, and {discoveries['found']:.0%} of the true ones are found ({discoveries['n_runs']} runs).",
        "",
        "## Where something was planted",
        "",
        f"`planted`, {found['power'][0]['n_models']} noise seeds: each of the 16 heads zeroed in turn, effects on the refusal score",
        "tested over request families (5 requests each), max-corrected over the heads. Both true heads found at .05, and the decoy that",
        "attends as the reader does:",
        "",
        "| Families | both true heads found | decoy found | smallest true effect | largest effect of the decoy | of any other head |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found["power"]:
        lines.append(
            f"| {row['families']} | {row['both_found']:.0%} | {row['decoy_found']:.0%} | {row['smallest_true_effect']:.1f} nats"
            f" | {row['largest_decoy_effect']:.2f} nats | {row['largest_other_effect']:.2f} nats |"
        )
    lines += [
        "",
        "Five families or fewer cannot reach .05 in a two-sided test, whatever the effect (2 / 2⁵ = .06). Heads other than the planted ones",
        "carry noise weights, whose tiny effects are real, and with enough families the test says so: a small p says that an effect is",
        "not zero. Its size, and its place among the controls of its layer, say whether it matters.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Simulate, and write evidence and page."""
    from rim_lens.provenance import provenance

    found = provenance("make evidence-statistics", ("numpy", "torch", "transformers"))
    found |= {
        "n_runs": N_RUNS,
        "levels": levels(),
        "false_discoveries": false_discoveries(),
        "power": power(),
    }
    EVIDENCE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
