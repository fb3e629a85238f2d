"""The last row of a pass taken apart: what was written into its stream, and the score without some of it.

Heads and neurons write vectors into the residual stream. One taken out of the final stream, with the final norm and the
unembedding computed anew, leaves a change that no later layer has had a hand in: its *direct* effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import UnsupportedModel
from rim_lens.hooks.base import Component, Edit, attached
from rim_lens.lens import Model, ModelFacts, Site, hook_name, require_eval, tokenizer_of
from rim_lens.measures.refusal.first_word import Skip, check_answer_is_next, first_words_of
from rim_lens.measures.refusal.openers import opener_ids
from rim_lens.measures.refusal.score import check_skip, log_odds

_MOST_LOGITS = 2**25  # numbers of one unembedding, 128 MiB in float32


class LastRow(Component):
    """Keeps, for each prompt, what stood in the last row of the last pass that read it: the row of its first word.

    Args:
        also: More (site, layer) to keep.

    Attributes:
        kept: By (what, layer), [prompt, ...] in float32: "z" and "attn_out" of each layer, the final "stream", and the
            "sum" of all that was written into it; and whatever else was asked for.
    """

    reads: ClassVar[tuple[Site, ...]] = ("z", "attn_out", "mlp_out", "resid_pre", "resid_post")

    def __init__(self, also: Sequence[tuple[Site, int]] = ()) -> None:
        super().__init__()
        self.also = tuple(also)
        self.kept: dict[tuple[str, int], Tensor] = {}
        self._total = 0

    @override
    def sites(self) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        return (*self.reads, *dict.fromkeys(site for site, _ in self.also if site not in self.reads)), ()

    @override
    def check_prompts(self, batch: SpanBatch) -> None:
        self._total = len(batch)

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        hooks: list[tuple[str, Edit]] = [(hook_name("resid_pre", 0), partial(self._keep, "sum", 0))]
        for layer in range(facts.n_layers):
            hooks += [
                (hook_name("z", layer), partial(self._keep, "z", layer)),
                (hook_name("attn_out", layer), partial(self._add_and_keep, layer)),
                (hook_name("mlp_out", layer), self._add),
            ]
        hooks += [(hook_name(site, layer), partial(self._keep, site, layer)) for site, layer in self.also]
        last = facts.n_layers - 1
        return [*hooks, (hook_name("resid_post", last), partial(self._keep, "stream", last))]

    def _keep(self, what: str, layer: int, tensor: Tensor) -> None:
        row = tensor[:, -1].detach().float().cpu()
        place = self.kept.setdefault((what, layer), torch.zeros(self._total, *row.shape[1:]))
        place[self._members] = row

    def _add(self, tensor: Tensor) -> None:
        self.kept["sum", 0][self._members] += tensor[:, -1].detach().float().cpu()

    def _add_and_keep(self, layer: int, tensor: Tensor) -> None:
        self._keep("attn_out", layer, tensor)
        self._add(tensor)


@dataclass(frozen=True)
class Ending:
    """The last row of every prompt, and what its score is made from.

    Attributes:
        last: What stood there.
        baseline: Refusal score, float64 [prompt].
        ids: Tokens that open a refusal.
        level: The score as final norm and unembedding alone give it, from which changes are counted.
    """

    model: Model
    facts: ModelFacts
    last: LastRow
    baseline: Float[np.ndarray, " prompt"]
    ids: Tensor
    level: Float[np.ndarray, " prompt"]

    def effects(self, written: Float[Tensor, "prompt part d_model"]) -> Float[np.ndarray, "prompt part"]:
        """Direct effect of each part: score without it − score with it, nats; norm and unembedding computed exactly."""
        stream = self.last.kept["stream", self.facts.n_layers - 1]
        without = (stream[:, None] - written).flatten(0, 1).to(self.facts.dtype)
        rows = max(1, _MOST_LOGITS // self.facts.d_vocab)
        scores = [
            log_odds(unembedded(self.model, without[start : start + rows]), self.ids)
            for start in range(0, len(without), rows)
        ]
        return torch.cat(scores).view(written.shape[:2]).numpy() - self.level[:, None]


def read_ending(
    model: Model,
    facts: ModelFacts,
    batch: SpanBatch,
    openers: Iterable[str] | None,
    *,
    skip: Skip,
    whitespace: str | None,
    max_rows: int,
    also: Sequence[tuple[Site, int]] = (),
    what: str,
) -> Ending:
    """Read prompts up to the first word of their answer, and prove that its logits come from the last row alone.

    Raises:
        ConditionError: As `refusal_score`.
        UnsupportedModel: The final stream is not the sum of what the layers write, or more than norm and unembedding follow it.
    """
    check_skip(skip)
    check_answer_is_next(batch, what)
    require_eval(model)
    ids = torch.tensor(opener_ids(tokenizer_of(model), openers))
    last = LastRow(also)
    baseline = np.empty(len(batch))
    logits = torch.empty(len(batch), facts.d_vocab)
    with attached(model, [last], batch, writes=skip == "forced"):
        words = first_words_of(
            model, batch, [last], skip=skip, whitespace=whitespace, max_rows=max_rows, what=what
        )
        for word in words:
            baseline[word.rows] = log_odds(word.logits, ids)
            logits[word.rows] = word.logits.float()
    stream = last.kept["stream", facts.n_layers - 1]
    require_close(
        stream,
        last.kept["sum", 0],
        facts,
        "the final residual stream is not the sum of what the layers write into it (a multiplier, or a norm between layers)",
    )
    kept = unembedded(model, stream.to(facts.dtype))
    require_close(
        kept, logits, facts, "the logits are not final norm and unembedding of the residual stream alone"
    )
    return Ending(model, facts, last, baseline, ids, log_odds(kept, ids).numpy())


def unembedded(model: Model, stream: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    """Logits of rows of the final residual stream."""
    with torch.no_grad():
        device = model.blocks[-1].attn.W_O.device
        logits = model.unembed(model.ln_final(stream[:, None].to(device)))[:, 0].float().cpu()
    cap = getattr(model.cfg, "output_logits_soft_cap", None) or 0.0  # Gemma 2; "none" is None, 0 or -1
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


def require_close(found: Tensor, expected: Tensor, facts: ModelFacts, otherwise: str) -> None:
    """Refuse a model in which a sum does not come out to the precision of its weights."""
    allowed = max(1e-4, 16 * torch.finfo(facts.dtype).eps) * float(expected.abs().max())
    error = float((found - expected).abs().max())
    if not error <= allowed:
        raise UnsupportedModel(
            f"direct effects were asked for, but in this {facts.architecture or 'model'} {otherwise}: they differ by"
            f" {error:.3g}. Use exact ablations (rl.head_effects, rl.neuron_effects) instead."
        )
