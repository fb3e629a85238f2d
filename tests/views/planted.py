"""Study folders written by hand, so that what a report must say is known before it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from rim_lens.folder import ResultFolder
from rim_lens.measures.controls import control_p, percentile_among, random_heads_per_layer
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.heads.table import head_table
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.measures.refusal.rates import refusal_rate
from rim_lens.measures.stats import bootstrap_interval
from rim_lens.study import StudyResult, load_study

CONDITIONS = ("off", "careful", "filler", "unrelated", "open")
CLOSED = CONDITIONS[:-1]
SPANS = ("sink", "request", "assistant", "think_open", "cot", "think_close", "think")
OFF_SPANS = tuple(span for span in SPANS if span != "cot")

# Refused harmful requests of 24, by condition: a CoT lowers refusal, filler does not, an unrelated CoT does in part.
CONTENT = {"off": 24, "careful": 0, "filler": 23, "unrelated": 14, "open": 9}


@dataclass(frozen=True)
class Planted:
    """What is planted. Counts are of refused harmful requests; the rest complies."""

    refused: Mapping[str, int] = field(default_factory=lambda: dict(CONTENT))
    n: int = 24
    n_families: int = 12
    shape: tuple[int, int] = (4, 8)
    found: Sequence[tuple[int, int]] = ((1, 2), (2, 5))
    effect: float = -6.0
    effect_on_twins: float = 0.0
    tuned: Sequence[str] = ("confirm",)
    gate: bool = True
    gate_refused: int | None = None
    model: str = "planted by hand"
    first_token: str = " I"  # noqa: S105 - a token of text
    first_words: Sequence[str] = ("I cannot help with that.",)  # of refusals, in turn
    seed: int = 0


def write(folder: Path, planted: Planted) -> StudyResult:
    """Write a whole study folder, as the stages leave it."""
    rng = np.random.default_rng(planted.seed)
    stored = ResultFolder(folder)
    stored.write("study.json", {"format_version": 1, "design": _design(planted)})
    stored.write(
        "asked.json",
        {"parts": ["heads", "neurons"], "tuned": {name: f"toy:{name}" for name in planted.tuned}},
    )
    at_gate = planted.n if planted.gate_refused is None else planted.gate_refused
    gate = _gate(planted, at_gate)
    stored.write("gate.json", gate)
    stored.write(
        "plan.json",
        {
            "seconds": 12.5,
            "steps": [{"stage": "gate", "what": "refuses?", "rows": 48, "passes": 2, "tokens": 960}],
        },
    )
    if not gate["passed"] and planted.gate:
        stored.write("timings.json", {"gate": 0.4})
        return load_study(folder)
    stored.write(
        "timings.json", {"gate": 0.4, "attention": 3.2, "scores": 1.1, "outcomes": 2.0, "heads": 9.0}
    )
    _attention(folder, planted, rng)
    _outcomes(stored, planted)
    _scores(stored, planted, rng)
    _heads(stored, planted, rng)
    stored.write("heads/rows.json", {"kind": "harmful", "query": "prompt_last", "rows": []})
    _neurons(folder, planted)
    return load_study(folder)


def _design(planted: Planted) -> dict[str, Any]:
    return {
        "model": planted.model,
        "facts": {
            "family": "TransformerBridge",
            "architecture": "none",
            "n_layers": planted.shape[0],
            "n_heads": planted.shape[1],
            "d_mlp": 64,
            "dtype": "torch.float32",
            "device": "cpu",
        },
        "weights_digest": "0123456789abcdef",
        "chat_format": "toy",
        "n_requests": planted.n,
        "requests": {"harmful": "rim_lens", "harmless": "rim_lens", "reasoning": "rim_lens"},
        "n_select": planted.n,
        "n_evaluate": planted.n,
        "n_reasoning": planted.n,
        "n_families_evaluate": planted.n_families,
        "prompts_digest": "fedcba9876543210",
        "settings": {
            "max_heads": 6,
            "n_random_sets": 100,
            "max_new_tokens": 64,
            "min_refusal": 0.5,
            "max_twin_ratio": 0.5,
            "gate": planted.gate,
            "seed": planted.seed,
        },
        "versions": {"rim_lens": "0.1.0", "transformer-lens": "4.3.0", "torch": "2.13.0", "python": "3.11.7"},
    }


def _gate(planted: Planted, refused: int) -> dict[str, Any]:
    harmful = refusal_rate(["refuse"] * refused + ["comply"] * (planted.n - refused))
    twins = refusal_rate(["comply"] * planted.n)
    passed = harmful.value >= 0.5
    return {
        "passed": passed,
        "reason": "" if passed else f"with thinking off the model refuses {harmful} of harmful requests.",
        "harmful": vars(harmful),
        "harmless": vars(twins),
        "outcomes": {},
    }


def ids(planted: Planted, kind: str) -> list[str]:
    """Prompt ids of one kind."""
    return [f"{kind}-{place}" for place in range(planted.n)]


def families(planted: Planted) -> list[str]:
    """Families, spread over the prompts so that refused ones are of as many families as can be."""
    return [f"family {place % planted.n_families}" for place in range(planted.n)]


def _attention(folder: Path, planted: Planted, rng: np.random.Generator) -> None:
    for kind in ("harmful", "harmless"):
        for condition in CONDITIONS:
            spans = OFF_SPANS if condition == "off" else SPANS
            atoms = len(spans) - 1
            mass = rng.dirichlet(np.ones(atoms), size=(planted.n, *planted.shape)).astype(np.float32)
            think = [spans.index(name) for name in spans if name.startswith("think_") or name == "cot"]
            mass = np.concatenate([mass, mass[..., think].sum(-1, keepdims=True)], axis=-1)
            path = folder / "attention" / f"{kind}_{condition}"
            path.mkdir(parents=True)
            xr.Dataset(
                {
                    "attention_mass": (("prompt", "layer", "head", "span"), mass),
                    "stored": ("prompt", np.ones(planted.n, dtype=np.int8)),
                },
                coords={
                    "prompt": ids(planted, kind),
                    "layer": range(planted.shape[0]),
                    "head": range(planted.shape[1]),
                    "span": list(spans),
                },
                attrs={"fingerprint": "planted"},
            ).to_netcdf(path / "capture.nc", engine="h5netcdf")


def _outcomes(stored: ResultFolder, planted: Planted) -> None:
    def records(kind: str, condition: str, refused: int, rest: str = "comply") -> list[dict[str, Any]]:
        return [
            {
                "prompt": prompt,
                "kind": kind,
                "condition": condition,
                "outcome": "refuse" if place < refused else rest,
                "where": "answer",
                "first_words": planted.first_words[place % len(planted.first_words)]
                if place < refused
                else "Sure, here is an overview.",
                "n_generated": 12,
                "finished": True,
            }
            for place, prompt in enumerate(ids(planted, kind))
        ]

    for condition in CONDITIONS:
        stored.write(
            f"outcomes/harmful_{condition}.json", records("harmful", condition, planted.refused[condition])
        )
        stored.write(f"outcomes/harmless_{condition}.json", records("harmless", condition, 0))
    if planted.found:
        for kind in ("harmful", "harmless"):
            stored.write(f"outcomes/{kind}_off_without_heads.json", records(kind, "off", 0, "other"))
    for place, name in enumerate(planted.tuned):
        stored.write(f"outcomes/harmful_off_{name}.json", records("harmful", "off", 5 * (place + 1)))
        stored.write(f"outcomes/harmless_off_{name}.json", records("harmless", "off", place))


def _scores(stored: ResultFolder, planted: Planted, rng: np.random.Generator) -> None:
    for kind in ("harmful", "harmless"):
        for condition in CLOSED:
            refused = planted.refused[condition] if kind == "harmful" else 0
            stored.write(
                f"scores/{kind}_{condition}.json",
                [
                    {
                        "prompt": prompt,
                        "family": family,
                        "kind": kind,
                        "condition": condition,
                        "score": (5.0 if place < refused else -5.0) + float(rng.normal(0, 0.5)),
                        "first_token": planted.first_token,
                        "skipped": 0,
                    }
                    for place, (prompt, family) in enumerate(
                        zip(ids(planted, kind), families(planted), strict=True)
                    )
                ],
            )


def _heads(stored: ResultFolder, planted: Planted, rng: np.random.Generator) -> None:
    found, (n_layers, n_heads) = [tuple(head) for head in planted.found], planted.shape
    base = {"harmful": rng.normal(5, 0.5, planted.n), "harmless": rng.normal(-5, 0.5, planted.n)}
    mean = {"harmful": planted.effect, "harmless": planted.effect_on_twins}

    def scores(kind: str, heads: Sequence[tuple[int, int]]) -> np.ndarray:
        hits = sum(head in found for head in heads) / max(len(found), 1)
        noise = rng.normal(0, 0.2, planted.n) if heads else 0.0
        return base[kind] + mean[kind] * hits + noise

    def line(name: str, heads: Sequence[tuple[int, int]], values: np.ndarray) -> None:
        stored.lines(name).get(json.dumps([list(head) for head in heads]), values.tolist)

    every = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    tested = found or every[:3]
    looked_at = [head for head in every if head[0] in {layer for layer, _ in tested}]
    effects = {
        kind: {head: scores(kind, [head]) - base[kind] for head in looked_at}
        for kind in ("harmful", "harmless")
    }
    scan = [
        {
            "layer": head[0],
            "head": head[1],
            "effect": float((scores("harmful", [head]) - base["harmful"]).mean()),
        }
        for head in every
    ]
    table = head_table(
        effects["harmful"],
        effects["harmless"],
        tested,
        families(planted),
        found=found,
    )
    RefusalHeads(
        table=table,
        found=tuple(found),
        set=_set_effect(planted, base, scores) if found else {},
        scan=pd.DataFrame(scan),
        effects=xr.Dataset(),
        attention=xr.Dataset(),
        gate={"asked": False},
        settings={},
    ).save(stored.path / "heads")


def _set_effect(planted: Planted, base: Mapping[str, np.ndarray], scores: Any) -> dict[str, Any]:
    found = [tuple(head) for head in planted.found]
    harmful = scores("harmful", found) - base["harmful"]
    twins = scores("harmless", found) - base["harmless"]
    controls = random_heads_per_layer(found, planted.shape[1], 100, 0)
    effects = [float((scores("harmful", control) - base["harmful"]).mean()) for control in controls]
    numbers = [bootstrap_interval(values, families(planted)) for values in (harmful, harmful - twins)]
    whole, gap = (
        {"estimate": float(one.estimate), "low": float(one.low), "high": float(one.high), "n": one.n}
        for one in numbers
    )
    return {
        "effect": whole,
        "effect_twins": float(twins.mean()),
        "specificity": gap,
        "refusing_before": float((base["harmful"] > 0).mean()),
        "refusing_after": float((base["harmful"] + harmful > 0).mean()),
        "controls": [
            {"heads": [list(head) for head in control], "effect": effect}
            for control, effect in zip(controls, effects, strict=True)
        ],
        "percentile": percentile_among(whole["estimate"], effects).percentile,
        "control_p": control_p(whole["estimate"], effects),
        "n_controls": len(controls),
    }


def _neurons(folder: Path, planted: Planted) -> None:
    """A study of neurons whose pairs agreed on none; one with neurons is measured, see `toy_study`."""
    stored = ResultFolder(folder / "neurons")
    settings = {"m": 2, "scope": "layer", "min_fraction": 0.5, "pairs": "twins", "gate": True}
    design = _design(planted) | {"settings": settings}
    stored.write("neuron_study.json", {"format_version": 1, "design": design})
    stored.write("gate.json", {"passed": True, "reason": ""})
    stored.write(
        "asked.json",
        {"parts": ["entanglement", "restoring"], "tuned": {name: f"toy:{name}" for name in planted.tuned}},
    )
    swept = {"m": 2, "min_fraction": 0.5, "size": 0, "by_chance": 0.1, "n_layers": 0, "largest_layer": 0}
    made_by = {"n_pairs": planted.n, "n_families": planted.n_families, "sweep": [swept]}
    NeuronSet([], planted.shape[0], 64, made_by=made_by).save(folder / "neurons" / "neurons")
