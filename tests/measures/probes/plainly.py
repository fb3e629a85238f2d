"""Tokens read one model pass at a time by plain hooks, without a component of rim_lens."""

from __future__ import annotations

from typing import Any

import torch

from rim_lens.chat import SpanBatch


def stream_without(
    model: Any, batch: SpanBatch, layer: int, heads: list[tuple[int, int]] | tuple[()] = ()
) -> torch.Tensor:
    """The stream after a layer [prompt, pos, d_model], in double, with the outputs of heads zeroed."""
    kept: list[torch.Tensor] = []

    def zeroed(head: int) -> Any:
        def hook(z: torch.Tensor, hook: Any) -> torch.Tensor:
            z = z.clone()
            z[:, :, head] = 0
            return z

        return hook

    hooks: list[Any] = [(f"blocks.{its_layer}.attn.hook_z", zeroed(head)) for its_layer, head in heads]
    hooks.append(
        (f"blocks.{layer}.hook_resid_post", lambda stream, hook: kept.append(stream.detach().double()))
    )
    with torch.no_grad():
        model.run_with_hooks(batch.tokens, attention_mask=batch.attention_mask, fwd_hooks=hooks)
    return kept[0]
