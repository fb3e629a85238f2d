"""What is written of several seeds: kept when interrupted, and what docs/toy.md shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rim_lens.organisms.toy import evidence, load_toy
from rim_lens.prompts.toy import toy_prompts

ROOT = Path(__file__).parents[2]


def test_evidence_keeps_what_it_measured_when_interrupted(short, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "find_heads", lambda _: {})
    monkeypatch.setattr(
        evidence, "held_out", lambda kind, op="+": toy_prompts(kind, split="select", op=op, draws=1)
    )
    trained = evidence.train_helpful

    def second_fails(seed, **options):
        if seed == 1:
            raise KeyboardInterrupt
        return trained(seed, **options)

    monkeypatch.setattr(evidence, "train_helpful", second_fails)
    with pytest.raises(KeyboardInterrupt):
        evidence.evidence([0, 1], tmp_path / "new" / "toy.json")
    found = json.loads((tmp_path / "new" / "toy.json").read_text())
    assert list(found["seeds"]) == ["0"]
    assert set(found["seeds"]["0"]["tuned"]["-"]) == {"careful", "confirm", "deviate"}
    assert found["command"] == "rim-lens organism toy --seeds 0,1"


def test_docs_show_the_committed_evidence_and_it_agrees_with_the_shipped_weights():
    found = json.loads((ROOT / "docs" / "evidence" / "toy_seeds.json").read_text())
    assert evidence.evidence_table(found) in (ROOT / "docs" / "toy.md").read_text()
    recorded = found["seeds"]["0"]
    model, _ = load_toy("Z")
    measured = json.loads(json.dumps(evidence.behaviour(model)["harmful"]))
    for condition, rates in recorded["Z"]["harmful"].items():
        assert measured[condition]["refused"]["value"] == pytest.approx(rates["refused"]["value"], abs=0.02)
