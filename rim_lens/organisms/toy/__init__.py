"""The toy organism: two layers, 71 words, trained in a minute, and a chain of thought undoes its refusal."""

from rim_lens.lens.loading import register_source
from rim_lens.organisms.toy.host import TOKEN, toy_model, toy_tokenizer
from rim_lens.organisms.toy.shipped import VARIANTS, load_toy, ship, toy_truth

register_source("toy", load_toy, VARIANTS)

__all__ = ["TOKEN", "VARIANTS", "load_toy", "ship", "toy_model", "toy_tokenizer", "toy_truth"]
