"""The probes of a study: what separates in each condition, what ablating it does, and what removing heads does to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rim_lens.chat.conditions import leaves_open
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.probes.after_ablation import probe_after_ablation
from rim_lens.measures.probes.cliff import refusal_cliff
from rim_lens.measures.probes.fitting import Probe
from rim_lens.measures.probes.groups import CONTRASTS
from rim_lens.measures.probes.probing import probe
from rim_lens.measures.probes.result import ProbeResult
from rim_lens.study.stages import Bench, both_sides, comparable, written

MOST_SETS = 20  # random sets of heads beside the found one, when probes are read without them


class _Kept(Protocol):
    def save(self, folder: str | Path) -> None: ...


def run_probes(bench: Bench, found: RefusalHeads) -> None:
    """Probe the residual stream in each condition, along chains of thought, and with the found heads removed."""
    for contrast in CONTRASTS:
        for condition in probed_conditions(bench, contrast):
            _kept_once(
                bench.folder.path / "probes" / contrast / written(condition),
                partial(_probed, bench, contrast, condition),
            )
    removable = comparable(found)
    if removable:
        _kept_once(
            bench.folder.path / "probes" / "without_heads",
            lambda: probe_after_ablation(
                bench.model,
                bench.chat,
                *both_sides(bench),
                removable,
                n_sets=n_sets(bench),
                limit=None,
                seed=bench.settings.seed,
                max_rows=bench.settings.max_rows,
                progress=bench.settings.progress,
            ),
        )
    bench.folder.once("probes/cliff.json", lambda: _along_thoughts(bench))


def _along_thoughts(bench: Bench) -> dict[str, Any]:
    off = ProbeResult.load(bench.folder.path / "probes" / "harmful" / "off")
    best = best_probe(off)
    if best is None:
        return {"reason": off.reason or "no direction was ablated", "curves": []}
    settings = bench.settings
    curves = []
    for kind, requests in bench.kinds.items():
        for condition in with_thoughts(bench):
            batch = bench.render(requests, condition)
            curve = refusal_cliff(bench.model, batch, best, seed=settings.seed, max_rows=settings.max_rows)
            curves.append({"kind": kind, "condition": condition, **curve.to_dict()})
    return {"curves": curves}


def probed_conditions(bench: Bench, contrast: str) -> list[str]:
    """Conditions in which probes of a contrast are trained: all; of refusal against fulfilment those that are no control."""
    return list(bench.settings.conditions) if contrast == "harmful" else ["off", *bench.thoughts]


def with_thoughts(bench: Bench) -> list[str]:
    """Conditions whose prompts hold a closed chain of thought."""
    return [name for name in bench.settings.conditions if name != "off" and not leaves_open(name)]


def n_sets(bench: Bench) -> int:
    """Random sets of heads that probes are read without."""
    return min(MOST_SETS, bench.settings.n_random_sets)


def best_probe(off: ProbeResult) -> Probe | None:
    """The probe that separates best on the select side, among those whose direction was ablated; None where there is none."""
    tested = off.table[off.table["effect"].notna()]
    if tested.empty:
        return None
    best = tested.sort_values("auc_cv", ascending=False, kind="stable").iloc[0]
    return off.probe(str(best["condition"]), int(best["layer"]), str(best["place"]))


def _probed(bench: Bench, contrast: Any, condition: str) -> ProbeResult:
    settings = bench.settings
    return probe(
        bench.model,
        bench.chat,
        *both_sides(bench),
        contrast=contrast,
        think=(condition,),
        ablate=settings.n_probed,
        n_controls=settings.n_probe_controls,
        limit=None,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        max_rows=settings.max_rows,
        progress=settings.progress,
    )


def _kept_once(folder: Path, measure: Callable[[], _Kept]) -> None:
    """Save a result of several files, whole or not at all, if it is not there yet."""
    if folder.exists():
        return
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    measure().save(unfinished)
    os.replace(unfinished, folder)
