"""What heads do beside what their removal does: how they look in two conditions, how steadily, what they write, and who works with whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_lens.capturing import open_capture
from rim_lens.chat.conditions import is_control, leaves_open
from rim_lens.chat.sentences import split_sentences
from rim_lens.errors import RimLensError
from rim_lens.lens import Head, model_facts
from rim_lens.measures.frames import frame_to_json
from rim_lens.measures.heads.direct import direct_effects
from rim_lens.measures.heads.looking import argmax_shift, empty_block_span, mass_shift
from rim_lens.measures.heads.pairs import pair_interactions
from rim_lens.measures.heads.prefilter import gradient_scores
from rim_lens.measures.heads.receiving import receiver_kurtosis
from rim_lens.measures.heads.reliability import split_half
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.heads.summary import head_statistics
from rim_lens.measures.readings import refusal_reading
from rim_lens.prompts.toy import split_steps
from rim_lens.study.stages import Bench, attention_name

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

FILE = "statistics/heads.json"
MOST_PAIRED = 6  # heads whose pairs are removed together
COLUMNS = (
    *("argmax_shift", "argmax_shift_twins", "mass_shift", "mass_shift_twins", "sink", "entropy_share"),
    *("direct", "direct_twins", "estimate", "kurtosis"),
)


def run_statistics(bench: Bench, found: RefusalHeads) -> None:
    """Measure, beside the table of heads, what each writes, how steadily it looks, and which stand in for each other."""
    bench.folder.once(FILE, lambda: _measured(bench, found))


def paired_heads(found: RefusalHeads) -> list[Head]:
    """Heads whose pairs are looked at: the found set, then those with the largest tested effects."""
    table = found.table[found.table["tested"]]
    order = table["effect"].abs().sort_values(ascending=False, kind="stable").index
    largest = [(int(layer), int(head)) for layer, head in table.loc[order, ["layer", "head"]].values.tolist()]
    return list(dict.fromkeys([*found.found, *largest]))[:MOST_PAIRED]


def _measured(bench: Bench, found: RefusalHeads) -> dict[str, Any]:
    """The table over all heads, reliabilities and pairs; what cannot be had stands under its name in `reasons`."""
    facts = model_facts(bench.model)
    heads: dict[str, Any] = {name: np.full((facts.n_layers, facts.n_heads), np.nan) for name in COLUMNS}
    reasons: dict[str, str] = {}
    reliability: dict[str, Any] = {}
    asked = "off" if "off" in bench.settings.conditions else bench.closed[0]

    def attempt(name: str, measure: Callable[[], None]) -> None:
        try:
            measure()
        except RimLensError as problem:  # one kind of number that this model or these prompts do not allow
            reasons[name] = str(problem)

    def looking() -> None:
        if "open" not in bench.settings.conditions:
            reasons["looking"] = "it compares open with off, and open is not among the conditions"
            return
        enters = empty_block_span(bench.render(bench.evaluate.harmful, "off"))
        for kind, end in (("harmful", ""), ("harmless", "_twins")):
            first, second = (_attention(bench, kind, condition) for condition in ("open", "off"))
            stats = head_statistics(first, second, enters=enters).isel(kind=0)
            heads["argmax_shift" + end] = stats["argmax_shift"].values
            heads["mass_shift" + end] = stats["mass_shift"].values
            if kind == "harmful":
                heads["sink"] = stats["sink_mass"].sel(condition="second").values
                heads["entropy_share"] = stats["entropy_share"].sel(condition="second").values
                for name, values in (
                    ("argmax shift", argmax_shift(first, second, enters=enters)),
                    ("mass shift", mass_shift(first, second, "assistant")),
                ):
                    attempt(name, partial(_keep, reliability, name, values, bench))

    def writing() -> None:
        for kind, end in (("harmful", ""), ("harmless", "_twins")):
            batch = bench.render(bench.kinds[kind], asked)
            effects = direct_effects(bench.model, batch, max_rows=bench.settings.max_rows)
            heads["direct" + end] = effects["direct_effect"].mean("prompt").values

    def estimating() -> None:
        batch = bench.render(bench.select.harmful, asked)
        rows = min(16, bench.settings.max_rows)
        heads["estimate"] = gradient_scores(bench.model, batch, max_rows=rows).mean("prompt").values

    def receiving() -> None:
        thoughts = [n for n in bench.closed if n != "off" and not is_control(n) and not leaves_open(n)]
        if not thoughts:
            reasons["receiving"] = "no condition gives a chain of thought"
            return
        split = split_steps if bench.chat.name == "toy" else split_sentences
        batch = bench.render(bench.evaluate.harmful, thoughts[0])
        shown = receiver_kurtosis(
            bench.model, batch, chat=bench.chat, split=split, max_rows=bench.settings.max_rows
        )
        heads["kurtosis"] = shown["kurtosis"].mean("prompt", skipna=True).values

    pairs: list[pd.DataFrame] = []

    def pairing() -> None:
        batch = bench.render(bench.evaluate.harmful, asked)
        reading = refusal_reading(bench.model, batch, max_rows=bench.settings.max_rows)
        remember = bench.folder.lines("statistics/pairs.jsonl").get
        pairs.append(
            pair_interactions(reading, paired_heads(found), remember=remember, seed=bench.settings.seed)
        )

    for name, measure in (
        ("looking", looking),
        ("writing", writing),
        ("estimating", estimating),
        ("receiving", receiving),
        ("pairs", pairing),
    ):
        attempt(name, measure)
    effects = found.effects["harmful"].rename({"harmful_prompt": "prompt", "harmful_head": "head"})
    attempt(
        "ablation effects",
        partial(_keep, reliability, "ablation effects", effects, bench),
    )
    return {
        "heads": frame_to_json(_table(heads, found)),
        "pairs": frame_to_json(pairs[0]) if pairs else None,
        "reliability": reliability,
        "estimates": _agreement(heads["estimate"], found),
        "reasons": reasons,
    }


def _attention(bench: Bench, kind: str, condition: str) -> xr.Dataset:
    with open_capture(bench.folder.path / "attention" / attention_name(kind, condition)) as data:
        return data.load()


def _keep(kept: dict[str, Any], name: str, values: xr.DataArray, bench: Bench) -> None:
    kept[name] = asdict(split_half(values, bench.evaluate.families, seed=bench.settings.seed))


def _table(heads: dict[str, Any], found: RefusalHeads) -> pd.DataFrame:
    import pandas as pd

    n_layers, n_heads = heads["direct"].shape
    table = pd.DataFrame(
        {
            "layer": np.repeat(np.arange(n_layers), n_heads),
            "head": np.tile(np.arange(n_heads), n_layers),
            **{name: np.asarray(values, dtype=np.float64).reshape(-1) for name, values in heads.items()},
        }
    )
    scan = found.scan[["layer", "head", "effect"]].rename(columns={"effect": "effect_select"})
    said = found.table[["layer", "head", "effect", "verdict"]]
    return table.merge(scan, on=["layer", "head"], how="left").merge(said, on=["layer", "head"], how="left")


def _agreement(estimates: Any, found: RefusalHeads) -> dict[str, Any]:
    """How the gradient's estimates rank the heads, beside their exact effects on the same requests."""
    import pandas as pd

    scan = found.scan
    guesses = pd.Series([estimates[int(one.layer), int(one.head)] for one in scan.itertuples()])
    exact = scan["effect"].reset_index(drop=True)
    known = guesses.notna() & exact.notna()
    if int(known.sum()) < 3:
        return {"n_heads": int(known.sum()), "rank_correlation": None, "top": None}
    top = min(10, int(known.sum()))
    first, second = (set(one[known].abs().nlargest(top).index) for one in (guesses, exact))
    return {
        "n_heads": int(known.sum()),
        "rank_correlation": float(guesses[known].rank().corr(exact[known].rank())),
        "top": top,
        "top_shared": len(first & second),
    }
