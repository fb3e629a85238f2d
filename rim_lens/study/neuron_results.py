"""A study of neurons, read back from its folder: finished, or as far as it came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_lens.errors import StudyFolderError
from rim_lens.folder import FORMAT_VERSION, ResultFolder
from rim_lens.measures.entanglement.result import Entanglement
from rim_lens.measures.frames import frame_from_json, frame_to_json
from rim_lens.measures.neurons.sets import FILE, NeuronSet
from rim_lens.showing import shown_by
from rim_lens.study.asking import asked_before

if TYPE_CHECKING:
    import pandas as pd

CLAIM, GATE = "neuron_study.json", "gate.json"
OF_SET, OF_TUNED = ("dose", "writers"), ("entanglement", "restoring", "multiverse")
PARTS = (*OF_SET, *OF_TUNED)


@shown_by("rim_lens.views", "neuron_study_html")
@dataclass(frozen=True)
class NeuronStudyResult:
    """Everything a study of neurons measured.

    Attributes:
        path: The study's folder.
        design: Model, digest of its weights, settings, versions, numbers of requests.
        gate: passed, and the reason where not.
        asked: What was asked for in all runs together: parts, and tuned (by name, where each came from).
    """

    path: Path
    design: dict[str, Any]
    gate: dict[str, Any]
    asked: dict[str, Any]

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts that were asked for."""
        return tuple(self.asked["parts"])

    @property
    def tuned(self) -> list[str]:
        """Names of the tuned models."""
        return list(self.asked["tuned"])

    @cached_property
    def neurons(self) -> NeuronSet | None:
        """The set with its test; None where the gate was not passed, or the study has not come that far."""
        folder = self.path / "neurons"
        return NeuronSet.load(folder) if (folder / FILE).exists() else None

    @property
    def missing(self) -> tuple[str, ...]:
        """What was asked for and is not there yet, as files; nothing where the gate stopped it or no neuron was chosen."""
        if not self.gate["passed"] and self.design["settings"]["gate"]:
            return ()
        found = self.neurons
        if found is None:
            return ("neurons",)
        if not len(found):
            return ()
        files = [f"{part}.json" for part in OF_SET if part in self.parts]
        files += [
            f"tuned/{name}/{part}.json" for name in self.tuned for part in OF_TUNED if part in self.parts
        ]
        untested = ["neurons/effects"] if found.effects is None else []
        return (*untested, *(file for file in files if not (self.path / file).exists()))

    @property
    def measured(self) -> bool:
        """Whether all that was asked for is there."""
        return not self.missing

    @cached_property
    def dose(self) -> pd.DataFrame | None:
        """What removing more and more neurons does, see `dose_curve`; None where it is not there."""
        return self._table("dose.json")

    @cached_property
    def writers(self) -> pd.DataFrame | None:
        """Direct and total effect of each neuron, see `direct_to_logits`; None where it is not there."""
        return self._table("writers.json")

    @cached_property
    def entanglement(self) -> dict[str, Entanglement]:
        """RAS and its rivals by tuned model, of those that are through."""
        return {
            name: Entanglement.load(self.path / "tuned" / name / "entanglement")
            for name in self._through("entanglement")
        }

    @cached_property
    def restored(self) -> dict[str, pd.DataFrame]:
        """What the base's activations bring back, by tuned model, see `restore_by_neurons`."""
        return self._tables("restoring")

    @cached_property
    def multiverse(self) -> dict[str, pd.DataFrame]:
        """RAS over every choice the paper leaves open, by tuned model, see `multiverse`."""
        return self._tables("multiverse")

    @cached_property
    def timings(self) -> dict[str, float]:
        """Seconds per stage, all runs together."""
        return ResultFolder(self.path).read("timings.json")

    def _through(self, part: str) -> list[str]:
        return [name for name in self.tuned if (self.path / f"tuned/{name}/{part}.json").exists()]

    def _tables(self, part: str) -> dict[str, pd.DataFrame]:
        return {name: read_table(self.path, f"tuned/{name}/{part}.json") for name in self._through(part)}

    def _table(self, name: str) -> pd.DataFrame | None:
        return read_table(self.path, name) if (self.path / name).exists() else None


def keep_table(folder: ResultFolder, name: str, measure: Callable[[], pd.DataFrame]) -> None:
    """Keep a table with what it says of itself (``attrs``), measuring it only if it is not there yet."""

    def told() -> dict[str, Any]:
        table = measure()
        return {"table": frame_to_json(table), "attrs": dict(table.attrs)}

    folder.once(name, told)


def read_table(path: Path, name: str) -> pd.DataFrame:
    """Return a table that `keep_table` kept.

    Raises:
        StudyFolderError: It is missing or corrupt.
    """
    told = ResultFolder(path).read(name)
    try:
        table = frame_from_json(told["table"])
        table.attrs = told["attrs"]
    except (KeyError, TypeError, ValueError) as problem:
        raise StudyFolderError(
            f"{path / name} holds no table ({problem}). Delete that file and run the study again: only it is measured anew."
        ) from problem
    return table


def load_neuron_study(folder: str | Path) -> NeuronStudyResult:
    """Read a study of neurons back from its folder.

    Raises:
        StudyFolderError: The folder holds none, or a file in it is corrupt.
    """
    stored = ResultFolder(folder)
    study = stored.read(CLAIM)
    if study.get("format_version") != FORMAT_VERSION:
        raise StudyFolderError(
            f"{stored.path} was written in format {study.get('format_version')}; this version reads {FORMAT_VERSION}."
        )
    return NeuronStudyResult(stored.path, study["design"], stored.read(GATE), asked_before(stored))
