"""docs/evidence/edits_smollm2-refusal: what removing and editing the found heads of smollm2-refusal does, and probes there.

``python -m tests.edited`` after ``rim-lens heads smollm2-refusal`` has written docs/evidence/heads_smollm2-refusal.json, whose
found set it takes; about an hour of one core. Every reading is kept under runs/edits-smollm2-refusal, and the page
holds what is there: run it again after an interruption, or name what to measure.

    python -m tests.edited removing careful filler probes
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rim_lens as rl
from rim_lens.folder import ResultFolder
from rim_lens.lens import Head
from rim_lens.measures.frames import frame_from_json, frame_to_json
from rim_lens.measures.heads.removal import RemovalEffects
from rim_lens.measures.pages import told_versions
from rim_lens.measures.probes.after_ablation import ProbesAfterAblation
from rim_lens.measures.probes.result import ProbeResult, joined
from rim_lens.organisms.toy.recipe import one_thread
from rim_lens.prompts import Prompt, spread
from rim_lens.provenance import provenance
from rim_lens.study.requests import Requests, requests_by_split
from rim_lens.views import tables
from rim_lens.views.page import table_markdown

ROOT = Path(__file__).resolve().parents[1]
NAME = "smollm2-refusal"
HEADS = ROOT / "docs" / "evidence" / f"heads_{NAME}.json"
KEPT = ROOT / "runs" / f"edits-{NAME}"
OUT = ROOT / "docs" / "evidence"

N = 16  # requests of each side, as in the table of heads
FEW = 8  # of these, under edited chains of thought; and reasoning questions
N_SETS = 8
CONDITIONS = ("careful", "filler")
PARTS = ("removing", *CONDITIONS, "probes")


def measure(parts: Sequence[str]) -> None:
    """Measure what is not kept yet."""
    model = rl.load_model(NAME)
    chat = rl.ChatFormat.from_model(model)
    found: list[Head] = [(int(a), int(b)) for a, b in json.loads(HEADS.read_text())["found"]]
    sides = requests_by_split("en", None, None, None, N)
    evaluate = sides["evaluate"]
    measures: dict[str, Callable[[], None]] = {
        "removing": lambda: _removing(model, chat, found, evaluate),
        "careful": lambda: _restoring(model, chat, found, evaluate, "careful"),
        "filler": lambda: _restoring(model, chat, found, evaluate, "filler"),
        "probes": lambda: _probes(model, chat, found, sides["select"], evaluate),
    }
    for part in parts:
        measures[part]()


def _removing(model: Any, chat: Any, found: list[Head], asked: Requests) -> None:
    if (KEPT / "removal" / "removal.json").exists():
        return
    rl.removal_effects(
        model, chat, found, asked.harmful, asked.twins, spread(asked.reasoning, FEW), conditions=("off", "careful"),
        n_random_sets=20, n_written=2, max_new_tokens=48, folder=KEPT,
    ).save(KEPT / "removal")  # fmt: skip


def _restoring(model: Any, chat: Any, found: list[Head], asked: Requests, condition: str) -> None:
    twins = dict(zip((prompt.id for prompt in asked.harmful), asked.twins, strict=True))
    harmful = spread(asked.harmful, FEW)

    def restored() -> dict[str, Any]:
        return frame_to_json(
            rl.restoring(
                model, chat, found, harmful, [twins[prompt.id] for prompt in harmful], condition,
                n_random_sets=N_SETS, n_written=0, max_new_tokens=16, folder=KEPT / "restoring" / condition,
            )
        )  # fmt: skip

    ResultFolder(KEPT).once(f"restored_{condition}.json", restored)


def _probes(model: Any, chat: Any, found: list[Head], select: Requests, evaluate: Requests) -> None:
    both: list[list[Prompt]] = [
        [*select.harmful, *evaluate.harmful],
        [*select.twins, *evaluate.twins],
    ]
    for condition in ("off", "careful"):
        if not (KEPT / "probes" / condition).exists():
            rl.probe(model, chat, *both, think=(condition,), ablate=1, n_controls=N_SETS, limit=None).save(
                KEPT / "probes" / condition
            )
    if not (KEPT / "without_heads").exists():
        rl.probe_after_ablation(model, chat, *both, found, n_sets=N_SETS, limit=None).save(
            KEPT / "without_heads"
        )


def page() -> tuple[dict[str, Any], list[tables.Table]]:
    """Everything that is kept, as numbers and as tables."""
    numbers: dict[str, Any] = {}
    shown: list[tables.Table] = []
    if (KEPT / "removal" / "removal.json").exists():
        removal = RemovalEffects.load(KEPT / "removal")
        numbers["removal"] = {key: value for key, value in removal.to_dict().items() if key != "rows"}
        shown.append(tables.removal_table(removal))
    restored = [
        json.loads(path.read_text())
        for path in (KEPT / f"restored_{condition}.json" for condition in CONDITIONS)
        if path.exists()
    ]
    if restored:
        import pandas as pd

        numbers["restoring"] = restored
        frames = [frame_from_json(told) for told in restored]
        shown.append(tables.restored_table(pd.concat(frames, ignore_index=True)))
    probed = [KEPT / "probes" / name for name in ("off", "careful")]
    probes = [ProbeResult.load(path) for path in probed if path.exists()]
    if probes:
        numbers["probes"] = [frame_to_json(result.table) for result in probes]
        shown.append(tables.probe_table(joined(probes)))
    if (KEPT / "without_heads").exists():
        without = ProbesAfterAblation.load(KEPT / "without_heads")
        numbers["probes_without_heads"] = frame_to_json(without.table)
        shown.append(tables.without_heads_table(without))
    return numbers, shown


def main() -> None:
    """Measure, then write the page from what is kept."""
    asked = sys.argv[1:] or PARTS
    with one_thread():
        measure(asked)
    origin = provenance("python -m tests.edited", ("numpy", "torch", "transformers", "transformer-lens"))
    numbers, shown = page()
    (OUT / f"edits_{NAME}.json").write_text(
        json.dumps(origin | numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    lines = [f"# {NAME}: what the found heads do", "", told_versions(origin), ""]
    for table in shown:
        lines += table_markdown(table)
    (OUT / f"edits_{NAME}.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
