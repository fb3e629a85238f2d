"""Refusal heads where the truth was planted, where there is none, and at every edge of what can be asked."""

from __future__ import annotations

import functools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import rim_lens as rl
from rim_lens.errors import (
    ConditionError,
    GateNotPassed,
    MissingTwin,
    NotEnoughData,
    StatisticsError,
    StudyFolderError,
    UnknownHead,
)
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.organisms.planted import planted, planted_truth
from rim_lens.organisms.toy.host import D_HEAD
from rim_lens.prompts import Prompt
from tests import verdicts
from tests.families import FAMILIES

SMALL = rl.HeadSearch(limit=12, n_random_sets=2)
BRIEF = {"conditions": ("off", "careful"), "search": SMALL}


@pytest.fixture(scope="module", params=FAMILIES)
def asked(request):
    model = rl.load_model("planted:4", family=request.param)
    return model, rl.ChatFormat.from_model(model), *verdicts.toy_requests()


@pytest.fixture(scope="module")
def bench():
    model = rl.load_model("planted:4")
    return model, rl.ChatFormat.from_model(model), *verdicts.toy_requests()


@pytest.fixture(scope="module")
def brief(bench):
    return rl.refusal_heads(*bench, **BRIEF)


def same(one: RefusalHeads, other: RefusalHeads) -> None:
    assert one.to_dict() == other.to_dict()
    xr.testing.assert_identical(one.effects, other.effects)
    xr.testing.assert_identical(one.attention, other.attention)


def verdict_of(found: RefusalHeads, head: tuple[int, int]) -> str:
    return found.table.set_index(["layer", "head"]).loc[head, "verdict"]


# --- what is there is found -------------------------------------------------------------------------


def test_what_was_planted_is_found_and_named(asked) -> None:
    found = rl.refusal_heads(*asked, search=SMALL)
    truth = planted_truth(4)
    assert set(found.top()) == set(truth.heads)
    assert [verdict_of(found, head) for head in truth.decoy_heads] == ["positional"]
    assert [verdict_of(found, head) for head in truth.sink_heads] == ["sink"]
    assert set(found.found) <= set(truth.heads)
    assert found.set["refusing_before"] == 1
    assert found.set["refusing_after"] == 0
    assert found.set["percentile"] == 100
    assert found.gate == {"asked": True, "harmful": 1.0, "harmless": 0.0}
    assert found.top(1) == found.top()[:1]
    assert repr(rl.AblateHeads(found)) == repr(rl.AblateHeads(found.top()))
    strongest = found.scan.sort_values("effect").iloc[0]
    assert (strongest["layer"], strongest["head"]) in truth.heads


@pytest.mark.parametrize("seed", [1, 2])
def test_other_seeds(seed: int) -> None:
    row = verdicts.planted_row(seed)
    assert (row["precision"], row["recall"]) == (1, 1)
    assert row["decoy"] == ["positional"]
    assert row["sink"] == ["sink"]


def test_an_effect_is_that_of_the_head_cut_out_of_the_weights(bench, brief) -> None:
    _, chat, *_ = bench
    by_id = {prompt.id: prompt for prompt in (*bench[2], *bench[3])}
    for kind in ("harmful", "harmless"):
        head = "L1H1"
        prompts = [by_id[str(name)] for name in brief.effects[f"{kind}_prompt"].values]
        off = chat.render(prompts, think="off")
        scores = []
        for cut in (False, True):
            model = planted(4)
            if cut:
                with torch.no_grad():
                    model.transformer.h[1].attn.c_proj.weight[D_HEAD : 2 * D_HEAD] = 0
            logits = model(off.tokens, attention_mask=off.attention_mask.long()).logits[:, -1].double()
            refuse = chat.tokenizer.convert_tokens_to_ids("REFUSE")
            p = logits.softmax(-1)[:, refuse].detach().numpy()
            scores.append(np.log(p) - np.log1p(-p))
        np.testing.assert_allclose(brief.effects[f"{kind}_baseline"].values, scores[0], atol=2e-3)
        ours = brief.effects[kind].sel({f"{kind}_head": head}).values
        np.testing.assert_allclose(ours, scores[1] - scores[0], atol=4e-3)


def test_sides_do_not_meet_and_twins_stand_beside(bench, brief) -> None:
    split = {prompt.id: prompt.split for prompt in (*bench[2], *bench[3])}
    twin = {prompt.id: prompt.twin for prompt in bench[2]}
    measured = [str(name) for name in brief.effects["harmful_prompt"].values]
    assert {split[name] for name in measured} == {"evaluate"}
    assert [twin[name] for name in measured] == [
        str(name) for name in brief.effects["harmless_prompt"].values
    ]
    # A verb is one family, however many objects it takes.
    families = dict(zip(measured, brief.effects["family"].values, strict=True))
    verbs = {name: next(p.family for p in bench[2] if p.id == name).split()[0] for name in measured}
    assert len(set(families.values())) == len(set(verbs.values())) == brief.settings["n_families_evaluate"]
    assert len({(verbs[name], family) for name, family in families.items()}) == len(set(verbs.values()))


# --- kept, gone on with, read back ------------------------------------------------------------------


def test_what_was_interrupted_goes_on_and_ends_the_same(bench, tmp_path, monkeypatch) -> None:
    from rim_lens.measures import readings

    measured = readings.refusal_score
    calls = 0

    def stops(*args, **settings):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return measured(*args, **settings)

    # Scans go the plain way here, one call for each edit, so that there is much to be stopped in.
    monkeypatch.setattr("rim_lens.measures.scanning._FEWEST", math.inf)
    whole = rl.refusal_heads(*bench, **BRIEF)
    monkeypatch.setattr(readings, "refusal_score", stops)
    for wanted in (9, 28):
        calls, stop_at = 0, wanted
        with pytest.raises(KeyboardInterrupt):
            rl.refusal_heads(*bench, **BRIEF, folder=tmp_path)
    before, stop_at = calls, math.inf
    lines = tmp_path / "heads" / "evaluate.jsonl"
    lines.write_bytes(lines.read_bytes() + b'{"key": "cut sho')  # stopped while writing
    calls = 0
    same(rl.refusal_heads(*bench, **BRIEF, folder=tmp_path), whole)
    assert 0 < calls < 60 - before  # what was measured is not measured again
    calls = 0
    same(rl.refusal_heads(*bench, **BRIEF, folder=tmp_path), whole)
    assert calls == 0
    with pytest.raises(StudyFolderError, match=r"different: .*read_in"):
        rl.refusal_heads(*bench, **BRIEF, folder=tmp_path, read_in="careful", gate=True)


def test_it_is_read_back_as_it_was(brief, tmp_path) -> None:
    brief.save(tmp_path / "kept")
    again = RefusalHeads.load(tmp_path / "kept")
    same(again, brief)
    pd.testing.assert_frame_equal(again.table, brief.table, check_dtype=False)
    assert again.top() == brief.top()
    heads = tmp_path / "kept" / "heads.json"
    old = json.loads(heads.read_text())
    heads.write_text(json.dumps(old | {"format_version": 99}))
    with pytest.raises(StudyFolderError, match="99"):
        RefusalHeads.load(tmp_path / "kept")
    (tmp_path / "kept" / "effects.nc").unlink()
    heads.write_text(json.dumps(old))
    with pytest.raises(StudyFolderError, match="no readable table"):
        RefusalHeads.load(tmp_path / "kept")


def test_it_shows_itself(brief) -> None:
    shown = brief._repr_html_()
    assert "refusal" in shown
    assert "1.1" in shown or "L1H1" in shown
    wide = brief.to_dataframe(masses=True)
    tags = wide.set_index(["layer", "head"]).loc[(1, 1), ["mass_think_off", "mass_think_off_twins"]]
    assert (tags > 0.5).all()  # the reader looks at the think tags, whatever is asked


# --- pointed elsewhere ------------------------------------------------------------------------------


def test_contrasts_can_be_pointed_elsewhere(bench) -> None:
    mine = rl.Contrast("back", "off", "careful", "think", "cot")
    found = rl.refusal_heads(*bench, **BRIEF, contrasts=[mine])
    assert "moves_empty" not in found.table
    table = found.table.set_index(["layer", "head"])
    assert table.loc[(1, 1), "moves_back"] == table.loc[(1, 2), "moves_back_twins"] == 1
    assert table.loc[(0, 2), "moves_back"] == 0  # rests on the first token
    assert found.settings["contrasts"][0]["leaves"] == "think"
    with pytest.raises(ConditionError, match="open"):
        rl.refusal_heads(*bench, **BRIEF, contrasts=[rl.Contrast("x", "open", "off", "assistant")])
    with pytest.raises(ConditionError, match="two contrasts"):
        rl.refusal_heads(*bench, **BRIEF, contrasts=[mine, mine])


def test_other_candidates_editors_and_places(bench) -> None:
    _, chat, harmful, _ = bench
    reference = chat.render([p for p in harmful if p.split == "train"][:24], think="off")
    found = rl.refusal_heads(
        *bench,
        **BRIEF,
        candidates=[(1, 1), (1, 2), (0, 5)],
        editor=functools.partial(rl.AblateHeads, method="mean", reference=reference),
        positions="prompt_last",
    )
    assert set(zip(found.scan["layer"], found.scan["head"], strict=True)) == {(0, 5), (1, 1), (1, 2)}
    # The mean of harmful requests keeps refusal up, in the reader too: about refusal, it does nothing to requests that refuse.
    assert abs(found.table.set_index(["layer", "head"]).loc[(1, 1), "effect"]) < 3
    assert "mean" in found.settings["editor"]
    assert found.settings["positions"] == "'prompt_last'"
    # The topic head works at the think tags, and only at the last row of the prompt was it removed.
    assert found.table["tested"].sum() == 3
    with pytest.raises(UnknownHead):
        rl.refusal_heads(*bench, **BRIEF, candidates=[(7, 0)])
    with pytest.raises(StatisticsError, match="n_test=0"):
        rl.refusal_heads(*bench, search=rl.HeadSearch(n_test=0))


def test_plain_strings_are_twins_by_their_order(bench) -> None:
    model, chat, harmful, harmless = bench
    pairs = [(one.text, other.text) for one, other in zip(harmful, harmless, strict=True)][::6]
    search = rl.HeadSearch(limit=24, n_random_sets=2)
    found = rl.refusal_heads(
        model, chat, *map(list, zip(*pairs, strict=True)), conditions=("off",), search=search
    )
    assert found.effects.sizes["harmful_prompt"] == found.effects.sizes["harmless_prompt"] == 24
    assert set(found.top()) == set(planted_truth(4).heads)
    assert found.settings["n_families_evaluate"] == 6  # told by the words that twins swap, as no record tells
    with pytest.raises(MissingTwin):
        rl.refusal_heads(model, chat, [one for one, _ in pairs], [other for _, other in pairs[:-2]], **BRIEF)


# --- refused before anything is computed ------------------------------------------------------------


def test_what_cannot_be_asked(bench, monkeypatch) -> None:
    model, chat, harmful, harmless = bench
    with pytest.raises(GateNotPassed, match="gate=False"):
        rl.refusal_heads(
            model, chat, *verdicts.with_labels_changed(harmful, harmless, np.ones(len(harmful))), **BRIEF
        )
    monkeypatch.setattr("rim_lens.measures.heads.refusing._measured", None)
    with pytest.raises(ConditionError, match="'open'"):
        rl.refusal_heads(*bench, **BRIEF, read_in="open")
    with pytest.raises(MissingTwin, match="twin"):
        rl.refusal_heads(model, chat, harmful, harmless[::2], **BRIEF)
    one_verb = [p for p in harmful if p.family.startswith("make ")]
    twins = [p for p in harmless if p.family.startswith("make ")]
    with pytest.raises(NotEnoughData, match="1 families"):
        rl.refusal_heads(model, chat, one_verb, twins, **BRIEF)
    with pytest.raises(NotEnoughData):
        rl.refusal_heads(model, chat, [Prompt("1", "a")], [Prompt("2", "b")], **BRIEF)


# --- where there is nothing -------------------------------------------------------------------------


def test_random_models_are_seldom_called_refusing() -> None:
    rows = verdicts.random_rows(n_runs=5)
    n, hits = sum(row["n_runs"] for row in rows), sum(row["refusal"] for row in rows)
    assert n == 20
    assert hits <= 3  # 4 or more of 20 at .05: once in 60
    for row in rows:
        assert row["refusal"] == row["refusal_words"]  # the short way says what the whole call said
    assert rows[-1]["largest_effect"]["median"] > 1  # it is not for want of effects


def test_labels_exchanged_by_words_need_the_test_by_words() -> None:
    row = verdicts.permuted_row(0, n_runs=40)
    assert {unit: row[unit]["n_runs"] for unit in verdicts.UNITS} == {
        "request": 40,
        "conjunction": 40,
        "words": 64,
    }
    assert row["words"]["words"] <= 0.05 * 64 < row["words"]["conjunction"]
    assert row["request"]["words"] <= 6  # 7 or more of 40 at .05: once in 300
    assert row["conjunction"]["words"] <= 6


def test_exchanging_labels_in_the_table_is_exchanging_the_words_of_requests() -> None:
    model = rl.load_model("toy")
    harmful, twins = verdicts.toy_requests()
    changed = np.random.default_rng(0).random(len(harmful)) < 0.5
    found = verdicts.ungated(model, *verdicts.with_labels_changed(harmful, twins, changed))
    kept = {str(name) for name in found.effects["harmful_prompt"].values}
    place = [index for index, prompt in enumerate(harmful) if prompt.id in kept]
    effects = verdicts.toy_effects(model, [harmful[i] for i in place], [twins[i] for i in place])
    now, then = (
        {head: np.where(changed[place], two[head], one[head]) for head in one}
        for one, two in (effects, effects[::-1])
    )
    said = verdicts.verdicts(now, then, list(found.effects["family"].values))
    assert set(said["heads"]) == verdicts._called(found)
    assert said["p_specific"] == found.table["p_specific"].min()
    table = found.table.set_index(["layer", "head"])
    for head in now:
        assert now[head].mean() == pytest.approx(table.loc[head, "effect"], abs=1e-4)
        assert then[head].mean() == pytest.approx(table.loc[head, "effect_twins"], abs=1e-4)


# --- the page ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evidence():
    return json.loads(verdicts.EVIDENCE.read_text(encoding="utf-8"))


def test_the_page_is_made_from_the_evidence(evidence) -> None:
    assert verdicts.PAGE.read_text(encoding="utf-8") == verdicts.page(evidence)


def test_the_evidence_shows_what_was_asked_of_it(evidence) -> None:
    assert len(evidence["planted"]) >= 20
    for row in evidence["planted"]:
        assert (row["precision"], row["recall"], row["decoy"], row["sink"]) == (
            1,
            1,
            ["positional"],
            ["sink"],
        )
    n, hits = (sum(row[name] for row in evidence["random"]) for name in ("n_runs", "refusal"))
    assert n >= 200
    assert hits <= 0.05 * n + 2 * math.sqrt(0.05 * 0.95 * n)
    assert (
        [row["seed"] for row in evidence["permuted"]]
        == [row["seed"] for row in evidence["toy"]]
        == list(range(6))
    )
    for row in evidence["permuted"]:
        for unit in verdicts.UNITS:
            runs = row[unit]["n_runs"]
            assert row[unit]["words"] <= 0.05 * runs + 2.5 * math.sqrt(0.05 * 0.95 * runs)
