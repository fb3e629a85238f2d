"""Prompt records, our own prompt sets, chains of thought for them, and loaders for users' files."""

from rim_lens.prompts.cots import cot_texts, self_statement, statement_texts
from rim_lens.prompts.files import assign_splits, check_splits, load_benchmark, load_file
from rim_lens.prompts.intents import with_intent
from rim_lens.prompts.records import Prompt, as_prompts, prompts_digest, spread
from rim_lens.prompts.sets import load_prompts

__all__ = [
    "Prompt",
    "as_prompts",
    "assign_splits",
    "check_splits",
    "cot_texts",
    "load_benchmark",
    "load_file",
    "load_prompts",
    "prompts_digest",
    "self_statement",
    "spread",
    "statement_texts",
    "with_intent",
]
