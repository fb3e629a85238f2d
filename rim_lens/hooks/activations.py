"""Readers of activations pooled over rows: neurons, head outputs, residual stream."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import EmptySpan, SpanError
from rim_lens.hooks.base import Edit
from rim_lens.hooks.positions import Positions, RowOffset, prompt_width, rows_to_read
from rim_lens.hooks.readers import Reader, Variable
from rim_lens.lens import Model, ModelFacts, Site, hook_name

Pool = Literal["max", "mean", "last"]


class _Pooled(Reader):
    """Pool an activation over the chosen rows of each prompt."""

    def __init__(self, site: Site, variable: str, pool: Pool, positions: Positions | None) -> None:
        super().__init__()
        if pool not in ("max", "mean", "last"):
            raise ValueError(f"pool={pool!r} was asked for; there are 'max', 'mean' and 'last'.")
        self.site = site
        self.variable = variable
        self.pool = pool
        self.positions = positions
        self._offset = RowOffset()

    def dims(self, facts: ModelFacts) -> dict[str, int]:
        """Dimensions after (prompt, layer). Override this."""
        raise NotImplementedError

    @override
    def sites(self) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        return ("pattern", self.site), ()

    @override
    def layout(self, facts: ModelFacts, batch: SpanBatch | None) -> list[Variable]:
        if self.site == "post":
            facts.refuse_moe("per-neuron work")
        if batch is not None:
            self._check(batch)
        dims = self.dims(facts)
        where = (
            self.positions
            if isinstance(self.positions, str)
            else ("mask" if self.positions is not None else "all but sink")
        )
        attrs = {"pool": self.pool, "positions": where, "hook": self.site}
        return [Variable(self.variable, ("layer", *dims), (facts.n_layers, *dims.values()), attrs=attrs)]

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        readers: list[tuple[str, Edit]] = [
            (hook_name(self.site, layer), partial(self._reduce, layer)) for layer in range(facts.n_layers)
        ]
        return [self._offset.hook(), *readers]

    def _check(self, batch: SpanBatch) -> None:
        if not self._rows(batch, 0, *batch.tokens.shape).any():
            raise EmptySpan(
                f"{type(self).__name__}(positions={self.positions!r}) has no row in {len(batch)} of {len(batch)} prompts;"
                " a pool over nothing is undefined."
            )

    def _rows(self, batch: SpanBatch | None, offset: int, n_prompts: int, n_rows: int) -> Tensor:
        if batch is None and not isinstance(self.positions, Tensor):
            raise SpanError(
                f"{type(self).__name__} does not know which rows are padding. Pass a mask (positions=batch.spans[...]),"
                " or run it through rl.capture, which binds the batch."
            )
        positions = self.positions
        if positions is None:
            assert batch is not None  # noqa: S101 - told to the type checker: the first branch raised
            positions = ~batch.spans["sink"]
        real = batch.attention_mask.bool() if batch is not None else None
        return rows_to_read(positions, batch, real, offset, n_prompts, n_rows)

    def _reduce(self, layer: int, activation: Float[Tensor, "prompt row ..."]) -> None:
        width = prompt_width(self.positions, self._batch)
        offset = self._offset.at(self.site, layer, activation.shape[1], width)
        rows = self._rows(self._batch, offset, activation.shape[0], activation.shape[1])
        if not rows.any():
            return  # a later step of a generation
        self.keep(self.variable, layer, _pool(activation, rows.to(activation.device), self.pool))


class NeuronActivations(_Pooled):
    """Activation of every MLP neuron, pooled over rows inside the hook.

    Gives ``neuron_activation`` (prompt, layer, neuron), in the model's own units. The neuron is
    `mlp.hook_post`: act(gate)·up in gated MLPs, the input of the down-projection. The paper (section 4)
    max-pools over all tokens of request and response and does not say which tensor; this is the default
    here, and ``site="mlp_out"`` reads the MLP's output instead, as ``mlp_output`` (prompt, layer, d_model).

    A maximum grows with length: compare prompts of like length, or use ``pool="mean"``. A large activation
    does not show that the neuron matters; ablate it.

    Args:
        pool: "max" (the paper), "mean" or "last" over the chosen rows.
        positions: Rows to pool over: None (every token but padding and the sink), a span's name,
            "prompt_last", "generated", or a mask [prompt, pos].
        site: "post" or "mlp_out".

    Raises:
        UnsupportedModel: The MLP is a mixture of experts and site is "post".
        EmptySpan: Some prompt has no row there.
    """

    def __init__(
        self,
        pool: Pool = "max",
        positions: Positions | None = None,
        site: Literal["post", "mlp_out"] = "post",
    ) -> None:
        if site not in ("post", "mlp_out"):
            raise ValueError(f"site={site!r} was asked for; there are 'post' and 'mlp_out'.")
        super().__init__(site, "neuron_activation" if site == "post" else "mlp_output", pool, positions)

    @override
    def dims(self, facts: ModelFacts) -> dict[str, int]:
        return {"neuron": facts.d_mlp} if self.site == "post" else {"d_model": facts.d_model}


class HeadOutputs(_Pooled):
    """z of every head, before W_O, pooled over rows.

    Gives ``head_output`` (prompt, layer, head, d_head). Multiply by ``model.blocks[layer].attn.W_O[head]``
    for what the head writes into the residual stream.

    Args:
        pool: "last", "mean" or "max" over the chosen rows.
        positions: "prompt_last" (default), a span's name, a mask, or None for every token but padding and sink.
    """

    def __init__(self, pool: Pool = "last", positions: Positions | None = "prompt_last") -> None:
        super().__init__("z", "head_output", pool, positions)

    @override
    def dims(self, facts: ModelFacts) -> dict[str, int]:
        return {"head": facts.n_heads, "d_head": facts.d_head}


class ResidualStream(_Pooled):
    """The residual stream after each layer, pooled over rows.

    Gives ``residual`` (prompt, layer, d_model), the tensor of the paper's probes (section 3; it says "MLP
    residual stream", read here as `hook_resid_post`).

    Args:
        pool: "last", "mean" or "max" over the chosen rows.
        positions: "prompt_last" (default), a span's name, a mask, or None for every token but padding and sink.
        site: "resid_post" (default), "resid_pre", "attn_out" or "mlp_out".
    """

    def __init__(
        self,
        pool: Pool = "last",
        positions: Positions | None = "prompt_last",
        site: Literal["resid_post", "resid_pre", "attn_out", "mlp_out"] = "resid_post",
    ) -> None:
        if site not in ("resid_post", "resid_pre", "attn_out", "mlp_out"):
            raise ValueError(
                f"site={site!r} was asked for; there are 'resid_post', 'resid_pre', 'attn_out' and 'mlp_out'."
            )
        super().__init__(site, "residual", pool, positions)

    @override
    def dims(self, facts: ModelFacts) -> dict[str, int]:
        return {"d_model": facts.d_model}


def _pool(activation: Tensor, rows: Tensor, pool: Pool) -> Tensor:
    mask = rows.view(*rows.shape, *([1] * (activation.ndim - 2)))
    if pool == "max":
        return activation.float().masked_fill(~mask, float("-inf")).amax(dim=1)
    if pool == "mean":
        return (activation.float() * mask).sum(dim=1) / mask.sum(dim=1)
    last = rows.shape[1] - 1 - rows.flip(1).int().argmax(dim=1)
    return activation[torch.arange(activation.shape[0], device=activation.device), last].float()
