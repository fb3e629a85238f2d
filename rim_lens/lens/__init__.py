"""The only room that knows TransformerLens: facts, loading, attaching and its proof, running."""

from rim_lens.lens.adapters import adapter_base, is_adapter, merge_adapter
from rim_lens.lens.attaching import ComponentHook, add_hooks, hooked, is_quiet, quiet, standing, verify
from rim_lens.lens.attention import Attention, RowHook
from rim_lens.lens.digest import known_by, weights_digest
from rim_lens.lens.facts import Head, Hook, Model, ModelFacts, model_facts, require_eval, tokenizer_of
from rim_lens.lens.loading import known_sources, load_model, load_plain, register_source, wrap_hf
from rim_lens.lens.running import AttentionBy, Decoder, all_logits, last_logits, require_finite
from rim_lens.lens.sdpa import sdpa_kept, why_not_sdpa
from rim_lens.lens.sites import Site, hook_name
from rim_lens.lens.sources import is_path, require_source, same_source, source_digest

__all__ = [
    "Attention",
    "AttentionBy",
    "ComponentHook",
    "Decoder",
    "Head",
    "Hook",
    "Model",
    "ModelFacts",
    "RowHook",
    "Site",
    "adapter_base",
    "add_hooks",
    "all_logits",
    "hook_name",
    "hooked",
    "is_adapter",
    "is_path",
    "is_quiet",
    "known_by",
    "known_sources",
    "last_logits",
    "load_model",
    "load_plain",
    "merge_adapter",
    "model_facts",
    "quiet",
    "register_source",
    "require_eval",
    "require_finite",
    "require_source",
    "same_source",
    "sdpa_kept",
    "source_digest",
    "standing",
    "tokenizer_of",
    "verify",
    "weights_digest",
    "why_not_sdpa",
    "wrap_hf",
]
