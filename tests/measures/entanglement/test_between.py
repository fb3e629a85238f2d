"""Entanglement of two readings against plain loops, and what is said where a number cannot be had."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from rim_lens.errors import (
    NotEnoughData,
    NotFinite,
    ReferenceMismatch,
    StatisticsError,
    StudyFolderError,
    UnknownNeuron,
)
from rim_lens.measures.controls import control_p, percentile_among
from rim_lens.measures.entanglement.between import entangled
from rim_lens.measures.entanglement.matching import alike_sets
from rim_lens.measures.entanglement.reading import ModelReading
from rim_lens.measures.entanglement.result import Entanglement
from rim_lens.measures.entanglement.shifting import Sides, family_weights, resampled_shifts, shifts_of
from rim_lens.measures.entanglement.similarity import debiased_cka
from rim_lens.measures.shift import reciprocal_activation_shift
from tests.chance import UNHURRIED

LAYERS, WIDTH = 2, 30
CHOSEN = [(0, 3), (0, 7), (1, 1), (1, 2), (1, 20)]
PARTS = ("ras", "safety_drop", "reasoning_rise", "arithmetic", "geometric", "minimum", "product")


def reading(arrays, families=2, **known):
    """A reading made of arrays; the n-th prompts of harmful and harmless requests are of one family."""
    named = {}
    for kind, values in arrays.items():
        n = len(values)
        word = "asked" if kind != "reasoning" else "sum"
        coords = {
            "prompt": [f"{kind}{place}" for place in range(n)],
            "family": ("prompt", [f"{word}{place // families}" for place in range(n)]),
        }
        named[kind] = xr.DataArray(values, dims=("prompt", "layer", "neuron"), coords=coords)
    return ModelReading(activations=named, **known)


def two_arrays(seed=0, n=(8, 8, 6), moved=0.5):
    rng = np.random.default_rng(seed)
    base = {
        kind: rng.normal(0.6, 1.0, size=(size, LAYERS, WIDTH))
        for kind, size in zip(("harmful", "harmless", "reasoning"), n, strict=True)
    }
    tuned = {kind: values + moved * rng.normal(size=values.shape) for kind, values in base.items()}
    return base, tuned


def two(seed=0, **settings):
    return tuple(reading(arrays) for arrays in two_arrays(seed, **settings))


def of_set(arrays, neurons):
    layers, places = np.array(neurons).T
    return arrays[:, layers, places]


@settings(UNHURRIED, max_examples=12)
@given(seed=st.integers(0, 999), average=st.sampled_from(["prompts_first", "after"]))
def test_every_set_has_what_the_plain_function_gives_it_alone(seed, average):
    base, tuned = two_arrays(seed)
    found = entangled(
        reading(base),
        reading(tuned),
        CHOSEN,
        average=average,
        floor=0.1,
        n_random_sets=7,
        n_boot=1,
        seed=seed,
    )
    everyone = [(layer, place) for layer in range(LAYERS) for place in range(WIDTH)]
    sets = [everyone, CHOSEN, *(map(tuple, one) for one in found.settings["controls"])]
    assert len(found.sets) == len(sets)
    for (_, row), neurons in zip(found.sets.iterrows(), [list(one) for one in sets], strict=True):
        four = [
            of_set(arrays[kind], neurons) for kind in ("harmful", "reasoning") for arrays in (base, tuned)
        ]
        plain = reciprocal_activation_shift(*four, average=average, floor=0.1)
        expected = {"ras": plain.value, "floored_ras": plain.floored.value}
        expected |= {name: getattr(plain, name) for name in PARTS[1:]}
        assert {name: row[name] for name in expected} == pytest.approx(expected, nan_ok=True)
        assert (row["used_safety"], row["used_reasoning"]) == plain.n_used
        assert (row["moved_safety"], row["moved_reasoning"]) == plain.n_moved
        for side, (ours, theirs) in zip(("safety", "reasoning"), (four[:2], four[2:]), strict=True):
            change = (theirs - ours) if average == "after" else (theirs - ours).mean(axis=0, keepdims=True)
            l2 = [math.sqrt(sum(x * x for x in line) / len(line)) for line in change.tolist()]
            assert row[f"l1_{side}"] == pytest.approx(
                np.mean([[abs(x) for x in line] for line in change.tolist()])
            )
            assert row[f"l2_{side}"] == pytest.approx(sum(l2) / len(l2))


def test_ranks_among_the_random_sets_are_those_of_the_statistics_room():
    found = entangled(*two(), CHOSEN, n_random_sets=40, n_boot=1)
    others = found.sets[found.sets["of"] == "random"]
    assert len(others) == 40
    for metric in ("ras", "product", "l1_safety", "cka_ratio"):
        row = found.row(metric)
        assert row["p_random"] == control_p(row["value"], others[metric], "greater")
        assert row["percentile"] == percentile_among(row["value"], others[metric]).percentile
        assert row["random"] == pytest.approx(others[metric].mean())
        assert row["n_controls"] == 40


def test_the_cka_ratio_of_a_set_is_that_of_its_neurons_alone():
    base, tuned = two_arrays(2)
    found = entangled(reading(base), reading(tuned), CHOSEN, n_random_sets=3, n_boot=20)
    apart = [
        1 - debiased_cka(of_set(base[kind], CHOSEN), of_set(tuned[kind], CHOSEN))
        for kind in ("harmful", "harmless")
    ]
    row = found.row("cka_ratio")
    assert row["value"] == pytest.approx(apart[0] / apart[1])
    assert row["low"] < row["high"]


@pytest.mark.parametrize("average", ["prompts_first", "after"])
def test_resamples_of_families_equal_a_loop_that_repeats_prompts(average):
    base, tuned = two_arrays(1)
    families = {
        "harmful": ["a", "a", "b", "b", "b", "c", "d", "d"],
        "reasoning": ["x", "x", "y", "z", "z", "z"],
    }
    weights = family_weights(families, 12, seed=3)
    sides = Sides(
        *(of_set(arrays[kind], CHOSEN) for kind in ("harmful", "reasoning") for arrays in (base, tuned))
    )
    found = resampled_shifts(sides, weights["harmful"], weights["reasoning"], average, 0.1)
    for draw in range(12):
        rows = {
            kind: [place for place, count in enumerate(weights[kind][draw]) for _ in range(int(count))]
            for kind in families
        }
        for kind, labels in families.items():
            counts = {
                label: {weights[kind][draw][place] for place, its in enumerate(labels) if its == label}
                for label in labels
            }
            assert all(len(one) == 1 for one in counts.values())  # a family comes whole
            assert sum(one.pop() for one in counts.values()) == len(counts)
        four = [
            values[rows[kind]]
            for kind, values in zip(("harmful", "harmful", "reasoning", "reasoning"), sides, strict=True)
        ]
        plain = reciprocal_activation_shift(*four, average=average, floor=0.1)
        assert found["ras"][draw] == pytest.approx(plain.value)
        assert found["floored_ras"][draw] == pytest.approx(plain.floored.value)
        assert found["geometric"][draw] == pytest.approx(plain.geometric)
        one = shifts_of(Sides(*four), [np.arange(len(CHOSEN))], average, None)
        for name in ("l1_safety", "l1_reasoning", "l2_safety", "l2_reasoning"):
            assert found[name][draw] == pytest.approx(one[name][0])


def test_twins_are_drawn_together_and_other_kinds_apart():
    families = {"harmful": ["a", "b", "c"], "reasoning": ["x", "y"], "harmless": ["b", "a", "c"]}
    weights = family_weights(families, 50, seed=0)
    assert np.array_equal(weights["harmful"][:, [1, 0, 2]], weights["harmless"])
    assert (weights["reasoning"].sum(axis=1) == 2).all()
    assert family_weights({"harmful": ["a", "a"], "reasoning": ["x", "y"]}, 5) is None


def test_a_model_against_itself_has_not_moved():
    base, _ = two(4)
    found = entangled(base, base, CHOSEN, n_boot=20)
    for metric in ("ras", "safety_drop", "reasoning_rise", "l1_safety", "l2_reasoning"):
        assert found.value(metric) == found.value(metric, "all") == 0
        assert found.row(metric)["p_random"] == 1
    assert math.isnan(found.value("cka_ratio"))
    assert "moved" in found.row("cka_ratio")["reason"]


def test_a_planted_set_stands_out():
    """Five neurons that fall on safety and rise on reasoning, in a model whose other neurons only jitter."""
    base, tuned = two_arrays(6, moved=0.02)
    layers, places = np.array(CHOSEN).T
    for kind, sign in (("harmful", -1), ("reasoning", 1)):
        base[kind][:, layers, places] = 2.0
        tuned[kind][:, layers, places] = 2.0 + sign
    found = entangled(reading(base), reading(tuned), CHOSEN, n_boot=50)
    assert found.value("safety_drop") == pytest.approx(2.0)  # (2 − 1) / 1 · 2
    assert found.value("reasoning_rise") == pytest.approx(1.5)  # (3 − 2) / 2 · 3
    assert found.row("ras")["p_random"] == pytest.approx(1 / 101)
    assert found.row("ras")["percentile"] == 100


def test_a_side_without_a_usable_neuron_is_nan_with_the_reason():
    base, tuned = two_arrays(7)
    layers, places = np.array(CHOSEN).T
    tuned["harmful"][:, layers, places] = -1.0
    row = entangled(reading(base), reading(tuned), CHOSEN, n_boot=5).row("ras")
    assert math.isnan(row["value"])
    assert math.isnan(row["p"])
    assert "safety" in row["reason"]


def test_one_family_leaves_intervals_out_and_says_so():
    base, tuned = (reading(arrays, families=100) for arrays in two_arrays(8))
    found = entangled(base, tuned, CHOSEN, n_boot=10)
    assert math.isnan(found.row("ras")["low"])
    assert found.row("ras")["p_random"] > 0
    assert any("one family" in note for note in found.settings["notes"])


def test_without_harmless_requests_what_needs_them_says_so():
    base, tuned = (
        reading({kind: values for kind, values in arrays.items() if kind != "harmless"})
        for arrays in two_arrays(9)
    )
    found = entangled(base, tuned, CHOSEN, n_boot=10)
    row = found.row("cka_ratio")
    assert math.isnan(row["value"])
    assert "harmless" in row["reason"]
    assert found.value("ras") > 0


def test_a_set_of_whole_layers_has_nothing_beside_it():
    whole = [(0, place) for place in range(WIDTH)]
    found = entangled(*two(), whole, n_boot=5)
    assert found.row("ras")["n_controls"] == 0
    assert math.isnan(found.row("ras")["p"])
    assert any("No random set" in note for note in found.settings["notes"])


def test_control_sets_of_ones_own_take_the_place_of_random_ones():
    found = entangled(*two(), CHOSEN, controls=[[(0, 1), (1, 5)], [(0, 2)]], n_boot=5)
    assert found.row("l1_safety")["n_controls"] == 2
    assert found.settings["controls_are"] == "given"
    with pytest.raises(NotEnoughData):
        entangled(*two(), CHOSEN, controls=[])


def broken(change):
    base, tuned = two_arrays()
    change(base, tuned)
    return reading(base), reading(tuned)


def set_nan(base, tuned):
    tuned["harmful"][1, 1, 2] = np.nan


def fewer(base, tuned):
    tuned["reasoning"] = tuned["reasoning"][:-1]


def narrower(base, tuned):
    for kind in tuned:
        tuned[kind] = tuned[kind][..., :-1]


def no_reasoning(base, tuned):
    del tuned["reasoning"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (set_nan, NotFinite, "harmful activations of the tuned model"),
        (fewer, ReferenceMismatch, "reasoning"),
        (narrower, ReferenceMismatch, "shape"),
        (no_reasoning, NotEnoughData, "no reasoning prompts"),
    ],
)
def test_bad_readings_are_refused_by_name(change, error, words):
    with pytest.raises(error, match=words):
        entangled(*broken(change), CHOSEN)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"neurons": []}, NotEnoughData),
        ({"neurons": [(0, WIDTH)]}, UnknownNeuron),
        ({"neurons": [(-1, 0)]}, UnknownNeuron),
        ({"matched": "size"}, StatisticsError),
        ({"average": "median"}, StatisticsError),
        ({"floor": -1.0}, StatisticsError),
        ({"floor": math.nan}, StatisticsError),
        ({"n_boot": 0}, StatisticsError),
        ({"level": 1.0}, StatisticsError),
    ],
)
def test_bad_options_are_refused(settings, error):
    with pytest.raises(error):
        entangled(*two(), **{"neurons": CHOSEN, **settings})


def test_other_prompts_and_other_settings_do_not_compare():
    base, tuned = two()
    other = tuned.activations["harmful"].assign_coords(prompt=[f"other{n}" for n in range(8)])
    with pytest.raises(ReferenceMismatch, match="harmful prompts"):
        entangled(base, ModelReading(activations={**tuned.activations, "harmful": other}), CHOSEN)
    base, tuned = (
        reading(arrays, settings={"pool": pool})
        for arrays, pool in zip(two_arrays(), ("max", "mean"), strict=True)
    )
    with pytest.raises(ReferenceMismatch, match="pool"):
        entangled(base, tuned, CHOSEN)


def test_saved_and_read_back_it_is_the_same(tmp_path):
    found = entangled(*two(), CHOSEN, n_random_sets=5, n_boot=10)
    found.save(tmp_path)
    again = Entanglement.load(tmp_path)
    for name in ("table", "sets", "layers", "rows"):
        assert again.to_dataframe(name).equals(found.to_dataframe(name)), name
    assert again.settings == found.settings
    html = again._repr_html_()
    assert "safety_drop" in html
    (tmp_path / "entanglement.json").write_text("{", encoding="utf-8")
    with pytest.raises(StudyFolderError):
        Entanglement.load(tmp_path)
    with pytest.raises(StatisticsError, match="there are"):
        found.row("rsa")


def test_matched_sets_are_alike_in_both_features_and_as_many_in_each_layer():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 400, 2))
    chosen = [(0, 5), (0, 6), (2, 100)]
    sets = alike_sets(chosen, features, n_sets=50, seed=1)
    assert len({tuple(one) for one in sets}) == 50
    ranks = features.argsort(axis=1).argsort(axis=1) / 399
    near = np.array([[np.linalg.norm(ranks[2, one[-1][1]] - ranks[2, 100])] for one in sets])
    every = np.sort(np.linalg.norm(ranks[2] - ranks[2, 100], axis=1))
    assert near.max() <= every[20]
    for one in sets:
        assert [layer for layer, _ in one] == [0, 0, 2]
        assert len(set(one)) == 3
        assert not set(one) & set(chosen)


def test_fewer_sets_than_asked_for_come_all_whatever_they_are_like():
    features = np.random.default_rng(0).normal(size=(1, 4, 2))
    assert len(alike_sets([(0, 1)], features, n_sets=50)) == 3
