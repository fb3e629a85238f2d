"""Where heads look: mass on a span for every head, and on every span for a few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_lens.chat.spans import COMPOSITES
from rim_lens.views import numbers
from rim_lens.views.numbers import Kind
from rim_lens.views.plots.style import SPANS, Theme, base_layout

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

    from rim_lens.study import StudyResult


def map_height(n_layers: int) -> int:
    """Height of a layer × head map without its margins, in pixels."""
    return int(np.clip(130 + 16 * n_layers, 180, 720))


def found_dots(heads: Sequence[tuple[int, int]], showlegend: bool = True) -> dict[str, Any]:
    """A trace that marks the found heads on a map: white with a dark ring, so that it stands on every colour."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [head for _, head in heads],
        "y": [layer for layer, _ in heads],
        "name": "found by ablation",
        "marker": {"size": 9, "color": "#FFFFFF", "line": {"width": 2, "color": "#111111"}},
        "hoverinfo": "skip",
        "showlegend": showlegend,
    }


def attention_map(
    result: StudyResult,
    a: str = "careful",
    b: str = "off",
    span: str | None = None,
    kind: Kind = "harmful",
    theme: Theme = "light",
) -> go.Figure:
    """Mean attention mass of every head on a span in conditions A and B, and the difference A − B.

    A menu changes the span, among those that have tokens in both conditions. Query: the last prompt token, the row that
    produces the first word. Layer 0 is at the top. Found heads bear a dot.

    Args:
        result: A finished study.
        a: Condition whose mass comes first.
        b: Condition it is held against.
        span: Shown first; "think" where both have it, when None.
        kind: "harmful" or "harmless" (the twins).
        theme: "light" or "dark".
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    first, second = numbers.attention_mass(result, kind, a), numbers.attention_mass(result, kind, b)
    spans = [str(name) for name in first["span"].values if name in second["span"].values]
    shown = span or ("think" if "think" in spans else spans[0])
    spans = [shown, *(name for name in spans if name != shown)]
    canvas = make_subplots(
        cols=3,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[a, b, f"{a} − {b}"],
    )
    n_layers, n_heads = first.sizes["layer"], first.sizes["head"]
    colours = ("coloraxis", "coloraxis", "coloraxis2")
    values = _panels(first, second, shown)
    for column, (name, grid, axis) in enumerate(
        zip((a, b, f"{a} − {b}"), values, colours, strict=True), start=1
    ):
        canvas.add_trace(
            go.Heatmap(
                z=grid,
                x=list(range(n_heads)),
                y=list(range(n_layers)),
                coloraxis=axis,
                name=name,
                hovertemplate=f"{name}<br>layer %{{y}}, head %{{x}}: %{{z:.4f}}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    found = [(int(layer), int(head)) for layer, head in result.heads.found]
    for column in (1, 2, 3):
        if found:
            canvas.add_trace(found_dots(found, showlegend=column == 1), row=1, col=column)
    top, bottom = 92, 124
    height = map_height(n_layers) + top + bottom
    canvas.update_layout(**base_layout(theme, height, top, bottom))
    canvas.update_layout(
        legend={"x": 0.35, "y": 1 + 52 / map_height(n_layers)},
        updatemenus=[
            {
                "type": "dropdown",
                "x": 0,
                "xanchor": "left",
                "y": 1 + 84 / map_height(n_layers),
                "yanchor": "top",
                "buttons": [_button(name, _panels(first, second, name)) for name in spans],
            }
        ],
        **_colours(shown, values, map_height(n_layers)),
    )
    canvas.update_xaxes(title_text="head", dtick=1 if n_heads <= 12 else 4, showgrid=False, zeroline=False)
    canvas.update_xaxes(title_text=f"head (n = {first.attrs['n']} {kind})", col=2)
    canvas.update_yaxes(
        autorange="reversed", dtick=1 if n_layers <= 12 else 4, showgrid=False, zeroline=False
    )
    canvas.update_yaxes(title_text="layer (0 at the top)", col=1)
    return canvas


def attention_by_head(
    result: StudyResult,
    heads: Sequence[tuple[int, int]] | None = None,
    kind: Kind = "harmful",
    theme: Theme = "light",
) -> go.Figure:
    """Attention mass by span, stacked per condition, one panel per head. The spans' masses sum to 1.

    Args:
        result: A finished study.
        heads: (layer, head) pairs; the found ones when None.
        kind: "harmful" or "harmless" (the twins).
        theme: "light" or "dark".

    Raises:
        ValueError: No head was given, and none was found.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    chosen = [(int(layer), int(head)) for layer, head in (result.heads.found if heads is None else heads)]
    if not chosen:
        raise ValueError("no head was found in this study; give heads=[(layer, head), ...].")
    columns = min(2, len(chosen))
    rows = -(-len(chosen) // columns)
    canvas = make_subplots(
        rows=rows,
        cols=columns,
        shared_yaxes=True,
        horizontal_spacing=0.05,
        vertical_spacing=0.22 / rows,
        subplot_titles=[numbers.head_name(*head) for head in chosen],
    )
    conditions = list(result.conditions)
    masses = {condition: numbers.attention_mass(result, kind, condition) for condition in conditions}
    n = masses[conditions[0]].attrs["n"]
    present = {str(name) for mass in masses.values() for name in mass["span"].values} - set(COMPOSITES)
    for place, (layer, head) in enumerate(chosen):
        for name in (name for name in SPANS if name in present):
            canvas.add_trace(
                go.Bar(
                    name=name,
                    legendgroup=name,
                    showlegend=place == 0,
                    x=conditions,
                    y=[
                        float(mass.sel(layer=layer, head=head, span=name))
                        if name in mass["span"].values
                        else None
                        for mass in masses.values()
                    ],
                    hovertemplate=f"{numbers.head_name(layer, head)}, %{{x}}<br>{name}: %{{y:.4f}}<extra></extra>",
                    marker={"color": SPANS[name], "line": {"width": 0.5, "color": "#FFFFFF"}},
                ),
                row=place // columns + 1,
                col=place % columns + 1,
            )
    canvas.update_layout(
        **base_layout(theme, 160 + 250 * rows, top=104, legend_up=24), barmode="stack", bargap=0.25
    )
    canvas.update_yaxes(range=[0, 1.02], tickvals=[0, 0.5, 1])
    canvas.update_yaxes(title_text=f"attention mass (n = {n})", col=1)
    canvas.update_xaxes(showgrid=False)
    canvas.update_xaxes(title_text="think condition", row=rows)
    return canvas


def _panels(first: xr.DataArray, second: xr.DataArray, span: str) -> list[list[list[float]]]:
    """The masses in A and in B, and A − B, as layer × head grids."""
    a, b = first.sel(span=span).to_numpy(), second.sel(span=span).to_numpy()
    return [np.round(grid.astype(np.float64), 6).tolist() for grid in (a, b, a - b)]


def _colours(span: str, values: list[list[list[float]]], height: int) -> dict[str, Any]:
    """One scale for both masses, from 0, and one for the difference, even around 0."""
    highest = float(np.max(values[:2])) or 1.0
    widest = float(np.abs(values[2]).max()) or 1.0
    bar: dict[str, Any] = {
        "orientation": "h",
        "thickness": 10,
        "y": -58 / height,
        "yanchor": "top",
        "title": {"side": "top", "font": {"size": 12}},
        "tickfont": {"size": 11},
        "outlinewidth": 0,
        "nticks": 5,
    }
    return {
        "coloraxis": {
            "cmin": 0,
            "cmax": highest,
            "colorbar": {**bar, "x": 0.31, "len": 0.5, "title": {**bar["title"], "text": _mass(span)}},
        },
        "coloraxis2": {
            "cmin": -widest,
            "cmax": widest,
            "colorbar": {
                **bar,
                "x": 0.84,
                "len": 0.32,
                "title": {**bar["title"], "text": "difference of masses"},
            },
        },
    }


def _button(span: str, values: list[list[list[float]]]) -> dict[str, Any]:
    colours = _colours(span, values, 1)
    layout = {
        f"{axis}.{key}": colours[axis][key]
        for axis in ("coloraxis", "coloraxis2")
        for key in ("cmin", "cmax")
    }
    return {
        "label": f"span: {span}",
        "method": "update",
        "args": [{"z": values}, {**layout, "coloraxis.colorbar.title.text": _mass(span)}, [0, 1, 2]],
    }


def _mass(span: str) -> str:
    return f"attention mass on {span} (share of the row)"
