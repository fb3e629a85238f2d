"""What do fine-tuning runs do to refusal, and does entanglement follow it? One question, one folder, resumable."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from rim_lens.chat import ChatFormat
from rim_lens.errors import GateNotPassed
from rim_lens.folder import ResultFolder
from rim_lens.lens import Model, known_by, model_facts, verify, weights_digest
from rim_lens.measures.checkpoints.comparing import compare
from rim_lens.measures.checkpoints.ending import at_the_end, beyond_drift
from rim_lens.measures.checkpoints.foreseeing import gradient_forecast
from rim_lens.measures.checkpoints.result import DRIFTS, FILE, Comparison
from rim_lens.measures.neurons.pairs import Pair, counterfactual_pairs
from rim_lens.measures.neurons.safety import safety_neurons
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.organisms import load_model
from rim_lens.prompts import prompts_digest
from rim_lens.study import stages
from rim_lens.study.checkpoint_plan import FARTHER, Work
from rim_lens.study.checkpoint_results import CLAIM, CheckpointStudyResult, load_checkpoint_study
from rim_lens.study.checkpoint_settings import CheckpointSettings, check_settings
from rim_lens.study.clock import Clock
from rim_lens.study.design import settings_asked, source_name, versions
from rim_lens.study.neuron_results import keep_table, read_table
from rim_lens.study.neurons import SHARE
from rim_lens.study.planning import Plan
from rim_lens.study.requests import Given, Requests, requests_by_split
from rim_lens.study.runs import (
    CONTROL,
    KINDS,
    Checkpoints,
    Recipe,
    Run,
    check_runs,
    control_name,
    given_runs,
    run_name,
    sources_of,
    told_source,
)
from rim_lens.study.stages import Bench, Settings
from rim_lens.study.tuned import Source
from rim_lens.training import FineTuned, TrainConfig, fine_tune
from rim_lens.training.lora import require_peft

if TYPE_CHECKING:
    import pandas as pd

OUTCOMES = ("lost", "lost_rate")


@dataclass
class CheckpointStudy:
    """What did fine-tuning do to refusal on the way, and does entanglement follow it better than drift and chance do?

    The paper's section 4 over checkpoints (arXiv 2509.00544), with its controls. A gate on the base; runs of fine-tuning, given
    or trained here on harmless problems with chains of thought of several kinds; neurons that refusal hangs on, chosen in the
    base on the `select` side; then, on the `evaluate` side and one model in memory at a time, refusal, over-refusal, accuracy,
    drift and entanglement of every checkpoint. Of these: what each run lost, paired over requests; how the metrics correlate
    with it, with p from exchanging whole runs, and within kinds whole seeds; each kind beside a *control* (the careful chains) where that drifted as far from
    the base, trained on for the purpose where it did not come so far; and the loss foretold from first checkpoints, and from
    gradients before training.

    What it does not show: that entanglement weakens refusal, see `rl.compare`; freezing the neurons does (`rl.freezing`).

    Args:
        base: A name for `rl.load_model`, or (without training) a model of your own.
        checkpoints: Runs: what `rl.fine_tune` gave; run → models; or a list of names and folders, see
            `rim_lens.study.runs.given_runs`.
        train: Or: kinds of chains of thought to train runs on here: "careful", "confirm", "deviate", "heuristic". The toy is
            trained by its own recipe, all weights; others on our maths problems, by LoRA.
        train_seeds: One run of each kind for each seed. Fewer than 4 runs give no correlation a p, and fewer than 4 seeds none
            beyond what sets kinds apart.
        steps: Of each; None: 320 for the toy, 120 for others.
        n_checkpoints: Of each, evenly over the steps. 3 are the fewest that a correlation within a run can be told from.
        config: How to step, in place of the recipe's.
        operator: Of the toy's sums in training and in reasoning questions: "-" is new to it, "+" it knows.
        control: The kind (or given run) that others are held against at equal drift; None: "careful", where it is there.
        harmful, harmless, reasoning: Requests; our own sets in the base's language when None. See
            `rim_lens.study.requests.requests_by_split` for splits and twins.
        n_requests: At most so many requests of each kind and split; None for all.
        settings: Everything else.
        device: Where named models are put; one of your own stays where it is.
        dtype: Of the weights of named models where they are measured. Training is in float32.

    Raises:
        ConditionError: A condition that does not exist, or harmful requests are to be read in an open one.
        ValueError: Neither runs nor training, or both; a name of a run that cannot be one, or that two share; an unknown kind,
            operator or control; numbers that are not positive; or a model of your own, where only a name will do.
        StatisticsError: A setting is out of range.

    >>> import rim_lens as rl
    >>> study = rl.CheckpointStudy("toy", train=["careful", "deviate"], train_seeds=[0], steps=40, n_requests=8)
    >>> print(list(dict.fromkeys(step.stage for step in study.plan().steps)))
    ['gate', 'neurons', 'training', 'gradients', 'comparison']
    """

    base: Source
    checkpoints: Checkpoints = ()
    train: Sequence[str] = ()
    train_seeds: Sequence[int] = (0, 1, 2)
    steps: int | None = None
    n_checkpoints: int = 6
    config: TrainConfig | None = None
    operator: Literal["+", "-"] = "-"
    control: str | None = None
    harmful: Given | None = None
    harmless: Given | None = None
    reasoning: Given | None = None
    n_requests: int | None = None
    settings: CheckpointSettings = field(default_factory=CheckpointSettings)
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Refuse what could not be measured, before any model is loaded."""
        check_settings(self.settings)
        named = isinstance(self.base, str | Path)
        if (str(self.device), self.dtype) != ("cpu", torch.float32) and not named:
            raise ValueError(
                f"device={self.device} and dtype={self.dtype} were asked for, and the base was given: it stays as it is. Give its"
                " name, or move it before."
            )
        if self.train:
            self._check_training(named)
        else:
            self._given = given_runs(self.checkpoints)
        kinds = set(self._kinds.values())
        if self.control is not None and self.control not in kinds:
            raise ValueError(f"control={self.control!r} was asked for; there are {', '.join(sorted(kinds))}.")

    def _check_training(self, named: bool) -> None:
        self.train, self.train_seeds = tuple(self.train), tuple(self.train_seeds)
        given = self.checkpoints
        if isinstance(given, FineTuned) or len(given):
            raise ValueError("checkpoints and train were both given; give one of them.")
        if not named:
            raise ValueError(
                "runs are to be trained from a model that was given; training starts from a name or folder that load_model"
                " knows. Give base= by name, or train with rl.fine_tune and give the checkpoints."
            )
        odd = [kind for kind in self.train if kind not in KINDS]
        if odd or len(set(self.train)) < len(self.train):
            raise ValueError(f"train={self.train} was asked for; name each once of {', '.join(KINDS)}.")
        seeds = self.train_seeds
        if not seeds or len(set(seeds)) < len(seeds) or any(type(one) is not int or one < 0 for one in seeds):
            raise ValueError(f"train_seeds={seeds} was asked for; give whole numbers from 0 on, each once.")
        steps = self.steps if self.steps is not None else 1 if self.config is None else self.config.steps
        if steps < 1 or self.n_checkpoints < 1 or (self.steps is not None and self.n_checkpoints > steps):
            raise ValueError(
                f"{self.n_checkpoints} checkpoints of {self.steps} steps were asked for; give at least 1 of each, and no more"
                " checkpoints than steps."
            )
        if self.operator not in ("+", "-"):
            raise ValueError(f"operator={self.operator!r} was asked for; it is '+' or '-'.")

    def plan(self) -> Plan:
        """Count rows, forward passes, tokens and files, and estimate time and memory; runs and trains no model."""
        check_runs(self.base, self._model, self._given_runs)
        return Work(
            settings=self.settings,
            chat=self._chat,
            both=self._both,
            recipe=self._recipe,
            train=tuple(self.train),
            train_seeds=tuple(self.train_seeds),
            n_checkpoints=self.n_checkpoints,
            control=self._control,
            given=tuple(len(sources_of(run)) for run in self._given_runs.values()),
        ).plan(self._model)

    def run(self, folder: str | Path, say: Callable[[str], None] | None = None) -> CheckpointStudyResult:
        """Train and measure what is not there yet, and return everything.

        Interrupt it at any time and call it again: it goes on where it stopped, and a run that was trained to its end is used
        as it is. A base that does not refuse, or refuses twins as well, stops at the gate, unless `settings.gate` is False,
        which is recorded. Where pairs agree on no neuron, metrics are of all neurons and nothing stands beside them. Too few
        runs or checkpoints for a test are told as such in the tables (`reason`), and everything else is measured.

        Args:
            folder: Where everything is stored; empty, or this same study's.
            say: Called with a line before each stage.

        Raises:
            StudyFolderError: The folder holds another study, or is corrupt.
            MissingTwin, MissingIntent, NotEnoughData, AnswerError: The requests do not allow a test; raised before any compute.
            ModelError, UnknownModel: The base's hooks do not work as needed, or a run is not of this base; raised before any
                compute where a model need not be loaded to see it.
            MissingExtra: LoRA, and peft is not installed; raised before any compute.
        """
        kept = ResultFolder(Path(folder).resolve())
        model = self._model
        check_runs(self.base, model, self._given_runs)
        verify(model, reads=["post"], edits=["post"])
        if self.train and self._recipe.lora is not None:
            require_peft()
        bench = Bench(model, self._chat, self._both["select"], self._both["evaluate"], kept, self._of_gate())
        kept.claim(self._design(), CLAIM)
        if not kept.has("plan.json"):
            kept.write("plan.json", self.plan().to_dict())
        clock = Clock(kept, say or (lambda _: None))
        with clock("gate", "gate: does the base refuse harmful requests, and only these?"):
            gate = stages.run_gate(bench)
        if not gate["passed"] and self.settings.gate:
            return load_checkpoint_study(folder)
        with clock("neurons", "neurons that refusal hangs on, in the base"):
            found = self._chosen(kept)
        del bench, model
        self._let_go()
        runs = self._given_runs
        if self.train:
            if self.settings.gradients and len(found):
                with clock("gradients", "what gradients say before training"):
                    keep_table(kept, "gradients.json", lambda: self._foretold(found))
            runs = self._trained(kept, clock)
        with clock("comparison", f"{sum(map(len, map(sources_of, runs.values())))} checkpoints and the base"):
            comparison = self._compared(kept, runs, found)
        with clock("relations", "what follows what, beside drift and chance"):
            self._related(kept, comparison)
        return load_checkpoint_study(folder)

    # --- stages --------------------------------------------------------------------------------------

    def _chosen(self, kept: ResultFolder) -> NeuronSet:
        settings, sides = self.settings, self._both
        evaluate = sides["evaluate"]
        shared: dict[str, Any] = {
            "m": self._m,
            "min_fraction": settings.min_fraction,
            "think": settings.think,
            "pool": settings.pool,
            "response": settings.response,
            "harmful": evaluate.harmful,
            "harmless": evaluate.twins,
            "n_random_sets": settings.n_test_sets,
            "max_new_tokens": settings.max_new_tokens,
            "folder": kept.path / "neurons",
            "seed": settings.seed,
            "max_rows": settings.max_rows,
            "progress": settings.progress,
        }
        try:
            return safety_neurons(self._model, self._chat, self._pairs, gate=settings.gate, **shared)
        except GateNotPassed as stopped:  # the base refuses, and not the one form more than the other
            facts = model_facts(self._model)
            none = NeuronSet([], facts.n_layers, facts.d_mlp, made_by={"not_chosen": str(stopped)})
            none.save(kept.path / "neurons")
            return none

    def _foretold(self, found: NeuronSet) -> pd.DataFrame:
        rows = {
            run_name(kind, seed): self._recipe.rows(self._chat, kind, seed)
            for kind in self.train
            for seed in self.train_seeds
        }
        return gradient_forecast(
            str(self.base),
            rows,
            found,
            self._both["select"].harmful,
            rows_per_step=self._recipe.rows_per_step,
            n_random_sets=self.settings.n_random_sets,
            seed=self.settings.seed,
            max_rows=self.settings.max_rows,
        )

    def _trained(self, kept: ResultFolder, clock: Clock) -> dict[str, Run]:
        """Every run, and for each seed the control gone on to the others' drift, where it did not come so far."""
        runs: dict[str, Run] = {}
        steps = self._recipe.config.steps
        for seed in self.train_seeds:
            mine: dict[str, FineTuned] = {}
            for kind in self.train:
                name = run_name(kind, seed)
                with clock("training", f"training {name}: {steps} steps"):
                    mine[kind] = self._tune(kept, name, kind, seed)
                runs[name] = mine[kind]
            control = self._control
            if control is None:
                continue
            wanted = max((one.drift[-1] for kind, one in mine.items() if kind != control), default=0.0)
            if wanted > mine[control].drift[-1]:
                name = control_name(seed)
                with clock("training", f"training {name}: {control} again, on to drift {wanted:.3g}"):
                    runs[name] = self._tune(kept, name, control, seed, wanted)
        return runs

    def _tune(
        self, kept: ResultFolder, name: str, kind: str, seed: int, stop_at_drift: float | None = None
    ) -> FineTuned:
        recipe, steps = self._recipe, self._recipe.config.steps
        checkpoints: int | list[int] = self.n_checkpoints
        if stop_at_drift is not None:
            spacing = max(1, round(steps / self.n_checkpoints))
            steps *= FARTHER
            checkpoints = list(range(spacing, steps + 1, spacing))
        return fine_tune(
            str(self.base),
            recipe.rows(self._chat, kind, seed),
            out=kept.path / "training" / name,
            config=replace(recipe.config, steps=steps),
            lora=recipe.lora,
            checkpoints=checkpoints,
            rows_per_step=recipe.rows_per_step,
            stop_at_drift=stop_at_drift,
            seed=seed,
            device=self.device,
            progress=self.settings.progress,
        )

    def _compared(self, kept: ResultFolder, runs: Mapping[str, Run], found: NeuronSet) -> Comparison:
        settings, sides = self.settings, self._both["evaluate"]
        if kept.has(f"comparison/{FILE}"):
            return Comparison.load(kept.path / "comparison")
        return compare(
            runs,
            self._chat,
            sides.harmful,
            sides.twins,
            sides.reasoning,
            base=self.base,
            neurons=found if len(found) else None,
            pairs=self._pairs,
            accuracy=settings.accuracy,
            think=settings.think,
            reasoning_think=settings.reasoning_think,
            response=settings.response,
            pool=settings.pool,
            n_random_sets=settings.n_random_sets,
            matched=settings.matched,
            n_boot=settings.n_boot,
            max_new_tokens=settings.max_new_tokens,
            max_cot_tokens=settings.max_cot_tokens,
            close_unfinished=settings.max_cot_tokens is not None,
            folder=kept.path / "comparison",
            seed=settings.seed,
            max_rows=settings.max_rows,
            progress=settings.progress,
            device=self.device,
            dtype=self.dtype,
        )

    def _related(self, kept: ResultFolder, comparison: Comparison) -> None:
        import pandas as pd

        settings = self.settings
        studied = comparison.only(list(self._kinds))
        keep_table(kept, "ends.json", lambda: at_the_end(comparison, seed=settings.seed))
        keep_table(
            kept,
            "correlations.json",
            lambda: pd.concat(
                [
                    studied.correlations(
                        outcome=outcome,
                        **self._exchanged,
                        n_permutations=settings.n_permutations,
                        seed=settings.seed,
                    )
                    for outcome in OUTCOMES
                ],
                ignore_index=True,
            ),
        )
        matched = self._drift_matched(comparison)
        keep_table(kept, "drift_matched.json", lambda: matched)
        keep_table(kept, "beyond_drift.json", lambda: beyond_drift(matched))
        keep_table(kept, "forecast.json", lambda: self._forecast(kept, studied))

    def _drift_matched(self, comparison: Comparison) -> pd.DataFrame:
        import pandas as pd

        tables = []
        for target, kind in self._kinds.items():
            control = self._control_of(target, comparison.runs)
            if control is None:
                continue
            label = {"kind": kind, "target": target, "control": control}
            for by in DRIFTS:
                found = comparison.drift_matched(target, control, by=by, seed=self.settings.seed)  # type: ignore[arg-type]
                tables.append(found.assign(**label, by=by))
        if tables:
            return pd.concat(tables, ignore_index=True)
        return pd.DataFrame(
            columns=["kind", "target", "control", "by", "step", "drift", "lost_difference"]
        ).astype({"step": "int64", "drift": "float64", "lost_difference": "float64"})

    def _control_of(self, target: str, runs: Sequence[str]) -> str | None:
        control = self._control
        if control is None or self._kinds[target] == control:
            return None
        if not self.train:
            return control
        seed = int(target.rpartition("_")[2])
        return control_name(seed) if control_name(seed) in runs else run_name(control, seed)

    def _forecast(self, kept: ResultFolder, studied: Comparison) -> pd.DataFrame:
        import pandas as pd

        settings = self.settings
        fewest = int(studied.table[studied.table["step"] > 0].groupby("run").size().min())
        shared: dict[str, Any] = {
            **self._exchanged,
            "n_permutations": settings.n_permutations,
            "seed": settings.seed,
        }
        tables = []
        if fewest > 1:
            first = min(settings.first or max(1, fewest // 3), fewest - 1)
            tables = [studied.forecast(first, outcome=outcome, **shared) for outcome in OUTCOMES]
        if kept.has("gradients.json"):
            told = read_table(kept.path, "gradients.json").set_index("run")
            for column in ("lost_per_step", "share", "lost_per_step_all"):
                before = told[column].to_dict()
                tables += [
                    studied.forecast(before=before, outcome=outcome, **shared).assign(
                        metric=f"{column}, by gradients"
                    )
                    for outcome in OUTCOMES
                ]
        if tables:
            return pd.concat(tables, ignore_index=True)
        columns = [
            "metric",
            "first",
            "outcome",
            "skill",
            "rmse",
            "rmse_mean",
            "p",
            "p_kind",
            "n_runs",
            "n_permutations",
        ]
        return pd.DataFrame(columns=[*columns, "reason", "reason_kind"])

    # --- what is worked on ---------------------------------------------------------------------------

    @cached_property
    def _model(self) -> Model:
        named = isinstance(self.base, str | Path)
        return load_model(self.base, device=self.device, dtype=self.dtype) if named else self.base

    def _let_go(self) -> None:
        """Leave memory to the models that come; a base of the user's own stays."""
        _ = self._chat, self._both, self._recipe  # what is still needed of it
        self.__dict__.pop("_model", None)
        gc.collect()

    @cached_property
    def _chat(self) -> ChatFormat:
        return ChatFormat.from_model(self._model)

    @cached_property
    def _both(self) -> Mapping[str, Requests]:
        toy = self._chat.name == "toy"
        reasoning = self.reasoning
        if reasoning is None and toy:
            from rim_lens.prompts.toy import toy_prompts

            reasoning = toy_prompts("reasoning", op=self.operator)
        found = requests_by_split(
            "toy" if toy else "en", self.harmful, self.harmless, reasoning, self.n_requests
        )
        return {str(split): side for split, side in found.items()}

    @property
    def _pairs(self) -> list[Pair]:
        side = self._both["select"]
        return counterfactual_pairs(list(side.harmful), list(side.twins), self.settings.pairs)

    @cached_property
    def _recipe(self) -> Recipe:
        return Recipe.of(self._chat.name == "toy", self.steps, self.config, self.operator)

    @property
    def _given_runs(self) -> dict[str, Run]:
        return {} if self.train else self._given

    @property
    def _kinds(self) -> dict[str, str]:
        """Run → kind, without controls that go on."""
        if not self.train:
            return {name: name for name in self._given}
        return {run_name(kind, seed): kind for kind in self.train for seed in self.train_seeds}

    @property
    def _exchanged(self) -> dict[str, Any]:
        """Who may change places beyond kind: seeds whole, as kinds of one seed see the same problems. Of given runs none knows."""
        seeds = {run_name(kind, seed): str(seed) for kind in self.train for seed in self.train_seeds}
        return {"kinds": self._kinds, "units": seeds or None}

    @property
    def _control(self) -> str | None:
        kinds = set(self._kinds.values())
        wanted = self.control or CONTROL
        return wanted if wanted in kinds and len(kinds) > 1 else None

    @property
    def _m(self) -> int:
        if self.settings.m is not None:
            return self.settings.m
        return int(np.ceil(SHARE * model_facts(self._model).d_mlp))

    def _of_gate(self) -> Settings:
        mine = self.settings
        return Settings(
            max_new_tokens=mine.max_new_tokens,
            min_refusal=mine.min_refusal,
            max_twin_ratio=mine.max_twin_ratio,
            gate=mine.gate,
            max_rows=mine.max_rows,
            progress=mine.progress,
        )

    def _design(self) -> dict[str, Any]:
        select, evaluate, model = self._both["select"], self._both["evaluate"], self._model
        if self.train:
            recipe = asdict(self._recipe)
            training: dict[str, Any] | None = {**recipe, "n_checkpoints": self.n_checkpoints}
            runs: dict[str, Any] = {
                name: {"kind": kind, "source": "trained here"} for name, kind in self._kinds.items()
            }
        else:
            training = None
            runs = {
                name: {
                    "kind": name,
                    "source": ", ".join(told_source(source) for source in sources_of(run)),
                    "digests": [
                        weights_digest(source)
                        for source in sources_of(run)
                        if not isinstance(source, str | Path)
                    ],
                }
                for name, run in self._given.items()
            }
        return {
            "model": source_name(self.base, model),
            "given": not isinstance(self.base, str | Path),
            "facts": model_facts(model).to_dict(),
            **known_by(model),
            "chat_format": self._chat.name,
            "runs": runs,
            "train": list(self.train),
            "train_seeds": list(self.train_seeds) if self.train else [],
            "training": training,
            "control": self._control,
            "n_requests": self.n_requests,
            "requests": {
                kind: "given" if getattr(self, kind) is not None else "rim_lens"
                for kind in ("harmful", "harmless", "reasoning")
            },
            "n_select": len(select.harmful),
            "n_evaluate": len(evaluate.harmful),
            "n_reasoning": len(evaluate.reasoning),
            "n_families_evaluate": len(set(evaluate.families)),
            "prompts_digest": prompts_digest(
                prompt
                for side in (select, evaluate)
                for prompt in (*side.harmful, *side.twins, *side.reasoning)
            ),
            "settings": {**settings_asked(asdict(self.settings)), "m": self._m},
            "versions": versions(),
        }
