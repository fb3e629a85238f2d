"""Receiver heads: heads whose later rows keep looking at a few sentences of a chain of thought (2506.19143, section 4)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from rim_lens.batching import MAX_ROWS, MAX_TOKENS
from rim_lens.capturing import capture
from rim_lens.chat.chat_format import ChatFormat
from rim_lens.chat.sentences import Split, cot_sentences, split_sentences
from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import NotEnoughData, StatisticsError, WrongHookShape
from rim_lens.hooks.base import Edit
from rim_lens.hooks.readers import Reader, Variable
from rim_lens.lens import Model, ModelFacts, Site, hook_name

if TYPE_CHECKING:
    import xarray as xr

# Of three numbers the kurtosis is −1.5, whatever they are; of two −2.
MIN_SCORED = 4


def receiver_kurtosis(
    model: Model,
    batch: SpanBatch,
    *,
    chat: ChatFormat | None = None,
    min_distance: int = 4,
    split: Split = split_sentences,
    max_rows: int = MAX_ROWS,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> xr.Dataset:
    """How much each head's attention within the chain of thought is heaped on few sentences.

    Attention is averaged over pairs of tokens to sentence × sentence; what a sentence receives is the mean of its column
    over sentences at least `min_distance` later (each counts the same, however long), and the kurtosis is that of these
    numbers over the sentences that have any such row (thought anchors, 2506.19143: receiver heads). Kurtosis is the
    excess over a normal distribution, m₄ / m₂² − 3. Everything is reduced inside the hooks.

    What it does not show: that those sentences matter (suppress them: `sentence_effects`), or that the head does (ablate
    it). The number of sentences bounds it from above, so compare heads on the same chains, not chains of unequal
    length. And early sentences are read by rows that have fewer keys to share their attention over: uniform attention is
    not flat here, hence `kurtosis_uniform`.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts with a chain of thought in every row, given or written by the model (``rl.generate(...).batch``).
        chat: The format of the batch; found from the model when None.
        min_distance: Rows fewer sentences later are left out: neighbours are read whatever they say.
        split: How a text is cut into sentences, see `rim_lens.chat.sentences`.
        max_rows: Most prompts in one pass.
        max_tokens: Most tokens in one pass.
        progress: Show a progress bar.

    Returns:
        Dataset with `kurtosis` (prompt, layer, head), `received` (prompt, layer, head, sentence; mean attention per pair of
        tokens), `n_sentences` and `kurtosis_uniform` (prompt; what uniform attention would give). NaN in `received` where
        a sentence has no row far enough behind it, in `kurtosis` of prompts with fewer than `min_distance` + 4 sentences
        (attribute ``n_too_short`` counts them) and of heads that give all sentences the same.

    Raises:
        EmptySpan: Some row has no chain of thought.
        NotEnoughData: No row has enough sentences.
        StatisticsError: `min_distance` is below 1.
    """
    if min_distance < 1:
        raise StatisticsError(
            f"min_distance is {min_distance}; at least 1, as a sentence's own rows do not count."
        )
    chat = chat or ChatFormat.from_model(model)
    found = cot_sentences(chat, batch, split)
    counts = np.array([len(texts) for texts in found.texts])
    enough = counts >= min_distance + MIN_SCORED
    if not enough.any():
        raise NotEnoughData(
            f"the longest of {len(batch)} chains of thought has {counts.max()} sentences; with min_distance={min_distance} a"
            f" kurtosis needs {min_distance + MIN_SCORED}. Take longer chains, a smaller min_distance, or a finer split=."
        )
    reader = _Received(found.index, int(counts.max()), min_distance)
    data = capture(model, batch, reader, max_rows=max_rows, max_tokens=max_tokens, progress=progress)
    # capture takes NaN for a broken model, so the reader gives 0 where there is nothing to read.
    scored = np.arange(counts.max())[None] < (counts - min_distance)[:, None]
    received = np.where(scored[:, None, None], data["received"].values.astype(np.float64), np.nan)
    uniform = np.where(scored, _uniform(batch, reader), np.nan)
    data["received"] = (data["received"].dims, received, data["received"].attrs)
    data["kurtosis"] = (
        ("prompt", "layer", "head"),
        np.where(enough[:, None, None], _kurtosis(received), np.nan),
        {"units": "excess over a normal distribution"},
    )
    data["kurtosis_uniform"] = ("prompt", np.where(enough, _kurtosis(uniform), np.nan))
    data["n_sentences"] = ("prompt", counts)
    data.attrs |= {"min_distance": min_distance, "n_too_short": int((~enough).sum())}
    return data


class _Received(Reader):
    """``received`` (prompt, layer, head, sentence): mean attention per pair of tokens from sentences far enough behind."""

    reads: ClassVar[tuple[Site, ...]] = ("pattern",)

    def __init__(self, sentences: Int[Tensor, "prompt pos"], n_sentences: int, min_distance: int) -> None:
        super().__init__()
        self.sentences = sentences  # cut to the prompts under way, as it has the shape of the batch
        self.n_sentences = n_sentences
        self.min_distance = min_distance

    @override
    def layout(self, facts: ModelFacts, batch: SpanBatch | None) -> list[Variable]:
        shape = facts.n_layers, facts.n_heads, self.n_sentences
        return [
            Variable("received", ("layer", "head", "sentence"), shape, attrs={"units": "mean attention per pair of tokens"})
        ]  # fmt: skip

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        return [
            (hook_name("pattern", layer), partial(self._reduce, layer)) for layer in range(facts.n_layers)
        ]

    def weights(self) -> tuple[Float[Tensor, "prompt row sentence"], Float[Tensor, "prompt key sentence"]]:
        """What each row and each key counts for a sentence; rows of far sentences add up to 1, and so do its keys."""
        numbers = torch.arange(self.n_sentences)
        member = (self.sentences[..., None] == numbers).float()
        keys = member / member.sum(dim=1, keepdim=True).clamp(min=1)
        far = (numbers[:, None] - numbers[None] >= self.min_distance).float()  # [read by, sentence]
        there = member.any(dim=1).float()
        rows = torch.einsum("prs,st->prt", keys, far)
        return rows / torch.einsum("ps,st->pt", there, far)[:, None].clamp(min=1), keys

    def _reduce(self, layer: int, pattern: Float[Tensor, "prompt head query key"]) -> None:
        if pattern.shape[0] != len(self.sentences) or pattern.shape[-2:] != (self.sentences.shape[1],) * 2:
            raise WrongHookShape(
                f"the sentences are of {tuple(self.sentences.shape)} prompts and positions, but this pass has a pattern of"
                f" {tuple(pattern.shape)}; read the whole text in one pass (rl.generate(...).batch)."
            )
        rows, keys = (weight.to(pattern.device) for weight in self.weights())
        on_sentence = torch.einsum("phqk,pks->phqs", pattern.float(), keys)
        self.keep("received", layer, torch.einsum("phqs,pqs->phs", on_sentence, rows))


def _uniform(batch: SpanBatch, reader: _Received) -> Float[np.ndarray, "prompt sentence"]:
    """What each sentence would receive if every row spread its attention evenly over the keys it sees."""
    rows, _ = reader.weights()
    each = 1 / batch.attention_mask.cumsum(dim=1).clamp(min=1)
    return torch.einsum("prs,pr->ps", rows, each).double().numpy()


def _kurtosis(values: Float[np.ndarray, "*any sentence"]) -> Float[np.ndarray, "*any"]:
    """Excess kurtosis along the last axis, NaN entries left out; NaN where all are the same but for rounding."""
    n = np.isfinite(values).sum(axis=-1).clip(min=1)
    mean = np.nansum(values, axis=-1) / n
    away = values - mean[..., None]
    m2, m4 = (np.nansum(away**power, axis=-1) / n for power in (2, 4))
    varied = m2 > (1e-6 * np.abs(mean)) ** 2
    return np.divide(m4, m2**2, out=np.full(m2.shape, np.nan), where=varied) - 3
