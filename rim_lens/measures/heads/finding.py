"""Which heads move refusal when they are removed: found on some requests, tested on others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from rim_lens.batching import MAX_ROWS
from rim_lens.chat.spans import SpanBatch
from rim_lens.hooks import AblateHeads
from rim_lens.lens import Head, Model
from rim_lens.measures.readings import refusal_reading

if TYPE_CHECKING:
    pass

# Refusal scores with these heads removed, one number per request
ScoreWithout = Callable[[Sequence[Head]], Float[np.ndarray, " prompt"]]


def scorer(model: Model, batch: SpanBatch, max_rows: int = MAX_ROWS) -> ScoreWithout:
    """Return a function that gives the refusal scores of a batch with some heads zeroed.

    Removing nothing gives the baseline. Heads are zeroed at every position (paper, section 3).
    """
    reading = refusal_reading(model, batch, max_rows=max_rows)
    return lambda heads: reading([AblateHeads(heads)] if heads else [])


def find_heads(
    score: ScoreWithout,
    candidates: Iterable[Head],
    *,
    max_heads: int = 6,
    n_second: int = 16,
    min_gain: float = 0.25,
) -> list[Head]:
    """Find a small set of heads without which the model no longer refuses: greedy by ablation, then pruned.

    Heads may stand in for each other, so that single effects miss a pair. The first head is the one whose
    removal lowers the mean refusal score most; each next one is chosen among the `n_second` strongest
    candidates by what it adds to the removal of those before. It stops when refusing is more likely than not
    on no more than one request in fifty, when nothing adds `min_gain` nats, or at `max_heads`. Last, a head is dropped
    if the set does without it.

    What it cannot see: two heads of which either alone does the whole work show no effect one by one, and where
    no head has one the search ends before it begins. The set is chosen on these requests; its effect must be
    measured on others.

    Args:
        score: Scores by removed heads, see `scorer`; best on requests of the `select` split.
        candidates: Heads to look among.
        max_heads: Largest set.
        n_second: Candidates tried again in each later round.
        min_gain: Smallest fall of the mean score, in nats, for which a head is added.

    Returns:
        The heads, in the order found; empty where no removal lowers the score by `min_gain`.
    """
    score = _measured_once(score)
    candidates = list(candidates)
    means = {head: float(score([head]).mean()) for head in candidates}
    ranked = sorted(candidates, key=lambda head: (means[head], head))
    found: list[Head] = []
    current = float(score([]).mean())
    pool = ranked
    while len(found) < max_heads:
        trials = {head: means[head] if not found else float(score([*found, head]).mean()) for head in pool}
        if not trials:
            break
        best = min(trials, key=lambda head: (trials[head], head))
        if current - trials[best] < min_gain:
            break
        found, current = [*found, best], trials[best]
        if _gone(score(found)):
            break
        pool = [head for head in ranked[: n_second + len(found)] if head not in found]
    return _pruned(score, found, current, min_gain)


def _measured_once(score: ScoreWithout) -> ScoreWithout:
    known: dict[frozenset[Head], Float[np.ndarray, " prompt"]] = {}

    def remembered(heads: Sequence[Head]) -> Float[np.ndarray, " prompt"]:
        key = frozenset(heads)
        if key not in known:
            known[key] = score(heads)
        return known[key]

    return remembered


def _gone(scores: Float[np.ndarray, " prompt"]) -> bool:
    return float((scores > 0).mean()) <= 0.02


def _pruned(score: ScoreWithout, found: list[Head], level: float, min_gain: float) -> list[Head]:
    kept = list(found)
    for head in found:
        rest = [other for other in kept if other != head]
        if not rest:
            break
        without = score(rest)
        if (_gone(without) and _gone(score(kept))) or float(without.mean()) - level < min_gain:
            kept = rest
    return kept
