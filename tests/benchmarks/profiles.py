"""Where the CPU-seconds of a scan go, beside those of the loop: why a goal is missed that the counts of products allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile

import rim_lens as rl
from rim_lens.lens import model_facts
from tests.benchmarks.scans import Loop, counted_loop, counted_scan, prepared
from tests.benchmarks.timing import cpu

# Of the heads ablated at all rows; their mean is the middle layer, and all would take six times as long.
LAYERS = (5, 15, 24)

# By what PyTorch calls it; what is not named here is norms, activations, residuals, rotations and sums.
KINDS = {
    "products of matrices": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "copies": (
        "aten::copy_",
        "aten::cat",
        "aten::index",
        "aten::index_select",
        "aten::gather",
        "aten::_index_put_impl_",
    ),
}
ELEMENTWISE, OUTSIDE = "norms, activations, sums", "Python and what PyTorch does around it"
ALL_KINDS = (*KINDS, ELEMENTWISE, OUTSIDE)


def spent(run: Callable[[], Any]) -> dict[str, float]:
    """CPU-seconds of one run by kind, all of them together those of the process.

    Shapes are not recorded: the profiler would hold what it saw, and nothing could be written over.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        whole, _ = cpu(run)
    found = dict.fromkeys(ALL_KINDS, 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key in names), ELEMENTWISE)
        found[kind] += event.self_cpu_time_total / 1e6
    return found | {OUTSIDE: whole - sum(found.values())}


def profiles(n_prompts: int) -> Iterator[dict[str, Any]]:
    """The loop on one head, and scans at all rows and at the last row, of the prompts that share half of their tokens."""
    model, batch = prepared(n_prompts)
    heads = model_facts(model).heads()
    middle = [head for head in heads if head[0] in LAYERS]
    scored = rl.refusal_reading(model, batch, skip="none", max_rows=len(batch))
    loop = Loop(model, batch, last_only=False)
    one = heads[len(heads) // 2]
    loop.run(one)  # what is asked for once, memory too
    runs: dict[str, tuple[Callable[[], Any], float]] = {
        "the loop, one head": (lambda: loop.run(one), counted_loop(batch)),
        f"all rows, the {len(middle)} heads of layers {', '.join(map(str, LAYERS))}": (
            lambda: rl.head_effects(scored, middle, positions="all"),
            counted_scan(batch, [layer for layer, _ in middle], last_row=False),
        ),
        f"last row, all {len(heads)} heads": (
            lambda: rl.head_effects(scored, heads, positions="prompt_last"),
            counted_scan(batch, [layer for layer, _ in heads], last_row=True),
        ),
    }
    for name, (run, multiply_adds) in runs.items():
        yield {"name": name, "cpu_seconds": spent(run), "multiply_adds": multiply_adds}
