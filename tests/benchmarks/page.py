"""The table of `make bench` as docs/speed.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "docs" / "evidence" / "bench.json"
PAGE = ROOT / "docs" / "speed.md"
GROWTH = ROOT / "docs" / "evidence" / "growth.json"

_BEFORE = """# Speed: what is computed once, and by how much that helps

Effects of many edits on the refusal score (`rl.head_effects`, and through it `rl.refusal_heads`, random sets of heads and of
neurons) are read many at a time where that can be done exactly. Nothing is estimated; what an edit cannot change is not
computed again:

- **layers below the edit** are those of the pass without edits;
- **rows before the first edited one** give the same keys and values in every copy. Where the last row of the prompt alone is
  edited (`positions="prompt_last"`), one row per prompt and head goes up the layers;
- **what all prompts begin with** (the template) stands once in each copy, and prompts lie in one sequence without padding, kept
  apart by a mask;
- **rows that nobody reads** do not go through the last layer's MLP, nor through the unembedding.

Ablation at the last row and at all rows are different quantities, and rank heads differently.

**When.** A `TransformerBridge` in float32 or float64 on one device, `refusal_score` with any rule for whitespace, and edits of heads'
outputs or neurons to zero, to a mean over data, or by a factor. The model's own code runs: its norms, MLPs, positions, softcaps and
sliding windows, without the bridge's hooks; attention alone is done here. In every scan the baseline and three edits are read the
plain way as well, on the longest prompt and the shortest. Where a number differs by more than 1e-4 nats and a hundred-thousandth of the score a warning says so and all
edits are read one by one, as they are on a `HookedTransformer`, in half precision (whose error is larger than most effects), with
hooks of your own on the model, and by any other reading. `scan="plain"` does so always, and `effects.attrs["scan"]` says which way it
was. Held against the plain way to 1e-5 on eleven architectures: tests/measures/test_scanning.py.
"""

_AFTER = """
A ratio is CPU-seconds of the rival over those of the figure; the rival is timed before and after it, so that both see the same
machine. Where not all heads were run, both sides are scaled to all. The loop computes every row's logits, on padded prompts, as
code written by hand does. The largest difference is that of edited scores between the two sides, over the heads that both ran.

The first row holds the proof on first contact as well (one short pass per layer, once per model and process), and each row its check
against the plain way: eight prompts' worth of passes, which weigh more the fewer prompts there are. Of what remains, products of
matrices are four fifths (67 µs a row and layer were measured, 54 at the machine's best); at the last row of the prompt a third is the
unembedding, which log-odds need whole. How well the ranking by gradients finds the ten strongest heads over many draws of prompts has not
been measured here; what it does not confirm is *not tested*.
"""


def page(found: dict[str, Any]) -> str:
    """The page, from the file's content."""
    versions = found["versions"]
    lines = [
        _BEFORE,
        f"`{found['command']}`, {found['date']}: {found['model']}, {found['threads']} thread, torch {versions['torch']},"
        f" TransformerLens {versions['transformer-lens']}; {found['load']:.0f} other processes waited for the processor.",
        "",
        "| What | Goal | Ratio | CPU-seconds | Rival | Prompts | Run | Largest difference, nats |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for figure in found["figures"]:
        largest = figure["largest_difference_nats"]
        ratio = f"{figure['ratio']:.1f} ×" + ("" if figure["met"] else " (missed)")
        lines.append(
            f"| {figure['name']} | {figure['goal']} | {ratio} | {figure['cpu_seconds']:.0f} against"
            f" {figure['rival_cpu_seconds']:.0f} | {figure['against']} | {figure['prompts']} | {figure['measured']} |"
            f" {'–' if largest is None else f'{largest:.0e}'} |"
        )
    return "\n".join(lines) + "\n" + _AFTER + _growth(json.loads(GROWTH.read_text(encoding="utf-8")))


def _growth(found: dict[str, Any]) -> str:
    """What `tests.benchmarks.growth` measured."""
    lines = [
        "",
        "## How cost grows",
        "",
        f"`{found['command']}`, {found['date']}: random models of Qwen3's kind, float32, 1 thread; each size {len(found['series'][0]['cpu_seconds'][0])} times;"
        f" {found['load']:.0f} other processes waited for the processor. Slope of log CPU-seconds over log size: 1 is proportional, 2 is"
        " quadratic. It should be no more than promised; beside it stands the slope of the multiply-adds of the same runs, counted.",
        "",
        "| What | Over | Sizes | Promised | Slope, 95 % interval | Counted | CPU-seconds, smallest to largest |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found["series"]:
        seconds = [min(some) for some in one["cpu_seconds"]]
        lines.append(
            f"| {one['what']} | {one['over']} | {', '.join(map(str, one['sizes']))} | ≤ {one['promised']} | {one['slope']:.2f} [{one['low']:.2f},"
            f" {one['high']:.2f}] | {one['counted']:.2f} | {seconds[0]:.2f}–{seconds[-1]:.2f} |"
        )
    two = found["two_models"]
    ratio = two["both"] / two["one"]
    beyond = two["both"] - two["one"] - two["accumulators"] - two["shard"]
    over = (
        "met"
        if beyond <= 0
        else f"missed by {beyond / 1e9:.2f} GB, whose cause is not found; the base's weights are let go before the tuned ones are loaded"
    )
    lines += [
        "",
        "A slope below the counted one is a fixed cost (hooks, checks against the plain way) that weighs less in larger runs. Above it,"
        " over tokens, is the softmax over query × key, which is no multiply-add and counts the more the longer the prompt; over new tokens,"
        " what every step costs, however little it computes. Where all heads are scanned, their number grows with the layers, and so does"
        " what lies above each.",
        "",
        "**Two models for RAS** are read one after the other. Peak memory in processes of their own, above what was there before: reading"
        f" one model {two['one'] / 1e9:.2f} GB, `rl.entanglement` of two folders {two['both'] / 1e9:.2f} GB ({ratio:.2f} ×), both held at"
        f" once {two['held'] / 1e9:.2f} GB; weights of one {two['weights'] / 1e9:.2f} GB, activations kept {two['accumulators'] / 1e9:.3f} GB,"
        f" and of the base's weights a file at a time ({two['shard'] / 1e6:.0f} MB here, 268 MB otherwise). The goal is one model, what is kept"
        f" and one file: {over}.",
        "",
    ]
    return "\n".join(lines)
