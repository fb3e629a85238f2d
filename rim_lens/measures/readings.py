"""What an edit is read by: any measure of refusal or reasoning as one number per prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any
from uuid import uuid4

import numpy as np
from jaxtyping import Float

from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.chat.spans import require_batch
from rim_lens.errors import AnswerError, ConditionError, StatisticsError
from rim_lens.generation import generate
from rim_lens.hooks.base import Component, describe
from rim_lens.lens import Model
from rim_lens.measures.reasoning import reasoning_accuracy
from rim_lens.measures.refusal.prefixes import refusal_prefix_score
from rim_lens.measures.refusal.score import refusal_score

# Components that are active meanwhile → one number per prompt, in the batch's order
Read = Callable[[Sequence[Component]], Float[np.ndarray, " prompt"]]


_PROCESS = uuid4().hex[:12]


@dataclass(frozen=True, eq=False)
class Reading:
    """A measure, tied to the prompts it is taken on: called with editors, it gives one number per prompt.

    Make one with `refusal_reading`, `prefix_reading`, `refused_reading` or `accuracy_reading`, or from a function of
    your own (a judge's verdicts, a probe's score): ``Reading("mine", "nats", model, batch, function)``.

    Attributes:
        name: The measure with its settings and prompts; numbers that are remembered are found by it.
        units: Of the numbers.
        model: The model that is read.
        batch: The prompts.
        read: The function.
        first_word: Settings of `refusal_score`, where the reading is that score and nothing else; many edits can then be read
            at once.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:4], think="off")
    >>> refused = rl.refused_reading(model, off, max_new_tokens=2)
    >>> refused().tolist(), refused([rl.AblateHeads([(1, 1)])]).tolist()
    ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0])
    """

    name: str
    units: str
    model: Model
    batch: SpanBatch
    read: Read
    first_word: Mapping[str, Any] | None = None

    def __call__(self, components: Sequence[Component] = ()) -> Float[np.ndarray, " prompt"]:
        """Return one number per prompt with these components active; with none, the baseline.

        Raises:
            StatisticsError: The function gave another number of numbers than there are prompts.
        """
        values = np.asarray(self.read(components), dtype=np.float64)
        if values.shape != (len(self.batch),):
            raise StatisticsError(
                f"{self.name} gave numbers of shape {values.shape} for {len(self.batch)} prompts; a reading gives one number"
                " per prompt."
            )
        return values

    def __repr__(self) -> str:
        return f"Reading({self.name}, {self.units})"


def require_reading(reading: object, what: str) -> None:
    """Refuse anything else where a measure tied to prompts is asked for.

    Raises:
        ConditionError: It is no Reading.
    """
    if not isinstance(reading, Reading):
        raise ConditionError(
            f"{what} measures by a reading, and was given a {type(reading).__name__}. Make one of model and prompts first:"
            " rl.refusal_reading(model, batch), or prefix_reading, refused_reading, accuracy_reading."
        )


def refusal_reading(model: Model, batch: SpanBatch, **settings: Any) -> Reading:
    """Read by `refusal_score`: log-odds, in nats, that the answer opens with a refusal.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts whose think block is closed.
        **settings: Of `refusal_score`: openers, skip, whitespace, max_rows.
    """
    settings = _kept(settings)

    def read(components: Sequence[Component]) -> Float[np.ndarray, " prompt"]:
        return refusal_score(model, batch, *components, **settings).values

    return Reading(_name("refusal_score", batch, settings), "nats", model, batch, read, first_word=settings)


def prefix_reading(model: Model, batch: SpanBatch, **settings: Any) -> Reading:
    """Read by `refusal_prefix_score`: beginnings that refuse against beginnings that comply, in nats.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts whose think block is closed.
        **settings: Of `refusal_prefix_score`: refusals, compliances, normalise, skip, whitespace, max_rows.
    """
    settings = _kept(settings)

    def read(components: Sequence[Component]) -> Float[np.ndarray, " prompt"]:
        return refusal_prefix_score(model, batch, *components, **settings).values

    return Reading(_name("refusal_prefix_score", batch, settings), "nats", model, batch, read)


def refused_reading(
    model: Model, batch: SpanBatch, chat: ChatFormat | None = None, max_new_tokens: int = 32, **settings: Any
) -> Reading:
    """Read by what is written: 1 where the reply refuses, in the answer or inside the think block, else 0.

    A reply that does neither counts as 0, so that a fall need not be compliance: look at `refusal_rates` too. It moves
    only where an answer flips; the score in nats sees smaller effects, and costs one pass instead of one per token.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts in any think condition.
        chat: The format the batch was rendered with; found from the model when None.
        max_new_tokens: See `generate`.
        **settings: Of `generate`: max_cot_tokens, close_unfinished, max_rows.
    """
    settings = {"max_new_tokens": max_new_tokens, **settings}

    def read(components: Sequence[Component]) -> Float[np.ndarray, " prompt"]:
        out = generate(model, batch, *components, chat=chat, **settings)
        return np.array([outcome == "refuse" for outcome in out.outcome], dtype=np.float64)

    return Reading(_name("refused", batch, settings), "1 refuses, 0 does not", model, batch, read)


def accuracy_reading(
    model: Model,
    batch: SpanBatch,
    chat: ChatFormat | None = None,
    max_new_tokens: int = 64,
    *,
    extract: Callable[[str], Any] | None = None,
    **settings: Any,
) -> Reading:
    """Read by whether a reasoning question is answered rightly: 1 or 0, see `reasoning_accuracy`.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Questions with checked answers, rendered in any think condition.
        chat: The format the batch was rendered with; found from the model when None.
        max_new_tokens: See `generate`.
        extract: See `reasoning_accuracy`.
        **settings: Of `generate`: max_cot_tokens, close_unfinished, max_rows.

    Raises:
        AnswerError: A question has no checked answer.
    """
    bare = [prompt.id for prompt in batch.prompts if prompt.answer is None]
    if bare:
        raise AnswerError(
            f"accuracy was asked for, and {len(bare)} of {len(batch)} prompts have no checked answer (first: {bare[0]!r});"
            " give reasoning questions (rl.load_prompts('reasoning')), or set Prompt.answer."
        )
    settings = {"max_new_tokens": max_new_tokens, **settings}

    def read(components: Sequence[Component]) -> Float[np.ndarray, " prompt"]:
        out = generate(model, batch, *components, chat=chat, **settings)
        return reasoning_accuracy(out, extract=extract).rows["correct"].to_numpy(dtype=np.float64)

    told = settings if extract is None else {**settings, "extract": function_name(extract)}
    return Reading(_name("correct", batch, told), "1 right, 0 wrong", model, batch, read)


def function_name(function: Callable[..., Any]) -> str:
    """A name that two functions share only where they do the same, so that numbers by the one are never taken for the other's.

    Its qualified name with a digest of its code, constants, defaults and what it closes over. Something callable that is no
    function has a name of this process alone, and is measured anew in another.

    >>> function_name(lambda text: text[0]) == function_name(lambda text: text[1])
    False
    """
    code = getattr(function, "__code__", None)
    if code is None:
        return f"{type(function).__qualname__} {_PROCESS}-{id(function)}"
    closed = [repr(cell.cell_contents) for cell in getattr(function, "__closure__", None) or ()]
    told = [*_code(code), repr(getattr(function, "__defaults__", None)), *closed]
    return f"{function.__qualname__}:{hashlib.sha256(repr(told).encode()).hexdigest()[:12]}"


def _code(code: CodeType) -> list[str]:
    """What a function does, without where it stands."""
    constants = [
        part for one in code.co_consts for part in (_code(one) if isinstance(one, CodeType) else [repr(one)])
    ]
    return [code.co_code.hex(), repr(code.co_names), *constants]


def _name(measure: str, batch: SpanBatch, settings: dict[str, Any]) -> str:
    require_batch(batch, measure)
    told = [f"{name}={describe(value)}" for name, value in sorted(settings.items()) if name != "max_rows"]
    return f"{measure}({', '.join([f'{batch.name}, {describe(batch)}', *told])})"


def _kept(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that can be used again and again: what would run dry is made a tuple."""
    return {
        name: tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
        for name, value in settings.items()
    }
