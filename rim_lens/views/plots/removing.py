"""What removing or editing a set of heads does, beside random sets, and the heads of a base beside those of a tuned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rim_lens.errors import StatisticsError
from rim_lens.measures.removal_table import DIFFERENCE
from rim_lens.views import numbers
from rim_lens.views.plots.style import (
    BLUE,
    CONTROL,
    FOUND,
    GREEN,
    ORANGE,
    PINK,
    Theme,
    base_layout,
    see_through,
    spread,
)
from rim_lens.views.text import plotly_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from rim_lens.measures.effect_tables import EffectTables
    from rim_lens.measures.heads.comparing import HeadComparison
    from rim_lens.study import StudyResult

# Title and unit of each panel, in their order; empty replies and refusals in thought stand in the table.
_PANELS = {
    "score": ("refusal score", "nats"),
    "specificity": ("harmful minus twin, score", "nats"),
    "refuse": ("replies that refuse", "share"),
    "comply": ("replies that comply", "share"),
    "other": ("replies that do neither", "share"),
    "correct": ("right answers, reasoning", "share"),
    "answer": ("log-probability of the right answer", "nats"),
    "kl": ("KL on neutral text", "nats per token"),
}
_KINDS = {
    "harmful": ("harmful requests", FOUND, "circle"),
    "harmless": ("their harmless twins", BLUE, "circle-open"),
    DIFFERENCE: ("harmful minus twin", GREEN, "diamond"),
    "reasoning": ("reasoning questions", ORANGE, "square"),
    "neutral": ("neutral text", PINK, "triangle-up"),
}
_RANGE_FROM = 10  # random sets from which their range is drawn, besides the sets
_ZERO = {"color": "#808080", "width": 1, "dash": "dot"}
_BAR = 11  # width of the bars of random sets, pixels


def removal_beside_random(result: EffectTables | StudyResult, theme: Theme = "light") -> go.Figure:
    """Change by removing a set, one panel per measure, one place per think condition, beside random sets.

    Marks with 95 % intervals over families: the set. Grey points: each random set with as many members in each layer; grey bars:
    the range of 95 % of them, where there are ten or more. Replies are written for a few random sets only.

    Args:
        result: What `rl.removal_effects` or `rl.neuron_effects` returned, or a study with the part "removing".
        theme: "light" or "dark".

    Raises:
        StatisticsError: The study removed no heads.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    found: EffectTables | None = result.removal if hasattr(result, "removal") else result
    if found is None:
        raise StatisticsError("this study removed no heads: none were found, or it has no part 'removing'.")
    table = found.table
    measures = [name for name in _PANELS if (table["measure"] == name).any()]
    conditions = list(dict.fromkeys(table["condition"]))
    n_rows = (len(measures) + 1) // 2
    height = 215 * n_rows + 110
    canvas = make_subplots(
        rows=n_rows,
        cols=2,
        subplot_titles=[_panel_title(table[table["measure"] == name], name) for name in measures],
        horizontal_spacing=0.12,
        vertical_spacing=0.34 / n_rows if n_rows > 1 else 0,
    )
    canvas.update_layout(**base_layout(theme, height, top=110, bottom=46, legend_up=34))
    canvas.update_annotations(font_size=13)
    named: set[str] = set()
    for place, measure in enumerate(measures):
        where = {"row": place // 2 + 1, "col": place % 2 + 1}
        part = table[table["measure"] == measure]
        kinds = [kind for kind in _KINDS if (part["kind"] == kind).any()]
        for number, kind in enumerate(kinds):
            rows = part[part["kind"] == kind]
            shift = 0.3 * (number - (len(kinds) - 1) / 2)
            at = [conditions.index(name) + shift for name in rows["condition"]]
            _random_sets(canvas, found, rows, at, named, where)
            title, colour, symbol = _KINDS[kind]
            canvas.add_trace(
                go.Scatter(
                    x=at,
                    y=rows["change"].tolist(),
                    mode="markers",
                    name=title,
                    legendgroup=kind,
                    showlegend=kind not in named,
                    marker={
                        "size": 9,
                        "color": colour,
                        "symbol": symbol,
                        "line": {"width": 1.5, "color": colour},
                    },
                    error_y=_whisker(rows, "change"),
                    customdata=rows[
                        ["condition", "change_low", "change_high", "before", "after", "p", "n"]
                    ].values.tolist(),
                    hovertemplate="%{customdata[0]}: %{customdata[3]:.3g} → %{customdata[4]:.3g}<br>change %{y:.3g}"
                    " [%{customdata[1]:.3g}, %{customdata[2]:.3g}], p = %{customdata[5]:.2g}, n = %{customdata[6]}"
                    f"<extra>{title}</extra>",
                ),
                **where,
            )
            named.add(kind)
        canvas.add_hline(y=0, line=_ZERO, layer="below", **where)
        canvas.update_yaxes(title_text=f"change, {_PANELS[measure][1]}", zeroline=False, nticks=6, **where)
    canvas.update_xaxes(
        tickvals=list(range(len(conditions))),
        ticktext=[plotly_text(name) for name in conditions],
        range=[-0.55, len(conditions) - 0.45],
        tickfont_size=11,
        showgrid=False,
        zeroline=False,
    )
    return canvas


def _panel_title(part: pd.DataFrame, measure: str) -> str:
    counts = sorted(set(part["n"].tolist()))
    return f"{_PANELS[measure][0]} (n = {', '.join(map(str, counts))})"


def _random_sets(
    canvas: go.Figure,
    found: EffectTables,
    rows: pd.DataFrame,
    at: Sequence[float],
    named: set[str],
    where: Mapping[str, int],
) -> None:
    import plotly.graph_objects as go

    bars = [
        (x, row)
        for x, row in zip(at, rows.to_dict("records"), strict=True)
        if row["n_controls"] >= _RANGE_FROM
    ]
    if bars:
        canvas.add_trace(
            _range_bars(
                [x for x, _ in bars],
                [row["random_low"] for _, row in bars],
                [row["random_high"] for _, row in bars],
                "range of 95 % of random sets",
                "range" not in named,
            ),
            **where,
        )
        named.add("range")
    x, y = [], []
    for place, row in zip(at, rows.to_dict("records"), strict=True):
        sets = found.sets
        its = sets[
            (sets["measure"] == row["measure"])
            & (sets["kind"] == row["kind"])
            & (sets["condition"] == row["condition"])
        ]["change"].tolist()
        x += [place + offset for offset in spread(len(its), 0.16)]
        y += its
    if y:
        canvas.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="markers",
                name="a random set",
                legendgroup="random",
                showlegend="random" not in named,
                marker={"size": 4, "color": CONTROL, "opacity": 0.8},
                hovertemplate="a random set: %{y:.3g}<extra></extra>",
            ),
            **where,
        )
        named.add("random")


def restored_refusal(restored: pd.DataFrame | StudyResult, theme: Theme = "light") -> go.Figure:
    """Refusal brought back under chains of thought by editing heads, a row per condition, beside the same edits of random heads.

    Left: share of what the chain took (off − in the condition) that an edit brings back: of the score, of the difference between
    harmful requests and their twins, and of the replies that refuse; drawn where that loss is shown by its interval. Right: effect
    on the score itself, for harmful requests and for twins. Whiskers: 95 % over families. Grey bars: range of 95 % of random sets,
    left over the same loss, where there are ten sets or more.

    Args:
        restored: What `rl.restoring` returned (of several conditions, one below the other), or a study with the part "removing".
        theme: "light" or "dark".

    Raises:
        StatisticsError: The study restored nothing, or the table has no row.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    table: pd.DataFrame | None = restored if hasattr(restored, "columns") else restored.restored
    if table is None or table.empty:
        raise StatisticsError(
            "nothing was restored: no heads were found, or the study has no part 'removing'."
        )
    conditions, edits = list(dict.fromkeys(table["condition"])), list(dict.fromkeys(table["edit"]))
    n = ", ".join(map(str, sorted(set(table["n"].tolist()))))
    height = 245 * len(conditions) + 120
    canvas = make_subplots(
        rows=len(conditions),
        cols=2,
        subplot_titles=[
            f"{plotly_text(name)}: {what}"
            for name in conditions
            for what in ("share of the loss", "effect on the score")
        ],
        horizontal_spacing=0.13,
        vertical_spacing=0.3 / len(conditions) if len(conditions) > 1 else 0,
    )
    canvas.update_layout(**base_layout(theme, height, top=130, bottom=56, legend_up=34))
    canvas.update_annotations(font_size=13)
    named: set[str] = set()
    for row, condition in enumerate(conditions, start=1):
        part = table[(table["condition"] == condition) & (table["state"] == "measured")]
        for column, lines in ((1, _SHARES), (2, _EFFECTS)):
            where = {"row": row, "col": column}
            value = "restored" if column == 1 else "effect"
            drawn = [
                (line, part[(part["measure"] == line[0]) & (part["kind"] == line[1])].dropna(subset=[value]))
                for line in lines
            ]
            drawn = [(line, rows) for line, rows in drawn if len(rows)]
            for number, ((_, _, title, colour, symbol), rows) in enumerate(drawn):
                at = [edits.index(name) + 0.22 * (number - (len(drawn) - 1) / 2) for name in rows["edit"]]
                loss = (rows["off"] - rows["baseline"]).to_numpy() if column == 1 else 1.0
                known = (rows["n_controls"] >= _RANGE_FROM).tolist()
                if any(known):
                    low, high = (
                        [end for end, told in zip(rows[name] / loss, known, strict=True) if told]
                        for name in ("random_low", "random_high")
                    )
                    there = [x for x, told in zip(at, known, strict=True) if told]
                    canvas.add_trace(
                        _range_bars(there, low, high, "random sets, 95 % of them", "range" not in named),
                        **where,
                    )
                    named.add("range")
                canvas.add_trace(
                    go.Scatter(
                        x=at,
                        y=rows[value].tolist(),
                        mode="markers",
                        name=title,
                        legendgroup=title,
                        showlegend=title not in named,
                        marker={
                            "size": 9,
                            "color": colour,
                            "symbol": symbol,
                            "line": {"width": 1.5, "color": colour},
                        },
                        error_y=_whisker(rows, value),
                        customdata=rows[
                            ["edit", f"{value}_low", f"{value}_high", "baseline", "edited", "off", "p"]
                        ].values.tolist(),
                        hovertemplate="%{customdata[0]}: %{y:.3g} [%{customdata[1]:.3g}, %{customdata[2]:.3g}]<br>off"
                        " %{customdata[5]:.3g}, in the condition %{customdata[3]:.3g}, edited %{customdata[4]:.3g}; p of the"
                        f" effect = %{{customdata[6]:.2g}}<extra>{title}</extra>",
                    ),
                    **where,
                )
                named.add(title)
            if not drawn:
                canvas.add_annotation(
                    text="no loss is shown" if column == 1 and len(part) else "no edit was possible",
                    x=(len(edits) - 1) / 2,
                    y=0.5,
                    showarrow=False,
                    font={"color": CONTROL},
                    **where,
                )
                canvas.update_yaxes(range=[-0.1, 1.1], **where)
            canvas.add_hline(y=0, line=_ZERO, layer="below", **where)
        canvas.update_yaxes(title_text="share restored", nticks=6, zeroline=False, row=row, col=1)
        canvas.update_yaxes(title_text="edited − not, nats", nticks=6, zeroline=False, row=row, col=2)
    canvas.update_xaxes(
        tickvals=list(range(len(edits))),
        ticktext=edits,
        range=[-0.55, len(edits) - 0.45],
        showgrid=False,
        zeroline=False,
    )
    canvas.update_xaxes(title_text=f"edit of the heads (n = {n})", row=len(conditions))
    return canvas


# measure, kind, title, colour, mark
_SHARES = (
    ("score", "harmful", "score, harmful requests", FOUND, "circle"),
    ("specificity", DIFFERENCE, "score, harmful minus twin", GREEN, "diamond"),
    ("refuse", "harmful", "harmful requests refused in writing", ORANGE, "square"),
)
_EFFECTS = (_SHARES[0], ("score", "harmless", "score, harmless twins", BLUE, "circle-open"), _SHARES[1])


# Verdicts in base and tuned, by what became of *refusal*.
_KEPT = {
    "refusal in both": (FOUND, "star"),
    "refusal in the base only": (ORANGE, "triangle-left"),
    "refusal in the tuned only": (BLUE, "triangle-up"),
    "general in one or both": (GREEN, "diamond"),
    "no effect shown in either": (CONTROL, "circle"),
}
_NEAR = 0.07  # of the range of both axes: names of heads nearer than that would lie on each other
_MANY_HEADS = 60  # from so many on, heads without an effect have no whiskers


def compared_heads(
    compared: HeadComparison | StudyResult, tuned: str | None = None, theme: Theme = "light"
) -> go.Figure:
    """Effect of removing each head in the tuned model against that in the base, harmful requests, matched by layer and number.

    On the dotted line a head does the same in both. Whiskers: 95 % intervals over families. Colour and mark: what became of the
    verdict *refusal*. A model that refuses less has less to lose, so that every effect comes nearer to 0.

    Args:
        compared: What `rl.compare_heads` returned, or a study with the part "comparing".
        tuned: Which tuned model of a study; the first one when None.
        theme: "light" or "dark".

    Raises:
        StatisticsError: The study compared no such model.
    """
    import plotly.graph_objects as go

    if hasattr(compared, "compared"):
        there = compared.compared
        if not there or (tuned is not None and tuned not in there):
            raise StatisticsError(
                f"no heads of {tuned or 'a tuned model'} were compared in this study; there are {', '.join(there) or 'none'}."
            )
        found = there[tuned or next(iter(there))]
    else:
        found = compared
    table = found.table
    kept = [
        _kept(base, after) for base, after in zip(table["verdict_base"], table["verdict_tuned"], strict=True)
    ]
    names = [
        numbers.head_name(layer, head) for layer, head in zip(table["layer"], table["head"], strict=True)
    ]
    told = _apart(table, kept)
    canvas = go.Figure(layout=base_layout(theme, 500, top=100))
    for title, (colour, symbol) in reversed(_KEPT.items()):
        part = table[[one == title for one in kept]]
        if part.empty:
            continue
        quiet = symbol == "circle"
        whiskers = not quiet or len(table) < _MANY_HEADS
        thickness = {"thickness": 0.8, "width": 0} if quiet else {}
        canvas.add_trace(
            go.Scatter(
                x=part["effect_base"].tolist(),
                y=part["effect_tuned"].tolist(),
                mode="markers+text",
                name=f"{title} ({len(part)})",
                marker={
                    "size": 12 if symbol == "star" else 7 if quiet else 10,
                    "color": colour,
                    "symbol": symbol,
                },
                error_x=_whisker(part, "effect_base") | thickness if whiskers else None,
                error_y=_whisker(part, "effect_tuned") | thickness if whiskers else None,
                text=[names[place] if place in told else "" for place in part.index],
                textposition="top right",
                customdata=[
                    [names[place], *values]
                    for place, values in zip(
                        part.index,
                        part[
                            ["verdict_base", "verdict_tuned", "change", "change_low", "change_high", "p"]
                        ].values.tolist(),
                        strict=True,
                    )
                ],
                hovertemplate="%{customdata[0]}: %{customdata[1]} → %{customdata[2]}<br>base %{x:.3f}, tuned %{y:.3f} nats<br>change"
                " %{customdata[3]:.3f} [%{customdata[4]:.3f}, %{customdata[5]:.3f}], p = %{customdata[6]:.2g}<extra></extra>",
            )
        )
    columns = [f"effect_{model}{end}" for model in ("base", "tuned") for end in ("", "_low", "_high")]
    reach = table[columns].to_numpy()
    low, high = min(float(reach.min()), 0.0), max(float(reach.max()), 0.0)
    edge = 0.06 * (high - low or 1.0)
    canvas.add_shape(
        type="line",
        x0=low - edge,
        y0=low - edge,
        x1=high + edge,
        y1=high + edge,
        line=_ZERO,
        layer="below",
    )
    n = found.settings["n"]
    canvas.update_xaxes(title_text=f"effect in the base (nats; edited − baseline; n = {n} requests)")
    canvas.update_yaxes(title_text=f"effect in {plotly_text(tuned) if tuned else 'the tuned model'} (nats)")
    return canvas


def _apart(table: pd.DataFrame, kept: Sequence[str]) -> set[int]:
    """Heads with room for their name, those with a verdict first, then the farthest out; others are named under the pointer."""
    at = table[["effect_base", "effect_tuned"]].to_numpy()
    width = float(at.max() - at.min()) or 1.0
    rank = {name: place for place, name in enumerate(_KEPT)}
    order = sorted(range(len(at)), key=lambda place: (rank[kept[place]], -float(abs(at[place]).max())))
    told: list[int] = []
    for place in order:
        if all(float(abs(at[place] - at[other]).max()) > _NEAR * width for other in told):
            told.append(place)
    return {int(table.index[place]) for place in told}


def _kept(base: str, tuned: str) -> str:
    both = (base, tuned)
    if "refusal" in both:
        return f"refusal in {'both' if base == tuned else 'the base only' if base == 'refusal' else 'the tuned only'}"
    return "general in one or both" if "general" in both else "no effect shown in either"


def _range_bars(
    at: Sequence[float], low: Sequence[float], high: Sequence[float], name: str, show: bool
) -> Any:
    """Grey bars, each from the low to the high end, as lines with gaps between them."""
    import plotly.graph_objects as go

    x = [value for place in at for value in (place, place, None)]
    y = [value for ends in zip(low, high, strict=True) for value in (*ends, None)]
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        name=name,
        legendgroup="range",
        showlegend=show,
        line={"width": _BAR, "color": see_through(CONTROL, 0.4)},
        hoverinfo="skip",
    )


def _whisker(rows: pd.DataFrame, name: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": (rows[f"{name}_high"] - rows[name]).clip(lower=0).tolist(),
        "arrayminus": (rows[name] - rows[f"{name}_low"]).clip(lower=0).tolist(),
        "thickness": 1.3,
        "width": 4,
    }
