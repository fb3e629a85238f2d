"""Figures of removed, edited and compared heads, held to the numbers they are drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from rim_lens.errors import StatisticsError
from rim_lens.measures.heads.comparing import HeadComparison
from rim_lens.measures.heads.removal import RemovalEffects
from rim_lens.measures.removal_table import DIFFERENCE
from rim_lens.study import StudyResult
from rim_lens.views.plots import compared_heads, removal_beside_random, restored_refusal


def panel(figure: Any, title: str) -> dict[str, Any]:
    """Traces by name of the panel below a title, found by where that title stands and not by the order of drawing."""
    note = next(note for note in figure.layout.annotations if note.text.startswith(title))
    for trace in figure.data:
        x, y = (
            figure.layout[axis + "axis" + (getattr(trace, axis + "axis") or axis)[1:]].domain for axis in "xy"
        )
        if abs(sum(x) / 2 - note.x) < 1e-6 and abs(y[1] - note.y) < 1e-6:
            break
    else:
        raise AssertionError(f"no panel stands below {title!r}")
    return {one.name: one for one in figure.data if (one.xaxis, one.yaxis) == (trace.xaxis, trace.yaxis)}


def test_changes_stand_in_the_panel_of_their_measure_beside_every_random_set(toy_study: StudyResult) -> None:
    removal = toy_study.removal
    assert removal is not None
    figure = removal_beside_random(toy_study)
    for measure, kind, title, name in (
        ("score", "harmful", "refusal score (n = ", "harmful requests"),
        ("refuse", "harmless", "replies that refuse", "their harmless twins"),
        ("specificity", DIFFERENCE, "harmful minus twin", "harmful minus twin"),
        ("correct", "reasoning", "right answers", "reasoning questions"),
        ("kl", "neutral", "KL on neutral text", "neutral text"),
    ):
        trace = panel(figure, title)[name]
        # From the numbers of each prompt, not from the table.
        rows = removal.rows[(removal.rows["measure"] == measure) & (removal.rows["kind"] == kind)]
        means = (rows["after"] - rows["before"]).groupby(rows["condition"]).mean()
        told = {label[0]: value for label, value in zip(trace.customdata, trace.y, strict=True)}
        assert told == pytest.approx(means.to_dict())
        ticks = dict(zip(figure.layout.xaxis.ticktext, figure.layout.xaxis.tickvals, strict=True))
        assert all(abs(ticks[one[0]] - x) < 0.5 for one, x in zip(trace.customdata, trace.x, strict=True))
    drawn = sum(len(trace.x) for trace in figure.data if trace.name == "a random set")
    shown = {"score", "specificity", "refuse", "comply", "other", "correct", "answer", "kl"}
    assert drawn == removal.sets["measure"].isin(shown).sum()


def test_the_range_of_random_sets_is_drawn_where_there_are_ten() -> None:
    row = {
        "kind": "harmful",
        "condition": "off",
        "n": 9,
        "p": 0.1,
        "before": 1.0,
        "after": 0.0,
        "change": -1.0,
    }
    row |= {"change_low": -2.0, "change_high": 0.5, "random_low": -0.3, "random_high": 0.2}
    table = pd.DataFrame(
        [row | {"measure": "score", "n_controls": 10}, row | {"measure": "refuse", "n_controls": 9}]
    )
    sets = pd.DataFrame([{"measure": "score", "kind": "harmful", "condition": "off", "change": 0.1}] * 10)
    figure = removal_beside_random(RemovalEffects(table, sets, pd.DataFrame(), {}))
    (bars,) = [trace for trace in figure.data if trace.mode == "lines"]
    assert bars.y == (-0.3, 0.2, None)
    mark = panel(figure, "replies that refuse")["harmful requests"]
    assert (mark.error_y.array, mark.error_y.arrayminus) == ((1.5,), (1.0,))


def restored_table() -> pd.DataFrame:
    lines = []
    for measure, kind, off, baseline, restored in (
        ("score", "harmful", 4.0, -6.0, 0.5),
        ("score", "harmless", -5.0, -6.0, np.nan),
        ("specificity", DIFFERENCE, 9.0, 0.0, 0.2),
        ("refuse", "harmful", 1.0, 0.0, 0.25),
    ):
        for condition in ("careful", "filler"):
            line = {"edit": "block", "measure": measure, "kind": kind, "condition": condition, "n": 11}
            line |= {"off": off, "baseline": baseline, "edited": baseline + 5, "effect": 5.0, "p": 0.01}
            line |= {"effect_low": 4.0, "effect_high": 7.0, "n_controls": 20 if measure != "refuse" else 2}
            line |= {"random_low": -1.0, "random_high": 2.0, "state": "measured"}
            share = np.nan if condition == "filler" else restored
            line |= {"restored": share, "restored_low": share - 0.1, "restored_high": share + 0.2}
            lines.append(line)
    lines.append(
        lines[0] | {"edit": "patch", "effect": np.nan, "restored": np.nan, "state": "no counterpart"}
    )
    return pd.DataFrame(lines)


def test_shares_and_their_random_ranges_are_of_the_same_loss() -> None:
    figure = restored_refusal(restored_table())
    shares = panel(figure, "careful: share")
    assert shares["score, harmful requests"].y == (0.5,)
    assert shares["score, harmful requests"].error_y.array == pytest.approx((0.2,))
    assert shares["harmful requests refused in writing"].y == (0.25,)
    assert "score, harmless twins" not in shares
    bars = [trace for trace in figure.data if trace.mode == "lines" and trace.xaxis == "x"]
    # −1 to 2 nats, of 10 nats lost on harmful requests and of 9 in the difference; two written sets are no range.
    assert [trace.y for trace in bars] == [
        pytest.approx((-0.1, 0.2, None)),
        pytest.approx((-1 / 9, 2 / 9, None)),
    ]
    effects = panel(figure, "filler: effect")
    assert effects["score, harmless twins"].y == (5.0,)
    assert effects["score, harmless twins"].error_y.arrayminus == (1.0,)
    assert "no loss is shown" in [note.text for note in figure.layout.annotations]
    assert list(figure.layout.xaxis.ticktext) == ["block", "patch"]  # the impossible edit keeps its place


def test_nothing_removed_restored_or_compared_is_no_figure(planted: Any) -> None:
    study = planted()
    for draw, said in (
        (removal_beside_random, "removed no heads"),
        (restored_refusal, "nothing was restored"),
        (compared_heads, "no heads of a tuned model"),
    ):
        with pytest.raises(StatisticsError, match=said):
            draw(study)


def comparison() -> HeadComparison:
    table = pd.DataFrame(
        {
            "layer": [0, 1, 2, 3, 4],
            "head": [5, 1, 2, 0, 3],
            "verdict_base": ["refusal", "refusal", "none", "sink", "general"],
            "verdict_tuned": ["refusal", "none", "refusal", "none", "none"],
            "effect_base": [-8.0, -4.0, -0.1, 0.0, 0.01],
            "effect_tuned": [-7.0, -0.2, -3.0, 0.1, -0.4],
            "change": [1.0, 3.8, -2.9, 0.1, -0.4],
            "p": 0.5,
        }
    )
    for name in ("effect_base", "effect_tuned", "change"):
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 1, table[name] + 0.5
    return HeadComparison(table, {}, {}, {}, {"n": 24})


def test_heads_lie_at_both_effects_with_both_intervals_in_the_colour_of_what_became_of_them() -> None:
    figure = compared_heads(comparison())
    there = {trace.name: (trace.x, trace.y) for trace in figure.data}
    assert there == {
        "refusal in both (1)": ((-8.0,), (-7.0,)),
        "refusal in the base only (1)": ((-4.0,), (-0.2,)),
        "refusal in the tuned only (1)": ((-0.1,), (-3.0,)),
        "general in one or both (1)": ((0.01,), (-0.4,)),
        "no effect shown in either (1)": ((0.0,), (0.1,)),
    }
    assert (
        len({trace.marker.color for trace in figure.data})
        == len({trace.marker.symbol for trace in figure.data})
        == 5
    )
    for trace in figure.data:
        for bars in (trace.error_x, trace.error_y):
            assert (bars.array, bars.arrayminus) == (pytest.approx((0.5,)), pytest.approx((1.0,)))
    (line,) = figure.layout.shapes
    assert (line.x0, line.x1) == (line.y0, line.y1)
    names = {text for trace in figure.data for text in trace.text if text}
    assert names == {"L0H5", "L1H1", "L2H2", "L4H3"}  # L3H0 lies where L4H3 is named
    assert "n = 24 requests" in figure.layout.xaxis.title.text


def test_the_tuned_model_of_a_study_is_taken_by_name(toy_study: StudyResult) -> None:
    ((name, found),) = toy_study.compared.items()
    figure = compared_heads(toy_study, name)
    assert name in figure.layout.yaxis.title.text
    drawn = {pair for trace in figure.data for pair in zip(trace.x, trace.y, strict=True)}
    assert drawn == set(zip(found.table["effect_base"], found.table["effect_tuned"], strict=True))
    with pytest.raises(StatisticsError, match=f"there are {name}"):
        compared_heads(toy_study, "another")
