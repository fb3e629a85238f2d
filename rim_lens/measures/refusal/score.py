"""How much a model leans to refusing, read from the logits of the answer's first word."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rim_lens.batching import MAX_ROWS
from rim_lens.chat.spans import SpanBatch
from rim_lens.hooks.base import Component, attached
from rim_lens.lens import Model, require_eval, tokenizer_of
from rim_lens.measures.refusal.first_word import (
    FirstWord,
    Skip,
    at_first_words,
    check_answer_is_next,
    first_words_of,
)
from rim_lens.measures.refusal.openers import opener_ids

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


def refusal_score(
    model: Model,
    batch: SpanBatch,
    *components: Component,
    openers: Iterable[str] | None = None,
    skip: Skip = "greedy",
    whitespace: str | None = None,
    max_rows: int = MAX_ROWS,
) -> xr.DataArray:
    r"""Log-odds, in nats, that the answer opens with a refusal.

    score = logsumexp(logits of refusal openers) − logsumexp(all other logits), at the first token that is
    not whitespace (Arditi et al. 2406.11717, section 2; log Σp − log(1 − Σp), finite when saturated).
    Positive: refusing is more likely than not. After a think block many models write a newline first, where
    a score of the very next token would read 0 % refusal from a model that refuses always. So one of:

    - ``skip="greedy"``: up to four whitespace tokens that the model itself would write are passed over, in
      each prompt as many as it would write there.
    - ``skip="forced"``: `whitespace` is appended, and the token after it is scored: the same place in every
      prompt and condition, also where the model would not have written it.
    - ``skip="none"``: the very next token, as naive scores read it.

    It shows a leaning of the first word, not what the whole answer does: "I" opens refusals and harmless answers
    alike. Hold it against `refusal_prefix_score` and `generate`, and look at `first_tokens`.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts whose think block is closed ("off" or a given CoT).
        *components: Editors active meanwhile.
        openers: Texts that refusals begin with; see `opener_ids`.
        skip: "greedy", "forced" or "none".
        whitespace: What is forced; None: what the format writes after the closing tag where that is whitespace, else
            two newlines.
        max_rows: Most prompts in one pass.

    Returns:
        DataArray (prompt) with coordinates ``first_token`` (the most probable first word), ``first_probability``
        (its probability) and ``skipped`` (whitespace tokens passed over). The attribute ``first_tokens`` is a line of
        the likeliest first words over all prompts, mean probabilities beside them, openers marked with an asterisk.

    Raises:
        ConditionError: The think block is open, so that the next token belongs to the CoT; or the prompts end with
            what the model wrote; or whitespace is to be forced that this vocabulary lacks; or an editor acts on
            generated tokens alone, of which there is none unless whitespace is forced.
        NotFinite: NaN or infinity in the logits.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> harmful = rl.load_prompts("harmful", language="toy", split="select")[:4]
    >>> bool((rl.refusal_score(model, chat.render(harmful, think="off")) > 0).all())
    True
    """
    import xarray as xr

    check_skip(skip)
    check_answer_is_next(batch, "refusal_score")
    require_eval(model)
    tokenizer = tokenizer_of(model)
    ids = torch.tensor(opener_ids(tokenizer, openers))
    scores = np.empty(len(batch), dtype=np.float64)
    first = np.empty(len(batch), dtype=np.int64)
    share = np.empty(len(batch), dtype=np.float64)
    skipped = np.empty(len(batch), dtype=np.int64)
    mass: Tensor | None = None
    with attached(model, components, batch, writes=skip == "forced"):
        words = at_first_words(
            model,
            batch,
            components,
            partial(_looked_at, ids=ids),
            skip=skip,
            whitespace=whitespace,
            max_rows=max_rows,
            what="refusal_score",
        )
        for rows, (odds, its_share, its_first, its_skipped, summed) in words:
            scores[rows], share[rows], first[rows], skipped[rows] = odds, its_share, its_first, its_skipped
            mass = summed if mass is None else mass + summed
    return xr.DataArray(
        scores,
        dims="prompt",
        coords={
            "prompt": [prompt.id for prompt in batch.prompts],
            "first_token": ("prompt", [tokenizer.decode([token]) for token in first.tolist()]),
            "first_probability": ("prompt", share),
            "skipped": ("prompt", skipped),
        },
        name="refusal_score",
        attrs={
            "units": "nats",
            "condition": batch.name,
            "skip": skip,
            "first_tokens": "" if mass is None else _line(tokenizer, mass / len(batch), ids),
        },
    )


def _looked_at(word: FirstWord, ids: Int[Tensor, " opener"]) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Log-odds, the likeliest token's chance and number, tokens skipped, and all tokens' chances summed over prompts."""
    chances = word.logits.double().softmax(dim=-1)
    share, first = chances.max(dim=-1)
    return log_odds(word.logits, ids), share, first, word.skipped, chances.sum(dim=0)


def first_tokens(
    model: Model,
    batch: SpanBatch,
    *components: Component,
    k: int = 5,
    openers: Iterable[str] | None = None,
    skip: Skip = "greedy",
    whitespace: str | None = None,
    max_rows: int = MAX_ROWS,
) -> pd.DataFrame:
    """The likeliest first words of each answer: what a refusal score is made of, to be looked at.

    A score says little where its openers hold little of the probability and no other token much, or where the
    likeliest token is whitespace, a tag or a word that opens refusals and plain answers alike.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts whose think block is closed.
        *components: Editors active meanwhile.
        k: How many tokens of each prompt.
        openers: See `opener_ids`.
        skip: See `refusal_score`.
        whitespace: See `refusal_score`.
        max_rows: Most prompts in one pass.

    Returns:
        One row per prompt and rank: prompt, condition, skipped, rank (from 1), token, token_id, probability, opener
        (whether it counts as one), and openers_mass (what all openers together hold, the same in each row of a prompt).

    Raises:
        ConditionError: As `refusal_score`.
        NotFinite: NaN or infinity in the logits.
    """
    import pandas as pd

    check_skip(skip)
    check_answer_is_next(batch, "first_tokens")
    require_eval(model)
    tokenizer = tokenizer_of(model)
    ids = opener_ids(tokenizer, openers)
    lines: dict[int, list[dict[str, object]]] = {}
    with attached(model, components, batch, writes=skip == "forced"):
        for word in first_words_of(
            model, batch, components, skip=skip, whitespace=whitespace, max_rows=max_rows, what="first_tokens"
        ):
            chances = word.logits.double().softmax(dim=-1)
            best = chances.topk(min(k, chances.shape[1]), dim=-1)
            held = chances[:, ids].sum(dim=-1).tolist()
            for place, row in enumerate(word.rows):
                lines[row] = [
                    {
                        "prompt": batch.prompts[row].id,
                        "condition": batch.name,
                        "skipped": word.skipped,
                        "rank": rank,
                        "token": tokenizer.decode([token]),
                        "token_id": token,
                        "probability": chance,
                        "opener": token in ids,
                        "openers_mass": held[place],
                    }
                    for rank, (token, chance) in enumerate(
                        zip(best.indices[place].tolist(), best.values[place].tolist(), strict=True), start=1
                    )
                ]
    return pd.DataFrame([line for row in range(len(batch)) for line in lines[row]])


def check_skip(skip: str) -> None:
    """Refuse an unknown rule for whitespace.

    Raises:
        ValueError: It is not "greedy", "forced" or "none".
    """
    if skip not in ("greedy", "none", "forced"):
        raise ValueError(f"skip={skip!r} was asked for; there are 'greedy', 'forced' and 'none'.")


def _line(
    tokenizer: object, chances: Float[Tensor, " d_vocab"], openers: Int[Tensor, " opener"], k: int = 5
) -> str:
    best = chances.topk(min(k, len(chances)))
    marked = set(openers.tolist())
    return ", ".join(
        f"{tokenizer.decode([token])!r}{'*' if token in marked else ''} {chance:.2f}"  # type: ignore[attr-defined]
        for token, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )


def log_odds(
    logits: Float[Tensor, "prompt d_vocab"], ids: Int[Tensor, " opener"]
) -> Float[Tensor, " prompt"]:
    """Log-odds of these tokens against all others, in float64; gradients pass."""
    wide = logits.double()
    others = torch.ones(wide.shape[1], dtype=torch.bool, device=wide.device)
    others[ids] = False
    return wide[:, ids].logsumexp(dim=1) - wide[:, others].logsumexp(dim=1)
