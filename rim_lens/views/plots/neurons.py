"""Sets of neurons: where in the model they sit, and how their size hangs on the rule that chose them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rim_lens.views.plots.style import BLUE, CONTROL, FOUND, GREEN, ORANGE, PINK, SKY, Theme, figure
from rim_lens.views.text import plotly_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from rim_lens.measures.neurons.sets import NeuronSet

LEAST_DRAWN = 0.1
_COLOURS = (FOUND, BLUE, GREEN, ORANGE, PINK, SKY)


def neurons_by_layer(sets: NeuronSet | Mapping[str, NeuronSet], theme: Theme = "light") -> go.Figure:
    """How many neurons each set has in each layer; layer 0 at the left.

    Neurons of the last layers write into the logits almost directly: a set that sits there may do no more than write the
    words of a refusal (`direct_to_logits` tells).

    Args:
        sets: One set, or several by name.
        theme: "light" or "dark".

    Raises:
        ValueError: There is no set, or they are of models of different shape.
    """
    import plotly.graph_objects as go

    named = dict(sets) if isinstance(sets, Mapping) else {"set": sets}
    shapes = {(one.n_layers, one.d_mlp) for one in named.values()}
    if len(shapes) != 1:
        raise ValueError(
            f"{len(named)} sets of {len(shapes)} shapes of model were given; draw sets of one shape of model together."
        )
    ((n_layers, d_mlp),) = shapes
    canvas = figure(theme, 340, barmode="group", bargap=0.25)
    for place, (name, one) in enumerate(named.items()):
        counts = one.per_layer.tolist()
        canvas.add_trace(
            go.Bar(
                name=f"{plotly_text(name)} ({len(one)} neurons)",
                showlegend=True,
                x=list(range(n_layers)),
                y=counts,
                marker={"color": _COLOURS[place % len(_COLOURS)]},
                hovertemplate=f"layer %{{x}}: %{{y}} of {d_mlp} neurons<extra>{plotly_text(name)}</extra>",
            )
        )
    canvas.update_xaxes(
        title_text=f"layer (of {d_mlp} neurons each)", dtick=max(1, n_layers // 15), showgrid=False
    )
    canvas.update_yaxes(title_text="neurons in the set", rangemode="tozero")
    return canvas


def neuron_sweep(table: pd.DataFrame, m: int | None = None, theme: Theme = "light") -> go.Figure:
    """Size of the chosen set over m, for each share of pairs that must agree, beside the size to expect by chance.

    Args:
        table: What `rim_lens.measures.neurons.choosing.sweep` returned.
        m: The m that was used, marked by a line.
        theme: "light" or "dark".

    Raises:
        ValueError: The table is empty.
    """
    import plotly.graph_objects as go

    if table.empty:
        raise ValueError("a sweep without a row was given; sweep over some values of m.")
    canvas = figure(theme, 380)
    for place, (share, part) in enumerate(table.groupby("min_fraction", sort=False)):
        rows = part.sort_values("m")
        name = "all pairs" if share == 1 else f"{share:.0%} of pairs"
        colour = _COLOURS[place % len(_COLOURS)]
        for column, dash, title in (
            ("size", "solid", f"chosen by {name}"),
            ("by_chance", "dot", f"by chance, {name}"),
        ):
            # A logarithmic axis has no place for none: such points are left out.
            sizes = [value if value >= LEAST_DRAWN else None for value in rows[column].tolist()]
            if column == "by_chance" and not any(sizes):
                continue
            canvas.add_trace(
                go.Scatter(
                    x=rows["m"].tolist(),
                    y=sizes,
                    mode="lines+markers" if column == "size" else "lines",
                    name=title,
                    line={"dash": dash, "color": colour},
                    marker={"size": 8},
                    hovertemplate=f"m = %{{x}}, {title}: %{{y:.3g}} neurons<extra></extra>",
                )
            )
    if m is not None:
        canvas.add_shape(
            type="line",
            x0=m,
            x1=m,
            y0=0,
            y1=1,
            yref="paper",
            line={"dash": "dash", "color": CONTROL, "width": 1},
        )
        # Of annotations, plotly wants the logarithm.
        canvas.add_annotation(
            x=math.log10(m),
            y=1,
            yref="paper",
            text=f"m = {m}",
            showarrow=False,
            xanchor="left",
            yanchor="top",
        )
    canvas.update_xaxes(title_text="m: neurons that each pair names", type="log", dtick=1)
    canvas.update_yaxes(title_text="neurons in the set", type="log", dtick=1)
    values = sorted(set(table["m"].tolist()))
    if len(values) <= 12:
        canvas.update_xaxes(tickvals=values, ticktext=[str(value) for value in values])
    return canvas
