"""Refusal brought back under a chain of thought where it is planted how, and the numbers by hand."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import rim_lens as rl
from rim_lens.errors import ConditionError, StudyFolderError
from rim_lens.measures.heads.restoring import COLUMNS, EDITS, restoring
from rim_lens.measures.stats import resampled_requests
from rim_lens.measures.twins import families_by_swap
from rim_lens.organisms.planted import DECOY_HEAD, READER
from tests.measures.refusal.test_direction import toy

FEW: dict[str, Any] = {"n_random_sets": 5, "n_written": 2, "max_new_tokens": 3}


@cache
def asked() -> tuple[list[rl.Prompt], ...]:
    return tuple(
        rl.load_prompts(kind, language="toy", split="evaluate")[::9] for kind in ("harmful", "harmless")
    )


def row(table: pd.DataFrame, edit: str, kind: str, measure: str) -> dict[str, Any]:
    here = table[(table["edit"] == edit) & (table["kind"] == kind) & (table["measure"] == measure)]
    assert len(here) == 1
    return here.iloc[0].to_dict()


@pytest.mark.parametrize("condition", ["careful", "filler", "unrelated"])
def test_the_planted_reader_restores_refusal_and_the_decoy_none(condition: str) -> None:
    """Any chain of thought takes the reader's attention away, so all three edits undo it, and filler is no exception."""
    few = FEW | {"n_random_sets": 3, "n_written": 1}
    found = {
        head: restoring(*toy("planted"), [head], *asked(), condition, **few) for head in (READER, DECOY_HEAD)
    }
    for head, table in found.items():
        assert tuple(table.columns) == COLUMNS
        assert set(table["state"]) == {"measured"}
        assert set(table["condition"]) == {condition}
        for edit in EDITS:
            harmful = row(table, edit, "harmful", "refuse")
            assert (harmful["off"], harmful["baseline"]) == (1, 0)
            expected = 1.0 if head == READER else 0.0
            assert harmful["edited"] == harmful["restored"] == expected
            assert row(table, edit, "harmless", "refuse")["edited"] == 0
            score = row(table, edit, "harmful", "score")
            assert score["restored"] == pytest.approx(expected, abs=0.05)
            assert score["restored_low"] <= score["restored"] <= score["restored_high"]
            assert np.isnan(row(table, edit, "harmless", "score")["restored"])  # no gap to close there
            specific = row(table, edit, "harmful − harmless", "specificity")
            assert specific["restored"] == pytest.approx(expected, abs=0.05)
            assert specific["effect"] == pytest.approx(
                score["effect"] - row(table, edit, "harmless", "score")["effect"]
            )
            if head == READER:
                assert harmful["random"] == 0
                assert score["percentile"] == 100


def test_numbers_by_hand() -> None:
    """The toy, where edits restore part, or nothing, or go the other way."""
    model, chat = toy("toy")
    harmful, harmless = asked()
    heads = [(0, 1), (1, 5)]
    table = restoring(model, chat, heads, harmful, harmless, **FEW)
    controls = [[(layer, head) for layer, head in control] for control in table.attrs["controls"]]
    off, under = (chat.render(harmful, think=think) for think in ("off", chat.cots(harmful, "careful")))
    tags = under.spans["think_open"] | under.spans["think_close"]
    last = under.spans[
        "think_close"
    ]  # the toy answers from the closing tag: the one row of the prompt after the CoT

    def edited(edit: str, its: list[Any]) -> Any:
        if edit == "block":
            return rl.BlockAttention(last, "cot", its)
        if edit == "move":
            return rl.MoveAttention(its, "cot", to=0.0, from_=tags, query="prompt_last")
        return rl.PatchHeads(its, off, "all")

    level, baseline = rl.refusal_score(model, off).values, rl.refusal_score(model, under).values
    families = families_by_swap(harmful, harmless)
    for edit in EDITS:
        found = row(table, edit, "harmful", "score")
        values = rl.refusal_score(model, under, edited(edit, heads)).values
        random = [
            float((rl.refusal_score(model, under, edited(edit, control)).values - baseline).mean())
            for control in controls
        ]
        assert found["off"] == pytest.approx(level.mean(), abs=1e-5)
        assert found["baseline"] == pytest.approx(baseline.mean(), abs=1e-5)
        assert found["edited"] == pytest.approx(values.mean(), abs=1e-4)
        assert found["random"] == pytest.approx(np.mean(random), abs=1e-4)
        share = (values.mean() - baseline.mean()) / (level.mean() - baseline.mean())
        assert found["restored"] == pytest.approx(share, abs=1e-4)
        draws = [
            (values[rows] - baseline[rows]).mean() / (level[rows] - baseline[rows]).mean()
            for rows in resampled_requests(families, 2000, seed=0)
        ]
        low, high = np.quantile(draws, [0.025, 0.975])
        assert found["restored_low"] == pytest.approx(low, abs=1e-4)
        assert found["restored_high"] == pytest.approx(high, abs=1e-4)
        written = rl.generate(
            model,
            under,
            {
                "block": rl.BlockAttention("later", "cot", heads),
                "move": rl.MoveAttention(heads, "cot", to=0.0, from_=tags, query="later"),
            }.get(edit, edited(edit, heads)),
            max_new_tokens=3,
        )
        # Two of the six requests differ from their twins by the same words, so they are one witness.
        specific = row(table, edit, "harmful − harmless", "specificity")
        assert (found["n_families"], specific["n_families"]) == (5, 5)
        refused = row(table, edit, "harmful", "refuse")
        assert refused["edited"] == pytest.approx(np.mean([one == "refuse" for one in written.outcome]))
        assert refused["n_controls"] == 2


def test_what_is_impossible_is_said_and_not_counted(tmp_path: Path) -> None:
    """A head with all of its attention on the chain of thought cannot lose it; others of its layer can."""
    model, chat = toy("planted")
    few: dict[str, Any] = FEW | {"edits": ["block"], "n_written": 0, "folder": str(tmp_path)}
    everything = rl.BlockAttention("later", "cot", [READER])

    def broken(rows: Any, key: Any, heads: Any) -> Any:
        if list(heads) == [READER] or list(heads) == [(1, 0)]:
            return rl.MoveAttention(heads, "cot", by=1.0)  # nothing has so much to give
        return rl.BlockAttention(rows, key, heads)

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(restoring.__globals__, "BlockAttention", broken)
        table = restoring(model, chat, [READER], *asked(), **few | {"folder": None})
        beside = restoring(model, chat, [DECOY_HEAD], *asked(), **few | {"folder": None, "n_random_sets": 7})
    impossible = row(table, "block", "harmful", "score")
    assert "cannot bring the mass" in impossible["state"]
    assert np.isnan(impossible["effect"])
    for kind, measure in (("harmful", "score"), ("harmful − harmless", "specificity")):
        assert "cannot bring the mass" in row(table, "block", kind, measure)["state"]
        assert row(beside, "block", kind, measure)["n_controls"] == 5  # of 7
    kept = restoring(model, chat, [READER], *asked(), **few)
    again = restoring(model, chat, [READER], *asked(), **few)
    pd.testing.assert_frame_equal(kept, again)
    values = rl.refusal_score(
        model, chat.render(asked()[0], think=chat.cots(asked()[0], "careful")), everything
    )
    assert row(kept, "block", "harmful", "score")["edited"] == pytest.approx(float(values.mean()), abs=1e-4)
    with pytest.raises(StudyFolderError, match="another study"):
        restoring(model, chat, [DECOY_HEAD], *asked(), **few)


def test_a_text_of_ones_own() -> None:
    table = restoring(*toy("planted"), [READER], *asked(), "mine", text="1 2 > 3", edits=["move"], **FEW)
    assert set(table["condition"]) == {"mine"}
    assert row(table, "move", "harmful", "refuse")["restored"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition": "open"}, "holds no given chain"),
        ({"condition": "off"}, "holds no given chain"),
        ({"condition": "nonsense"}, "no think condition"),
        ({"edits": ["block", "cut"]}, "there are block, move, patch"),
        ({"edits": []}, "there are block"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConditionError, match=message):
        restoring(*toy("planted"), [READER], *asked(), **FEW | options)


def test_what_was_restored_is_read_back_with_what_was_asked(tmp_path: Path) -> None:
    few = FEW | {"n_random_sets": 2, "n_written": 0}
    table = restoring(*toy("planted"), [READER], *asked(), edits=("block",), openers=("REFUSE",), **few)
    assert table["restored"].isna().any()
    assert table["percentile"].isna().any()
    rl.save_restored(table, tmp_path / "new")
    again = rl.load_restored(tmp_path / "new")
    pd.testing.assert_frame_equal(again, table)
    assert again.attrs == table.attrs
    assert again.attrs["heads"] == [list(READER)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "rl.save_restored"),
        ('{"format_version": 1, "table"', "rl.save_restored"),
        ("3", "rl.save_restored"),
        ('{"format_version": 0}', "format version 0"),
        (
            '{"format_version": 1, "table": {"columns": {"kind": "object"}, "rows": []}, "settings": {}}',
            "no column measure, effect, restored",
        ),
    ],
)
def test_other_files_hold_nothing_restored(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "restored.json").write_text(content)
    with pytest.raises(StudyFolderError, match=said):
        rl.load_restored(tmp_path)
