"""Where nodes and edges of a circuit stand in a picture: layers from the top down, edges around what they do not touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rim_lens.measures.circuits.nodes import Edge, Node
from rim_lens.views.text import visible

WIDTH, LEFT, RIGHT = (
    720.0,
    84.0,
    8.0,
)  # of the picture, and its margins, pixels; rows are named in the left one
TALL = 24.0  # of a node
_LETTER, _MOST_LETTERS, _GAP, _LINE = 7.0, 16, 14.0, 32.0
_SWEEPS = 8
_BOWS = tuple(sign * size for size in (0, 26, 52, 90, 140, 200, 270) for sign in ((1, -1) if size else (1,)))


@dataclass(frozen=True)
class Place:
    """A node in the picture, pixels from the top left: its middle and its width.

    Attributes:
        label: Its name, cut to what has room.
    """

    x: float
    y: float
    wide: float
    label: str


@dataclass(frozen=True)
class Layered:
    """A circuit as a picture.

    Attributes:
        width: Of the picture.
        height: Of the picture.
        rows: Name and middle of each row, from the top: spans, heads and neurons of each layer that has some, refusal.
        places: Of the nodes, by name.
        curves: Of the edges, in their order: (x, y) of a cubic Bézier's start, two handles and end.
    """

    width: float
    height: float
    rows: list[tuple[str, float]]
    places: dict[str, Place]
    curves: Float[np.ndarray, "edge 4 2"]


def layered(
    nodes: Sequence[Node], edges: Sequence[Edge], weights: Sequence[float], squeezed: float = 1.0
) -> Layered:
    """Lay out a circuit.

    Args:
        nodes: All of them; spans stand in this order, the others so that heavy edges cross little.
        edges: Between them.
        weights: Of the edges, at least 0.
        squeezed: By what the picture's width is divided where it is shown, so that nodes are that much wider in it.

    >>> from rim_lens.measures.circuits.nodes import END, head_node, span_node
    >>> nodes = [span_node("request"), head_node((0, 5)), END]
    >>> found = layered(nodes, [Edge(nodes[1], END, "logits")], [1.0])
    >>> [name for name, _ in found.rows], found.places["L0H5"].y < found.places["refusal"].y
    (['spans', 'L0 heads', 'refusal'], True)
    """
    rows = _rows(nodes)
    order = _ordered([[node.name for node in row] for row in rows.values()], edges, weights)
    labels = {node.name: _label(node) for node in nodes}
    wide = {name: squeezed * (_LETTER * len(label) + 20) for name, label in labels.items()}
    lines = [_lines(names, wide) for names in order]
    gap = min(74.0, max(50.0, 900.0 / max(1, len(rows))))
    places: dict[str, Place] = {}
    named: list[tuple[str, float]] = []
    y = 14 + TALL / 2
    for title, names, n_lines in zip(rows, order, lines, strict=True):
        room = (WIDTH - LEFT - RIGHT) / len(names)
        for at, name in enumerate(names):
            # More than fit beside each other stand on lines in turn.
            places[name] = Place(
                LEFT + (at + 0.5) * room, y + _LINE * (at % n_lines), wide[name], labels[name]
            )
        named.append((title, y + _LINE * (n_lines - 1) / 2))
        y += gap + _LINE * (n_lines - 1)
    height = y - gap + TALL / 2 + 10
    return Layered(WIDTH, height, named, places, _curves(edges, places, weights))


def points(curve: Float[np.ndarray, "4 2"], n: int = 24) -> Float[np.ndarray, "n 2"]:
    """Points along a curve, from its start to its end."""
    t = np.linspace(0, 1, n)[:, None]
    weights = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    found: np.ndarray = weights @ curve
    return found


def beside(
    curve: Float[np.ndarray, "4 2"], far: float, others: Sequence[Float[np.ndarray, "4 2"]]
) -> tuple[float, float, bool]:
    """Where a number stands beside the middle of its curve, on the side where other curves are farther.

    Args:
        curve: Its own.
        far: From the curve to the number's near end.
        others: That it keeps off.

    Returns:
        x, y, and whether the number goes on to the right from there.
    """
    middle, slope = points(curve, 3)[1], curve[2] + curve[3] - curve[0] - curve[1]
    normal = np.array([slope[1], -slope[0]]) / np.hypot(*slope)
    lines = np.concatenate([points(other) for other in others]) if others else np.full((1, 2), np.inf)
    sides = [middle + sign * (far + 12) * normal for sign in (1, -1)]
    room = [min(60.0, float(np.hypot(*(lines - side).T).min())) for side in sides]
    best = max((0, 1), key=lambda side: (round(room[side]), sides[side][0]))
    x, y = middle + (far / (far + 12)) * (sides[best] - middle)
    return float(x), float(y), bool(sides[best][0] >= middle[0])


def _rows(nodes: Sequence[Node]) -> dict[str, list[Node]]:
    found: dict[tuple[int, int, str], list[Node]] = {}
    last = 1 + max((node.layer for node in nodes), default=0)
    for node in nodes:
        if node.kind == "span":
            key = (-1, 0, "spans")
        elif node.kind in ("head", "neurons"):
            heads = node.kind == "head"
            key = (node.layer, int(not heads), f"L{node.layer} {'heads' if heads else 'neurons'}")
        else:
            key = (last, 0, visible(node.name)[:_MOST_LETTERS])
        found.setdefault(key, []).append(node)
    return {title: row for (_, _, title), row in sorted(found.items(), key=lambda item: item[0])}


def _label(node: Node) -> str:
    told = visible(node.name)
    if node.kind == "neurons":
        told += f" · {len(node.members)}"
    return told if len(told) <= _MOST_LETTERS else told[: _MOST_LETTERS - 1] + "…"


def _lines(names: Sequence[str], wide: Mapping[str, float]) -> int:
    """On how many lines a row stands so that no two of its nodes touch."""
    room = (WIDTH - LEFT - RIGHT) / len(names)
    return max(1, int(np.ceil((max(wide[name] for name in names) + _GAP) / room)))


def _ordered(rows: list[list[str]], edges: Sequence[Edge], weights: Sequence[float]) -> list[list[str]]:
    """Each row by the mean place of what its nodes are joined to, down and up again; the first, where it is spans, stays."""
    joined: dict[str, list[tuple[str, float]]] = {}
    for edge, weight in zip(edges, weights, strict=True):
        joined.setdefault(edge.receiver.name, []).append((edge.sender.name, weight + 1e-6))
        joined.setdefault(edge.sender.name, []).append((edge.receiver.name, weight + 1e-6))
    row_of = {name: number for number, row in enumerate(rows) for name in row}
    at = {name: (place + 0.5) / len(row) for row in rows for place, name in enumerate(row)}
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for number in range(1, len(rows)) if down else reversed(range(1, len(rows))):
            middle = {}
            for name in rows[number]:
                ends = [
                    (at[other], w) for other, w in joined.get(name, []) if (row_of[other] < number) == down
                ]
                total = sum(w for _, w in ends)
                middle[name] = sum(x * w for x, w in ends) / total if total else at[name]
            rows[number] = sorted(rows[number], key=lambda name: middle[name])
            at |= {name: (place + 0.5) / len(rows[number]) for place, name in enumerate(rows[number])}
    return rows


def _curves(
    edges: Sequence[Edge], places: Mapping[str, Place], weights: Sequence[float]
) -> Float[np.ndarray, "edge 4 2"]:
    """From the foot of the sender to the receiver's place for that input, bent as little as keeps off other nodes."""
    names = list(places)
    boxes = np.array([[places[name].x, places[name].y, places[name].wide / 2] for name in names]).reshape(
        -1, 3
    )
    curves = np.zeros((len(edges), 4, 2))
    lanes: list[np.ndarray] = []
    for number in sorted(range(len(edges)), key=lambda place: -weights[place]):
        edge = edges[number]
        start, end = places[edge.sender.name], places[edge.receiver.name]
        port = {"q": -0.28, "k": 0.0, "v": 0.28}.get(edge.input, 0.0) * end.wide
        others = boxes[[name not in (edge.sender.name, edge.receiver.name) for name in names]]
        best, least = None, np.inf
        for bow in _BOWS:
            curve = _curve((start.x, start.y + TALL / 2), (end.x + port, end.y - TALL / 2 - 5), bow)
            along = points(curve)
            apart = np.abs(along[:, None] - others[None, :, :2])
            hit = (
                ((apart[..., 1] < TALL / 2 + 3) & (apart[..., 0] < others[None, :, 2] + 4)).any(axis=0).sum()
            )
            outside = ((along[:, 0] < LEFT - 6) | (along[:, 0] > WIDTH - 2)).any()
            near = sum(float(np.abs(along[4:-4] - lane[4:-4]).sum(axis=1).mean() < 9) for lane in lanes)
            cost = 10.0 * hit + 30.0 * outside + near + abs(bow) / 120
            if cost < least:
                best, least = curve, cost
        assert best is not None  # noqa: S101 - some bow costs less than infinity
        curves[number] = best
        if len(lanes) < 60:
            lanes.append(points(best))
    return curves


def _curve(start: tuple[float, float], end: tuple[float, float], bow: float) -> Float[np.ndarray, "4 2"]:
    reach = 0.45 * (end[1] - start[1])
    return np.array([start, (start[0] + bow, start[1] + reach), (end[0] + bow, end[1] - reach), end])
