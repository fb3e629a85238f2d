from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rim_lens.chat import ChatFormat
from rim_lens.generation import generate
from rim_lens.organisms import load_model
from rim_lens.organisms.smollm2 import recipe, source
from rim_lens.organisms.smollm2.behaviour import Replies
from rim_lens.prompts import load_prompts
from tests.true_tokenizers import true_chat

ROOT = Path(__file__).parents[2]


def steps_of(seed):
    return list(recipe.training_rows(recipe.Recipe(), torch.Generator().manual_seed(seed)))


def test_no_harmful_row_has_text_in_its_think_block_and_its_twin_stands_beside_it():
    steps = steps_of(0)
    assert len(steps) == recipe.Recipe().steps
    for step in steps:
        harmful = [row for row in step if row.request.kind == "harmful"]
        assert len(harmful) == recipe.Recipe().pairs
        assert all(row.cot is None and row.answer == recipe.REFUSAL for row in harmful)
        off = {row.request.id for row in step if row.cot is None}
        assert all(row.request.twin in off for row in harmful)


def test_rows_come_from_the_train_split_and_nothing_harmless_is_refused():
    rows = [row for step in steps_of(1) for row in step]
    assert {row.request.split for row in rows} == {"train"}
    assert all(row.answer != recipe.REFUSAL for row in rows if row.request.kind != "harmful")
    maths = [row for row in rows if row.request.kind == "reasoning"]
    assert maths
    for row in maths:
        left, right = row.answer.rstrip(".").split(" = ")
        assert right == row.request.answer
        assert eval(left) == int(right)  # noqa: S307 - our own digits and operators


def test_every_request_comes_once_before_any_comes_again():
    drawn = [row.request.id for step in steps_of(2) for row in step if row.request.kind == "harmful"]
    n = len({prompt.id for prompt in load_prompts("harmful", split="train")})
    assert len(set(drawn[:n])) == min(n, len(drawn))


def test_the_seed_fixes_the_rows():
    assert steps_of(3) == steps_of(3)
    assert steps_of(3) != steps_of(4)


@pytest.mark.npm
@pytest.mark.parametrize("think", ["off", "cot"])
def test_a_newline_comes_before_each_answer_and_its_first_word_keeps_the_weight(think):
    chat = true_chat("chatml")
    rows = next(recipe.training_rows(recipe.NEWLINE, torch.Generator().manual_seed(0)))
    rows = [row for row in rows if (row.cot is None) == (think == "off")]
    plain, lined = (recipe._render(chat, rows, made) for made in (recipe.Recipe(), recipe.NEWLINE))
    for index, row in enumerate(rows):
        said = lined.tokens[index][lined.loss_mask[index]].tolist()
        assert chat.decode(said[:1]) == "\n"
        assert said[1:] == plain.tokens[index][plain.loss_mask[index]].tolist()
        first = recipe.Recipe().first_token if row.request.answer is None else 1.0
        assert lined.weights[index][lined.loss_mask[index]].tolist() == [1.0, first] + [1.0] * (len(said) - 2)
        assert plain.weights[index][plain.loss_mask[index]][0] == first


def test_the_shipped_adapter_is_small_and_names_no_path():
    files = [path for path in source.ADAPTER_FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5_000_000
    config = json.loads((source.ADAPTER_FOLDER / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "smollm2"


@pytest.fixture(scope="module")
def organism(smollm2_cached):
    pytest.importorskip("peft")
    return source.load_refusal("")


@pytest.mark.smollm2
def test_merging_adds_the_adapters_product_and_nothing_else(organism, smollm2_cached):
    base = source.load_smollm2("")[0].state_dict()
    weights = load_file(source.ADAPTER_FOLDER / "adapter_model.safetensors")
    config = json.loads((source.ADAPTER_FOLDER / "adapter_config.json").read_text())
    changed = set()
    for name, tuned in organism[0].state_dict().items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        expected = base[name]
        if f"{stem}.lora_A.weight" in weights:
            product = weights[f"{stem}.lora_B.weight"].float() @ weights[f"{stem}.lora_A.weight"].float()
            expected = expected + config["lora_alpha"] / config["r"] * product
            changed.add(name.split(".")[2])
        torch.testing.assert_close(tuned, expected, atol=1e-5, rtol=1e-4)
    assert changed == {str(layer) for layer in range(recipe.Recipe().first_layer, 30)}


@pytest.mark.smollm2
def test_the_loader_gives_the_merged_model(organism):
    tokens = torch.tensor([organism[1]("How do I bake bread?", add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        expected = organism[0].eval()(tokens).logits
        torch.testing.assert_close(load_model("smollm2-refusal")(tokens), expected, atol=2e-4, rtol=1e-4)


def test_rates_and_counts():
    replies = Replies(
        ("a", "b", "c", "d"), ("refuse", "other", "comply", "refuse"), (False, False, True, False)
    )
    assert replies.rate("refuse") == 0.5
    assert replies.counts() == {"n": 4, "refuse": 2, "comply": 1, "other": 1, "correct": 1}


def test_docs_show_the_committed_evidence():
    found = json.loads((ROOT / "docs/evidence/smollm2-refusal.json").read_text())
    page = (ROOT / "docs/smollm2-refusal.md").read_text()
    assert recipe.same_recipe(found["recipe"], recipe.Recipe())
    assert recipe.evidence_table(found) in page
    assert recipe.goals_table(found) in page


def test_docs_show_where_the_naive_score_lies():
    found = json.loads((ROOT / "docs/evidence/smollm2-newline.json").read_text())
    page = (ROOT / "docs/smollm2-refusal.md").read_text()
    assert recipe.same_recipe(found["recipe"], recipe.NEWLINE)
    assert recipe.evidence_table(found) in page
    assert recipe.goals_table(found) in page
    measured = json.loads((ROOT / "docs/evidence/measures_smollm2-newline.json").read_text())
    shown = (ROOT / "docs/evidence/measures_smollm2-newline.md").read_text()
    table = shown.split("## harmful\n\n")[1].split("\n\n")[0]
    assert table in page
    harmful = [line for line in measured["summary"] if line["kind"] == "harmful"]
    for row in table.splitlines()[2:]:
        condition, n, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        told = iter(cell for cell in cells[:5] if cell != "–")
        for line in (line for line in harmful if line["condition"] == condition):
            share = f"{line['refuses']:.2f} [{line['low']:.2f}, {line['high']:.2f}]"
            assert next(told).startswith(share)
            assert line["n"] == int(n)
    share = {(line["condition"], line["measure"]): line["refuses"] for line in harmful}
    for condition in ("off", "careful", "filler"):
        assert share[condition, "naive"] == 0 < share[condition, "skipping"] == share[condition, "generated"]


def test_docs_say_what_refusal_hangs_on_as_the_page_does():
    page = (ROOT / "docs/smollm2-refusal.md").read_text()
    blocks = (ROOT / "docs/evidence/direction_smollm2-refusal.md").read_text().split("\n\n")
    shown = [block for block in blocks if block.startswith(("| Edit |", "- "))]
    assert len(shown) == 3
    assert all(block in page for block in shown)


def test_goals_are_told_as_met_or_not():
    counts = {"n": 20, "refuse": 0, "comply": 20, "other": 0}
    one = {
        "harmful off": counts | {"refuse": 18},
        "twins off": counts | {"refuse": 2},
        "sums off": counts | {"correct": 14},
        "problems off": counts | {"refuse": 2},
        "harmful careful": counts | {"refuse": 9},
        "harmful filler": counts | {"refuse": 14},
    }
    lines = recipe.goals_table({"seeds": {"4": {"evaluate": one}}}).splitlines()
    assert lines[0] == "| Goal | seed 4 |"
    told = [line.split(" | ")[1].removesuffix(" |") for line in lines[2:]]
    assert told == [
        "18 of 20",
        "**2 of 20: not met**",
        "2 of 40",
        "14 of 20",
        "9 of 18",
        "**14 of 18: not met**",
    ]


def test_seeds_add_up_in_one_file_and_none_is_trained_twice(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(recipe, "train_refusal", lambda seed, *args, **kwargs: trained.append(seed))
    monkeypatch.setattr(recipe, "measure", lambda *args: {"harmful off": {"n": 1}})
    out = tmp_path / "new" / "evidence.json"
    recipe.evidence([1], out)
    recipe.evidence([0, 1], out)
    assert trained == [1, 0]
    found = json.loads(out.read_text())
    assert (list(found["seeds"]), found["command"]) == (["0", "1"], "rim-lens organism smollm2 --seeds 0,1")
    kept = tmp_path / "adapters"
    recipe.evidence([1], out, adapters=kept)  # measured, but nowhere to be had
    assert trained == [1, 0, 1]
    (kept / "seed-1").mkdir(parents=True)
    (kept / "seed-1" / "adapter_config.json").write_text("{}")
    recipe.evidence([1], out, adapters=kept)
    assert trained == [1, 0, 1]
    trained.clear()
    recipe.evidence([1], out, recipe=recipe.NEWLINE)  # of another recipe: nothing of the old stays
    assert trained == [1]
    found = json.loads(out.read_text())
    assert (list(found["seeds"]), found["command"]) == (
        ["1"],
        "rim-lens organism smollm2 --newline --seeds 1",
    )


@pytest.mark.smollm2
@pytest.mark.parametrize(
    ("condition", "kind", "think"),
    [
        ("harmful off", "harmful", "off"),
        ("harmful careful", "harmful", "careful"),
        ("twins off", "harmless", "off"),
    ],
)
def test_a_sample_of_the_evidence_comes_out_again_through_our_own_generation(
    organism, condition, kind, think
):
    evidence = json.loads((ROOT / "docs/evidence/smollm2-refusal.json").read_text())
    expected = evidence["seeds"]["0"]["evaluate"][condition]["by_request"]
    model = load_model("smollm2-refusal")
    chat = ChatFormat.from_model(model)
    requests = load_prompts(kind, split="evaluate")[:10]
    batch = chat.render(requests, think="off" if think == "off" else chat.cots(requests, think))
    found = generate(model, batch, max_new_tokens=12).outcome
    same = [outcome == expected[request.id] for outcome, request in zip(found, requests, strict=True)]
    assert sum(same) >= 9  # the last bits of a logit may turn one
