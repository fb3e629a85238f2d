"""The page of causes: its numbers are those of the measures alone, and what it says of controls is counted again."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import rim_lens as rl
from rim_lens import cli
from rim_lens.measures import bootstrap_interval
from rim_lens.measures.refusal_causes import WHOLE, RefusalCauses, cut_like, part_sizes, refusal_causes
from rim_lens.measures.two_sides import two_sides
from rim_lens.prompts import spread
from rim_lens.prompts.toy import split_steps
from tests.true_tokenizers import true_chat

SETTINGS: dict[str, Any] = {"max_kl": 1.0, "max_candidates": 8, "limit": 8, "seed": 3}


@pytest.fixture(scope="module")
def toy() -> Any:
    model = rl.load_model("toy")
    chat = rl.ChatFormat.from_model(model)
    asked = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    return (
        model,
        chat,
        asked,
        refusal_causes(model, chat, *asked, n_controls=3, split=split_steps, **SETTINGS),
    )


def test_the_direction_is_that_of_the_measure(toy: Any) -> None:
    model, chat, asked, found = toy
    alone = rl.refusal_direction(model, chat, *asked, n_random=3, **SETTINGS)
    np.testing.assert_array_equal(found.direction.vector, alone.vector)
    for name in ("table", "effects", "controls"):
        assert getattr(found.direction, name).equals(getattr(alone, name))


@pytest.mark.parametrize("condition", ["careful", "filler", "unrelated"])
def test_each_change_is_that_of_sentence_effects_on_the_whole_batch(toy: Any, condition: str) -> None:
    """The toy's chains all have the steps 3, 3 and 1, so that one rule cuts every condition."""
    model, chat, asked, found = toy
    evaluate = spread([prompt for prompt in asked[0] if prompt.split == "evaluate"], 8)
    batch = rl.render_conditions(chat, evaluate, ["careful", condition][condition == "careful" :], seed=3)[
        condition
    ]

    def three_three_one(text: str) -> list[str]:
        words = text.split()
        return [" ".join(words[:3]) + " ", " ".join(words[3:6]) + " ", " ".join(words[6:])]

    alone = rl.sentence_effects(model, batch, chat=chat, split=three_three_one)
    rows = found.rows[(found.rows["kind"] == "harmful") & (found.rows["condition"] == condition)]
    for part in range(3):
        here = rows[rows["part"] == str(part + 1)].set_index("prompt").loc[[p.id for p in evaluate]]
        np.testing.assert_allclose(here["effect"], alone["refusal_effect"][:, part], atol=1e-4)
        np.testing.assert_allclose(here["score"], alone["refusal_score"], atol=1e-4)
        assert here["n_tokens"].tolist() == alone["n_tokens"][:, part].values.tolist()
    first = rows[rows["part"] == "1"].set_index("prompt").loc[[p.id for p in evaluate], "log_kl"]
    np.testing.assert_allclose(first, np.nanmean(alone["log_kl"][:, 0], axis=1), atol=1e-3)
    whole = rl.sentence_effects(model, batch, chat=chat, split=lambda text: [text])["refusal_effect"][:, 0]
    np.testing.assert_allclose(rows[rows["part"] == WHOLE]["effect"], whole, atol=1e-4)


def test_means_and_contrasts_are_of_the_rows(toy: Any) -> None:
    found = toy[3]
    rows = found.rows.set_index(["kind", "condition", "part"]).sort_index()
    line = found.sentences.set_index(["kind", "condition", "part"]).loc[("harmful", "filler", "3")]
    here = rows.loc[("harmful", "filler", "3")]
    by_hand = bootstrap_interval(here["effect"].to_numpy(), families=here["family"].tolist(), seed=3)
    assert (line["effect"], line["low"], line["high"]) == (by_hand.estimate, by_hand.low, by_hand.high)
    assert line["then"] == (here["score"] + here["effect"] > 0).mean()
    gaps = found.contrasts.set_index(["compared", "part"])["difference"]
    mean = found.sentences.set_index(["kind", "condition", "part"])["effect"]
    for part in ("1", "2", "3", WHOLE):
        assert gaps["harmless: careful − filler", part] == pytest.approx(
            mean["harmless", "careful", part] - mean["harmless", "filler", part]
        )
        assert gaps["careful: harmful − twins", part] == pytest.approx(
            mean["harmful", "careful", part] - mean["harmless", "careful", part]
        )
    assert set(found.contrasts["n"]) == {8}


@pytest.mark.npm
def test_controls_are_cut_where_the_careful_chain_is() -> None:
    chat = true_chat("chatml")
    asked = rl.load_prompts("harmful", split="evaluate")[:6]
    batches = rl.render_conditions(chat, asked, ["careful", "filler", "unrelated"])
    sizes = part_sizes(chat, batches["careful"])
    assert {len(row) for row in sizes} == {2}
    for name in ("filler", "unrelated"):
        for row, text in enumerate(batches[name].cots):
            pieces = cut_like(text, chat, sizes[row])
            assert "".join(pieces) == text
            assert len(pieces) == 2
            assert abs(chat.count_tokens(pieces[0].strip()) - sizes[row][0]) <= 2


def test_a_text_of_few_words_has_fewer_parts(toy: Any) -> None:
    assert cut_like("3", toy[1], [2, 2, 2]) == ["3"]
    assert cut_like("3 4", toy[1], [2, 2, 2]) == ["3 ", "4"]


def test_the_command_writes_a_page_and_every_number_behind_it(tmp_path: Any) -> None:
    options = ["--requests", "6", "--controls", "3", "--candidates", "4", "--name", "my/toy"]
    result = CliRunner().invoke(cli.app, ["direction", "toy", *options, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "direction_my_toy.json").read_text())
    assert data["command"] == "rim-lens direction toy " + " ".join(options)
    assert data["settings"]["n_evaluate"] == [6, 6]
    assert (data["settings"]["max_kl"], data["settings"]["n_tested"] <= 4) == (1.0, True)
    text = (tmp_path / "direction_my_toy.md").read_text()
    assert text.startswith("# What refusal hangs on: my/toy")
    ablated = next(line for line in data["effects"] if line["requests"] == "harmful")["effect"]
    added = next(line for line in data["effects"] if line["edit"] == "add")["effect"]
    for kind in ("random", "within"):
        controls = [line for line in data["controls"] if line["kind"] == kind]
        lower = sum(line["ablate_effect"] <= ablated for line in controls)
        more = sum(line["add_effect"] >= added for line in controls)
        said = re.search(rf'Of 3 "{kind}" controls, \*\*(\d)\*\*.*and \*\*(\d)\*\* raise', text)
        assert said is not None
        assert (int(said[1]), int(said[2])) == (lower, more)
    mean = np.mean(
        [
            line["effect"]
            for line in data["rows"]
            if (line["kind"], line["condition"], line["part"]) == ("harmful", "careful", "3")
        ]
    )
    assert f"**Sentence 3**, suppressed: {mean:+.2f} [" in text


EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"


@pytest.mark.parametrize("path", sorted(EVIDENCE.glob("direction_*.json")), ids=lambda path: path.stem)
def test_each_committed_page_shows_its_numbers(path: Path) -> None:
    data = json.loads(path.read_text())
    table, effects, controls = (pd.DataFrame(data[name]) for name in ("candidates", "effects", "controls"))
    direction = rl.RefusalDirection(
        torch.zeros(1),
        data["layer"],
        data["offset"],
        data["position"],
        table,
        effects,
        controls,
        data["settings"],
    )
    rows, sentences, contrasts = (pd.DataFrame(data[name]) for name in ("rows", "sentences", "contrasts"))
    found = RefusalCauses(direction, rows, sentences, contrasts, tuple(data["example"]))
    title, head, *shown = path.with_suffix(".md").read_text().split("\n\n")
    assert title.endswith(data["model"])
    assert head.startswith(f"`{data['command']}`, {data['date']}")
    assert "\n\n".join(shown) == found.to_markdown("").split("\n\n", 1)[1]


def test_halves_are_cut_where_there_are_none_and_no_request_chooses_and_reports(toy: Any) -> None:
    model, chat, asked, _ = toy
    bare = [[replace(prompt, split=None) for prompt in prompts[::8]] for prompts in asked]
    found = refusal_causes(model, chat, *bare, n_controls=2, split=split_steps, **SETTINGS)
    _, evaluate = two_sides(*bare, SETTINGS["limit"], SETTINGS["seed"])
    assert set(found.rows["prompt"]) == {prompt.id for prompts in evaluate for prompt in prompts}


def test_no_pass_holds_more_prompts_than_asked_for(toy: Any) -> None:
    model, chat, asked, _ = toy
    careful = rl.render_conditions(chat, asked[0][:4], ["careful"])["careful"]
    widths: list[int] = []
    model.add_hook("hook_embed", lambda tensor, hook: widths.append(len(tensor)))
    try:
        rl.sentence_effects(model, careful, chat=chat, split=split_steps, max_rows=2)
    finally:
        model.reset_hooks()
    assert max(widths) == 2
