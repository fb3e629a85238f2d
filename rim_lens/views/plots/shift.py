"""Reciprocal activation shift beside its random control, and what the tuned models refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rim_lens.views import numbers
from rim_lens.views.plots.refusal import stacked
from rim_lens.views.plots.style import CONTROL, FOUND, GREEN, Theme, figure, spread
from rim_lens.views.text import plotly_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from rim_lens.study import StudyResult


def activation_shift(result: StudyResult, theme: Theme = "light") -> go.Figure:
    """RAS of the safety set, of random sets of the same size per layer, and of all neurons, per tuned model.

    Raises:
        ValueError: The study has no tuned model.
    """
    import plotly.graph_objects as go

    shifts = result.shift["tuned"]
    if not shifts:
        raise ValueError("this study has no tuned model, so that there is no shift between models.")
    names = list(shifts)
    size = result.shift["set_size"]
    canvas = figure(theme, 190 + 70 * len(names))
    for place, name in enumerate(names):
        found, first = shifts[name], place == 0
        label = plotly_text(name)
        controls = [value for value in found["random"] if value is not None]
        canvas.add_trace(
            go.Scatter(
                x=controls,
                y=[place + jitter for jitter in spread(len(controls), 0.5)],
                mode="markers",
                name=f"random sets of {size} neurons, as many per layer",
                legendgroup="random",
                showlegend=first,
                marker={"color": CONTROL, "size": 6, "opacity": 0.6},
                text=[label] * len(controls),
                hovertemplate="%{text}, random set: %{x:.5f}<extra></extra>",
            )
        )
        for key, title, symbol, colour in (
            ("all", "all neurons", "circle-open", GREEN),
            ("safety", f"safety set of {size} neurons", "diamond", FOUND),
        ):
            value = found[key]["value"]
            canvas.add_trace(
                go.Scatter(
                    x=[value],
                    y=[place],
                    mode="markers",
                    name=title,
                    legendgroup=key,
                    showlegend=first,
                    marker={
                        "symbol": symbol,
                        "size": 14,
                        "color": colour,
                        "line": {"width": 2 if key == "all" else 0},
                    },
                    customdata=[[found[key]["safety_drop"], found[key]["reasoning_rise"]]],
                    text=[label],
                    hovertemplate=f"%{{text}}, {title}: %{{x:.5f}}<br>safety drop %{{customdata[0]:.5f}}"
                    "<br>reasoning rise %{customdata[1]:.5f}<extra></extra>",
                )
            )
    n = result.design["n_evaluate"], result.design["n_reasoning"]
    canvas.update_xaxes(
        title_text=f"RAS (unit of the activations; n = {n[0]} harmful and {n[1]} reasoning prompts)",
        rangemode="tozero",
    )
    canvas.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=[plotly_text(name) for name in names],
        range=[len(names) - 0.5, -0.5],
        showgrid=False,
        zeroline=False,
    )
    return canvas


def tuned_outcomes(result: StudyResult, theme: Theme = "light") -> go.Figure:
    """What the base and each tuned model write to harmful requests with thinking off."""
    shares = numbers.outcome_shares(result)
    models = ["base", *result.tuned]
    rows = [
        {**row, "label": plotly_text(model)}
        for model in models
        for row in shares[
            (shares["model"] == model) & (shares["kind"] == "harmful") & (shares["condition"] == "off")
        ].to_dict(orient="records")
    ]
    return stacked(
        [(f"harmful requests, thinking off (n = {rows[0]['n']})", rows)], theme, axis="model", height=360
    )
