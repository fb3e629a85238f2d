"""Noticing that a pass reads other prompts than those an editor was given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import WrongHookShape
from rim_lens.hooks.base import Edit
from rim_lens.lens import Attention, Model, RowHook, hook_name, quiet
from rim_lens.lens.sites import EMBEDDING

_ADVICE = " Bind the batch that is read: hand the editor to rl.capture, rl.generate or rl.refusal_score."


class OwnPass:
    """Refuses, at the first layer, a pass of other prompts than an editor's own, or of its prompts in another order.

    No hook point shows token ids, but the embedding's shows what they were turned into: it must be what the model's
    embedding makes of the prompts' own tokens. Later steps under a key-value cache are let through, as they follow a
    prefill that was looked at.

    Args:
        model: The model the editor goes on.
        what: Who asks, for the message.
        prompts: Gives the prompts of the pass under way, None where nobody named any; it may raise then.
        like: Where nobody did: prompts whose shape the pass must have, and whose padding it may not attend to, whatever its
            tokens.
    """

    def __init__(
        self,
        model: Model,
        what: str,
        prompts: Callable[[], SpanBatch | None],
        like: SpanBatch | None = None,
    ) -> None:
        self._model = model
        self._what = what
        self._prompts = prompts
        self._like = like
        self._embedded: Float[Tensor, "prompt pos d_model"] | None = None

    def hooks(self) -> list[tuple[str, Edit]]:
        """Return what looks: at the embedding, and at the attention pattern of layer 0, where it decides."""
        return [(EMBEDDING, self._keep), (hook_name("pattern", 0), RowHook(self._check))]

    def _keep(self, embedded: Float[Tensor, "prompt pos d_model"]) -> None:
        self._embedded = embedded

    def _check(self, seen: Attention) -> None:
        embedded, self._embedded = self._embedded, None
        own = self._prompts()
        batch = own or self._like
        assert batch is not None  # noqa: S101 - without `like`, `prompts` raises
        n_prompts, n_keys = seen.n_prompts, seen.n_keys
        if seen.offset > 0:
            return
        if tuple(batch.tokens.shape) != (n_prompts, n_keys):
            raise WrongHookShape(
                f"{self._what} was given {len(batch)} prompts of {batch.tokens.shape[1]} positions, but this pass has"
                f" {n_prompts} of {n_keys}.{_ADVICE}"
            )
        real = batch.attention_mask.bool().to(seen.device)
        last = torch.zeros(n_prompts, n_keys, dtype=torch.bool)
        last[:, -1] = True
        strayed = ((seen.mean(last).amax(dim=1) > 0) & ~real).any(dim=1).nonzero().flatten().tolist()
        if strayed:
            raise WrongHookShape(
                f"{self._what}: row {strayed[0]} of this pass attends to a position that is padding in the prompts given, so"
                f" the pass is of other prompts or in another order.{_ADVICE}"
            )
        if own is None or embedded is None:  # a pass from residual streams (start_at_layer) embeds nothing
            return
        with quiet(), torch.no_grad():
            expected = self._model.embed(own.tokens.to(embedded.device))
        other = ((embedded != expected).any(dim=-1) & real.to(embedded.device)).nonzero().tolist()
        if other:
            row, pos = other[0]
            raise WrongHookShape(
                f"{self._what}: position {pos} of row {row} of this pass holds another token than prompt"
                f" {batch.prompts[row].id!r} does (so at {len(other)} positions); lengths and padding agree, the prompts or their"
                f" order do not (or a hook changed the embeddings: add it after this editor).{_ADVICE}"
            )
