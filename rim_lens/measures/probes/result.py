"""What probing found, to be looked at, saved and loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rim_lens.errors import CorruptWeights, StatisticsError
from rim_lens.measures.frames import frame_from_json, frame_to_json
from rim_lens.measures.probes.fitting import Probe, Probes

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Probes with what they separate and, beside it, what ablating their directions does to refusal.

    Attributes:
        table: One row per condition, layer and place; see `rim_lens.measures.probes.probing.probe`.
        probes: Per condition, the probes that were trained; none where a class was empty.
        reasons: Condition → why no probe was trained there.
        absent: Condition → places asked for that no prompt has there.
        settings: What was asked, the model and its digest, and how many requests stood on which side.
    """

    table: pd.DataFrame
    probes: dict[str, Probes]
    reasons: dict[str, str]
    absent: dict[str, list[str]]
    settings: dict[str, Any]

    def __repr__(self) -> str:
        told = []
        for condition in dict.fromkeys(self.table["condition"]):
            if condition in self.reasons:
                told.append(f"{condition}: no probe, {self.reasons[condition]}")
                continue
            rows = self.table[self.table["condition"] == condition]
            tested = rows[rows["effect"].notna()]
            best = (tested if len(tested) else rows).sort_values("auc_cv", ascending=False).iloc[0]
            ablated = (
                f"ablating it {best['effect']:+.2f} [{best['effect_low']:+.2f}, {best['effect_high']:+.2f}] nats on harmful,"
                f" {best['effect_twins']:+.2f} on harmless"
                if len(tested)
                else "ablation not tested"
            )
            told.append(
                f"{condition}: layer {best['layer']}, {best['place']}: AUC {best['auc']:.2f}, {ablated} ({best['state']})"
            )
        return f"ProbeResult({self.settings['contrast']}; {'; '.join(told)})"

    @property
    def reason(self) -> str | None:
        """Why conditions have no probe; None where all have."""
        return "; ".join(f"{condition}: {why}" for condition, why in self.reasons.items()) or None

    @property
    def provenance(self) -> str:
        """One line: model, weights, requests, versions."""
        s = self.settings
        return (
            f"{s['contrast']} probes of {s['site']} on {s['model'].get('name', 'a model')}, weights {s['weights_digest']},"
            f" {s['n_select'][0]} + {s['n_select'][1]} requests to select and {s['n_evaluate'][0]} + {s['n_evaluate'][1]} to evaluate,"
            f" seed {s['seed']}, rim_lens {s['rim_lens']}, TransformerLens {s['transformer_lens']}"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.table.copy()

    def probe(self, condition: str, layer: int, place: str) -> Probe:
        """The probe of one condition, layer and place.

        Raises:
            StatisticsError: There is none; the message says why.
        """
        if condition not in self.probes:
            raise StatisticsError(
                f"no probe was trained in condition {condition!r}: {self.reasons.get(condition, 'it was not asked for')}."
                f" There are probes in {', '.join(self.probes) or 'none'}."
            )
        return self.probes[condition].at(layer, place)

    def save(self, folder: str | Path) -> None:
        """Write probes.safetensors and probes.json into a folder, which is made where there is none."""
        from safetensors.numpy import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays, described = {}, {}
        for condition, probes in self.probes.items():
            for name in ("direction", "threshold", "n"):
                arrays[f"{condition}/{name}"] = np.ascontiguousarray(getattr(probes, name))
            described[condition] = {"places": list(probes.places), "site": probes.site}
        save_file(arrays, folder / "probes.safetensors")
        written = {
            "format_version": FORMAT_VERSION,
            "probes": described,
            "reasons": self.reasons,
            "absent": self.absent,
            "settings": self.settings,
            "table": frame_to_json(self.table),
        }
        text = json.dumps(written, indent=1, allow_nan=False, ensure_ascii=False)
        (folder / "probes.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            CorruptWeights: A file is missing or cannot be read, or is of another format version.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = Path(folder)
        try:
            read = json.loads((folder / "probes.json").read_text(encoding="utf-8"))
            if read["format_version"] != FORMAT_VERSION:
                raise CorruptWeights(
                    f"{folder}: format version {read['format_version']} was found, and this rim_lens reads {FORMAT_VERSION}."
                    " Probe again."
                )
            arrays = load_file(folder / "probes.safetensors")
            probes = {
                condition: Probes(
                    arrays[f"{condition}/direction"],
                    arrays[f"{condition}/threshold"],
                    tuple(told["places"]),
                    arrays[f"{condition}/n"],
                    told["site"],
                    condition,
                )
                for condition, told in read["probes"].items()
            }
            return cls(
                frame_from_json(read["table"]), probes, read["reasons"], read["absent"], read["settings"]
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
            if isinstance(problem, CorruptWeights):
                raise
            raise CorruptWeights(
                f"{folder} holds no readable probes ({problem}). Give the folder that ProbeResult.save wrote."
            ) from problem
