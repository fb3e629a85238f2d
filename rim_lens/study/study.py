"""One question, one folder: plan, run, stop anywhere, go on, load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rim_lens.chat import ChatFormat
from rim_lens.chat.conditions import check_condition
from rim_lens.errors import ConditionError
from rim_lens.folder import ResultFolder
from rim_lens.lens import Model, known_by, model_facts, verify
from rim_lens.organisms import load_model
from rim_lens.prompts import prompts_digest
from rim_lens.sharing import own_folder
from rim_lens.study import stages
from rim_lens.study.asking import asked_before, asked_now
from rim_lens.study.clock import Clock
from rim_lens.study.design import settings_asked, source_name, versions
from rim_lens.study.neurons import NeuronSettings, NeuronStudy
from rim_lens.study.planning import Plan, make_plan
from rim_lens.study.probing import run_probes
from rim_lens.study.removing import compared, run_comparing, run_removing
from rim_lens.study.requests import Given, requests_by_split
from rim_lens.study.results import NEURONS, StudyResult, load_study, outcomes_of
from rim_lens.study.stages import Bench, Settings
from rim_lens.study.statistics import run_statistics
from rim_lens.study.tuned import Source, Tuned, by_name, same_shape, same_weights

PARTS = ("heads", "statistics", "removing", "comparing", "probes", "neurons")
OF_TUNED = ("entanglement", "restoring")  # what is measured of neurons and a tuned model


@dataclass
class Study:
    """Does a chain of thought lower refusal in this model, which heads carry refusal, and what did tuning move?

    The stages: a gate (the model refuses harmful requests and spares their twins with thinking off);
    attention mass of every head on every span in off, careful, filler, unrelated and open; refusal scores in the
    closed conditions and generated outcomes in all; heads found by ablation on `select` requests and tested on
    `evaluate` ones beside all other heads of their layers and per-layer random sets; neurons found by pairs on `select`
    requests and tested on `evaluate` ones, and what tuning did to them.

    They fall into parts: "heads" (all up to the heads, without which nothing is measured), "statistics" (of all
    heads what they write, how steadily they look and where within a chain; of the found ones which stand in for each other), "removing" (what removing the
    found ones does to refusal, reasoning and other text, and whether editing them under a chain of thought restores refusal),
    "comparing" (the same table of heads for each tuned model), "probes" (what separates in each condition, what ablating it
    does, and what removing the heads does to it) and "neurons" (a `NeuronStudy` with thinking off, in the folder's ``neurons``: the
    set, what removing it does, and of each tuned model what it refuses, RAS with its rivals, and what the base's activations
    restore; doses, writers and the multiverse are asked for there).

    Args:
        model: A name for `rl.load_model`, or a model of your own.
        tuned: Fine-tuned variants by name: names for `rl.load_model`, or models. A list of names names itself.
        harmful, harmless, reasoning: Requests; our own sets in the model's language when None. See
            `rim_lens.study.requests.requests_by_split` for splits and twins.
        n_requests: At most so many requests of each kind and split; None for all.
        settings: Everything else.
        parts: What is measured, see above. A folder takes more of them, and more tuned models, later.
        device: Where named models are put; one of your own stays where it is.
        dtype: Of the weights of named models, see `rl.load_model`.

    Raises:
        ConditionError: A condition that does not exist, one named twice, or off not among them.
        ValueError: An unknown part, "heads" not among them, or tuned models without a part that reads them; a name of a tuned
            model that cannot be one, or that two share; or a device or dtype for a model that was given.

    >>> import rim_lens as rl
    >>> study = rl.Study("toy", n_requests=8)
    >>> [step.stage for step in study.plan().steps][:3]
    ['gate', 'attention', 'scores']
    """

    model: str | Model
    tuned: Tuned = ()
    harmful: Given | None = None
    harmless: Given | None = None
    reasoning: Given | None = None
    n_requests: int | None = None
    settings: Settings = field(default_factory=Settings)
    parts: Sequence[str] = ("heads", "neurons")
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        """Refuse what could not be measured, before any model is loaded."""
        parts = tuple(self.parts)
        if not set(parts) <= set(PARTS) or "heads" not in parts:
            raise ValueError(
                f"parts={parts} was asked for; there are {', '.join(PARTS)}, and heads is one of them always."
            )
        if self.tuned and not {"neurons", "comparing"} & set(parts):
            raise ValueError(
                f"tuned models were given, and none of {parts} reads them; add neurons or comparing."
            )
        elsewhere = (str(self.device), self.dtype) != ("cpu", torch.float32)
        if elsewhere and not isinstance(self.model, str | Path):
            raise ValueError(
                f"device={self.device} and dtype={self.dtype} were asked for, and the model was given: it stays as it is. Give its"
                " name, or move it before."
            )
        by_name(self.tuned)
        names = self.settings.conditions
        for name in names:
            check_condition(name)
        if "off" not in names or len(set(names)) < len(names):
            raise ConditionError(
                f"the conditions {', '.join(names)} were asked for; name each once, and off among them: it is what the others are"
                " held against."
            )

    def plan(self) -> Plan:
        """Count rows, forward passes, tokens and files, and estimate the time; runs no model."""
        return self._plan(self._bench(Path()), self.parts, len(self._tuned))

    def run(self, folder: str | Path, say: Callable[[str], None] | None = None) -> StudyResult:
        """Measure what is not measured yet, and return everything.

        Interrupt it at any time and call it again: it goes on where it stopped. Ask for more parts or tuned models in a finished
        folder, and only these are measured. A model that does not refuse, or refuses twins as well, stops at the gate (`result.gate["passed"]` is False and says why), unless
        `settings.gate` is False, which is recorded.

        Args:
            folder: Where everything is stored; empty, or this same study's.
            say: Called with a line before each stage.

        Raises:
            StudyFolderError: The folder holds another study, or a tuned model of other weights under a name that is asked for,
                or is corrupt.
            MissingTwin, NotEnoughData: The requests do not allow a test; raised before any compute.
            ModelError: The model's hooks do not work as needed; raised before any compute.
        """
        say = say or (lambda _: None)
        folder = own_folder(folder)
        bench = self._bench(folder)
        verify(bench.model, reads=("pattern", "z", "post"), edits=("z", "post"))
        bench.folder.claim(self._design(bench))
        self._ask(bench.folder)
        clock = Clock(bench.folder, say)
        with clock("gate", "gate: does it refuse harmful requests, and only these?"):
            gate = stages.run_gate(bench)
        if gate["passed"] or not self.settings.gate:
            self._measure(bench, clock)
        return load_study(folder)

    def _ask(self, folder: ResultFolder) -> None:
        """Add these parts and tuned models to those that the folder was asked for before; which were is not what is measured."""
        now = asked_now(folder, PARTS, self.parts, self._tuned)
        for name, source in self._tuned.items():
            if not isinstance(
                source, str | Path
            ):  # a named one is loaded, and looked at, when its turn comes
                self._variant(folder, name, source)
        if now != asked_before(folder) or not folder.has("plan.json"):
            bench = self._bench(folder.path)
            folder.write("plan.json", self._plan(bench, now["parts"], len(now["tuned"])).to_dict())
            folder.write("asked.json", now)

    def _measure(self, bench: Bench, clock: Clock) -> None:
        n = len(self.settings.conditions)
        with clock("attention", f"attention mass of every head on every span, {n} conditions"):
            stages.run_attention(bench)
        with clock("scores", "refusal scores, closed conditions"):
            stages.run_scores(bench)
        with clock("outcomes", "what it writes, all conditions"):
            stages.run_outcomes(bench)
        with clock("heads", "heads whose removal changes refusal"):
            found = stages.run_heads(bench)
        if "statistics" in self.parts:
            with clock("statistics", "what heads write, how steadily they look, and who works with whom"):
                run_statistics(bench, found)
        if "removing" in self.parts:
            with clock("removing", "what removing the heads does, and what restores refusal"):
                run_removing(bench, found)
        if "comparing" in self.parts:
            with clock("comparing", "the heads of the tuned models"):
                for name, source in self._tuned.items():
                    run_comparing(bench, found, name, self._variant(bench.folder, name, source))
                compared(bench, list(self._tuned))
        if "probes" in self.parts:
            with clock("probes", "what probes separate, and what ablating it does"):
                run_probes(bench, found)
        if "neurons" in self.parts:
            self._on_neurons(bench, clock)

    def _on_neurons(self, bench: Bench, clock: Clock) -> None:
        with clock(
            "neurons", "neurons that pairs choose, what removing them does, and what tuning did to them"
        ):
            for name, source in self._tuned.items():
                stages.run_refusal_of(bench, name, self._variant(bench.folder, name, source))
            self._neurons.run(bench.folder.path / NEURONS)

    @cached_property
    def _neurons(self) -> NeuronStudy:
        """The study of neurons that is the part of that name."""
        mine = self.settings
        study = NeuronStudy(
            self.model,
            tuned=self.tuned,
            harmful=self.harmful,
            harmless=self.harmless,
            reasoning=self.reasoning,
            n_requests=self.n_requests,
            settings=NeuronSettings(
                conditions=("off",),
                n_random_sets=mine.n_random_sets,
                written=False,
                max_new_tokens=mine.max_new_tokens,
                gate=mine.gate,
                seed=mine.seed,
                max_rows=mine.max_rows,
                progress=mine.progress,
            ),
            parts=OF_TUNED,
            device=self.device,
            dtype=self.dtype,
        )
        study._model = self._model  # it is loaded already
        return study

    def _plan(self, bench: Bench, parts: Sequence[str], n_tuned: int) -> Plan:
        of_neurons = self._neurons.counted(OF_TUNED, n_tuned) if "neurons" in parts else ()
        return make_plan(bench, n_tuned, parts, of_neurons)

    @cached_property
    def _model(self) -> Model:
        return self._load(self.model)

    def _load(self, source: Source) -> Model:
        named = isinstance(source, str | Path)
        return load_model(source, device=self.device, dtype=self.dtype) if named else source

    def _variant(self, folder: ResultFolder, name: str, source: Source) -> Model:
        variant = self._load(source)
        same_shape(self._model, variant, name)
        same_weights(folder, variant, name, (f"tuned/{name}/heads", *outcomes_of(name)))
        return variant

    @property
    def _tuned(self) -> dict[str, Source]:
        return by_name(self.tuned)

    def _bench(self, folder: Path) -> Bench:
        chat = ChatFormat.from_model(self._model)
        language = "toy" if chat.name == "toy" else "en"
        sides = requests_by_split(language, self.harmful, self.harmless, self.reasoning, self.n_requests)
        return Bench(
            self._model, chat, sides["select"], sides["evaluate"], ResultFolder(folder), self.settings
        )

    def _design(self, bench: Bench) -> dict[str, Any]:
        prompts = (
            prompt
            for side in (bench.select, bench.evaluate)
            for prompt in (*side.harmful, *side.twins, *side.reasoning)
        )
        return {
            "model": source_name(self.model, bench.model),
            "given": not isinstance(self.model, str | Path),
            "facts": model_facts(bench.model).to_dict(),
            **known_by(bench.model),
            "chat_format": bench.chat.name,
            "n_requests": self.n_requests,
            "requests": {
                kind: "given" if getattr(self, kind) is not None else "rim_lens"
                for kind in ("harmful", "harmless", "reasoning")
            },
            "n_select": len(bench.select.harmful),
            "n_evaluate": len(bench.evaluate.harmful),
            "n_reasoning": len(bench.evaluate.reasoning),
            "n_families_evaluate": len(set(bench.evaluate.families)),
            "prompts_digest": prompts_digest(prompts),
            "settings": settings_asked(asdict(self.settings)),
            "versions": versions(),
        }
