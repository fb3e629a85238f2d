"""What probing found, to be looked at, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rim_lens.errors import CorruptWeights, StatisticsError
from rim_lens.measures.frames import frame_from_json, frame_to_json
from rim_lens.measures.probes.fitting import Probe, Probes
from rim_lens.showing import shown_by

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1


@shown_by("rim_lens.views", "probes_html")
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
        folder = Path(folder)
        written = {
            "format_version": FORMAT_VERSION,
            "probes": save_probes(self.probes, folder),
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
        folder = Path(folder)
        with reading(folder, "ProbeResult"):
            read = json.loads((folder / "probes.json").read_text(encoding="utf-8"))
            check_version(folder, read)
            probes = load_probes(read["probes"], folder)
            return cls(
                frame_from_json(read["table"]), probes, read["reasons"], read["absent"], read["settings"]
            )


def joined(results: Sequence[ProbeResult]) -> ProbeResult:
    """Return probes of several conditions, measured one at a time, as one result.

    Raises:
        StatisticsError: There is none, or they were asked for or measured differently.
    """
    import pandas as pd

    if not results:
        raise StatisticsError("no probes were given to be joined.")
    own = ("think", "absent", "outcomes", "digests")
    first = {key: value for key, value in results[0].settings.items() if key not in own}
    for result in results[1:]:
        other = {key: value for key, value in result.settings.items() if key not in own}
        unlike = [key for key in first if other.get(key) != first[key]]
        if unlike:
            raise StatisticsError(
                f"probes with different settings cannot stand in one table (different: {', '.join(unlike)})."
            )
    think = [condition for result in results for condition in result.settings["think"]]
    if len(set(think)) < len(think):
        raise StatisticsError(f"a condition stands in two of the results: {', '.join(think)}.")
    merged: dict[str, Any] = {
        key: {name: value for result in results for name, value in result.settings[key].items()}
        for key in ("outcomes", "digests")
    }
    return ProbeResult(
        table=pd.concat([result.table for result in results], ignore_index=True),
        probes={name: probes for result in results for name, probes in result.probes.items()},
        reasons={name: why for result in results for name, why in result.reasons.items()},
        absent={name: places for result in results for name, places in result.absent.items()},
        settings={**results[0].settings, "think": think, **merged},
    )


def save_probes(probes: Mapping[str, Probes], folder: Path) -> dict[str, Any]:
    """Write probes.safetensors into a folder, which is made where there is none; return what JSON must keep beside it."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{condition}/{name}": np.ascontiguousarray(getattr(one, name))
        for condition, one in probes.items()
        for name in ("direction", "threshold", "n")
    }
    save_file(arrays, folder / "probes.safetensors")
    return {condition: {"places": list(one.places), "site": one.site} for condition, one in probes.items()}


def load_probes(described: Mapping[str, Any], folder: Path) -> dict[str, Probes]:
    """Read what `save_probes` wrote; call it inside `reading`."""
    from safetensors.numpy import load_file

    arrays = load_file(folder / "probes.safetensors")
    return {
        condition: Probes(
            arrays[f"{condition}/direction"],
            arrays[f"{condition}/threshold"],
            tuple(told["places"]),
            arrays[f"{condition}/n"],
            told["site"],
            condition,
        )
        for condition, told in described.items()
    }


def check_version(folder: Path, read: Mapping[str, Any]) -> None:
    """Refuse a folder of another format.

    Raises:
        CorruptWeights: It is.
    """
    if read["format_version"] != FORMAT_VERSION:
        raise CorruptWeights(
            f"{folder}: format version {read['format_version']} was found, and this rim_lens reads {FORMAT_VERSION}."
            " Probe again."
        )


@contextmanager
def reading(folder: Path, what: str) -> Iterator[None]:
    """Say which folder could not be read, whatever went wrong in it.

    Raises:
        CorruptWeights: Anything did.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
        if isinstance(problem, CorruptWeights):
            raise
        raise CorruptWeights(
            f"{folder} holds no readable probes ({problem}). Give the folder that {what}.save wrote."
        ) from problem
