"""Plan, run, store, load: one question, one folder, resumable."""

from rim_lens.study.results import StudyResult, load_study
from rim_lens.study.stages import Settings
from rim_lens.study.study import Study

__all__ = ["Settings", "Study", "StudyResult", "load_study"]
