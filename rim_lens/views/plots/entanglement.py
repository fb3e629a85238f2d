"""RAS and its rivals of a set of neurons, beside random sets of the same layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rim_lens.views.plots.style import CONTROL, FOUND, Theme, figure, spread

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from rim_lens.measures.entanglement.result import Entanglement

RIVALS: dict[str, str] = {
    "ras": "RAS",
    "floored_ras": "RAS, floored",
    "safety_drop": "safety drop δ⁻",
    "reasoning_rise": "reasoning rise δ⁺",
    "arithmetic": "arithmetic mean",
    "geometric": "geometric mean",
    "minimum": "smaller side",
    "product": "product",
    "l1_safety": "mean |change|, safety",
    "l1_reasoning": "mean |change|, reasoning",
    "l2_safety": "RMS change, safety",
    "l2_reasoning": "RMS change, reasoning",
    "cka_ratio": "CKA ratio",
}


def entanglement_rivals(found: Entanglement, theme: Theme = "light") -> go.Figure:
    """RAS and every rival of it, of the set and of each random set, as a multiple of the random sets' mean.

    The metrics have different units; dividing by what random sets show puts them on one axis, where 1 is no different from
    chance. Metrics without a finite number for the set, or whose random sets have a mean that is not positive, are left out.

    Args:
        found: What `entanglement` returned.
        theme: "light" or "dark".

    Raises:
        ValueError: There are no random sets, or no metric with a number.
    """
    import plotly.graph_objects as go

    sets = found.to_dataframe("sets")
    controls = sets[sets["of"] == "random"]
    if controls.empty:
        raise ValueError("no random set was measured, so that there is nothing to hold the set against.")
    drawn: list[tuple[str, float, float, float, str, list[float]]] = []
    for metric, title in RIVALS.items():
        if metric not in controls:
            continue
        row = found.row(metric)
        others = [float(value) for value in controls[metric] if math.isfinite(value)]
        mean = math.fsum(others) / len(others) if others else math.nan
        if not (math.isfinite(row["value"]) and mean > 0):
            continue
        rank = (
            f"{row['value']:.4g} {row['unit']}".rstrip()
            + f", p = {row['p']:.2g} among {row['n_exchanged']} sets on exchanged labels"
        )
        low, high = (row[side] / mean for side in ("low", "high"))
        drawn.append((title, row["value"] / mean, low, high, rank, [value / mean for value in others]))
    if not drawn:
        raise ValueError("no metric has a number for the set and positive ones for random sets.")
    canvas = figure(theme, 150 + 34 * len(drawn))
    canvas.add_trace(
        go.Scatter(
            x=[value for *_, others in drawn for value in others],
            y=[
                place + shift
                for place, (*_, others) in enumerate(drawn)
                for shift in spread(len(others), 0.6)
            ],
            mode="markers",
            name=f"random sets of {found.settings['n_neurons']} neurons, as many per layer",
            marker={"color": CONTROL, "size": 5, "opacity": 0.5},
            hovertemplate="random set: %{x:.2f} × their mean<extra></extra>",
        )
    )
    canvas.add_trace(
        go.Scatter(
            x=[value for _, value, *_ in drawn],
            y=list(range(len(drawn))),
            mode="markers",
            name="the set, with 95 % interval over prompts",
            marker={"color": FOUND, "size": 11, "symbol": "diamond"},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [_length(high - value) for _, value, _, high, *_ in drawn],
                "arrayminus": [_length(value - low) for _, value, low, *_ in drawn],
                "thickness": 1.6,
                "width": 5,
            },
            text=[f"{title}: {rank}" for title, *_, rank, _ in drawn],
            hovertemplate="%{text}<br>%{x:.2f} × the mean of random sets<extra></extra>",
        )
    )
    canvas.add_vline(x=1, line={"dash": "dot", "color": CONTROL, "width": 1})
    canvas.update_xaxes(title_text="multiple of the random sets' mean", rangemode="tozero")
    canvas.update_yaxes(
        tickvals=list(range(len(drawn))),
        ticktext=[title for title, *_ in drawn],
        range=[len(drawn) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    return canvas


def _length(value: float) -> float:
    """Length of a whisker: where an interval does not hold its own estimate, none to that side."""
    return max(0.0, value) if math.isfinite(value) else 0.0
