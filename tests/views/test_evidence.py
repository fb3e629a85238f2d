"""Committed pages of smollm2-refusal say what the committed tables hold."""

from __future__ import annotations

import json
from pathlib import Path

from rim_lens.measures.frames import frame_from_json
from rim_lens.views.words import plain, share, signed

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"


def test_every_head_stands_in_the_page_as_in_the_table() -> None:
    stored = json.loads((EVIDENCE / "heads_smollm2-refusal.json").read_text(encoding="utf-8"))
    table = frame_from_json(stored["table"])
    assert len(table) == 270
    assert table["tested"].all()
    lines = (EVIDENCE / "heads_smollm2-refusal.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and line.count("|") > 8]
    for row in table.to_dict("records"):
        name, effect = f"L{row['layer']}H{row['head']}", signed(row["effect"])
        assert any(row["verdict"] in line and f" {name} " in line and effect in line for line in rows), name


def test_every_checkpoint_stands_in_the_page_as_in_the_comparison() -> None:
    stored = json.loads((EVIDENCE / "checkpoints_smollm2-refusal.json").read_text(encoding="utf-8"))
    table = frame_from_json(stored["table"])
    tuned = table[table["step"] > 0]
    assert tuned.groupby("run").size().to_dict() == {
        f"{kind}_{seed}": 6 for kind in ("careful", "heuristic") for seed in range(3)
    }
    lines = (EVIDENCE / "checkpoints_smollm2-refusal.md").read_text(encoding="utf-8").splitlines()
    for row in tuned.to_dict("records"):
        name = row["run"].replace("_", "\\_")
        (line,) = (
            line
            for line in lines
            if line.startswith(f"| {name} | {row['step']} |") and signed(row["score_harmful"]) in line
        )
        for number in (share(row["refused_harmless"]), share(row["accuracy_open"]), plain(row["ras"])):
            assert f"| {number} |" in line
