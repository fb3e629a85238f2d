"""The only room that knows TransformerLens: facts, loading, attaching and its proof."""

from rim_lens.lens.facts import Head, Hook, Model, ModelFacts, model_facts, require_eval, tokenizer_of
from rim_lens.lens.loading import known_sources, load_model, register_source, wrap_hf

__all__ = [
    "Head",
    "Hook",
    "Model",
    "ModelFacts",
    "known_sources",
    "load_model",
    "model_facts",
    "register_source",
    "require_eval",
    "tokenizer_of",
    "wrap_hf",
]
