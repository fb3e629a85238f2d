"""Which neurons does refusal depend on, and did tuning move these? One question, one folder, resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat
from rim_lens.chat.conditions import Conditions, check_condition, is_control, leaves_open
from rim_lens.errors import ConditionError, GateNotPassed
from rim_lens.folder import ResultFolder
from rim_lens.hooks.activations import Pool
from rim_lens.lens import Model, known_by, model_facts, verify
from rim_lens.measures.entanglement.entangling import entanglement
from rim_lens.measures.entanglement.multiverse import multiverse
from rim_lens.measures.neurons.beside import Matched
from rim_lens.measures.neurons.dose import SIZES, dose_curve
from rim_lens.measures.neurons.pairs import Pair, counterfactual_pairs
from rim_lens.measures.neurons.restoring import restore_by_neurons
from rim_lens.measures.neurons.safety import safety_neurons
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.measures.neurons.writers import direct_to_logits
from rim_lens.organisms import load_model
from rim_lens.prompts import prompts_digest
from rim_lens.sharing import own_folder
from rim_lens.study.asking import asked_before, asked_now
from rim_lens.study.clock import Clock
from rim_lens.study.design import settings_asked, source_name, versions
from rim_lens.study.neuron_results import (
    CLAIM,
    GATE,
    PARTS,
    NeuronStudyResult,
    keep_table,
    load_neuron_study,
)
from rim_lens.study.planning import MEAN_COT, Counted, Plan, Step, estimated, memory_of
from rim_lens.study.requests import Given, Requests, requests_by_split
from rim_lens.study.tuned import Source, Tuned, by_name, same_shape, same_weights

SHARE = 0.05  # of the neurons of a layer, for m where none is given
WRITTEN_SETS = 2  # random sets without which answers are written as well
DOSE_SETS = 20  # random sets beside each dose
MULTIVERSE_SETS = 100


@dataclass(frozen=True)
class NeuronSettings:
    """Numbers a study of neurons runs with.

    Attributes:
        pairs: "twins": a harmless twin against its request. "intent": a request against the same with a sentence of malicious
            intent (the paper), for models that refuse the second more; the neutral sentence is the control then.
        m: Neurons that each pair names in each layer (or in the model, with `scope`); None: 5 % of a layer, rounded up.
        scope: "layer" or "model".
        min_fraction: Share of pairs that must name a neuron; the paper takes all (1.0), which mostly leaves none. 1.0 with
            "effect_size", where there is no vote.
        by: "contrast" (the paper), "effect_size" or "gradient", see `safety_neurons`.
        pool: "max" (the paper), "mean" or "last".
        response: "own" (request and answer are read, the paper) or "none".
        conditions: Think conditions in which removal is tested, the first for choosing and all that follows too; closed.
        reasoning_think: Condition in which reasoning prompts are read for the entanglement.
        n_random_sets: Random sets per layer beside the set: all where fewer exist.
        matched: "activity": random neurons about as active as the set's.
        written: Whether answers without the set are written and judged as well.
        max_new_tokens: Most tokens of an answer.
        gate: Whether to stop where the model does not refuse the one side more.
        seed: Of random sets, permutations and intervals.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.
    """

    pairs: Literal["twins", "intent"] = "twins"
    m: int | None = None
    scope: Literal["layer", "model"] = "layer"
    min_fraction: float = 0.5
    by: Literal["contrast", "effect_size", "gradient"] = "contrast"
    pool: Pool = "max"
    response: Literal["own", "none"] = "own"
    conditions: tuple[str, ...] = ("off", "careful")
    reasoning_think: str = "careful"
    n_random_sets: int = 100
    matched: Matched = None
    written: bool = True
    max_new_tokens: int = 48
    gate: bool = True
    seed: int = 0
    max_rows: int = MAX_ROWS
    progress: bool = False


@dataclass
class NeuronStudy:
    """Which neurons answer to what is refused, what does removing them do, and did tuning move these rather than others?

    The paper's training half (arXiv 2509.00544, section 4) with its controls. Neurons are chosen on `select` pairs and tested on
    `evaluate` requests, beside random sets with as many neurons in each layer. The parts beside that: "dose" (removal of more
    and more neurons), "writers" (how much of the effect goes straight to the logits), and of each tuned model "entanglement"
    (RAS and its rivals, with p among sets chosen alike for no reason), "restoring" (the base's activations put back) and
    "multiverse" (the same over every choice the paper leaves open; not among the defaults).

    Args:
        model: A name for `rl.load_model`, or a model of your own.
        tuned: Fine-tuned variants: a list of names, or models by name.
        harmful, harmless, reasoning: Requests; our own sets in the model's language when None. See
            `rim_lens.study.requests.requests_by_split` for splits and twins.
        n_requests: At most so many requests of each kind and split; None for all.
        settings: Everything else.
        parts: What is measured beside the set and its test. A folder takes more of them, and more tuned models, later.
        device: Where named models are put; one of your own stays where it is.
        dtype: Of the weights of named models, see `rl.load_model`.

    Raises:
        ConditionError: A condition that does not exist, is open or a control, stands twice, or none at all.
        ValueError: An unknown part; a name of a tuned model that cannot be one, or that two share; a device or dtype for a model
            that was given.

    >>> import rim_lens as rl
    >>> study = rl.NeuronStudy("planted", n_requests=8, settings=rl.NeuronSettings(m=8, scope="model"))
    >>> [step.stage for step in study.plan().steps][:2]
    ['neurons', 'neurons']
    """

    model: Source
    tuned: Tuned = ()
    harmful: Given | None = None
    harmless: Given | None = None
    reasoning: Given | None = None
    n_requests: int | None = None
    settings: NeuronSettings = field(default_factory=NeuronSettings)
    parts: Sequence[str] = PARTS[:-1]
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Refuse what could not be measured, before any model is loaded."""
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise ValueError(f"parts {', '.join(unknown)} were asked for; there are {', '.join(PARTS)}.")
        by_name(self.tuned)
        if (str(self.device), self.dtype) != ("cpu", torch.float32) and not isinstance(
            self.model, str | Path
        ):
            raise ValueError(
                f"device={self.device} and dtype={self.dtype} were asked for, and the model was given: it stays as it is. Give its"
                " name, or move it before."
            )
        names = self.settings.conditions
        for name in (*names, self.settings.reasoning_think):
            check_condition(name)
        odd = [name for name in names if leaves_open(name) or is_control(name)]
        if odd or not names or len(set(names)) < len(names):
            raise ConditionError(
                f"the conditions {', '.join(names) or 'none'} were asked for; name closed ones, each once, and no control"
                f"{': not ' + ', '.join(odd) if odd else ''}. The first is that in which neurons are chosen."
            )

    def plan(self) -> Plan:
        """Count rows, forward passes, tokens and files, and estimate the time; runs no model."""
        return self._plan(self.parts, len(self._tuned))

    def run(self, folder: str | Path, say: Callable[[str], None] | None = None) -> NeuronStudyResult:
        """Measure what is not measured yet, and return everything.

        Interrupt it at any time and call it again: it goes on where it stopped. Ask for more parts or tuned models in the same
        folder, and only these are measured. A model that does not refuse the one side more stops at the gate
        (`result.gate["passed"]` is False and says why), unless `settings.gate` is False, which is recorded. Where pairs agree on
        no neuron, that is the result, and nothing more is measured.

        Args:
            folder: Where everything is stored; empty, or this same study's.
            say: Called with a line before each stage.

        Raises:
            StudyFolderError: The folder holds another study, or a tuned model of other weights under a name that is asked for,
                or is corrupt.
            MissingTwin, MissingIntent, NotEnoughData: The requests do not allow a test; raised before any compute.
            ModelError, UnsupportedModel: The model's hooks do not work as needed, or its MLP is a mixture of experts; raised
                before any compute.
            StatisticsError: A setting is impossible for this model; raised before any compute.
        """
        folder = own_folder(folder)
        kept = ResultFolder(folder)
        verify(self._model, reads=["post", "mlp_out"], edits=["post"])
        pairs = self._pairs
        kept.claim(self._design(), CLAIM)
        self._ask(kept)
        clock = Clock(kept, say or (lambda _: None))
        with clock("neurons", "neurons that pairs choose, and what removing them does"):
            found = self._chosen(kept, pairs)
        if found is not None and len(found):
            self._apart(kept, found, clock)
            for name, source in self._tuned.items():
                self._held_against(kept, found, pairs, name, source, clock)
        return load_neuron_study(folder)

    # --- parts ---------------------------------------------------------------------------------------

    def _chosen(self, kept: ResultFolder, pairs: Sequence[Pair]) -> NeuronSet | None:
        """The set with its test; None where the gate was not passed."""
        settings, sides = self.settings, self._sides
        choose = partial(
            safety_neurons,
            self._model,
            self._chat,
            pairs,
            m=self._m,
            scope=settings.scope,
            min_fraction=settings.min_fraction,
            by=settings.by,
            think=settings.conditions[0],
            pool=settings.pool,
            response=settings.response,
            harmful=sides.harmful,
            harmless=sides.twins,
            n_random_sets=settings.n_random_sets,
            matched=settings.matched,
            test_with={
                "conditions": settings.conditions,
                "reasoning": sides.reasoning,
                "neutral_text": [prompt.text for prompt in self._both["select"].reasoning] or None,
                "written": settings.written,
                "n_written": WRITTEN_SETS,
                "max_new_tokens": settings.max_new_tokens,
            },
            max_new_tokens=settings.max_new_tokens,
            folder=kept.path / "neurons",
            seed=settings.seed,
            max_rows=settings.max_rows,
            progress=settings.progress,
        )
        try:
            found = choose(gate=True)
            kept.once(GATE, lambda: {"passed": True, "reason": ""})
            return found
        except GateNotPassed as stopped:
            reason = str(stopped)
            kept.once(GATE, lambda: {"passed": False, "reason": reason})
        return None if settings.gate else choose(gate=False)

    def _apart(self, kept: ResultFolder, found: NeuronSet, clock: Clock) -> None:
        settings, sides = self.settings, self._sides
        shared: dict[str, Any] = {
            "max_rows": settings.max_rows,
            "progress": settings.progress,
        }
        first = settings.conditions[0]
        if "dose" in self.parts:
            with clock("dose", "removing more and more neurons"):
                keep_table(
                    kept,
                    "dose.json",
                    lambda: dose_curve(
                        self._model,
                        self._chat,
                        found,
                        sides.harmful,
                        sides.twins,
                        n_random_sets=min(DOSE_SETS, settings.n_random_sets),
                        matched=settings.matched,
                        condition=first,
                        folder=kept.path / "dose",
                        seed=settings.seed,
                        **shared,
                    ),
                )
        if "writers" in self.parts:
            with clock("writers", "which of them write straight into the logits"):
                keep_table(
                    kept,
                    "writers.json",
                    lambda: direct_to_logits(
                        self._model,
                        self._chat,
                        found,
                        self._rendered(first),
                        folder=kept.path / "writers",
                        **shared,
                    ),
                )

    def _held_against(
        self,
        kept: ResultFolder,
        found: NeuronSet,
        pairs: Sequence[Pair],
        name: str,
        source: Source,
        clock: Clock,
    ) -> None:
        """Base and one tuned model, both in memory; `compare` streams them."""
        settings, sides = self.settings, self._sides
        wanted = [part for part in ("entanglement", "restoring", "multiverse") if part in self.parts]
        below = {part: f"tuned/{name}/{part}.json" for part in wanted}
        tuned = self._load(source)
        same_shape(self._model, tuned, name)
        same_weights(kept, tuned, name, list(below.values()))
        models = (self._model, tuned, self._chat)
        shared: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "seed": settings.seed,
            "max_rows": settings.max_rows,
            "progress": settings.progress,
        }
        folder = kept.path / "tuned" / name
        if "entanglement" in below:
            with clock("entanglement", f"how far tuning to {name} moved them, and random ones"):
                kept.once(
                    below["entanglement"],
                    lambda: entanglement(
                        *models,
                        sides.harmful,
                        sides.reasoning,
                        found,
                        harmless=sides.twins,
                        pairs=pairs,
                        response=settings.response,
                        think=settings.conditions[0],
                        reasoning_think=settings.reasoning_think,
                        pool=settings.pool,
                        n_random_sets=settings.n_random_sets,
                        folder=folder / "entanglement",
                        **shared,
                    ).to_dict(),
                )
        if "restoring" in below:
            with clock("restoring", f"what the base's activations of them restore in {name}"):
                keep_table(
                    kept,
                    below["restoring"],
                    lambda: restore_by_neurons(
                        *models,
                        found,
                        sides.harmful,
                        sides.twins,
                        condition=settings.conditions[0],
                        n_random_sets=settings.n_random_sets,
                        matched=settings.matched,
                        written=settings.written,
                        n_written=WRITTEN_SETS,
                        folder=folder / "restoring",
                        **shared,
                    ),
                )
        if "multiverse" in below:
            with clock("multiverse", f"{name} over every choice the paper leaves open"):
                keep_table(
                    kept,
                    below["multiverse"],
                    lambda: multiverse(
                        *models,
                        pairs,
                        sides.harmful,
                        sides.reasoning,
                        ms=sorted({max(1, self._m // 2), self._m, 2 * self._m}),
                        min_fractions=sorted({1.0, settings.min_fraction, 0.5}, reverse=True),
                        n_sets=min(MULTIVERSE_SETS, settings.n_random_sets),
                        think=settings.conditions[0],
                        reasoning_think=settings.reasoning_think,
                        folder=folder / "multiverse",
                        **shared,
                    ),
                )

    # --- what is worked on ---------------------------------------------------------------------------

    @cached_property
    def _model(self) -> Model:
        return self._load(self.model)

    @cached_property
    def _chat(self) -> ChatFormat:
        return ChatFormat.from_model(self._model)

    @cached_property
    def _both(self) -> Mapping[str, Requests]:
        language = "toy" if self._chat.name == "toy" else "en"
        found = requests_by_split(language, self.harmful, self.harmless, self.reasoning, self.n_requests)
        return {str(split): side for split, side in found.items()}

    @property
    def _sides(self) -> Requests:
        return self._both["evaluate"]

    @property
    def _pairs(self) -> list[Pair]:
        side = self._both["select"]
        return counterfactual_pairs(list(side.harmful), list(side.twins), self.settings.pairs)

    @property
    def _tuned(self) -> dict[str, Source]:
        return by_name(self.tuned)

    @property
    def _m(self) -> int:
        if self.settings.m is not None:
            return self.settings.m
        return int(np.ceil(SHARE * model_facts(self._model).d_mlp))

    @cached_property
    def _length(self) -> int:
        return round(float(self._rendered(self.settings.conditions[0]).lengths.float().mean()))

    @property
    def _cot(self) -> int:
        return 7 if self._chat.name == "toy" else MEAN_COT

    def _rendered(self, condition: str) -> Any:
        from rim_lens.chat import render_conditions

        conditions: Conditions = [condition]
        return render_conditions(self._chat, list(self._sides.harmful), conditions, seed=self.settings.seed)[
            condition
        ]

    def _load(self, source: Source) -> Model:
        named = isinstance(source, str | Path)
        return load_model(source, device=self.device, dtype=self.dtype) if named else source

    def _ask(self, kept: ResultFolder) -> None:
        now = asked_now(kept, PARTS, self.parts, self._tuned)
        for name, source in self._tuned.items():
            if not isinstance(source, str | Path):  # a named one is looked at when its turn comes
                same_shape(self._model, source, name)
        if now != asked_before(kept) or not kept.has("plan.json"):
            kept.write("plan.json", self._plan(now["parts"], len(now["tuned"])).to_dict())
            kept.write("asked.json", now)

    def _design(self) -> dict[str, Any]:
        select, evaluate = self._both["select"], self._both["evaluate"]
        return {
            "model": source_name(self.model, self._model),
            "given": not isinstance(self.model, str | Path),
            "facts": model_facts(self._model).to_dict(),
            **known_by(self._model),
            "chat_format": self._chat.name,
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

    def counted(self, parts: Sequence[str], n_tuned: int) -> list[Step]:
        """The steps of a plan with these parts and so many tuned models."""
        settings, facts = self.settings, model_facts(self._model)
        n_select, n_evaluate = len(self._both["select"].harmful), len(self._sides.harmful)
        n_reasoning, n_sets = len(self._sides.reasoning), settings.n_random_sets
        length, cot, new = self._length, self._cot, settings.max_new_tokens
        counted = Counted(settings.max_rows, length, new)
        reading, writing = counted.reading, counted.writing
        own, forms = settings.response == "own", 2 + (settings.pairs == "intent")
        n_conditions, few = len(settings.conditions), WRITTEN_SETS + 2
        most = self._m * (facts.n_layers if settings.scope == "layer" else 1)
        files = "neurons/*"
        steps = [
            *(
                [writing("neurons", "answers to both forms of each pair", n_select, forms, files)]
                if own
                else []
            ),
            reading(
                "neurons",
                "activations, and scores for the gate",
                n_select,
                forms + 2,
                files,
                new if own else 0,
            ),
            reading(
                "neurons",
                "scores without the set and without random sets",
                n_evaluate,
                2 * (n_sets + 2) * n_conditions + 2 * (settings.matched is not None),
                files,
                cot,
                True,
            ),
            reading(
                "neurons",
                "answers' log-probability and neutral text without them",
                n_reasoning,
                (n_sets + 2) * (n_conditions + 2),
                files,
                cot,
                True,
            ),
        ]
        if settings.written:
            steps += [
                writing("neurons", "what it writes without them", n_evaluate, 2 * few * n_conditions, files),
                writing("neurons", "questions answered without them", n_reasoning, few * n_conditions, files),
            ]
        if "dose" in parts:
            sets = min(DOSE_SETS, n_sets)
            sweeps = 2 * (1 + (len(SIZES) + 1) * (sets + 1))
            steps.append(
                reading(
                    "dose", "scores without more and more neurons", n_evaluate, sweeps, "dose.json", 0, True
                )
            )
        if "writers" in parts:
            steps.append(
                reading(
                    "writers",
                    "direct and total effect of each neuron",
                    n_evaluate,
                    3 + most,
                    "writers.json",
                    0,
                    True,
                )
            )
        where = "tuned/*"
        if n_tuned and "entanglement" in parts:
            many = (1 + n_tuned) * (2 * n_evaluate + n_reasoning) + 2 * n_tuned * n_select
            if own:
                steps.append(writing("entanglement", "answers of base and tuned", many, 1, where))
            steps.append(
                reading(
                    "entanglement",
                    "activations, scores and KL of base and tuned",
                    many,
                    3,
                    where,
                    new if own else 0,
                    True,
                )
            )
        if n_tuned and "restoring" in parts:
            steps.append(
                reading(
                    "restoring",
                    "scores with the base's activations put back",
                    n_evaluate,
                    2 * n_tuned * (n_sets + 4),
                    where,
                    0,
                    True,
                )
            )
            if settings.written:
                steps.append(
                    writing("restoring", "answers with them", n_evaluate, 2 * n_tuned * (few + 1), where)
                )
        if n_tuned and "multiverse" in parts:
            rows = n_tuned * (2 * (n_evaluate + n_reasoning) + 2 * n_select)
            steps += [
                writing("multiverse", "answers of base and tuned", rows, 1, where),
                reading("multiverse", "activations by response, pool and tensor", rows, 8, where, new, True),
            ]
        return steps

    def _plan(self, parts: Sequence[str], n_tuned: int) -> Plan:
        steps = self.counted(parts, n_tuned)
        length, cot = self._length, self._cot
        memory = memory_of(
            self._model,
            max_rows=self.settings.max_rows,
            length=length + max(cot, self.settings.max_new_tokens),
        )
        if n_tuned:
            memory += sum(one.numel() * one.element_size() for one in self._model.parameters())
        return estimated(self._model, steps, memory)
