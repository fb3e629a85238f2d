"""Conditions compared: every column against the measure run by hand, on the toy whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.errors import ConditionError, StatisticsError
from rim_lens.measures import bootstrap_interval, refusal_prefix_score, sign_flip_test


@pytest.fixture(scope="module")
def toy() -> Any:
    model = rl.load_model("toy")
    return (
        model,
        rl.ChatFormat.from_model(model),
        rl.load_prompts("harmful", language="toy", split="select")[::2],
    )


@pytest.mark.parametrize("measure", ["score", "prefix"])
def test_scores_by_hand(toy: Any, measure: str) -> None:
    model, chat, harmful = toy
    editor = rl.AblateHeads([(0, 5)])
    table = rl.compare_conditions(model, chat, harmful, ["deviate"], editor, measure=measure).set_index(
        "condition"
    )
    assert table.index.tolist() == ["off", "deviate", "filler", "unrelated"]
    read = rl.refusal_score if measure == "score" else refusal_prefix_score
    values = {}
    for name in table.index:
        think = "off" if name == "off" else chat.cots(harmful, name)
        values[name] = read(model, chat.render(harmful, think=think), rl.AblateHeads([(0, 5)])).values
        assert table.loc[name, "value"] == pytest.approx(values[name].mean(), abs=1e-6)
    families = [prompt.family for prompt in harmful]
    for name in ("deviate", "filler", "unrelated"):
        effect = values[name] - values["off"]
        interval = bootstrap_interval(effect, families)
        assert table.loc[name, ["effect", "low", "high"]].tolist() == pytest.approx(
            [float(interval.estimate), float(interval.low), float(interval.high)], abs=1e-5
        )
        assert table.loc[name, "p"] == pytest.approx(float(sign_flip_test(effect, families=families).p))
        assert table.loc[name, "p_corrected"] >= table.loc[name, "p"]
    for control in ("filler", "unrelated"):
        beyond = values["deviate"] - values[control]
        interval = bootstrap_interval(beyond, families)
        assert table.loc["deviate", f"beyond_{control}"] == pytest.approx(beyond.mean(), abs=1e-5)
        assert table.loc["deviate", f"beyond_{control}_low"] == pytest.approx(float(interval.low), abs=1e-5)
    assert table.loc[["off", "filler", "unrelated"], "beyond_filler"].isna().all()
    assert np.isnan(table.loc["off", "effect"])
    assert table["added"].tolist() == [True, False, True, True]
    assert table["control"].tolist() == [False, False, True, True]
    assert table.attrs["added"] == ["off", "filler", "unrelated"]
    assert "off, filler, unrelated were added" in table.attrs["note"]
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_what_is_written_inside_the_block_and_after_it(toy: Any) -> None:
    model, chat, harmful = toy
    table = rl.compare_conditions(
        model,
        chat,
        harmful,
        ["open", "heuristic:begun", "confirm:statement"],
        max_new_tokens=2,
        max_cot_tokens=8,
        close_unfinished=True,
    ).set_index("condition")
    assert {"filler", "filler:heuristic:begun", "unrelated:confirm:statement"} <= set(table.index)
    for name, batch in rl.render_conditions(chat, harmful, list(table.index)).items():
        out = rl.generate(model, batch, max_new_tokens=2, max_cot_tokens=8, close_unfinished=True)
        line = table.loc[name]
        assert line["value"] == np.mean([verdict == "refuse" for verdict in out.outcome])
        assert [line["refuse"], line["comply"], line["other"]] == [
            out.outcome.count(verdict) for verdict in ("refuse", "comply", "other")
        ]
        assert line["refuse_in_think"] + line["refuse_after"] == line["refuse"]
        assert line["refuse_in_think"] == sum(
            place == "think" and v == "refuse" for v, place in zip(out.outcome, out.where, strict=True)
        )
        assert line["closed_by_force"] == sum(out.closed_by_force)
        assert line["cot_tokens"] == float(out.batch.spans["cot"].sum(dim=1).double().mean())
    assert table.loc["off", "value"] > 0.9
    assert table.loc["open", "effect"] < -0.9  # a chain of thought ends the toy's refusal …
    assert table.loc["open", "beyond_filler"] > -0.2  # … and so does filler
    assert table.loc["confirm:statement", "cot_tokens"] == 1


def test_texts_and_measures_of_ones_own(toy: Any) -> None:
    model, chat, harmful = toy
    asked: list[str] = []

    def lengths(batch: Any) -> list[int]:
        asked.append(batch.name)
        return batch.lengths.tolist()

    table = rl.compare_conditions(model, chat, harmful, [], measure=lengths, texts={"mine": "bread soup"})
    assert asked == table["condition"].tolist() == ["off", "mine", "filler:mine", "unrelated:mine"]
    assert table["effect"].tolist()[1:] == [
        2.0,
        2.0,
        2.0,
    ]  # controls are as long as the text, not as a careful chain
    assert table["beyond_filler"][1] == 0.0
    assert table.attrs["measure"] == "lengths"
    with pytest.raises(StatisticsError, match="1 numbers for"):
        rl.compare_conditions(model, chat, harmful, ["careful"], measure=lambda batch: [1.0])


def test_an_effect_that_is_none_has_no_small_p(toy: Any) -> None:
    model, chat, harmful = toy
    table = rl.compare_conditions(
        model, chat, harmful, ["careful"], measure=lambda batch: np.ones(len(batch))
    )
    assert table["effect"].tolist()[1:] == [0.0, 0.0, 0.0]
    assert (table["p_corrected"][1:] == 1.0).all()


def test_what_is_refused(toy: Any) -> None:
    model, chat, harmful = toy
    with pytest.raises(ConditionError, match="leaves the think block open"):
        rl.compare_conditions(model, chat, harmful, ["open"], measure="score")
    with pytest.raises(ConditionError, match="is unknown"):
        rl.compare_conditions(model, chat, harmful, ["careful"], measure="vibes")
    editor = rl.AblateHeads([(0, 5)])
    with pytest.raises(ConditionError, match="would not be active"):
        rl.compare_conditions(
            model, chat, harmful, ["careful"], editor, measure=lambda batch: [0.0] * len(batch)
        )
    for taken in ("off", "careful", "filler:mine"):
        with pytest.raises(ConditionError, match="another name"):
            rl.compare_conditions(model, chat, harmful, [], texts={taken: "bread soup"})
    with pytest.raises(ConditionError, match="no think condition"):
        rl.compare_conditions(model, chat, harmful, ["careless"])


def test_one_family_has_no_interval(toy: Any) -> None:
    model, chat, harmful = toy
    family = [prompt for prompt in harmful if prompt.family == harmful[0].family]
    table = rl.compare_conditions(model, chat, family, ["careful"], measure="score")
    assert table["low"].isna().all()
    assert table["effect"][1] < 0
