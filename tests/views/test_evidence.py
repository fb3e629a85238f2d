"""The committed page of all heads of smollm2-refusal says what the committed table holds."""

from __future__ import annotations

import json
from pathlib import Path

from rim_lens.measures.frames import frame_from_json
from rim_lens.views.words import signed

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
