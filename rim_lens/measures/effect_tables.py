"""What an edit of a set does, as tables that are kept, read back and shown."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rim_lens.errors import StatisticsError, StudyFolderError
from rim_lens.folder import write_whole
from rim_lens.measures.frames import frame_from_json, frame_to_json

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1
_FRAMES = ("table", "sets", "rows")


@dataclass(frozen=True, eq=False, repr=False)
class EffectTables:
    """What removing a set does, beside random sets with as many members in each layer.

    Attributes:
        table: One row per measure, kind of prompts and think condition.
        sets: One row per random set and row of the table: control (number), its members, measure, kind, condition, change.
        rows: One row per prompt and row of the table: measure, kind, condition, prompt, family, before, after.
        settings: What was asked, what was used as neutral text, digests of prompts and weights.
    """

    table: pd.DataFrame
    sets: pd.DataFrame
    rows: pd.DataFrame
    settings: dict[str, Any]

    file: ClassVar[str]

    def __repr__(self) -> str:
        settings = self.settings
        return (
            f"{type(self).__name__}({settings['set']} by {settings['editor']}, {len(self.table)} rows, beside"
            f" {len(settings['controls'])} random sets)"
        )

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{self.table.to_html(index=False, float_format='{:.3g}'.format)}"

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
            **{name: frame_to_json(getattr(self, name)) for name in _FRAMES},
        }

    def save(self, folder: str | Path) -> None:
        """Write one JSON file (`file`) into a folder, which is made where there is none."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        write_whole(folder / self.file, text + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            StudyFolderError: The file is missing or cannot be read, or is of another format version.
        """
        path = Path(folder) / cls.file
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            version = read["format_version"]
            if version == FORMAT_VERSION:
                frames = {name: frame_from_json(read[name]) for name in _FRAMES}
                return cls(settings=read["settings"], **frames)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise StudyFolderError(
                f"{path} is no readable result ({problem}). Give the folder that {cls.__name__}.save wrote."
            ) from problem
        raise StudyFolderError(
            f"{path}: format version {version} was found, and this rim_lens reads {FORMAT_VERSION}. Measure again."
        )
