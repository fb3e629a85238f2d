"""What the neuron explorer reads of a model: pooled activations of every neuron, and those of a few over the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int

from rim_lens.capturing import capture
from rim_lens.chat.conditions import render_conditions
from rim_lens.chat.spans import SpanBatch
from rim_lens.generation import generate
from rim_lens.hooks.activations import NeuronActivations
from rim_lens.lens import model_facts
from rim_lens.measures.entanglement.reading import ModelReading, read_model
from rim_lens.measures.two_sides import named
from rim_lens.outcomes import first_words
from rim_lens.views.explorer.reading import NeuronsByToken
from rim_lens.views.explorer.tokens import token_texts
from rim_lens.views.text import visible

if TYPE_CHECKING:
    from rim_lens.chat import ChatFormat
    from rim_lens.lens import Model
    from rim_lens.prompts import Prompt

Neuron = tuple[int, int]
Response = Literal["own", "base", "none"]
WITHHELD = "░"


@dataclass(frozen=True, eq=False)
class Source:
    """One model as it was read.

    Attributes:
        role: "model", or "base" and "tuned".
        name: Of the model.
        pool: How activations are pooled over tokens.
        pooled: Kind of prompts → pooled activation [prompt, layer, neuron], in the model's own units.
        batches: Kind → the prompts with what was written to them; empty where only numbers were kept.
    """

    role: str
    name: str
    pool: str
    pooled: Mapping[str, Float[np.ndarray, "prompt layer neuron"]]
    batches: Mapping[str, SpanBatch]

    def means(self, kind: str) -> Float[np.ndarray, " neuron"]:
        """Mean over prompts, neurons layer by layer."""
        mean: np.ndarray = self.pooled[kind].mean(axis=0, dtype=np.float64).reshape(-1)
        return mean


def source_of(reading: ModelReading, role: str, name: str | None = None) -> Source:
    """A reading of `read_model` as a source; its prompts are there only where it was made in this process."""
    pooled = {
        kind: values.transpose("prompt", "layer", "neuron").values
        for kind, values in reading.activations.items()
    }
    named_ = visible(name or reading.settings["model"]["name"])
    return Source(role, named_, reading.settings["pool"], pooled, dict(reading.written or {}))


def read_two(
    base: Model,
    tuned: Model,
    chat: ChatFormat,
    asked: Mapping[str, Sequence[Prompt | str]],
    response: Response,
    think: str,
    reasoning_think: str,
    **reading: Any,
) -> tuple[ModelReading, ModelReading]:
    """Both models, read as `entanglement` reads them, without what it compares beside neurons."""
    asking: dict[str, Any] = {
        "harmful": asked["harmful"],
        "harmless": asked.get("harmless", ()),
        "reasoning": asked["reasoning"],
        "think": think,
        "reasoning_think": reasoning_think,
    }
    own: Literal["own", "none"] = "none" if response == "none" else "own"
    before = read_model(base, chat, parts=(), response=own, **asking, **reading)
    given: Any = before.written if response == "base" else own
    after = read_model(tuned, chat, parts=(), against=before, response=given, **asking, **reading)
    return before, after


def read_one(
    model: Model,
    chat: ChatFormat,
    asked: Mapping[str, Sequence[Prompt | str]],
    response: Response,
    think: str,
    reasoning_think: str,
    pool: Any,
    max_new_tokens: int,
    max_rows: int,
    progress: bool,
) -> Source:
    """One model on every kind of prompts that there is."""
    pooled, batches = {}, {}
    running: dict[str, Any] = {"max_rows": max_rows, "progress": progress}
    for kind, prompts in asked.items():
        condition = reasoning_think if kind == "reasoning" else think
        batch = render_conditions(chat, named(prompts, kind), [condition])[condition]
        if response != "none":
            batch = generate(model, batch, chat=chat, max_new_tokens=max_new_tokens, **running).batch
        data = capture(model, batch, NeuronActivations(pool=pool), **running)
        pooled[kind] = data["neuron_activation"].transpose("prompt", "layer", "neuron").values
        batches[kind] = batch
    return Source("model", visible(model_facts(model).name), pool, pooled, batches)


def top_prompts(
    source: Source, places: Int[np.ndarray, " neuron"], n_top: int
) -> dict[str, Int[np.ndarray, "rank neuron"]]:
    """Rows of the prompts on which each neuron's pooled activation is largest, of each kind."""
    return {
        kind: np.argsort(-values.reshape(len(values), -1)[:, places], axis=0, kind="stable")[:n_top]
        for kind, values in source.pooled.items()
        if kind in source.batches
    }


def over_tokens(
    model: Model, batch: SpanBatch, row: int, neurons: Sequence[Neuron]
) -> Float[np.ndarray, "neuron pos"]:
    """Activations of these neurons at every token of one prompt."""
    found: np.ndarray = capture(model, batch.select([row]), NeuronsByToken(neurons))[
        "neuron_by_token"
    ].values[0]
    return found


def tokens_of(chat: ChatFormat, batch: SpanBatch, row: int, *, redacted: bool) -> dict[str, Any]:
    """A prompt's tokens as they are shown, and their spans.

    Args:
        chat: The format.
        batch: Prompts.
        row: Which.
        redacted: Whether of what the model wrote only the first words are shown, and the rest withheld.
    """
    one = batch.select([row])
    ids = one.tokens[0].tolist()
    texts = token_texts(chat, ids)
    written = one.n_generated[0] if one.n_generated else 0
    withheld = len(ids)
    if redacted and written:
        start = len(ids) - written
        withheld = start + _of_first_words(chat, ids[start:])
        texts[withheld:] = [WITHHELD] * (len(ids) - withheld)
    return {"tokens": texts, "atoms": one.atoms_of(0), "written": written, "withheld": len(ids) - withheld}


def _of_first_words(chat: ChatFormat, written: Sequence[int]) -> int:
    """How many tokens hold no more than the first words."""
    for stop in range(1, len(written) + 1):
        if first_words(chat.decode(list(written[:stop]))).endswith(" …"):
            return stop - 1
    return len(written)
