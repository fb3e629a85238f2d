"""The notebooks in demos/ run from top to bottom, and what they show is what they say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from rim_lens.chat.spans import ATOMS
from rim_lens.organisms.planted import planted_truth
from tests.circuit_verdicts import PLANTED_EDGES
from tests.fetch_tokenizers import cache_folder
from tests.true_tokenizers import load_tokenizer

DEMOS = Path(__file__).resolve().parents[1] / "demos"


def ran(name: str) -> dict[str, Any]:
    return runpy.run_path(str(DEMOS / f"{name}.py"))


BY_HAND = {"smollm2"}  # takes minutes on a real model: make evidence runs it


def test_every_notebook_is_run_here_and_named_in_the_readme():
    root = DEMOS.parent
    names = {path.stem for path in DEMOS.glob("*.py")}
    here, readme, make = (
        path.read_text() for path in (Path(__file__), root / "README.md", root / "Makefile")
    )
    shown = runpy.run_path(str(root / "docs" / "run_notebooks.py"))["NAMES"]
    assert names - BY_HAND == set(shown)
    for name in names:
        assert f"demos/{name}.py" in readme
        if name in BY_HAND:
            assert f"run_notebooks.py docs/evidence {name}" in make
        else:
            assert f'ran("{name}")' in here


def test_quick_start():
    shown = ran("quick_start")
    assert len(shown["strongest"]) == 2
    assert shown["result"].gate["passed"]
    assert float(shown["baseline"].mean()) > 0


def test_attention_on_spans():
    shown = ran("attention_on_spans")
    masses = shown["reading"]["off"]["attention_mass"]
    atoms = [name for name in masses["span"].values.tolist() if name in ATOMS]
    assert masses.sel(span=atoms).sum("span").values == pytest.approx(1.0, abs=1e-4)
    assert ((shown["share"] >= 0) & (shown["share"] <= 1)).all().all()
    assert "<script" in shown["page"]


def test_head_ablation():
    shown = ran("head_ablation")
    curve = shown["curve"]
    assert curve[0.0] < curve[0.5] < curve[1.0]
    assert shown["removal"].row("score", "harmful", "off")["change"] < -1


def test_patching():
    shown = ran("patching")
    assert float(shown["off_score"].mean()) > float(shown["cot_score"].mean())
    assert shown["into_cot"]["recovered"].max() > 0.1


def test_safety_neurons():
    shown = ran("safety_neurons")
    assert shown["found"].neurons == planted_truth().neurons
    assert shown["found"].effects.verdict == "refusal"
    assert shown["restored"]["tuned"].iloc[0] < shown["restored"]["base"].iloc[0]


def test_circuit():
    shown = ran("circuit")
    assert set(shown["off"].top()) == set(PLANTED_EDGES)
    assert shown["off"].row("faithfulness", "harmful")["share"] > 0.9
    # Under the chain of thought the reader does not say it: the edge into the refusal score lost what it carried.
    assert shown["compared"].set_index("edge")["change"]["L1H1 → refusal"] > 10
    assert shown["view"].data["circuits"][0]["runs"]


@pytest.mark.timeout(300)
def test_before_and_after():
    shown = ran("before_and_after")
    table = shown["found"].table
    last = table[table["run"] == "deviate"].sort_values("step").iloc[-1]
    assert last["lost"] > 0
    assert len(shown["matched"]) == 4
    assert not shown["folder"].exists()


@pytest.mark.parametrize("tokenizer", ["true", "small"])
def test_your_own_model(tokenizer, monkeypatch, tmp_path):
    """On random weights nothing is found, with Qwen3's own tokenizer where it was fetched, and without."""
    if tokenizer == "true":
        load_tokenizer("qwen3")  # skips where it is not there
        monkeypatch.setenv("RIM_LENS_TOKENIZERS", str(cache_folder()))
    else:
        monkeypatch.setenv("RIM_LENS_TOKENIZERS", str(tmp_path))
    shown = ran("your_own_model")
    assert (shown["model"].cfg.d_vocab > 100_000) == (tokenizer == "true")
    assert shown["chat"].name == "qwen3"
    assert [one.kind for one in shown["harmful"]] == ["harmful"] * 24
    tested = shown["found"].table
    assert (tested["verdict"] != "refusal").all(), tested
    assert tested["tested"].any()
    assert shown["written"].outcome.count("refuse") == 0
    assert not shown["file"].exists()
