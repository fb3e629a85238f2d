"""What `circuit` found, as tables that are kept, read back and drawn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rim_lens.errors import MissingExtra, StatisticsError, StudyFolderError
from rim_lens.folder import write_whole
from rim_lens.measures.circuits.nodes import Node
from rim_lens.measures.frames import frame_from_json, frame_to_json

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

FORMAT_VERSION = 1
FILE, ARRAYS = "circuit.json", "circuit.nc"
_FRAMES = ("nodes", "edges", "tests")


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """Nodes, edges and tests of a circuit; every number of edges and tests is of evaluate requests.

    Attributes:
        nodes: One row per node: name, kind, layer, members, kept (on a way to the refusal score, by select requests).
        edges: One row per edge and contrast, see `edge_table`; beside the effects ``composition``, of weights (see `composition`).
        tests: Faithfulness, completeness and minimality of the kept nodes, see `circuit_tests`; no row where none is kept.
        effects: Per request: effect and back (contrast, prompt, edge), reach (contrast, prompt), nats.
        gate: Whether it was asked for, and the shares refused on the select side by score.
        settings: Everything asked for, numbers of requests, digests of prompts and weights, the plan; under "not_tested" the edges
            that were estimated by gradients and not measured, with their estimates, nats.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    tests: pd.DataFrame
    effects: xr.Dataset
    gate: dict[str, Any]
    settings: dict[str, Any]

    def __repr__(self) -> str:
        found = self.edges["in_circuit"]
        told = ""
        if len(self.tests):
            parts = [
                f"{name} {self.row(name, 'harmful')['share']:.2f}"
                for name in ("faithfulness", "completeness")
            ]
            told = f", {', '.join(parts)}"
        return (
            f"Circuit({int(found.sum())} of {len(self.edges)} edges, {len(self.kept())} of"
            f" {len(self.nodes[self.nodes['kind'].isin(['head', 'neurons'])])} heads and sets of neurons kept{told})"
        )

    @property
    def table(self) -> pd.DataFrame:
        """The edges."""
        return self.edges

    def asked(self) -> list[Node]:
        """Every node, in the order of the table."""
        return [
            Node(row["name"], row["kind"], int(row["layer"]), tuple(map(int, row["members"].split())))
            for row in self.nodes.to_dict("records")
        ]

    def kept(self) -> list[Node]:
        """The heads and neurons that were kept."""
        return [node for node, kept in zip(self.asked(), self.nodes["kept"], strict=True) if kept]

    def top(self, k: int | None = None, contrast: str | None = None) -> list[str]:
        """The circuit's edges by name, the largest effect first.

        Args:
            k: At most so many; None for all.
            contrast: Of which contrast; the first when None.

        Raises:
            StatisticsError: That contrast was not measured.
        """
        table = self._of(contrast)
        return [str(name) for name in table.loc[table["in_circuit"], "edge"]][:k]

    def row(self, measure: str, kind: str, node: str = "") -> dict[str, Any]:
        """One row of the tests.

        Raises:
            StatisticsError: There is none.
        """
        table = self.tests
        here = table[(table["measure"] == measure) & (table["kind"] == kind) & (table["node"] == node)]
        if len(here) != 1:
            there = sorted(set(zip(table["measure"], table["kind"], strict=True)))
            raise StatisticsError(
                f"no test is of {measure!r} on {kind!r} (node {node!r}); there are {there}."
            )
        return {str(name): value for name, value in here.iloc[0].to_dict().items()}

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the table of edges."""
        return self.edges.copy()

    def to_networkx(self, contrast: str | None = None, every: bool = False) -> Any:
        """The circuit as a ``networkx.MultiDiGraph``: nodes by name with what is known of them, edges with their row.

        Two nodes may have several edges between them, by input; the input is the edge's key.

        Args:
            contrast: Of which contrast; the first when None.
            every: With edges that are not the circuit's, which the attribute ``in_circuit`` tells.

        Raises:
            StatisticsError: That contrast was not measured.
            MissingExtra: networkx is not installed.
        """
        try:
            import networkx
        except ImportError as problem:
            raise MissingExtra(
                "to_networkx needs the package 'networkx'. Run: pip install networkx"
            ) from problem
        table = self._of(contrast)
        graph = networkx.MultiDiGraph(contrast=str(table["contrast"].iloc[0]) if len(table) else "")
        for row in self.nodes.to_dict("records"):
            graph.add_node(row["name"], **{str(key): value for key, value in row.items() if key != "name"})
        for row in table.to_dict("records"):
            if every or row["in_circuit"]:
                kept = {str(key): value for key, value in row.items() if key not in ("sender", "receiver")}
                graph.add_edge(row["sender"], row["receiver"], key=row["input"], **kept)
        return graph

    def to_dict(self) -> dict[str, Any]:
        """All that is not an array, as plain values for JSON; NaN becomes None."""
        return {
            "format_version": FORMAT_VERSION,
            "gate": self.gate,
            "settings": self.settings,
            **{name: frame_to_json(getattr(self, name)) for name in _FRAMES},
        }

    def save(self, folder: str | Path) -> None:
        """Write circuit.json and circuit.nc into a folder, which is made where there is none."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.effects.to_netcdf(folder / ARRAYS, engine="h5netcdf")
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        write_whole(folder / FILE, text + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            StudyFolderError: A file is missing or cannot be read, or is of another format version.
        """
        import xarray as xr

        folder = Path(folder)
        try:
            read = json.loads((folder / FILE).read_text(encoding="utf-8"))
            version = read["format_version"]
            if version == FORMAT_VERSION:
                with xr.open_dataset(folder / ARRAYS, engine="h5netcdf") as data:
                    effects = data.load()
                frames = {name: frame_from_json(read[name]) for name in _FRAMES}
                return cls(effects=effects, gate=read["gate"], settings=read["settings"], **frames)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise StudyFolderError(
                f"{folder} holds no readable circuit ({problem}). Give the folder that Circuit.save wrote."
            ) from problem
        raise StudyFolderError(
            f"{folder}: format version {version} was found, and this rim_lens reads {FORMAT_VERSION}. Measure again."
        )

    def _of(self, contrast: str | None) -> pd.DataFrame:
        names = list(dict.fromkeys(self.edges["contrast"]))
        name = names[0] if contrast is None and names else contrast
        if name not in names:
            raise StatisticsError(f"the contrast {contrast!r} was asked for; there are {names}.")
        return self.edges[self.edges["contrast"] == name]
