"""What large models take: ``python -m tests.sizing`` writes docs/sizing.md from counts that are held against small models here.

Nothing of a large model is run. Multiply-adds of `tests.costs` are held against those that torch counts while our code runs on
small random models, seconds against the speed of a matrix product at that moment, bytes against the peak of a process.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import rim_lens as rl
from rim_lens.provenance import provenance
from rim_lens.study.planning import memory_beside
from tests.costs import Asked, Shape, generation, packed_scan, plain_scan, reading
from tests.peaks import MEGABYTE, peak_of
from tests.small_models import model_of, prompts, shape

PAGE = Path(__file__).resolve().parents[1] / "docs" / "sizing.md"
EVIDENCE = PAGE.parent / "evidence" / "sizing.json"
GB = 1e9

# From the models' published config.json: layers, hidden size, heads, key-value heads, head size, MLP (of one expert), vocabulary
LARGE = (
    Shape("Qwen3-4B", 36, 2560, 32, 8, 128, 9728, 151936, tied=True),
    Shape("Qwen3-8B", 36, 4096, 32, 8, 128, 12288, 151936),
    Shape("Qwen3-32B", 64, 5120, 64, 8, 128, 25600, 151936),
    Shape("Qwen3-30B-A3B", 48, 2048, 32, 4, 128, 768, 151936, n_experts=128, n_active=8),
)
ASKED = Asked(64, 75, 40)
NEW = 64
MAX_ROWS = 64
# Assumed, and not measured by us: what a data-centre accelerator of 2023 sustains
BF16, FP32, BYTES = 300e12, 40e12, 2.5e12

SMALL = (shape(6, 8, 32), shape(10, 4, 48))
KINDS = {
    "capture": "capture of attention, all prompts once",
    "plain": "plain scan, 4 heads and the baseline",
    "packed": "packed scan of all heads, all rows",
    "last": "packed scan of all heads, last row",
    "generation": "16 new tokens",
}


def heads_of(shape: Shape) -> list[tuple[int, int]]:
    """Every head, layer by layer."""
    return [(layer, head) for layer in range(shape.n_layers) for head in range(shape.n_heads)]


def runs(shape: Shape, model: Any, batch: Any, asked: Asked) -> dict[str, tuple[Callable[[], Any], float]]:
    """What is run of each kind, and its multiply-adds as counted by hand."""
    heads = heads_of(shape)
    layers = [layer for layer, _ in heads]
    read = rl.refusal_reading(model, batch, skip="none")
    return {
        "capture": (lambda: rl.capture(model, batch, rl.SpanAttention()), reading(shape, asked)),
        "plain": (lambda: rl.head_effects(read, heads[:4], scan="plain"), plain_scan(shape, asked, 4)),
        "packed": (lambda: rl.head_effects(read, heads), packed_scan(shape, asked, layers)),
        "last": (
            lambda: rl.head_effects(read, heads, positions="prompt_last"),
            packed_scan(shape, asked, layers, last_row=True),
        ),
        "generation": (lambda: rl.generate(model, batch, max_new_tokens=16), generation(shape, asked, 16)),
    }


def counted(run: Callable[[], Any]) -> float:
    """Multiply-adds as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    # torch counts fused attention on a GPU alone.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    fused = {on_cpu: lambda query, key, value, *_, out_shape=None, **__: sdpa_flop_count(query, key, value)}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        run()
    return counter.get_total_flops() / 2


def product_speed(shape: Shape, rows: int) -> float:
    """Multiply-adds a CPU-second of a product of the MLP's shape; the best of a few."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(*size, generator=generator)
        for size in ((rows, shape.d_model), (shape.d_model, shape.d_mlp))
    )
    spent = []
    for _ in range(5):
        begun = time.process_time()
        for _ in range(4):
            left @ right
        spent.append((time.process_time() - begun) / 4)
    return rows * shape.d_model * shape.d_mlp / min(spent)


def checked(asked_of: Shape) -> list[dict[str, Any]]:
    """Each kind on a small model: multiply-adds by hand and by torch, seconds by the speed of a product and by the clock."""
    model = model_of(asked_of)
    batch, asked = prompts(model, 8, 64, 24)
    found = []
    for kind, (run, by_hand) in runs(asked_of, model, batch, asked).items():
        run()  # proofs of hooks are done once, and are no part of it
        by_torch = counted(run)
        speed = product_speed(asked_of, asked.n * asked.length)
        begun = time.process_time()
        run()
        found.append(
            {
                "shape": asked_of.name,
                "kind": kind,
                "by_hand": by_hand,
                "by_torch": by_torch,
                "predicted_seconds": by_hand / speed,
                "cpu_seconds": time.process_time() - begun,
            }
        )
    return found


def remembered(asked_of: Shape) -> list[dict[str, Any]]:
    """Peak memory beside the weights of a full pass, and of writing, by the plan's formula and as it was."""
    model = model_of(asked_of)
    batch, asked = prompts(model, 64, 64, 24)
    parts: dict[str, Callable[[], Any]] = {
        "capture": lambda: rl.capture(model, batch, rl.SpanAttention()),
        "generation": lambda: rl.generate(model, batch, max_new_tokens=8),
    }
    for run in parts.values():
        rl.capture(model, batch.select([0, 1]), rl.SpanAttention())
        del run
    predicted = memory_beside(asked_of, 4, max_rows=MAX_ROWS, length=asked.length)
    return [
        {"shape": asked_of.name, "kind": kind, "predicted": predicted, "peak": peak_of(run).above * MEGABYTE}
        for kind, run in parts.items()
    ]


def seconds_of(shape: Shape) -> dict[str, float]:
    """Of each kind on a large model, under the assumed speeds: what is computed, or the weights that a step reads."""
    layers = [layer for layer, _ in heads_of(shape)]
    # Experts are fused for 64 rows, of which each takes its own: nearly all of them are read at every step.
    weights = shape.parameters * 2
    steps = (NEW - 1) * weights / BYTES
    return {
        "capture": 2 * reading(shape, ASKED) / BF16,
        "plain": 2 * plain_scan(shape, ASKED, len(layers)) / FP32,
        "packed": 2 * packed_scan(shape, ASKED, layers) / FP32,
        "last": 2 * packed_scan(shape, ASKED, layers, last_row=True) / FP32,
        "generation": 2 * reading(shape, ASKED) / BF16 + max(steps, 2 * generation(shape, ASKED, NEW) / BF16),
    }


def page(found: dict[str, Any]) -> str:
    """The page, from the file's content and the counts."""
    lines = [
        "# How large a machine",
        "",
        f"`{found['command']}`, {found['date']}, torch {found['versions']['torch']}. Nothing here was run on these models: memory and"
        " multiply-adds are counted from their published shapes, by formulas that were held against small random models (below).",
        "",
        "## Memory",
        "",
        f"Of one process, with passes of at most {MAX_ROWS} prompts and 4 096 tokens of {ASKED.length} + {NEW}: weights, the largest pass,"
        " one layer's attention, the key-value cache of a generation (`rim_lens.study.planning.memory_of`, which `--plan` prints).",
        "",
        "| Model | Parameters | Weights, bfloat16 | Pass and cache, bfloat16 | In all, bfloat16 | In all, float32 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in LARGE:
        wide = replace(one, d_mlp=one.d_mlp * (one.n_active or 1))
        beside = [memory_beside(wide, size, max_rows=MAX_ROWS, length=ASKED.length + NEW) for size in (2, 4)]
        weights = [one.parameters * size for size in (2, 4)]
        lines.append(
            f"| {one.name} | {one.parameters / 1e9:.2f} billion | {weights[0] / GB:.1f} GB | {beside[0] / GB:.1f} GB |"
            f" {(weights[0] + beside[0]) / GB:.1f} GB | {(weights[1] + beside[1]) / GB:.1f} GB |"
        )
    lines += [
        "",
        "Two models for RAS take no more: one is read, let go, and the other read ([](speed.md)). Several processes take one model each;"
        " `--device balanced` lays one model over the accelerators of a process ([](scale.md)).",
        "",
        "## Work and time",
        "",
        f"For {ASKED.n} requests of {ASKED.length} tokens, {ASKED.shared} of which all begin with: one capture; every head ablated one by"
        f" one, the plain way and packed ([](speed.md)); {NEW} new tokens each. Multiply-adds are counted. Seconds are arithmetic: the"
        f" capture and the generation in bfloat16 at an *assumed* {BF16 / 1e12:.0f} and scans in float32 at {FP32 / 1e12:.0f} 10¹² operations a"
        f" second (two a multiply-add), weights read at {BYTES / 1e12:.1f} TB/s in each step of a generation. Take your own machine's"
        " figures instead; what is sustained is often half of it, and `--plan` times a product on the spot.",
        "",
        "| Model | Heads | Capture | All heads, plain | All heads, packed | All heads, last row | Generation |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in LARGE:
        layers = [layer for layer, _ in heads_of(one)]
        work = {
            "capture": reading(one, ASKED),
            "plain": plain_scan(one, ASKED, len(layers)),
            "packed": packed_scan(one, ASKED, layers),
            "last": packed_scan(one, ASKED, layers, last_row=True),
            "generation": generation(one, ASKED, NEW),
        }
        spent = seconds_of(one)
        cells = [f"{work[kind] / 1e12:,.0f} · 10¹², {_duration(spent[kind])}" for kind in work]
        lines.append(f"| {one.name} | {len(layers)} | {' | '.join(cells)} |")
    lines += [
        "",
        "Packed scans are made in float32 on one device: Qwen3-32B and 30B-A3B want one of more than 137 and 124 GB for them. Laid over"
        " several, or in bfloat16, heads are read the plain way, or by gradients and confirmed (`prefiltered`).",
        "",
        "Qwen3-30B-A3B is a mixture of experts: heads and spans are read and edited as on any model, and work on its neurons"
        " (`AblateNeurons`, `safety_neurons`, RAS on `hook_post`) is refused, as its experts are fused and `hook_post` is the block's output."
        " Its packed scan is held against the plain way in the tests, on a small random model of its kind.",
        "",
        "## Held against what was measured",
        "",
        "Small random models of Qwen3's kind, float32, 1 thread, 8 prompts of 64 tokens (23 shared). Counted by hand over counted by torch"
        " (`FlopCounterMode`, while the real code runs), and seconds of a product of the MLP's shape, just timed, over CPU-seconds of the run."
        f" {found['load']:.0f} other processes waited for the processor.",
        "",
        "| Model | What | Multiply-adds, by hand | By hand ÷ by torch | Predicted ÷ measured CPU-seconds |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for one in found["checked"]:
        lines.append(
            f"| {one['shape']} | {KINDS[one['kind']]} | {one['by_hand'] / 1e9:.2f} · 10⁹ | {one['by_hand'] / one['by_torch']:.3f} |"
            f" {one['predicted_seconds']:.2f} ÷ {one['cpu_seconds']:.2f} = {one['predicted_seconds'] / one['cpu_seconds']:.2f} |"
        )
    lines += [
        "",
        "Counts are right to what stands in the fourth column. Time on these models is longer than products alone by norms, activations,"
        " hooks and the copying between them, which weigh less the wider a model is; the last column is what to divide a time by.",
        "",
        "Memory beside the weights, 64 prompts of 64 tokens in one pass, in a process of its own:",
        "",
        "| Model | What | By the formula | Peak | Formula ÷ peak |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for one in found["remembered"]:
        lines.append(
            f"| {one['shape']} | {one['kind']} | {one['predicted'] / 1e6:.0f} MB | {one['peak'] / 1e6:.0f} MB |"
            f" {one['predicted'] / one['peak']:.2f} |"
        )
    worst = min(one["predicted"] / one["peak"] for one in found["remembered"])
    lines += [
        "",
        f"The formula was at least {worst:.2f} of the peak, which holds the process's own buffers as well: leave room.",
    ]
    return "\n".join([*lines, ""])


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def main() -> None:
    """Measure, and write the page."""
    found = provenance("python -m tests.sizing", ("torch", "transformer-lens"))
    found |= {
        "checked": [one for each in SMALL for one in checked(each)],
        "remembered": [one for each in SMALL for one in remembered(each)],
        "load": os.getloadavg()[0],
    }
    EVIDENCE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
