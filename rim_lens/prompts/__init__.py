"""Prompt records, our own prompt sets, and loaders for users' files."""

from rim_lens.prompts.records import Prompt, as_prompts
from rim_lens.prompts.sets import load_prompts

__all__ = ["Prompt", "as_prompts", "load_prompts"]
