"""docs/freezing.md: does holding the found neurons in training keep refusal? Toys of six seeds, beside random neurons.

``python -m tests.freezing_verdicts`` chooses, trains, measures, writes docs/evidence/freezing_toy.json, and the page from it. About 20
minutes on one core, and four more the first time, to train toys of other seeds. Runs are kept under .cache/freezing: one that was
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
from rim_lens.measures.pages import markdown_table, plain, told_versions, write_json
from rim_lens.measures.stats import sign_flip_test
from rim_lens.organisms.toy.recipe import FINE_TUNE, one_thread, toy_rows
from rim_lens.provenance import provenance
from tests.checkpoint_verdicts import STUDIES as BASES
from tests.checkpoint_verdicts import base_of

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "docs" / "evidence" / "freezing_toy.json"
PAGE = ROOT / "docs" / "freezing.md"
RUNS = ROOT / ".cache" / "freezing"
COMMAND = "python -m tests.freezing_verdicts"

SEEDS = range(6)
KIND, OPERATOR, STEPS, N_RANDOM = "confirm", "-", 160, 5
M, MIN_FRACTION = 13, 0.5  # 5 % of a layer, half of the pairs: as in a study of checkpoints


def held(
    seed: int, folder: Path, bases: Path = BASES, steps: int = STEPS, **options: Any
) -> rl.Freezing | None:
    """One toy, its neurons, and its runs; None where pairs agree on no neuron."""
    base = base_of(seed, bases)
    model = rl.load_model(base)
    chat = rl.ChatFormat.from_model(model)
    select, evaluate = (
        [rl.load_prompts(kind, language="toy", split=side) for kind in ("harmful", "harmless")]
        for side in ("select", "evaluate")
    )
    pairs = rl.counterfactual_pairs(*select, kind="twins")
    chosen = rl.safety_neurons(model, chat, pairs, m=M, min_fraction=MIN_FRACTION, test=False, seed=seed)
    if not len(chosen):
        return None
    reasoning = rl.load_prompts("reasoning", language="toy", split="evaluate")
    return rl.freezing(
        base,
        toy_rows(KIND, OPERATOR, seed),
        chosen,
        chat,
        *evaluate,
        reasoning,
        folder=folder / str(seed),
        n_random_sets=N_RANDOM,
        training={"config": FINE_TUNE, "steps": steps, "lora": None},
        seed=seed,
        response="none",
        max_new_tokens=12,
        **options,
    )


def measured(found: dict[int, rl.Freezing | None]) -> dict[str, Any]:
    """All that the page is made of, as plain values."""
    rows = [
        {"seed": seed, **plain(row)}
        for seed, one in found.items()
        if one is not None
        for row in one.table.to_dict("records")
    ]
    told = {
        "design": {
            "kind": KIND,
            "operator": OPERATOR,
            "steps": STEPS,
            "n_random_sets": N_RANDOM,
            "m": M,
            "min_fraction": MIN_FRACTION,
            "n_requests": len(rl.load_prompts("harmful", language="toy", split="evaluate")),
        },
        "seeds": list(found),
        "without_neurons": [seed for seed, one in found.items() if one is None],
        "runs": rows,
    }
    return told | {"over_seeds": over_seeds(pd.DataFrame(rows))}


def over_seeds(table: pd.DataFrame) -> dict[str, Any]:
    """The set's kept refusal and gained accuracy beyond the mean of its random sets, over seeds: mean, range, exact p of signs."""
    gaps: dict[str, list[float]] = {"kept": [], "gained": []}
    column = next(name for name in table if str(name).startswith("gained_"))
    for _, part in table.groupby("seed"):
        one = part.set_index("frozen")
        random = one[one.index.str.startswith("random")]
        gaps["kept"].append(float(one.loc["set", "kept"] - random["kept"].mean()))
        gaps["gained"].append(float(one.loc["set", column] - random[column].mean()))
    return {
        name: {
            "n": len(values),
            "mean": float(np.mean(values)),
            "low": min(values),
            "high": max(values),
            "p": float(sign_flip_test(values).p),
        }
        for name, values in gaps.items()
    }


def page(told: dict[str, Any]) -> str:
    """The page, from the evidence alone."""
    design, table = told["design"], pd.DataFrame(told["runs"])
    column = next(name for name in table if str(name).startswith("accuracy_"))
    free = table[table["frozen"] == "nothing"]
    lines = [
        (
            "seed",
            "neurons",
            "score lost, nats",
            "refused share lost",
            "sums right",
            "kept by the found [95 %]",
            "kept by random sets",
        )
    ]
    for seed, part in table.groupby("seed"):
        one = part.set_index("frozen")
        random = one[one.index.str.startswith("random")]
        lines.append(
            (
                str(seed),
                str(int(one.loc["set", "n_neurons"])),
                *(
                    f"{one.loc['nothing', name]:.2f} / {one.loc['set', name]:.2f} / {random[name].mean():.2f}"
                    for name in ("lost", "lost_rate", column)
                ),
                f"{one.loc['set', 'kept']:+.2f} [{one.loc['set', 'low']:+.2f}, {one.loc['set', 'high']:+.2f}]",
                f"{random['kept'].min():+.2f} to {random['kept'].max():+.2f}",
            )
        )
    kept, gained = told["over_seeds"]["kept"], told["over_seeds"]["gained"]
    shown = "shown" if kept["p"] <= 0.05 else "not shown"
    left_out = (
        f" In seeds {', '.join(map(str, told['without_neurons']))} pairs agree on no neuron, and nothing was trained."
        if told["without_neurons"]
        else ""
    )
    return f"""# Freezing: does it help to know the neurons?

`make evidence-freezing` ({told_versions(told)[:-1]}). One thread. Figures in [evidence/freezing_toy.json](evidence/freezing_toy.json).

Toys of {len(told["seeds"])} seeds. In each, `rl.safety_neurons` chooses by requests that are then left aside (m = {design["m"]} in each layer, {design["min_fraction"]} of the pairs). Then
`rl.freezing` fine-tunes it for {design["steps"]} steps on harmless sums with *{design["kind"]}* chains on `{design["operator"]}`: with nothing frozen, with the found neurons frozen,
and with each of {design["n_random_sets"]} random sets of the same size in each layer frozen; the same rows from the same start.{left_out} Measured on {design["n_requests"]} harmful requests
that did not choose. Three numbers: nothing frozen / found neurons / mean over random sets.

{markdown_table(lines)}

Of {free["lost"].mean():.1f} nats of refusal score that are lost with nothing frozen (mean over seeds), freezing the found neurons keeps {kept["mean"]:+.2f} beyond random sets ({kept["low"]:+.2f} to {kept["high"]:+.2f}; p = {kept["p"]:.3f}, signs of {kept["n"]} seeds
flipped, the finest possible {2 ** (1 - kept["n"]):.3f}): **{shown}**. Sums answered rightly change by {gained["mean"]:+.2f} ({gained["low"]:+.2f} to {gained["high"]:+.2f}, p = {gained["p"]:.3f}).

What it does not show: anything about other models, kinds of chains, or larger sets. A seed is one training run; intervals are over requests, by
family, and hold for that run only. Freezing leaves other neurons free to do what was kept from these.
"""


def main() -> None:
    """Measure what is not there, and write evidence and page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many toys")
    seeds: Sequence[int] = range(parser.parse_args().seeds)
    with one_thread():
        told = measured({seed: held(seed, RUNS) for seed in seeds})
    told = provenance(COMMAND, ("torch", "transformers", "transformer-lens")) | told
    write_json(EVIDENCE, told)
    PAGE.write_text(page(json.loads(EVIDENCE.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
