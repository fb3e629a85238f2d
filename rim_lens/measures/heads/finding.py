"""Which heads move refusal when they are removed: found on some requests, tested on others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from rim_lens.batching import MAX_ROWS
from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import NotEnoughData, UnknownHead
from rim_lens.hooks import AblateHeads
from rim_lens.lens import Head, Model
from rim_lens.measures.controls import percentile_among
from rim_lens.measures.heads.readings import refusal_reading
from rim_lens.measures.stats import bootstrap_interval, family_index, sign_flip_test

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    *("layer", "head", "found", "effect", "effect_low", "effect_high", "p", "effect_twins"),
    *("specificity", "specificity_low", "specificity_high", "percentile", "n_controls", "verdict"),
)

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


def head_table(
    effects: Mapping[Head, Float[np.ndarray, " prompt"]],
    twin_effects: Mapping[Head, Float[np.ndarray, " prompt"]],
    found: Sequence[Head],
    families: Sequence[str],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Test heads, one by one, on requests that did not choose them.

    Args:
        effects: Per head, edited − baseline refusal score on harmful requests, nats, paired by request. The found
            heads and, as the yardstick, the other heads of their layers.
        twin_effects: The same on the harmless twins, request by request.
        found: Heads chosen elsewhere; only these are tested and corrected for.
        families: Request family of each prompt; signs are flipped and intervals drawn by family.
        seed: Of the permutations and the bootstrap.

    Returns:
        One row per head: layer, head, found, effect with its interval, p (sign flips over families, max-statistic
        over the found heads; NaN for others), effect on twins, specificity (harmful − twins) with its interval,
        percentile of |effect| among the other heads of the layer and their number, and a verdict: *refusal*
        (tested, and specific), *general* (tested, not specific), *none*, or *not tested*.

    Raises:
        NotEnoughData: Fewer than two families.
        UnknownHead: A found head has no effects.
    """
    import pandas as pd

    absent = [head for head in found if head not in effects]
    if absent:
        raise UnknownHead(f"head {absent[0]} was found, but its effects were not given; measure it as well.")
    n_families = family_index(families, len(families))[1]
    if n_families < 2:
        raise NotEnoughData(f"{n_families} request family; a test over requests needs at least two.")
    p_values: dict[Head, float] = {}
    if found:
        stacked = np.stack([effects[head] for head in found], axis=1)
        test = sign_flip_test(stacked, families=families, correction="max", seed=seed)
        p_values = dict(zip(found, np.atleast_1d(test.p).tolist(), strict=True))
    rows = []
    for head in sorted(effects):
        layer, number = head
        effect = bootstrap_interval(effects[head], families=families, seed=seed)
        gap = bootstrap_interval(effects[head] - twin_effects[head], families=families, seed=seed)
        others = [
            float(effects[other].mean()) for other in effects if other[0] == layer and other not in found
        ]
        percentile = (
            percentile_among(float(effect.estimate), others).percentile
            if others and head in p_values
            else float("nan")
        )
        rows.append(
            {
                "layer": layer,
                "head": number,
                "found": head in p_values,
                "effect": float(effect.estimate),
                "effect_low": float(effect.low),
                "effect_high": float(effect.high),
                "p": p_values.get(head, float("nan")),
                "effect_twins": float(twin_effects[head].mean()),
                "specificity": float(gap.estimate),
                "specificity_low": float(gap.low),
                "specificity_high": float(gap.high),
                "percentile": percentile,
                "n_controls": len(others),
                "verdict": _verdict(
                    p_values.get(head), float(effect.estimate), float(gap.low), float(gap.high)
                ),
            }
        )
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.sort_values(["found", "effect"], ascending=[False, True], ignore_index=True)


def _verdict(p: float | None, effect: float, low: float, high: float) -> str:
    if p is None:
        return "not tested"
    if p > 0.05:
        return "none"
    specific = high < 0 if effect < 0 else low > 0
    return "refusal" if specific else "general"
