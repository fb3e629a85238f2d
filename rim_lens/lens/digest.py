"""A digest of whole weights and settings, so that a result says which model it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch
import xxhash
from torch import Tensor

from rim_lens.lens.attaching import SWITCHED, standing
from rim_lens.lens.facts import Model

# What a configuration says that changes no number of a pass in eval mode. What is not listed here counts.
_IDLE = """
    architecture architectures model_name name_or_path original_architecture tokenizer_name transformers_version trust_remote_code
    attn_implementation chunk_size_feed_forward device dtype n_devices n_params torch_dtype
    checkpoint_index checkpoint_label_type checkpoint_value from_checkpoint init_mode init_weights initializer_range seed
    default_padding_side default_prepend_bos tokenizer_appends_eos tokenizer_prepends_bos
    id2label label2id output_attentions output_hidden_states problem_type return_dict use_cache
    ungroup_grouped_query_attention use_attn_in use_attn_result use_hook_mlp_in use_hook_tokens use_split_qkv_input
"""
# Rotary positions whose frequencies follow the longest prompt so far: their settings tell all that stays.
_FOLLOW = ('"dynamic"', '"longrope"')


def weights_digest(model: Model) -> str:
    """XXH3 over every weight and buffer of a model, whole, with names and shapes, and over the settings its passes go by.

    Settings are those of its configuration (the epsilon of norms, rotary positions, softcaps, windows) but for names, places and
    special tokens. The two families name parameters and settings differently, so a digest compares models of one family, in one
    version of TransformerLens. It tells models apart, and is no seal: every call that names its model reads all of it, and XXH3 reads
    faster than SHA-256. It does not show code that was changed, nor hooks.

    Returns:
        The first 16 hexadecimal digits of 128 bits.
    """
    digest = xxhash.xxh3_128()
    settings = _settings(model)
    digest.update(settings.encode())
    for name, tensor in _tensors(model, with_buffers=not any(kind in settings for kind in _FOLLOW)):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def known_by(model: Model) -> dict[str, Any]:
    """What a result says of its model: the digest of its weights, and the hooks that stand on it, where there are some."""
    hooks = standing(model)
    return {"weights_digest": weights_digest(model), **({"on_the_model": hooks} if hooks else {})}


def _tensors(model: Model, with_buffers: bool) -> Iterator[tuple[str, Tensor]]:
    found = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    if with_buffers:  # also those that are not saved
        found = dict(model.named_buffers()) | found
    # A Hugging Face model that was wrapped before is wrapped again within that: the same model.
    plain = [(name.replace("._original_component", ""), tensor) for name, tensor in sorted(found.items())]
    yield from sorted(plain, key=itemgetter(0))


def _settings(model: Model) -> str:
    """What the configuration says of passes, of the Hugging Face model where there is one."""
    config = getattr(getattr(model, "original_model", model), "config", None)
    told = (model.cfg if config is None else config).to_dict()
    return json.dumps(_counting(told), sort_keys=True, default=repr)


def _counting(told: Any) -> Any:
    """Also of the parts of a configuration that are configurations."""
    if not isinstance(told, dict):
        return told
    idle = {*_IDLE.split(), SWITCHED}  # digests are also taken while another pass keeps sdpa
    return {
        str(name): _counting(value)
        for name, value in told.items()
        if not str(name).startswith("_") and not str(name).endswith("_token_id") and name not in idle
    }
