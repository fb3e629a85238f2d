"""A circuit as a page to read, and every number beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rim_lens.measures.circuits.result import Circuit
from rim_lens.measures.pages import markdown_table, page_paths, told_versions, write_json

_OTHERS = 8  # edges that are not the circuit's are shown, the largest
_KINDS = {
    "harmful": "refusal score, harmful requests",
    "harmless": "refusal score, twins",
    "reasoning": "refusal score, questions",
    "reasoning answers": "log-probability of the checked answer",
    "reasoning accuracy": "share of questions answered rightly",
}


def write_circuit(
    found: Circuit, folder: str | Path, name: str, origin: Mapping[str, Any]
) -> tuple[Path, Path]:
    """Write Markdown and JSON beside each other; return where.

    Args:
        found: From `circuit`.
        folder: Made where it is missing.
        name: The model's name, also in the files' names.
        origin: See `rim_lens.provenance.provenance`.
    """
    markdown, data = page_paths(folder, "circuit", name)
    markdown.write_text(
        circuit_page(found, f"A circuit of refusal: {name}", told_versions(origin), data.name),
        encoding="utf-8",
    )
    write_json(data, {**origin, "model": name, **found.to_dict()})
    return markdown, data


def circuit_page(found: Circuit, title: str, origin: str, data: str) -> str:
    """A circuit in Markdown: what it comes to, its tests, its nodes and its edges.

    Args:
        found: From `circuit`.
        title: Of the page.
        origin: What made it, in one line.
        data: The file with every number.
    """
    asked = found.settings
    lines = [
        f"# {title}",
        "",
        f"{origin} Condition {asked['read_in']}; {asked['n_select']} harmful requests and their twins choose, {asked['n_evaluate']} others"
        f" ({asked['n_families_evaluate']} families) test. Every number: [{data}]({data}).",
        "",
        "## What it comes to",
        "",
        *(f"- {line}" for line in sentences(found)),
        "",
    ]
    if len(found.tests):
        lines += ["## Enough, and needed?", "", _tests(found), "", _NOTE, ""]
        lines += ["## Nodes that were kept", "", _nodes(found), ""]
    lines += ["## Edges", "", _edges(found), "", _told_of_edges(found), ""]
    return "\n".join(lines).rstrip() + "\n"


_NOTE = (
    "Replaced: by the mean over harmless select requests, place by place, or a donor's output (settings). Share of full − none; a random circuit has as many"
    " heads and neurons in each layer. See docs/circuits.md for what these show and do not."
)


def sentences(found: Circuit) -> list[str]:
    """What a circuit comes to, in words."""
    asked, kept, own = found.settings, found.kept(), found.edges[found.edges["in_circuit"]]
    heads, neurons = (
        sum(len(members) for node in kept for members in [getattr(node, kind)])
        for kind in ("heads", "neurons")
    )
    gate = found.gate
    told = [
        f"Gate: by score, {gate['harmful']:.0%} of the harmful requests that choose are refused, and {gate['harmless']:.0%} of their twins.",
        f"Of {asked['plan']['n_nodes']} nodes, {len(kept)} are kept: {heads} heads, and {neurons} neurons in"
        f" {sum(node.kind == 'neurons' for node in kept)} layers.",
    ]
    for contrast in asked["contrasts"]:
        reach = float(found.effects["reach"].sel(contrast=contrast).mean())
        names = own.loc[own["contrast"] == contrast, "edge"].tolist()
        told.append(
            f"Contrast *{contrast}* (score there − score here {reach:+.1f} nats): {len(names)} edges are the circuit's"
            + (f", the largest {', '.join(names[:3])}." if names else ".")
        )
    if asked["not_tested"]:
        largest = max(map(abs, asked["not_tested"].values()))
        n_measured = len(found.effects["edge"])
        told.append(
            f"{n_measured} of {asked['plan']['n_edges']} edges were measured; {len(asked['not_tested'])} are not tested: their gradient estimates are"
            f" {largest:.2f} nats or less in size."
        )
    if not len(found.tests):
        return [*told, "No node was kept, so that there is no circuit to test."]
    for name, words in (
        ("faithfulness", "With everything else replaced, {} of refusal stays"),
        ("completeness", "With the circuit replaced, {} of it goes"),
    ):
        row = found.row(name, "harmful")
        told.append(f"{words.format(_share(row))}{_beside(row)}.")
    return told


def _share(row: Mapping[str, Any]) -> str:
    return f"{row['share']:.2f} [{row['share_low']:.2f}, {row['share_high']:.2f}]"


def _beside(row: Mapping[str, Any]) -> str:
    if not row["n_controls"] or np.isnan(row["random"]):
        return "; no random circuit stands beside it"
    return (
        f"; of {int(row['n_controls'])} random circuits, {row['random']:.2f} [{row['random_low']:.2f}, {row['random_high']:.2f}], and it is larger in size than"
        f" {row['percentile']:.0f} % of them"
    )


def _tests(found: Circuit) -> str:
    head = ["", "read by", "full", "none", "after", "share [95 %]", "random circuits", "change [95 %]", "p"]
    rows: list[Sequence[object]] = [head]
    for row in found.tests[found.tests["node"] == ""].to_dict("records"):
        shared = not np.isnan(row["share"])
        rows.append(
            [
                row["measure"],
                _KINDS.get(row["kind"], row["kind"]),
                *(f"{row[name]:.2f}" for name in ("full", "none", "after")),
                _share(row) if shared else "–",
                f"{row['random']:.2f} [{row['random_low']:.2f}, {row['random_high']:.2f}] (n = {int(row['n_controls'])})"
                if shared and row["n_controls"]
                else "–",
                f"{row['change']:+.2f} [{row['change_low']:+.2f}, {row['change_high']:+.2f}]",
                f"{row['p']:.3f}",
            ]
        )
    return markdown_table(rows)


def _nodes(found: Circuit) -> str:
    rows: list[Sequence[object]] = [["node", "layer", "heads or neurons", "minimality [95 %]", "p"]]
    for node in found.kept():
        row = found.row("minimality", "harmful", node.name)
        rows.append([node.name, node.layer, len(node.members), _share(row), f"{row['p']:.3f}"])
    return markdown_table(rows)


def _edges(found: Circuit) -> str:
    head = ["contrast", "edge", "effect, nats [95 %]", "share of reach", "both ways", "p", "select side"]
    rows: list[Sequence[object]] = [
        [*head, "percentile: senders", "receivers", "composition", "the circuit's"]
    ]
    for _, table in found.edges.groupby("contrast", sort=False):
        own, others = table[table["in_circuit"]], table[~table["in_circuit"]]
        for row in [*own.to_dict("records"), *others.head(_OTHERS).to_dict("records")]:
            rows.append(
                [
                    row["contrast"],
                    row["edge"],
                    f"{row['effect']:+.2f} [{row['effect_low']:+.2f}, {row['effect_high']:+.2f}]",
                    f"{row['share']:.2f}",
                    f"{row['both']:+.2f}",
                    f"{row['p']:.3f}",
                    f"{row['effect_select']:+.2f}",
                    _percentile(row, ""),
                    _percentile(row, "_receiver"),
                    "–" if np.isnan(row["composition"]) else f"{row['composition']:.3f}",
                    "yes" if row["in_circuit"] else "no",
                ]
            )
    return markdown_table(rows)


def _percentile(row: Mapping[str, Any], suffix: str) -> str:
    n = int(row[f"n_controls{suffix}"])
    return f"{row[f'percentile{suffix}']:.0f} (n = {n})" if n else "–"


def _told_of_edges(found: Circuit) -> str:
    rule = found.settings["rule"]
    return (
        f"The circuit's: p ≤ {rule['alpha']:g}, at least {rule['min_share']:.0%} of the difference between the runs and {rule['min_effect']:g} nats, and the same sign with at"
        f" least {rule['keep_share']:.0%} on the requests that choose. Of the others the {_OTHERS} largest of each contrast are shown."
    )
