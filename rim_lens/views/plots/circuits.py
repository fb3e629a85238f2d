"""A circuit as a picture for print: layers from the top down, edges as wide as their effect, beside what the whole is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_lens.errors import ReferenceMismatch, StatisticsError
from rim_lens.measures.circuits.nodes import Edge, Node
from rim_lens.measures.circuits.result import Circuit
from rim_lens.views import circuit_words, words
from rim_lens.views.layered import LEFT, TALL, WIDTH, Layered, Place, beside, layered, points
from rim_lens.views.plots.style import BLUE, CONTROL, FOUND, GREEN, SPANS, Theme, base_layout, see_through
from rim_lens.views.text import plotly_text, visible

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MOST_WIDE = 12.0  # of an edge, pixels
_FEW = 14  # edges that have their number written beside them
_OUTLINE = "#808080"
_FILL = {
    "head": see_through(CONTROL, 0.2),
    "neurons": see_through(GREEN, 0.2),
    "end": see_through(FOUND, 0.2),
}


def circuit_graph(
    circuits: Circuit | Mapping[str, Circuit],
    contrast: str | None = None,
    *,
    tested: int = 0,
    theme: Theme = "light",
) -> go.Figure:
    """A circuit, or several of the same nodes side by side: who hears whom, by how much, and what the whole is worth.

    Each edge is as wide as its mean effect on evaluate requests, on one scale over all panels; blue edges lower the refusal
    score where the receiver hears the other run, vermillion ones raise it. Broken outlines: nodes that are not kept. Above each panel
    faithfulness and completeness, random circuits in brackets. Effects of edges do not add up, and nodes that were not given
    are not there: faithfulness says whether they were needed.

    Args:
        circuits: From `rl.circuit`, or several by name.
        contrast: Whose edges; the first of the first circuit when None.
        tested: So many of the largest edges that are not the circuit's are drawn as well, broken.
        theme: "light" or "dark".

    Raises:
        StatisticsError: There is no circuit, or none has that contrast.
        ReferenceMismatch: Circuits of other nodes.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    named = {"": circuits} if isinstance(circuits, Circuit) else dict(circuits)
    nodes, edges, tables = _read(named, contrast)
    picture = layered(nodes, edges, _weights(edges, tables.values()), 1 + 0.6 * (len(named) - 1))
    most = max([1e-9, *(abs(row["effect"]) for table in tables.values() for row in table.values())])
    canvas = make_subplots(
        cols=len(named),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[_title(name, circuit) for name, circuit in named.items()],
    )
    canvas.update_layout(**base_layout(theme, int(picture.height) + 150, top=116, bottom=20, legend_up=52))
    canvas.update_annotations(font_size=12.5)
    for place, (name, circuit) in enumerate(named.items(), start=1):
        table = tables[name]
        drawn = [number for number, edge in enumerate(edges) if table[str(edge)]["in_circuit"]]
        rest = sorted(set(range(len(edges))) - set(drawn), key=lambda n: -abs(table[str(edges[n])]["effect"]))
        _draw_edges(canvas, place, edges, table, picture, drawn, rest[:tested], most)
        _draw_nodes(canvas, place, nodes, {node.name for node in circuit.kept()}, picture)
    for title, colour, dash in (
        ("lowers the refusal score", BLUE, "solid"),
        ("raises it", FOUND, "solid"),
        *([("tested, not the circuit's", CONTROL, "dash")] if tested else []),
    ):
        line = {"color": colour, "width": 2 if dash == "dash" else 5, "dash": dash}
        canvas.add_trace(go.Scatter(x=[None], y=[None], mode="lines", name=title, line=line))
    canvas.update_xaxes(visible=False, range=[LEFT - 12, WIDTH + 16])
    canvas.update_yaxes(
        range=[picture.height, 0],
        tickvals=[y for _, y in picture.rows],
        ticktext=[plotly_text(name) for name, _ in picture.rows],
        showgrid=False,
        zeroline=False,
        showline=False,
        ticks="",
    )
    return canvas


def circuit_shares(circuits: Circuit | Mapping[str, Circuit], theme: Theme = "light") -> go.Figure:
    """Faithfulness, completeness and each node's minimality as shares of refusal, with 95 % intervals, beside random circuits.

    Grey bars: the range of 95 % of random circuits of the same shape. Faithfulness near 1: the circuit is enough, given the
    background that all else is replaced by. Completeness near 1: nothing else does it as well. Minimality near 0: the
    circuit does without that node.

    Args:
        circuits: From `rl.circuit`, or several by name.
        theme: "light" or "dark".

    Raises:
        StatisticsError: No circuit has a kept node that was tested.
    """
    import plotly.graph_objects as go

    named = {"": circuits} if isinstance(circuits, Circuit) else dict(circuits)
    rows = {name: circuit_words.shares(circuit) for name, circuit in named.items()}
    lines = list(dict.fromkeys(_line(one) for some in rows.values() for one in some))
    if not lines:
        raise StatisticsError("no circuit has a kept node that was tested: there is no share to draw.")
    canvas = go.Figure(layout=base_layout(theme, 130 + 26 * len(lines) * max(1, len(named)), top=70))
    colours = (BLUE, FOUND, GREEN, CONTROL)
    for place, (name, some) in enumerate(rows.items()):
        shift = 0.7 * ((place + 0.5) / len(rows) - 0.5)
        at = [lines.index(_line(one)) + shift for one in some]
        random = [(y, one) for y, one in zip(at, some, strict=True) if one["n_random"]]
        canvas.add_trace(
            go.Bar(
                orientation="h",
                y=[y for y, _ in random],
                base=[one["random_low"] for _, one in random],
                x=[one["random_high"] - one["random_low"] for _, one in random],
                width=0.6 / len(rows),
                marker={"color": see_through(CONTROL, 0.5), "line": {"width": 1.5, "color": CONTROL}},
                name="95 % of random circuits",
                legendgroup="random",
                showlegend=place == 0,
                customdata=[[one["random"], one["n_random"]] for _, one in random],
                hovertemplate="%{customdata[1]} random circuits: mean %{customdata[0]:.2f}<extra></extra>",
            )
        )
        canvas.add_trace(
            go.Scatter(
                x=[one["share"] for one in some],
                y=at,
                mode="markers",
                name=plotly_text(name) or "the circuit",
                marker={"size": 9, "color": colours[place % len(colours)]},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [one["high"] - one["share"] for one in some],
                    "arrayminus": [one["share"] - one["low"] for one in some],
                },
                customdata=[plotly_text(one["told"]) for one in some],
                hovertemplate="%{customdata}<extra></extra>",
            )
        )
    canvas.add_vline(x=0, line={"color": _OUTLINE, "width": 1, "dash": "dot"}, layer="below")
    canvas.add_vline(x=1, line={"color": _OUTLINE, "width": 1, "dash": "dot"}, layer="below")
    n = ", ".join(sorted({str(one["n"]) for some in rows.values() for one in some}))
    canvas.update_xaxes(title_text=f"share of refusal, harmful requests (n = {n})", zeroline=False)
    canvas.update_yaxes(
        tickvals=list(range(len(lines))),
        ticktext=[plotly_text(line) for line in lines],
        range=[len(lines) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
    )
    return canvas


def _line(one: Mapping[str, Any]) -> str:
    return f"minimality of {one['node']}" if one["node"] else str(one["name"])


# --- what is drawn ----------------------------------------------------------------------------------------


def _read(
    circuits: Mapping[str, Circuit], contrast: str | None
) -> tuple[list[Node], list[Edge], dict[str, dict[str, dict[str, Any]]]]:
    if not circuits:
        raise StatisticsError("no circuit was given; give one of rl.circuit, or several by name.")
    first = next(iter(circuits.values()))
    chosen = str(first.settings["contrasts"][0]) if contrast is None else contrast
    nodes = first.asked()
    known = {node.name: node for node in nodes}
    tables = {}
    for name, circuit in circuits.items():
        rows = circuit.edges[circuit.edges["contrast"] == chosen].to_dict("records")
        if not rows:
            raise StatisticsError(
                f"edges of the contrast {chosen!r} were to be drawn; this circuit has {', '.join(circuit.settings['contrasts'])}."
            )
        if circuit.asked() != nodes:
            raise ReferenceMismatch(
                "circuits of other nodes were to be drawn side by side; measure them with the same heads, neurons and spans."
            )
        tables[name] = {str(row["edge"]): {str(key): value for key, value in row.items()} for row in rows}
    edges = [
        Edge(known[row["sender"]], known[row["receiver"]], row["input"])
        for row in next(iter(tables.values())).values()
    ]
    return nodes, edges, tables


def _weights(edges: Sequence[Edge], tables: Any) -> list[float]:
    found = dict.fromkeys(map(str, edges), 0.0)
    for table in tables:
        for name, row in table.items():
            size = float(np.nan_to_num(abs(row["effect"])))
            found[name] = max(found[name], size if row["in_circuit"] else size / 100)
    return [found[str(edge)] for edge in edges]


def _title(name: str, circuit: Circuit) -> str:
    told = [
        f"{one['name']} {words.share(one['share'])}"
        + (
            f" [{words.share(one['random_low'])}–{words.share(one['random_high'])}]"
            if one["n_random"]
            else ""
        )
        for one in circuit_words.shares(circuit)
        if not one["node"]
    ]
    head = f"<b>{plotly_text(name)}</b><br>" if name else ""
    return f"{head}{', '.join(told) or 'no node kept'}"


def _draw_edges(
    canvas: go.Figure,
    place: int,
    edges: Sequence[Edge],
    table: Mapping[str, Mapping[str, Any]],
    picture: Layered,
    found: Sequence[int],
    rest: Sequence[int],
    most: float,
) -> None:
    import plotly.graph_objects as go

    where = {"row": 1, "col": place}
    drawn = [*reversed(rest), *sorted(found, key=lambda number: abs(table[str(edges[number])]["effect"]))]
    ends, middles, labels = [], [], []
    for number in drawn:
        row, curve = table[str(edges[number])], picture.curves[number]
        own = number in found
        wide = 1 + (_MOST_WIDE - 1) * abs(row["effect"]) / most if own else 1.0
        colour = BLUE if row["effect"] < 0 else FOUND
        (x0, y0), *handles = curve.round(1).tolist()
        canvas.add_shape(
            type="path",
            path=f"M {x0},{y0} C " + " ".join(f"{x},{y}" for x, y in handles),
            line={"color": colour, "width": wide, "dash": "solid" if own else "dash"},
            opacity=0.9 if own else 0.45,
            layer="below",
            **where,
        )
        ends.append((*handles[-1], min(15.0, 7 + wide) if own else 6, colour))
        middles.append((*points(curve, 3)[1].tolist(), str(edges[number]), row))
        if own and len(found) <= _FEW:
            others = [picture.curves[other] for other in found if other != number]
            labels.append((*beside(curve, wide / 2 + 4, others), f"{row['effect']:.1f}".replace("-", "−")))
    canvas.add_trace(
        go.Scatter(
            x=[x for x, *_ in ends],
            y=[y - 2 for _, y, *_ in ends],
            mode="markers",
            marker={
                "symbol": "triangle-down",
                "size": [size for *_, size, _ in ends],
                "color": [colour for *_, colour in ends],
                "opacity": 1,
                "line": {"width": 0},
            },
            hoverinfo="skip",
            showlegend=False,
        ),
        **where,
    )
    canvas.add_trace(
        go.Scatter(
            x=[x for x, *_ in middles],
            y=[y for _, y, *_ in middles],
            mode="markers",
            marker={"size": 16, "opacity": 0},
            customdata=[
                [plotly_text(name), *(row[key] for key in ("effect", "effect_low", "effect_high", "p"))]
                for *_, name, row in middles
            ],
            hovertemplate="%{customdata[0]}: %{customdata[1]:.2f} [%{customdata[2]:.2f}, %{customdata[3]:.2f}] nats<br>p ="
            " %{customdata[4]:.2g}, corrected<extra></extra>",
            name="edges",
            showlegend=False,
        ),
        **where,
    )

    canvas.add_trace(
        go.Scatter(
            x=[x for x, *_ in labels],
            y=[y for _, y, *_ in labels],
            mode="text",
            text=[text for *_, text in labels],
            textposition=[f"middle {'right' if right else 'left'}" for _, _, right, _ in labels],
            textfont={"size": 11.5},
            hoverinfo="skip",
            cliponaxis=False,
            name="effects",
            showlegend=False,
        ),
        **where,
    )


def _draw_nodes(
    canvas: go.Figure, place: int, nodes: Sequence[Node], kept: set[str], picture: Layered
) -> None:
    import plotly.graph_objects as go

    where = {"row": 1, "col": place}
    for node in nodes:
        at = picture.places[node.name]
        solid = node.name in kept or node.kind not in ("head", "neurons")
        colour = SPANS.get(node.name, _OUTLINE) if node.kind == "span" else _OUTLINE
        canvas.add_shape(
            type="path",
            path=_outline(node.kind, at),
            fillcolor=see_through(SPANS[node.name], 0.25) if node.name in SPANS else _FILL.get(node.kind),
            line={"color": colour, "width": 2 if solid else 1.2, "dash": "solid" if solid else "dash"},
            opacity=1 if solid else 0.6,
            **where,
        )
    places = [picture.places[node.name] for node in nodes]
    canvas.add_trace(
        go.Scatter(
            x=[at.x for at in places],
            y=[at.y for at in places],
            mode="text",
            text=[plotly_text(at.label) for at in places],
            textfont={"size": 12},
            customdata=[
                plotly_text(visible(node.name))
                + ("" if node.name in kept or node.kind in ("span", "end") else ", not kept")
                for node in nodes
            ],
            hovertemplate="%{customdata}<extra></extra>",
            name="nodes",
            showlegend=False,
        ),
        **where,
    )


def _outline(kind: str, at: Place) -> str:
    """A node's outline: spans with round ends, heads square, neurons with points, refusal with its corners cut."""
    x, y, wide, tall = at.x, at.y, at.wide / 2, TALL / 2
    cut = {"neurons": 9.0, "end": 5.0, "direction": 5.0}.get(kind, 0.0)
    if kind == "span":
        left, right = x - wide + tall, x + wide - tall
        return (
            f"M {left},{y - tall} L {right},{y - tall} Q {x + wide},{y - tall} {x + wide},{y} Q {x + wide},{y + tall} {right},{y + tall}"
            f" L {left},{y + tall} Q {x - wide},{y + tall} {x - wide},{y} Q {x - wide},{y - tall} {left},{y - tall} Z"
        )
    side = 0.0 if kind == "neurons" else tall - cut
    corners = [
        (x - wide, y - side),
        (x - wide + cut, y - tall),
        (x + wide - cut, y - tall),
        (x + wide, y - side),
        (x + wide, y + side),
        (x + wide - cut, y + tall),
        (x - wide + cut, y + tall),
        (x - wide, y + side),
    ]
    return "M " + " L ".join(f"{a:.1f},{b:.1f}" for a, b in corners) + " Z"
