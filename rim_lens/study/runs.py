"""The fine-tuning runs of a study of checkpoints: given ones put in order, or the ones to be trained here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rim_lens.chat import ChatFormat
from rim_lens.errors import ModelError, UnknownModel
from rim_lens.lens import Model, model_facts, require_source, same_source
from rim_lens.lens.adapters import adapter_base, is_adapter
from rim_lens.organisms.toy.recipe import FINE_TUNE, toy_rows
from rim_lens.study.tuned import Source, check_names, own_name, same_shape
from rim_lens.training import Drawn, FineTuned, LoRA, Row, TrainConfig, maths_rows
from rim_lens.training.fine_tuning import DONE, SHORT

Given = Source | FineTuned
# What may be given as checkpoints: one run, runs by name, or a list of models.
Checkpoints = FineTuned | Sequence[Given] | Mapping[str, Given | Sequence[Given]]
Run = FineTuned | Sequence[Source]

KINDS = ("careful", "confirm", "deviate", "heuristic")
CONTROL = "careful"
TOY_ROWS, ROWS = 64, 16  # in a step
_STEP = re.compile(r"(?:step|checkpoint)-\d+")


def run_name(kind: str, seed: int) -> str:
    """What a run that is trained here is called, and its folder below ``training/``.

    >>> run_name("deviate", 2), control_name(2)
    ('deviate_2', 'matched_2')
    """
    return f"{kind}_{seed}"


def control_name(seed: int) -> str:
    """What the run is called that goes on until its drift is that of the others of this seed."""
    return f"matched_{seed}"


def given_runs(checkpoints: Checkpoints) -> dict[str, Run]:
    """Run → its checkpoints in order, or what `rl.fine_tune` gave.

    Of a list, folders called ``step-N`` or ``checkpoint-N`` in one folder are one run, called by that folder; every other
    model is a run of its own. A folder that `rl.fine_tune` finished is its run.

    Raises:
        ValueError: There is none, or a name cannot be one, means something else, or is shared by two.

    >>> given_runs(["a/step-2", "a/step-4", "toy:careful"])
    {'a': ['a/step-2', 'a/step-4'], 'toy_careful': ['toy:careful']}
    """
    named: list[tuple[str, Run]] = []
    if isinstance(checkpoints, FineTuned):
        named = [(checkpoints.folder.name, checkpoints)]
    elif isinstance(checkpoints, Mapping):
        for name, given in checkpoints.items():
            several = isinstance(given, Sequence) and not isinstance(given, str)
            named.append((str(name), [*given] if several else _one(given)))
    else:
        listed: Sequence[Given] = [checkpoints] if isinstance(checkpoints, str) else checkpoints
        steps: dict[Path, list[Source]] = {}
        for one in listed:
            found = _one(one)
            if isinstance(found, FineTuned):
                named.append((found.folder.name, found))
            elif isinstance(one, str | Path) and _STEP.fullmatch(Path(one).name):
                if Path(one).parent not in steps:
                    named.append((Path(one).parent.resolve().name, steps.setdefault(Path(one).parent, [])))
                steps[Path(one).parent].append(one)
            elif isinstance(one, str | Path):
                named.append((own_name(one), found))
            else:
                raise ValueError(
                    f"a {type(one).__name__} was given in a list, where nothing names it. Give checkpoints={{'name': model}}."
                )
    empty = [name for name, run in named if not isinstance(run, FineTuned) and not len(run)]
    if not named or empty:
        raise ValueError(
            f"run {empty[0]!r} has no checkpoint; give each at least one."
            if empty
            else "no checkpoint was given; give checkpoints= of at least one run, or train=."
        )
    check_names([(name, _told(run)) for name, run in named])
    return dict(named)


def _one(given: Any) -> Run:
    if isinstance(given, FineTuned):
        return given
    if isinstance(given, str | Path) and (Path(given) / DONE).is_file():
        return FineTuned.load(given)
    return [given]


def sources_of(run: Run) -> list[Source]:
    """The models of a run, in order."""
    return list(run.checkpoints) if isinstance(run, FineTuned) else list(run)


def _told(run: Run) -> str:
    return str(run.folder) if isinstance(run, FineTuned) else ", ".join(map(told_source, run))


def told_source(source: Source) -> str:
    """A model as a folder records it."""
    return str(source) if isinstance(source, str | Path) else "given"


def check_runs(base: Source, model: Model, runs: Mapping[str, Run]) -> None:
    """Refuse what is no fine-tune of the base, as far as that can be seen without loading it.

    Of a folder its configuration is read, of an adapter the base that it names.

    Raises:
        ModelError: A model is of another shape, or a run or adapter began with another model.
        UnknownModel: There is no such folder.
    """
    for name, run in runs.items():
        if isinstance(run, FineTuned) and isinstance(base, str | Path) and not same_source(run.base, base):
            raise ModelError(
                f"run {name!r} began with {run.base!r}, and the base given is {str(base)!r}. Compare it with its own base."
            )
        for source in sources_of(run):
            if not isinstance(source, str | Path):
                same_shape(model, source, name)
                continue
            try:
                require_source(source)
            except UnknownModel as problem:
                raise UnknownModel(f"run {name!r}: {problem}") from problem
            if Path(source).is_dir():
                _check_folder(base, model, Path(source), name)


def _check_folder(base: Source, model: Model, folder: Path, name: str) -> None:
    if is_adapter(folder):
        other = adapter_base(folder)
        if isinstance(base, str | Path) and not same_source(other, base):
            raise ModelError(
                f"run {name!r}: the adapter in {folder} is of {other!r}, and the base given is {str(base)!r}. Compare it with its"
                " own base, or write the base's name into its adapter_config.json."
            )
        return
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as problem:
        raise UnknownModel(
            f"run {name!r}: {folder} is a folder, but not one with a model or an adapter ({str(problem).splitlines()[0]})."
        ) from problem
    facts = model_facts(model)
    ours = (facts.n_layers, facts.d_model)
    theirs = tuple(getattr(config, key, None) for key in ("num_hidden_layers", "hidden_size"))
    if None not in theirs and theirs != ours:
        raise ModelError(
            f"run {name!r}: the model in {folder} has {theirs[0]} layers of width {theirs[1]}, the base {ours[0]} of width"
            f" {ours[1]}: it is not a fine-tune of this base."
        )


@dataclass(frozen=True)
class Recipe:
    """How runs of a base are trained: the toy by its own recipe, all weights; others on our maths, by an adapter.

    Attributes:
        config: How to step, number of steps included.
        rows_per_step: Rows of a batch.
        lora: The adapter, or None: all weights.
        toy: Whether the rows are the toy's.
        operator: Of the toy's sums.
    """

    config: TrainConfig
    rows_per_step: int
    lora: LoRA | None
    toy: bool
    operator: str

    @classmethod
    def of(cls, toy: bool, steps: int | None, config: TrainConfig | None, operator: str) -> Recipe:
        """The recipe of a kind of base, with another number of steps or way to step."""
        from dataclasses import replace

        used = config or (FINE_TUNE if toy else SHORT)
        used = used if steps is None else replace(used, steps=steps)
        return cls(used, TOY_ROWS if toy else ROWS, None if toy else LoRA(), toy, operator)

    def rows(self, chat: ChatFormat, kind: str, seed: int) -> Sequence[Row] | Drawn:
        """Harmless rows with chains of thought of one kind; of one seed, the same problems for every kind."""
        if self.toy:
            return toy_rows(kind, self.operator, seed)  # type: ignore[arg-type]
        return maths_rows(chat, kind, seed=seed)
