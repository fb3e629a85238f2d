"""The search and the test of heads on planted truths, and on random numbers where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest
import torch

from rim_lens.errors import NotEnoughData, UnknownHead
from rim_lens.hooks import AblateHeads
from rim_lens.measures.heads.finding import COLUMNS, find_heads, head_table, scorer
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


# --- the table -------------------------------------------------------------------------------------------

FAMILIES = [f"f{row // 2}" for row in range(N)]


def effects(**at: float) -> dict[Head, np.ndarray]:
    """Effects around zero, but for heads such as L1H2=-3.0."""
    rng = np.random.default_rng(0)
    planted = {(int(name[1]), int(name[3])): value for name, value in at.items()}
    return {head: planted.get(head, 0.0) + 0.3 * rng.standard_normal(N) for head in HEADS}


def row_of(table, head: Head):
    return table[(table["layer"] == head[0]) & (table["head"] == head[1])].iloc[0]


def test_verdicts() -> None:
    harmful = effects(L1H0=-3.0, L1H1=-3.0, L2H0=2.0)
    twins = {head: values * 0 + 0.1 for head, values in harmful.items()}
    twins[1, 1] = harmful[1, 1] + 0.3 * np.random.default_rng(1).standard_normal(N)
    found = [(1, 0), (1, 1), (2, 0), (2, 1)]
    table = head_table(harmful, twins, found, FAMILIES)
    assert tuple(table.columns) == COLUMNS
    assert len(table) == len(HEADS)
    assert row_of(table, (1, 0))["verdict"] == "refusal"
    assert row_of(table, (1, 1))["verdict"] == "general"  # the twins move as much
    assert row_of(table, (2, 0))["verdict"] == "refusal"  # raises refusal, and of harmful requests alone
    assert row_of(table, (2, 1))["verdict"] == "none"
    for head in HEADS:
        here = row_of(table, head)
        assert here["found"] == (head in found)
        assert np.isnan(here["p"]) == (head not in found)
        assert (here["verdict"] == "not tested") == (head not in found)
        assert here["effect"] == pytest.approx(harmful[head].mean())
        assert here["effect_twins"] == pytest.approx(twins[head].mean())
        assert here["specificity"] == pytest.approx((harmful[head] - twins[head]).mean())
        assert here["effect_low"] <= here["effect"] <= here["effect_high"]
        assert here["specificity_low"] <= here["specificity"] <= here["specificity_high"]


def test_the_yardstick_is_the_other_heads_of_the_layer() -> None:
    harmful = effects(L1H0=-3.0, L1H1=-3.0)
    twins = {head: np.zeros(N) for head in HEADS}
    table = head_table(harmful, twins, [(1, 0), (1, 1)], FAMILIES)
    for head in ((1, 0), (1, 1)):
        assert row_of(table, head)["percentile"] == 100
        assert row_of(table, head)["n_controls"] == 2  # the two found ones are no controls
    assert row_of(table, (2, 0))["n_controls"] == 4
    assert np.isnan(row_of(table, (2, 0))["percentile"])
    whole = head_table(harmful, twins, [(1, head) for head in range(4)], FAMILIES)
    assert row_of(whole, (1, 0))["n_controls"] == 0
    assert np.isnan(row_of(whole, (1, 0))["percentile"])


def test_found_heads_come_first_by_effect() -> None:
    table = head_table(
        effects(L0H0=-1.0, L1H0=-3.0), {head: np.zeros(N) for head in HEADS}, [(0, 0), (1, 0)], FAMILIES
    )
    assert table["found"].tolist() == [True, True] + [False] * 10
    assert table.loc[0, ["layer", "head"]].tolist() == [1, 0]
    assert table["effect"][2:].is_monotonic_increasing


def test_nothing_found_tests_nothing() -> None:
    table = head_table(effects(L0H0=-1.0), effects(), [], FAMILIES)
    assert table["p"].isna().all()
    assert set(table["verdict"]) == {"not tested"}
    assert head_table({}, {}, [], FAMILIES).empty


def test_the_same_seed_gives_the_same_table() -> None:
    arguments = (effects(L0H0=-1.0), effects(), [(0, 0)], FAMILIES)
    assert head_table(*arguments, seed=3).equals(head_table(*arguments, seed=3))


def test_families_not_requests_are_the_units() -> None:
    """Forty equal requests of three families say what three requests say: no p below 1/4."""
    harmful = {(0, 0): np.full(42, -3.0) + np.repeat([0.0, 0.1, 0.2], 14)}
    table = head_table(harmful, {(0, 0): np.zeros(42)}, [(0, 0)], [f"f{row // 14}" for row in range(42)])
    assert table["p"][0] == pytest.approx(0.25)
    assert table["verdict"][0] == "none"


def test_one_family_is_refused_and_unlabelled_requests_are_families_of_their_own() -> None:
    harmful = {(0, 0): np.full(8, -3.0) + np.linspace(0, 1, 8)}
    twins = {(0, 0): np.zeros(8)}
    with pytest.raises(NotEnoughData, match="1 request family"):
        head_table(harmful, twins, [(0, 0)], ["same"] * 8)
    table = head_table(harmful, twins, [(0, 0)], [""] * 8)
    assert table["p"][0] == pytest.approx(2 / 2**8)
    assert table["verdict"][0] == "refusal"


def test_a_found_head_without_effects_is_named() -> None:
    with pytest.raises(UnknownHead, match=r"\(2, 3\)"):
        head_table({(0, 0): np.zeros(8)}, {(0, 0): np.zeros(8)}, [(2, 3)], [str(row) for row in range(8)])


def test_no_effect_at_all_is_none() -> None:
    zeros = {(0, 0): np.zeros(N), (0, 1): np.zeros(N)}
    table = head_table(zeros, zeros, [(0, 0)], FAMILIES)
    assert table["p"][0] == 1
    assert table["verdict"][0] == "none"


def test_the_more_heads_are_tested_the_more_it_takes() -> None:
    harmful = effects(L0H0=-0.15)
    twins = {head: np.zeros(N) for head in HEADS}
    p = [row_of(head_table(harmful, twins, HEADS[:n], FAMILIES), (0, 0))["p"] for n in (1, 4, 12)]
    assert p[0] < p[1] < p[2]


def test_where_there_is_nothing_a_head_is_called_something_no_more_often_than_one_time_in_twenty() -> None:
    """Heads fixed beforehand, effects random: heavy tails, requests of a family alike, heads alike."""
    runs, n_families = 500, 9
    families = [f"f{row // 2}" for row in range(2 * n_families)]
    rng = np.random.default_rng(2)
    some, refusal = 0, 0
    for run in range(runs):
        common = rng.laplace(size=n_families)
        harmful, twins = (
            {
                (0, head): np.repeat(common + rng.laplace(size=n_families), 2)
                + rng.normal(size=2 * n_families)
                for head in range(2)
            }
            for _ in range(2)
        )
        table = head_table(harmful, twins, [(0, 0), (0, 1)], families, seed=run)
        tested = table[table["found"]]
        some += bool((tested["p"] <= 0.05).any())
        refusal += bool((tested["verdict"] == "refusal").any())
    error = 3 * (0.05 * 0.95 / runs) ** 0.5
    assert some / runs <= 0.05 + error
    assert some / runs >= 0.05 - error  # nor so careful that nothing could ever be found
    assert refusal <= some


def test_a_planted_effect_is_seen() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for run in range(40):
        harmful = {(0, head): (-1.5 * (head == 0)) + rng.normal(size=N) for head in range(4)}
        twins = {(0, head): rng.normal(size=N) for head in range(4)}
        table = head_table(harmful, twins, [(0, 0)], FAMILIES, seed=run)
        hits += row_of(table, (0, 0))["verdict"] == "refusal"
    assert hits >= 36


def test_torch_and_thread_state_are_left_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    head_table(effects(L0H0=-1.0), effects(), [(0, 0)], FAMILIES)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
