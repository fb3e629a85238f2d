"""What probes read: by layer and place, along chains of thought, and with heads removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rim_lens.errors import StatisticsError
from rim_lens.measures.probes.groups import CONTRASTS
from rim_lens.measures.stats import proportion_interval
from rim_lens.views.plots.style import (
    BLUE,
    CONTROL,
    FOUND,
    ORANGE,
    Theme,
    base_layout,
    condition_colour,
    see_through,
)
from rim_lens.views.text import plotly_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from rim_lens.measures.probes.after_ablation import ProbesAfterAblation
    from rim_lens.measures.probes.cliff import Cliff
    from rim_lens.measures.probes.result import ProbeResult

_CLASSES = {"positive": BLUE, "negative": ORANGE}
_SYMBOLS = {"positive": "circle", "negative": "circle-open"}


def probe_curves(result: ProbeResult, theme: Theme = "light") -> go.Figure:
    """Probe score (share of held-out requests above the threshold) by layer: a row per condition, a column per place.

    Both classes, with 95 % Wilson intervals. Rings: layers and places whose direction was ablated, filled where that lowers
    refusal, and not as much on twins. Figure 3 of arXiv 2509.00544.

    Raises:
        StatisticsError: No condition has a probe.
    """
    import plotly.graph_objects as go

    conditions = [name for name in dict.fromkeys(result.table["condition"]) if name not in result.reasons]
    if not conditions:
        raise StatisticsError(f"there is no probe to draw: {result.reason}.")
    table = result.table[result.table["condition"].isin(conditions)]
    places = [name for name in result.settings["places"] if name in set(table["place"])]
    canvas = _grid(theme, conditions, places, int(table["layer"].max()) + 1)
    names = dict(zip(_CLASSES, CONTRASTS[result.settings["contrast"]], strict=True))
    for row, condition in enumerate(conditions, start=1):
        for column, place in enumerate(places, start=1):
            part = table[(table["condition"] == condition) & (table["place"] == place)]
            for side, colour in _CLASSES.items():
                counted = part[part[f"n_{side}"] > 0].sort_values("layer")
                if counted.empty:
                    continue
                shares, n = counted[f"share_{side}"].to_numpy(), counted[f"n_{side}"].to_numpy()
                ends = [
                    proportion_interval(round(share * of), int(of))
                    for share, of in zip(shares, n, strict=True)
                ]
                low, high = [float(end.low) for end in ends], [float(end.high) for end in ends]
                layers = counted["layer"].tolist()
                canvas.add_trace(_band(layers, low, high, colour), row=row, col=column)
                canvas.add_trace(
                    go.Scatter(
                        x=layers,
                        y=shares.tolist(),
                        mode="lines+markers",
                        name=names[side],
                        legendgroup=side,
                        showlegend=row == column == 1,
                        line={"color": colour, "width": 1.6},
                        marker={"size": 6, "color": colour, "symbol": _SYMBOLS[side]},
                        customdata=[
                            [int(of), *pair] for of, pair in zip(n, zip(low, high, strict=True), strict=True)
                        ],
                        hovertemplate=f"{plotly_text(condition)}, {place}, layer %{{x}}<br>{names[side]}: %{{y:.3f}}"
                        " [%{customdata[1]:.3f}, %{customdata[2]:.3f}], n = %{customdata[0]}<extra></extra>",
                    ),
                    row=row,
                    col=column,
                )
            _mark_ablated(canvas, part, row, column)
    # Legend entries must not hang on which panel happens to have a ring.
    for name, symbol in (
        ("direction ablated", "diamond-open"),
        ("ablating it lowers refusal, and not as much on twins", "diamond"),
    ):
        canvas.add_trace(
            go.Scatter(
                x=[None],
                y=[None],
                mode="markers",
                name=name,
                marker={"symbol": symbol, "size": 9, "color": FOUND},
            ),
            row=1,
            col=1,
        )
    n = f"{table['n_positive'].max()} {names['positive']}, {table['n_negative'].max()} {names['negative']}"
    canvas.update_xaxes(title_text=f"layer (n = {n})", row=len(conditions), col=(len(places) + 1) // 2)
    return canvas


def _mark_ablated(canvas: go.Figure, part: pd.DataFrame, row: int, column: int) -> None:
    import plotly.graph_objects as go

    tested = part[part["effect"].notna()]
    if tested.empty:
        return
    canvas.add_trace(
        go.Scatter(
            x=tested["layer"].tolist(),
            y=[0.5] * len(tested),
            mode="markers",
            showlegend=False,
            marker={
                "symbol": [
                    "diamond" if str(state).endswith("lowers refusal") else "diamond-open"
                    for state in tested["state"]
                ],
                "size": 9,
                "color": FOUND,
            },
            customdata=tested[["effect", "effect_low", "effect_high", "effect_twins", "state"]]
            .to_numpy()
            .tolist(),
            hovertemplate="layer %{x}, direction ablated<br>on harmful: %{customdata[0]:.2f} nats [%{customdata[1]:.2f},"
            " %{customdata[2]:.2f}]<br>on twins: %{customdata[3]:.2f} nats<br>%{customdata[4]}<extra></extra>",
        ),
        row=row,
        col=column,
    )


def probes_without_heads(result: ProbesAfterAblation, theme: Theme = "light") -> go.Figure:
    """Probe score of a group by layer: as it is, with the heads removed, and with random heads of the same layers removed.

    A row per condition and group, a column per place. Band: 2.5 to 97.5 % of the random sets. Figure 5 of arXiv 2509.00544.

    Raises:
        StatisticsError: Nothing was measured.
    """
    import plotly.graph_objects as go

    table = result.table[result.table["state"] == "measured"]
    if table.empty:
        raise StatisticsError(
            f"there is nothing to draw: {'; '.join(result.reasons.values()) or 'no token there'}."
        )
    places = [name for name in result.settings["places"] if name in set(table["place"])]
    groups = list(dict.fromkeys(zip(table["condition"], table["group"], strict=True)))
    n_sets = int(table["n_controls"].max())
    canvas = _grid(
        theme, [f"{group}, {condition}" for condition, group in groups], places, int(table["layer"].max()) + 1
    )
    lines = (
        ("before", "no head removed", CONTROL, "dot", "circle-open"),
        ("random", f"{n_sets} random sets removed: mean, and 95 % of them", CONTROL, "solid", "square"),
        ("after", "the heads removed", FOUND, "solid", "circle"),
    )
    for row, (condition, group) in enumerate(groups, start=1):
        for column, place in enumerate(places, start=1):
            part = table[
                (table["condition"] == condition) & (table["group"] == group) & (table["place"] == place)
            ].sort_values("layer")
            if part.empty:
                continue
            layers = part["layer"].tolist()
            canvas.add_trace(
                _band(layers, part["random_low"].tolist(), part["random_high"].tolist(), CONTROL),
                row=row,
                col=column,
            )
            for value, name, colour, dash, symbol in lines:
                canvas.add_trace(
                    go.Scatter(
                        x=layers,
                        y=part[value].tolist(),
                        mode="lines+markers",
                        name=name,
                        legendgroup=value,
                        showlegend=row == column == 1,
                        line={"color": colour, "width": 1.8, "dash": dash},
                        marker={"size": 6, "color": colour, "symbol": symbol},
                        customdata=part[["n", "percentile", "n_controls"]].to_numpy().tolist(),
                        hovertemplate=f"{plotly_text(condition)}, {group}, {place}, layer %{{x}}<br>{name}: %{{y:.3f}}, n ="
                        " %{customdata[0]}<br>change larger in size than %{customdata[1]:.0f} % of %{customdata[2]} random"
                        " sets<extra></extra>",
                    ),
                    row=row,
                    col=column,
                )
    canvas.update_xaxes(
        title_text=f"layer (n = {int(table['n'].max())} requests)",
        row=len(groups),
        col=(len(places) + 1) // 2,
    )
    return canvas


def refusal_cliff(curves: Mapping[tuple[str, str], Cliff] | Cliff, theme: Theme = "light") -> go.Figure:
    """A probe's margin along chains of thought, from their first token to their last, and where the block closes.

    Margin: +1 at the mean of the probe's positive class, −1 at that of its negative one. Bands and bars: 95 %, over families.

    Args:
        curves: One, or several by kind of request and condition (`StudyResult.cliffs`); kinds get a panel each.
        theme: "light" or "dark".

    Raises:
        StatisticsError: There is none.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from rim_lens.measures.probes.cliff import Cliff

    if isinstance(curves, Cliff):
        curves = {("requests", str(curves.settings["condition"])): curves}
    if not curves:
        raise StatisticsError("no curve was given.")
    kinds = list(dict.fromkeys(kind for kind, _ in curves))
    n = {kind: max(len(one.per_request) for (own, _), one in curves.items() if own == kind) for kind in kinds}
    canvas = make_subplots(
        cols=len(kinds),
        shared_yaxes=True,
        horizontal_spacing=0.05,
        subplot_titles=[f"{kind} (n = {n[kind]})" for kind in kinds],
    )
    seen: set[str] = set()
    end_at = 1.06
    for (kind, condition), one in curves.items():
        colour, column = condition_colour(condition), kinds.index(kind) + 1
        curve, drop = one.curve, one.drop.iloc[0]
        shares = curve["share"].tolist()
        name = plotly_text(condition)
        canvas.add_trace(
            _band(shares, curve["margin_low"].tolist(), curve["margin_high"].tolist(), colour),
            row=1,
            col=column,
        )
        canvas.add_trace(
            go.Scatter(
                x=shares,
                y=curve["margin"].tolist(),
                mode="lines",
                name=name,
                legendgroup=condition,
                showlegend=condition not in seen,
                line={"color": colour, "width": 2},
                customdata=curve[["margin_low", "margin_high", "share_above"]].to_numpy().tolist(),
                hovertemplate=f"{name}, %{{x:.2f}} of the way<br>margin %{{y:.3f}} [%{{customdata[0]:.3f}},"
                " %{customdata[1]:.3f}]<br>above the threshold: %{customdata[2]:.2f}<extra></extra>",
            ),
            row=1,
            col=column,
        )
        end_at += 0.025
        canvas.add_trace(
            go.Scatter(
                x=[end_at],
                y=[drop["end"]],
                mode="markers",
                showlegend=False,
                legendgroup=condition,
                marker={"symbol": "diamond", "size": 9, "color": colour},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [drop["end_high"] - drop["end"]],
                    "arrayminus": [drop["end"] - drop["end_low"]],
                    "color": colour,
                    "thickness": 1.5,
                    "width": 3,
                },
                hovertemplate=f"{name}, {plotly_text(one.settings['end'])}: %{{y:.3f}}<extra></extra>",
            ),
            row=1,
            col=column,
        )
        seen.add(condition)
        if kind != kinds[-1] and condition == [own for at, own in curves if at == kind][-1]:
            end_at = 1.06
    first = next(iter(curves.values())).settings
    canvas.update_layout(**base_layout(theme, 400, top=84, legend_up=24))
    canvas.add_hline(y=0, line={"color": "#808080", "width": 1, "dash": "dot"})
    canvas.update_xaxes(
        title_text="share of the CoT; ◆ where it closes",
        range=[-0.03, 1.2],
        tickvals=[0, 0.5, 1],
        showgrid=False,
        zeroline=False,
    )
    canvas.update_yaxes(zeroline=False)
    canvas.update_yaxes(
        title_text=f"margin on the probe of<br>layer {first['layer']}, {plotly_text(first['place'])}", col=1
    )
    return canvas


def _grid(theme: Theme, rows: list[str], columns: list[str], n_layers: int) -> go.Figure:
    """Panels of shares by layer, their names above the columns and beside the rows."""
    from plotly.subplots import make_subplots

    canvas = make_subplots(
        rows=len(rows),
        cols=len(columns),
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.02,
        vertical_spacing=0.08 / len(rows),
        column_titles=[plotly_text(name) for name in columns],
    )
    canvas.update_layout(**base_layout(theme, 150 + 150 * len(rows), top=90, legend_up=24))
    canvas.update_yaxes(range=[-0.04, 1.06], tickvals=[0, 0.5, 1], zeroline=False)
    step = max(1, -(-n_layers // 6))
    canvas.update_xaxes(
        tickvals=list(range(0, n_layers, step)), range=[-0.25, n_layers - 0.75], zeroline=False
    )
    for row, name in enumerate(rows, start=1):
        shown = plotly_text(name).replace(", ", "<br>") if len(rows) > 1 or "," in name else plotly_text(name)
        canvas.update_yaxes(title_text=f"{shown}<br>share above", row=row, col=1)
    return canvas


def _band(x: list[Any], low: list[float], high: list[float], colour: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "x": [*x, *reversed(x)],
        "y": [*high, *reversed(low)],
        "fill": "toself",
        "fillcolor": see_through(colour),
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        "showlegend": False,
    }
