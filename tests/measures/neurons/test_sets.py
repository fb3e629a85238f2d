"""Sets of neurons: the laws of sets, what may not be mixed, random sets like them, and disk."""

from __future__ import annotations

import dataclasses
import json
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rim_lens as rl
from rim_lens.errors import (
    NotEnoughData,
    NotFinite,
    ReferenceMismatch,
    StatisticsError,
    StudyFolderError,
    UnknownNeuron,
)
from rim_lens.measures.neurons.sets import NeuronSet

LAYERS, WIDTH = 3, 8
pairs = st.sets(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, WIDTH - 1)), max_size=12)
arrays = st.none() | st.integers(0, 99).map(
    lambda seed: np.random.default_rng(seed).normal(size=(LAYERS, WIDTH))
)


def of(neurons: Any, **known: Any) -> NeuronSet:
    return NeuronSet(neurons, LAYERS, WIDTH, **known)


@given(pairs, pairs)
def test_it_obeys_the_laws_of_sets(one: set[tuple[int, int]], other: set[tuple[int, int]]) -> None:
    first, second = of(one), of(other)
    for combine in (operator.or_, operator.and_, operator.sub, operator.xor):
        assert set(combine(first, second)) == combine(one, other)
        assert combine(first, second) == of(combine(one, other)) == combine(first, sorted(other))
    assert (first == second) == (one == other)
    assert len(first) == len(one)
    assert first.neurons == tuple(sorted(one))
    assert (first | second) - (first & second) == first ^ second
    assert hash(of(sorted(one, reverse=True))) == hash(first)
    assert first.per_layer.tolist() == [sum(layer == at for at, _ in one) for layer in range(LAYERS)]
    assert {(int(layer), int(neuron)) for layer, neuron in np.argwhere(first.mask)} == one
    assert all(((layer, n) in first) == ((layer, n) in one) for layer in range(LAYERS) for n in range(WIDTH))
    if one | other:
        assert first.jaccard(second) == len(one & other) / len(one | other) == second.jaccard(first)
    else:
        assert np.isnan(first.jaccard(second))


@settings(max_examples=25)
@given(pairs, arrays, arrays)
def test_it_comes_back_from_disk(
    tmp_path_factory: pytest.TempPathFactory, neurons: Any, scores: Any, activity: Any
) -> None:
    folder = tmp_path_factory.mktemp("neurons")
    made_by = {"m": 3, "by": "contrast", "select_ids": ["é", "2"], "none": None}
    kept = of(neurons, scores=scores, activity=activity, made_by=made_by)
    kept.save(folder)
    back = NeuronSet.load(folder)
    assert isinstance(back, NeuronSet)
    assert (back, back.made_by, back.effects) == (kept, made_by, None)
    for name in ("scores", "activity"):
        was, is_ = getattr(kept, name), getattr(back, name)
        assert (was is None) == (is_ is None)
        assert was is None or np.array_equal(was, is_)
    assert sorted(path.name for path in folder.iterdir()) == ["neurons.json"] + ["neurons.safetensors"] * (
        scores is not None or activity is not None
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "neurons.json").write_text("{"), "no readable set"),
        (lambda folder: (folder / "neurons.json").unlink(), "no readable set"),
        (lambda folder: (folder / "neurons.safetensors").unlink(), "no readable set"),
        (lambda folder: _edit(folder, format_version=99), "format version 99"),
        (lambda folder: _edit(folder, neurons=[[1, 2], [0, 1]]), "not sorted"),
        (lambda folder: _edit(folder, neurons=[[0, WIDTH]]), "no readable set"),
        (lambda folder: _edit(folder, tested=True), "no readable"),
        (lambda folder: _flip(folder / "neurons.safetensors"), "not the file that was written"),
    ],
)
def test_what_is_corrupt_is_not_read(tmp_path: Path, change: Any, said: str) -> None:
    of([(0, 1)], scores=np.ones((LAYERS, WIDTH))).save(tmp_path)
    change(tmp_path)
    with pytest.raises(StudyFolderError, match=said):
        NeuronSet.load(tmp_path)


def _edit(folder: Path, **changed: Any) -> None:
    path = folder / "neurons.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "bad", [(0, WIDTH), (LAYERS, 0), (-1, 0), (0, -1), (0, 1.0), (0, True), 3, (0, 1, 2)]
)
def test_neurons_that_cannot_be_are_refused(bad: Any) -> None:
    with pytest.raises(UnknownNeuron):
        of([(0, 1), bad])
    assert bad not in of([(0, 1), (0, 0), (1, 0)]) or bad == (0, 1)


def test_a_model_s_neurons_are_held_against_the_model() -> None:
    model = rl.load_model("planted")
    named = NeuronSet.of(model, [(1, 255), (0, 3)])
    assert (named.n_layers, named.d_mlp, named.made_by["weights_digest"]) == (
        2,
        256,
        rl.weights_digest(model),
    )
    with pytest.raises(UnknownNeuron, match="neurons 0 to 255"):
        NeuronSet.of(model, [(0, 256)])


def test_models_of_different_shapes_have_no_neurons_in_common() -> None:
    for other in (NeuronSet([(0, 1)], LAYERS + 1, WIDTH), NeuronSet([(0, 1)], LAYERS, WIDTH + 1)):
        assert other != of([(0, 1)])
        for combine in (operator.or_, operator.and_, operator.sub, operator.xor, NeuronSet.jaccard):
            with pytest.raises(ReferenceMismatch, match="different shapes"):
                combine(of([(0, 1)]), other)


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ReferenceMismatch, match=r"\(2, 8\)"):
        of([(0, 1)], activity=np.zeros((2, 8)))
    with pytest.raises(NotFinite, match="neuron 3"):
        of([(0, 1)], scores=np.where(np.arange(24).reshape(3, 8) == 11, np.nan, 0))
    with pytest.raises(StatisticsError, match="made_by"):
        of([(0, 1)], made_by={"p": float("nan")})


def test_what_a_set_was_made_of_cannot_change_under_it() -> None:
    scores = np.zeros((LAYERS, WIDTH))
    kept = of([(0, 1)], scores=scores)
    scores[0, 1] = 5
    assert kept.scores is not None
    assert kept.scores[0, 1] == 0
    with pytest.raises(ValueError, match="read-only"):
        kept.scores[0, 1] = 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        kept.neurons = ()  # type: ignore[misc]


def test_a_combined_set_remembers_every_request_that_chose_it_and_is_not_tested() -> None:
    scores = np.arange(24.0).reshape(3, 8)
    one = of([(0, 1)], scores=scores, activity=scores, made_by={"select_ids": ["a", "b"]}, effects="measured")
    other = of([(0, 2)], scores=scores, made_by={"select_ids": ["b", "c"]})
    both = one | other
    assert both.made_by["select_ids"] == ["a", "b", "c"]
    assert both.effects is None
    assert np.array_equal(both.scores, scores)  # type: ignore[arg-type]
    assert np.array_equal(both.activity, scores)  # type: ignore[arg-type]
    assert (one | of([(0, 2)], scores=-scores)).scores is None  # two criteria are none


def test_ranked_is_by_score_and_then_by_place() -> None:
    scores = np.zeros((LAYERS, WIDTH))
    scores[1, 4], scores[2, 0] = 3, -1
    assert of([(2, 0), (0, 5), (1, 4), (0, 2)], scores=scores).ranked() == [(1, 4), (0, 2), (0, 5), (2, 0)]
    assert of([(2, 0), (0, 5)]).ranked() == [(0, 5), (2, 0)]


def test_random_sets_have_as_many_neurons_in_each_layer() -> None:
    given_ = of([(0, 1), (2, 3), (2, 4)], activity=np.tile(np.arange(8.0), (3, 1)))
    drawn = given_.random_like(n_sets=30, seed=1)
    assert len({one.neurons for one in drawn}) == 30
    for one in drawn:
        assert one.per_layer.tolist() == [1, 0, 2]
        assert one.jaccard(given_) == 0
    assert [one.neurons for one in given_.random_like(30, seed=1)] == [one.neurons for one in drawn]
    anywhere = given_.random_like(60, per_layer=False)
    assert {len(one) for one in anywhere} == {3}
    assert {tuple(one.per_layer) for one in anywhere} != {(1, 0, 2)}
    # All where fewer exist: seven other neurons of one layer.
    assert len(of([(1, 0)]).random_like(100)) == 7


def test_matched_sets_are_about_as_active() -> None:
    wide = NeuronSet([(0, 95)], 1, 100, activity=np.arange(100.0)[None])
    near = {neuron for one in wide.random_like(20, matched="activity") for _, neuron in one}
    far = {neuron for one in wide.random_like(20) for _, neuron in one}
    assert min(near) >= 75 > min(far)
    with pytest.raises(StatisticsError, match="knows no activity"):
        of([(0, 1)]).random_like(matched="activity")
    with pytest.raises(NotEnoughData):
        of([]).random_like()


def test_it_is_shown_as_a_table_and_in_a_notebook() -> None:
    scores = np.arange(24.0).reshape(3, 8)
    table = of([(2, 1), (0, 5)], scores=scores).to_dataframe()
    assert table[["layer", "neuron", "score"]].to_numpy().tolist() == [[0, 5, 5], [2, 1, 17]]
    assert table["activity"].isna().all()
    assert of([]).to_dataframe().empty
    shown = of([(2, 1), (0, 5)], scores=scores)._repr_html_()
    assert "<td>2</td><td>1</td><td>17</td>" in shown
    assert "not tested" in shown
