"""How cost grows: ``python -m tests.benchmarks.growth`` writes docs/evidence/growth.json and its part of docs/speed.md.

CPU-seconds of this process over sizes that double, on small random models of Qwen3's kind: the slope of their logarithms, beside
that of the multiply-adds that `tests.costs` counts for the same runs. And the memory that RAS of two models takes, in processes
of their own.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

import rim_lens as rl
from rim_lens.measures.entanglement import drift
from rim_lens.measures.entanglement.reading import read_model
from rim_lens.organisms.toy.host import toy_tokenizer
from rim_lens.provenance import provenance
from tests.benchmarks import page
from tests.benchmarks.timing import cpu
from tests.costs import Shape, generation, packed_scan, reading
from tests.peaks import MEGABYTE, peak_of
from tests.small_models import hf_of, model_of, prompts, shape

REPEATS = 2


@dataclass(frozen=True)
class Series:
    """Runs of one kind over sizes of one thing.

    Attributes:
        what: What is run.
        over: What grows.
        sizes: How far.
        promised: It grows by no more than this power.
        made: Size → what to run, and its multiply-adds.
    """

    what: str
    over: str
    sizes: Sequence[int]
    promised: int
    made: Callable[[int], tuple[Callable[[], Any], float]]


_models: dict[Shape, Any] = {}


def model_for(asked: Shape) -> Any:
    """A model, proven once, so that no proof is timed."""
    if asked not in _models:
        _models[asked] = model_of(asked)
        batch, _ = prompts(_models[asked], 4, 24)
        rl.capture(_models[asked], batch, rl.SpanAttention())
        every = [(layer, head) for layer in range(asked.n_layers) for head in range(asked.n_heads)]
        rl.head_effects(rl.refusal_reading(_models[asked], batch, skip="none"), every[-8:])
    return _models[asked]


def captured(asked: Shape, n: int, length: int) -> tuple[Callable[[], Any], float]:
    """A capture of attention on spans."""
    model = model_for(asked)
    batch, told = prompts(model, n, length)
    return lambda: rl.capture(model, batch, rl.SpanAttention()), reading(asked, told)


def scanned(asked: Shape, n: int, length: int, n_heads: int | None = None) -> tuple[Callable[[], Any], float]:
    """Heads ablated one by one at all rows, all of them or some, evenly over the layers."""
    model = model_for(asked)
    batch, told = prompts(model, n, length, shared=length // 2)
    heads = [(layer, head) for layer in range(asked.n_layers) for head in range(asked.n_heads)]
    if n_heads is not None:
        heads = [(layer, head) for layer, head in heads if head < n_heads // asked.n_layers]
    read = rl.refusal_reading(model, batch, skip="none")
    return lambda: rl.head_effects(read, heads), packed_scan(asked, told, [layer for layer, _ in heads])


def written(asked: Shape, n: int, length: int, new: int) -> tuple[Callable[[], Any], float]:
    """Text written over the cache; harmless prompts, whose answers are not cut."""
    model = model_for(asked)
    batch, told = prompts(model, n, length)
    return lambda: rl.generate(model, batch, max_new_tokens=new, keep_text=True), generation(asked, told, new)


BASE = shape(4, 8, 24)
SERIES = (
    Series(
        "capture of span attention",
        "prompts of 48 tokens",
        (16, 32, 64, 128),
        1,
        lambda n: captured(BASE, n, 48),
    ),
    Series(
        "capture of span attention",
        "tokens, 8 prompts",
        (64, 128, 256, 512),
        2,
        lambda n: captured(BASE, 8, n),
    ),
    Series("capture of span attention", "layers", (2, 4, 8), 1, lambda n: captured(shape(n, 8, 24), 32, 48)),
    Series("all heads ablated", "prompts of 48 tokens", (4, 8, 16), 1, lambda n: scanned(BASE, n, 48)),
    Series("all heads ablated", "tokens, 4 prompts", (32, 64, 128), 2, lambda n: scanned(BASE, 4, n)),
    Series("all heads ablated", "layers", (2, 4, 8), 2, lambda n: scanned(shape(n, 8, 24), 4, 48)),
    Series("some heads ablated, in 4 layers", "heads", (8, 16, 32), 1, lambda n: scanned(BASE, 8, 48, n)),
    Series("generation, 16 prompts", "new tokens", (16, 32, 64), 1, lambda n: written(BASE, 16, 24, n)),
)


def slope(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float, float]:
    """Slope of log cost over log size, and its 95 % interval (Student's t, over all runs).

    >>> [round(value, 6) for value in slope([1, 2, 4], [3, 12, 48])]
    [2.0, 2.0, 2.0]
    """
    fitted = stats.linregress(np.log(sizes), np.log(costs))
    half = fitted.stderr * float(stats.t.ppf(0.975, len(sizes) - 2))
    return float(fitted.slope), float(fitted.slope - half), float(fitted.slope + half)


def grown(series: Series) -> dict[str, Any]:
    """Time a series, its sizes in turn and again, so that all see the same machine."""
    made = {size: series.made(size) for size in series.sizes}
    seconds: dict[int, list[float]] = {size: [] for size in series.sizes}
    for _ in range(REPEATS):
        for size, (run, _) in made.items():
            seconds[size].append(cpu(run)[0])
    runs = [(size, one) for size, some in seconds.items() for one in some]
    found, low, high = slope(*zip(*runs, strict=True))
    counted, _, _ = slope(series.sizes, [made[size][1] for size in series.sizes])
    return {
        "what": series.what,
        "over": series.over,
        "sizes": list(series.sizes),
        "promised": series.promised,
        "cpu_seconds": [seconds[size] for size in series.sizes],
        "slope": found,
        "low": low,
        "high": high,
        "counted": counted,
    }


SHARD = 2**24
WIDE = Shape("4 layers, width 1024", 4, 1024, 8, 4, 64, 4096, 71)


def two_models() -> dict[str, Any]:
    """Peak memory of RAS over two models in folders, beside that of reading one, and of holding both."""
    requests = [
        rl.load_prompts(kind, language="toy", split="select")[:12] for kind in ("harmful", "reasoning")
    ]
    running: dict[str, Any] = {"max_new_tokens": 4}
    # The base's weights wait on disk in files of 268 MB, one of which is held at a time: as much smaller as this model is.
    drift._SHARD = SHARD
    # Once on the toy, so that libraries that are imported where they are used are there before anything is measured.
    rl.entanglement("toy", "toy:careful", None, *requests, [(0, 1), (1, 2)], **running)
    with tempfile.TemporaryDirectory(prefix="rim_lens_growth_") as place:
        base, tuned = Path(place) / "base", Path(place) / "tuned"
        hf = hf_of(WIDE)
        for folder in (base, tuned):
            hf.save_pretrained(folder)
            toy_tokenizer().save_pretrained(folder)
            with torch.no_grad():
                for parameter in hf.parameters():
                    parameter.mul_(1.01)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in hf.parameters())
        del hf, parameter

        def read(model: Any, name: str) -> None:
            chat = rl.ChatFormat.from_model(model)
            read_model(model, chat, requests[0], [], requests[1], folder=Path(place) / name, **running)

        def both() -> None:
            neurons = [(layer, neuron) for layer in range(4) for neuron in range(8)]
            rl.entanglement(base, tuned, None, *requests, neurons, folder=Path(place) / "both", **running)

        def one() -> None:
            read(rl.load_model(base), "one")

        def held() -> None:
            for number, model in enumerate([rl.load_model(folder) for folder in (base, tuned)]):
                read(model, f"held-{number}")

        peaks = {
            name: peak_of(run).above * MEGABYTE
            for name, run in (("one", one), ("both", both), ("held", held))
        }
    # Pooled activations of one prompt set and model: what is kept beside the model that is read.
    kept = 2 * sum(map(len, requests)) * WIDE.n_layers * WIDE.d_mlp * 4
    return {"weights": weights, "shard": SHARD, "accumulators": kept, **peaks}


def main(parts: Sequence[str]) -> None:
    """Measure, and write file and page; "memory" alone is measured into what is there."""
    found: dict[str, Any] = provenance("python -m tests.benchmarks.growth", ("torch", "transformer-lens"))
    if "memory" in parts:
        found = json.loads(page.GROWTH.read_text(encoding="utf-8"))
    found["two_models"] = two_models()
    if "memory" not in parts:
        found["series"] = [grown(series) for series in SERIES]
        found["load"] = os.getloadavg()[0]
    if not all(math.isfinite(one["slope"]) for one in found["series"]):
        raise RuntimeError("a slope is not finite")
    page.GROWTH.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page.PAGE.write_text(page.written(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
