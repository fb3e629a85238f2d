"""Gradient × activation of the refusal score at a hook point: one backward pass for all heads, or all neurons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import NotFinite
from rim_lens.hooks.positions import Positions, chosen_rows, is_word, require_rows
from rim_lens.lens import (
    Model,
    hook_name,
    hooked,
    last_logits,
    require_eval,
    require_finite,
    tokenizer_of,
    verify,
)
from rim_lens.measures.refusal.first_word import Skip, check_answer_is_next, written_before
from rim_lens.measures.refusal.openers import opener_ids
from rim_lens.measures.refusal.score import check_skip, log_odds
from rim_lens.sharing import each, row_groups

GRADIENT_ROWS = 16  # a pass that keeps its graph holds every layer's activations


def slopes(
    model: Model,
    batch: SpanBatch,
    site: Literal["z", "post"],
    what: str,
    *,
    positions: Positions = "all",
    openers: Iterable[str] | None = None,
    skip: Skip = "greedy",
    whitespace: str | None = None,
    max_rows: int = GRADIENT_ROWS,
    progress: bool = False,
) -> Float[np.ndarray, "prompt layer unit"]:
    """Minus gradient × activation of `refusal_score` at a site, summed over rows (and, for heads, over their width).

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts whose think block is closed.
        site: "z" (units are heads) or "post" (neurons).
        what: Who asks, for messages.
        positions: Rows that count.
        openers: See `refusal_score`.
        skip: See `refusal_score`.
        whitespace: See `refusal_score`.
        max_rows: Most prompts in one pass.
        progress: Show a progress bar.

    Raises:
        ConditionError: As `refusal_score`.
        EmptySpan: A prompt has no row of the span.
        UnsupportedModel: Neurons of a mixture of experts.
        NotFinite: NaN or infinity in the logits or in a gradient.
    """
    check_skip(skip)
    check_answer_is_next(batch, what)
    require_rows(positions, batch, what)
    require_eval(model)
    facts = verify(model, reads=[site], edits=[site])
    ids = torch.tensor(opener_ids(tokenizer_of(model), openers))
    words = written_before(model, batch, skip=skip, whitespace=whitespace, max_rows=max_rows, what=what)
    groups = [
        ([its_rows[place] for place in places], its_written[places])
        for its_rows, its_written in words
        for places in row_groups(batch.lengths[its_rows].tolist(), max_rows=max_rows)
    ]

    def of_group(group: tuple[list[int], Tensor]) -> Float[np.ndarray, "prompt layer unit"]:
        rows, written = group
        part = batch.select(rows)
        counted = counted_rows(positions, batch, part, rows, written.shape[1])
        tokens = torch.cat([part.tokens, written], dim=1)
        mask = torch.cat([part.attention_mask, torch.ones_like(written)], dim=1)
        return _slopes(model, site, facts.n_layers, tokens, mask, counted, ids, what)

    scores = np.empty((len(batch), facts.n_layers, facts.n_heads if site == "z" else facts.d_mlp))
    with tqdm(total=len(batch), desc=f"gradients {batch.name}", disable=not progress) as shown:
        for (rows, _), found in zip(groups, each(groups, of_group, what), strict=True):
            scores[rows] = found
            shown.update(len(rows))
    if not np.isfinite(scores).all():
        bad = np.flatnonzero(~np.isfinite(scores).all(axis=(1, 2))).tolist()
        raise NotFinite(
            f"{what}: NaN or infinity in the gradients of {len(bad)} of {len(batch)} prompts (first: {bad[0]})."
            " Load the model in float32."
        )
    return scores


def counted_rows(
    positions: Positions, batch: SpanBatch, part: SpanBatch, rows: list[int], n_written: int
) -> Bool[Tensor, "prompt pos"]:
    """Rows whose slopes are summed: those that an editor at these positions would change, padding left out."""
    width = part.tokens.shape[1]
    if isinstance(positions, Tensor):
        positions = positions[rows, batch.tokens.shape[1] - width :]
    inside = chosen_rows(positions, part, 0, len(rows), width) & part.attention_mask.bool().cpu()
    after = is_word(positions, "all") or is_word(positions, "generated")
    return torch.cat([inside, torch.full((len(rows), n_written), after)], dim=1)


def _slopes(
    model: Model,
    site: Literal["z", "post"],
    n_layers: int,
    tokens: Int[Tensor, "prompt pos"],
    mask: Int[Tensor, "prompt pos"],
    counted: Bool[Tensor, "prompt pos"],
    ids: Int[Tensor, " opener"],
    what: str,
) -> Float[np.ndarray, "prompt layer unit"]:
    outputs: dict[int, Tensor] = {}
    hooks = [
        (hook_name(site, layer), partial(tracked, outputs=outputs, key=layer)) for layer in range(n_layers)
    ]
    with gradients_of_activations_only(model), hooked(model, hooks):
        # Clones: tensors made in inference mode cannot be kept for a backward pass.
        logits = last_logits(model, tokens.clone(), mask.clone(), gradients=True)
        score = log_odds(require_finite(logits, what), ids.clone().to(logits.device)).sum()
        slopes = torch.autograd.grad(score, [outputs[layer] for layer in range(n_layers)])
    found = []
    for layer, slope in enumerate(slopes):
        each = -(slope.double() * outputs[layer].detach().double()).cpu()
        each = each.sum(dim=-1) if site == "z" else each  # [prompt, pos, unit]
        found.append((each * counted[:, :, None]).sum(dim=1))
    return torch.stack(found, dim=1).numpy()


def tracked(value: Tensor, hook: Any, outputs: dict[Any, Tensor], key: Any) -> Tensor:  # noqa: ARG001
    """A hook that keeps an activation under a key, with a graph that begins no lower than it must."""
    # No parameter takes part, so that the graph begins at the first layer's tensor and holds nothing of what is below.
    outputs[key] = value if value.requires_grad else value.detach().requires_grad_()
    return outputs[key]


@contextmanager
def gradients_of_activations_only(model: Model) -> Iterator[None]:
    """Gradients on, also within no_grad and inference_mode; parameters out of it, and afterwards as they were."""
    took_part = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in took_part:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in took_part:
            parameter.requires_grad_(True)
