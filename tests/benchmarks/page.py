"""The tables of `make bench` as docs/speed.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import recall
from tests.benchmarks.profiles import ALL_KINDS

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / "docs" / "evidence" / "bench.json"
PAGE = ROOT / "docs" / "speed.md"
GROWTH = ROOT / "docs" / "evidence" / "growth.json"

_CAPTURE_BEFORE = """# Speed: what is computed once, and by how much that helps

## Capture

`rl.capture` reduces inside its hooks and unembeds the last row alone. On a `TransformerBridge` it also keeps PyTorch's fused attention
(sdpa): a bridge computes attention step by step, so that patterns can be hooked, which takes twice as long at 1 024 tokens and holds
heads × pos² numbers of a layer at a time. Readers of chosen query rows (`SpanAttention`, `AttentionRows`; all others look at no
pattern) need none of that, so each layer runs the model's own attention, and only the rows that are read are computed besides, from
its queries, keys and mask.

**When.** Llama, SmolLM2, Qwen2, Qwen3, Gemma, Gemma 3, Mistral, Mixtral, Qwen3's mixtures, and what else calls attention in the way of `transformers`
from the projections the bridge hooks; sliding windows, padding, grouped queries and a key-value cache included, in float32 and bfloat16.
On first contact it is proven on the model itself that both ways give the same logits, rows and gradients, with padding and without
(1e-4 of the largest logit in float32). Not where scores are capped (Gemma 2), which sdpa does not do; nor with attention sinks (gpt-oss), whose
rows do not sum to 1 and are refused either way; nor on GPT-2, GPT-NeoX and Phi 3, for which the bridge keeps projections of its own;
nor on a `HookedTransformer`, whose forward pass has no seam between scores and pattern. And not while something works on whole patterns:
`BlockAttention`, `MoveAttention`, `PatchAttention`, the explorers' pages of whole patterns, `rl.receiver_kurtosis`, or hooks of your own on patterns,
scores or rotated queries and keys, which do not fire then. All other hook points fire and can be edited as ever, so ablations,
patches and directions go with it. `data.attrs["attention"]` says which way it was and why; `attention="eager"` or `"sdpa"` asks for one.
Afterwards the model is as it was, also after an exception. Held against patterns to 1e-5 in ten shapes of model: tests/lens/test_sdpa.py.

With `out=` rows are streamed to disk; what grows in memory with the number of prompts is their labels.

**Not captures alone.** Whatever reads whole prompts of 256 tokens and more keeps sdpa under the same conditions: `refusal_score`, `generate` (its
prompts, not its steps), `sentence_effects`, `entanglement`, probes, directions, and passes with gradients (`gradient_scores`), whose graph then
holds no patterns. Shorter ones win nothing by it.
"""

_CAPTURE_AFTER = """
Time is CPU-seconds of the process, the median of runs in turns (A B A B); memory is the highest mark above what was held before, each
run in a process of its own. A first turn is not counted. All sides run the same tokens in the same batches of 4 096 tokens; forward passes return the last row's
logits, as capture does, while `run_with_cache` returns all.

A capture's time holds what a call costs once: the digest of the whole weights and labels. The digest is not remembered between calls: by
anything less than all weights it would name the wrong model after an edit. Norms that nobody hooks are the model's own, as the bridge's take twice as long.
"""

_BEFORE = """
## Many edits

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

**When.** A `TransformerBridge` or a `HookedTransformer` in float32 or float64 on one device, `refusal_score` with any rule for whitespace, and
edits of heads' outputs or neurons to zero, to a mean over data, by a factor, or to what another run has there (`head_patching`,
resampling). The model's own code runs, without its hooks: norms, projections, rotations, MLPs; attention alone is done here, softcaps and
sliding windows included. In every scan the baseline is read the plain way as well on the longest prompt and the shortest, and three edits
on one of the two. Where a number differs by more than 1e-4 nats and a hundred-thousandth of the score a warning says so and all edits are
read one by one, as they are in half precision (whose error is larger than most effects), with hooks of your own on the model
(PyTorch's own on a module count, too; those that `run_with_cache` leaves only listen and do not), on a `HookedTransformer` with alibi, attention sinks or `use_attn_result` and the like, and by any other reading. In half precision
`scan="rough"` reads many at a time all the same and tells the error of the few readings that it checks, which others may exceed: to rank heads, and no
more. `scan="plain"` reads one by one
always, and `effects.attrs["scan"]` says which way it was. Held against the plain way to 1e-5 on twelve architectures and nine kinds of
`HookedTransformer`: tests/measures/test_scanning.py.
"""

_AFTER = """
A ratio is CPU-seconds of the rival over those of the figure; the rival is timed before and after it, so that both see the same
machine, and scaled to all heads. The loop computes every row's logits, on padded prompts, as
code written by hand does. *Counted* is the same ratio of multiply-adds, the checks left in: where it is below a goal, no order of the same
products reaches it on these prompts, and only faster products would. The largest difference is that of edited scores between the two sides, over the heads that both ran.

The proof on first contact (one short pass per layer, about ten seconds here, once per model and process) came before. Heads are read in
groups, each with its check against the plain way: three prompts' worth of passes, five in the first, which weigh more the fewer prompts there are.
"""

_PROFILES = """
**Where the time goes.** The same model and prompts under PyTorch's profiler, one run each after those above it.
"""

_PROFILES_AFTER = """
*Rate*: counted multiply-adds, in billions, by CPU-seconds of products of matrices. Two thirds of either side's time are products, and a scan has
fewer of them; but it works in smaller pieces (rows of one prompt, heads of one layer), whose products run a little slower, and norms, activations, copies and
Python weigh a little more beside them. That is the gap between a ratio and what is counted; a goal above what is counted is out of reach
of any order of the same products. Gradients miss theirs by the number of heads that must be confirmed (next section).
"""


_CAPTURE = ("capture-256", "capture-1024", "capture-4096", "streaming", "writing")
_SCANS = ("last-row", "all-rows", "all-rows-apart", "gradients", "last-row-hooked", "all-rows-hooked")


def written() -> str:
    """The page, from what the files hold now."""
    found, ranking, growth = (
        json.loads(path.read_text(encoding="utf-8")) for path in (EVIDENCE, recall.EVIDENCE, GROWTH)
    )
    return "\n".join([_timed(found), recall.section(ranking), _growth(growth)])


def _timed(found: dict[str, Any]) -> str:
    """What is timed beside a rival."""
    parts = found["parts"]
    captures, scans = ([parts[name] for name in names if name in parts] for names in (_CAPTURE, _SCANS))
    lines = [_CAPTURE_BEFORE, *_told(captures), ""]
    lines += [
        *_models(captures),
        "",
        "| What | Goal | Ratio | Here | There | Against | Prompts |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {figure['name']}, {'memory' if figure['unit'] == 'MB' else 'time'} | {_together(figure['goal'] or '–')} | {_ratio(figure)} |"
        f" {_amount(figure['value'], figure['unit'])} | {_amount(figure['rival_value'], figure['unit'])} | {figure['against']} |"
        f" {figure['prompts']} |"
        for part in captures
        for figure in part["figures"]
    ]
    lines += [_CAPTURE_AFTER, _BEFORE, *_told(scans), ""]
    lines += [
        "| What | Goal | Ratio | Counted | CPU-seconds | Rival | Prompts | Run | Largest difference, nats |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for part in scans:
        for figure in part["figures"]:
            largest = figure["largest_difference_nats"]
            lines.append(
                f"| {figure['name']} | {_together(figure['goal'])} | {_ratio(figure)} | {_counted(figure)} | {figure['cpu_seconds']:.0f} against"
                f" {figure['rival_cpu_seconds']:.0f} | {figure['against']} | {figure['prompts']} | {figure['measured']} |"
                f" {'–' if largest is None else f'{largest:.0e}'} |"
            )
    return "\n".join([*lines, _AFTER, *_profiled(parts.get("profiles"))])


def _profiled(part: dict[str, Any] | None) -> list[str]:
    """Shares of a run by kind, of the loop and of scans."""
    if part is None:
        return []
    lines = [
        _PROFILES,
        *_told([part]),
        "",
        f"| Run | CPU-seconds | {' | '.join(ALL_KINDS)} | Rate |",
        f"| --- | ---: | {' | '.join('---:' for _ in ALL_KINDS)} | ---: |",
    ]
    for figure in part["figures"]:
        seconds = figure["cpu_seconds"]
        whole = sum(seconds.values())
        shares = " | ".join(f"{100 * seconds[kind] / whole:.0f} %" for kind in ALL_KINDS)
        rate = figure["multiply_adds"] / seconds["products of matrices"] / 1e9
        lines.append(f"| {figure['name']} | {whole:.1f} | {shares} | {rate:.0f} |")
    return [*lines, _PROFILES_AFTER]


def _told(parts: Sequence[dict[str, Any]]) -> list[str]:
    """Where the figures come from, parts of one run together."""
    found: dict[str, None] = {}
    for part in parts:
        versions = part["versions"]
        found[
            f"`{part['command']}`, {part['date']}: {part['threads']} thread, torch {versions['torch']}, TransformerLens"
            f" {versions['transformer-lens']}; {part['load']:.0f} other processes waited for the processor."
        ] = None
    return ["  \n".join(found)]


def _counted(figure: dict[str, Any]) -> str:
    return _together(f"{figure['counted']:.1f} ×") if "counted" in figure else "–"


def _models(parts: Sequence[dict[str, Any]]) -> list[str]:
    """On what was measured, each model with what was measured on it."""
    found: dict[str, dict[str, None]] = {}
    for part in parts:
        for figure in part["figures"]:
            found.setdefault(figure["measured"], {})[figure["name"].partition(",")[0]] = None
    return [f"{model[:1].upper()}{model[1:]}: {', '.join(names)}.  " for model, names in found.items()]


def _together(text: str) -> str:
    """With spaces at which no line breaks."""
    return text.replace(" ", "\u00a0")


def _ratio(figure: dict[str, Any]) -> str:
    told = f"{figure['ratio']:.{1 if figure['ratio'] >= 2 else 2}f} ×"
    return _together(told) + (" (missed)" if figure["met"] is False else "")


def _amount(value: float, unit: str) -> str:
    return f"{value:.{0 if value >= 100 else 1}f} {unit}"


def _growth(found: dict[str, Any]) -> str:
    """What `tests.benchmarks.growth` measured."""
    lines = [
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
    over = "met" if beyond <= 0 else f"missed by {beyond / 1e9:.2f} GB"
    lines += [
        "",
        "A slope below the counted one is a fixed cost (hooks, checks against the plain way) that weighs less in larger runs. Above it, over"
        " new tokens, is what every step costs, however little it computes. Where all heads are scanned, their number grows with the layers,"
        " and so does what lies above each.",
        "",
        "**Two models for RAS** are read one after the other. Peak memory in processes of their own, above what was there before: reading"
        f" one model {two['one'] / 1e9:.2f} GB, `rl.entanglement` of two folders {two['both'] / 1e9:.2f} GB ({ratio:.2f} ×), both held at"
        f" once {two['held'] / 1e9:.2f} GB; weights of one {two['weights'] / 1e9:.2f} GB, activations kept {two['accumulators'] / 1e9:.3f} GB,"
        f" and of the base's weights a file at a time ({two['shard'] / 1e6:.0f} MB here, 268 MB otherwise). The goal is one model, what is kept"
        f" and one file: {over}.",
        "",
    ]
    return "\n".join(lines)
