"""Readings of given text: how probable the checked answer is, and how far an edit moves next-token predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rim_lens.batching import MAX_ROWS, MAX_TOKENS, micro_batches
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.errors import AnswerError, ConditionError
from rim_lens.hooks.base import Component, attached, bound, describe
from rim_lens.lens import Model, all_logits, model_facts, require_eval, require_finite
from rim_lens.measures.readings import Reading

TEXT = ("request", "cot", "answer")  # whose tokens are text; all others are scaffold
Logits = Float[Tensor, "token d_vocab"]
_MOST_LOGITS = 2**26  # numbers of one pass, 256 MiB in float32


def answer_reading(
    model: Model, batch: SpanBatch, chat: ChatFormat | None = None, max_rows: int = MAX_ROWS
) -> Reading:
    """Read by the log-probability, in nats, of the checked answer as the next words after the block.

    It sees small changes, and costs one pass instead of one per token. It is no accuracy: a model that words its answer
    otherwise ("There are 40 pens") gives the bare answer little probability and may be right. Read its change.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Questions with checked answers, thinking closed.
        chat: The format the batch was rendered with; found from the model when None.
        max_rows: Most prompts in one pass.

    Raises:
        AnswerError: A question has no checked answer.
        ConditionError: The think block is open, or something is answered already.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> asked = rl.load_prompts("reasoning", language="toy", split="select")[:4]
    >>> bool((answer_reading(model, chat.render(asked))() > -0.1).all())
    True
    """
    whole = _answered(model, batch, chat)

    def logprob(rows: Logits, said: Int[Tensor, " token"]) -> float:
        return float(rows.double().log_softmax(dim=-1).gather(1, said[:, None]).sum())

    read = partial(_over_answers, model, whole, logprob, max_rows)
    return Reading(f"answer_logprob({whole.name}, {describe(whole)})", "nats", model, whole, read)


def right_reading(
    model: Model, batch: SpanBatch, chat: ChatFormat | None = None, max_rows: int = MAX_ROWS
) -> Reading:
    """Read by whether the checked answer is what greedy decoding writes next: 1 where each of its tokens is the likeliest, else 0.

    One pass, with editors on every row. An answer worded otherwise counts as wrong (`accuracy_reading` reads what is written);
    tokens alone are compared, so that an answer which goes on ("40" of "400") counts as right.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: See `answer_reading`.
        chat: See there.
        max_rows: Most prompts in one pass.

    Raises:
        AnswerError: See `answer_reading`.
        ConditionError: See there.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> asked = rl.load_prompts("reasoning", language="toy", split="select")[:4]
    >>> right_reading(model, rl.ChatFormat.from_model(model).render(asked))().tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    whole = _answered(model, batch, chat)

    def right(rows: Logits, said: Int[Tensor, " token"]) -> float:
        return float((rows.argmax(dim=-1) == said).all())

    read = partial(_over_answers, model, whole, right, max_rows)
    return Reading(f"answer_right({whole.name}, {describe(whole)})", "share", model, whole, read)


def _answered(model: Model, batch: SpanBatch, chat: ChatFormat | None) -> SpanBatch:
    require_eval(model)
    chat = chat or ChatFormat.from_model(model)
    bare = [prompt.id for prompt in batch.prompts if not prompt.answer]
    if bare:
        raise AnswerError(
            f"{len(bare)} of {len(batch)} prompts have no checked answer (first: {bare[0]!r}); give reasoning questions"
            " (rl.load_prompts('reasoning')), or set Prompt.answer."
        )
    if batch.think == "open" or any(batch.n_generated) or any(batch.answers):
        raise ConditionError(
            f"the checked answer was to be read after {batch.name!r}, where no answer comes next; render the questions with"
            " think='off' or a given chain of thought, and without an answer."
        )
    said = [chat.encode(str(prompt.answer)) for prompt in batch.prompts]
    width = max(map(len, said))
    tokens = torch.tensor([[*ids, *[batch.pad_token_id] * (width - len(ids))] for ids in said])
    written = torch.tensor([[place < len(ids) for place in range(width)] for ids in said])
    return chat.extend(batch, tokens, written)


def _over_answers(
    model: Model,
    whole: SpanBatch,
    number: Callable[[Logits, Int[Tensor, " token"]], float],
    max_rows: int,
    components: Sequence[Component],
) -> Float[np.ndarray, " prompt"]:
    """A number of the rows that predict each prompt's answer, and of its tokens."""
    found = np.empty(len(whole))
    with attached(model, components, whole):
        for group in _groups(model, whole, max_rows):
            with bound(components, whole, group) as part:
                logits = _logits(model, part, "answer_reading")
            for place, row in enumerate(group):
                n = whole.n_generated[row]
                found[row] = number(logits[place, -n - 1 : -1], part.tokens[place, -n:])
    return found


def text_rows(batch: SpanBatch) -> Bool[Tensor, "prompt pos"]:
    """The rows that predict a token of the text (request, chain of thought, answer), and the last row of each prompt."""
    text = torch.stack([batch.spans[atom].cpu() for atom in TEXT]).any(dim=0)
    rows = torch.ones_like(text)
    rows[:, :-1] = text[:, 1:]
    return rows & batch.attention_mask.bool().cpu()


def divergence_reading(model: Model, batch: SpanBatch, max_rows: int = MAX_ROWS) -> Reading:
    """Read by how far edits move next-token predictions on given text: mean KL(plain ‖ edited) per token, in nats.

    The mean is over `text_rows`, everything teacher-forced; 0 with no component.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Rendered texts.
        max_rows: Most prompts in one pass.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> kl = divergence_reading(model, chat.render(["ban bread please + 3 4 6"]))
    >>> float(kl()[0]), bool(kl([rl.AblateHeads([(0, 1)])])[0] > 0)
    (0.0, True)
    """
    require_eval(model)
    rows = text_rows(batch)

    def read(components: Sequence[Component]) -> Float[np.ndarray, " prompt"]:
        found = np.zeros(len(batch))
        for group in _groups(model, batch, max_rows) if components else ():
            part = batch.select(group)
            plain = _logits(model, part, "divergence_reading")
            with attached(model, components, batch, writes=False), bound(components, batch, group):
                edited = _logits(model, part, "divergence_reading")
            for place, row in enumerate(group):
                here = rows[row, -part.tokens.shape[1] :]
                found[row] = float(kl(plain[place, here], edited[place, here]).mean())
        return found

    return Reading(f"divergence({batch.name}, {describe(batch)})", "nats per token", model, batch, read)


def kl(plain: Float[Tensor, "row d_vocab"], edited: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
    """KL(plain ‖ edited) of the next-token distributions, in nats, row by row; in double, and not below 0."""
    p, q = plain.double().log_softmax(dim=-1), edited.double().log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1).clamp(min=0)


def _groups(model: Model, batch: SpanBatch, max_rows: int) -> list[list[int]]:
    at_most = max(1, _MOST_LOGITS // model_facts(model).d_vocab)
    return micro_batches(batch.lengths.tolist(), min(MAX_TOKENS, at_most), max_rows)


def _logits(model: Model, part: SpanBatch, what: str) -> Float[Tensor, "prompt pos d_vocab"]:
    return require_finite(all_logits(model, part.tokens, part.attention_mask), what).cpu()
