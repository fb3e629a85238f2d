"""What `refusal_heads` found, as a table that is kept, read back and shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rim_lens.errors import StudyFolderError
from rim_lens.folder import write_whole
from rim_lens.lens import Head
from rim_lens.measures.frames import frame_from_json, frame_to_json
from rim_lens.showing import shown_by

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

FORMAT_VERSION = 1
_DATASETS = ("effects", "attention")


@shown_by("rim_lens.views", "heads_html")
@dataclass(frozen=True, eq=False)
class RefusalHeads:
    """Heads, what their removal does on held-out requests, where they look, and what each of them is called.

    Attributes:
        table: One row per tested head, and per other head of their layers, see `head_table`. Beside effects, intervals,
            corrected p and verdict: for each contrast, ``moves_NAME`` (share of harmful requests on which the argmax key
            makes the move) and ``mass_NAME`` (mean mass on the span entered, in the second condition, minus that on the
            span left, in the first), with ``_twins`` for the twins; ``sink`` (smallest mean mass on the first token over
            conditions and kinds) and ``moving`` (largest share over contrasts, the smaller of both kinds).
        found: The set that `find_heads` chose on the select side, in that order; empty where it found none.
        set: Effect of removing that set on the evaluate side, beside random sets; empty where there is none.
        scan: Every candidate on the select side: layer, head, mean effect in nats, moves. It chose, it tests nothing.
        effects: Per request: effects on harmful requests and twins, and the baselines, in nats.
        attention: Mean attention mass of every head on every span: (kind, condition, layer, head, span), evaluate side.
        gate: Whether it was asked for, and the shares refused on the select side by score.
        settings: Everything asked for, numbers of requests, digests of prompts and weights.
    """

    table: pd.DataFrame
    found: tuple[Head, ...]
    set: dict[str, Any]
    scan: pd.DataFrame
    effects: xr.Dataset
    attention: xr.Dataset
    gate: dict[str, Any]
    settings: dict[str, Any]

    def __iter__(self) -> Iterator[Head]:
        """Those of `top`, so that an editor takes what was found: ``rl.AblateHeads(found)``."""
        return iter(self.top())

    def top(self, k: int | None = None) -> list[Head]:
        """The heads that refusal needs: verdict *refusal*, removal lowers it; the one that lowers it most first.

        Heads whose removal raises refusal of harmful requests alone bear that verdict too, with a positive effect; they
        stand in the table and not here.

        Args:
            k: At most so many; None for all. There may be fewer, and none.
        """
        rows = self.table[(self.table["verdict"] == "refusal") & (self.table["effect"] < 0)].sort_values(
            "effect"
        )
        return [(int(layer), int(head)) for layer, head in zip(rows["layer"], rows["head"], strict=True)][:k]

    def to_dataframe(self, masses: bool = False) -> pd.DataFrame:
        """The table.

        Args:
            masses: With a column ``mass_SPAN_CONDITION`` for the mean attention mass of each head on each span in each
                condition, harmful requests, and the same with ``_twins``.
        """
        if not masses:
            return self.table.copy()
        mass = self.attention["attention_mass"]
        wide = self.table.copy()
        layers, heads = wide["layer"].to_numpy(), wide["head"].to_numpy()
        for kind, suffix in (("harmful", ""), ("harmless", "_twins")):
            for condition in mass["condition"].values:
                for span in mass["span"].values:
                    values = (
                        mass.sel(kind=kind, condition=condition, span=span).transpose("layer", "head").values
                    )
                    wide[f"mass_{span}_{condition}{suffix}"] = values[layers, heads]
        return wide.dropna(axis="columns", how="all")

    def to_dict(self) -> dict[str, Any]:
        """All that is not an array, as plain values for JSON; NaN becomes None."""
        return {
            "format_version": FORMAT_VERSION,
            "found": [list(head) for head in self.found],
            "set": self.set,
            "gate": self.gate,
            "settings": self.settings,
            "table": frame_to_json(self.table),
            "scan": frame_to_json(self.scan),
        }

    def save(self, folder: str | Path) -> None:
        """Write heads.json, effects.nc and attention.nc into a folder, which is made where there is none."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in _DATASETS:
            getattr(self, name).to_netcdf(folder / f"{name}.nc", engine="h5netcdf")
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        write_whole(folder / "heads.json", text + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            StudyFolderError: A file is missing or cannot be read, or is of another format version.
        """
        import xarray as xr

        folder = Path(folder)
        try:
            read = json.loads((folder / "heads.json").read_text(encoding="utf-8"))
            if read["format_version"] != FORMAT_VERSION:
                raise StudyFolderError(
                    f"{folder}: format version {read['format_version']} was found, and this rim_lens reads"
                    f" {FORMAT_VERSION}. Measure again."
                )
            arrays = {}
            for name in _DATASETS:
                with xr.open_dataset(folder / f"{name}.nc", engine="h5netcdf") as data:
                    arrays[name] = data.load()
            return cls(
                table=frame_from_json(read["table"]),
                found=tuple((int(layer), int(head)) for layer, head in read["found"]),
                set=read["set"],
                scan=frame_from_json(read["scan"]),
                gate=read["gate"],
                settings=read["settings"],
                **arrays,
            )
        except (OSError, ValueError, KeyError, TypeError) as problem:
            if isinstance(problem, StudyFolderError):
                raise
            raise StudyFolderError(
                f"{folder} holds no readable table of heads ({problem}). Give the folder that RefusalHeads.save wrote."
            ) from problem
