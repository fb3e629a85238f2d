"""The search for heads on planted truths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest

from rim_lens.hooks import AblateHeads
from rim_lens.measures.heads.finding import find_heads, scorer
from rim_lens.measures.refusal.score import refusal_score
from tests.speaking import REQUESTS, TOKEN, Spoken, ids_of, logits_alone

Head = tuple[int, int]
HEADS: list[Head] = [(layer, head) for layer in range(3) for head in range(4)]
N = 24
BASE = 4.0 + np.linspace(-1, 1, N)  # nats: every request is refused


class Planted:
    """Scores of a model whose truth is known; remembers which sets were asked for."""

    def __init__(self, fall: Callable[[frozenset[Head]], float], noise: float = 0.02) -> None:
        self.fall, self.noise = fall, noise
        self.asked: list[frozenset[Head]] = []

    def __call__(self, heads: Sequence[Head]) -> np.ndarray:
        removed = frozenset(heads)
        assert len(removed) == len(heads), "a head was removed twice"
        self.asked.append(removed)
        # Small noise that belongs to the set, so that the function is one.
        rng = np.random.default_rng(abs(hash(tuple(sorted(removed)))) % 2**32)
        return BASE - self.fall(removed) + self.noise * rng.standard_normal(N) * bool(removed)


def additive(weights: dict[Head, float]) -> Callable[[frozenset[Head]], float]:
    return lambda removed: sum(weights.get(head, 0.0) for head in removed)


# --- the search ------------------------------------------------------------------------------------------


def test_one_head() -> None:
    assert find_heads(Planted(additive({(1, 2): 6.0})), HEADS) == [(1, 2)]


def test_an_additive_pair_strongest_first() -> None:
    score = Planted(additive({(1, 2): 3.0, (2, 0): 4.0}))
    assert find_heads(score, HEADS) == [(2, 0), (1, 2)]


def test_decoys_that_raise_refusal_or_do_next_to_nothing_stay_out() -> None:
    decoys = {(0, 0): -5.0, (0, 1): 0.1, (0, 2): 0.2, (2, 3): -0.3}
    assert find_heads(Planted(additive({**decoys, (1, 2): 3.0, (2, 0): 4.0})), HEADS) == [(2, 0), (1, 2)]


@pytest.mark.parametrize("weights", [{}, {(0, 0): 0.2}, {(0, 0): -3.0}])
def test_no_head(weights: dict[Head, float]) -> None:
    score = Planted(additive(weights))
    assert find_heads(score, HEADS) == []
    assert max(map(len, score.asked)) <= 1  # nothing to go on from


def test_no_candidates() -> None:
    assert find_heads(Planted(additive({(0, 0): 9.0})), []) == []


def test_heads_that_partly_stand_in_for_each_other() -> None:
    """Each alone costs 0.5, both together 6: found, as the second is chosen by what it adds to the first."""
    pair = {(0, 3), (2, 1)}
    score = Planted(lambda removed: {0: 0.0, 1: 0.5, 2: 6.0}[len(removed & pair)] + 0.4 * ((1, 1) in removed))
    assert set(find_heads(score, HEADS)) == pair


def test_heads_that_fully_stand_in_for_each_other_are_not_found() -> None:
    """Greedy sees no first step, returns nothing, and says so in its docstring; it invents no other head."""
    pair = {(0, 3), (2, 1)}
    assert find_heads(Planted(lambda removed: 6.0 * (len(removed & pair) == 2)), HEADS) == []
    assert "either alone" in str(find_heads.__doc__)


def test_a_head_the_set_does_without_is_dropped() -> None:
    """(0, 0) has the largest effect alone, but the two behind it do all of it and more."""

    def fall(removed: frozenset[Head]) -> float:
        two = {(1, 0), (1, 1)} <= removed
        return (
            6.0 if two else 1.5 * ((0, 0) in removed) + 1.2 * ((1, 0) in removed) + 1.0 * ((1, 1) in removed)
        )

    assert find_heads(Planted(fall, noise=0.0), HEADS) == [(1, 0), (1, 1)]


def test_max_heads_and_min_gain_hold() -> None:
    score = Planted(additive(dict.fromkeys(HEADS, 0.4)))
    assert len(find_heads(score, HEADS, max_heads=3)) == 3
    assert find_heads(score, HEADS, min_gain=0.6) == []
    assert max(map(len, score.asked)) <= 3


def test_it_stops_once_refusal_is_gone() -> None:
    score = Planted(additive(dict.fromkeys(HEADS, 6.0)))
    assert len(find_heads(score, HEADS)) == 1
    assert max(map(len, score.asked)) == 1


def test_later_rounds_try_only_the_strongest() -> None:
    score = Planted(additive({(0, 0): 2.0, (0, 1): 1.9, (0, 2): 1.8, (2, 2): 0.3}), noise=0.0)
    find_heads(score, HEADS, n_second=2, max_heads=2)
    tried = {next(iter(asked - {(0, 0)})) for asked in score.asked if len(asked) == 2 and (0, 0) in asked}
    assert tried == {(0, 1), (0, 2)}


def test_no_set_is_measured_twice() -> None:
    score = Planted(additive({(1, 2): 2.0, (2, 0): 1.5, (0, 0): 1.0, (0, 3): 0.5}))
    assert len(find_heads(score, HEADS)) == 4
    assert len(score.asked) == len(set(score.asked))
    assert sum(len(asked) == 1 for asked in score.asked) == len(HEADS)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_found_has_an_effect_and_order_of_candidates_does_not_matter(seed: int) -> None:
    """Random interactions of up to two heads: the set found always lowers refusal; each head is a candidate, once."""
    rng = np.random.default_rng(seed)
    single = {head: float(rng.normal(scale=0.5)) for head in HEADS}
    double = {frozenset(pair): float(rng.normal(scale=0.5)) for pair in combinations(HEADS, 2)}

    def fall(removed: frozenset[Head]) -> float:
        return sum(single[head] for head in removed) + sum(v for pair, v in double.items() if pair <= removed)

    score = Planted(fall, noise=0.0)
    found = find_heads(score, HEADS, max_heads=4)
    assert len(set(found)) == len(found) <= 4
    assert set(found) <= set(HEADS)
    if found:
        assert fall(frozenset(found)) >= 0.25
        for head in found:  # each earns its place, unless it is alone
            rest = frozenset(found) - {head}
            still = float((BASE - fall(rest) > 0).mean()) > 0.02
            assert not rest or still or fall(frozenset(found)) - fall(rest) >= 0
    else:
        assert max(single.values()) < 0.25
    shuffled = [HEADS[place] for place in rng.permutation(len(HEADS))]
    assert find_heads(Planted(fall, noise=0.0), shuffled, max_heads=4) == found


# --- the scorer ------------------------------------------------------------------------------------------


def test_the_scorer_measures_the_model_without_these_heads(spoken_gqa: Spoken) -> None:
    batch = spoken_gqa.chat.render(REQUESTS, think="off")
    score = scorer(spoken_gqa.model, batch, max_rows=2)
    for heads in ([], [(0, 1)], [(0, 1), (1, 4)]):
        found = score(heads)
        assert found.shape == (len(batch),)
        for row in range(len(batch)):
            logits = logits_alone(spoken_gqa.oracle, ids_of(batch, row), heads).double()
            probability = logits.softmax(dim=-1)[TOKEN["REFUSE"]]
            assert found[row] == pytest.approx(float(probability.logit()), abs=2e-5)
    np.testing.assert_allclose(score([]), refusal_score(spoken_gqa.model, batch).values, atol=1e-6)
    np.testing.assert_allclose(
        score([(1, 0)]), refusal_score(spoken_gqa.model, batch, AblateHeads([(1, 0)])).values, atol=1e-6
    )
    assert not any(point.fwd_hooks for point in spoken_gqa.model.hook_dict.values())
