"""Which models are compared: runs and their base, told apart without loading them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rim_lens.errors import NotEnoughData, StatisticsError, StudyFolderError
from rim_lens.lens import Model, adapter_base, is_adapter, same_source, source_digest
from rim_lens.measures.entanglement.reading import ModelReading
from rim_lens.training import FineTuned

# A checkpoint: a name or folder for `load_model`, a function that loads a model, or a model.
Checkpoint = Model | str | Path | Callable[[], Model]


def runs_of(
    models: Any, base: Checkpoint | None
) -> tuple[Checkpoint, dict[str, list[tuple[int, Checkpoint]]]]:
    """The base, and run → (step, checkpoint).

    Raises:
        NotEnoughData: There is no run, or one without a checkpoint.
        StatisticsError: There is not one base, a run or adapter began with another one, or steps stand twice.
    """
    if isinstance(models, FineTuned):
        models = {models.folder.name: models}
    elif not isinstance(models, Mapping):
        listed = list(models)
        if base is None:
            base, listed = (listed[0], listed[1:]) if listed else (None, [])
        models = {"run": listed}
    base = _one_base(_bases(models), base)
    runs: dict[str, list[tuple[int, Checkpoint]]] = {}
    for run, its in models.items():
        if isinstance(its, FineTuned):
            runs[str(run)] = list(zip(its.steps, map(str, its.checkpoints), strict=True))
            continue
        listed = list(its)
        named = [_step(model) for model in listed]
        counted = range(1, len(listed) + 1)
        runs[str(run)] = [
            (place if None in named or step is None else step, model)
            for place, step, model in zip(counted, named, listed, strict=True)
        ]
    for run, checkpoints in runs.items():
        steps = [step for step, _ in checkpoints]
        if not checkpoints:
            raise NotEnoughData(f"run {run!r} has no checkpoint; give the base and at least one.")
        if len(set(steps)) < len(steps) or min(steps) < 1:
            raise StatisticsError(f"run {run!r} has steps {steps}; each is to be there once, from 1 on.")
        checkpoints.sort(key=lambda one: one[0])
    if not runs:
        raise NotEnoughData("no run was given; give the base and at least one checkpoint.")
    return base, runs


def _one_base(bases: list[str], base: Checkpoint | None) -> Checkpoint:
    if base is not None and isinstance(base, str | Path):
        other = next((one for one in bases if not same_source(one, base)), None)
        if other is not None:
            raise StatisticsError(
                f"a comparison with base {str(base)!r} was asked for, and a run began with {other!r}. Compare it with its own base,"
                " and join the two (Comparison.joined)."
            )
    if base is None:
        if len(bases) != 1:
            told = f"the runs began with {', '.join(bases)}" if bases else "none was given"
            raise StatisticsError(
                f"a comparison is with one base, and {told}. Give base=, or compare the runs of each base and join them"
                " (Comparison.joined)."
            )
        return bases[0]
    return base


def _bases(models: Mapping[str, Any]) -> list[str]:
    """What runs and adapters began with, as far as they say."""
    told = []
    for its in models.values():
        if isinstance(its, FineTuned):
            told.append(its.base)
        else:
            told += [adapter_base(one) for one in its if isinstance(one, str | Path) and is_adapter(one)]
    return list(dict.fromkeys(told))


def _step(model: Any) -> int | None:
    """The step in the name of a checkpoint's folder, as `rl.fine_tune` and the Hugging Face trainer write it."""
    found = (
        re.fullmatch(r"(?:step|checkpoint)-(\d+)", Path(model).name)
        if isinstance(model, str | Path)
        else None
    )
    return None if found is None else int(found[1])


def called(model: Any) -> str:
    """What tables call a checkpoint."""
    return str(model) if isinstance(model, str | Path) else f"given {type(model).__name__}"


def is_loader(model: Any) -> bool:
    """Whether it is a function that loads a model."""
    return callable(model) and not hasattr(model, "hook_dict")


def identity(model: Checkpoint) -> list[str | None]:
    """What a kept comparison knows a model by: its name, and a digest where that is not all. A folder may be moved."""
    if is_loader(model):
        return ["a function", None]
    named = Path(model).name if isinstance(model, str | Path) and Path(model).is_dir() else called(model)
    return [named, source_digest(model)]


def require_same(digest: str, kept: Path) -> None:
    """Refuse weights that are not those that were measured there.

    Raises:
        StudyFolderError: They are others.
    """
    before = ModelReading.load(kept / "reading").settings["weights_digest"]
    if before != digest:
        raise StudyFolderError(
            f"{kept} was measured on weights {before}, and the function given for it loads others ({digest}). Give an empty"
            " folder; what is there stays untouched."
        )


def slug(run: str, runs: list[str]) -> str:
    """The folder of a run."""
    return f"{runs.index(run):03d}-{re.sub(r'[^A-Za-z0-9]+', '-', run)[:40]}"
