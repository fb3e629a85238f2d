"""Scans over heads against the loop everyone writes: `run_with_hooks` once per head."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import rim_lens as rl
from rim_lens.chat import SpanBatch
from rim_lens.lens import Head, Model, hook_name, model_facts, verify
from rim_lens.lens.loading import Family
from rim_lens.measures.refusal.openers import opener_ids
from rim_lens.measures.refusal.score import log_odds
from tests.benchmarks.timing import cpu
from tests.costs import Asked, Shape, packed_scan, reading
from tests.small_models import n_shared

SYSTEM = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face to help people with what they ask."
)


SAMPLE = 2  # heads that the loop is timed on, half of them before and half after
N_CONFIRM = 38  # keeps a mean recall of .95 in the three models of recall.py, in this reading


def zeroed(z: Tensor, hook: Any, head: int, rows: slice) -> Tensor:
    z = z.clone()
    z[:, rows, head] = 0
    return z


class Loop:
    """What everyone writes: `run_with_hooks` once per head, full batch, the answer's first word read off the logits."""

    def __init__(self, model: Model, batch: SpanBatch, last_only: bool) -> None:
        self.model, self.batch = model, batch
        self.rows = slice(-1, None) if last_only else slice(None)
        self.ids = torch.tensor(opener_ids(model.tokenizer))
        self.seconds: list[float] = []
        self.scores: dict[Head, np.ndarray] = {}

    def run(self, head: Head) -> None:
        """Time one head."""
        seconds, self.scores[head] = cpu(partial(self._score, head))
        self.seconds.append(seconds)

    def _score(self, head: Head) -> np.ndarray:
        hooks = [(hook_name("z", head[0]), partial(zeroed, head=head[1], rows=self.rows))]
        with torch.no_grad():
            logits = self.model.run_with_hooks(
                self.batch.tokens,
                attention_mask=self.batch.attention_mask,
                return_type="logits",
                fwd_hooks=hooks,
            )
            return log_odds(logits[:, -1], self.ids).numpy()


def spread(heads: Sequence[Head], n_layers: int, count: int) -> list[Head]:
    """Some heads, evenly over layers, so that their mean layer is that of all."""
    n_heads = len(heads) // n_layers
    layers = [round((place + 0.5) * n_layers / count - 0.5) for place in range(count)]
    return [(layer, (5 * place + 2) % n_heads) for place, layer in enumerate(layers)]


def of_all_lengths(chat: rl.ChatFormat, n_prompts: int) -> SpanBatch:
    """Requests and questions whose prompts have 50 to 70 tokens, about half of them shared; all lengths alike often."""
    asked = [prompt for kind in ("harmful", "reasoning") for prompt in rl.load_prompts(kind, language="en")]
    rendered = chat.render(asked, think="off", system=SYSTEM)
    lengths = rendered.lengths.tolist()
    fitting = [place for place, length in enumerate(lengths) if 50 <= length <= 70]
    targets = np.linspace(50, 70, n_prompts)
    chosen: list[int] = []
    for target in targets:
        left = [place for place in fitting if place not in chosen]
        chosen.append(min(left, key=lambda place: abs(lengths[place] - target)))
    return chat.render([asked[place] for place in chosen], think="off", system=SYSTEM)


def different_from_the_first(batch: SpanBatch) -> SpanBatch:
    """The same prompts with another first token in each, so that they share nothing."""
    tokens = batch.tokens.clone()
    for row, start in enumerate((tokens.shape[1] - batch.lengths).tolist()):
        tokens[row, start] = 1000 + row
    return replace(batch, tokens=tokens)


SHAPE = Shape("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, tied=True)


def counted_loop(batch: SpanBatch) -> float:
    """Multiply-adds of the loop on one head: prompts padded to the longest, every row unembedded."""
    n, longest = len(batch), int(batch.lengths.max())
    return reading(SHAPE, Asked(n, longest)) + n * (longest - 1) * SHAPE.word


def counted_gradients(batch: SpanBatch) -> float:
    """Multiply-adds of one pass up and one down, which gives weights no gradients."""
    return 2 * reading(SHAPE, Asked(len(batch), round(float(batch.lengths.float().mean()))))


def counted_scan(batch: SpanBatch, layers: Sequence[int], last_row: bool) -> float:
    """Multiply-adds of a packed scan, for edits of one head in each of these layers."""
    length = round(float(batch.lengths.float().mean()))
    return packed_scan(SHAPE, Asked(len(batch), length, n_shared(batch)), layers, last_row)


def scan(model: Model, batch: SpanBatch, name: str, goal: float, positions: str) -> dict[str, Any]:
    """All heads by `head_effects`, against the loop over a few."""
    heads = model_facts(model).heads()
    looped = [heads[round((place + 0.5) * len(heads) / SAMPLE)] for place in range(SAMPLE)]
    loop = Loop(model, batch, positions == "prompt_last")
    scored = rl.refusal_reading(model, batch, skip="none", max_rows=len(batch))
    for head in looped[: SAMPLE // 2]:
        loop.run(head)
    seconds, found = cpu(lambda: rl.head_effects(scored, heads, positions=positions))
    for head in looped[SAMPLE // 2 :]:
        loop.run(head)
    rival = float(np.mean(loop.seconds)) * len(heads)
    largest = max(
        (
            float(np.abs(found["baseline"] + found.sel(set=f"L{layer}H{head}") - score).max())
            for (layer, head), score in loop.scores.items()
        )
    )
    shared = n_shared(batch)
    layers = [layer for layer, _ in heads]
    return {
        "counted": len(layers)
        * counted_loop(batch)
        / counted_scan(batch, layers, last_row=positions == "prompt_last"),
        "name": name,
        "goal": f"≥ {goal:g} ×",
        "ratio": rival / seconds,
        "met": rival / seconds >= goal,
        "against": "run_with_hooks once per head",
        "cpu_seconds": seconds,
        "rival_cpu_seconds": rival,
        "measured": f"{len(heads)} heads, the loop on {len(loop.seconds)}",
        "prompts": f"{len(batch)} of {int(batch.lengths.min())}–{int(batch.lengths.max())} tokens, {shared} shared",
        "largest_difference_nats": largest,
        "scan": found.attrs["scan"],
    }


def prefilter(model: Model, batch: SpanBatch, n_confirm: int, goal: float) -> dict[str, Any]:
    """Gradients rank, the first of them are ablated, against the loop over all heads."""
    facts = model_facts(model)
    looped = spread(facts.heads(), facts.n_layers, SAMPLE)
    loop = Loop(model, batch, last_only=False)
    scored = rl.refusal_reading(model, batch, skip="none", max_rows=len(batch))
    for head in looped[: SAMPLE // 2]:
        loop.run(head)
    estimating, estimates = cpu(lambda: rl.gradient_scores(model, batch, skip="none"))
    seconds, found = cpu(lambda: rl.prefiltered(scored, model, batch, n_confirm, estimates=estimates))
    for head in looped[SAMPLE // 2 :]:
        loop.run(head)
    rival = float(np.mean(loop.seconds)) * len(facts.heads())
    layers = np.argwhere(found["status"].values == "confirmed")[:, 0].tolist()
    return {
        "counted": len(facts.heads())
        * counted_loop(batch)
        / (counted_gradients(batch) + counted_scan(batch, layers, last_row=False)),
        "name": f"gradients, then {n_confirm} heads and layer 0 confirmed",
        "goal": f"≥ {goal:g} ×",
        "ratio": rival / (seconds + estimating),
        "met": rival / (seconds + estimating) >= goal,
        "against": "run_with_hooks once per head",
        "cpu_seconds": seconds + estimating,
        "rival_cpu_seconds": rival,
        "measured": f"{found.attrs['n_tested']} heads confirmed, {estimating:.0f} s of it gradients; the loop on"
        f" {len(loop.seconds)}",
        "prompts": f"{len(batch)} of {int(batch.lengths.min())}–{int(batch.lengths.max())} tokens, {n_shared(batch)} shared",
        "largest_difference_nats": None,
        "scan": found.attrs["scan"],
    }


@functools.cache
def prepared(n_prompts: int, family: Family = "auto") -> tuple[Model, SpanBatch]:
    """The model, proven for edits of heads (once per model and process, before any scan), and prompts."""
    model = rl.load_model("smollm2", family=family)
    verify(model, reads=["pattern"], edits=["z"])
    return model, of_all_lengths(rl.ChatFormat.from_model(model), n_prompts)


def _on(family: Family) -> str:
    return " on a HookedTransformer" if family == "hooked" else ""


def last_row(n_prompts: int, family: Family = "auto") -> Iterator[dict[str, Any]]:
    """Ablation at the last row of the prompt, every head."""
    model, batch = prepared(n_prompts, family)
    name = f"last row of the prompt{_on(family)}"
    yield scan(model, batch, name, 80, "prompt_last")


def all_rows(n_prompts: int, family: Family = "auto") -> Iterator[dict[str, Any]]:
    """Ablation at all rows, every head."""
    model, batch = prepared(n_prompts, family)
    name = f"all rows, half of them shared{_on(family)}"
    yield scan(model, batch, name, 6, "all")


def all_rows_apart(n_prompts: int) -> Iterator[dict[str, Any]]:
    """The same where prompts share nothing."""
    model, batch = prepared(n_prompts)
    yield scan(model, different_from_the_first(batch), "all rows, nothing shared", 3, "all")


def gradients(n_prompts: int) -> Iterator[dict[str, Any]]:
    """Gradients first, then the heads they rank highest."""
    model, batch = prepared(n_prompts)
    yield prefilter(model, batch, N_CONFIRM, 25)
