"""Single heads looking: their row of attention key by key, and where their largest entry lies from the assistant header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_lens.errors import StatisticsError
from rim_lens.views import numbers
from rim_lens.views.numbers import Kind
from rim_lens.views.plots.style import Theme, base_layout, condition_colour
from rim_lens.views.text import plotly_text

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from numpy.typing import ArrayLike

    from rim_lens.study import StudyResult

MOST_KEYS = 400  # of a row; a picture of more shows nothing


def attention_pattern(
    panels: Mapping[str, tuple[Sequence[str], ArrayLike]], title: str = "", theme: Theme = "light"
) -> go.Figure:
    r"""One head's attention on one request in two conditions, side by side, key by key. Figure 4a of arXiv 2509.00544.

    Tokens are written out: `<think>` is seen, a newline is `\n`, the marks of byte tokenizers are blanks.

    Args:
        panels: By the name of a condition, the tokens of the request and the attention to each: one row [key], as
            `rl.AttentionRows` reads it, or a whole pattern [query, key].
        title: Which head and request.
        theme: "light" or "dark".

    Raises:
        StatisticsError: No panel, a panel with more tokens than entries or the other way round, or too long to be seen.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    arrays = {
        name: (list(tokens), np.asarray(weights, dtype=float)) for name, (tokens, weights) in panels.items()
    }
    if not arrays:
        raise StatisticsError("no condition was given; give {name: (tokens, attention)}.")
    for name, (tokens, weights) in arrays.items():
        if weights.ndim not in (1, 2) or set(weights.shape) != {len(tokens)} or len(tokens) > MOST_KEYS:
            raise StatisticsError(
                f"{name!r} has {len(tokens)} tokens and attention of shape {weights.shape}; give one row [key] or one pattern"
                f" [query, key] of those tokens, at most {MOST_KEYS}."
            )
    whole = any(weights.ndim == 2 for _, weights in arrays.values())
    longest = max(len(tokens) for tokens, _ in arrays.values())
    canvas = make_subplots(
        cols=len(arrays),
        horizontal_spacing=0.34 / len(arrays),
        subplot_titles=[plotly_text(name) for name in arrays],
    )
    top = max((float(weights.max()) for _, weights in arrays.values()), default=1.0) or 1.0
    for column, (name, (tokens, weights)) in enumerate(arrays.items(), start=1):
        labels = [_token(token) for token in tokens]
        places = list(range(len(tokens)))
        if weights.ndim == 1:
            canvas.add_trace(
                go.Bar(
                    x=np.round(weights, 6).tolist(),
                    y=places,
                    orientation="h",
                    marker={"color": condition_colour(name)},
                    showlegend=False,
                    customdata=labels,
                    hovertemplate="%{customdata}, key %{y}: %{x:.4f}<extra></extra>",
                ),
                row=1,
                col=column,
            )
            canvas.update_xaxes(
                title_text="attention of the last prompt token",
                range=[0, 1.05 * top],
                nticks=4,
                row=1,
                col=column,
            )
        else:
            canvas.add_trace(
                go.Heatmap(
                    z=np.round(weights, 6).tolist(),
                    coloraxis="coloraxis",
                    customdata=[[[query, key] for key in labels] for query in labels],
                    hovertemplate="from %{customdata[0]} to %{customdata[1]}: %{z:.4f}<extra></extra>",
                ),
                row=1,
                col=column,
            )
            canvas.update_xaxes(
                title_text="key",
                tickvals=places,
                ticktext=labels,
                tickangle=60,
                showgrid=False,
                row=1,
                col=column,
            )
        canvas.update_yaxes(
            tickvals=places,
            ticktext=labels,
            tickfont={"size": 11},
            autorange="reversed",
            showgrid=False,
            zeroline=False,
            row=1,
            col=column,
        )
    height = 150 + 17 * longest + (90 if whole else 0)
    canvas.update_layout(**base_layout(theme, height, top=80), bargap=0.15)
    if title:
        canvas.update_layout(
            title={"text": plotly_text(title), "font": {"size": 14}, "x": 0, "xref": "paper"}
        )
    if whole:
        canvas.update_layout(
            coloraxis={"cmin": 0, "colorbar": {"thickness": 10, "outlinewidth": 0, "title": "share"}}
        )
    return canvas


def head_pattern(
    result: StudyResult,
    head: tuple[int, int] | None = None,
    conditions: Sequence[str] = ("open", "off"),
    prompt: int = 0,
    theme: Theme = "light",
) -> go.Figure:
    """`attention_pattern` of a head whose rows a study kept: the last prompt token of one harmful request.

    Args:
        result: A finished study.
        head: (layer, head), found or called refusal; the first of them when None.
        conditions: Which, of those the study measured.
        prompt: Which of the few requests.
        theme: "light" or "dark".

    Raises:
        StatisticsError: The study kept no such row.
    """
    rows = result.attention_rows
    if head is None and rows:
        layer, number = rows[0]["head"]
        head = (int(layer), int(number))
    kept = [row for row in rows if head is not None and tuple(row["head"]) == tuple(head)]
    names = list(dict.fromkeys(row["prompt"] for row in kept))
    chosen = {row["condition"]: row for row in kept if names[prompt:] and row["prompt"] == names[prompt]}
    absent = [name for name in conditions if name not in chosen]
    if head is None or absent:
        raise StatisticsError(
            f"rows of head {head}, request {prompt}, in {', '.join(conditions)} were asked for; no head was found in this study,"
            " or it keeps other ones: see result.attention_rows. Read them with rl.capture(model, batch, rl.AttentionRows([head]))."
        )
    panels = {name: (chosen[name]["tokens"], chosen[name]["attention"]) for name in conditions}
    return attention_pattern(panels, f"{numbers.head_name(*head)}, {names[prompt]} (n = 1)", theme)


def argmax_positions(
    result: StudyResult,
    heads: Sequence[tuple[int, int]] | None = None,
    conditions: Sequence[str] = ("open", "off"),
    kind: Kind = "harmful",
    theme: Theme = "light",
) -> go.Figure:
    """How far the key that gets most attention lies from the assistant header, in tokens. Figure A3 of arXiv 2509.00544.

    0 is the first token of the role word; what lies in the think block is to the right. One panel per head.

    Args:
        result: A finished study.
        heads: (layer, head) pairs; the found ones when None.
        conditions: Two or more of those measured.
        kind: "harmful" or "harmless" (the twins).
        theme: "light" or "dark".

    Raises:
        StatisticsError: No head was given and none was found, a condition was not measured, or the chat format has no
            assistant header.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    chosen = [(int(layer), int(head)) for layer, head in (result.heads.found if heads is None else heads)]
    if not chosen:
        raise StatisticsError("no head was found in this study; give heads=[(layer, head), ...].")
    unread = [name for name in conditions if name not in result.conditions]
    if unread:
        raise StatisticsError(f"{unread[0]!r} was not measured; there are {', '.join(result.conditions)}.")
    places = {}
    for condition in conditions:
        with result.attention(kind, condition) as data:
            if "attention_argmax_pos" not in data:
                raise StatisticsError(
                    f"the prompts of {condition!r} have no assistant header to count from ({data.attrs.get('chat_format')})."
                )
            places[condition] = data["attention_argmax_pos"].load()
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    canvas = make_subplots(
        rows=rows,
        cols=columns,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.3 / rows,
        subplot_titles=[numbers.head_name(*head) for head in chosen],
    )
    width = 0.8 / len(places)
    for number, (layer, head) in enumerate(chosen):
        for place, (condition, found) in enumerate(places.items()):
            values, counts = np.unique(found.sel(layer=layer, head=head).values, return_counts=True)
            canvas.add_trace(
                go.Bar(
                    x=values.tolist(),
                    y=(counts / counts.sum()).round(6).tolist(),
                    width=width,
                    offset=(place - len(places) / 2) * width,
                    name=plotly_text(condition),
                    legendgroup=condition,
                    showlegend=number == 0,
                    marker={"color": condition_colour(condition)},
                    customdata=counts.tolist(),
                    hovertemplate=f"{numbers.head_name(layer, head)}, {plotly_text(condition)}<br>%{{x}} tokens from the header:"
                    f" %{{customdata}} of {int(counts.sum())}<extra></extra>",
                ),
                row=number // columns + 1,
                col=number % columns + 1,
            )
    n = places[conditions[0]].sizes["prompt"]
    canvas.update_layout(**base_layout(theme, 150 + 190 * rows, top=96, legend_up=24))
    canvas.update_yaxes(range=[0, 1.04], tickvals=[0, 0.5, 1])
    canvas.update_yaxes(title_text=f"share (n = {n})", col=1)
    looked_at = np.concatenate(
        [found.sel(layer=layer, head=head).values for found in places.values() for layer, head in chosen]
    )
    low, high = min(0, int(looked_at.min())), max(0, int(looked_at.max()))
    step = max(1, -(-(high - low) // 8))
    canvas.update_xaxes(range=[low - 1, high + 1], tick0=0, dtick=step, showgrid=False, zeroline=True)
    canvas.update_xaxes(title_text="tokens from the header", row=rows)
    return canvas


def _token(token: Any) -> str:
    """A token as it is read: byte tokenizers' marks for blank and newline undone, nothing obeyed."""
    text = str(token).replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
    shown = plotly_text(text)
    return shown if shown.strip() else f"“{shown}”"
