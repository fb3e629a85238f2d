"""KL(π_base ‖ π_tuned) on task tokens: a rival of RAS, read without having both models in memory.

The base model's log-probabilities at every row that predicts a task token wait on disk, one float32 each: rows × words
of the vocabulary × 4 bytes. The tuned model then reads the same tokens.

    KL = mean over task tokens of Σ_v p_base(v) (log p_base(v) − log p_tuned(v))        (nats per token)

Task tokens are those of the chain of thought and of the answer to a reasoning prompt, as the *base* model read them, what
it wrote itself included: so π_base is also what the tokens are drawn from.

What it does not show: which predictions moved, or that any of them matters for refusal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rim_lens.batching import MAX_ROWS, MAX_TOKENS, micro_batches
from rim_lens.chat import SpanBatch
from rim_lens.errors import ReferenceMismatch, StudyFolderError
from rim_lens.lens import Model, all_logits, model_facts, require_eval, require_finite
from rim_lens.measures.forced import kl

TOKENS, LOG_PROBS = "task.safetensors", "log_probs.npy"
_MOST_LOGITS = 2**26  # numbers of one pass, 256 MiB in float32


def task_rows(batch: SpanBatch) -> Bool[Tensor, "prompt pos"]:
    """The rows that predict a task token: one of the chain of thought, of the answer, or of what was written after the prompt.

    Where a prompt has none of them (a question alone, thinking off), its last row: the one that predicts the first
    word of the answer.
    """
    task = torch.stack([batch.spans[atom].cpu() for atom in ("cot", "answer")]).any(dim=0)
    for row, n_generated in enumerate(batch.n_generated):
        if n_generated:
            task[row, -n_generated:] = True
    rows = torch.zeros_like(task)
    rows[:, :-1] = task[:, 1:]
    rows &= batch.attention_mask.bool().cpu()
    rows[~rows.any(dim=1), -1] = True
    return rows


def keep_log_probs(model: Model, batch: SpanBatch, folder: str | Path, max_rows: int = MAX_ROWS) -> None:
    """Write the tokens of a batch and this model's log-probabilities at its `task_rows`, whole or not at all.

    Args:
        model: The base model, in eval mode.
        batch: Reasoning prompts, with what the base model wrote.
        folder: Is made where there is none.
        max_rows: Most prompts in one pass.

    Raises:
        NotFinite: NaN or infinity in the logits.
    """
    from safetensors.torch import save_file

    require_eval(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = task_rows(batch)
    tokens, mask = batch.tokens.cpu().contiguous(), batch.attention_mask.cpu().contiguous()
    unfinished = folder / (LOG_PROBS + ".part")
    kept = np.lib.format.open_memmap(
        unfinished, mode="w+", dtype=np.float32, shape=(int(rows.sum()), model_facts(model).d_vocab)
    )
    for places, logits in _at_rows(model, tokens, mask, rows, max_rows):
        kept[places] = logits.double().log_softmax(dim=-1).float().numpy()
    kept.flush()
    del kept
    os.replace(unfinished, folder / LOG_PROBS)
    save_file({"tokens": tokens, "attention_mask": mask, "rows": rows.contiguous()}, folder / TOKENS)


def divergence_from(
    folder: str | Path, model: Model, max_rows: int = MAX_ROWS
) -> Float[np.ndarray, " prompt"]:
    """Mean KL(base ‖ this model) per task token of each prompt, in nats.

    Args:
        folder: Where `keep_log_probs` wrote the base's.
        model: The tuned model, in eval mode, of the same vocabulary.
        max_rows: Most prompts in one pass.

    Raises:
        StudyFolderError: The folder holds no log-probabilities, or damaged ones.
        ReferenceMismatch: The model has another vocabulary.
        NotFinite: NaN or infinity in the logits.
    """
    from safetensors.torch import load_file

    require_eval(model)
    folder = Path(folder)
    try:
        kept = np.load(folder / LOG_PROBS, mmap_mode="r", allow_pickle=False)
        task = load_file(folder / TOKENS)
        rows = task["rows"]
        if kept.ndim != 2 or len(kept) != int(rows.sum()):
            raise ValueError(f"{kept.shape} log-probabilities for {int(rows.sum())} tokens")
    except Exception as problem:  # safetensors raises an exception of its own
        raise StudyFolderError(
            f"{folder} holds no readable log-probabilities of the base model ({problem}). Read the base model again."
        ) from problem
    d_vocab = model_facts(model).d_vocab
    if kept.shape[1] != d_vocab:
        raise ReferenceMismatch(
            f"the base model predicts {kept.shape[1]} words and this one {d_vocab}; KL needs the same vocabulary."
        )
    found = np.empty(int(rows.sum()))
    for places, logits in _at_rows(model, task["tokens"], task["attention_mask"], rows, max_rows):
        found[places] = kl(torch.from_numpy(np.array(kept[places])), logits).numpy()
    prompt = np.repeat(np.arange(len(rows)), rows.sum(dim=1).numpy())
    return np.bincount(prompt, weights=found) / np.bincount(prompt)


def _at_rows(
    model: Model,
    tokens: Int[Tensor, "prompt pos"],
    mask: Int[Tensor, "prompt pos"],
    rows: Bool[Tensor, "prompt pos"],
    max_rows: int,
) -> Iterator[tuple[np.ndarray, Float[Tensor, "row d_vocab"]]]:
    """Logits at the chosen rows, a few prompts at a time, and their places among all chosen rows."""
    width = tokens.shape[1]
    counts = rows.sum(dim=1)
    first = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    lengths = mask.sum(dim=1)
    at_most = min(MAX_TOKENS, max(1, _MOST_LOGITS // model_facts(model).d_vocab))
    for group in micro_batches(lengths.tolist(), at_most, max_rows):
        start = width - int(lengths[group].max())
        logits = all_logits(model, tokens[group, start:], mask[group, start:])
        chosen = rows[group, start:]
        here = require_finite(logits[chosen.to(logits.device)], "KL on task tokens").cpu()
        places = [np.arange(int(first[row]), int(first[row + 1])) for row in group]
        yield np.concatenate(places), here
