"""Pages that promise a command: the command itself is run, on a random model in the true chat format."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import rim_lens as rl
from rim_lens import cli
from rim_lens.study.planning import MLP_WIDTHS, memory_of
from tests.families import fill
from tests.true_tokenizers import load_tokenizer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "qwen3-4b.md"


@pytest.fixture(scope="module")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three random layers behind Qwen3's own tokenizer and template."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("qwen3")
    tokenizer = load_tokenizer("qwen3")
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=151936,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=24,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )
    fill(model, 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def command_of(page: Path, name: str) -> list[str]:
    """The words of the page's command after `rim-lens`."""
    (line,) = re.findall(rf"^rim-lens (heads {re.escape(name)} .*)$", page.read_text(encoding="utf-8"), re.M)
    return shlex.split(line)


@pytest.mark.npm
def test_the_command_for_qwen3_4b_runs_on_a_tiny_qwen3(tiny_qwen3: Path, tmp_path: Path) -> None:
    words = command_of(PAGE, "Qwen/Qwen3-4B")
    asked = dict(zip(words[2::2], words[3::2], strict=True))
    assert asked["--think"] == "off,open,careful,filler,unrelated"
    small = {"--device": "cpu", "--out": str(tmp_path / "run"), "--n-test": "2"}
    words = ["heads", str(tiny_qwen3), *(word for pair in (asked | small).items() for word in pair)]
    words += ["--requests", "4", "--max-new-tokens", "1", "--no-gate"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, (result.output, result.exception)
    study = rl.load_study(tmp_path / "run")
    assert study.measured
    assert study.design["facts"]["dtype"] == "torch.bfloat16"
    assert study.parts == ("heads", "statistics", "removing", "probes")
    assert set(study.conditions) == {"off", "open", "careful", "filler", "unrelated"}
    assert "moves_empty" in study.heads.scan.columns
    assert (tmp_path / "run" / "report.html").exists()
    with study.attention("harmful", "off") as off, study.attention("harmful", "open") as open_:
        # The paper's two modes: an empty block, and none that is not written yet.
        assert float(off["attention_mass"].sel(span="gap").min()) > 0
        assert "gap" not in open_["span"].values or bool(
            open_["attention_mass"].sel(span="gap").isnull().all()
        )


@pytest.mark.npm
def test_memory_is_weights_and_what_the_largest_pass_holds(tiny_qwen3: Path) -> None:
    model = rl.load_model(tiny_qwen3)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    tokens = 5 * 10
    rest = MLP_WIDTHS * tokens * 24 * 4 + tokens * 10 * 2 * 8 + tokens * 3 * 2 * 1 * 8 * 4
    assert memory_of(model, max_rows=5, length=10) == weights + rest
    assert memory_of(model, max_rows=64, length=64) == memory_of(model, max_rows=900, length=64)
    half = rl.load_model(tiny_qwen3, dtype=torch.bfloat16)
    assert memory_of(half, max_rows=5, length=10) < memory_of(model, max_rows=5, length=10) * 0.51
