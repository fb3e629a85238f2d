"""Memory of a capture that is streamed to disk, from 10 to 10 000 prompts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

import rim_lens as rl
from rim_lens.chat import SpanBatch
from rim_lens.lens import wrap_hf
from rim_lens.prompts.records import Prompt
from tests.families import CONTEXT, VOCABULARY, random_batch, tokenizer
from tests.peaks import MEGABYTE, Peak, peak_of

COUNTS = (10, 100, 1_000, 10_000)
READERS = "SpanAttention, NeuronActivations, HeadOutputs and ResidualStream"


def _prompts(count: int) -> SpanBatch:
    batch = random_batch(seed=count, n_prompts=count, shortest=20, longest=40)
    return replace(batch, prompts=tuple(Prompt(id=f"p{row}", text="") for row in range(count)))


def streaming(_: int) -> Iterator[dict[str, Any]]:
    """Peak of the whole process, and how much of that is more than for the fewest prompts."""
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
        )
    )
    model = wrap_hf(hf, tokenizer(), family="bridge")

    def run(batch: SpanBatch, folder: str) -> None:
        readers = rl.SpanAttention(), rl.NeuronActivations(), rl.HeadOutputs(), rl.ResidualStream()
        rl.capture(model, batch, *readers, out=folder, max_rows=10).close()

    found: dict[int, tuple[Peak, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in COUNTS:
            batch, few, here = _prompts(count), _prompts(20), f"{folder}/{count}"
            peak = peak_of(partial(run, batch, here), partial(run, few, f"{here}-first"))
            found[count] = peak, Path(here, "capture.nc").stat().st_size / MEGABYTE
    least, _ = found.pop(COUNTS[0])
    for count, (peak, size) in found.items():
        yield {
            "name": f"capture of {count} prompts, {size:.0f} MB on disk; {peak.above - least.above:.1f} MB more held",
            "prompts": f"{count} of 20–40 tokens, 10 at a time",
            "goal": "≤ 1.1 ×",
            "ratio": peak.whole / least.whole,
            "met": peak.whole / least.whole <= 1.1,
            "value": peak.whole,
            "rival_value": least.whole,
            "unit": "MB",
            "against": f"the same of {COUNTS[0]} prompts",
            "measured": f"the whole process; random Llama of 4 layers and 1 024 neurons each; {READERS}",
        }
