"""Forward passes, with and without a key-value cache, the same call for every family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rim_lens.errors import ModelError, NotFinite
from rim_lens.lens.facts import Model, model_facts
from rim_lens.lens.sdpa import sdpa_kept, why_not_sdpa

AttentionBy = Literal["auto", "sdpa", "eager"]
# From so many tokens on a pass of whole prompts keeps sdpa: below, nothing is won, and the proof takes a second.
LONG = 256


def all_logits(
    model: Model, tokens: Int[Tensor, "prompt pos"], attention_mask: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt pos d_vocab"]:
    """One forward pass without gradients, logits of every row; long ones by sdpa, as `last_logits`."""
    tokens, attention_mask = _to_device(model, tokens, attention_mask)
    with torch.no_grad(), _attention(model, tokens, "auto"), _letting_patterns_go(model, tokens):
        return model(tokens, attention_mask=attention_mask, return_type="logits")


def last_logits(
    model: Model,
    tokens: Int[Tensor, "prompt pos"],
    attention_mask: Int[Tensor, "prompt pos"],
    gradients: bool = False,
    attention: AttentionBy = "auto",
) -> Float[Tensor, "prompt d_vocab"]:
    """One forward pass, logits of the last row only.

    The unembedding of the other rows is skipped: on a 49 000-word vocabulary it is most of the memory.
    Every hook of every block still fires on every row.

    Args:
        model: Of any family.
        tokens: Whole prompts, padded on the left.
        attention_mask: 0 at padding.
        gradients: Keep the graph.
        attention: "auto": a bridge keeps sdpa in passes of `LONG` tokens and more, where no hook needs whole patterns. "sdpa": it
            does in any; ask `why_not_sdpa` first. "eager": it does not.
    """
    tokens, attention_mask = _to_device(model, tokens, attention_mask)
    with torch.set_grad_enabled(gradients), _attention(model, tokens, attention):
        return _last_row(model, tokens, attention_mask, {})


def _attention(model: Model, tokens: Tensor, by: AttentionBy) -> AbstractContextManager[None]:
    """How attention is computed in a pass with the hooks that are on the model now."""
    if by == "auto":
        long = tokens.shape[1] >= LONG
        by = "sdpa" if long and not why_not_sdpa(model, torch.is_grad_enabled()) else "eager"
    return sdpa_kept(model) if by == "sdpa" else nullcontext()


def _last_row(model: Model, tokens: Tensor, attention_mask: Tensor, extra: dict[str, Any]) -> Tensor:
    if model_facts(model).family == "TransformerBridge":
        with _letting_patterns_go(model, tokens):
            logits = model(
                tokens, attention_mask=attention_mask, return_type="logits", logits_to_keep=1, **extra
            )
        return logits[:, -1]
    residual = model(tokens, attention_mask=attention_mask, stop_at_layer=model.cfg.n_layers, **extra)
    return softcapped(model, model.unembed(final_norm(model, residual[:, -1:])))[:, -1]


def final_norm(
    model: Model, residual: Float[Tensor, "prompt pos d_model"]
) -> Float[Tensor, "prompt pos d_model"]:
    """What a HookedTransformer unembeds."""
    return residual if model.cfg.normalization_type is None else model.ln_final(residual)


def softcapped(
    model: Model, logits: Float[Tensor, "prompt pos d_vocab"]
) -> Float[Tensor, "prompt pos d_vocab"]:
    """A HookedTransformer's logits as it gives them."""
    cap = soft_cap(model.cfg, "output_logits_soft_cap")
    return logits if cap is None else cap * torch.tanh(logits / cap)


def soft_cap(cfg: Any, name: str) -> float | None:
    """A soft cap of Gemma 2's kind in a HookedTransformer's settings, where "none" is None, 0 or -1."""
    cap = getattr(cfg, name, None) or 0.0
    return cap if cap > 0 else None


@contextmanager
def _letting_patterns_go(model: Model, tokens: Tensor) -> Iterator[None]:
    """Keep the bridge from keeping every layer's last pattern.

    Its joint attention (GPT-2, GPT-NeoX) puts the pattern on the module, where nothing reads it: layers × heads × pos² floats in all,
    17 GB for 32 × 32 × 2048². It is dropped as soon as its layer has run.
    """
    handles = []
    if model_facts(model).family == "TransformerBridge" and tokens.shape[1] > 1:
        from transformer_lens.model_bridge.generalized_components import JointQKVAttentionBridge

        attentions = [getattr(block, "attn", None) for block in model.blocks]
        handles = [
            one.register_forward_hook(_forget)
            for one in attentions
            if isinstance(one, JointQKVAttentionBridge)
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forget(module: Any, *_: Any) -> None:
    module._pattern = None


def _to_device(model: Model, *tensors: Tensor) -> list[Tensor]:
    device = model_facts(model).device
    return [tensor.to(device) for tensor in tensors]


class Decoder:
    """A model with a key-value cache: one `prefill`, then one `step` per token.

    Hooks fire at each call; `hook_pattern` has shape [batch, head, 1, keys so far] in a step, so the
    absolute position of a row is keys − queries + its index.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.facts = model_facts(model)
        self._cache: Any = None
        self._mask: Tensor | None = None

    def prefill(
        self, tokens: Int[Tensor, "prompt pos"], attention_mask: Int[Tensor, "prompt pos"]
    ) -> Float[Tensor, "prompt d_vocab"]:
        """Read the prompts; return the logits of the first new token."""
        tokens, mask = _to_device(self.model, tokens, attention_mask)
        self._mask = mask
        if self.facts.family == "TransformerBridge":
            from transformers import DynamicCache

            self._cache = DynamicCache()
        else:
            self._cache = _hooked_cache(self.model, tokens.shape[0])
        return self._forward(tokens, mask)

    def step(self, tokens: Int[Tensor, " prompt"]) -> Float[Tensor, "prompt d_vocab"]:
        """Append one token to every prompt; return the logits of the next."""
        if self._mask is None:
            raise ModelError("step() was called before prefill(); read the prompts first.")
        column = tokens.to(self.facts.device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        return self._forward(column, self._mask)

    def chosen(self, rows: Int[Tensor, " row"], drop: int = 0) -> Decoder:
        """Return a decoder that goes on with some rows, in the order given, repeats allowed; this one stays as it is.

        So several continuations of a prompt are read without reading the prompt again.

        Args:
            rows: Row numbers.
            drop: Leading positions to leave out, all of them padding in these rows.

        Raises:
            ModelError: Nothing was read yet, or a position to be left out holds a token.
        """
        if self._mask is None:
            raise ModelError("chosen() was called before prefill(); read the prompts first.")
        index = rows.to(self._mask.device)
        mask = self._mask[index]
        if drop and bool(mask[:, :drop].any()):
            raise ModelError(f"the first {drop} positions were to be left out, and some of them hold tokens.")
        other = Decoder(self.model)
        other._mask = mask[:, drop:]
        if self.facts.family == "TransformerBridge":
            other._cache = _dynamic_cache(self._cache, index, drop)
        else:
            other._cache = _hooked_cache_of(self._cache, index, drop)
        return other

    def _forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad(), _attention(self.model, tokens, "auto"):
            if self.facts.family == "TransformerBridge":
                positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
                extra = {"past_key_values": self._cache, "use_cache": True, "position_ids": positions}
                return _last_row(self.model, tokens, mask, extra)
            # HookedTransformer keeps the earlier mask in its cache and wants only the new columns'.
            return _last_row(self.model, tokens, mask[:, -tokens.shape[1] :], {"past_kv_cache": self._cache})


def _hooked_cache(model: Model, batch: int) -> Any:
    import transformer_lens

    if hasattr(transformer_lens, "HookedTransformerKeyValueCache"):  # TransformerLens 2
        cache = transformer_lens.HookedTransformerKeyValueCache
    else:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache as cache  # noqa: N813
    return cache.init_cache(model.cfg, model.cfg.device, batch)


def _dynamic_cache(cache: Any, rows: Tensor, drop: int) -> Any:
    from transformers import DynamicCache

    # transformers 4 before 4.54 keeps two lists, later versions a list of layers
    held = (
        [(layer.keys, layer.values) for layer in cache.layers]
        if hasattr(cache, "layers")
        else list(zip(cache.key_cache, cache.value_cache, strict=True))
    )
    copy = DynamicCache()
    for layer, (keys, values) in enumerate(held):
        index = rows.to(keys.device)
        copy.update(keys[index][:, :, drop:], values[index][:, :, drop:], layer)
    return copy


def _hooked_cache_of(cache: Any, rows: Tensor, drop: int) -> Any:
    def taken(tensor: Tensor) -> Tensor:
        return tensor[rows.to(tensor.device)][:, drop:]

    entries = [
        replace(entry, past_keys=taken(entry.past_keys), past_values=taken(entry.past_values))
        for entry in cache.entries
    ]
    return replace(cache, entries=entries, previous_attention_mask=taken(cache.previous_attention_mask))


def require_finite(logits: Tensor, what: str) -> Tensor:
    """Return the logits, or raise NotFinite naming the first bad row."""
    bad = (~torch.isfinite(logits)).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise NotFinite(
            f"{what}: NaN or infinity in the logits of {len(bad)} of {logits.shape[0]} prompts (first: {bad[0]})."
            " Check the weights, or load the model in float32."
        )
    return logits
