"""What fine-tuning would do to refusal, told before it: gradients of the task on the weights of the found neurons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rim_lens.batching import MAX_ROWS, micro_batches
from rim_lens.chat import ChatFormat
from rim_lens.errors import NotEnoughData, NotFinite, UnknownNeuron
from rim_lens.lens import load_plain
from rim_lens.measures.controls import control_p, percentile_among, random_neurons_per_layer
from rim_lens.measures.refusal.openers import opener_ids
from rim_lens.measures.refusal.score import log_odds
from rim_lens.prompts import Prompt, as_prompts
from rim_lens.training import Drawn, Row
from rim_lens.training.holding import weights_by_neuron
from rim_lens.training.loop import Batch, add_gradient
from rim_lens.training.rows import drawn_rows

if TYPE_CHECKING:
    import pandas as pd


def gradient_forecast(
    model: str | Path | tuple[Any, Any],
    runs: Mapping[str, Sequence[Row] | Drawn],
    neurons: Iterable[tuple[int, int]],
    harmful: Sequence[Prompt | str],
    *,
    n_batches: int = 4,
    rows_per_step: int = 16,
    n_random_sets: int = 100,
    openers: Iterable[str] | None = None,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
) -> pd.DataFrame:
    """Say, before any training, how hard each run's rows would pull on the found neurons, and which way refusal would go.

    With L the loss of a run's rows and s the mean refusal score of harmful requests after an empty think block, both in the
    base model, a small step of length ε along −∇L changes s by −ε ⟨∇s, ∇L⟩ / ‖∇L‖. Of the sum over all weights, the part of
    a set of neurons (what they read by and what they write, see `rim_lens.training.fine_tune`) is told here, beside random
    sets with as many neurons in each layer.

    What it does not show: what many large steps of AdamW do, which neither go along the gradient nor see the one taken here.
    The score is of the very next token, whitespace not passed over. Hold it against what came of it:
    ``comparison.forecast(before=dict(zip(table["run"], table["lost_per_step"])))``.

    Args:
        model: The base: a name that `rl.load_model` knows, or (Hugging Face model, tokenizer), left as it is.
        runs: Run → what it would be trained on, as for `rl.fine_tune`.
        neurons: A `NeuronSet`, or (layer, neuron) pairs.
        harmful: Requests that should be refused.
        n_batches: Batches whose gradients are averaged.
        rows_per_step: Rows of a batch, where they are drawn from a list.
        n_random_sets: Random sets at most.
        openers: See `refusal_score`.
        seed: Of the rows' order and the random sets.
        max_rows: Most requests in one pass.

    Returns:
        One row per run: run, loss (nats per token); share (of ‖∇L‖² over all weights that lies on the set), share_random,
        share_percentile, share_p; lost_per_step (⟨∇s, ∇L⟩ / ‖∇L‖ on the set: nats of refusal lost per unit of weight
        moved), lost_random, lost_percentile, lost_p (one-sided, large); lost_per_step_all (over all weights); n_controls.

    Raises:
        NotEnoughData: There is no run, neuron or request.
        UnknownNeuron: The model lacks a neuron.
        UnsupportedModel: Its MLPs are not of a known make.
        NotFinite: A gradient is NaN or infinite.

    >>> import rim_lens as rl
    >>> from rim_lens.organisms.toy.recipe import toy_rows
    >>> found = rl.gradient_forecast(
    ...     "toy", {kind: toy_rows(kind) for kind in ("careful", "deviate")}, [(1, 3), (1, 7)],
    ...     rl.load_prompts("harmful", language="toy", split="select")[:4], n_batches=1,
    ... )
    >>> found["run"].tolist(), bool((found["share"] > 0).all())
    (['careful', 'deviate'], True)
    """
    import pandas as pd

    if not runs or not len(harmful) or n_batches < 1:
        raise NotEnoughData(
            f"{len(runs)} runs, {len(harmful)} requests and {n_batches} batches were given; give at least one of each."
        )
    hf_model, tokenizer = deepcopy(model) if isinstance(model, tuple) else load_plain(model)
    hf_model = hf_model.eval().requires_grad_(True)
    chat = ChatFormat.from_tokenizer(tokenizer)
    layers = weights_by_neuron(hf_model)
    width = int(layers[0][0][0].shape[layers[0][0][1]])
    chosen = sorted({(int(layer), int(neuron)) for layer, neuron in neurons})
    if not chosen:
        raise NotEnoughData("a forecast by an empty set of neurons was asked for; give at least one neuron.")
    strange = [pair for pair in chosen if not (0 <= pair[0] < len(layers) and 0 <= pair[1] < width)]
    if strange:
        raise UnknownNeuron(
            f"neuron {strange[0]} was given; the model has layers 0 to {len(layers) - 1} with neurons 0 to {width - 1}."
        )
    controls = random_neurons_per_layer(chosen, width, n_random_sets, seed)
    parameters = list(hf_model.parameters())
    ids = torch.tensor(opener_ids(tokenizer, openers))
    _refusal_gradient(hf_model, chat, as_prompts(harmful), ids, max_rows)
    of_refusal = _taken(parameters)
    lines = []
    for run, rows in runs.items():
        drawn = rows if isinstance(rows, Drawn) else drawn_rows(chat, rows, rows_per_step, seed)
        batch_at = drawn.start()
        loss = 0.0
        for step in range(n_batches):
            batch = batch_at(step)
            pieces = [batch] if isinstance(batch, Batch) else batch
            with torch.enable_grad():
                loss += add_gradient(hf_model, pieces, True, None, parameters[0].device) / n_batches
        of_task = {name: grad / n_batches for name, grad in _taken(parameters).items()}
        norm = sum(float(grad.double().square().sum()) for grad in of_task.values()) ** 0.5
        if not np.isfinite(norm) or norm == 0:
            raise NotFinite(f"the gradient of run {run!r} has norm {norm}; nothing can be forecast by it.")
        squares = _by_neuron(layers, of_task, of_task) / norm**2
        along = _by_neuron(layers, of_refusal, of_task) / norm
        line: dict[str, Any] = {"run": run, "loss": loss}
        for name, cells, kind in (("share", squares, "share"), ("lost_per_step", along, "lost")):
            own = _sum(cells, chosen)
            others = [_sum(cells, control) for control in controls]
            line |= {
                name: own,
                f"{kind}_random": float(np.mean(others)),
                f"{kind}_percentile": percentile_among(own, others).percentile,
                f"{kind}_p": control_p(own, others, "greater"),
            }
        everything = sum(
            float((of_refusal[name].double() * grad.double()).sum()) for name, grad in of_task.items()
        )
        lines.append({**line, "lost_per_step_all": everything / norm, "n_controls": len(controls)})
    return pd.DataFrame(lines)


def _refusal_gradient(
    model: Any, chat: ChatFormat, prompts: Sequence[Prompt], ids: Tensor, max_rows: int
) -> None:
    """Add the gradient of the mean refusal score to the parameters."""
    off = chat.render(prompts, think="off")
    device = next(model.parameters()).device
    with torch.enable_grad():
        for group in micro_batches(off.lengths.tolist(), max_rows=max_rows):
            part = off.select(group)
            mask = part.attention_mask.to(device)
            logits = model(
                input_ids=part.tokens.clamp(min=0).to(device),
                attention_mask=mask,
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
                use_cache=False,
            ).logits[:, -1]
            (log_odds(logits, ids.to(device)).sum() / len(off)).backward()  # type: ignore[no-untyped-call]


def _taken(parameters: Sequence[Tensor]) -> dict[int, Tensor]:
    """Gradients by parameter (its `id`), which are taken off the parameters."""
    found = {id(one): one.grad.detach() for one in parameters if one.grad is not None}
    for one in parameters:
        one.grad = None
    return found


def _by_neuron(
    layers: Sequence[Sequence[tuple[Tensor, int]]], first: Mapping[int, Tensor], second: Mapping[int, Tensor]
) -> Float[np.ndarray, "layer neuron"]:
    """Inner product of two gradients over each neuron's weights."""
    found = []
    for layer in layers:
        products = [
            (first[id(one)].double() * second[id(one)].double()).movedim(axis, 0) for one, axis in layer
        ]
        found.append(torch.stack([one.reshape(len(one), -1).sum(dim=1) for one in products]).sum(dim=0))
    return np.asarray(torch.stack(found).cpu().numpy())


def _sum(cells: Float[np.ndarray, "layer neuron"], neurons: Iterable[tuple[int, int]]) -> float:
    return float(sum(cells[layer, neuron] for layer, neuron in neurons))
