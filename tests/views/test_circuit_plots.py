"""Figures of circuits, held to the numbers they are drawn from."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

import rim_lens as rl
from rim_lens.errors import ReferenceMismatch, StatisticsError
from rim_lens.organisms.planted import planted_truth
from rim_lens.views.plots import circuit_graph, circuit_shares
from rim_lens.views.plots.style import BLUE, FOUND
from tests.verdicts import toy_requests


@pytest.fixture(scope="module")
def circuit() -> rl.Circuit:
    model, truth = rl.load_model("planted"), planted_truth()
    search = rl.CircuitSearch(limit=8, n_random=3, n_random_senders=0)
    return rl.circuit(
        model,
        rl.ChatFormat.from_model(model),
        [*truth.heads, *truth.decoy_heads],
        {"<b>and": truth.neurons},
        *toy_requests(),
        search=search,
    )


def edges(figure: Any) -> list[Any]:
    return [shape for shape in figure.layout.shapes if " C " in shape.path]


def test_edges_are_as_wide_as_their_effects_on_one_scale(circuit: rl.Circuit) -> None:
    halved = circuit.edges.copy()
    halved[["effect", "effect_low", "effect_high"]] *= -0.5
    figure = circuit_graph({"one": circuit, "<i>half": replace(circuit, edges=halved)}, tested=4)
    found = circuit.edges[circuit.edges["in_circuit"]]["effect"].abs().tolist()
    assert len(edges(figure)) == 2 * (len(found) + 4)
    for axis, colour, factor in (("x", BLUE, 1.0), ("x2", FOUND, 0.5)):
        own = [one for one in edges(figure) if one.xref == axis and one.line.dash == "solid"]
        assert {one.line.color for one in own} == {colour}
        most = max(found)
        expected = sorted(1 + 11 * factor * size / most for size in found)
        assert sorted(one.line.width for one in own) == pytest.approx(expected)
    told = [
        one
        for trace in figure.data
        if trace.name == "edges" and trace.xaxis == "x"
        for one in trace.customdata
    ]
    rows = circuit.edges.set_index("edge")
    assert len(told) == len(found) + 4
    for name, effect, low, high, p in told:
        row = rows.loc[name.replace("&lt;", "<").replace("&gt;", ">")]
        assert (effect, low, high, p) == (row["effect"], row["effect_low"], row["effect_high"], row["p"])
    # Names are text: nothing of them is read as a tag.
    titles = " ".join(note.text for note in figure.layout.annotations)
    assert "&lt;i&gt;half" in titles
    share = circuit.row("faithfulness", "harmful")["share"]
    assert f"faithfulness {share:.2f}" in titles
    labels = [text for trace in figure.data if trace.name == "nodes" for text in trace.text]
    assert not any(re.search("<[bi]>", text) for text in labels)


def test_shares_stand_at_their_values_beside_random_circuits(circuit: rl.Circuit) -> None:
    figure = circuit_shares(circuit)
    random, own = figure.data
    lines = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    shown = {
        lines[round(y)]: (x, x - low, x + high)
        for x, y, low, high in zip(own.x, own.y, own.error_x.arrayminus, own.error_x.array, strict=True)
    }
    for name in ("faithfulness", "completeness"):
        row = circuit.row(name, "harmful")
        assert shown[name] == pytest.approx((row["share"], row["share_low"], row["share_high"]))
        place = [lines[round(y)] for y in random.y].index(name)
        assert (random.base[place], random.base[place] + random.x[place]) == pytest.approx(
            (row["random_low"], row["random_high"])
        )
    assert shown["minimality of L1H1"][0] == circuit.row("minimality", "harmful", "L1H1")["share"]
    assert "minimality of &lt;b&gt;and L0" in shown


@pytest.mark.parametrize("draw", [circuit_graph, circuit_shares])
def test_both_themes_differ_in_their_template_alone(circuit: rl.Circuit, draw: Any) -> None:
    bare = [json.loads(draw(circuit, theme=theme).to_json()) for theme in ("light", "dark")]
    inks = [figure["layout"].pop("template")["layout"]["font"]["color"] for figure in bare]
    assert bare[0] == bare[1]
    assert inks[0] != inks[1]


def test_what_cannot_be_drawn_is_refused(circuit: rl.Circuit) -> None:
    with pytest.raises(StatisticsError, match="'careful' were to be drawn"):
        circuit_graph(circuit, "careful")
    with pytest.raises(StatisticsError, match="no circuit"):
        circuit_graph({})
    with pytest.raises(ReferenceMismatch, match="other nodes"):
        circuit_graph({"one": circuit, "other": replace(circuit, nodes=circuit.nodes.iloc[1:])})
    with pytest.raises(StatisticsError, match="no share"):
        circuit_shares(replace(circuit, tests=circuit.tests.iloc[:0]))
