"""What the circuit explorer shows: who hears whom, by how much, and whether what they make together is refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rim_lens.batching import MAX_ROWS
from rim_lens.chat.spans import ATOMS
from rim_lens.errors import NotEnoughData, ReferenceMismatch, ViewTooLarge
from rim_lens.measures.circuits.linking import compare_circuits
from rim_lens.measures.circuits.nodes import Edge, Node
from rim_lens.measures.circuits.result import Circuit
from rim_lens.measures.circuits.switching import asked_again
from rim_lens.views.circuit_words import elsewhere, other_run, shares
from rim_lens.views.explorer.circuit_reading import (
    activations_of,
    members_of,
    read_runs,
    rows_that_fit,
    runs_of,
)
from rim_lens.views.explorer.page import (
    FORMAT_VERSION,
    MAX_BYTES,
    Arrays,
    ExplorerView,
    explorer_html,
    palette,
    write_explorer,
)
from rim_lens.views.layered import layered
from rim_lens.views.page import finite
from rim_lens.views.text import visible

if TYPE_CHECKING:
    import pandas as pd

    from rim_lens.chat import ChatFormat
    from rim_lens.lens import Model
    from rim_lens.prompts import Prompt

_COLUMNS = (
    *("effect_select", "effect", "effect_low", "effect_high", "share", "back", "back_low", "back_high"),
    *("both", "both_low", "both_high", "p", "percentile", "n_controls", "composition"),
)
_COMPARED = ("change", "change_low", "change_high", "p")
_CAVEAT = (
    "An edge says that its receiver uses, by that input, what its sender writes; effects of edges do not add up. What is not drawn was"
    " not asked about: faithfulness says whether it was needed. Looking until something is found is a choice made on these requests:"
    " test it on others."
)


@dataclass(frozen=True)
class CircuitView(ExplorerView):
    """Everything a page or widget of the circuit explorer holds.

    Attributes:
        data: Plain values: nodes, edges, where they stand, tables of each circuit and contrast, tests, names of arrays.
        arrays: float32 arrays that `data` names by their place: effects [edge, request], masses [span], rows of heads (row q
            has q + 1 entries, rows one after the other), activations [the set's mean and members, pos].
        circuits: What is shown, by name.
    """

    circuits: dict[str, Circuit]
    of: ClassVar[str] = "circuits"

    def __repr__(self) -> str:
        data = self.data
        names = ", ".join(self.circuits)
        return (
            f"CircuitView({names}: {len(data['nodes'])} nodes, {len(data['edges'])} edges;"
            f" {self.n_bytes / 1e6:.1f} MB)"
        )


def circuit_view(
    circuits: Circuit | Mapping[str, Circuit],
    model: Model | Mapping[str, Model] | None = None,
    chat: ChatFormat | None = None,
    harmful: Sequence[Prompt | str] = (),
    harmless: Sequence[Prompt | str] = (),
    *,
    tuned: Model | None = None,
    shown: int = 3,
    max_bytes: int = MAX_BYTES,
    max_rows: int = MAX_ROWS,
    seed: int = 0,
) -> CircuitView:
    """Gather what the circuit explorer shows; with a model, read what each node looks at or does as well.

    Circuits alone are enough for the graph, its numbers and tests, also where they were read back with `Circuit.load`. Of
    several, every pair that can be compared is (`compare_circuits`), so that the graph shows differences.

    Args:
        circuits: A `Circuit`, or several by name ("off", "careful", "base", "tuned") with the same nodes.
        model: The model that they were measured on, or one for each name.
        chat: Its format; needed with a model.
        harmful: The requests that they were measured on; needed with a model.
        harmless: Their twins.
        tuned: The tuned model of the contrast "tuned".
        shown: So many requests can be looked at token by token.
        max_bytes: Of the page.
        max_rows: Most prompts in one pass.
        seed: Of intervals and permutations of differences.

    Raises:
        NotEnoughData: No circuit, or requests or a format are missing where a model is given.
        ReferenceMismatch: Circuits of other nodes, or another model or requests than they were measured on.
        ViewTooLarge: The numbers do not fit in `max_bytes`.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> requests = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    >>> search = rl.CircuitSearch(limit=4, n_random=0, n_random_senders=0)
    >>> found = rl.circuit(model, chat, [(0, 5), (1, 1)], [(0, 3)], *requests, search=search)
    >>> rl.views.circuit_view(found, model, chat, *requests)
    CircuitView(planted:0: 6 nodes, 18 edges; 0.0 MB)
    """
    named = {str(_model_name(circuits)): circuits} if isinstance(circuits, Circuit) else dict(circuits)
    nodes = _same_nodes(named)
    edges = _edges(nodes, next(iter(named.values())).edges)
    if model is not None and (chat is None or not len(harmful)):
        raise NotEnoughData(
            "a model was given without its chat format or requests; give chat, harmful and harmless as rl.circuit was given them."
        )
    models = model if isinstance(model, Mapping) else {name: model for name in named if model is not None}
    arrays = Arrays()
    picture = layered(nodes, edges, _weights(edges, named))
    told = [_circuit(name, one, edges, arrays) for name, one in named.items()]
    asked = {
        name: asked_again(models[name], _needed(chat), one, harmful, harmless, (), tuned, max_rows)
        for name, one in named.items()
        if name in models
    }
    parts = [node for node in nodes if node.kind in ("head", "neurons")]
    runs = {name: runs_of(one) for name, one in asked.items()}
    n_shown = min([shown, *(len(some[0].batch) for some in runs.values())])
    n_heads = sum(node.kind == "head" for node in parts)
    spent = CircuitView({}, tuple(arrays), named).n_bytes
    window = rows_that_fit(
        [run for some in runs.values() for run in some], n_heads, n_shown, 0.6 * max_bytes - spent
    )
    activations = {name: activations_of(own, parts, n_shown) for name, own in runs.items()}
    by_prompt = [[one for some in activations.values() for one in some[row]] for row in range(n_shown)]
    members = members_of(parts, by_prompt) if activations else {}
    for one in told:
        own, name = runs.get(one["key"], []), one["key"]
        one["runs"] = (
            read_runs(_needed(chat), own, parts, activations[name], members, window, arrays) if own else []
        )
    differences, reasons = _differences(named, edges, seed)
    data = {
        "format_version": FORMAT_VERSION,
        "title": f"Who hears whom in {', '.join(visible(_model_name(one)) for one in _one_each(named))}",
        "about": _about(named, nodes, edges, window if runs else None),
        "caveat": _CAVEAT,
        "palette": palette(),
        "atoms": list(ATOMS),
        "picture": {
            "width": picture.width,
            "height": picture.height,
            "rows": [{"name": name, "y": y} for name, y in picture.rows],
            "curves": picture.curves.round(1).reshape(len(edges), 8).tolist(),
        },
        "nodes": [_node(node, picture.places[node.name]) for node in nodes],
        "edges": [_edge(edge, nodes) for edge in edges],
        "circuits": told,
        "differences": differences,
        "not_compared": reasons,
    }
    view = CircuitView(finite(data), tuple(arrays), named)
    if view.n_bytes > max_bytes:
        raise ViewTooLarge(
            f"the page would take {view.n_bytes / 1e6:.1f} MB, the limit is {max_bytes / 1e6:.1f}; show fewer requests (shown=), give no"
            " model, or raise max_bytes."
        )
    return view


def circuit_explorer_html(view: CircuitView) -> str:
    """The circuit explorer as a page, complete in itself: no request leaves it, and no name can run or hide.

    Args:
        view: From `circuit_view`.
    """
    return explorer_html(view)


def write_circuit_explorer(view: CircuitView, path: str | Path) -> Path:
    """Write the circuit explorer's page to a file and return its path.

    Args:
        view: From `circuit_view`.
        path: Of the page.
    """
    return write_explorer(view, path)


# --- nodes and edges --------------------------------------------------------------------------------------


def _same_nodes(circuits: Mapping[str, Circuit]) -> list[Node]:
    if not circuits:
        raise NotEnoughData("no circuit was given; give one of rl.circuit, or several by name.")
    first, *others = circuits.values()
    for other in others:
        if other.asked() != first.asked() or set(other.edges["edge"]) != set(first.edges["edge"]):
            raise ReferenceMismatch(
                "several circuits were to be shown as one graph, and they have other nodes or edges; measure them with the same heads,"
                " neurons and spans, or make a page of each."
            )
    return first.asked()


def _edges(nodes: Sequence[Node], table: pd.DataFrame) -> list[Edge]:
    known = {node.name: node for node in nodes}
    rows = table.drop_duplicates("edge").to_dict("records")
    return [Edge(known[row["sender"]], known[row["receiver"]], row["input"]) for row in rows]


def _weights(edges: Sequence[Edge], circuits: Mapping[str, Circuit]) -> list[float]:
    """How much an edge counts where nodes are put in order: its largest effect, a hundredth where it is no circuit's."""
    found = dict.fromkeys(map(str, edges), 0.0)
    for circuit in circuits.values():
        for row in circuit.edges.to_dict("records"):
            size = abs(row["effect"]) if np.isfinite(row["effect"]) else 0.0
            found[row["edge"]] = max(found[row["edge"]], size if row["in_circuit"] else size / 100)
    return [found[str(edge)] for edge in edges]


def _node(node: Node, place: Any) -> dict[str, Any]:
    return {
        "name": visible(node.name),
        "key": node.name,
        "kind": node.kind,
        "layer": node.layer,
        "members": list(node.members),
        "label": place.label,
        "x": round(place.x, 1),
        "y": round(place.y, 1),
        "wide": place.wide,
    }


def _edge(edge: Edge, nodes: Sequence[Node]) -> dict[str, Any]:
    return {
        "name": visible(edge),
        "key": str(edge),
        "sender": nodes.index(edge.sender),
        "receiver": nodes.index(edge.receiver),
        "input": edge.input,
    }


# --- tables -----------------------------------------------------------------------------------------------


def _circuit(name: str, circuit: Circuit, edges: Sequence[Edge], arrays: Arrays) -> dict[str, Any]:
    settings = circuit.settings
    contrasts = []
    for contrast in map(str, circuit.effects["contrast"].values):
        table = circuit.edges[circuit.edges["contrast"] == contrast].set_index("edge")
        table = table.loc[[str(edge) for edge in edges]]
        of = circuit.effects.sel(contrast=contrast, edge=[str(edge) for edge in edges])
        columns = {column: table[column].tolist() for column in _COLUMNS if column in table}
        contrasts.append(
            {
                "name": visible(contrast),
                "key": contrast,
                "instead": other_run(contrast),
                "reach": float(of["reach"].mean()),
                "columns": columns,
                "found": [bool(one) for one in table["in_circuit"]],
                "requests": arrays.keep(of["effect"].transpose("edge", "prompt").values),
            }
        )
    gate = circuit.gate
    return {
        "name": visible(name),
        "key": name,
        "model": visible(_model_name(circuit)),
        "read_in": visible(settings["read_in"]),
        "n": settings["n_evaluate"],
        "n_families": settings["n_families_evaluate"],
        "requests": [visible(one) for one in circuit.effects["prompt"].values],
        "kept": [bool(one) for one in circuit.nodes["kept"]],
        "contrasts": contrasts,
        "shares": shares(circuit),
        "elsewhere": elsewhere(circuit),
        "refused": {kind: gate.get(kind) for kind in ("harmful", "harmless")},
        "selected": [visible(one) for one in settings.get("switched_off", ())],
    }


def _differences(
    circuits: Mapping[str, Circuit], edges: Sequence[Edge], seed: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Every pair of circuits in every contrast that both have: the second minus the first; and why not, where not."""
    found, reasons = [], []
    for (first, one), (second, other) in combinations(circuits.items(), 2):
        both = [name for name in one.settings["contrasts"] if name in other.settings["contrasts"]]
        for contrast in both:
            try:
                table = compare_circuits(one, other, contrast=contrast, seed=seed).set_index("edge")
            except ReferenceMismatch as problem:
                reasons.append(visible(f"{first}, {second}: {problem}"))
                break
            table = table.loc[[str(edge) for edge in edges]]
            found.append(
                {
                    "first": list(circuits).index(first),
                    "second": list(circuits).index(second),
                    "contrast": contrast,
                    **{column: table[column].tolist() for column in _COMPARED},
                }
            )
        if not both:
            reasons.append(visible(f"{first}, {second}: no contrast that both have."))
    return found, reasons


# --- words ------------------------------------------------------------------------------------------------


def _model_name(circuit: Circuit) -> str:
    return str(circuit.settings["model"]["name"])


def _one_each(circuits: Mapping[str, Circuit]) -> list[Circuit]:
    """One circuit for each model name."""
    return list({_model_name(one): one for one in circuits.values()}.values())


def _needed(chat: ChatFormat | None) -> ChatFormat:
    assert chat is not None  # noqa: S101 - checked where a model is given
    return chat


def _about(
    circuits: Mapping[str, Circuit], nodes: Sequence[Node], edges: Sequence[Edge], window: int | None
) -> str:
    from rim_lens import __version__

    first = next(iter(circuits.values()))
    settings = first.settings
    kinds = {kind: sum(node.kind == kind for node in nodes) for kind in ("span", "head", "neurons")}
    read = "" if window is None else f" Patterns: the last {window} rows of each head."
    return (
        f"{kinds['head']} heads, {kinds['neurons']} sets of neurons and {kinds['span']} spans, {len(edges)} edges, tested on"
        f" {settings['n_evaluate']} harmful requests of {settings['n_families_evaluate']} families that chose nothing here.{read}"
        f" rim_lens {__version__}."
    )
