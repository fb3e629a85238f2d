"""What removing heads does, against the measures called by hand, the plain model, and where the truth is planted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.errors import (
    AnswerError,
    ConditionError,
    NotEnoughData,
    StatisticsError,
    StudyFolderError,
    UnknownHead,
)
from rim_lens.measures.controls import percentile_among
from rim_lens.measures.forced import answer_reading, divergence_reading, text_rows
from rim_lens.measures.heads.removal import RemovalEffects
from rim_lens.measures.heads.removing import removal_effects
from rim_lens.measures.readings import refusal_reading
from rim_lens.measures.removal_table import written_reading
from rim_lens.measures.stats import bootstrap_interval, sign_flip_test
from rim_lens.measures.twins import families_by_swap
from rim_lens.organisms.planted import DECOY_HEAD, READER, TOPIC_HEAD
from tests.measures.refusal.test_direction import toy
from tests.speaking import REQUESTS, Spoken, ids_of, logits_alone

KINDS = ("harmful", "harmless", "reasoning")
FEW: dict[str, Any] = {"n_random_sets": 5, "n_written": 2, "max_new_tokens": 3}


@cache
def asked() -> tuple[list[rl.Prompt], ...]:
    return tuple(rl.load_prompts(kind, language="toy", split="evaluate")[::9] for kind in KINDS)


@cache
def removed(head: tuple[int, int]) -> RemovalEffects:
    conditions = ["off", "careful", "filler", "open"]
    return removal_effects(
        *toy("planted"),
        [head],
        *asked(),
        conditions=conditions,
        **FEW | {"n_random_sets": 4, "n_written": 1, "max_new_tokens": 10},
    )


def test_removing_the_planted_reader_flips_outcomes_and_the_decoy_none() -> None:
    reader, decoy = removed(READER), removed(DECOY_HEAD)
    off = reader.row("refuse", "harmful", "off")
    assert (off["before"], off["after"], off["change"], off["percentile"]) == (1, 0, -1, 100)
    assert reader.row("comply", "harmful", "off")["after"] == 1
    assert reader.row("score", "harmful", "off")["change"] < -10
    assert reader.row("specificity", "harmful − harmless", "off")["change"] < -10
    for found in (reader, decoy):  # nothing is refused there, so that nothing can be lost
        for condition in ("careful", "filler", "open"):
            assert found.row("refuse", "harmful", condition)["change"] == 0
        assert found.row("refuse", "harmless", "off")["after"] == 0
        assert found.row("correct", "reasoning", "off")["change"] == 0
        assert found.row("kl", "neutral", "careful")["after"] < 1e-3
    assert decoy.row("refuse", "harmful", "off")["change"] == 0
    assert abs(decoy.row("score", "harmful", "off")["change"]) < 0.5
    # the sets beside the decoy hold the reader, those beside the reader do not
    assert reader.row("score", "harmful", "off")["random_low"] > -0.5
    assert "L1H1" not in set(reader.sets["heads"])


def test_divergence_tells_a_head_that_is_used_on_a_text_from_one_that_is_not() -> None:
    model, chat = toy("planted")
    kl = divergence_reading(model, chat.render(asked()[0], think="off"))
    assert kl([rl.AblateHeads([TOPIC_HEAD])]).mean() > 0.5
    assert kl([rl.AblateHeads([DECOY_HEAD])]).mean() < 1e-3


def test_every_number_by_hand() -> None:
    """On the toy, where edits do more than flip one answer."""
    model, chat = toy("toy")
    harmful, harmless, reasoning = asked()
    heads = [(0, 1), (1, 5)]
    found = removal_effects(
        model, chat, heads, harmful, harmless, reasoning, conditions=["off", "careful", "open"], **FEW
    )
    controls = [[(layer, head) for layer, head in control] for control in found.settings["controls"]]
    assert len(controls) == 5
    assert all([layer for layer, _ in control] == [0, 1] for control in controls)
    batches = {
        kind: rl.render_conditions(chat, prompts, ["off", "careful", "open"])
        for kind, prompts in zip(KINDS, asked(), strict=True)
    }

    def shares(kind: str, condition: str, removing: list[Any], verdict: str) -> np.ndarray:
        editors = [rl.AblateHeads(removing)] if removing else []
        out = rl.generate(model, batches[kind][condition], *editors, max_new_tokens=3)
        rates = rl.refusal_rates(out)
        if verdict == "refuse":
            assert rates["refused"][0] == pytest.approx(np.mean([one == "refuse" for one in out.outcome]))
        return np.array([float(one == verdict) for one in out.outcome])

    def check(row: dict[str, Any], before: np.ndarray, after: np.ndarray, random: list[np.ndarray]) -> None:
        changes = [float((values - before).mean()) for values in random]
        assert row["before"] == pytest.approx(before.mean(), abs=1e-5)
        assert row["after"] == pytest.approx(after.mean(), abs=1e-5)
        assert row["change"] == pytest.approx((after - before).mean(), abs=1e-5)
        assert row["random"] == pytest.approx(np.mean(changes), abs=1e-5)
        assert row["n_controls"] == len(changes)
        assert row["percentile"] == pytest.approx(
            percentile_among((after - before).mean(), changes).percentile
        )

    for kind, condition, verdict in (
        ("harmful", "off", "refuse"),
        ("harmful", "open", "other"),
        ("harmless", "off", "comply"),
    ):
        values = [shares(kind, condition, removing, verdict) for removing in ([], heads, *controls[:2])]
        check(found.row(verdict, kind, condition), values[0], values[1], values[2:])
    families = families_by_swap(harmful, harmless)
    for condition in ("off", "careful"):
        batch = batches["harmful"][condition]
        values = [
            rl.refusal_score(model, batch, *([rl.AblateHeads(removing)] if removing else [])).values
            for removing in ([], heads, *controls)
        ]
        row = found.row("score", "harmful", condition)
        check(row, values[0], values[1], values[2:])
        interval = bootstrap_interval(values[1] - values[0], families)
        assert row["change_low"] == pytest.approx(float(interval.low), abs=1e-4)
        assert row["change_high"] == pytest.approx(float(interval.high), abs=1e-4)
        raw = sign_flip_test(values[1] - values[0], families=families)
        assert row["p"] >= float(raw.p)  # corrected over both conditions
    right = [
        rl.reasoning_accuracy(
            rl.generate(model, batches["reasoning"]["off"], *editors, max_new_tokens=3)
        ).value
        for editors in ([], [rl.AblateHeads(heads)])
    ]
    row = found.row("correct", "reasoning", "off")
    assert [row["before"], row["after"]] == pytest.approx(right)
    assert found.settings["neutral"] == "reasoning in careful"
    per_prompt = found.rows[
        (found.rows["measure"] == "score")
        & (found.rows["kind"] == "harmful")
        & (found.rows["condition"] == "off")
    ]
    assert per_prompt["prompt"].tolist() == [prompt.id for prompt in harmful]
    np.testing.assert_allclose(
        per_prompt["before"], rl.refusal_score(model, batches["harmful"]["off"]).values, atol=1e-5
    )


@pytest.mark.family_contract
def test_divergence_and_answers_against_the_plain_model(spoken_gqa: Spoken) -> None:
    """One prompt at a time, no padding, row by row, from the logits of the Hugging Face model."""
    prompts = [
        replace(prompt, answer=answer)
        for prompt, answer in zip(REQUESTS, ("3", "6 1", "0", "2", "5"), strict=True)
    ]
    model, chat, heads = spoken_gqa.model, spoken_gqa.chat, [(0, 1), (1, 4)]
    batch = chat.render(prompts, think="off")
    found = divergence_reading(model, batch)([rl.AblateHeads(heads)])
    said = answer_reading(model, batch, chat)
    answers = [said(), said([rl.AblateHeads(heads)])]
    for row, prompt in enumerate(prompts):
        ids, atoms = ids_of(batch, row), batch.atoms_of(row)
        total = []
        for place in range(len(ids)):
            last = place == len(ids) - 1
            if not last and atoms[place + 1] not in ("request", "cot", "answer"):
                continue
            plain, edited = (
                logits_alone(spoken_gqa.oracle, ids[: place + 1], removing).double().softmax(dim=-1)
                for removing in ([], heads)
            )
            total.append(float((plain * (plain.log() - edited.log())).sum()))
        assert len(total) == int(text_rows(batch)[row].sum()) == 1 + atoms.count("request")
        assert found[row] == pytest.approx(np.mean(total), rel=1e-3, abs=1e-7)
        for removing, values in zip(([], heads), answers, strict=True):
            sequence, log_p = list(ids), 0.0
            for token in chat.encode(str(prompt.answer)):
                log_p += float(
                    logits_alone(spoken_gqa.oracle, sequence, removing).double().log_softmax(-1)[token]
                )
                sequence.append(token)
            assert values[row] == pytest.approx(log_p, abs=1e-4)
    assert divergence_reading(model, batch)().tolist() == [0.0] * len(prompts)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_neutral_text_of_ones_own(tmp_path: Path) -> None:
    model, chat = toy("planted")
    harmful, harmless, _ = asked()
    few: dict[str, Any] = FEW | {"conditions": ["off"], "n_written": 0}
    texts = ["find tree please + 1 1 1", "study song now - 3 1 0"]
    found = removal_effects(model, chat, [READER], harmful, harmless, neutral=texts, **few)
    expected = divergence_reading(model, chat.render(texts))([rl.AblateHeads([READER])])
    assert found.row("kl", "neutral", "text")["after"] == pytest.approx(expected.mean())
    assert found.settings["neutral"] == "given texts"
    assert "correct" not in set(found.table["measure"])
    row = found.row("refuse", "harmful", "off")
    assert row["n_controls"] == 0
    assert np.isnan(row["percentile"])
    assert (
        removal_effects(model, chat, [READER], harmful, harmless, **few).settings["neutral"]
        == "harmless in off"
    )
    found.save(tmp_path)
    again = RemovalEffects.load(tmp_path)
    for name in ("table", "sets", "rows"):
        left, right = getattr(found, name), getattr(again, name)
        assert left.equals(right.astype(left.dtypes)), name
    assert again.settings == found.settings
    with pytest.raises(StudyFolderError, match="no readable result"):
        RemovalEffects.load(tmp_path / "elsewhere")


def test_a_folder_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, chat = toy("planted")
    harmful, harmless, _ = asked()
    few: dict[str, Any] = FEW | {"conditions": ["off"], "n_written": 1, "folder": tmp_path}
    first = removal_effects(model, chat, [READER], harmful, harmless, **few)
    monkeypatch.setitem(written_reading.__globals__, "generate", None)
    monkeypatch.setitem(refusal_reading.__globals__, "refusal_score", None)
    second = removal_effects(model, chat, [READER], harmful, harmless, **few)
    assert first.table.equals(second.table)
    with pytest.raises(StudyFolderError, match="another study"):
        removal_effects(model, chat, [DECOY_HEAD], harmful, harmless, **few)


@pytest.fixture(scope="module")
def found_heads() -> rl.RefusalHeads:
    every = [rl.load_prompts(kind, language="toy") for kind in KINDS[:2]]
    return rl.refusal_heads(
        *toy("planted"), *every, conditions=["off"], search=rl.HeadSearch(limit=10, n_random_sets=3)
    )


def test_requests_that_chose_the_heads_are_refused(found_heads: rl.RefusalHeads) -> None:
    model, chat = toy("planted")
    harmful, harmless, _ = asked()
    few: dict[str, Any] = FEW | {"conditions": ["off"], "n_written": 0}
    found = removal_effects(model, chat, found_heads, harmful, harmless, **few)
    assert found.settings["heads"] == [list(head) for head in sorted(found_heads.found)]
    used = [
        prompt
        for prompt in rl.load_prompts("harmful", language="toy", split="select")
        if prompt.id in found_heads.settings["select_ids"]
    ]
    assert len(used) == 10
    with pytest.raises(StatisticsError, match=r"1 of \d+ requests chose the heads"):
        removal_effects(model, chat, found_heads, [*harmful, used[3]], harmless, **few)
    with pytest.raises(
        StatisticsError, match=r"1 of \d+ requests chose the heads"
    ):  # also by its words alone
        removal_effects(model, chat, found_heads, [harmful[0].text, used[3].text], harmless, **few)
    cousin = replace(used[0], id="new", text=used[0].text.replace("please", "now") + " now")
    with pytest.raises(StatisticsError, match="of a family that chose"):
        removal_effects(model, chat, found_heads, [*harmful, cousin], harmless, **few)
    bare = replace(found_heads, settings={k: v for k, v in found_heads.settings.items() if k[:6] != "select"})
    with pytest.raises(StatisticsError, match="do not record"):
        removal_effects(model, chat, bare, harmful, harmless, **few)
    with pytest.raises(UnknownHead, match="no found set"):
        removal_effects(model, chat, replace(found_heads, found=()), harmful, harmless, **few)


def test_bad_input_is_named_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chat = toy("planted")
    harmful, harmless, reasoning = asked()

    def runs(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    for function, name in (
        (removal_effects, "head_effects"),
        (written_reading, "generate"),
        (refusal_reading, "refusal_score"),
        (divergence_reading, "all_logits"),
    ):
        monkeypatch.setitem(function.__globals__, name, runs)

    def call(heads: Any = (READER,), *kinds: Any, **options: Any) -> None:
        removal_effects(model, chat, heads, *(kinds or (harmful, harmless)), **FEW | options)

    with pytest.raises(UnknownHead, match="no head was given"):
        call([])
    with pytest.raises(UnknownHead):
        call([(7, 0)])
    with pytest.raises(NotEnoughData, match="no harmless requests"):
        call([READER], harmful, [])
    with pytest.raises(NotEnoughData, match="all 8 heads"):
        call([(1, head) for head in range(8)])
    with pytest.raises(ConditionError, match="none of the conditions"):
        call(conditions=["open"])
    with pytest.raises(ConditionError, match="no think condition"):
        call(conditions=["off", "nonsense"])
    with pytest.raises(AnswerError, match="no checked answer"):
        call([READER], harmful, harmless, [replace(reasoning[0], answer=None)], conditions=["off"])
    with pytest.raises(StatisticsError, match="n_written=-1"):
        call(n_written=-1)
    with pytest.raises(StatisticsError, match="0 random sets"):
        call(n_random_sets=0)
    with pytest.raises(NotEnoughData, match="list of texts"):
        call(neutral=[])
