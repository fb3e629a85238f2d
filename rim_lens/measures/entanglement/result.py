"""What `entanglement` found, as tables that are kept, read back and shown."""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rim_lens.errors import StatisticsError, StudyFolderError
from rim_lens.folder import write_whole
from rim_lens.measures.frames import frame_from_json, frame_to_json

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1
FILE = "entanglement.json"
_FRAMES = ("table", "sets", "layers", "rows")


@dataclass(frozen=True, eq=False)
class Entanglement:
    """RAS and its rivals between a base and a tuned model, beside random sets.

    Attributes:
        table: One row per metric and what it is of ("all" neurons, the "set", or the "model" as a whole): value, unit, low
            and high (interval over prompts, clustered by family); p, the test: the set's rank among sets chosen on
            exchanged labels, large values counting, with their mean (exchanged) and number (n_exchanged); p_random and
            percentile, its rank among random sets, a description, with their mean (random), 2.5 and 97.5 % (random_low,
            random_high) and number (n_controls); and reason (why a number is missing). NaN where there is nothing to rank.
        sets: One row per set of neurons ("all", "set", "random" and "exchanged" ones with their numbers): n, every metric,
            how many neurons were usable and moved on each side.
        layers: One row per layer: CKA of each kind of prompts, the CKA ratio, whitened cosines; empty without a residual stream.
        rows: One row per prompt: kind, prompt, family, refusal score in both models, KL on task tokens.
        settings: What was asked, the neurons and random sets, both models' facts and digests, how each was read.
    """

    table: pd.DataFrame
    sets: pd.DataFrame
    layers: pd.DataFrame
    rows: pd.DataFrame
    settings: dict[str, Any]

    def row(self, metric: str, of: str = "set") -> dict[str, Any]:
        """One row of the table.

        Raises:
            StatisticsError: There is no such row.
        """
        found = self.table[(self.table["metric"] == metric) & (self.table["of"] == of)]
        if len(found) != 1:
            there = ", ".join(
                f"{one} of {other}" for one, other in zip(self.table["metric"], self.table["of"], strict=True)
            )
            raise StatisticsError(f"{metric!r} of {of!r} was asked for; there are {there}.")
        cells = found.iloc[0].items()
        return {str(name): cell.item() if isinstance(cell, np.generic) else cell for name, cell in cells}

    def value(self, metric: str, of: str = "set") -> float:
        """One number of the table; NaN where its `reason` says why."""
        return float(self.row(metric, of)["value"])

    def to_dataframe(self, what: str = "table") -> pd.DataFrame:
        """One of the tables: "table", "sets", "layers" or "rows".

        Raises:
            StatisticsError: There is no such table.
        """
        if what not in _FRAMES:
            raise StatisticsError(f"table {what!r} was asked for; there are {', '.join(_FRAMES)}.")
        found: pd.DataFrame = getattr(self, what).copy()
        return found

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values for JSON; NaN becomes None."""
        frames = {name: frame_to_json(getattr(self, name)) for name in _FRAMES}
        return {"format_version": FORMAT_VERSION, **frames, "settings": self.settings}

    def save(self, folder: str | Path) -> None:
        """Write entanglement.json into a folder, which is made where there is none."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        write_whole(folder / FILE, text + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            StudyFolderError: The file is missing or cannot be read, or is of another format version.
        """
        path = Path(folder) / FILE
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            if read["format_version"] != FORMAT_VERSION:
                raise StudyFolderError(
                    f"{path}: format version {read['format_version']} was found, and this rim_lens reads {FORMAT_VERSION}."
                    " Measure again."
                )
            return cls(**{name: frame_from_json(read[name]) for name in _FRAMES}, settings=read["settings"])
        except (OSError, ValueError, KeyError, TypeError) as problem:
            if isinstance(problem, StudyFolderError):
                raise
            raise StudyFolderError(
                f"{path} is no readable result ({problem}). Give the folder that Entanglement.save wrote."
            ) from problem

    def __repr__(self) -> str:
        ras = self.row("ras")
        told = f"RAS {ras['value']:.3g}, p {ras['p']:.2g}; percentile {ras['percentile']:.3g} of {ras['n_controls']} random sets"
        return f"Entanglement({self.settings['n_neurons']} neurons: {told})"

    def _repr_html_(self) -> str:
        level = f"{100 * self.settings['level']:g} % interval"
        names = (
            "metric",
            "of",
            "value",
            level,
            "p (exchanged labels)",
            "random sets",
            "percentile",
            "why not",
        )
        head = "".join(f"<th>{name}</th>" for name in names)
        body = ""
        for _, row in self.table.iterrows():
            spread = f"{_told(row['random'])} ({_span(row['random_low'], row['random_high'])})"
            cells = (
                row["metric"],
                row["of"],
                _told(row["value"]),
                _span(row["low"], row["high"]),
                _told(row["p"]),
                spread if row["n_controls"] else "",
                _told(row["percentile"]),
                row["reason"],
            )
            body += "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>"
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.settings.get("notes", ()))
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"


def _told(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _span(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{low:.3g} to {high:.3g}"
