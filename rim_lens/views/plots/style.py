"""One colour for each span, condition and outcome, readable without colour vision (Okabe and Ito), light and dark."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import plotly.graph_objects as go

Theme = Literal["light", "dark"]

# Their blue is a shade lighter here, so that it stands on a dark page as well.
BLUE, SKY, GREEN, YELLOW = "#1A82C4", "#56B4E9", "#009E73", "#F0E442"
ORANGE, VERMILLION, PINK, GREY = "#E69F00", "#D55E00", "#CC79A7", "#8C8C8C"

OUTCOMES: dict[str, str] = {"refuse": BLUE, "comply": ORANGE, "other": "#B5B5B5"}
CONDITIONS: dict[str, str] = {
    "off": BLUE,
    "careful": VERMILLION,
    "filler": GREY,
    "unrelated": GREEN,
    "open": PINK,
}
# Kinds of thought that only some studies ask about.
OTHER_CONDITIONS: dict[str, str] = {"confirm": ORANGE, "deviate": SKY, "heuristic": "#7B61A8"}
# Scaffold in greys and blues, the think block in warm colours.
SPANS: dict[str, str] = {
    "sink": "#C9C9C9",
    "system": "#6E6E6E",
    "request": SKY,
    "turn_end": BLUE,
    "assistant": GREEN,
    "think_open": YELLOW,
    "cot": VERMILLION,
    "gap": ORANGE,
    "think_close": PINK,
    "answer": "#7B61A8",
    "template": "#9AA5B1",
}
FOUND = VERMILLION  # heads found by ablation, and the set they make
CONTROL = "#9E9E9E"  # what they are held against
WHISKER = "#111111"  # intervals that stand on bars, which fill their panel in either theme

# Negative (refuses less, looks less) is blue, positive vermillion; zero is the page.
_DIVERGING = {
    "light": [[0, "#003F66"], [0.25, BLUE], [0.5, "#FFFFFF"], [0.75, VERMILLION], [1, "#7A3300"]],
    "dark": [[0, "#8FD0F5"], [0.25, BLUE], [0.5, "#1B1F24"], [0.75, VERMILLION], [1, "#FFC49B"]],
}
_SEQUENTIAL = {
    "light": [[0, "#FFFFFF"], [0.4, SKY], [0.75, BLUE], [1, "#002B47"]],
    "dark": [[0, "#1B1F24"], [0.4, "#0A5C8C"], [0.75, SKY], [1, "#EAF6FE"]],
}
_INK = {"light": "#1F2328", "dark": "#E6E8EB"}
_PAPER = {"light": "#FFFFFF", "dark": "#1B1F24"}
_GRID = {"light": "#E3E6EA", "dark": "#343A42"}
_AXIS = {"light": "#AEB4BC", "dark": "#5B636E"}

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif'


def condition_colour(condition: str) -> str:
    """The colour of a think condition; those without one of their own share by what they are."""
    first = condition.partition(":")[0]
    return CONDITIONS.get(condition) or CONDITIONS.get(first) or OTHER_CONDITIONS.get(first, "#7B61A8")


def see_through(colour: str, opacity: float = 0.18) -> str:
    """A colour that lets what is behind it be seen.

    >>> see_through("#1A82C4")
    'rgba(26,130,196,0.18)'
    """
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def template(theme: Theme = "light") -> dict[str, Any]:
    """A plotly template. Figures set no colour of their own that depends on the page, so it can be swapped."""
    axis = {
        "gridcolor": _GRID[theme],
        "linecolor": _AXIS[theme],
        "tickcolor": _AXIS[theme],
        "zerolinecolor": _AXIS[theme],
        "automargin": True,
        "title": {"standoff": 8},
    }
    return {
        "layout": {
            "font": {"family": FONT, "size": 13, "color": _INK[theme]},
            "paper_bgcolor": _PAPER[theme],
            "plot_bgcolor": _PAPER[theme],
            "colorscale": {
                "diverging": _DIVERGING[theme],
                "sequential": _SEQUENTIAL[theme],
                "sequentialminus": _SEQUENTIAL[theme],
            },
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {"bgcolor": _PAPER[theme], "font": {"color": _INK[theme]}, "align": "left"},
            "legend": {"bgcolor": "rgba(0,0,0,0)"},
            "updatemenudefaults": {
                "bgcolor": _PAPER[theme],
                "bordercolor": _AXIS[theme],
                "font": {"color": _INK[theme]},
            },
        }
    }


def figure(theme: Theme, height: int, **layout: Any) -> go.Figure:
    """An empty figure in the house's style. Width is that of its place."""
    import plotly.graph_objects as go

    return go.Figure(layout={**base_layout(theme, height), **layout})


def base_layout(
    theme: Theme, height: int, top: int = 66, bottom: int = 56, legend_up: int = 4
) -> dict[str, Any]:
    """What every figure's layout begins with.

    Args:
        theme: "light" or "dark".
        height: Of the whole figure, pixels.
        top: Margin above the panels, pixels. Plotly's own buttons take the first 30 of it at the right.
        bottom: Margin below the panels, pixels.
        legend_up: From the panels up to the legend, pixels; more where panels have titles.
    """
    return {
        "template": template(theme),
        "height": height,
        "margin": {"l": 60, "r": 20, "t": top, "b": bottom},
        "hovermode": "closest",
        "legend": {
            "orientation": "h",
            "traceorder": "normal",
            "x": 0,
            "y": 1 + legend_up / (height - top - bottom),
            "xanchor": "left",
            "yanchor": "bottom",
        },
    }


def spread(n: int, width: float) -> list[float]:
    """Offsets that keep points of one place apart: even, always the same, in an order that shows no trend.

    >>> spread(3, 1.0)
    [-0.5, 0.118, -0.264]
    """
    # Multiples of the golden ratio fill a unit interval evenly, however many there are.
    return [round(width * ((place * 0.6180339887498949) % 1 - 0.5), 3) for place in range(n)]
