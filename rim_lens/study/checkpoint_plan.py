"""What a study of checkpoints will cost: steps, memory, and what it will not be able to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rim_lens.chat import ChatFormat
from rim_lens.lens import Model, model_facts
from rim_lens.measures.checkpoints.exchanging import FEWEST_RUNS
from rim_lens.study.checkpoint_settings import CheckpointSettings
from rim_lens.study.planning import MEAN_COT, MLP_WIDTHS, Counted, Plan, Step, estimated, memory_of
from rim_lens.study.requests import Requests
from rim_lens.study.runs import Recipe

FARTHER = 3  # a control may go on for so many times the steps, until its drift is that of the others
_BACKWARD = 3  # a step of training costs as much as so many forward passes, about


@dataclass(frozen=True)
class Work:
    """What is asked for, as far as the cost hangs on it.

    Attributes:
        settings: The study's.
        chat: Renders the requests.
        both: The requests by split.
        recipe: How runs are trained.
        train: Kinds of chains that runs are trained on here; none where runs are given.
        train_seeds: Of each kind.
        n_checkpoints: Of each run that is trained.
        control: The kind that is trained on until it drifted as far as the others.
        given: Checkpoints of each run that is given.
    """

    settings: CheckpointSettings
    chat: ChatFormat
    both: Mapping[str, Requests]
    recipe: Recipe
    train: tuple[str, ...]
    train_seeds: tuple[int, ...]
    n_checkpoints: int
    control: str | None
    given: tuple[int, ...]

    def plan(self, model: Model) -> Plan:
        """Count rows, forward passes, tokens and files, and estimate time and memory; runs no model."""
        steps = [*self._of_base(), *self._of_training(), *self._of_comparison()]
        counted = [
            replace(step, tokens=step.tokens * _BACKWARD) if step.stage in ("training", "gradients") else step
            for step in steps
        ]
        plan = estimated(model, counted, self.memory(model), self.notes())
        return replace(plan, steps=tuple(steps))

    @property
    def _length(self) -> int:
        asked = self.chat.render(list(self.both["evaluate"].harmful[:8]), think="off")
        return round(float(asked.lengths.float().mean()))

    @property
    def _cot(self) -> int:
        return 7 if self.chat.name == "toy" else MEAN_COT

    def _counted(self) -> Counted:
        return Counted(self.settings.max_rows, self._length, self.settings.max_new_tokens)

    def _of_base(self) -> list[Step]:
        settings, counted = self.settings, self._counted()
        n_select, n_evaluate = len(self.both["select"].harmful), len(self.both["evaluate"].harmful)
        forms = 2 + (settings.pairs == "intent")
        own, files = settings.response == "own", "neurons/*"
        answers = [counted.writing("neurons", "answers to both forms of each pair", n_select, forms, files)]
        return [
            counted.writing(
                "gate", "does the base refuse harmful requests, and only these?", n_select, 2, "gate.json"
            ),
            *(answers if own else []),
            counted.reading(
                "neurons",
                "activations, and scores for its gate",
                n_select,
                forms + 2,
                files,
                settings.max_new_tokens if own else 0,
            ),
            counted.reading(
                "neurons",
                "scores without the set and without random sets",
                n_evaluate,
                2 * (settings.n_test_sets + 2),
                files,
                0,
                True,
            ),
        ]

    def _of_training(self) -> list[Step]:
        if not self.train:
            return []
        recipe, length = self.recipe, self._length + 2 * self._cot
        seeds, kinds = len(self.train_seeds), len(self.train)
        steps = recipe.config.steps

        def training(what: str, n_steps: int, at_most: bool = False) -> Step:
            rows = n_steps * recipe.rows_per_step
            return Step("training", what, rows, n_steps, rows * length, "training/*", at_most)

        how = "all weights" if recipe.lora is None else f"LoRA of rank {recipe.lora.rank}"
        found = [training(f"{seeds * kinds} runs of {steps} steps, {how}", seeds * kinds * steps)]
        if self.control is not None:
            what = f"{self.control} again, until it drifted as far"
            found.append(training(what, seeds * FARTHER * steps, True))
        if self.settings.gradients:
            batches = 4 * seeds * kinds
            rows = batches * recipe.rows_per_step + len(self.both["select"].harmful)
            found.append(
                Step(
                    "gradients",
                    "what gradients say before training",
                    rows,
                    batches + 1,
                    rows * length,
                    "gradients.json",
                )
            )
        return found

    def _of_comparison(self) -> list[Step]:
        settings, counted, sides = self.settings, self._counted(), self.both["evaluate"]
        farther = len(self.train_seeds) * FARTHER * self.n_checkpoints if self.train and self.control else 0
        own = len(self.train) * len(self.train_seeds) * self.n_checkpoints
        given = sum(self.given)
        n = 1 + farther + own + given
        rows, files, at_most = 2 * len(sides.harmful), "comparison/*", bool(farther)
        extra = max(self._cot, settings.max_new_tokens if settings.response == "own" else 0)
        each = f"{'≤ ' if farther else ''}{n} models"
        answered = n * (len(settings.accuracy) + (settings.response == "own"))
        long = replace(counted, new=settings.max_new_tokens + (settings.max_cot_tokens or 0))
        n_pairs = len(self.both["select"].harmful)
        return [
            *(
                [
                    counted.writing(
                        "comparison", "answers to both forms of each pair, by the base", n_pairs, 2, files
                    )
                ]
                if settings.response == "own"
                else []
            ),
            counted.reading("comparison", "activations on both forms, of the base", n_pairs, 2, files, extra),
            counted.writing("comparison", f"answers of {each}", rows, n, files),
            long.writing(
                "comparison", f"questions answered by {each}", len(sides.reasoning), answered, files
            ),
            counted.reading(
                "comparison",
                f"scores, activations and KL of {each}",
                rows + 2 * len(sides.reasoning),
                3 * n,
                files,
                extra,
                at_most,
            ),
        ]

    def memory(self, model: Model) -> float:
        """The most that is there at once: a model that is read or writes, or one that is trained."""
        length = self._length + max(self._cot, self.settings.max_new_tokens)
        reading = memory_of(model, max_rows=self.settings.max_rows, length=length)
        if not self.train:
            return reading
        facts, recipe = model_facts(model), self.recipe
        whole = sum(parameter.numel() for parameter in model.parameters()) * 4
        # Gradients and AdamW's two averages of what is trained; activations of all layers for the way back.
        held = whole * (4 if recipe.lora is None else 1)
        tokens = recipe.rows_per_step * (self._length + 2 * self._cot)
        kept = MLP_WIDTHS * tokens * facts.d_mlp * 4 * facts.n_layers + 3 * tokens * facts.d_vocab * 4
        gradients = 3 * whole if self.settings.gradients else 0
        return max(reading, float(held + kept), float(gradients))

    def notes(self) -> tuple[str, ...]:
        """What the numbers of runs, seeds and checkpoints will not allow."""
        n_runs = len(self.given) or len(self.train) * len(self.train_seeds)
        fewest = min(self.given, default=self.n_checkpoints)
        notes = []
        if n_runs < FEWEST_RUNS:
            notes.append(
                f"no correlation gets a p: {n_runs} runs, and checkpoints of one run follow each other. {FEWEST_RUNS} runs are the fewest"
                " that can be exchanged."
            )
        elif self.train and len(self.train_seeds) < FEWEST_RUNS:
            notes.append(
                f"no correlation gets a p beyond kind: {len(self.train_seeds)} seeds, and kinds of one seed share their problems."
                f" {FEWEST_RUNS} seeds are the fewest that can be exchanged; of fewer, what sets kinds apart passes for entanglement."
            )
        if fewest < 3:
            notes.append(
                f"a correlation within a run needs 3 checkpoints, and the shortest run has {fewest}; without 2 nothing can be foretold."
            )
        if len(set(self.given)) > 1:
            notes.append(
                "runs have different numbers of checkpoints: their courses cannot be exchanged, only their means."
            )
        if self.control is None:
            notes.append(
                "no run is a control: what is lost is not held against plain drift. Train careful chains as well, or name one"
                " (control=)."
            )
        return tuple(notes)
