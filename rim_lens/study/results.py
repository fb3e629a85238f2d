"""A finished (or stopped) study, read back from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_lens.capturing import open_capture
from rim_lens.errors import StudyFolderError
from rim_lens.folder import FORMAT_VERSION, ResultFolder
from rim_lens.measures.frames import frame_from_json
from rim_lens.measures.heads.comparing import HeadComparison, compare_heads
from rim_lens.measures.heads.removal import RemovalEffects
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.probes.after_ablation import ProbesAfterAblation
from rim_lens.measures.probes.cliff import Cliff
from rim_lens.measures.probes.groups import Contrast
from rim_lens.measures.probes.result import ProbeResult, joined
from rim_lens.showing import shown_by
from rim_lens.study.asking import asked_before
from rim_lens.study.neuron_results import GATE, NeuronStudyResult, load_neuron_study
from rim_lens.study.stages import CONDITIONS, attention_name, read_condition, written
from rim_lens.study.statistics import FILE as STATISTICS

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

# What each part writes last; of neurons see `StudyResult.neurons`.
LAST_FILE = {
    "heads": "heads/rows.json",
    "statistics": STATISTICS,
    "removing": "restoring/tables.json",
    "comparing": "tuned/compared.json",
    "probes": "probes/cliff.json",
}
NEURONS = "neurons"  # the folder of the part of that name, a study of its own


def outcomes_of(name: str) -> tuple[str, ...]:
    """The files of what a tuned model writes."""
    return tuple(f"outcomes/{kind}_off_{name}.json" for kind in ("harmful", "harmless"))


@shown_by("rim_lens.views", "study_html")
@dataclass(frozen=True)
class StudyResult:
    """Everything a study measured. Arrays are read from the folder when asked for.

    Attributes:
        path: The study's folder.
        design: Model, digest of its weights, settings, versions, numbers of requests.
        gate: passed, reason, refusal of harmful requests and of twins on the select side.
        asked: What was measured of it so far: parts, and tuned (by name, where each came from).
    """

    path: Path
    design: dict[str, Any]
    gate: dict[str, Any]
    asked: dict[str, Any]

    @property
    def measured(self) -> bool:
        """Whether the study went past its gate and to the end of all that was asked for."""
        return not self.missing

    @property
    def missing(self) -> tuple[str, ...]:
        """What was asked for and is not there yet: parts, and tuned models of parts that others are through with."""
        models = [
            f"{part} of {name}"
            for part in ("comparing", "neurons")
            if part in self.parts
            for name in self.tuned
            if name not in self._tuned_in(part)
        ]
        return (*(part for part in self.asked["parts"] if part not in self.parts), *models)

    def _tuned_in(self, part: str) -> list[str]:
        """Tuned models that a part is through with."""
        if part == "neurons":
            mine = self.neurons
            if mine is None:
                return []
            return [
                name
                for name in mine.tuned
                if all((self.path / file).exists() for file in outcomes_of(name))
                and not any(file.startswith(("neurons", f"tuned/{name}/")) for file in mine.missing)
            ]
        folder = ResultFolder(self.path)
        told = folder.read(LAST_FILE[part]) if folder.has(LAST_FILE[part]) else []
        return list(told["tuned"] if isinstance(told, dict) else told)

    @property
    def parts(self) -> tuple[str, ...]:
        """What was asked for, in all runs together, and is finished; see `Study` and `missing`."""
        return tuple(part for part in self.asked["parts"] if self._through(part))

    def _through(self, part: str) -> bool:
        if part == "neurons":
            mine = self.neurons
            return mine is not None and all(file.startswith("tuned/") for file in mine.missing)
        return (self.path / LAST_FILE[part]).exists()

    @property
    def conditions(self) -> tuple[str, ...]:
        """The think conditions, in the order they are shown."""
        return tuple(self.design["settings"].get("conditions", CONDITIONS))

    @property
    def tuned(self) -> list[str]:
        """Names of the tuned models."""
        return list(self.asked["tuned"])

    def attention(self, kind: str, condition: str) -> xr.Dataset:
        """Attention of one kind of request ("harmful", "harmless") in one condition."""
        return open_capture(self.path / "attention" / attention_name(kind, condition))

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Refusal scores: prompt, family, kind, condition, score, first_token, skipped."""
        return self._records("scores")

    @cached_property
    def outcomes(self) -> pd.DataFrame:
        """Outcomes: prompt, kind, condition, outcome, where, first_words, n_generated, finished, model.

        The column model is "base", "without_heads" (the found heads removed) or a tuned model's name.
        """
        return self._records("outcomes")

    @cached_property
    def heads(self) -> RefusalHeads:
        """Heads found and tested, one by one and as a set, with what they look at."""
        return RefusalHeads.load(self.path / "heads")

    @cached_property
    def attention_rows(self) -> list[dict[str, Any]]:
        """Attention of the last prompt token, key by key, on a few harmful requests: prompt, condition, head, tokens, attention.

        Of the heads that were found or called refusal; empty where there are none.
        """
        folder = ResultFolder(self.path)
        rows: list[dict[str, Any]] = (
            folder.read("heads/rows.json")["rows"] if folder.has("heads/rows.json") else []
        )
        return rows

    @cached_property
    def statistics(self) -> dict[str, Any] | None:
        """What heads do beside what their removal does; None without the part "statistics".

        heads: a table of all heads, evaluate side: argmax_shift and mass_shift (open → off, on harmful requests and twins),
        sink mass and entropy_share in off, direct effect on the score (nats), estimate (gradient × activation, select side),
        kurtosis of attention over a chain's sentences; beside effect_select, effect and verdict. pairs: `pair_interactions`.
        reliability: `split_half` by name. estimates: how the estimate ranks heads. reasons: what could not be had, and why.
        """
        folder = ResultFolder(self.path)
        if not folder.has(STATISTICS):
            return None
        told = folder.read(STATISTICS)
        pairs = None if told["pairs"] is None else frame_from_json(told["pairs"])
        return {**told, "heads": frame_from_json(told["heads"]), "pairs": pairs}

    @cached_property
    def removal(self) -> RemovalEffects | None:
        """What removing the found heads does; None where none were found, or the part "removing" was not asked for."""
        folder = self.path / "removal"
        return RemovalEffects.load(folder) if (folder / "removal.json").exists() else None

    @cached_property
    def restored(self) -> pd.DataFrame | None:
        """Refusal under given chains of thought with the found heads edited, see `restoring`; None as with `removal`."""
        import pandas as pd

        folder = ResultFolder(self.path)
        tables = folder.read("restoring/tables.json") if folder.has("restoring/tables.json") else {}
        return (
            pd.concat([frame_from_json(told) for told in tables.values()], ignore_index=True)
            if tables
            else None
        )

    @cached_property
    def compared(self) -> dict[str, HeadComparison]:
        """The heads of each tuned model beside those of the base; none without the part "comparing"."""
        seed = int(self.design["settings"]["seed"])
        return {
            name: compare_heads(
                self.heads, RefusalHeads.load(self.path / "tuned" / name / "heads"), seed=seed
            )
            for name in self._tuned_in("comparing")
        }

    def probes(self, contrast: Contrast = "harmful") -> ProbeResult:
        """Probes of all conditions: of harmful against harmless requests, or of refused against fulfilled ones.

        Raises:
            StudyFolderError: The study has no part "probes", or has not come that far.
        """
        folders = [self.path / "probes" / contrast / written(name) for name in self.conditions]
        there = [folder for folder in folders if folder.exists()]
        if not there:
            raise StudyFolderError(
                f"{self.path} holds no probes. They are a part of their own: rl.Study(..., parts=('heads', 'probes'))."
            )
        return joined([ProbeResult.load(folder) for folder in there])

    @cached_property
    def probes_without_heads(self) -> ProbesAfterAblation | None:
        """Probe scores with the found heads removed and with random ones; None where none were found or probed."""
        folder = self.path / "probes" / "without_heads"
        return ProbesAfterAblation.load(folder) if folder.exists() else None

    @cached_property
    def cliffs(self) -> dict[tuple[str, str], Cliff]:
        """A probe of off along given chains of thought, by kind of request and condition; empty where there is no probe."""
        folder = ResultFolder(self.path)
        told = folder.read("probes/cliff.json") if folder.has("probes/cliff.json") else {"curves": []}
        return {(one["kind"], one["condition"]): Cliff.from_dict(one) for one in told["curves"]}

    @cached_property
    def neurons(self) -> NeuronStudyResult | None:
        """The study of neurons, as far as it came; None without the part neurons, or before its gate."""
        folder = self.path / NEURONS
        there = "neurons" in self.asked["parts"] and (folder / GATE).exists()
        return load_neuron_study(folder) if there else None

    @cached_property
    def timings(self) -> dict[str, float]:
        """Seconds per stage, all runs together."""
        return ResultFolder(self.path).read("timings.json")

    def refusal_by_condition(self) -> pd.DataFrame:
        """Share of refuse, comply and other per kind of request, condition and model."""
        table = (
            self.outcomes.groupby(["model", "kind", "condition"], sort=False)["outcome"]
            .value_counts(normalize=True)
            .unstack(fill_value=0.0)
            .reindex(columns=["refuse", "comply", "other"], fill_value=0.0)
        )
        table["n"] = self.outcomes.groupby(["model", "kind", "condition"], sort=False).size()
        return table.reset_index()

    def _records(self, what: str) -> pd.DataFrame:
        import pandas as pd

        folder = ResultFolder(self.path)
        frames = []
        for path in sorted((self.path / what).glob("*.json")):
            frame = pd.DataFrame(folder.read(f"{what}/{path.name}"))
            kind, condition, *rest = path.stem.split("_", 2)
            frame["kind"], frame["condition"] = kind, read_condition(condition)
            if what == "outcomes":
                frame["model"] = rest[0] if rest else "base"
            frames.append(frame)
        if not frames:
            raise StudyFolderError(
                f"{self.path / what} is empty: the study has not come that far. Run it again."
            )
        return pd.concat(frames, ignore_index=True)


def load_study(folder: str | Path) -> StudyResult:
    """Read a study back from its folder.

    Raises:
        StudyFolderError: The folder holds none, or a file in it is corrupt.
    """
    stored = ResultFolder(folder)
    study = stored.read("study.json")
    if study.get("format_version") != FORMAT_VERSION:
        raise StudyFolderError(
            f"{stored.path} was written in format {study.get('format_version')}; this version reads {FORMAT_VERSION}."
        )
    design, asked = study["design"], asked_before(stored)
    # Folders of an earlier version hold both in their design.
    asked["parts"] = asked["parts"] or list(design.get("parts", ("heads", "neurons")))
    return StudyResult(
        stored.path,
        design,
        stored.read("gate.json"),
        asked | {"tuned": design.get("tuned", {}) | asked["tuned"]},
    )
