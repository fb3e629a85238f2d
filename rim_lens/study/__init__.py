"""Plan, run, store, load: one question, one folder, resumable."""

from rim_lens.study.checkpoint_results import CheckpointStudyResult, load_checkpoint_study
from rim_lens.study.checkpoint_settings import CheckpointSettings
from rim_lens.study.checkpoints import CheckpointStudy
from rim_lens.study.neuron_results import NeuronStudyResult, load_neuron_study
from rim_lens.study.neurons import NeuronSettings, NeuronStudy
from rim_lens.study.results import StudyResult, load_study
from rim_lens.study.stages import Settings
from rim_lens.study.study import Study

__all__ = [
    "CheckpointSettings",
    "CheckpointStudy",
    "CheckpointStudyResult",
    "NeuronSettings",
    "NeuronStudy",
    "NeuronStudyResult",
    "Settings",
    "Study",
    "StudyResult",
    "load_checkpoint_study",
    "load_neuron_study",
    "load_study",
]
