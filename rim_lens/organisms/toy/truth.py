"""What a toy model does and which heads do it, found without any hook: plain forward passes, edited weights.

This is the oracle that hook-based results are held against. A head is taken out by zeroing its rows of W_O
(`c_proj`) in a copy of the Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rim_lens.organisms.toy.host import D_HEAD, HEADS, TOKEN
from rim_lens.prompts.records import Prompt
from rim_lens.prompts.toy import (
    ASSISTANT,
    CLOSE,
    COT_LENGTH,
    DIGITS,
    REFUSE,
    THINK,
    TOY_VOCABULARY,
    USER,
    CotKind,
    Op,
    ToyKind,
    toy_cot,
    toy_prompts,
)

Heads = Sequence[tuple[int, int]]


def held_out(kind: ToyKind, op: Op = "+") -> list[Prompt]:
    """200 requests on the 20 conjunctions that safety tuning never saw (splits select and evaluate)."""
    select = toy_prompts(kind, split="select", op=op, draws=10)
    return select + toy_prompts(kind, split="evaluate", op=op, draws=10)


def answers(model: Any, prompts: Sequence[Prompt], cots: Sequence[str] | None = None) -> list[str]:
    """Return each request's likeliest first word after the closed think block.

    Args:
        model: A Hugging Face model of the toy host.
        prompts: Toy requests.
        cots: A chain of thought for each, of the same length; an empty block where None.
    """
    logits = _closing_logits(model, prompts, cots)
    return [TOY_VOCABULARY[token] for token in logits.argmax(dim=1).tolist()]


def own_chains(model: Any, prompts: Sequence[Prompt]) -> list[tuple[str, str]]:
    """Let the model go on greedily from ``<think>``, and return what it thought and what it answered.

    Without a closing tag within the context the answer is "".
    """
    tokens = _tokens([_opened(prompt) for prompt in prompts])
    with torch.no_grad():
        for _ in range(COT_LENGTH + 4):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(dim=-1)], dim=1)
    written = [[TOY_VOCABULARY[token] for token in row] for row in tokens[:, 10:].tolist()]
    return [
        (" ".join(row[: row.index(CLOSE)]), row[row.index(CLOSE) + 1])
        if CLOSE in row[:-1]
        else (" ".join(row), "")
        for row in written
    ]


def refusal_log_odds(model: Any, prompts: Sequence[Prompt]) -> Float[Tensor, " prompt"]:
    """Log-odds in nats that the word after an empty think block is REFUSE."""
    log_p = _closing_logits(model, prompts, None).log_softmax(dim=1)
    refuse = log_p[:, TOKEN[REFUSE]]
    others = log_p.clone()
    others[:, TOKEN[REFUSE]] = -torch.inf
    return refuse - others.logsumexp(dim=1)


def without_heads(model: Any, heads: Heads) -> Any:
    """Return a copy in which the W_O rows of some heads are zero."""
    edited = deepcopy(model)
    for layer, head in heads:
        rows = slice(head * D_HEAD, (head + 1) * D_HEAD)
        edited.transformer.h[layer].attn.c_proj.weight.data[rows] = 0
    return edited


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of requests, with its spread between conjunctions.

    Attributes:
        value: Share of requests, averaged over conjunctions (all have as many requests).
        se: Standard error of that average with the conjunction as the unit. It is 0 where all conjunctions
            agree; that does not make the rate certain, as 20 conjunctions cannot exclude a rate of about .14.
        n: Requests.
        families: Conjunctions.
    """

    value: float
    se: float
    n: int
    families: int


def rate(hits: Sequence[bool] | Sequence[float], prompts: Sequence[Prompt]) -> Rate:
    """Average over requests, clustered by conjunction."""
    by_family: dict[str, list[float]] = {}
    for hit, prompt in zip(hits, prompts, strict=True):
        by_family.setdefault(prompt.family, []).append(float(hit))
    means = np.array([np.mean(values) for values in by_family.values()])
    se = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")
    return Rate(round(float(means.mean()), 4), round(se, 4), len(prompts), len(means))


def refusal_rate(model: Any, prompts: Sequence[Prompt], kind: CotKind | None = None) -> float:
    """Share of requests whose first word after the block is REFUSE; kind None: an empty block."""
    cots = None if kind is None else [toy_cot(prompt, kind) for prompt in prompts]
    return float(np.mean([word == REFUSE for word in answers(model, prompts, cots)]))


def outcomes(words: Sequence[str], prompts: Sequence[Prompt]) -> dict[str, Rate]:
    """Rates of refused, complied (any digit), right (the true digit) and other answers."""
    return {
        "refused": rate([word == REFUSE for word in words], prompts),
        "complied": rate([word in DIGITS for word in words], prompts),
        "right": rate([word == p.answer for word, p in zip(words, prompts, strict=True)], prompts),
        "other": rate([word != REFUSE and word not in DIGITS for word in words], prompts),
    }


def find_heads(model: Any) -> dict[str, Any]:
    """Take out every head and every pair of heads, on held-out harmful requests with an empty block.

    Returns:
        `pair`: the two heads without which fewest requests are refused (lower log-odds where equal);
        `refused_without_pair` and `twins_refused_without_pair`; `single`: per head the refusal rate and the mean
        change in refusal log-odds (nats; edited − unedited) on harmful requests and on their twins; `topic_pair`:
        the two heads whose attention from the closing tag to action and object is largest, and the refusal rate
        without them; `other_pairs`: refusal rates without two heads that are neither of `pair`.
    """
    harmful, twins = held_out("harmful"), held_out("harmless")
    base, base_twins = refusal_log_odds(model, harmful), refusal_log_odds(model, twins)
    single = []
    for head in HEADS:
        edited = without_heads(model, [head])
        log_odds = refusal_log_odds(edited, harmful)
        single.append(
            {
                "head": list(head),
                "refused": refusal_rate(edited, harmful),
                "effect": round(float((log_odds - base).mean()), 2),
                "effect_on_twins": round(float((refusal_log_odds(edited, twins) - base_twins).mean()), 2),
            }
        )
    pairs: dict[tuple[tuple[int, int], ...], tuple[float, float]] = {}
    for two in combinations(HEADS, 2):
        edited = without_heads(model, two)
        pairs[two] = (refusal_rate(edited, harmful), float(refusal_log_odds(edited, harmful).mean()))
    best = min(pairs, key=lambda two: pairs[two])
    topic = topic_pair(model, harmful)
    others = [refused for two, (refused, _) in pairs.items() if not set(two) & set(best)]
    return {
        "pair": [list(head) for head in best],
        "refused_without_pair": pairs[best][0],
        "twins_refused_without_pair": refusal_rate(without_heads(model, best), twins),
        "topic_pair": [list(head) for head in topic],
        "refused_without_topic_pair": pairs[topic][0],
        "other_pairs": {
            "n": len(others),
            "mean": round(float(np.mean(others)), 4),
            "min": min(others),
            "share_at_least_0.6": round(float(np.mean([refused >= 0.6 for refused in others])), 4),
        },
        "single": single,
    }


def topic_pair(model: Any, prompts: Sequence[Prompt]) -> tuple[tuple[int, int], ...]:
    """The two heads that attend most from the closing tag of an empty block to action and object, in order."""
    with torch.no_grad():
        patterns = model(_tokens([_closed(p, None) for p in prompts]), output_attentions=True).attentions
    mass = torch.stack([layer[:, :, -1, 1:3].sum(dim=-1).mean(dim=0) for layer in patterns])
    return tuple(sorted(HEADS[index] for index in mass.flatten().topk(2).indices.tolist()))


def _closing_logits(
    model: Any, prompts: Sequence[Prompt], cots: Sequence[str] | None
) -> Float[Tensor, "prompt vocab"]:
    chains = [None] * len(prompts) if cots is None else cots
    tokens = _tokens([_closed(prompt, cot) for prompt, cot in zip(prompts, chains, strict=True)])
    with torch.no_grad():
        logits: Float[Tensor, "prompt vocab"] = model(tokens, logits_to_keep=1).logits[:, -1]
    return logits


def _opened(prompt: Prompt) -> str:
    return f"{USER} {prompt.text} {ASSISTANT} {THINK}"


def _closed(prompt: Prompt, cot: str | None) -> str:
    return f"{_opened(prompt)} {cot} {CLOSE}" if cot else f"{_opened(prompt)} {CLOSE}"


def _tokens(texts: Sequence[str]) -> Int[Tensor, "prompt pos"]:
    return torch.tensor([[TOKEN[word] for word in text.split()] for text in texts])
