"""What a model writes, and how far it leans to refusing, in each think condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rim_lens.views import numbers
from rim_lens.views.plots.style import OUTCOMES, WHISKER, Theme, base_layout, condition_colour, figure, spread
from rim_lens.views.text import plotly_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from rim_lens.study import StudyResult


def outcomes(result: StudyResult, theme: Theme = "light") -> go.Figure:
    """Refuse, comply or other, as shares stacked per condition: harmful requests beside their twins.

    Whiskers: 95 % Wilson interval of the refused share. The last bar, where heads were found, is thinking off with those
    removed.
    """
    shares = numbers.outcome_shares(result)
    columns = [("base", condition, condition) for condition in result.conditions]
    if (shares["model"] == "without_heads").any():
        columns.append(("without_heads", "off", "off, heads<br>removed"))
    panels = []
    for kind, title in numbers.KINDS.items():
        rows = []
        for model, condition, label in columns:
            match = shares[
                (shares["model"] == model) & (shares["kind"] == kind) & (shares["condition"] == condition)
            ]
            rows += [{**row, "label": label} for row in match.to_dict(orient="records")]
        n = max((row["n"] for row in rows), default=0)
        panels.append((f"{title} (n = {n})", rows))
    return stacked(panels, theme)


def stacked(
    panels: Sequence[tuple[str, Sequence[Mapping[str, Any]]]],
    theme: Theme = "light",
    axis: str = "think condition",
    height: int = 400,
) -> go.Figure:
    """Outcome shares as stacked bars, one panel per title; each row has a label, counts and an interval."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    canvas = make_subplots(
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.05,
        subplot_titles=[title for title, _ in panels],
    )
    for column, (_, rows) in enumerate(panels, start=1):
        for name, colour in OUTCOMES.items():
            interval = (
                "<br>95 % interval %{customdata[2]:.3f} to %{customdata[3]:.3f}" if name == "refuse" else ""
            )
            canvas.add_trace(
                go.Bar(
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1,
                    x=[row["label"] for row in rows],
                    y=[row[name] / row["n"] for row in rows],
                    customdata=[[row[name], row["n"], row["low"], row["high"]] for row in rows],
                    hovertemplate=f"%{{x}}<br>{name}: %{{customdata[0]}} of %{{customdata[1]}} = %{{y:.3f}}{interval}<extra></extra>",
                    marker={"color": colour, "line": {"width": 0.5, "color": "#FFFFFF"}},
                ),
                row=1,
                col=column,
            )
        # A trace of its own, last: a bar's own whiskers would lie under the bars stacked on it.
        canvas.add_trace(
            go.Scatter(
                x=[row["label"] for row in rows],
                y=[row["share"] for row in rows],
                mode="markers",
                marker={"size": 0.1, "color": WHISKER},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [row["high"] - row["share"] for row in rows],
                    "arrayminus": [row["share"] - row["low"] for row in rows],
                    "color": WHISKER,
                    "thickness": 1.8,
                    "width": 6,
                },
                hoverinfo="skip",
                showlegend=False,
            ),
            row=1,
            col=column,
        )
    canvas.update_layout(**base_layout(theme, height, top=84, legend_up=24), barmode="stack", bargap=0.3)
    canvas.update_yaxes(range=[0, 1.02], tickvals=[0, 0.25, 0.5, 0.75, 1])
    canvas.update_yaxes(title_text="share of requests", col=1)
    canvas.update_xaxes(title_text=axis, tickangle=0, tickfont={"size": 11}, showgrid=False)
    return canvas


def scores(result: StudyResult, theme: Theme = "light") -> go.Figure:
    """Refusal score of every request in each closed condition, and its mean with a 95 % interval over families."""
    import plotly.graph_objects as go

    means = numbers.score_means(result)
    conditions = [name for name in result.conditions if name in set(result.scores["condition"])]
    kinds: dict[numbers.Kind, tuple[str, float]] = {
        "harmful": ("circle", -0.19),
        "harmless": ("circle-open", 0.19),
    }
    canvas = figure(theme, 420)
    for place, condition in enumerate(conditions):
        for kind, (symbol, offset) in kinds.items():
            part = result.scores[(result.scores["condition"] == condition) & (result.scores["kind"] == kind)]
            if part.empty:
                continue
            canvas.add_trace(
                go.Scatter(
                    mode="markers",
                    x=[place + offset + jitter for jitter in spread(len(part), 0.2)],
                    y=part["score"].tolist(),
                    customdata=[
                        [plotly_text(prompt), plotly_text(family), plotly_text(repr(first))]
                        for prompt, family, first in zip(
                            part["prompt"], part["family"], part["first_token"], strict=True
                        )
                    ],
                    hovertemplate=f"{condition}, {numbers.KINDS[kind]}<br>%{{customdata[0]}}<br>family: %{{customdata[1]}}"
                    "<br>score: %{y:.4f} nats<br>most probable first word: %{customdata[2]}<extra></extra>",
                    marker={
                        "symbol": symbol,
                        "size": 6,
                        "color": condition_colour(condition),
                        "opacity": 0.7,
                    },
                    showlegend=False,
                )
            )
            mean = means[(means["condition"] == condition) & (means["kind"] == kind)].iloc[0]
            canvas.add_trace(
                go.Scatter(
                    mode="markers",
                    x=[place + offset + 0.15],
                    y=[mean["mean"]],
                    error_y={
                        "type": "data",
                        "symmetric": False,
                        "array": [mean["high"] - mean["mean"]],
                        "arrayminus": [mean["mean"] - mean["low"]],
                        "thickness": 2.5,
                        "width": 6,
                    },
                    customdata=[[mean["low"], mean["high"], mean["n"], mean["n_families"]]],
                    hovertemplate=f"{condition}, {numbers.KINDS[kind]}<br>mean: %{{y:.4f}} nats<br>95 % interval"
                    " %{customdata[0]:.4f} to %{customdata[1]:.4f}<br>n = %{customdata[2]}, %{customdata[3]} families<extra></extra>",
                    marker={
                        "symbol": "diamond" if kind == "harmful" else "diamond-open",
                        "size": 10,
                        "color": condition_colour(condition),
                    },
                    showlegend=False,
                )
            )
    for kind, (symbol, _) in kinds.items():
        canvas.add_trace(
            go.Scatter(
                x=[None],
                y=[None],
                mode="markers",
                name=f"{numbers.KINDS[kind]}, one point each",
                marker={"symbol": symbol, "size": 8, "color": "#808080"},
            )
        )
    canvas.add_trace(
        go.Scatter(
            x=[None],
            y=[None],
            mode="markers",
            name="mean, 95 % interval over families",
            marker={"symbol": "diamond", "size": 10, "color": "#808080"},
        )
    )
    n = int(means["n"].max())
    canvas.add_hline(y=0, line={"color": "#808080", "width": 1, "dash": "dot"})
    canvas.update_xaxes(
        title_text=f"think condition (n = {n} requests and as many twins)",
        tickvals=list(range(len(conditions))),
        ticktext=conditions,
        range=[-0.5, len(conditions) - 0.5],
        showgrid=False,
        zeroline=False,
    )
    canvas.update_yaxes(title_text="refusal score (log-odds, nats)", zeroline=False)
    return canvas


def tuned_outcomes(result: StudyResult, theme: Theme = "light") -> go.Figure:
    """What the base and each tuned model write to harmful requests with thinking off.

    Raises:
        ValueError: The study has no answers of a tuned model.
    """
    tuned = numbers.tuned_written(result)
    if not tuned:
        raise ValueError("this study has no answers of a tuned model, so that there is nothing to draw.")
    shares = numbers.outcome_shares(result)
    models = ["base", *tuned]
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
