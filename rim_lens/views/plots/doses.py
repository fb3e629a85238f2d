"""What removing neurons does: over the size of the set, by way of the logits, and over every choice the paper leaves open."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rim_lens.views.plots.style import BLUE, CONTROL, FOUND, GREEN, ORANGE, Theme, figure, see_through

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_APART = 1.3  # sizes nearer than that have no room for two numbers
_LINES = (
    ("score", "harmful", "harmful requests", FOUND),
    ("score", "harmless", "their harmless twins", BLUE),
    ("specificity", "harmful − harmless", "specificity: harmful minus twin", GREEN),
)


def dose_effects(table: pd.DataFrame, theme: Theme = "light") -> go.Figure:
    """Change of the refusal score over how many neurons are removed, on harmful requests and on their twins.

    The band is what random sets of the same size per layer do to harmful requests (2.5 to 97.5 % of sets). A set of refusal
    leaves the band on harmful requests and stays near 0 on twins.

    Args:
        table: What `dose_curve` returned.
        theme: "light" or "dark".

    Raises:
        ValueError: The table is empty.
    """
    import plotly.graph_objects as go

    if table.empty:
        raise ValueError("a dose curve without a row was given; remove at least one neuron.")
    canvas = figure(theme, 420)
    for measure, kind, title, colour in _LINES:
        rows = table[(table["measure"] == measure) & (table["kind"] == kind)].sort_values("size")
        if rows.empty:
            continue
        sizes = rows["size"].tolist()
        if kind == "harmful" and rows["random_low"].notna().any():
            known = rows[rows["random_low"].notna()]
            at = known["size"].tolist()
            canvas.add_trace(
                go.Scatter(
                    x=at + at[::-1],
                    y=known["random_high"].tolist() + known["random_low"].tolist()[::-1],
                    mode="lines",
                    fill="toself",
                    fillcolor=see_through(CONTROL, 0.3),
                    line={"width": 0},
                    hoverinfo="skip",
                    name="random sets, harmful requests",
                )
            )
        canvas.add_trace(
            go.Scatter(
                x=sizes,
                y=rows["change"].tolist(),
                mode="lines+markers",
                name=f"{title} (n = {int(rows['n'].iloc[0])})",
                line={"color": colour},
                marker={"size": 8},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": (rows["change_high"] - rows["change"]).clip(lower=0).tolist(),
                    "arrayminus": (rows["change"] - rows["change_low"]).clip(lower=0).tolist(),
                    "thickness": 1.2,
                    "width": 4,
                },
                customdata=rows[["change_low", "change_high", "p"]].values.tolist(),
                hovertemplate="%{x} neurons: %{y:.2f} nats [%{customdata[0]:.2f}, %{customdata[1]:.2f}], p = %{customdata[2]:.2g}"
                f"<extra>{title}</extra>",
            )
        )
    canvas.add_hline(y=0, line={"dash": "dot", "color": CONTROL, "width": 1})
    ticks: list[int] = []
    for size in sorted(set(table["size"].tolist()), reverse=True):
        if not ticks or size * _APART <= ticks[-1]:
            ticks.append(size)
    canvas.update_xaxes(
        title_text="neurons removed, in the order of the ranking",
        type="log",
        tickvals=ticks,
        ticktext=[str(size) for size in ticks],
        tickangle=0,
    )
    canvas.update_yaxes(title_text="change of the refusal score, nats")
    return canvas


def direct_and_total(table: pd.DataFrame, theme: Theme = "light") -> go.Figure:
    """Of each neuron, what its removal does to the refusal score, and how much of that it writes there itself.

    On the dotted diagonal the whole effect is direct: the neuron writes the words. On the horizontal line at 0 none is: it works
    through what reads it.

    Args:
        table: What `direct_to_logits` returned.
        theme: "light" or "dark".

    Raises:
        ValueError: The table is empty.
    """
    import plotly.graph_objects as go

    if table.empty:
        raise ValueError("a table without a neuron was given.")
    canvas = figure(theme, 440)
    names = [f"L{layer}N{neuron}" for layer, neuron in zip(table["layer"], table["neuron"], strict=True)]
    writer = table["writer"].astype(bool).to_numpy()
    for told, title, colour, symbol in (
        (writer, "logit writers", ORANGE, "square"),
        (~writer, "others", BLUE, "circle"),
    ):
        part = table[told]
        if part.empty:
            continue
        canvas.add_trace(
            go.Scatter(
                x=part["total"].tolist(),
                y=part["direct"].tolist(),
                mode="markers",
                name=f"{title} ({len(part)})",
                marker={"color": colour, "symbol": symbol, "size": 9},
                error_x=_whisker(part, "total"),
                error_y=_whisker(part, "direct"),
                text=[name for name, here in zip(names, told, strict=True) if here],
                hovertemplate="%{text}<br>total %{x:.3f} nats, direct %{y:.3f}<extra></extra>",
            )
        )
    whole = table.attrs.get("set")
    if whole:
        canvas.add_trace(
            go.Scatter(
                x=[whole["total"]],
                y=[whole["direct"]],
                mode="markers",
                name="all together",
                marker={"color": FOUND, "symbol": "diamond", "size": 12},
                hovertemplate="all together<br>total %{x:.3f} nats, direct %{y:.3f}<extra></extra>",
            )
        )
    values = [*table["total"], *table["direct"], *([whole["total"], whole["direct"]] if whole else []), 0.0]
    low, high = min(values), max(values)
    canvas.add_trace(
        go.Scatter(
            x=[low, high],
            y=[low, high],
            mode="lines",
            name="all of it direct",
            line={"dash": "dot", "color": CONTROL, "width": 1},
            hoverinfo="skip",
        )
    )
    canvas.update_xaxes(title_text="total effect of removal on the refusal score, nats")
    canvas.update_yaxes(title_text="direct effect, nats")
    return canvas


def specification_curve(table: pd.DataFrame, theme: Theme = "light") -> go.Figure:
    """P of RAS over every choice the paper leaves open, sorted, beside its rank among random sets.

    Universes share prompts and models: how many lie below .05 is a description, no test. Without entanglement the curve of p
    runs from about 0 to 1.

    Args:
        table: What `multiverse` returned.
        theme: "light" or "dark".

    Raises:
        ValueError: No universe has a p.
    """
    import plotly.graph_objects as go

    rows = table[table["p"].notna()].sort_values("p", kind="stable")
    if rows.empty:
        raise ValueError(
            "no universe has a p: none chose neurons that moved both ways. See the column reason."
        )
    canvas = figure(theme, 400)
    told = [
        f"{row.response} response, {row.pool} of {row.site}, m = {row.m}, {row.min_fraction:.0%} of pairs, {row.average}:"
        f" {row.n_neurons} neurons, RAS {row.ras:.3g}"
        for row in rows.itertuples()
    ]
    places = list(range(1, len(rows) + 1))
    for column, scale, title, colour, symbol in (
        ("p", 1.0, "p, among sets on exchanged labels", FOUND, "circle"),
        ("percentile", 0.01, "1 − percentile among random sets", CONTROL, "circle-open"),
    ):
        values = [scale * value if column == "p" else 1 - scale * value for value in rows[column]]
        canvas.add_trace(
            go.Scatter(
                x=places,
                y=[value if math.isfinite(value) else None for value in values],
                mode="markers",
                name=title,
                marker={"color": colour, "symbol": symbol, "size": 7},
                text=told,
                hovertemplate="%{text}<br>%{y:.3f}<extra></extra>",
            )
        )
    canvas.add_hline(y=0.05, line={"dash": "dot", "color": CONTROL, "width": 1})
    canvas.update_xaxes(
        title_text=f"universe, sorted by p ({len(rows)} of {len(table)} chose neurons with a p)"
    )
    canvas.update_yaxes(title_text="p, and 1 − percentile", range=[-0.03, 1.03])
    return canvas


def _whisker(part: pd.DataFrame, name: str) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": (part[f"{name}_high"] - part[name]).clip(lower=0).tolist(),
        "arrayminus": (part[name] - part[f"{name}_low"]).clip(lower=0).tolist(),
        "thickness": 1,
        "width": 0,
    }
