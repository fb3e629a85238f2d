"""Control sets against the rule they follow, and places among them against a plain count."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rim_lens.errors import NotEnoughData, NotFinite, StatisticsError, UnknownHead, UnknownNeuron
from rim_lens.measures import controls
from rim_lens.measures.controls import (
    control_p,
    percentile_among,
    random_heads_per_layer,
    random_neurons_per_layer,
)
from tests.chance import EIGHTHS, UNHURRIED, assert_level_held

EFFECTS = st.lists(EIGHTHS, min_size=1, max_size=20)


@settings(UNHURRIED, max_examples=60)
@given(value=EIGHTHS, controls=EFFECTS)
def test_percentile_is_the_mid_rank_of_the_size(value, controls):
    sizes = [abs(control) for control in controls]
    expected = sum(1.0 if size < abs(value) else 0.5 if size == abs(value) else 0.0 for size in sizes)
    percentile, n_controls = percentile_among(value, controls)
    assert percentile == pytest.approx(100 * expected / len(sizes))
    assert n_controls == len(controls)


@settings(UNHURRIED, max_examples=60)
@given(value=EIGHTHS, controls=EFFECTS)
def test_control_p_counts_ties_and_itself(value, controls):
    n = len(controls)
    assert control_p(value, controls) == (1 + sum(abs(c) >= abs(value) for c in controls)) / (1 + n)
    assert control_p(value, controls, "less") == (1 + sum(c <= value for c in controls)) / (1 + n)
    assert control_p(value, controls, "greater") == (1 + sum(c >= value for c in controls)) / (1 + n)
    assert control_p(value, controls) >= 1 / (1 + n)


def test_control_p_holds_its_level_for_one_more_draw():
    effects = np.random.default_rng(23).normal(size=(3000, 20)).round(1)
    assert_level_held([control_p(row[0], row[1:]) for row in effects])


def test_controls_must_be_there_and_finite():
    for function in (percentile_among, control_p):
        with pytest.raises(NotEnoughData):
            function(1.0, [])
        with pytest.raises(NotFinite, match="control 1"):
            function(1.0, [1.0, math.nan])
        with pytest.raises(NotFinite, match="placed among controls"):
            function(math.nan, [1.0])


# --- random sets ---------------------------------------------------------------------------------------


@st.composite
def head_sets(draw):
    n_heads = draw(st.integers(2, 6))
    pairs = st.tuples(st.integers(0, 3), st.integers(0, n_heads - 1))
    return sorted(draw(st.sets(pairs, min_size=1, max_size=8))), n_heads


@settings(UNHURRIED, max_examples=80)
@given(case=head_sets(), n_sets=st.integers(1, 30), seed=st.integers(0, 5))
def test_random_sets_match_per_layer_and_follow_the_rule(case, n_sets, seed):
    heads, n_heads = case
    per_layer = {layer: [h for where, h in heads if where == layer] for layer, _ in heads}
    options = []
    for layer, taken in per_layer.items():
        others = [h for h in range(n_heads) if h not in taken]
        pool = others if len(others) >= len(taken) else list(range(n_heads))
        options.append([[(layer, h) for h in c] for c in itertools.combinations(pool, len(taken))])
    every = {tuple(itertools.chain(*parts)) for parts in itertools.product(*options)} - {tuple(heads)}
    if not every:
        with pytest.raises(NotEnoughData, match="no other set"):
            random_heads_per_layer(heads, n_heads, n_sets, seed)
        return
    sets = [tuple(one) for one in random_heads_per_layer(heads, n_heads, n_sets, seed)]
    assert len(sets) == len(set(sets)) == min(n_sets, len(every))
    assert set(sets) <= every


def test_the_given_set_never_comes_back_where_sets_must_overlap():
    for seed in range(20):
        assert random_heads_per_layer([(0, 0), (0, 1)], 3, n_sets=1, rng=seed) != [[(0, 0), (0, 1)]]


def test_eight_heads_in_a_layer_give_seven_controls_of_one():
    assert random_heads_per_layer([(1, 3)], 8) == [[(1, head)] for head in range(8) if head != 3]


def test_random_sets_are_even_and_seeded():
    counts = np.zeros(12)
    for seed in range(40):
        for one in random_heads_per_layer([(0, 0), (0, 5)], 12, n_sets=25, rng=seed):
            for _, head in one:
                counts[head] += 1
    assert counts[0] == counts[5] == 0
    others = np.delete(counts, [0, 5])
    assert np.abs(others - 200).max() < 4 * math.sqrt(200)
    draw = [
        random_heads_per_layer([(0, 0), (0, 5)], 12, 5, np.random.default_rng(seed)) for seed in (1, 1, 2)
    ]
    assert draw[0] == draw[1] != draw[2]


def test_random_neurons_are_plain_integers_in_a_wide_layer():
    neurons = [(0, 5), (0, 9_000), (3, 1)]
    sets = random_neurons_per_layer(neurons, 14_336, n_sets=50)
    assert len(sets) == 50
    for one in sets:
        assert [layer for layer, _ in one] == [0, 0, 3]
        assert not set(one) & set(neurons)
        assert all(type(number) is int for pair in one for number in pair)


@pytest.mark.parametrize("head", [(0, 4), (0, -1), (-1, 0)])
def test_heads_and_neurons_that_cannot_be_are_refused(head):
    with pytest.raises(UnknownHead, match="heads run from 0 to 3"):
        random_heads_per_layer([(0, 0), head], 4)
    with pytest.raises(UnknownNeuron, match="neurons run from 0 to 3"):
        random_neurons_per_layer([head], 4)


def test_nothing_to_match_is_refused():
    with pytest.raises(NotEnoughData, match="empty set"):
        random_heads_per_layer([], 4)
    with pytest.raises(NotEnoughData, match="all 2 heads"):
        random_heads_per_layer([(0, 0), (0, 1)], 2)
    with pytest.raises(StatisticsError):
        random_heads_per_layer([(0, 0)], 4, n_sets=0)


@settings(UNHURRIED, max_examples=40)
@given(seed=st.integers(0, 1000), n_members=st.integers(1, 5))
def test_controls_matched_by_activity_are_near_neighbours_in_their_layer(seed, n_members):
    rng = np.random.default_rng(seed)
    activity = rng.normal(size=(2, 60))
    members = [(1, int(place)) for place in rng.choice(60, n_members, replace=False)]
    sets = random_neurons_per_layer(members, d_mlp=60, n_sets=10, rng=seed, activity=activity)
    assert len(sets) == 10
    assert len({tuple(candidate) for candidate in sets}) == 10
    others = sorted(set(range(60)) - {place for _, place in members})
    # Whoever was drawn is within reach of some member: its 20 nearest, and one more for each place already taken.
    reach = set()
    for _, member in members:
        order = sorted(others, key=lambda place: abs(activity[1, place] - activity[1, member]))
        reach |= set(order[: controls.NEAREST + n_members - 1])
    for candidate in sets:
        assert len(set(candidate)) == n_members
        assert {layer for layer, _ in candidate} == {1}
        assert {place for _, place in candidate} <= reach


def test_matching_by_activity_moves_controls_towards_the_set():
    activity = np.arange(200.0)[None]
    members = [(0, 199), (0, 198)]
    plain = random_neurons_per_layer(members, 200, n_sets=50)
    alike = random_neurons_per_layer(members, 200, n_sets=50, activity=activity)
    assert min(place for candidate in alike for _, place in candidate) >= 199 - 2 - controls.NEAREST
    assert np.mean([place for candidate in plain for _, place in candidate]) < 150


def test_what_is_to_be_avoided_is_in_no_control_where_others_are_enough():
    members, avoid = [(0, 1), (0, 2), (1, 5)], [(0, place) for place in range(3, 8)]
    sets = random_neurons_per_layer(members, 12, n_sets=40, avoid=avoid)
    drawn = {neuron for candidate in sets for neuron in candidate}
    assert not drawn & {*members, *avoid}
    assert drawn == {(0, place) for place in (0, 8, 9, 10, 11)} | {
        (1, place) for place in range(12) if place != 5
    }
    # Of layer 0 too few are left: there it is as if nothing were to be avoided.
    crowded = random_neurons_per_layer(members, 8, n_sets=200, avoid=[*avoid, (1, 0)])
    of_layer_0 = {place for candidate in crowded for layer, place in candidate if layer == 0}
    assert of_layer_0 == set(range(8)) - {1, 2}
    assert (1, 0) not in {neuron for candidate in crowded for neuron in candidate}


def test_where_neighbours_allow_few_sets_those_come_and_no_more(monkeypatch):
    monkeypatch.setattr(controls, "NEAREST", 2)
    sets = random_neurons_per_layer([(0, 0)], 200, n_sets=50, activity=np.arange(200.0)[None])
    assert sorted(sets) == [[(0, 1)], [(0, 2)]]


@pytest.mark.parametrize("shape", [(1, 8), (2, 7), (2,)])
def test_activity_must_cover_the_layers(shape):
    with pytest.raises(StatisticsError, match="activity has shape"):
        random_heads_per_layer([(1, 3)], 8, n_sets=3, activity=np.zeros(shape))
    with pytest.raises(NotFinite, match="layer 0, head 0"):
        random_heads_per_layer([(1, 3)], 8, n_sets=3, activity=np.full((2, 8), math.nan))


def test_an_unknown_alternative_is_refused():
    with pytest.raises(StatisticsError, match="'both' is unknown"):
        control_p(1.0, [1.0], alternative="both")
