"""The hook points rim_lens uses, under the names that live in every TransformerLens family."""

from __future__ import annotations

from typing import Literal

Site = Literal[
    "pattern", "q", "k", "v", "z", "post", "mlp_out", "attn_out", "resid_pre", "resid_mid", "resid_post"
]

EMBEDDING = "hook_embed"  # [batch, pos, d_model], token embeddings before positions are added

_NAMES: dict[str, str] = {
    "pattern": "blocks.{layer}.attn.hook_pattern",  # [batch, head, query, key], after the softmax
    "q": "blocks.{layer}.attn.hook_q",  # [batch, pos, head, d_head], before norms and rotation
    "k": "blocks.{layer}.attn.hook_k",  # [batch, pos, key-value head, d_head], likewise
    "v": "blocks.{layer}.attn.hook_v",  # [batch, pos, key-value head, d_head]
    "z": "blocks.{layer}.attn.hook_z",  # [batch, pos, head, d_head], before W_O
    "post": "blocks.{layer}.mlp.hook_post",  # [batch, pos, neuron], the input of the down-projection
    "mlp_out": "blocks.{layer}.hook_mlp_out",  # [batch, pos, d_model]
    "attn_out": "blocks.{layer}.hook_attn_out",  # [batch, pos, d_model]
    "resid_pre": "blocks.{layer}.hook_resid_pre",  # [batch, pos, d_model]
    "resid_mid": "blocks.{layer}.hook_resid_mid",  # [batch, pos, d_model], between attention and MLP
    "resid_post": "blocks.{layer}.hook_resid_post",  # [batch, pos, d_model]
}


def hook_name(site: Site, layer: int) -> str:
    """Return the hook point's name.

    >>> hook_name("z", 3)
    'blocks.3.attn.hook_z'
    """
    return _NAMES[site].format(layer=layer)
