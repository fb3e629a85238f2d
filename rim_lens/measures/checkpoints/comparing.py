"""A run of checkpoints held against its base, one model in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, render_conditions
from rim_lens.errors import AnswerError, ConditionError, NotEnoughData
from rim_lens.folder import ResultFolder
from rim_lens.generation import generate
from rim_lens.hooks.activations import Pool
from rim_lens.lens import Model, weights_digest
from rim_lens.measures.checkpoints.result import Comparison
from rim_lens.measures.checkpoints.which import (
    Checkpoint,
    called,
    identity,
    is_loader,
    require_same,
    runs_of,
    slug,
)
from rim_lens.measures.entanglement.between import Neuron, check_options, entangled
from rim_lens.measures.entanglement.entangling import opened, own_or_none
from rim_lens.measures.entanglement.reading import ModelReading, Site, check_requests, read_model, twins_of
from rim_lens.measures.entanglement.result import Entanglement
from rim_lens.measures.entanglement.rises import rises_of
from rim_lens.measures.entanglement.shifting import SHIFTS
from rim_lens.measures.held_out import chosen_by, refuse_used
from rim_lens.measures.neurons.pairs import Pair, Pairs, as_pairs
from rim_lens.measures.reasoning import reasoning_accuracy
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.shift import Average
from rim_lens.measures.twins import witnesses
from rim_lens.prompts import Prompt, prompts_digest
from rim_lens.training import FineTuned

if TYPE_CHECKING:
    import pandas as pd

RISES = "rises.safetensors"
OF_SETS = (*SHIFTS, "cka_ratio")
# How much of a metric of the whole model a base has against itself.
_NOTHING_MOVED = (*SHIFTS, "kl", "weight_drift", "refusal_change_harmful", "refusal_change_harmless")


def compare(
    models: Sequence[Checkpoint] | FineTuned | Mapping[str, Sequence[Checkpoint] | FineTuned],
    chat: ChatFormat | None = None,
    harmful: Sequence[Prompt | str] = (),
    harmless: Sequence[Prompt | str] = (),
    reasoning: Sequence[Prompt | str] = (),
    *,
    base: Checkpoint | None = None,
    neurons: Iterable[Neuron] | None = None,
    pairs: Pairs | None = None,
    accuracy: Sequence[str] = ("open",),
    think: str = "off",
    reasoning_think: str = "careful",
    response: Literal["own", "none"] = "own",
    pool: Pool = "max",
    site: Site = "post",
    average: Average = "prompts_first",
    floor: float | Literal["auto"] | None = "auto",
    n_random_sets: int = 100,
    matched: Literal["activity"] | None = "activity",
    n_boot: int = 200,
    max_new_tokens: int = 64,
    max_cot_tokens: int | None = None,
    close_unfinished: bool = False,
    n_kl: int | None = 64,
    openers: Iterable[str] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Comparison:
    """Measure refusal, accuracy, drift and entanglement at every checkpoint of one or several runs from one base.

    Models are loaded one after the other, each let go before the next (give names, folders or functions: a model you hold
    yourself stays). With `folder` every checkpoint is kept as soon as it is measured, and a comparison that was cut short
    goes on where it stopped; other weights, requests or options are refused there. The folder may be moved.

    What it does not show: that entanglement weakens refusal. Checkpoints of a run follow each other, so that all that
    training moves goes together; `Comparison.correlations` says what can be tested, `Comparison.drift_matched` holds a run
    against another that drifted as far.

    Args:
        models: The base and its checkpoints, in order; or run → checkpoints, with `base`; or what `rl.fine_tune` gave, which
            knows its base and steps. The step of a folder called ``step-40`` is 40, else checkpoints are counted from 1.
        chat: Their chat format; None: found from the model.
        harmful: Requests that should be refused, other ones than chose the neurons.
        harmless: Requests that should be answered, twins at best; may be left out.
        reasoning: Reasoning questions, other ones than were trained on.
        base: The base, where `models` does not begin with it.
        neurons: A `NeuronSet`, or (layer, neuron) pairs; None: all neurons, beside which no random set stands.
        pairs: Those that chose the neurons, for `ras_p`, see `rl.entanglement`.
        accuracy: Think conditions in which the reasoning questions are answered; none leaves accuracy out.
        think: Think condition of harmful and harmless requests.
        reasoning_think: That in which activations are read on reasoning questions.
        response: "own": each model's response is read with the request (the paper); "none": the prompt alone.
        pool: See `read_model`.
        site: See `read_model`.
        average: See `rl.entanglement`.
        floor: See `rl.entanglement`.
        n_random_sets: See `rl.entanglement`.
        matched: See `rl.entanglement`.
        n_boot: See `rl.entanglement`.
        max_new_tokens: Of what is written; 64 at most in answers to harmful requests.
        max_cot_tokens: See `generate`; for accuracy.
        close_unfinished: See `generate`; for accuracy.
        n_kl: See `rl.entanglement`.
        openers: See `refusal_score`.
        folder: Where it is kept; None keeps nothing.
        seed: Of random sets and intervals.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.
        device: Where models that are named are put, one after the other.
        dtype: Of their weights.

    Raises:
        NotEnoughData: There is no checkpoint, or no harmful or reasoning prompt.
        StatisticsError: A run or step is there twice, runs have other bases, or an option is out of range.
        AnswerError: Accuracy is asked for, and a question has no checked answer.
        ReferenceMismatch: A checkpoint is of another shape than the base.
        StudyFolderError: The folder holds another comparison: of other weights, requests or options.
        NotFinite: A model gives NaN or infinity; what was measured before stays.

    >>> import rim_lens as rl
    >>> asked = [
    ...     rl.load_prompts(kind, language="toy", split="evaluate")[:6] for kind in ("harmful", "harmless", "reasoning")
    ... ]
    >>> found = rl.compare(
    ...     ["toy", "toy:careful", "toy:deviate"], None, *asked, neurons=[(1, 3), (1, 7)], response="none", n_boot=20
    ... )
    >>> found.table["step"].tolist(), bool(found.table["lost"].iloc[2] > found.table["lost"].iloc[1])
    ([0, 1, 2], True)
    """
    start, runs = runs_of(models, base)
    check_options(n_random_sets, matched, average, floor, n_boot, 0.95)
    asked = check_requests(harmful, harmless, reasoning)
    _check_answers(response, accuracy, asked["reasoning"])
    chosen = None if neurons is None else sorted((int(layer), int(neuron)) for layer, neuron in neurons)
    if chosen is not None and not chosen:
        raise NotEnoughData(
            "a comparison by an empty set of neurons was asked for; give at least one neuron."
        )
    made = _checked_pairs(pairs, chosen, [*asked["harmful"], *asked["harmless"]])
    writing: dict[str, Any] = {"max_new_tokens": max_new_tokens, "max_rows": max_rows, "progress": progress}
    thinking: dict[str, Any] = {"max_cot_tokens": max_cot_tokens, "close_unfinished": close_unfinished}
    reading: dict[str, Any] = {
        **writing,
        "think": think,
        "reasoning_think": reasoning_think,
        "pool": pool,
        "site": site,
        "n_kl": n_kl,
        "openers": None if openers is None else list(openers),
    }
    settings: dict[str, Any] = {
        "base": identity(start),
        "runs": {run: [[step, *identity(model)] for step, model in its] for run, its in runs.items()},
        "dtype": str(dtype),
        "chat_format": None if chat is None else chat.name,
        "neurons": None if chosen is None else [list(pair) for pair in chosen],
        "pairs": prompts_digest(form for pair in made for form in (pair.less, pair.more)),
        "prompts": {kind: prompts_digest(prompts) for kind, prompts in asked.items()},
        "accuracy": list(accuracy),
        "response": response,
        "average": average,
        "floor": floor,
        "n_random_sets": n_random_sets,
        "matched": matched,
        "n_boot": n_boot,
        "seed": seed,
        **thinking,
        **{name: value for name, value in reading.items() if name not in ("max_rows", "progress")},
    }
    requests = [asked.get(kind, []) for kind in ("harmful", "harmless", "reasoning")]
    with ExitStack() as stack:
        place = Path(
            stack.enter_context(TemporaryDirectory(prefix="rim_lens_compare_")) if folder is None else folder
        )
        kept = ResultFolder(place)
        kept.claim(settings, "asked.json")

        read = _Reader(
            kept, requests, made, chat, response, accuracy, reading, writing, thinking, device, dtype
        )
        before = read(start, "base", None)
        difference = _rises(kept.path / "base") if made else None
        everyone = [
            (layer, neuron)
            for layer in range(before.activations["harmful"].sizes["layer"])
            for neuron in range(before.activations["harmful"].sizes["neuron"])
        ]
        rows: list[dict[str, Any]] = []
        random: list[pd.DataFrame] = []
        prompts: list[dict[str, Any]] = []
        at_base = _outcomes(before, kept.read("base/outcomes.json"), asked)
        for run, its in runs.items():
            rows.append({"run": run, "step": 0, "model": called(start), **_of_base(before, at_base)})
            prompts += [{"run": run, "step": 0, **line} for line in at_base["prompts"]]
            for number, (step, model) in enumerate(its):
                where = f"{slug(run, list(runs))}/{number:03d}"
                after = read(model, where, before)
                found = entangled(
                    before,
                    after,
                    chosen or everyone,
                    n_random_sets=n_random_sets,
                    matched=matched,
                    difference=difference,
                    difference_families=families_of([pair.more for pair in made]) if made else None,
                    average=average,
                    floor=floor,
                    n_boot=n_boot,
                    seed=seed,
                )
                now = _outcomes(after, kept.read(f"{where}/outcomes.json"), asked)
                label = {"run": run, "step": step}
                rows.append({**label, "model": called(model), **_of_checkpoint(after, now, at_base, found)})
                prompts += [{**label, **line} for line in now["prompts"]]
                random.append(_random(found).assign(**label))
                del after
        result = _result(rows, random, prompts, settings)
        if folder is not None:
            result.save(folder)
    return result


@dataclass(frozen=True)
class _Reader:
    """Reads a model, or finds it read already, without loading it."""

    kept: ResultFolder
    requests: Sequence[Sequence[Prompt]]
    pairs: Sequence[Pair]
    chat: ChatFormat | None
    response: str
    accuracy: Sequence[str]
    reading: Mapping[str, Any]
    writing: Mapping[str, Any]
    thinking: Mapping[str, Any]
    device: str | torch.device
    dtype: torch.dtype

    def __call__(self, model: Checkpoint, where: str, against: ModelReading | None) -> ModelReading:
        place, of_pairs = self.kept.path / where, against is None and bool(self.pairs)
        wanted = ["outcomes.json", "reading/reading.json"] + [RISES] * of_pairs
        if not all((place / name).exists() for name in wanted):
            with opened(model, self.device, self.dtype) as here:
                chat = self.chat or ChatFormat.from_model(here)
                if of_pairs:
                    _read_pairs(here, chat, self.pairs, place, self.response, self.reading)
                self._measure(here, chat, where, against)
                del here  # or it would still be there when the next one is loaded
        elif is_loader(model):  # nothing but its weights says what a function gives
            with opened(model, self.device, self.dtype) as here:
                require_same(weights_digest(here), place)
                del here
        return ModelReading.load(place / "reading")

    def _measure(self, model: Model, chat: ChatFormat, where: str, against: ModelReading | None) -> None:
        """What a model writes, and what it reads like."""
        written: dict[str, Any] = {}
        outcomes: dict[str, Any] = {"accuracy": {}}
        for kind, prompts in zip(("harmful", "harmless", "reasoning"), self.requests, strict=True):
            if not prompts or (kind == "reasoning" and self.response == "none"):
                continue
            condition = self.reading["reasoning_think" if kind == "reasoning" else "think"]
            batch = render_conditions(chat, prompts, [condition])[condition]
            out = generate(model, batch, chat=chat, **self.writing)
            written[kind] = out.batch
            if kind != "reasoning":
                outcomes[kind] = list(out.outcome)
        for condition in self.accuracy:
            batch = render_conditions(chat, self.requests[2], [condition])[condition]
            out = generate(model, batch, chat=chat, **self.writing, **self.thinking)
            outcomes["accuracy"][condition] = reasoning_accuracy(out).rows["correct"].astype(bool).tolist()
        read_model(
            model,
            chat,
            *self.requests,
            folder=self.kept.path / where / "reading",
            against=against,
            response=written if self.response == "own" else "none",
            **self.reading,
        )
        self.kept.write(f"{where}/outcomes.json", outcomes)


def _check_answers(response: str, accuracy: Sequence[str], questions: Sequence[Prompt]) -> None:
    if response not in ("own", "none"):
        raise ConditionError(f"response={response!r} was asked for; it is 'own' or 'none'.")
    bare = [prompt.id for prompt in questions if prompt.answer is None]
    if accuracy and bare:
        raise AnswerError(
            f"accuracy was asked for, and {len(bare)} of {len(questions)} questions have no checked answer (first:"
            f" {bare[0]!r}); set Prompt.answer, or give accuracy=()."
        )


def _checked_pairs(pairs: Pairs | None, chosen: Any, requests: Sequence[Prompt]) -> list[Pair]:
    """The pairs, which must not have seen these requests; none where all neurons are meant."""
    made = [] if pairs is None or chosen is None else as_pairs(pairs)
    refuse_used(chosen_by([form for pair in made for form in (pair.less, pair.more)]), requests, "neurons")
    return made


def _read_pairs(
    model: Model,
    chat: ChatFormat,
    pairs: Sequence[Pair],
    folder: Path,
    response: str,
    reading: Mapping[str, Any],
) -> None:
    """Keep how far neurons rise in each pair, in the base."""
    from safetensors.numpy import save_file

    found = rises_of(
        model,
        chat,
        pairs,
        own_or_none(response),
        **{
            name: reading[name]
            for name in ("think", "pool", "site", "max_new_tokens", "max_rows", "progress")
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{RISES}.part"
    save_file({"rises": np.ascontiguousarray(found)}, unfinished)
    unfinished.replace(folder / RISES)


def _rises(folder: Path) -> Float[np.ndarray, "pair layer neuron"]:
    from safetensors.numpy import load_file

    return np.asarray(load_file(folder / RISES)["rises"])


def _outcomes(
    reading: ModelReading, written: Mapping[str, Any], asked: Mapping[str, Sequence[Prompt]]
) -> dict[str, Any]:
    """Numbers of one model by itself, and a line for every prompt."""
    numbers: dict[str, float] = {}
    lines: list[dict[str, Any]] = []
    harmful, harmless = asked["harmful"], asked.get("harmless", [])
    families = {
        "reasoning": families_of(asked["reasoning"]),
        **witnesses(harmful, harmless, twins_of(harmful, harmless)),
    }
    for kind, prompts in asked.items():
        scores = [float("nan")] * len(prompts)
        if kind in reading.refusal:
            scores = reading.refusal[kind].values.tolist()
            numbers[f"score_{kind}"] = float(np.mean(scores))
        if kind == "reasoning":
            for condition, right in written["accuracy"].items():
                numbers[f"accuracy_{condition}"] = float(np.mean(right))
            first = next(iter(written["accuracy"].values()), None)
            told = [""] * len(prompts) if first is None else ["right" if one else "wrong" for one in first]
        else:
            told = written[kind]
            numbers[f"refused_{kind}"] = told.count("refuse") / len(told)
            if kind == "harmful":
                numbers["complied_harmful"] = told.count("comply") / len(told)
        lines += [
            {"kind": kind, "prompt": prompt.id, "family": family, "score": score, "outcome": outcome}
            for prompt, family, score, outcome in zip(prompts, families[kind], scores, told, strict=True)
        ]
    return {"numbers": numbers, "prompts": lines}


def _lost(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    pairs = {"lost": "score_harmful", "lost_harmless": "score_harmless", "lost_rate": "refused_harmful"}
    return {name: before[of] - now[of] for name, of in pairs.items() if of in before and of in now}


def _of_base(reading: ModelReading, outcomes: Mapping[str, Any]) -> dict[str, Any]:
    numbers = outcomes["numbers"]
    parts = [f"{name}{end}" for name in _NOTHING_MOVED for end in ("", "_all", "_random")]
    return {
        "weights_digest": reading.settings["weights_digest"],
        **numbers,
        **_lost(numbers, numbers),
        **dict.fromkeys(parts, 0.0),
    }


def _of_checkpoint(
    reading: ModelReading, outcomes: Mapping[str, Any], base: Mapping[str, Any], found: Entanglement
) -> dict[str, Any]:
    numbers = outcomes["numbers"]
    line = {
        "weights_digest": reading.settings["weights_digest"],
        **numbers,
        **_lost(numbers, base["numbers"]),
    }
    for _, row in found.table.iterrows():
        metric, of, value = str(row["metric"]), str(row["of"]), float(row["value"])
        if of == "model":
            line[f"{metric}_model" if metric in OF_SETS else metric] = value
            continue
        line[f"{metric}_all" if of == "all" else metric] = value
        if of == "set":
            line[f"{metric}_random"] = float(row["random"])
        if of == "set" and metric == "ras":
            line |= {f"ras_{name}": float(row[name]) for name in ("low", "high", "percentile", "p")}
    return line


def _random(found: Entanglement) -> pd.DataFrame:
    rows = found.sets[found.sets["of"] == "random"]
    return rows[["number", *OF_SETS]].rename(columns={"number": "set"}).reset_index(drop=True)


def _result(
    rows: list[dict[str, Any]],
    random: list[pd.DataFrame],
    prompts: list[dict[str, Any]],
    settings: dict[str, Any],
) -> Comparison:
    import pandas as pd

    names = list(dict.fromkeys(name for row in sorted(rows, key=lambda row: -len(row)) for name in row))
    measured = {name for row in rows if row["step"] > 0 for name in row}
    table = pd.DataFrame(rows, columns=[name for name in names if name in measured])
    table = table.astype(
        dict.fromkeys(table.columns.difference(["run", "model", "step", "weights_digest"]), "float64")
    )
    others = pd.concat(random, ignore_index=True)[["run", "step", "set", *OF_SETS]]
    return Comparison(table, others, pd.DataFrame(prompts), settings)
