"""What later text and the answer owe to one sentence of a chain of thought: suppress attention to it and look."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from rim_lens.batching import MAX_ROWS
from rim_lens.chat.chat_format import ChatFormat
from rim_lens.chat.sentences import Sentences, Split, cot_sentences, split_sentences
from rim_lens.chat.spans import SpanBatch, require_batch
from rim_lens.errors import ConditionError
from rim_lens.hooks import BlockAttention, bound
from rim_lens.hooks.base import attached
from rim_lens.lens import Model, all_logits, model_facts, require_eval, require_finite
from rim_lens.measures.refusal.score import refusal_score
from rim_lens.outcomes import first_words

if TYPE_CHECKING:
    import xarray as xr

FLOOR = 1e-12  # nats; rounding of float32 logits gives about as much
_MOST_LOGITS = 2**26  # numbers of one pass, 256 MiB in float32


def sentence_effects(
    model: Model,
    batch: SpanBatch,
    *,
    chat: ChatFormat | None = None,
    split: Split = split_sentences,
    refusal: bool = True,
    openers: Iterable[str] | None = None,
    keep_text: bool = False,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> xr.Dataset:
    """Suppress attention to each sentence of the chain of thought in turn, and measure what changes after it.

    In all heads of all layers, every row after the sentence loses its keys (`BlockAttention`, renormalised), the text
    itself staying as it is (thought anchors, 2506.19143, section 5). For each later sentence the mean over its
    tokens of log KL(original ‖ suppressed), in log nats, natural logarithm, KL floored at 1e-12. A token is predicted
    by the row before it; the one right after the suppressed sentence is left out, as the row that predicts it is the
    sentence's own.

    The text is teacher-forced: a large effect says that the predictions of this very text lean on the sentence, not
    that the model would think or answer otherwise without it. Later sentences differ in how predictable they are:
    compare within a column (`read`), or subtract its mean, as the paper does.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts with a chain of thought in every row, given or written by the model.
        chat: The format of the batch; found from the model when None.
        split: How a text is cut into sentences, see `rim_lens.chat.sentences`.
        refusal: Measure the change of `refusal_score` at the answer as well; needs prompts that end where it begins.
        openers: Texts that refusals begin with, see `refusal_score`.
        keep_text: Keep the sentences that the model itself wrote to harmful requests; else the first words alone.
        max_rows: Most prompts in one pass, a copy with a sentence suppressed being one.
        progress: Show a progress bar.

    Returns:
        Dataset with `log_kl` (prompt, suppressed, read), `n_tokens` and `text` (prompt, suppressed) and, with `refusal`,
        `refusal_score` (prompt) and `refusal_effect` (prompt, suppressed), suppressed − original in nats. NaN where a
        row has no such sentence, or where nothing of the sentence read is predicted by a row that was edited.

    Raises:
        EmptySpan: Some row has no chain of thought.
        ConditionError: `refusal` for prompts that hold an answer already, or an open think block; or prompts are not rendered.
        NotFinite: NaN or infinity in the logits.
    """
    import xarray as xr

    require_eval(model)
    require_batch(batch, "sentence_effects")
    chat = chat or ChatFormat.from_model(model)
    if refusal and (batch.think == "open" or any(batch.n_generated) or any(batch.answers)):
        raise ConditionError(
            "sentence_effects was asked for the refusal score of prompts that do not end where an answer begins. Render the"
            " reasoning as given (chat.render(requests, think=list(batch.cots))), or pass refusal=False."
        )
    found = cot_sentences(chat, batch, split)
    most = max(map(len, found.texts))
    shape = (len(batch), most)
    log_kl = np.full((*shape, most), np.nan)
    effect = np.full(shape, np.nan)
    n_tokens = np.zeros(shape, dtype=np.int64)
    text = np.full(shape, "", dtype=object)
    baseline = refusal_score(model, batch, openers=openers, max_rows=max_rows).values if refusal else None
    for row in tqdm(range(len(batch)), desc=f"sentences {batch.name}", disable=not progress):
        n = len(found.texts[row])
        # Of what the model itself wrote to a harmful request, the first words are kept and no more.
        written = batch.n_generated[row] if batch.n_generated else 0
        hide = batch.prompts[row].kind == "harmful" and written > 0 and not keep_text
        text[row, :n] = [first_words(found.texts[row][0]), *["…"] * (n - 1)] if hide else found.texts[row]
        n_tokens[row, :n] = [int(found.mask(sentence)[row].sum()) for sentence in range(n)]
        log_kl[row, :n, :n] = _log_kl(model, batch, found, row, max_rows)
        if baseline is not None:
            copies = batch.select([row] * n)
            editor = BlockAttention("later", _masks(found, row, n, copies.tokens.shape[1]))
            scores = refusal_score(model, copies, editor, openers=openers, max_rows=max_rows).values
            effect[row, :n] = scores - baseline[row]
    data: dict[str, object] = {
        "log_kl": (
            ("prompt", "suppressed", "read"),
            log_kl,
            {"units": "log nats", "direction": "original || suppressed", "floor": FLOOR},
        ),
        "n_tokens": (("prompt", "suppressed"), n_tokens),
        "text": (("prompt", "suppressed"), text.astype(str)),
    }
    if baseline is not None:
        data["refusal_score"] = (("prompt",), baseline, {"units": "nats"})
        data["refusal_effect"] = (("prompt", "suppressed"), effect, {"units": "nats"})
    return xr.Dataset(
        data,
        coords={
            "prompt": [prompt.id for prompt in batch.prompts],
            "suppressed": range(most),
            "read": range(most),
        },
        attrs={"condition": batch.name, "chat_format": batch.format},
    )


def _masks(found: Sentences, row: int, n: int, width: int) -> Bool[Tensor, "sentence pos"]:
    return found.index[row, -width:][None] == torch.arange(n)[:, None]


def _log_kl(
    model: Model, batch: SpanBatch, found: Sentences, row: int, max_rows: int
) -> Float[np.ndarray, "suppressed read"]:
    """Mean log KL over the tokens of each later sentence, one prompt."""
    n = len(found.texts[row])
    result = np.full((n, n), np.nan)
    alone = batch.select([row])
    width = alone.tokens.shape[1]
    original = _checked(all_logits(model, alone.tokens, alone.attention_mask))[0]
    masks = _masks(found, row, n, width)
    owner = found.index[row, -width:]
    per_pass = max(1, min(max_rows, _MOST_LOGITS // (width * model_facts(model).d_vocab)))
    for start in range(0, n, per_pass):
        chosen = list(range(start, min(start + per_pass, n)))
        copies = batch.select([row] * len(chosen))
        editor = BlockAttention("later", masks[chosen])
        with attached(model, [editor], copies), bound([editor], copies):
            edited = _checked(all_logits(model, copies.tokens, copies.attention_mask))
        for place, sentence in enumerate(chosen):
            last = int(masks[sentence].nonzero().max())
            tokens = ((owner > sentence) & (torch.arange(width) > last + 1)).nonzero().flatten()
            kl = _kl(original[tokens - 1], edited[place, tokens - 1]).clamp(min=FLOOR).log().cpu()
            for read in sorted(set(owner[tokens].tolist())):
                result[sentence, read] = float(kl[owner[tokens] == read].mean())
    return result


def _kl(
    original: Float[Tensor, "row d_vocab"], edited: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, " row"]:
    p, q = original.double().log_softmax(dim=-1), edited.double().log_softmax(dim=-1)
    return (p.exp() * (p - q)).sum(dim=-1)


def _checked(logits: Float[Tensor, "prompt pos d_vocab"]) -> Float[Tensor, "prompt pos d_vocab"]:
    return require_finite(logits, "sentence_effects")
