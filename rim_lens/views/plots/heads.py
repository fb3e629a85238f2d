"""What removing heads does to refusal: every head on the select side, the found ones tested, the set among others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rim_lens.errors import StatisticsError
from rim_lens.views import numbers
from rim_lens.views.plots.attention import found_dots, map_height
from rim_lens.views.plots.style import CONTROL, FOUND, Theme, base_layout, figure, spread
from rim_lens.views.words import per_cent

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from rim_lens.measures.heads.result import RefusalHeads
    from rim_lens.study import StudyResult

_PLACES = ("top right", "bottom left", "bottom right", "top left")  # of neighbouring names
MANY = 20  # control sets from which a histogram says more than their points


def head_scan(result: StudyResult, theme: Theme = "light") -> go.Figure:
    """Change of the mean refusal score when one head is zeroed, every head, on the select side. Layer 0 at the top.

    These numbers chose the heads; they test nothing.
    """
    import plotly.graph_objects as go

    grid = result.heads.scan.pivot(index="layer", columns="head", values="effect")
    n_layers, n_heads = grid.shape
    widest = float(np.nanmax(np.abs(grid.to_numpy()))) or 1.0
    canvas = figure(theme, map_height(n_layers) + 140)
    canvas.add_trace(
        go.Heatmap(
            z=np.round(grid.to_numpy(), 6).tolist(),
            x=grid.columns.tolist(),
            y=grid.index.tolist(),
            coloraxis="coloraxis",
            hovertemplate="layer %{y}, head %{x}: %{z:.4f} nats<extra></extra>",
        )
    )
    found = [(int(layer), int(head)) for layer, head in result.heads.found]
    if found:
        canvas.add_trace(found_dots(found))
    canvas.update_layout(
        coloraxis={
            "cmin": -widest,
            "cmax": widest,
            "colorbar": {
                "title": {"text": "effect (nats;<br>negative:<br>refuses less)", "font": {"size": 12}},
                "thickness": 12,
                "outlinewidth": 0,
            },
        }
    )
    canvas.update_xaxes(
        title_text=f"head (n = {result.design['n_select']} harmful requests, select side)",
        dtick=1 if n_heads <= 16 else 4,
        showgrid=False,
        zeroline=False,
    )
    canvas.update_yaxes(
        title_text="layer (0 at the top)",
        autorange="reversed",
        dtick=1 if n_layers <= 12 else 4,
        showgrid=False,
        zeroline=False,
    )
    return canvas


# Marks, so that a verdict is read without colours; filled where removal has an effect.
VERDICT_MARKS = {
    "refusal": "star",
    "general": "diamond",
    "positional": "square",
    "sink": "triangle-down",
    "none": "circle",
    "not tested": "x-thin",
}


def head_bubbles(
    heads: RefusalHeads | StudyResult, contrast: str | None = None, theme: Theme = "light"
) -> go.Figure:
    """Every head as a bubble, layer × head: how often its attention moves, what its removal does, and its verdict.

    Size: share of harmful requests on which its argmax makes the move. Colour: mean effect of removing it, nats (negative:
    refuses less). Both from the select side, where every head was measured; the mark is the verdict of the test on the
    evaluate side. Figure 4b of arXiv 2509.00544, with the effect it lacks.

    Args:
        heads: What `rl.refusal_heads` found, or a study.
        contrast: Name of the move; the first one when None.
        theme: "light" or "dark".

    Raises:
        StatisticsError: No such move was looked for.
    """
    import plotly.graph_objects as go

    found: RefusalHeads = heads.heads if hasattr(heads, "heads") else heads
    moves = [name.removeprefix("moves_") for name in found.scan.columns if name.startswith("moves_")]
    if contrast is not None and contrast not in moves:
        raise StatisticsError(f"no move is called {contrast!r}; there are {', '.join(moves) or 'none'}.")
    chosen = contrast or (moves[0] if moves else None)
    columns = ["layer", "head", "effect", *([f"moves_{chosen}"] if chosen else [])]
    table = found.scan[columns].merge(
        found.table[["layer", "head", "verdict"]], on=["layer", "head"], how="left"
    )
    table["verdict"] = table["verdict"].fillna("not tested")
    table["moves"] = table[f"moves_{chosen}"] if chosen else 0.0
    widest = float(table["effect"].abs().max()) or 1.0
    n_layers, n_heads = int(table["layer"].max()) + 1, int(table["head"].max()) + 1
    biggest = min(28.0, max(14.0, 0.9 * map_height(n_layers) / n_layers))
    canvas = figure(theme, map_height(n_layers) + 150)
    for verdict, mark in VERDICT_MARKS.items():
        part = table[table["verdict"] == verdict]
        canvas.add_trace(
            go.Scatter(
                x=part["head"].tolist(),
                y=part["layer"].tolist(),
                mode="markers",
                name=verdict,
                showlegend=not part.empty,
                marker={
                    "symbol": mark,
                    "size": (
                        (9 + (biggest - 9) * np.sqrt(part["moves"].to_numpy()))
                        * (1.5 if mark == "star" else 1)  # a star of the same reach has less to colour
                    )
                    .round(1)
                    .tolist(),
                    "color": part["effect"].round(6).tolist(),
                    "coloraxis": "coloraxis",
                    "line": {
                        "width": 1.5 if verdict == "refusal" else 1,
                        "color": "#808080",
                    },
                },
                customdata=part[["effect", "moves"]].to_numpy().tolist(),
                hovertemplate=f"layer %{{y}}, head %{{x}}: {verdict}<br>removal %{{customdata[0]:.4f}} nats<br>moves on"
                " %{customdata[1]:.2f} of requests<extra></extra>",
            )
        )
    where = found.settings.get("contrasts", [])
    told = next((move for move in where if move["name"] == chosen), None)
    size = (
        f"size: argmax goes from {told['leaves']} ({told['first']}) to {told['enters']} ({told['second']})"
        if told
        else "no move looked for"
    )
    canvas.update_layout(
        **base_layout(theme, map_height(n_layers) + 150, top=70, bottom=80),
        coloraxis={
            "cmin": -widest,
            "cmax": widest,
            "colorbar": {
                "title": {"text": "effect (nats;<br>negative:<br>refuses less)", "font": {"size": 12}},
                "thickness": 12,
                "outlinewidth": 0,
            },
        },
    )
    canvas.update_xaxes(
        title_text=f"head (n = {found.settings.get('n_select', '?')} harmful requests, select side;<br>{size})",
        dtick=1 if n_heads <= 16 else 4,
        range=[-0.7, n_heads - 0.3],
        zeroline=False,
    )
    canvas.update_yaxes(
        title_text="layer (0 at the top)",
        range=[n_layers - 0.4, -0.6],
        dtick=1 if n_layers <= 12 else 4,
        zeroline=False,
    )
    return canvas


def head_effects(result: StudyResult, theme: Theme = "light") -> go.Figure:
    """Effect of zeroing a head on harmful requests against the effect on their twins, on the evaluate side.

    Found heads in colour with 95 % intervals over families; the other heads of their layers, the yardstick, in
    grey. On the dotted diagonal an effect is the same on both, and so not about refusal.

    Raises:
        ValueError: No head was found, so none was tested.
    """
    import plotly.graph_objects as go

    table = numbers.head_effects(result.heads)
    if table.empty:
        raise ValueError("no head was found in this study, so that none was tested.")
    canvas = figure(theme, 440)
    for found, name, colour in (
        (False, "other tested heads", CONTROL),
        (True, "found by ablation", FOUND),
    ):
        part = table[table["tested"] & (table["found"] == found)]
        if part.empty:
            continue
        bars = [
            {
                "type": "data",
                "symmetric": False,
                "array": (part[f"{side}_high"] - part[value]).tolist(),
                "arrayminus": (part[value] - part[f"{side}_low"]).tolist(),
                "thickness": 1.5,
                "width": 4,
            }
            if found
            else None
            for side, value in (("effect", "effect"), ("twins", "effect_twins"))
        ]
        canvas.add_trace(
            go.Scatter(
                mode="markers+text" if found else "markers",
                name=name,
                x=part["effect"].tolist(),
                y=part["effect_twins"].tolist(),
                error_x=bars[0],
                error_y=bars[1],
                text=part["name"].tolist(),
                textposition=[_PLACES[place % len(_PLACES)] for place in range(len(part))],
                customdata=part[["effect_low", "effect_high", "twins_low", "twins_high"]].to_numpy().tolist(),
                hovertemplate="%{text}<br>on harmful: %{x:.4f} nats [%{customdata[0]:.4f}, %{customdata[1]:.4f}]"
                "<br>on twins: %{y:.4f} nats [%{customdata[2]:.4f}, %{customdata[3]:.4f}]<extra></extra>",
                marker={"size": 10 if found else 7, "color": colour, "opacity": 1 if found else 0.7},
            )
        )
    reach = table.loc[
        table["tested"], ["effect_low", "effect_high", "effect_twins", "twins_low", "twins_high"]
    ].to_numpy()
    low, high = min(float(reach.min()), 0.0), max(float(reach.max()), 0.0)
    edge = 0.06 * (high - low or 1.0)
    canvas.add_shape(
        type="line",
        x0=low - edge,
        y0=low - edge,
        x1=high + edge,
        y1=high + edge,
        line={"color": "#808080", "width": 1, "dash": "dot"},
        layer="below",
    )
    n = result.design["n_evaluate"]
    canvas.update_xaxes(
        title_text=f"effect on harmful requests (nats; edited − baseline; n = {n})",
        range=[low - edge, high + 2 * edge],
    )
    canvas.update_yaxes(title_text=f"effect on harmless twins (nats; n = {n})")
    return canvas


def head_set(result: StudyResult, theme: Theme = "light") -> go.Figure:
    """Effect of the found set beside that of random sets with as many heads in each layer, harmful requests.

    Raises:
        ValueError: No head was found.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    if not result.heads.found:
        raise ValueError("no head was found in this study, so that there is no set.")
    effect = result.heads.set
    controls = [control["effect"] for control in effect["controls"]]
    names = [
        ", ".join(numbers.head_name(*head) for head in control["heads"]) for control in effect["controls"]
    ]
    estimate, n_controls = effect["effect"]["estimate"], effect["n_controls"]
    heads = ", ".join(numbers.head_name(*head) for head in result.heads.found)
    many = n_controls >= MANY
    canvas = make_subplots(
        rows=2 if many else 1,
        shared_xaxes=True,
        row_heights=[0.75, 0.25] if many else None,
        vertical_spacing=0.04,
    )
    grey = {"color": CONTROL}
    title = f"{n_controls} other sets with as many heads in each layer"
    if many:
        canvas.add_trace(
            go.Histogram(
                x=controls,
                nbinsx=40,
                marker=grey,
                hovertemplate="%{y} sets between %{x} nats<extra></extra>",
                showlegend=False,
            ),
            row=1,
            col=1,
        )
    strip = 2 if many else 1
    canvas.add_trace(
        go.Scatter(
            x=controls,
            y=spread(n_controls, 1.0),
            mode="markers",
            name=title,
            marker={"size": 7, "opacity": 0.6, **grey},
            text=names,
            hovertemplate="%{text}<br>%{x:.4f} nats<extra></extra>",
        ),
        row=strip,
        col=1,
    )
    canvas.add_trace(
        go.Scatter(
            x=[estimate],
            y=[0],
            mode="markers",
            name=(
                f"the found set: larger in size than {per_cent(effect['percentile'])} of them"
                if n_controls
                else "the found set"
            ),
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [effect["effect"]["high"] - estimate],
                "arrayminus": [estimate - effect["effect"]["low"]],
                "thickness": 2,
                "width": 6,
            },
            text=[heads],
            hovertemplate="%{text}<br>%{x:.4f} nats<extra></extra>",
            marker={"symbol": "diamond", "size": 13, "color": FOUND},
        ),
        row=strip,
        col=1,
    )
    canvas.add_vline(x=estimate, line={"color": FOUND, "width": 1.5, "dash": "dash"})
    canvas.add_vline(x=0, line={"color": "#808080", "width": 1, "dash": "dot"})
    canvas.update_layout(**base_layout(theme, 400 if many else 230), bargap=0.05)
    canvas.update_xaxes(
        title_text=f"effect on harmful requests (nats; edited − baseline; n = {effect['effect']['n']} requests)",
        zeroline=False,
        row=strip,
    )
    canvas.update_yaxes(title_text="number of sets", row=1)
    canvas.update_yaxes(
        title_text="", showticklabels=False, showgrid=False, zeroline=False, range=[-1, 1], row=strip
    )
    return canvas
