"""Neighbours of the paper's choice of neurons: other numbers by which to rank them, all [layer, neuron].

=====================  ==================================================================================================
difference_of_means    mean pooled activation on one set of prompts minus that on another
effect_size            the same in units of the spread within the sets (Cohen's d)
neuron_gradients       gradient × activation on the refusal score: what zeroing would do if the score fell on as it begins to
activation_contrast    root of the mean squared difference between two models over the tokens written (arXiv 2406.14144)
wanda, snip            importance for a set of texts; `set_difference` leaves what safety needs and utility does not
                       (arXiv 2402.05162)
=====================  ==================================================================================================

They rank and do not test: ablate what they name (`rl.neuron_effects`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor

from rim_lens.batching import MAX_ROWS
from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import (
    ConditionError,
    NotEnoughData,
    NotFinite,
    ReferenceMismatch,
    StatisticsError,
    UnsupportedModel,
)
from rim_lens.hooks.positions import Positions, told
from rim_lens.lens import (
    Model,
    ModelFacts,
    hook_name,
    hooked,
    last_logits,
    require_eval,
    verify,
)
from rim_lens.measures.gradients import GRADIENT_ROWS, counted_rows, gradients_of_activations_only, slopes
from rim_lens.measures.neurons.choosing import Scope
from rim_lens.measures.refusal.first_word import Skip
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.stats import check_finite, to_numpy
from rim_lens.sharing import each, row_groups

if TYPE_CHECKING:
    import xarray as xr

PerNeuron = Float[np.ndarray, "layer neuron"]
# What rounding does to activations of this size is not their spread.
_ROUNDING = 1e-6


# --- from pooled activations -------------------------------------------------------------------------


def difference_of_means(more: ArrayLike, less: ArrayLike) -> PerNeuron:
    """Mean activation on one side minus that on the other.

    Args:
        more: [prompt, layer, neuron], the more refused side.
        less: The other; it may have another number of prompts.

    Raises:
        StatisticsError: The shapes do not go together.
        NotEnoughData: A side is empty.
        NotFinite: NaN or infinity.

    >>> difference_of_means([[[1.0, 2.0]], [[3.0, 2.0]]], [[[1.0, 5.0]]]).tolist()
    [[1.0, -3.0]]
    """
    first, second = _two_sides(more, less, 1)
    return np.asarray(first.mean(axis=0) - second.mean(axis=0))


def effect_size(more: ArrayLike, less: ArrayLike) -> PerNeuron:
    """Cohen's d: the difference of means over the pooled standard deviation (n − 1) of the two sides.

    A spread below a millionth of the largest activation there is taken for that much, as it is rounding: a neuron that is the
    same on all prompts of each side gets a large d and not an infinite one.

    What it does not show: how much the difference matters downstream; a faint neuron with a fainter spread ranks first.

    Args:
        more: [prompt, layer, neuron], the more refused side.
        less: The other.

    Raises:
        StatisticsError: The shapes do not go together.
        NotEnoughData: A side has fewer than two prompts.
        NotFinite: NaN or infinity.

    >>> effect_size([[[1.0]], [[3.0]]], [[[0.0]], [[2.0]]]).round(3).tolist()
    [[0.707]]
    """
    first, second = _two_sides(more, less, 2)
    n, k = len(first), len(second)
    pooled = ((n - 1) * first.var(axis=0, ddof=1) + (k - 1) * second.var(axis=0, ddof=1)) / (n + k - 2)
    least = _ROUNDING * max(float(np.abs(first).max()), float(np.abs(second).max()))
    difference = first.mean(axis=0) - second.mean(axis=0)
    if not least:
        return np.zeros_like(difference)
    return np.asarray(difference / np.maximum(np.sqrt(pooled), least))


def _two_sides(
    more: ArrayLike, less: ArrayLike, at_least: int
) -> tuple[Float[np.ndarray, "prompt layer neuron"], Float[np.ndarray, "prompt layer neuron"]]:
    first, second = to_numpy(more), to_numpy(less)
    if first.ndim != 3 or second.ndim != 3 or first.shape[1:] != second.shape[1:]:
        raise StatisticsError(
            f"activations of shapes {first.shape} and {second.shape} were given; [prompt, layer, neuron] with the same layers"
            " and neurons is needed."
        )
    if min(len(first), len(second)) < at_least:
        raise NotEnoughData(
            f"the sides have {len(first)} and {len(second)} prompts; at least {at_least} are needed on each."
        )
    for name, values in (("more", first), ("less", second)):
        check_finite(values, name, axes=("prompt", "neuron"))
    return first, second


# --- from gradients ----------------------------------------------------------------------------------


def neuron_gradients(
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
    """Estimate of the effect of zeroing each neuron on `refusal_score`: minus gradient × activation.

    As `gradient_scores` for heads; one backward pass for all neurons. Exact where the score is linear in the neuron on the
    way down to zero; else a ranking and no more. It is blind where any of several neurons suffices.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts whose think block is closed.
        positions: "all", "prompt_last", "generated", a span's name, or a mask [prompt, pos].
        openers: See `refusal_score`.
        skip: See `refusal_score`.
        whitespace: See `refusal_score`.
        max_rows: Most prompts in one pass.
        progress: Show a progress bar.

    Returns:
        DataArray (prompt, layer, neuron), in nats, with the sign of an ablation effect.

    Raises:
        ConditionError: As `refusal_score`.
        EmptySpan: A prompt has no row of the span.
        UnsupportedModel: The MLP is a mixture of experts.
        NotFinite: NaN or infinity in the logits or in a gradient.
    """
    import xarray as xr

    values = slopes(
        model,
        batch,
        "post",
        "neuron_gradients",
        positions=positions,
        openers=openers,
        skip=skip,
        whitespace=whitespace,
        max_rows=max_rows,
        progress=progress,
    )
    return xr.DataArray(
        values,
        dims=("prompt", "layer", "neuron"),
        coords={
            "prompt": [prompt.id for prompt in batch.prompts],
            "family": ("prompt", families_of(batch.prompts)),
            "layer": range(values.shape[1]),
            "neuron": range(values.shape[2]),
        },
        name="neuron_gradient",
        attrs={
            "units": "nats",
            "sign": "estimate of removed − kept",
            "condition": batch.name,
            "positions": told(positions),
        },
    )


# --- over tokens -------------------------------------------------------------------------------------


def activation_contrast(
    first: Model, second: Model, batch: SpanBatch, *, max_rows: int = MAX_ROWS
) -> PerNeuron:
    """Root of the mean squared difference of each neuron between two models, over the tokens written.

    arXiv 2406.14144, section 3: both models read the same texts, prompts with the first model's answers; S is the root of the
    sum over the answers' tokens of (a₁ − a₂)², divided by their number. Both models are in memory at once.

    What it does not show: that the neurons differ for safety's sake. Fine-tuning on anything moves activations; run it on
    other texts as well.

    Args:
        first: The model that wrote, in eval mode.
        second: A model of the same shape and vocabulary.
        batch: `generate(first, …).batch`: prompts and what was written.
        max_rows: Most prompts in one pass.

    Raises:
        ReferenceMismatch: The models are of different shapes.
        ConditionError: Nothing was written in some row.
        NotFinite: NaN or infinity.
    """
    facts = verify(first, reads=["post"])
    other = verify(second, reads=["post"])
    shapes = [(one.n_layers, one.d_mlp, one.d_vocab) for one in (facts, other)]
    if shapes[0] != shapes[1]:
        raise ReferenceMismatch(
            f"models of {shapes[0]} and {shapes[1]} (layers, neurons, vocabulary) were given; neurons of models of different"
            " shapes are not the same neurons."
        )
    _require_written(batch, "activation_contrast")
    total = np.zeros((facts.n_layers, facts.d_mlp))
    n_tokens = 0

    def differing(rows: list[int]) -> tuple[PerNeuron, int]:
        part = batch.select(rows)
        written = counted_rows("generated", batch, part, rows, 0)
        both = [_posts(model, facts, part, written) for model in (first, second)]
        squares = [((one - two) ** 2).sum(dim=0).numpy() for one, two in zip(*both, strict=True)]
        return np.stack(squares), int(written.sum())

    for squares, count in each(
        row_groups(batch.lengths.tolist(), max_rows=max_rows), differing, "activation_contrast"
    ):
        total += squares
        n_tokens += count
    return _checked(np.sqrt(total / n_tokens), "activation_contrast")


def wanda(
    model: Model, batch: SpanBatch, *, positions: Positions | None = None, max_rows: int = MAX_ROWS
) -> PerNeuron:
    """Wanda importance of each neuron on these texts: norm of its activations over tokens times norm of its output weights.

    arXiv 2402.05162 scores each weight of a matrix by |W_ij| · ‖x_j‖₂. Taken over the row of the down-projection that a
    neuron writes with, these are ‖W_out[j]‖₂ · ‖a_j‖₂: importance of neurons, not of weights.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Texts; prompts with answers (`generate(…).batch`), as the paper scores by answers.
        positions: Tokens that count: None (all but padding and the first), "generated", a span's name, or a mask.
        max_rows: Most prompts in one pass.

    Raises:
        EmptySpan: A prompt has no such token.
        UnsupportedModel: The MLP is a mixture of experts, or its output weights cannot be read.
        NotFinite: NaN or infinity.
    """
    facts = verify(model, reads=["post"])
    squares = np.zeros((facts.n_layers, facts.d_mlp))

    def squared(rows: list[int]) -> PerNeuron:
        part = batch.select(rows)
        counted = _tokens_at(positions, batch, part, rows)
        return np.stack([(values**2).sum(dim=0).numpy() for values in _posts(model, facts, part, counted)])

    for found in each(row_groups(batch.lengths.tolist(), max_rows=max_rows), squared, "wanda"):
        squares += found
    norms = np.stack(
        [
            _output_weights(model, facts, layer).double().norm(dim=1).cpu().numpy()
            for layer in range(facts.n_layers)
        ]
    )
    return _checked(np.sqrt(squares) * norms, "wanda")


def snip(model: Model, batch: SpanBatch, *, max_rows: int = 4) -> PerNeuron:
    """SNIP importance of each neuron for what is written in these texts: mean of |activation × gradient of its loss|.

    arXiv 2402.05162 scores each weight by E|W_ij · ∂L/∂W_ij|, L being the negative log-likelihood of the answer. Summed over
    the weights that a neuron writes with, W·∂L/∂W is a·∂L/∂a summed over tokens; the mean is over prompts.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: `generate(…).batch`: prompts and answers.
        max_rows: Most prompts in one pass, which holds all logits and its graph.

    Raises:
        ConditionError: Nothing was written in some row.
        UnsupportedModel: The MLP is a mixture of experts.
        NotFinite: NaN or infinity.
    """
    require_eval(model)
    facts = verify(model, reads=["post"], edits=["post"])
    _require_written(batch, "snip")
    total = np.zeros((facts.n_layers, facts.d_mlp))

    def slopes(rows: list[int]) -> PerNeuron:
        part = batch.select(rows)
        written = counted_rows("generated", batch, part, rows, 0)
        return np.asarray(_loss_slopes(model, facts, part, written).abs().sum(dim=0).numpy())

    for found in each(row_groups(batch.lengths.tolist(), max_rows=max_rows), slopes, "snip"):
        total += found
    return _checked(total / len(batch), "snip")


def set_difference(
    safety: ArrayLike, utility: ArrayLike, q: float, p: float | None = None, scope: Scope = "layer"
) -> Bool[np.ndarray, "layer neuron"]:
    """Neurons among the most important for safety and not among those most important for utility.

    arXiv 2402.05162, section 3: the top q by the score on safety texts minus the top p by that on utility texts.

    Args:
        safety: Importance [layer, neuron] on refusals.
        utility: The same on harmless answers.
        q: Share taken of the first, above 0 and at most 1.
        p: Share taken off by the second; None: q.
        scope: Shares of each layer, or of the whole model.

    Raises:
        StatisticsError: Shapes differ, or a share is impossible.
        NotFinite: NaN or infinity.

    >>> set_difference([[3.0, 2.0, 1.0, 0.0]], [[9.0, 0.0, 0.0, 1.0]], q=0.5, p=0.25).tolist()
    [[False, True, False, False]]
    """
    scores = [to_numpy(values) for values in (safety, utility)]
    if scores[0].shape != scores[1].shape or scores[0].ndim != 2:
        raise StatisticsError(
            f"scores of shapes {scores[0].shape} and {scores[1].shape} were given; [layer, neuron] of both is needed."
        )
    if scope not in ("layer", "model"):
        raise StatisticsError(f"scope={scope!r} was asked for; it is 'layer' or 'model'.")
    masks = []
    for name, values, share in (("q", scores[0], q), ("p", scores[1], q if p is None else p)):
        if not 0 < share <= 1:
            raise StatisticsError(f"{name}={share} was asked for; give a share above 0 and at most 1.")
        check_finite(values, name, axes=("layer", "neuron"))
        rows = values if scope == "layer" else values.reshape(1, -1)
        k = max(1, math.floor(share * rows.shape[1] + 1e-9))
        best = np.argsort(-rows, axis=1, kind="stable")[:, :k]
        mask = np.zeros(rows.shape, dtype=bool)
        np.put_along_axis(mask, best, True, axis=1)
        masks.append(mask.reshape(values.shape))
    return np.asarray(masks[0] & ~masks[1])


def _require_written(batch: SpanBatch, what: str) -> None:
    bare = [row for row, count in enumerate(batch.n_generated or [0] * len(batch)) if not count]
    if bare:
        raise ConditionError(
            f"{what} reads what was written, and nothing was in {len(bare)} of {len(batch)} prompts (first:"
            f" {batch.prompts[bare[0]].id!r}); give rl.generate(...).batch."
        )


def _tokens_at(
    positions: Positions | None, batch: SpanBatch, part: SpanBatch, rows: list[int]
) -> Bool[Tensor, "prompt pos"]:
    if positions is None:
        return part.attention_mask.bool() & ~part.spans["sink"]
    return counted_rows(positions, batch, part, rows, 0)


def _posts(
    model: Model, facts: ModelFacts, part: SpanBatch, counted: Bool[Tensor, "prompt pos"]
) -> list[Float[Tensor, "token neuron"]]:
    """Per layer, activations at the counted tokens, in float64 on the CPU."""
    found: dict[int, Tensor] = {}

    def keep(value: Tensor, hook: Any, layer: int) -> None:  # noqa: ARG001
        found[layer] = value[counted.to(value.device)].detach().double().cpu()

    hooks = [(hook_name("post", layer), partial(keep, layer=layer)) for layer in range(facts.n_layers)]
    with hooked(model, hooks):
        last_logits(model, part.tokens, part.attention_mask)
    return [found[layer] for layer in range(facts.n_layers)]


def _loss_slopes(
    model: Model, facts: ModelFacts, part: SpanBatch, written: Bool[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt layer neuron"]:
    """A · ∂L/∂a summed over tokens, L the negative log-likelihood of the written tokens of each row."""
    outputs: dict[int, Tensor] = {}

    def track(value: Tensor, hook: Any, layer: int) -> Tensor:  # noqa: ARG001
        outputs[layer] = value if value.requires_grad else value.detach().requires_grad_()
        return outputs[layer]

    hooks = [(hook_name("post", layer), partial(track, layer=layer)) for layer in range(facts.n_layers)]
    with gradients_of_activations_only(model), hooked(model, hooks):
        tokens, mask = (values.clone().to(facts.device) for values in (part.tokens, part.attention_mask))
        logits = model(tokens, attention_mask=mask, return_type="logits")
        chances = logits[:, :-1].float().log_softmax(dim=-1)
        each = chances.gather(2, tokens[:, 1:, None].to(chances.device))[..., 0]
        loss = -(each * written[:, 1:].to(each.device)).sum()
        gradients = torch.autograd.grad(loss, [outputs[layer] for layer in range(facts.n_layers)])
    real = part.attention_mask.bool()[:, :, None]
    return torch.stack(
        [
            ((slope.double() * outputs[layer].detach().double()).cpu() * real).sum(dim=1)
            for layer, slope in enumerate(gradients)
        ],
        dim=1,
    )


def _output_weights(model: Model, facts: ModelFacts, layer: int) -> Float[Tensor, "neuron d_model"]:
    weights = getattr(model.blocks[layer].mlp, "W_out", None)
    if weights is None or tuple(weights.shape) != (facts.d_mlp, facts.d_model):
        found = "none" if weights is None else f"one of shape {tuple(weights.shape)}"
        raise UnsupportedModel(
            f"the output weights of the neurons of layer {layer} were looked for at blocks.{layer}.mlp.W_out,"
            f" [{facts.d_mlp}, {facts.d_model}], and {found} was found."
        )
    return weights.detach()


def _checked(values: PerNeuron, what: str) -> PerNeuron:
    if not np.isfinite(values).all():
        raise NotFinite(
            f"{what}: {np.count_nonzero(~np.isfinite(values))} of {values.size} neurons came out NaN or infinite. Load the"
            " model in float32."
        )
    return values
