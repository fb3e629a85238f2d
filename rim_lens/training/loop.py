"""The plain training loop that the organisms' recipes and the fine-tuner share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from rim_lens.errors import ModelError, NotFinite


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to step.

    Attributes:
        steps: Number of optimiser steps.
        lr: Peak learning rate of AdamW.
        schedule: Shape of the learning rate after the warm-up.
        warmup: Steps of linear warm-up; step 0 runs at ``lr / warmup``.
        final_fraction: What "cosine" and "linear" end at, as a fraction of `lr`.
        weight_decay: Decoupled weight decay.
        betas: AdamW's running-average factors.
        clip: Largest allowed norm of the whole gradient.
    """

    steps: int
    lr: float
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int = 0
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Token ids, and which of them the model is to predict.

    Attributes:
        tokens: Token ids, padded on the left.
        attention_mask: 1 on real tokens, 0 on padding.
        loss_mask: True where the token *at that position* is to be predicted (from those before it).
        weights: Weight of each prompt, or of each token, in the loss; None weighs all alike.
    """

    tokens: Int[Tensor, "prompt pos"]
    attention_mask: Int[Tensor, "prompt pos"]
    loss_mask: Bool[Tensor, "prompt pos"]
    weights: Float[Tensor, " prompt"] | Float[Tensor, "prompt pos"] | None = None


def left_pad(
    rows: Sequence[Sequence[int]],
    predict_from: Sequence[int],
    *,
    pad_token: int = 0,
    weights: Sequence[float] | None = None,
) -> Batch:
    """Stack token rows of unequal length into one batch.

    Args:
        rows: Token ids of each prompt with its completion.
        predict_from: Index into each row of the first token to predict; all later ones are predicted too.
        pad_token: Id written into the padding, which nothing attends to.
        weights: Weight of each row in the loss.

    >>> batch = left_pad([[5, 6, 7], [8, 9]], [2, 1])
    >>> batch.tokens.tolist(), batch.loss_mask.int().tolist()
    ([[5, 6, 7], [0, 8, 9]], [[0, 0, 1], [0, 0, 1]])
    """
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), pad_token)
    attention_mask = torch.zeros_like(tokens)
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    for index, (row, start) in enumerate(zip(rows, predict_from, strict=True)):
        offset = width - len(row)
        tokens[index, offset:] = torch.tensor(row)
        attention_mask[index, offset:] = 1
        loss_mask[index, offset + start :] = True
    return Batch(tokens, attention_mask, loss_mask, None if weights is None else torch.tensor(list(weights)))


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of one step (0-based).

    >>> config = TrainConfig(steps=11, lr=1.0, schedule="linear", warmup=1, final_fraction=0.0)
    >>> learning_rate(config, 0), learning_rate(config, 6), learning_rate(config, 11)
    (1.0, 0.5, 0.0)
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    remaining = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[config.schedule]
    return config.lr * (config.final_fraction + (1.0 - config.final_fraction) * remaining)


def train(
    model: Any,
    batch_at: Callable[[int], Batch | Sequence[Batch]],
    config: TrainConfig,
    *,
    parameters: Iterable[torch.nn.Parameter] | None = None,
    row_average: bool = False,
    on_step: Callable[[int, float], bool | None] | None = None,
    progress: bool = True,
    autocast: torch.dtype | None = None,
    penalty: Callable[[], Tensor] | None = None,
) -> list[float]:
    """Fine-tune or train a Hugging Face causal language model in place, with AdamW.

    The caller decides by `batch_at` what is drawn at each step, so that the loop itself holds no randomness
    (but for dropout, where the model has any). The model is put in training mode and given back as it was.

    Args:
        model: Any Hugging Face causal language model.
        batch_at: Step → the batch of that step, or the pieces of it (each padded to its own length): their
            gradients add up to the gradient of the whole batch.
        config: How to step.
        parameters: What to train; those that require a gradient where None.
        row_average: Average over each prompt's predicted tokens first (by their weights, where given by token) and then over prompts, so that a long
            completion counts no more than a short one. Else every predicted token counts alike.
        on_step: Called after each step with the step and its loss; training stops where it returns True.
        progress: Show a progress bar.
        autocast: dtype of matrix products (``torch.bfloat16``); the weights keep their own. None: no autocast.
        penalty: A differentiable term of the weights alone, added to the loss of every step.

    Returns:
        The loss of every step taken, in nats per token, before that step's update and without the penalty.

    Raises:
        ModelError: Nothing is trainable.
        ValueError: A batch predicts nothing, its first token, or padding.
        NotFinite: The loss or gradient is NaN or infinite; the message names the step. The weights are those
            before that step.
    """
    trained = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
    if not trained:
        raise ModelError(
            "training was asked for, but no parameter requires a gradient (load_model and wrap_hf switch them off)."
            " Call requires_grad_(True) on what is to be trained."
        )
    device = trained[0].device
    optimiser = torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    losses: list[float] = []
    was_training = model.training
    model.train()
    try:
        with torch.enable_grad():
            for step in tqdm(range(config.steps), desc="training", unit="step", disable=not progress):
                drawn = batch_at(step)
                loss = add_gradient(
                    model, [drawn] if isinstance(drawn, Batch) else drawn, row_average, autocast, device
                )
                if penalty is not None:
                    penalty().backward()  # type: ignore[no-untyped-call]
                norm = float(torch.nn.utils.clip_grad_norm_(trained, config.clip))
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise NotFinite(
                        f"at training step {step} of {config.steps} the loss is {loss} and the gradient norm {norm}."
                        " Lower the learning rate, lengthen the warm-up, or train in fp32; the last finite loss was"
                        f" {losses[-1] if losses else 'none'}."
                    )
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(config, step)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                losses.append(loss)
                if on_step is not None and on_step(step, loss):
                    break
    finally:
        optimiser.zero_grad(set_to_none=True)
        model.train(was_training)
    return losses


def add_gradient(
    model: Any,
    pieces: Sequence[Batch],
    row_average: bool,
    autocast: torch.dtype | None,
    device: torch.device,
) -> float:
    """Add the gradient of the pieces' joint loss to the parameters, and return that loss.

    Args:
        model: A Hugging Face causal language model.
        pieces: One batch in pieces, each padded to its own length.
        row_average: See `train`.
        autocast: See `train`.
        device: Where the model is.

    Raises:
        ValueError: The pieces predict nothing.
    """
    token_weights = [_token_weights(piece, row_average) for piece in pieces]
    total = sum(float(weights.sum()) for weights in token_weights)
    if total <= 0:
        raise ValueError("a training batch predicts no token: its loss_mask or weights are all zero.")
    loss = 0.0
    for piece, weights in zip(pieces, token_weights, strict=True):
        amp = nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
        with amp:
            nats = _token_losses(model, piece, device)
        part = (nats * weights[piece.loss_mask].to(device)).sum() / total
        part.backward()  # type: ignore[no-untyped-call]
        loss += float(part.detach())
    return loss


def _token_weights(batch: Batch, row_average: bool) -> Float[Tensor, "prompt pos"]:
    if bool(batch.loss_mask[:, 0].any()) or bool((batch.loss_mask & (batch.attention_mask == 0)).any()):
        raise ValueError(
            "a training batch asks to predict the first token or padding: loss_mask is True where the token at that"
            " position is to be predicted from those before it."
        )
    weights = batch.loss_mask.float()
    if batch.weights is not None and batch.weights.ndim == 2:
        weights = weights * batch.weights
    if row_average:
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return (
        weights * batch.weights[:, None] if batch.weights is not None and batch.weights.ndim == 1 else weights
    )


def _token_losses(model: Any, batch: Batch, device: torch.device) -> Float[Tensor, " predicted"]:
    """Cross-entropy of each predicted token, in the order of ``tokens[loss_mask]``."""
    columns = batch.loss_mask.any(dim=0).nonzero().squeeze(1)
    inputs: dict[str, Any] = {}
    keep = columns - 1
    # The unembedding of a small model costs as much as its blocks: do it only where a token is predicted.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = keep.to(device)
    mask = batch.attention_mask.to(device)
    logits = model(
        input_ids=batch.tokens.to(device),
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
        **inputs,
    ).logits
    if not inputs:
        logits = logits[:, keep.to(device)]
    wanted = batch.loss_mask[:, columns].to(device)
    targets = batch.tokens[:, columns].to(device)[wanted]
    return torch.nn.functional.cross_entropy(logits[wanted].float(), targets, reduction="none")
