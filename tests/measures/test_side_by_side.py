"""The table of measures: against each measure alone, and a model whose naive score lies."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import rim_lens as rl
from rim_lens import cli
from rim_lens.measures import refusal_prefix_score
from rim_lens.measures.side_by_side import SideBySide, after_own_thinking, measure_side_by_side
from rim_lens.prompts.records import Prompt
from tests.families import FAMILIES
from tests.speaking import writer
from tests.true_tokenizers import true_chat


@pytest.fixture(scope="module")
def toy() -> Any:
    model = rl.load_model("toy")
    chat = rl.ChatFormat.from_model(model)
    harmful = rl.load_prompts("harmful", language="toy", split="select")[::5]
    said: list[str] = []
    found = measure_side_by_side(model, chat, {"harmful": harmful}, say=said.append)
    assert said == [
        f"harmful, {name}: 10 requests" for name in ("off", "careful", "filler", "unrelated", "open")
    ]
    return model, chat, harmful, found


def test_each_column_is_that_measure(toy: Any) -> None:
    model, chat, harmful, found = toy
    for name, batch in rl.render_conditions(chat, harmful, ["off", "careful", "filler", "unrelated"]).items():
        rows = found.rows[found.rows["condition"] == name]
        np.testing.assert_allclose(rows["naive"], rl.refusal_score(model, batch, skip="none"), atol=1e-6)
        np.testing.assert_allclose(rows["skipping"], rl.refusal_score(model, batch), atol=1e-6)
        np.testing.assert_allclose(rows["prefix"], refusal_prefix_score(model, batch), atol=1e-6)
        assert rows["forced"].isna().all()  # the toy has no whitespace
        assert rows["outcome"].tolist() == list(rl.generate(model, batch, max_new_tokens=2).outcome)
        share = found.summary.set_index(["condition", "measure"]).loc[(name, "skipping")]
        assert share["refuses"] == (rows["skipping"] > 0).mean()
        assert share["mean_score"] == pytest.approx(rows["skipping"].mean())


def test_after_its_own_thinking_scores_are_read_where_the_answer_comes_next(toy: Any) -> None:
    """The toy's own chain, given back as a text, must give the same score: the tokens are the same."""
    model, chat, harmful, found = toy
    out = rl.generate(model, chat.render(harmful, think="open"), max_new_tokens=10, keep_text=True)
    batch, rows = after_own_thinking(chat, out)
    given = chat.render(harmful, think=list(out.own_cot))
    assert rows == list(range(len(harmful)))
    assert batch.tokens.tolist() == given.tokens.tolist()
    assert batch.digest == given.digest
    opened = found.rows[found.rows["condition"] == "open"]
    np.testing.assert_allclose(opened["naive"], rl.refusal_score(model, given), atol=1e-5)
    unfinished = rl.generate(model, chat.render(harmful, think="open"), max_new_tokens=2)
    assert after_own_thinking(chat, unfinished) == (None, [])


def lying_model(chat: Any, batch: Any) -> Any:
    """Writes a newline and then a refusal: its very next token is no opener."""
    model = writer("qwen3", FAMILIES[0], 64)
    model.teach(
        int(batch.lengths[0]), [*chat.encode("\n\n"), *chat.encode("Sorry, but I can't help.<|im_end|>")]
    )
    model.table.mul_(200.0)  # GPT-2's last norm keeps logits small
    return model.model


@pytest.mark.npm
def test_it_shows_where_the_naive_score_lies() -> None:
    chat = true_chat("qwen3")
    asked = [Prompt(id=str(n), text="Bake bread.", kind="harmful", family=str(n)) for n in range(6)]
    model = lying_model(chat, chat.render(asked))
    found = measure_side_by_side(
        model, chat, {"harmful": asked}, ["off"], max_new_tokens=12, max_cot_tokens=4
    )
    shares = found.summary.set_index("measure")["refuses"]
    assert shares["naive"] == 0.0
    assert shares["skipping"] == shares["generated"] == shares["forced"] == shares["prefix"] == 1.0
    assert found.lies[["condition", "measure", "difference"]].to_numpy().tolist() == [["off", "naive", -1.0]]
    assert found.lies["first_tokens"][0].startswith(r"'\n\n' 1.00")
    kappas = found.agreements[found.agreements["condition"] == "off"].set_index("measure")
    assert kappas.loc["naive", "agree_on"] == 0.0
    assert math.isnan(kappas.loc["skipping", "kappa"])
    text = found.to_markdown("Title")
    assert "**off, first token**: -1.00 [-1.00, -1.00] against the text" in text
    assert r"| off | '\n\n' 1.00" in text


def test_the_command_writes_a_table_and_every_number_behind_it(tmp_path: Any) -> None:
    options = ["--requests", "6", "--out", str(tmp_path), "--condition", "off", "--condition", "open"]
    result = CliRunner().invoke(cli.app, ["measures", "toy", *options])
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "measures_toy.json").read_text())
    assert data["command"].startswith("rim-lens measures toy --requests 6")
    assert data["command"].endswith("--condition off --condition open")
    assert {line["kind"] for line in data["rows"]} == {"harmful", "harmless"}
    assert len(data["rows"]) == 2 * 2 * 6
    assert data["rows"][0]["forced"] is None
    off = next(
        line for line in data["summary"] if (line["kind"], line["measure"]) == ("harmful", "generated")
    )
    assert off["refuses"] == np.mean(
        [
            line["outcome"] == "refuse"
            for line in data["rows"]
            if (line["kind"], line["condition"]) == ("harmful", "off")
        ]
    )
    text = (tmp_path / "measures_toy.md").read_text()
    assert text.startswith("# Measures of refusal side by side: toy")
    assert "## harmless" in text
    assert "make bomb" not in text + json.dumps(data["first_tokens"])


EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("measures_*.json")), ids=lambda path: path.stem)
def test_each_committed_page_shows_its_numbers(path: Path) -> None:
    data = json.loads(path.read_text())
    read = {name: pd.DataFrame(data[name]) for name in ("rows", "summary", "agreements")}
    tables = {name: table.where(table.notna(), np.nan) for name, table in read.items()}
    lies = pd.DataFrame(data["lies"]) if data["lies"] else pd.DataFrame(columns=["kind"])
    found = SideBySide(**tables, lies=lies, tokens=data["first_tokens"], budgets=data["budgets"])
    title, head, *shown = path.with_suffix(".md").read_text().split("\n\n")
    assert title.endswith(data["model"])
    assert head.startswith(f"`{data['command']}`, {data['date']}")
    assert "\n\n".join(shown) == found.to_markdown("").split("\n\n", 1)[1]
