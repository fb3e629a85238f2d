"""Which heads to ablate first: gradient × activation ranks all of them in one backward pass, and confirms none.

An estimate is a slope, right for an infinitely small change. Where attention or a norm saturates it is not what happens
when a head is removed: it misleads most for early layers, whose output all later ones work on (on smollm2-refusal, ten
requests, head (1, 0) has an estimate of +0.7 nats and an effect of −2.7), and sees nothing of heads that stand in for each
other. So its hits are always confirmed by ablation, and what was not confirmed is *not tested*, not small.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import ReferenceMismatch
from rim_lens.hooks import AblateHeads
from rim_lens.hooks.positions import Positions, told
from rim_lens.lens import Head, Model, model_facts
from rim_lens.measures.edits import Editor, Remember
from rim_lens.measures.gradients import GRADIENT_ROWS, slopes
from rim_lens.measures.heads.effects import head_effects, head_name
from rim_lens.measures.readings import Reading, require_reading
from rim_lens.measures.refusal.first_word import Skip
from rim_lens.measures.refusal.rates import families_of

if TYPE_CHECKING:
    import xarray as xr


def gradient_scores(
    model: Model,
    batch: SpanBatch,
    *,
    positions: Positions = "all",
    openers: Iterable[str] | None = None,
    skip: Skip = "greedy",
    whitespace: str | None = None,
    max_rows: int = GRADIENT_ROWS,
    progress: bool = False,
) -> xr.DataArray:
    """Estimate of the effect of zeroing each head on `refusal_score`: minus gradient × activation of its output z.

    The sum over the rows in `positions` and over the width of the head of −∂score/∂z · z: how the score would change
    if it went on falling as steeply as it begins to when z is scaled down. Exact where the score is linear in z; else a
    ranking and no more (attribution patching with zero as the source). One forward and one backward pass for all heads.

    Rows matter: with "all" a head counts for what it does anywhere, with "prompt_last" for the row of the first new token
    alone. They rank heads differently; use the rows that the ablation will edit.

    What it does not show: an effect. It is blind where a sum is saturated (two heads of which either suffices both get
    0) and wrong in size where attention moves. Confirm by `head_effects`, or use `prefiltered`.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode. Its parameters get no gradients, and what they
            and the caller's grad mode were before they are again afterwards.
        batch: Prompts whose think block is closed.
        positions: "all", "prompt_last", "generated" (whitespace passed over), a span's name, or a mask [prompt, pos].
        openers: See `refusal_score`.
        skip: See `refusal_score`. Whitespace passed over is read as part of the prompt.
        whitespace: See `refusal_score`.
        max_rows: Most prompts in one pass; the graph of all layers is kept meanwhile.
        progress: Show a progress bar.

    Returns:
        DataArray (prompt, layer, head), in nats, with the sign of an ablation effect.

    Raises:
        ConditionError: As `refusal_score`.
        EmptySpan: A prompt has no row of the span.
        NotFinite: NaN or infinity in the logits or in a gradient.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:4], think="off")
    >>> scores = rl.gradient_scores(model, off).mean("prompt")
    >>> bool(scores[0, 5] < -10), bool(scores[1, 1] < -10), bool(scores[1, 2] < -10)  # topic head, reader, decoy
    (True, True, False)
    """
    import xarray as xr

    facts = model_facts(model)
    scores = slopes(
        model,
        batch,
        "z",
        "gradient_scores",
        positions=positions,
        openers=openers,
        skip=skip,
        whitespace=whitespace,
        max_rows=max_rows,
        progress=progress,
    )
    return xr.DataArray(
        scores,
        dims=("prompt", "layer", "head"),
        coords={
            "prompt": [prompt.id for prompt in batch.prompts],
            "family": ("prompt", families_of(batch.prompts)),
            "layer": range(facts.n_layers),
            "head": range(facts.n_heads),
        },
        name="gradient_score",
        attrs={
            "units": "nats",
            "sign": "estimate of removed − kept",
            "condition": batch.name,
            "positions": told(positions),
        },
    )


def prefiltered(
    reading: Reading,
    model: Model,
    batch: SpanBatch,
    n_confirm: int,
    *,
    always_layers: Iterable[int] = (0,),
    positions: Positions = "all",
    estimates: xr.DataArray | None = None,
    remember: Remember | None = None,
    editor: Editor = AblateHeads,
    max_rows: int = GRADIENT_ROWS,
    progress: bool = False,
) -> xr.Dataset:
    """Effects of the heads that matter most by an estimate, each measured exactly; the others are not tested.

    Heads are ranked by the mean over prompts of the estimate's size, so that a head which raises refusal here and lowers it
    there is not lost. Confirmed are the first `n_confirm`, and all heads of `always_layers`, where estimates mislead.

    What it does not show: that a head which was not tested has no effect. How many heads must be confirmed for most of the truly
    strongest to be among them, on three models and in two readings, stands in docs/speed.md: more in a reading that skips
    whitespace greedily where the model writes some. Another model need not be so kind. Redundant heads (`redundant_pairs`) are passed over by
    construction.

    Args:
        reading: What the exact effects are read by.
        model: For the estimates; the reading's model.
        batch: For the estimates; the reading's prompts, or where those are open, the same requests with thinking closed.
        n_confirm: How many heads of the ranking to confirm.
        always_layers: Layers all of whose heads are confirmed; early ones.
        positions: Rows, of the gradients and of the ablations alike.
        estimates: (prompt, layer, head) from another source, ranked instead of `gradient_scores`: `direct_effects`, say.
        remember: See `head_effects`.
        editor: See `head_effects`.
        max_rows: Most prompts in a gradient pass.
        progress: Show progress bars.

    Returns:
        Dataset with ``effect`` (prompt, layer, head), exact, in the reading's unit, NaN where not tested; ``estimate`` (mean of
        the estimate's size), ``rank`` (1 is the largest) and ``status`` ("confirmed" or "not tested"), by (layer, head); ``baseline``
        (prompt). "confirmed" says that the effect was measured, whatever it came to.

    Raises:
        ValueError: n_confirm is negative, or nothing would be confirmed.
        UnknownLayer: The model lacks one of `always_layers`.
        ReferenceMismatch: The estimates are of another shape than the model's heads; or the reading is of another model, or
            of other prompts.
    """
    import xarray as xr

    require_reading(reading, "prefiltered")
    ids, others = ([prompt.id for prompt in prompts.prompts] for prompts in (batch, reading.batch))
    if reading.model is not model or ids != others:
        what = "model" if ids == others else "prompts"
        raise ReferenceMismatch(
            f"the estimates are to be made on other {what} than {reading.name} reads; give the reading's own ({what})."
        )
    facts = model_facts(model)
    layers = sorted({facts.check_layer(layer) for layer in always_layers})
    if n_confirm < 0 or not (n_confirm or layers):
        raise ValueError(
            f"n_confirm={n_confirm} was asked for with always_layers={layers}; an estimate that nothing confirms is not"
            " reported. Confirm at least one head."
        )
    if estimates is None:
        estimates = gradient_scores(model, batch, positions=positions, max_rows=max_rows, progress=progress)
    size = abs(estimates).mean("prompt").transpose("layer", "head").values
    if size.shape != (facts.n_layers, facts.n_heads):
        raise ReferenceMismatch(
            f"estimates of {size.shape} layers and heads were given; this model has {(facts.n_layers, facts.n_heads)}."
        )
    # Heads without an estimate come last; ties by layer and head.
    order = sorted(facts.heads(), key=lambda cell: (-np.nan_to_num(size[cell], nan=-1.0), cell))
    rank = np.empty(size.shape, dtype=np.int64)
    for place, cell in enumerate(order):
        rank[cell] = place + 1
    chosen: list[Head] = [head for head in facts.heads() if head[0] in layers or rank[head] <= n_confirm]
    exact = head_effects(
        reading, chosen, remember=remember, editor=editor, positions=positions, progress=progress
    )
    effect = np.full((len(reading.batch), *size.shape), np.nan)
    status = np.full(size.shape, "not tested", dtype=object)
    for layer, head in chosen:
        effect[:, layer, head] = exact.sel(set=head_name((layer, head))).values
        status[layer, head] = "confirmed"
    return xr.Dataset(
        {
            "effect": (
                ("prompt", "layer", "head"),
                effect,
                {"units": reading.units, "sign": "edited − baseline"},
            ),
            "estimate": (
                ("layer", "head"),
                size,
                {"what": "mean over prompts of |estimate|, for ranking only"},
            ),
            "rank": (("layer", "head"), rank),
            "status": (("layer", "head"), status.astype(str)),
            "baseline": ("prompt", exact["baseline"].values, {"units": reading.units}),
        },
        coords={
            "prompt": exact["prompt"].values,
            "family": ("prompt", exact["family"].values),
            "layer": range(facts.n_layers),
            "head": range(facts.n_heads),
        },
        attrs=exact.attrs | {"n_confirm": n_confirm, "always_layers": layers, "n_tested": len(chosen)},
    )
