"""What `removal_effects` found, as tables that are kept and read back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rim_lens.errors import StatisticsError, StudyFolderError
from rim_lens.measures.frames import frame_from_json, frame_to_json

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class RemovalEffects:
    """What removing a set of heads does, beside random sets with as many heads in each layer.

    Attributes:
        table: One row per measure, kind of prompts and think condition; see `removal_effects`.
        sets: One row per random set and row of the table: control (number), heads, measure, kind, condition, change.
        rows: One row per prompt and row of the table: measure, kind, condition, prompt, family, before, after.
        settings: What was asked, what was used as neutral text, digests of prompts and weights.
    """

    table: pd.DataFrame
    sets: pd.DataFrame
    rows: pd.DataFrame
    settings: dict[str, Any]

    def __repr__(self) -> str:
        settings = self.settings
        return (
            f"RemovalEffects({settings['set']} by {settings['editor']}, {len(self.table)} rows, beside"
            f" {len(settings['controls'])} random sets)"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.table.copy()

    def row(self, measure: str, kind: str, condition: str) -> dict[str, Any]:
        """One row of the table.

        Raises:
            StatisticsError: There is none.
        """
        table = self.table
        here = table[
            (table["measure"] == measure) & (table["kind"] == kind) & (table["condition"] == condition)
        ]
        if len(here) != 1:
            there = sorted({(m, k, c) for m, k, c in table[["measure", "kind", "condition"]].values.tolist()})
            raise StatisticsError(
                f"no row is of {measure!r} on {kind!r} in {condition!r}; there are {there}."
            )
        return {str(name): value for name, value in here.iloc[0].to_dict().items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON; NaN becomes None."""
        return {
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            **{name: frame_to_json(getattr(self, name)) for name in ("table", "sets", "rows")},
        }

    def save(self, folder: str | Path) -> None:
        """Write removal.json into a folder, which is made where there is none."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        (folder / "removal.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            StudyFolderError: The file is missing or cannot be read, or is of another format version.
        """
        path = Path(folder) / "removal.json"
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            version = read["format_version"]
            if version == FORMAT_VERSION:
                frames = {name: frame_from_json(read[name]) for name in ("table", "sets", "rows")}
                return cls(settings=read["settings"], **frames)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise StudyFolderError(
                f"{path} is no readable result ({problem}). Give the folder that RemovalEffects.save wrote."
            ) from problem
        raise StudyFolderError(
            f"{path}: format version {version} was found, and this rim_lens reads {FORMAT_VERSION}. Measure again."
        )
