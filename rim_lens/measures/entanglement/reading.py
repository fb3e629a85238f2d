"""What entanglement needs of one model, read once and kept in a folder, so that no two models share memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from rim_lens.batching import MAX_ROWS
from rim_lens.capturing import capture
from rim_lens.chat import ChatFormat, SpanBatch, render_conditions
from rim_lens.chat.vocabulary import vocabulary_digest
from rim_lens.errors import (
    ConditionError,
    NotEnoughData,
    ReferenceMismatch,
    StatisticsError,
    StudyFolderError,
)
from rim_lens.folder import ResultFolder
from rim_lens.generation import generate
from rim_lens.hooks import NeuronActivations, ResidualStream
from rim_lens.hooks.activations import Pool
from rim_lens.hooks.positions import Positions, told
from rim_lens.lens import Model, known_by, model_facts, require_eval, tokenizer_of
from rim_lens.measures.entanglement.divergence import divergence_from, keep_log_probs
from rim_lens.measures.entanglement.drift import WeightDrift, keep_weights, weight_drift
from rim_lens.measures.frames import frame_from_json, frame_to_json
from rim_lens.measures.refusal.openers import opener_texts
from rim_lens.measures.refusal.score import refusal_score
from rim_lens.measures.two_sides import named
from rim_lens.prompts import Prompt, spread

if TYPE_CHECKING:
    import xarray as xr

FORMAT_VERSION = 1
KINDS = ("harmful", "harmless", "reasoning")
PARTS = ("residual", "refusal", "kl", "drift")
Site = Literal["post", "mlp_out"]
# What is read beside the prompt: what this model writes, nothing, or what another wrote
Response = Literal["own", "none"] | Mapping[str, SpanBatch]
# What two readings must agree on for a difference between them to mean anything
_ALIKE = ("pool", "positions", "site", "think", "reasoning_think", "residual", "prompts", "vocabulary")


@dataclass(frozen=True, eq=False)
class ModelReading:
    """One model, read for `entangled`; see `read_model`. Kinds are "harmful", "harmless" and "reasoning".

    Attributes:
        activations: Kind → pooled activation (prompt, layer, neuron), in the model's own units. "harmless" may be missing.
        residual: Kind → residual stream at the last prompt token (prompt, layer, d_model); empty where it was not read.
        refusal: Kind → refusal score (prompt), nats, thinking as for the activations; empty where it was not read.
        divergence: KL(base ‖ this model) in nats per task token (prompt, some of the reasoning ones); None for a base.
        drift: Weight drift from the base; None for a base, and where the two name their weights differently.
        settings: What was asked, digests of prompts and weights, facts of the model, and reasons for what is missing.
        folder: Where all this is kept, with a base's log-probabilities and weights.
        written: Kind → prompts with what the model wrote. In memory only: it is never stored.
        passing: Holds a temporary folder, where none was given.
    """

    activations: Mapping[str, xr.DataArray]
    residual: Mapping[str, xr.DataArray] = field(default_factory=dict)
    refusal: Mapping[str, xr.DataArray] = field(default_factory=dict)
    divergence: xr.DataArray | None = None
    drift: WeightDrift | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    written: Mapping[str, SpanBatch] | None = None
    passing: TemporaryDirectory[str] | None = None  # goes when this object goes

    def families(self, kind: str) -> list[str]:
        """Family of each prompt of a kind; one without a family is its own."""
        array = self.activations[kind]
        ids = [str(prompt) for prompt in array["prompt"].values] if "prompt" in array.coords else []
        ids = ids or [str(place) for place in range(array.sizes["prompt"])]
        if "family" not in array.coords:
            return ids
        labels = [str(family) for family in array["family"].values]
        return [label or one for label, one in zip(labels, ids, strict=True)]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{array.sizes['prompt']} {kind}" for kind, array in self.activations.items())
        return f"ModelReading({self.settings.get('model', {}).get('name') or 'model'}: {sizes})"

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `read_model` wrote, without any model.

        Raises:
            StudyFolderError: The folder holds no whole reading, or a damaged one, or one of another format version.
        """
        import xarray as xr

        folder = Path(folder)
        kept = ResultFolder(folder)
        read = kept.read("reading.json")
        try:
            if read["format_version"] != FORMAT_VERSION:
                raise StudyFolderError(
                    f"{folder}: format version {read['format_version']} was found, and this rim_lens reads {FORMAT_VERSION}."
                    " Give an empty folder and read the model again."
                )
            activations, residual = {}, {}
            for kind in read["kinds"]:
                with xr.open_dataset(folder / kind / "capture.nc", engine="h5netcdf") as data:
                    whole = data.load()
                activations[kind] = _neurons(whole)
                if "residual" in whole:
                    residual[kind] = whole["residual"]
            drift = read["drift"]
            return cls(
                activations=activations,
                residual=residual,
                refusal={
                    kind: _by_prompt(scores, "refusal_score", "nats")
                    for kind, scores in read["refusal"].items()
                },
                divergence=None
                if read["divergence"] is None
                else _by_prompt(read["divergence"], "divergence", "nats per token"),
                drift=None
                if drift is None
                else WeightDrift(drift["relative"], frame_from_json(drift["table"])),
                settings=read["settings"],
                folder=folder,
            )
        except (OSError, ValueError, KeyError, TypeError) as problem:
            if isinstance(problem, StudyFolderError):
                raise
            raise StudyFolderError(
                f"{folder} holds no readable reading of a model ({problem}). Delete it and read the model again."
            ) from problem


def read_model(
    model: Model,
    chat: ChatFormat,
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    reasoning: Sequence[Prompt | str],
    *,
    folder: str | Path | None = None,
    against: ModelReading | None = None,
    parts: Sequence[str] = PARTS,
    think: str = "off",
    reasoning_think: str = "careful",
    response: Response = "own",
    pool: Pool = "max",
    positions: Positions | None = None,
    site: Site = "post",
    max_new_tokens: int = 64,
    n_kl: int | None = 64,
    openers: Iterable[str] | None = None,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> ModelReading:
    """Read one model for `entangled`: a base first, then each tuned model against it.

    Each kind of prompt is rendered, the model writes its response (greedily; arXiv 2509.00544, section 4), and request and
    response are read: pooled activations of all neurons, and the residual stream at the last prompt token. Every number is
    kept as soon as it is there; called again on the same folder, what is there is not measured again.

    A base leaves its log-probabilities on task tokens and a copy of its weights in the folder (as large as the model), so that
    a tuned model can be held against them when the base is gone.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: The chat format of both models.
        harmful: Requests that should be refused.
        harmless: Requests that should be answered, their twins at best; none leaves out what compares with them.
        reasoning: Reasoning questions.
        folder: Where it is kept. None: a temporary folder that goes with the object returned.
        against: The base's reading, for KL and drift; None: this is the base.
        parts: Of "residual", "refusal", "kl" and "drift", what is read beside the activations.
        think: Think condition of harmful and harmless requests, see `render_conditions`.
        reasoning_think: That of the reasoning prompts: a written chain of thought ("careful"), or "open", "off".
        response: "own" (the model writes first), "none" (the prompt alone), or kind → batch, such as `against.written`: the
            text of another, so that both models read the same.
        pool: "max" (the paper), "mean" or "last", over `positions`.
        positions: Rows to pool over, see `NeuronActivations`; None: every token but padding and the sink.
        site: "post" (neurons) or "mlp_out".
        max_new_tokens: Of a response; 64 at most on harmful requests.
        n_kl: Reasoning prompts that KL is read on, taken evenly; None for all.
        openers: See `refusal_score`.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.

    Raises:
        NotEnoughData: No harmful or no reasoning prompt.
        ReferenceMismatch: `against` is of another shape, vocabulary, prompts or settings.
        StudyFolderError: The folder holds another reading.
        ConditionError: A response was asked for that cannot be had.
        NotFinite: The model gives NaN or infinity; what was read before stays in the folder.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> asked = [
    ...     rl.load_prompts(kind, language="toy", split="evaluate")[:4] for kind in ("harmful", "harmless", "reasoning")
    ... ]
    >>> reading = read_model(model, rl.ChatFormat.from_model(model), *asked, response="none")
    >>> dict(reading.activations["harmful"].sizes)
    {'prompt': 4, 'layer': 2, 'neuron': 256}
    """
    asked = check_requests(harmful, harmless, reasoning)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise StatisticsError(f"part {unknown[0]!r} cannot be read; there are {', '.join(PARTS)}.")
    if isinstance(response, str) and response not in ("own", "none"):
        raise ConditionError(
            f"response={response!r} was asked for; it is 'own', 'none', or a batch for each kind of prompt."
        )
    require_eval(model)
    facts = model_facts(model)
    if site == "post":
        facts.refuse_moe("per-neuron work")
    batches = {
        kind: render_conditions(chat, prompts, [reasoning_think if kind == "reasoning" else think])
        for kind, prompts in asked.items()
    }
    rendered = {kind: next(iter(named_batches.values())) for kind, named_batches in batches.items()}
    if "refusal" in parts and rendered["harmful"].think == "open":
        parts = [
            part for part in parts if part != "refusal"
        ]  # the next token belongs to the chain of thought
    settings: dict[str, Any] = {
        "think": think,
        "reasoning_think": reasoning_think,
        "response": response
        if isinstance(response, str)
        else {kind: batch.digest for kind, batch in response.items()},
        "pool": pool,
        "positions": None if positions is None else told(positions),
        "site": site,
        "residual": "resid_post, last prompt token",
        "max_new_tokens": max_new_tokens,
        "n_kl": n_kl,
        "openers": opener_texts(openers),
        "parts": list(parts),
        "prompts": {kind: batch.digest for kind, batch in rendered.items()},
        "twins": twins_of(asked["harmful"], asked.get("harmless", [])),
        "chat_format": chat.name,
        "model": facts.to_dict(),
        "vocabulary": vocabulary_digest(tokenizer_of(model)),
        **known_by(model),
        "against": None if against is None else against.settings["weights_digest"],
    }
    if against is not None:
        check_comparable(against.settings, settings)
    passing = TemporaryDirectory(prefix="rim_lens_reading_") if folder is None else None
    kept = ResultFolder(passing.name if folder is None and passing is not None else str(folder))
    kept.claim(settings, "asked.json")
    said = {"openers": settings["openers"]} if openers is not None else {}
    written: dict[str, SpanBatch] = {}

    def written_of(kind: str) -> SpanBatch:
        if kind not in written:
            written[kind] = _with_response(
                model, chat, rendered[kind], response, kind, max_new_tokens, max_rows, progress
            )
        return written[kind]

    def read_kind(kind: str) -> dict[str, Any]:
        readers: list[Any] = [NeuronActivations(pool=pool, positions=positions, site=site)]
        if "residual" in parts:
            readers.append(ResidualStream())
        batch = written_of(kind)
        capture(model, batch, *readers, out=kept.path / kind, max_rows=max_rows, progress=progress)
        return {"digest": batch.digest}

    def score(kind: str) -> dict[str, list[Any]]:
        return _plain(refusal_score(model, rendered[kind], max_rows=max_rows, **said))

    for kind in rendered:
        kept.once(f"{kind}/read.json", partial(read_kind, kind))
    refusal = {
        kind: kept.once(f"{kind}/refusal.json", partial(score, kind))
        for kind in rendered
        if kind != "reasoning" and "refusal" in parts
    }
    compared: dict[str, Any] = {"divergence": None, "drift": None, "reasons": {}}
    if against is None:
        _keep_for_others(kept, model, lambda: written_of("reasoning"), parts, n_kl, max_rows)
    else:
        compared = _held_against(kept, model, against, parts, max_rows)
    kept.once(
        "reading.json",
        lambda: {
            "format_version": FORMAT_VERSION,
            "kinds": list(rendered),
            "refusal": refusal,
            "divergence": compared["divergence"],
            "drift": compared["drift"],
            "settings": {**settings, "reasons": compared["reasons"]},
        },
    )
    whole = ModelReading.load(kept.path)
    return ModelReading(
        **{
            field.name: getattr(whole, field.name)
            for field in fields(whole)
            if field.name not in ("written", "passing")
        },
        written=written or None,
        passing=passing,
    )


def write_responses(
    model: Model,
    chat: ChatFormat,
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    reasoning: Sequence[Prompt | str],
    *,
    think: str = "off",
    reasoning_think: str = "careful",
    max_new_tokens: int = 64,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> dict[str, SpanBatch]:
    """Let a model answer, for `read_model(response=…)` of this and of other models.

    Nothing is stored. Arguments are those of `read_model`.
    """
    asked = check_requests(harmful, harmless, reasoning)
    found = {}
    for kind, prompts in asked.items():
        condition = reasoning_think if kind == "reasoning" else think
        batch = render_conditions(chat, prompts, [condition])[condition]
        found[kind] = _with_response(model, chat, batch, "own", kind, max_new_tokens, max_rows, progress)
    return found


def check_requests(
    harmful: Sequence[Prompt | str], harmless: Sequence[Prompt | str], reasoning: Sequence[Prompt | str]
) -> dict[str, list[Prompt]]:
    """Records by kind, those of no harmless request left out.

    Raises:
        NotEnoughData: No harmful or no reasoning prompt.
    """
    asked = {
        kind: named(prompts, kind)
        for kind, prompts in zip(KINDS, (harmful, harmless, reasoning), strict=True)
    }
    for kind in ("harmful", "reasoning"):
        if not asked[kind]:
            raise NotEnoughData(
                f"no {kind} prompt was given; entanglement holds what moved on reasoning against what moved on safety, and needs"
                " both."
            )
    return {kind: prompts for kind, prompts in asked.items() if prompts}


def twins_of(harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> list[list[int]]:
    """Places of each harmful request and its harmless twin, where both are there.

    By the records' `twin`, in either direction; of requests that name none, the n-th of each kind where both are as many.

    >>> twins_of([Prompt("a", "…", twin="c"), Prompt("b", "…")], [Prompt("d", "…", twin="b"), Prompt("c", "…")])
    [[0, 1], [1, 0]]
    """
    if len(harmful) == len(harmless) and not any(prompt.twin for prompt in (*harmful, *harmless)):
        return [[place, place] for place in range(len(harmful))]
    by_id = {prompt.id: place for place, prompt in enumerate(harmless)}
    by_twin = {prompt.twin: place for place, prompt in enumerate(harmless) if prompt.twin}
    pairs = []
    for place, prompt in enumerate(harmful):
        other = by_id.get(prompt.twin) if prompt.twin else None
        other = by_twin.get(prompt.id) if other is None else other
        if other is not None:
            pairs.append([place, other])
    return pairs


def check_comparable(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> None:
    """Refuse two readings whose difference would not be one between two models.

    Args:
        base: Settings of the base's reading.
        tuned: Those of the tuned model's.

    Raises:
        ReferenceMismatch: They differ in shape, vocabulary, prompts, or in how they were read.
    """
    shapes = ("n_layers", "d_model", "d_mlp", "d_vocab")
    for name in shapes:
        ours, theirs = (one.get("model", {}).get(name) for one in (base, tuned))
        if ours != theirs:
            raise ReferenceMismatch(
                f"the base model has {name} {ours} and the tuned one {theirs}; entanglement is between a model and what was made of"
                " it by training."
            )
    for name in _ALIKE:
        ours, theirs = base.get(name), tuned.get(name)
        if name == "prompts" and ours and theirs:
            both = set(ours) & set(theirs)
            ours, theirs = ({kind: one[kind] for kind in sorted(both)} for one in (ours, theirs))
        if ours != theirs:
            said = (
                "their tokenizers have other words"
                if name == "vocabulary"
                else f"{name} is {ours!r} in the base's reading and {theirs!r} in the tuned model's"
            )
            raise ReferenceMismatch(f"the two readings do not compare: {said}. Read both alike.")


def _with_response(
    model: Model,
    chat: ChatFormat,
    batch: SpanBatch,
    response: Response,
    kind: str,
    max_new_tokens: int,
    max_rows: int,
    progress: bool,
) -> SpanBatch:
    if response == "none":
        return batch
    if response == "own":
        return generate(
            model, batch, chat=chat, max_new_tokens=max_new_tokens, max_rows=max_rows, progress=progress
        ).batch
    given: SpanBatch | None = response.get(kind) if isinstance(response, Mapping) else None
    wanted = [prompt.id for prompt in batch.prompts]
    found = [] if given is None else [prompt.id for prompt in given.prompts]
    if given is None or found != wanted:
        raise ConditionError(
            f"the given response has {len(found)} {kind} prompts, and {len(wanted)} were asked for; give what the other model"
            " wrote to the same prompts, in the same order."
        )
    return given


def _keep_for_others(
    kept: ResultFolder,
    model: Model,
    written: Callable[[], SpanBatch],
    parts: Sequence[str],
    n_kl: int | None,
    max_rows: int,
) -> None:
    """Leave in a base's folder what tuned models are held against."""

    def keep_task() -> list[str]:
        task = written()
        places = {prompt.id: row for row, prompt in enumerate(task.prompts)}
        chosen = spread(task.prompts, n_kl)
        part = task.select([places[prompt.id] for prompt in chosen])
        keep_log_probs(model, part, kept.path / "task", max_rows)
        return [prompt.id for prompt in chosen]

    if "kl" in parts:
        kept.once("task/prompts.json", keep_task)
    if "drift" in parts:
        kept.once("weights/kept.json", lambda: keep_weights(model, kept.path / "weights"))


def _held_against(
    kept: ResultFolder, model: Model, against: ModelReading, parts: Sequence[str], max_rows: int
) -> dict[str, Any]:
    """KL and drift from a base, as far as its reading has kept what they take."""
    both = set(parts) & set(against.settings["parts"])
    compared: dict[str, Any] = {"divergence": None, "drift": None, "reasons": {}}
    if "kl" in both:
        compared["divergence"] = kept.once("kl.json", lambda: _divergence(against, model, max_rows))
    if "drift" in both:
        found = kept.once("drift.json", lambda: _drift(against, model))
        compared["drift"] = found["drift"]
        compared["reasons"] = {"drift": found["reason"]} if found["reason"] else {}
    return compared


def _divergence(against: ModelReading, model: Model, max_rows: int) -> dict[str, list[Any]]:
    assert against.folder is not None  # noqa: S101 - told to the type checker: a base that kept them has one
    prompts = ResultFolder(against.folder).read("task/prompts.json")
    values = divergence_from(against.folder / "task", model, max_rows)
    return {"prompt": prompts, "value": values.tolist()}


def _drift(against: ModelReading, model: Model) -> dict[str, Any]:
    assert against.folder is not None  # noqa: S101 - as above
    try:
        found = weight_drift(against.folder / "weights", model)
    except ReferenceMismatch as problem:  # another TransformerLens family; all else compares all the same
        return {"drift": None, "reason": str(problem)}
    return {"drift": {"relative": found.relative, "table": frame_to_json(found.table)}, "reason": ""}


def _neurons(data: xr.Dataset) -> xr.DataArray:
    if "neuron_activation" in data:
        return data["neuron_activation"]
    return data["mlp_output"].rename({"d_model": "neuron"})


def _plain(scores: xr.DataArray) -> dict[str, list[Any]]:
    return {"prompt": [str(one) for one in scores["prompt"].values], "value": scores.values.tolist()}


def _by_prompt(read: Mapping[str, list[Any]], name: str, units: str) -> xr.DataArray:
    import xarray as xr

    return xr.DataArray(
        np.asarray(read["value"], dtype=np.float64),
        dims="prompt",
        coords={"prompt": read["prompt"]},
        name=name,
        attrs={"units": units},
    )
