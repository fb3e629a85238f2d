"""A study of checkpoints, read back from its folder: finished, or as far as it came."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_lens.errors import StudyFolderError
from rim_lens.folder import FORMAT_VERSION, ResultFolder
from rim_lens.measures.checkpoints.result import FILE as COMPARISON
from rim_lens.measures.checkpoints.result import Comparison
from rim_lens.measures.neurons.sets import FILE as NEURONS
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.showing import shown_by
from rim_lens.study.neuron_results import read_table
from rim_lens.study.runs import control_name
from rim_lens.training import FineTuned
from rim_lens.training.fine_tuning import DONE

if TYPE_CHECKING:
    import pandas as pd

CLAIM = "checkpoint_study.json"
TABLES = ("ends", "correlations", "drift_matched", "beyond_drift", "forecast")


@shown_by("rim_lens.views", "checkpoint_study_html")
@dataclass(frozen=True)
class CheckpointStudyResult:
    """Everything a study of checkpoints measured.

    Attributes:
        path: The study's folder.
        design: Base, digest of its weights, runs, training, settings, versions, numbers of requests.
        gate: passed, reason, refusal of harmful requests and of twins on the select side.
    """

    path: Path
    design: dict[str, Any]
    gate: dict[str, Any]

    @property
    def stopped(self) -> bool:
        """Whether the gate ended it."""
        return not self.gate["passed"] and bool(self.design["settings"]["gate"])

    @property
    def missing(self) -> tuple[str, ...]:
        """What is not there yet, as files; nothing where the gate stopped it."""
        if self.stopped:
            return ()
        trained = [f"training/{run}" for run in self.design["runs"]] if self.design["train"] else []
        files = ["neurons/" + NEURONS, *(f"{run}/{DONE}" for run in trained), f"comparison/{COMPARISON}"]
        files += [f"{table}.json" for table in TABLES]
        return tuple(file for file in files if not (self.path / file).exists())

    @property
    def measured(self) -> bool:
        """Whether all that was asked for is there."""
        return not self.missing

    @property
    def runs(self) -> dict[str, str]:
        """Run → its kind: of chain of thought it was trained on here, or its own name."""
        return {str(run): str(one["kind"]) for run, one in self.design["runs"].items()}

    @property
    def control(self) -> str | None:
        """The kind of run that others are held against at equal drift."""
        found: str | None = self.design["control"]
        return found

    @property
    def asked(self) -> dict[str, Any]:
        """The runs by name and where their models came from, as pages list them."""
        return {"tuned": {run: one["source"] for run, one in self.design["runs"].items()}}

    @cached_property
    def neurons(self) -> NeuronSet | None:
        """The set that was chosen in the base, with its test; None where the study has not come that far. It may be empty."""
        folder = self.path / "neurons"
        return NeuronSet.load(folder) if (folder / NEURONS).exists() else None

    @cached_property
    def comparison(self) -> Comparison:
        """Every checkpoint of every run, those of controls that went on to equal drift included.

        Raises:
            StudyFolderError: The study has not come that far.
        """
        return Comparison.load(self.path / "comparison")

    @cached_property
    def studied(self) -> Comparison:
        """The same without the controls that went on: these have other steps, and are no runs of their own."""
        return self.comparison.only(list(self.runs))

    @cached_property
    def ends(self) -> pd.DataFrame:
        """What each run lost by its last checkpoint, see `rim_lens.measures.checkpoints.ending.at_the_end`."""
        return read_table(self.path, "ends.json")

    @cached_property
    def correlations(self) -> pd.DataFrame:
        """Metrics against lost refusal (outcome "lost", nats) and the lost share ("lost_rate"), see `Comparison.correlations`."""
        return read_table(self.path, "correlations.json")

    @cached_property
    def drift_matched(self) -> pd.DataFrame:
        """Each run beside its control at equal drift: columns kind, target, control, by, and those of `Comparison.drift_matched`."""
        return read_table(self.path, "drift_matched.json")

    @cached_property
    def beyond_drift(self) -> pd.DataFrame:
        """The same summed up over runs, see `rim_lens.measures.checkpoints.ending.beyond_drift`."""
        return read_table(self.path, "beyond_drift.json")

    @cached_property
    def forecast(self) -> pd.DataFrame:
        """Final loss foretold from first checkpoints, and from gradients before training; see `Comparison.forecast`."""
        return read_table(self.path, "forecast.json")

    @cached_property
    def gradients(self) -> pd.DataFrame | None:
        """What gradients said of each run before training, see `gradient_forecast`; None where it was not measured."""
        return read_table(self.path, "gradients.json") if (self.path / "gradients.json").exists() else None

    @cached_property
    def training(self) -> dict[str, FineTuned]:
        """The runs that were trained here, controls that went on included."""
        names = [*self.runs, *(control_name(seed) for seed in self.design["train_seeds"])]
        folders = {name: self.path / "training" / name for name in names}
        return {name: FineTuned.load(folder) for name, folder in folders.items() if (folder / DONE).exists()}

    @cached_property
    def timings(self) -> dict[str, float]:
        """Seconds per stage, all runs together."""
        return ResultFolder(self.path).read("timings.json")


def load_checkpoint_study(folder: str | Path) -> CheckpointStudyResult:
    """Read a study of checkpoints back from its folder.

    Raises:
        StudyFolderError: The folder holds none, or a file in it is corrupt or of another format.
    """
    stored = ResultFolder(folder)
    study = stored.read(CLAIM)
    if study.get("format_version") != FORMAT_VERSION:
        raise StudyFolderError(
            f"{stored.path} was written in format {study.get('format_version')}; this version reads {FORMAT_VERSION}."
        )
    return CheckpointStudyResult(stored.path, study["design"], stored.read("gate.json"))
