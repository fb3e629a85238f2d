"""Capture against forward passes of the same tokens: time, and peak memory."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

import rim_lens as rl
from rim_lens.batching import MAX_TOKENS, micro_batches
from rim_lens.chat import SpanBatch
from rim_lens.lens import Model, verify, why_not_sdpa, wrap_hf
from rim_lens.prompts.records import Prompt
from tests.benchmarks.timing import interleaved
from tests.families import random_batch, tokenizer
from tests.peaks import peak_of

N_LAYERS, VOCABULARY = 2, 2048
TOKENS = 2 * MAX_TOKENS  # two passes at short lengths: what a call costs once is a small part of it
LENGTHS = (256, 1024, 4096)
PADDED = 1024  # the length at which prompts of unequal length are run as well
ROUNDS = 5
MEASURED = f"random model of SmolLM2's width (576, 9 heads in 3 groups), {N_LAYERS} layers"


def hf_model(vocabulary: int = VOCABULARY, n_layers: int = N_LAYERS) -> Any:
    """A Llama of SmolLM2-135M's width, of random weights, that computes attention by sdpa."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=n_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


@functools.cache
def models() -> tuple[Model, Any]:
    """A bridge, proven to be readable, and the Hugging Face model of the same weights by sdpa."""
    hf = hf_model()
    model = wrap_hf(copy.deepcopy(hf), tokenizer(), family="bridge")
    verify(model, reads=["pattern"])
    refusal = why_not_sdpa(model)
    assert not refusal, refusal
    return model, hf


def prompts(length: int, padded: bool = False, n_tokens: int = TOKENS) -> SpanBatch:
    """As many random prompts as make so many tokens, all of one length, or from half of it on."""
    batch = random_batch(
        seed=length,
        n_prompts=n_tokens // length,
        shortest=length // 2 if padded else length,
        longest=length,
        vocabulary=VOCABULARY,
    )
    return replace(batch, prompts=tuple(Prompt(id=f"p{row}", text="") for row in range(len(batch))))


class Ways:
    """Every way to run the same prompts, in the same batches."""

    def __init__(self, batch: SpanBatch) -> None:
        self.model, self.hf = models()
        self.batch = batch
        self.parts = [
            (part.tokens, part.attention_mask)
            for part in map(batch.select, micro_batches(batch.lengths.tolist()))
        ]

    def _passes(self, run: Callable[[Tensor, Tensor], Any]) -> None:
        with torch.no_grad():
            for tokens, mask in self.parts:
                run(tokens, mask)

    def plain(self) -> None:
        """The model's forward pass without hooks, with the logits that capture asks for: the last row's."""
        self._passes(lambda tokens, mask: self.model(tokens, attention_mask=mask, logits_to_keep=1))

    def huggingface(self) -> None:
        """The Hugging Face model's forward pass by sdpa, likewise."""
        self._passes(lambda tokens, mask: self.hf(tokens, attention_mask=mask, logits_to_keep=1))

    def cached(self, what: Literal["patterns", "everything"]) -> None:
        """`run_with_cache`, the cache let go after each pass."""
        names = (lambda name: name.endswith("hook_pattern")) if what == "patterns" else None
        self._passes(
            lambda tokens, mask: self.model.run_with_cache(tokens, attention_mask=mask, names_filter=names)
        )

    def captured(self, attention: Literal["sdpa", "eager"]) -> None:
        """`rl.capture` of every head's attention on every span."""
        rl.capture(self.model, self.batch, rl.SpanAttention(), attention=attention)


# What is measured, against what, the goal, and at which lengths; run_with_cache of everything holds 17 GB at 4 096 tokens.
_PAIRS: tuple[tuple[str, str, float | None, tuple[int, ...]], ...] = (
    ("capture", "the same model's forward pass, no hooks", 1.05, LENGTHS),
    ("capture, attention='eager'", "the same model's forward pass, no hooks", 1.05, LENGTHS),
    ("capture", "Hugging Face by sdpa", 1.1, LENGTHS),
    ("capture", "run_with_cache of patterns", None, (1024,)),
    ("capture", "run_with_cache of everything", None, (1024,)),
)


def _runs(ways: Ways) -> dict[str, Callable[[], None]]:
    return {
        "capture": partial(ways.captured, "sdpa"),
        "the same model's forward pass, no hooks": ways.plain,
        "capture, attention='eager'": partial(ways.captured, "eager"),
        "Hugging Face by sdpa": ways.huggingface,
        "run_with_cache of patterns": partial(ways.cached, "patterns"),
        "run_with_cache of everything": partial(ways.cached, "everything"),
    }


def _figures(found: dict[str, float], unit: str, told: str, length: int) -> Iterator[dict[str, Any]]:
    for name, rival, goal, lengths in _PAIRS:
        if length not in lengths or name not in found or rival not in found:
            continue
        if unit == "MB" and goal is not None:  # time and memory have goals of their own
            goal = None if "Hugging Face" in rival else 1.1  # noqa: PLW2901
        ratio = found[name] / found[rival]
        yield {
            "name": name,
            "prompts": told,
            "goal": None if goal is None else f"≤ {goal:g} ×",
            "ratio": ratio,
            "met": None if goal is None else ratio <= goal,
            "value": found[name],
            "rival_value": found[rival],
            "unit": unit,
            "against": rival,
            "measured": MEASURED,
        }


def at(length: int, _: int) -> Iterator[dict[str, Any]]:
    """Time, digest of the weights and labelling included, and peak memory; at 1 024 tokens of padded prompts as well."""
    little = _runs(Ways(prompts(32, n_tokens=64)))
    little["capture"]()  # imports
    for padded in (False, True) if length == PADDED else (False,):
        batch = prompts(length, padded, n_tokens=TOKENS if length < MAX_TOKENS else MAX_TOKENS)
        told = f"{len(batch)} of {f'{int(batch.lengths.min())}–' if padded else ''}{length} tokens"
        wanted = {name for pair in _PAIRS for name in pair[:2] if length in pair[3]}
        if padded:
            wanted = {"capture", "the same model's forward pass, no hooks", "Hugging Face by sdpa"}
        runs = {name: run for name, run in _runs(Ways(batch)).items() if name in wanted}
        yield from _figures(interleaved(runs, ROUNDS), "s", told, length)
        half = _runs(Ways(batch.select(range((len(batch) + 1) // 2))))  # one pass
        found = {name: peak_of(half[name], little[name]).above for name in runs}
        yield from _figures(found, "MB", told, length)
