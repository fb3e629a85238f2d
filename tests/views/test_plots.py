from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rim_lens.errors import StatisticsError
from rim_lens.study import StudyResult
from rim_lens.views import numbers, plots
from rim_lens.views.plots.style import CONDITIONS, OUTCOMES, SPANS

Make = Callable[..., StudyResult]
# What a figure is drawn from, where that is not the study itself.
OF_PART: dict[str, Callable[[StudyResult], Any]] = {
    "attention_pattern": lambda study: {
        "off": (("<think>", "</think>", "\n"), np.tril(np.ones((3, 3))) / [[1], [2], [3]]),
        "open": (("<think>", "n = 1"), [0.25, 0.75]),
    },
    "probe_curves": lambda study: study.probes(),
    "probes_without_heads": lambda study: study.probes_without_heads,
    "refusal_cliff": lambda study: study.cliffs,
}
# Figures of neurons, of entanglement, of checkpoints and of circuits take results of their own: test_neuron_plots.py, test_doses.py,
# test_checkpoint_report.py and test_circuit_plots.py draw them.
OF_NEURONS = {
    *("entanglement_rivals", "neuron_sweep", "neurons_by_layer"),
    *("dose_effects", "direct_and_total", "specification_curve"),
    *("circuit_graph", "circuit_shares"),
    *("lost_by_drift", "metrics_against_loss", "ras_beside_random", "training_course"),
}
ALL = [getattr(plots, name) for name in plots.__all__ if name not in OF_NEURONS]


def traces(figure: Any, **wanted: Any) -> list[Any]:
    return [
        trace for trace in figure.data if all(getattr(trace, key) == value for key, value in wanted.items())
    ]


@pytest.mark.parametrize("draw", ALL, ids=lambda draw: draw.__name__)
def test_every_figure_draws_in_both_themes_with_named_axes(draw: Any, toy_study: StudyResult) -> None:
    drawn = OF_PART.get(draw.__name__, lambda study: study)(toy_study)
    light, dark = draw(drawn), draw(drawn, theme="dark")
    assert light.data
    ink = [figure.layout.template.layout.font.color for figure in (light, dark)]
    assert ink[0] != ink[1]
    titles = " ".join(axis.title.text or "" for axis in (*light.select_xaxes(), *light.select_yaxes()))
    where = (
        titles + " ".join(note.text for note in light.layout.annotations) + (light.layout.title.text or "")
    )
    where += " ".join(str(label) for trace in light.data for label in trace.customdata or ())
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


def test_probe_curves_hold_the_shares_of_the_table(toy_study: StudyResult) -> None:
    probes = toy_study.probes()
    figure = plots.probe_curves(probes)
    wanted = probes.table.query("condition == 'off' and place == 'think_close'").sort_values("layer")
    assert tuple(wanted["share_positive"]) in [tuple(trace.y) for trace in traces(figure, name="harmful")]
    rings = [trace for trace in figure.data if trace.customdata is not None and len(trace.customdata[0]) == 5]
    assert sum(len(trace.x) for trace in rings) == probes.table["effect"].notna().sum()


def test_a_band_of_random_sets_lies_behind_the_heads_removed(toy_study: StudyResult) -> None:
    result = toy_study.probes_without_heads
    assert result is not None
    figure = plots.probes_without_heads(result)
    row = result.table.query("place == 'think_close' and group == 'harmful'").sort_values("layer")
    assert tuple(row["after"]) in [tuple(trace.y) for trace in traces(figure, name="the heads removed")]
    bands = [tuple(trace.y) for trace in traces(figure, fill="toself")]
    assert (*row["random_high"], *reversed(row["random_low"].tolist())) in bands


def test_argmax_places_are_counted_from_the_header(toy_study: StudyResult) -> None:
    head = (0, 5)
    figure = plots.argmax_positions(toy_study, [head])
    with toy_study.attention("harmful", "off") as data:
        places = data["attention_argmax_pos"].sel(layer=0, head=5).values.tolist()
    (off,) = traces(figure, name="off")
    assert dict(zip(off.x, off.customdata, strict=True)) == {at: places.count(at) for at in set(places)}
    with pytest.raises(StatisticsError, match="was not measured"):
        plots.argmax_positions(toy_study, [head], conditions=("deviate", "off"))


def test_bubbles_bear_the_verdicts_of_the_test_and_the_moves_of_the_scan(toy_study: StudyResult) -> None:
    heads = toy_study.heads
    figure = plots.head_bubbles(heads)
    for trace in figure.data:
        drawn = set(zip(trace.y, trace.x, strict=True))
        part = heads.table[heads.table["verdict"] == trace.name]
        assert drawn == set(zip(part["layer"], part["head"], strict=True))
    assert sum(len(trace.x) for trace in figure.data) == len(heads.scan)
    with pytest.raises(StatisticsError, match="no move is called 'sideways'"):
        plots.head_bubbles(heads, "sideways")


def test_a_kept_row_is_the_row_of_the_pattern(toy_study: StudyResult) -> None:
    """Against TransformerLens' own cache of attention patterns."""
    import rim_lens as rl

    model = rl.load_model("toy")
    row = next(row for row in toy_study.attention_rows if row["condition"] == "off")
    requests = rl.load_prompts("harmful", language="toy", split="evaluate")
    asked = next(request for request in requests if request.id == row["prompt"])
    off = rl.ChatFormat.from_model(model).render([asked], think="off")
    layer, head = row["head"]
    _, cache = model.run_with_cache(off.tokens)
    assert np.allclose(cache["pattern", layer][0, head, -1], row["attention"], atol=1e-5)
    assert row["tokens"] == model.tokenizer.convert_ids_to_tokens(off.tokens[0].tolist())
    figure = plots.head_pattern(toy_study, (layer, head))
    assert tuple(figure.data[1].x) == tuple(row["attention"])
    assert "&lt;think&gt;" in figure.layout.yaxis2.ticktext


def test_patterns_of_other_shapes_are_refused() -> None:
    with pytest.raises(StatisticsError, match="2 tokens and attention of shape"):
        plots.attention_pattern({"off": (["a", "b"], [0.1, 0.2, 0.7])})
