from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rim_lens.study import StudyResult
from rim_lens.views import numbers, plots
from rim_lens.views.plots.style import CONDITIONS, OUTCOMES, SPANS

Make = Callable[..., StudyResult]
ALL = [getattr(plots, name) for name in plots.__all__]


def traces(figure: Any, **wanted: Any) -> list[Any]:
    return [
        trace for trace in figure.data if all(getattr(trace, key) == value for key, value in wanted.items())
    ]


@pytest.mark.parametrize("draw", ALL, ids=lambda draw: draw.__name__)
def test_every_figure_draws_in_both_themes_with_named_axes(draw: Any, toy_study: StudyResult) -> None:
    light, dark = draw(toy_study), draw(toy_study, theme="dark")
    assert light.data
    ink = [figure.layout.template.layout.font.color for figure in (light, dark)]
    assert ink[0] != ink[1]
    titles = " ".join(axis.title.text or "" for axis in (*light.select_xaxes(), *light.select_yaxes()))
    where = titles + " ".join(note.text for note in light.layout.annotations)
    assert "n = " in where
    # Without its template a figure is the same in both themes, so that a page can switch.
    bare = [json.loads(figure.to_json()) for figure in (light, dark)]
    for figure in bare:
        figure["layout"].pop("template")
    assert bare[0] == bare[1]


def test_bars_are_the_counted_shares(planted: Make) -> None:
    result = planted()
    figure = plots.outcomes(result)
    refuse = traces(figure, name="refuse")[0]
    assert list(refuse.x)[:5] == list(result.conditions)
    assert list(refuse.y)[:5] == [24 / 24, 0, 23 / 24, 14 / 24, 9 / 24]
    stacked = np.sum([traces(figure, name=name)[0].y for name in OUTCOMES], axis=0)
    assert np.allclose(stacked, 1)


def test_maps_hold_masses_and_their_difference_for_every_span(planted: Make) -> None:
    result = planted()
    figure = plots.attention_map(result, "careful", "off")
    a, b, difference = (np.array(trace.z) for trace in traces(figure, type="heatmap"))
    assert np.allclose(a - b, difference, atol=1e-5)
    assert figure.layout.yaxis.autorange == "reversed"
    for button in figure.layout.updatemenus[0].buttons:
        span = button.label.removeprefix("span: ")
        wanted = numbers.attention_mass(result, "harmful", "careful").sel(span=span)
        assert np.allclose(button.args[0]["z"][0], wanted, atol=1e-5)
    spans = {button.label.removeprefix("span: ") for button in figure.layout.updatemenus[0].buttons}
    assert "cot" not in spans  # off has no CoT


def test_masses_of_a_head_stack_to_one(planted: Make) -> None:
    figure = plots.attention_by_head(planted(), heads=[(0, 1)])
    stacks = np.sum([[value or 0.0 for value in trace.y] for trace in figure.data], axis=0)
    assert np.allclose(stacks, 1, atol=1e-5)


def test_the_set_stands_beside_all_its_controls(planted: Make) -> None:
    result = planted()
    figure = plots.head_set(result)
    assert len(figure.data[0].x) == result.heads.set["n_controls"]
    assert figure.data[-1].x == (result.heads.set["effect"]["estimate"],)


def test_spans_conditions_and_outcomes_have_colours_of_their_own() -> None:
    for colours in (SPANS, CONDITIONS, OUTCOMES):
        assert len(set(colours.values())) == len(colours)
    from rim_lens.chat.spans import ATOMS
    from rim_lens.study.stages import CONDITIONS as MEASURED

    assert set(SPANS) == set(ATOMS)
    assert set(CONDITIONS) == set(MEASURED)


@pytest.mark.parametrize("draw", [plots.head_set, plots.attention_by_head])
def test_pictures_of_found_heads_need_found_heads(draw: Any, planted: Make) -> None:
    with pytest.raises(ValueError, match="no head was found"):
        draw(planted(found=()))


def test_a_shift_needs_a_tuned_model(planted: Make) -> None:
    with pytest.raises(ValueError, match="no tuned model"):
        plots.activation_shift(planted(tuned={}))
