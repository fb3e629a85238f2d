"""Patching effects: by how much one run's activations, put into another run, move refusal.

Two runs of the same requests differ in one thing (thinking off or a chain of thought, a request or its harmless twin,
a base or a tuned model). `head_patching` puts one head's output of the source run into the target run, `span_patching`
the residual stream of one layer on one span; each cell of the table is a run of its own.

*Denoising* has the run that refuses as its source: an effect shows that what is patched is **enough** to bring some of
the refusal back. *Noising* has it as its target: an effect shows that it is **needed**. The two need not agree: where
two heads stand in for each other neither is needed and either is enough. Which one a call does follows from what is
source and what is target; ask for both by swapping them.

The module gives effects per request. `patching_table` tests them, paired over requests and corrected over cells.
Neither tells whether an effect is about refusal: run the twins as well and look at `specificity`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from rim_lens.batching import MAX_ROWS
from rim_lens.chat.spans import SpanBatch, require_batch
from rim_lens.errors import EmptySpan, NotEnoughData, ReferenceMismatch
from rim_lens.hooks import Component, PatchHeads, PatchResidual, record
from rim_lens.hooks.alignment import Align
from rim_lens.hooks.positions import Positions
from rim_lens.lens import Head, Model, model_facts
from rim_lens.measures.edits import scan_of, set_effects
from rim_lens.measures.readings import Reading, refusal_reading
from rim_lens.measures.refusal.score import refusal_score
from rim_lens.measures.stats import bootstrap_interval, family_index, sign_flip_test

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

# A number per prompt of a batch, in nats, with components active: `refusal_score`, or one of your own
Score = Callable[..., Any]


def head_patching(
    model: Model,
    target: SpanBatch,
    source: SpanBatch,
    *,
    heads: Iterable[Head] | None = None,
    positions: Positions = "all",
    align: Align = "end",
    source_model: Model | None = None,
    score: Score = refusal_score,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> xr.Dataset:
    """Patch the output of each head, one at a time, from the source run into the target run.

    One pass over the source in all; of the target only what a head can change is computed again, see docs/speed.md, or where that
    cannot be (`scan` in the result's attributes says why), one pass for each head.

    Args:
        model: The model that is patched.
        target: Prompts that are read, thinking closed.
        source: Prompts whose run is patched in, row for row: the same requests in another condition, or their twins.
        heads: (layer, head) pairs; all when None.
        positions: Rows of the target that are patched; see `PatchHeads`.
        align: How tokens of spans of unequal length correspond.
        source_model: A tuned or base model of the same shapes to run the source on.
        score: Called as ``score(model, batch, *components, max_rows=…)``.
        max_rows: Most prompts in one pass.
        progress: Show a progress bar.

    Returns:
        Dataset with ``effect`` (prompt, layer, head), patched − baseline in nats, NaN for heads left out; ``baseline``
        (prompt), the target's own score; ``reach`` (prompt), the source's score − the baseline: what patching
        everything would do at best; and the coordinate ``family``.

    Raises:
        UnknownHead: The model lacks one of the heads.
        ReferenceMismatch: The source holds the target's requests, or their twins, in another order.
        RimLensError: As `PatchHeads` and the score.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> harmful = rl.load_prompts("harmful", language="toy", split="select")[:4]
    >>> off, cot = chat.render(harmful, think="off"), chat.render(harmful, think=chat.cots(harmful, "careful"))
    >>> found = head_patching(model, target=cot, source=off, positions="prompt_last")   # denoising
    >>> found["effect"].mean("prompt").argmax(...)["head"].item()   # the planted reader is head (1, 1)
    1
    """
    facts = model_facts(model)
    cells = facts.check_heads(facts.heads() if heads is None else list(heads))
    _same_order(target, source)
    source_model = model if source_model is None else source_model
    recorded = record(source_model, source, ["z"], sorted({layer for layer, _ in cells}))
    effect = np.full((len(target), facts.n_layers, facts.n_heads), np.nan)
    edits = [PatchHeads([cell], recorded, positions, align) for cell in cells]
    baseline, values, scan = _effects(model, target, edits, score, max_rows, progress)
    for (layer, head), value in zip(cells, values.T, strict=True):
        effect[:, layer, head] = value
    goal = np.asarray(score(source_model, source, max_rows=max_rows), dtype=np.float64)
    return _dataset(target, source, effect, ("layer", "head"), {}, baseline, goal, positions, scan)


def span_patching(
    model: Model,
    target: SpanBatch,
    source: SpanBatch,
    *,
    spans: Sequence[str] | None = None,
    layers: Iterable[int] | None = None,
    align: Align = "end",
    source_model: Model | None = None,
    score: Score = refusal_score,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> xr.Dataset:
    """Patch the residual stream before each layer on each span, one cell at a time, from the source run.

    Args:
        model: The model that is patched.
        target: Prompts that are read, thinking closed.
        source: Prompts whose run is patched in, row for row.
        spans: Spans of the target to patch; when None, every atom that each prompt has in both runs.
        layers: Layers before which to patch; all when None.
        align: How tokens of spans of unequal length correspond.
        source_model: A tuned or base model of the same shapes to run the source on.
        score: Called as ``score(model, batch, *components, max_rows=…)``.
        max_rows: Most prompts in one pass.
        progress: Show a progress bar.

    Returns:
        As `head_patching`, with ``effect`` (prompt, layer, span). A span's effect at layer 0 is that of its words, at
        later layers that of what was written there so far; the last prompt token is in a span too.

    Raises:
        EmptySpan: A span asked for has no token in some prompt, or no span is in all prompts of both runs.
        UnknownLayer: The model lacks a layer.
        RimLensError: As `PatchResidual` and the score.
    """
    facts = model_facts(model)
    places = [facts.check_layer(layer) for layer in (range(facts.n_layers) if layers is None else layers)]
    _same_order(target, source)
    if spans is None:
        both = target.spans.present()
        spans = [name for name in target.spans.atoms() if name in both and name in source.spans.present()]
    if not spans:
        raise EmptySpan("no span has a token in every prompt of both runs; name spans that both have.")
    for name in spans:
        target.spans.require(name)
    source_model = model if source_model is None else source_model
    recorded = record(source_model, source, ["resid_pre"], places)
    cells = [(layer, number) for layer in places for number in range(len(spans))]
    effect = np.full((len(target), facts.n_layers, len(spans)), np.nan)
    edits = [PatchResidual([layer], recorded, spans[number], "resid_pre", align) for layer, number in cells]
    baseline, values, scan = _effects(model, target, edits, score, max_rows, progress)
    for (layer, number), value in zip(cells, values.T, strict=True):
        effect[:, layer, number] = value
    goal = np.asarray(score(source_model, source, max_rows=max_rows), dtype=np.float64)
    labels = {"span": list(spans)}
    return _dataset(target, source, effect, ("layer", "span"), labels, baseline, goal, "span", scan)


def patching_table(effects: xr.Dataset, *, seed: int = 0) -> pd.DataFrame:
    """Test patching effects: is the mean over requests zero, and how large is it?

    `recovered` does not add up over cells, and what both runs have in common no patch can show. Patched into the run that does not
    refuse, an effect says what is enough to bring refusal back; the other way round, what is enough to take it away.

    Args:
        effects: From `head_patching` or `span_patching`.
        seed: Of the permutations and the bootstrap.

    Returns:
        One row per cell, largest effect first: layer, head or span; effect (nats) with its 95 % interval; recovered, the
        effect as a share of the mean ``reach`` (NaN where that is zero; it may exceed 1); p, sign flips over families
        with the max-statistic over all cells of this table.

    Raises:
        NotEnoughData: Requests of fewer than two families, or no cell was patched.
        NotFinite: A score was NaN or infinite.
    """
    import pandas as pd

    families = effects["family"].values.tolist()
    if family_index(families, len(families))[1] < 2:
        raise NotEnoughData("all requests are of one family; a test over requests needs at least two.")
    which = str(effects["effect"].dims[2])
    stacked = effects["effect"].stack(cell=("layer", which)).dropna("cell", how="all")
    if stacked.sizes["cell"] == 0:
        raise NotEnoughData("no cell of these effects was patched.")
    values = stacked.transpose("prompt", "cell").values
    test = sign_flip_test(values, families=families, correction="max", seed=seed)
    interval = bootstrap_interval(values, families=families, seed=seed)
    reach = float(effects["reach"].mean())
    table = pd.DataFrame(
        {
            "layer": stacked["layer"].values,
            which: stacked[which].values,
            "effect": interval.estimate,
            "effect_low": interval.low,
            "effect_high": interval.high,
            "recovered": interval.estimate / reach if reach else np.nan,
            "p": test.p,
        }
    )
    order = table["effect"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def _same_order(target: SpanBatch, source: SpanBatch) -> None:
    """Refuse a source whose requests, or their twins, are the target's in another order."""
    for batch in (target, source):
        require_batch(batch, "patching")
    here = [prompt.id for prompt in target.prompts]
    twins = [prompt.twin for prompt in target.prompts]
    there = [prompt.id for prompt in source.prompts]
    for ids in (here, twins):
        if None not in ids and there != ids and sorted(there) == sorted(map(str, ids)):
            row = next(row for row, (a, b) in enumerate(zip(there, ids, strict=True)) if a != b)
            raise ReferenceMismatch(
                f"row {row} of the source is request {there[row]!r}, which belongs to another row of the target: row i of the"
                " source stands for row i of the target. Render both in one order."
            )


def _effects(
    model: Model, target: SpanBatch, edits: Sequence[Component], score: Score, max_rows: int, progress: bool
) -> tuple[Float[np.ndarray, " prompt"], Float[np.ndarray, "prompt edit"], str]:
    """The target's own scores, what each edit adds to them, and which way they were read."""

    def read(components: Sequence[Component]) -> Float[np.ndarray, " prompt"]:
        return np.asarray(score(model, target, *components, max_rows=max_rows), dtype=np.float64)

    reading = Reading("score", "nats", model, target, read)
    if score is refusal_score:
        reading = refusal_reading(model, target, max_rows=max_rows)
    editors = {str(place): edit for place, edit in enumerate(edits)}
    scan = scan_of(reading, editors, None)
    baseline, effects = set_effects(reading, editors, None, progress, "patch", scan)
    return baseline, effects, scan.told


def _dataset(
    target: SpanBatch,
    source: SpanBatch,
    effect: Float[np.ndarray, "prompt layer cell"],
    dims: tuple[str, str],
    labels: dict[str, list[str]],
    baseline: Float[np.ndarray, " prompt"],
    goal: Float[np.ndarray, " prompt"],
    positions: Positions,
    scan: str,
) -> xr.Dataset:
    import xarray as xr

    return xr.Dataset(
        {
            "effect": (("prompt", *dims), effect, {"units": "nats", "sign": "patched − baseline"}),
            "baseline": ("prompt", baseline, {"units": "nats"}),
            "reach": ("prompt", goal - baseline, {"units": "nats", "sign": "source − baseline"}),
        },
        coords={
            "prompt": [prompt.id for prompt in target.prompts],
            "family": ("prompt", [prompt.family for prompt in target.prompts]),
            **labels,
        },
        attrs={
            "target": target.name,
            "source": source.name,
            "positions": positions if isinstance(positions, str) else "mask",
            "scan": scan,
        },
    )
