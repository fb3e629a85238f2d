"""Runs of fine-tuning: what they do on the way, how metrics go with lost refusal, and how far random neurons move as well."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rim_lens.views.plots.entanglement import RIVALS
from rim_lens.views.plots.style import (
    BLUE,
    CONDITIONS,
    CONTROL,
    FOUND,
    GREEN,
    GREY,
    ORANGE,
    OTHER_CONDITIONS,
    PINK,
    SKY,
    Theme,
    base_layout,
    see_through,
)
from rim_lens.views.text import plotly_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from rim_lens.measures.checkpoints.result import Comparison

# Names of metrics of the whole model, and of all or random neurons; those of a set are `RIVALS`.
METRICS: dict[str, str] = {
    **RIVALS,
    "ras_all": "RAS, all neurons",
    "ras_random": "RAS, random sets",
    "cka_ratio_model": "CKA ratio, residual stream",
    "whitened_cosine_shift": "whitened cosine, change",
    "kl": "KL, nats/token",
    "weight_drift": "weight drift",
}
LOST = {"lost": "refusal score lost, nats", "lost_rate": "share refused, lost"}
_CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, FOUND, GREY)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "pentagon")
_COURSE = (
    ("refused_harmful", "harmful requests refused"),
    ("refused_harmless", "harmless twins refused"),
    ("accuracy", "questions answered right"),
)
_PANEL, _RAS_PANEL, _ACROSS = 240, 225, 2
_BETWEEN = 72  # pixels between rows of panels, about: ticks above, a title below


def training_course(
    comparison: Comparison, kinds: Mapping[str, str] | None = None, theme: Theme = "light"
) -> go.Figure:
    """Refusal, over-refusal and accuracy over the steps of each run; the base is step 0.

    Args:
        comparison: What `rl.compare` found.
        kinds: Run → what it was trained on: runs of one kind share a colour. None: each is its own.
        theme: "light" or "dark".
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    told, table = _kinds(comparison, kinds), comparison.table
    accuracy = [name for name in table if name.startswith("accuracy_")]
    panels = [(name, title) for name, title in _COURSE if name in table]
    panels += [(name, f"{_COURSE[-1][1]}, {name.removeprefix('accuracy_')}") for name in accuracy]
    canvas = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.16 / len(panels),
        subplot_titles=[title for _, title in panels],
    )
    canvas.update_layout(base_layout(theme, 90 + 185 * len(panels), top=92, legend_up=26))
    colours, symbols = _colours(told), _symbols(told)
    for number, (column, _) in enumerate(panels, start=1):
        for run in comparison.runs:
            rows = table[table["run"] == run].sort_values("step")
            canvas.add_trace(
                go.Scatter(
                    x=rows["step"].tolist(),
                    y=rows[column].tolist(),
                    mode="lines+markers",
                    name=plotly_text(told[run]),
                    legendgroup=told[run],
                    showlegend=number == 1 and run == _first(told, run),
                    line={"color": colours[told[run]], "width": 1.6},
                    marker={"symbol": symbols[run], "size": 7},
                    hovertemplate=f"step %{{x}}: %{{y:.2f}}<extra>{plotly_text(run)}</extra>",
                ),
                row=number,
                col=1,
            )
    canvas.update_yaxes(range=[-0.04, 1.04])
    canvas.update_xaxes(title_text="step of training (0: the base)", row=len(panels), col=1)
    _left_titles(canvas)
    return canvas


def lost_by_drift(
    comparison: Comparison,
    kinds: Mapping[str, str] | None = None,
    by: str = "weight_drift",
    theme: Theme = "light",
) -> go.Figure:
    """Lost refusal score over how far a run had drifted from the base: at equal drift, runs stand above each other.

    Args:
        comparison: What `rl.compare` found, controls that went on included.
        kinds: Run → what it was trained on; runs that are missing in it are drawn dashed, as controls that went on.
        by: The drift: "weight_drift" or "kl".
        theme: "light" or "dark".
    """
    import plotly.graph_objects as go

    named = kinds is not None
    told = {run: (kinds or {}).get(run, "control, gone on" if named else run) for run in comparison.runs}
    colours, symbols = _colours(told), _symbols(told)
    canvas = go.Figure(layout=base_layout(theme, 440))
    # Controls that went on begin as their control did: drawn first, they lie beneath it.
    for run in sorted(comparison.runs, key=lambda run: named and run in (kinds or {})):
        rows = comparison.table[comparison.table["run"] == run].sort_values("step")
        extra = named and run not in (kinds or {})
        canvas.add_trace(
            go.Scatter(
                x=rows[by].tolist(),
                y=rows["lost"].tolist(),
                mode="lines+markers",
                name=plotly_text(told[run]),
                legendgroup=told[run],
                showlegend=run == _first(told, run),
                line={
                    "color": CONTROL if extra else colours[told[run]],
                    "width": 1.6,
                    "dash": "dash" if extra else "solid",
                },
                marker={"symbol": symbols[run], "size": 8},
                customdata=rows["step"].tolist(),
                hovertemplate=f"step %{{customdata}}: drift %{{x:.3g}}, %{{y:.2f}} nats<extra>{plotly_text(run)}</extra>",
            )
        )
    canvas.add_hline(y=0, line={"dash": "dot", "color": CONTROL, "width": 1})
    words = {"weight_drift": "weight drift ‖W − W₀‖ / ‖W₀‖", "kl": "KL from the base, nats per token"}
    canvas.update_xaxes(title_text=words.get(by, by))
    canvas.update_yaxes(title_text=LOST["lost"])
    return canvas


def metrics_against_loss(
    comparison: Comparison,
    correlations: pd.DataFrame,
    metrics: Sequence[str],
    kinds: Mapping[str, str] | None = None,
    outcome: str = "lost",
    theme: Theme = "light",
) -> go.Figure:
    """Each metric against lost refusal, one point a checkpoint, with the pooled correlation, its n and its p.

    Args:
        comparison: What `rl.compare` found.
        correlations: Of the same runs, see `Comparison.correlations`.
        metrics: Columns.
        kinds: See `training_course`.
        outcome: "lost" or "lost_rate".
        theme: "light" or "dark".

    Raises:
        ValueError: No metric was named that has a number.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    told, table = _kinds(comparison, kinds), comparison.table[comparison.table["step"] > 0]
    there = [name for name in metrics if name in table and table[name].notna().any()]
    if not there:
        raise ValueError("no metric with a number was named.")
    pooled = correlations[(correlations["how"] == "pooled") & (correlations["outcome"] == outcome)]
    rows = -(-len(there) // _ACROSS)
    canvas = make_subplots(
        rows=rows,
        cols=_ACROSS,
        subplot_titles=[_panel_title(name, pooled[pooled["metric"] == name]) for name in there],
        horizontal_spacing=0.09,
        vertical_spacing=0 if rows == 1 else _BETWEEN / (_PANEL * rows),
    )
    canvas.update_layout(base_layout(theme, 110 + _PANEL * rows, top=100, legend_up=42))
    colours, symbols = _colours(told), _symbols(told)
    for place, name in enumerate(there):
        for run in comparison.runs:
            its = table[table["run"] == run].sort_values("step")
            canvas.add_trace(
                go.Scatter(
                    x=its[name].tolist(),
                    y=its[outcome].tolist(),
                    mode="lines+markers",
                    name=plotly_text(told[run]),
                    legendgroup=told[run],
                    showlegend=place == 0 and run == _first(told, run),
                    line={"color": see_through(colours[told[run]], 0.35), "width": 1},
                    marker={"color": colours[told[run]], "symbol": symbols[run], "size": 7},
                    customdata=its["step"].tolist(),
                    hovertemplate=f"step %{{customdata}}: %{{x:.3g}}, lost %{{y:.2f}}<extra>{plotly_text(run)}</extra>",
                ),
                row=place // _ACROSS + 1,
                col=place % _ACROSS + 1,
            )
    for row in range(1, rows + 1):
        canvas.update_yaxes(title_text=LOST.get(outcome, outcome), row=row, col=1)
    _left_titles(canvas)
    return canvas


def ras_beside_random(comparison: Comparison, theme: Theme = "light") -> go.Figure:
    """RAS of the set at every checkpoint, beside the band of random sets (2.5 to 97.5 % of them) and their mean.

    Args:
        comparison: What `rl.compare` found by a set of neurons.
        theme: "light" or "dark".

    Raises:
        ValueError: There are no random sets.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    random = comparison.random
    if random.empty or random["ras"].isna().all():
        raise ValueError("no random set was measured, so that there is nothing to hold RAS against.")
    runs = comparison.runs
    rows = -(-len(runs) // _ACROSS)
    canvas = make_subplots(
        rows=rows,
        cols=_ACROSS,
        subplot_titles=[plotly_text(run) for run in runs],
        shared_yaxes="all",
        horizontal_spacing=0.05,
        vertical_spacing=0 if rows == 1 else _BETWEEN / (_RAS_PANEL * rows),
    )
    canvas.update_layout(base_layout(theme, 120 + _RAS_PANEL * rows, top=100, legend_up=34))
    for place, run in enumerate(runs):
        at = {"row": place // _ACROSS + 1, "col": place % _ACROSS + 1}
        its = comparison.table[(comparison.table["run"] == run) & (comparison.table["step"] > 0)]
        its = its.sort_values("step")
        others = random[random["run"] == run].groupby("step")["ras"]
        low, high, mean = others.quantile(0.025), others.quantile(0.975), others.mean()
        steps = low.index.tolist()
        canvas.add_trace(
            go.Scatter(
                x=steps + steps[::-1],
                y=high.tolist() + low.tolist()[::-1],
                mode="lines",
                fill="toself",
                fillcolor=see_through(CONTROL, 0.3),
                line={"width": 0},
                hoverinfo="skip",
                name="random sets, 95 % of them",
                showlegend=place == 0,
                legendgroup="band",
            ),
            **at,
        )
        canvas.add_trace(
            go.Scatter(
                x=steps,
                y=mean.tolist(),
                mode="lines",
                line={"color": CONTROL, "dash": "dot", "width": 1.4},
                name="their mean",
                showlegend=place == 0,
                legendgroup="mean",
                hovertemplate="step %{x}: random sets %{y:.3g}<extra></extra>",
            ),
            **at,
        )
        canvas.add_trace(
            go.Scatter(
                x=its["step"].tolist(),
                y=its["ras"].tolist(),
                mode="lines+markers",
                line={"color": FOUND, "width": 1.6},
                marker={"size": 8, "symbol": "diamond"},
                name="the chosen neurons",
                showlegend=place == 0,
                legendgroup="set",
                customdata=its[["ras_percentile", "ras_p"]].values.tolist(),
                hovertemplate="step %{x}: RAS %{y:.3g}, larger than %{customdata[0]:.0f} % of random sets, p = %{customdata[1]:.2g}"
                f"<extra>{plotly_text(run)}</extra>",
            ),
            **at,
        )
    for row in range(1, rows + 1):
        canvas.update_yaxes(title_text="RAS", row=row, col=1)
    canvas.update_yaxes(rangemode="tozero")
    for column in range(1, _ACROSS + 1):
        last = rows if len(runs) % _ACROSS == 0 or column <= len(runs) % _ACROSS else rows - 1
        if last:
            canvas.update_xaxes(title_text="step of training", row=last, col=column)
    _left_titles(canvas)
    return canvas


# --- shared ------------------------------------------------------------------------------------------


def _kinds(comparison: Comparison, kinds: Mapping[str, str] | None) -> dict[str, str]:
    return {run: (kinds or {}).get(run, run) for run in comparison.runs}


def _first(told: Mapping[str, str], run: str) -> str:
    """The run that stands for its kind in the legend."""
    return next(one for one, kind in told.items() if kind == told[run])


def _colours(told: Mapping[str, str]) -> dict[str, str]:
    """A colour for each kind: that of the chain of thought, where it is one."""
    known = CONDITIONS | OTHER_CONDITIONS
    kinds = list(dict.fromkeys(told.values()))
    free = [colour for colour in _CYCLE if colour not in {known.get(kind) for kind in kinds}]
    found: dict[str, str] = {}
    for kind in kinds:
        found[kind] = known.get(kind) or free[len(found) % len(free)]
    return found


def _symbols(told: Mapping[str, str]) -> dict[str, str]:
    """A mark for each run, by its place among those of its kind."""
    met: dict[str, int] = {}
    found = {}
    for run, kind in told.items():
        found[run] = _SYMBOLS[met.get(kind, 0) % len(_SYMBOLS)]
        met[kind] = met.get(kind, 0) + 1
    return found


def _panel_title(name: str, row: pd.DataFrame) -> str:
    title = METRICS.get(name, name)
    if row.empty or math.isnan(row["pearson"].iloc[0]):
        return f"{title}: no correlation"
    one = row.iloc[0]
    tested = "no p" if math.isnan(one["p_pearson"]) else f"p = {one['p_pearson']:.2g}"
    return (
        f"{title}<br>r = {one['pearson']:.2f}, {int(one['n'])} points of {int(one['n_runs'])} runs, {tested}"
    )


def _left_titles(canvas: go.Figure) -> None:
    """Titles of panels at their left edge, in the size of other text."""
    axes = [axis for axis in canvas.layout if axis.startswith("xaxis")]
    starts = sorted({round(canvas.layout[axis].domain[0], 6) for axis in axes})
    for note in canvas.layout.annotations:
        left = max(start for start in starts if start <= note.x)
        note.update(x=left, xanchor="left", font={"size": 13}, align="left")
