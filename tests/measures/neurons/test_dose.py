"""Effect over set size where it is planted how much each neuron carries, and against neuron_effects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.errors import (
    MissingTwin,
    NotFinite,
    StatisticsError,
    StudyFolderError,
    UnknownNeuron,
    UnsupportedModel,
)
from rim_lens.measures.held_out import chosen_by
from rim_lens.measures.neurons.dose import COLUMNS, SIZES, dose_curve, ranking
from rim_lens.measures.neurons.effects import neuron_effects
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.measures.stats import sign_flip_test
from rim_lens.measures.twins import families_by_swap
from rim_lens.organisms.planted import planted_truth
from tests.families import FAMILIES, tiny_moe
from tests.measures.refusal.test_direction import toy

BOTH = "harmful − harmless"
COLUMNS_OF_EFFECTS = ("before", "change", "change_low", "change_high", "random", "percentile", "p_controls")


def asked(step: int = 6) -> tuple[list[rl.Prompt], list[rl.Prompt]]:
    harmful, harmless = (
        rl.load_prompts(kind, language="toy", split="evaluate")[::step] for kind in ("harmful", "harmless")
    )
    return harmful, harmless


def test_each_planted_neuron_carries_its_share_and_random_ones_none() -> None:
    """The eight AND neurons write equal parts of HARM."""
    truth = planted_truth()
    order = [*truth.neurons, *truth.decoy_neurons]
    table = dose_curve(*toy("planted"), order, *asked(), sizes=[8, 2, 4, 16], n_random_sets=5)
    assert tuple(table.columns) == COLUMNS
    harmful = table[table["kind"] == "harmful"]
    assert harmful["size"].tolist() == [2, 4, 8, 16]
    change = dict(zip(harmful["size"], harmful["change"], strict=True))
    assert change[2] == pytest.approx(change[8] / 4, rel=0.15)
    assert change[4] == pytest.approx(change[8] / 2, rel=0.15)
    assert change[16] == pytest.approx(change[8], rel=0.15)
    assert (harmful["percentile"] == 100).all()
    assert (harmful["random"].abs() < 1.5).all()
    assert (table[table["kind"] == "harmless"]["change"].abs() < 2).all()
    assert (harmful["n_controls"] == 5).all()


def test_every_size_is_a_set_like_any_other() -> None:
    """As neuron_effects has it, size by size; p corrected over sizes."""
    model, chat = toy("toy")
    scores = np.random.default_rng(0).random((2, 256))
    table = dose_curve(model, chat, scores, *asked(), sizes=[3, 40], n_random_sets=4, seed=2)
    order = sorted(
        ((layer, neuron) for layer in range(2) for neuron in range(256)), key=lambda at: -scores[at]
    )
    changes = []
    for size in (3, 40):
        one = neuron_effects(model, chat, order[:size], *asked(), n_random_sets=4, seed=2)
        changes.append(one.rows[one.rows["kind"] == "harmful"].eval("after - before").to_numpy())
        for measure, kind in (("score", "harmful"), ("score", "harmless"), ("specificity", BOTH)):
            row = one.row(measure, kind, "off")
            found = table[(table["size"] == size) & (table["kind"] == kind)].iloc[0]
            for column in COLUMNS_OF_EFFECTS:
                assert found[column] == pytest.approx(row[column], abs=1e-5), (size, kind, column)
            assert found["n_layers"] == len({layer for layer, _ in order[:size]})
    families = families_by_swap(*asked())
    expected = sign_flip_test(np.stack(changes, axis=1), families=families, correction="max", seed=2)
    np.testing.assert_allclose(table[table["kind"] == "harmful"]["p"], expected.p)


def test_orders() -> None:
    facts = rl.model_facts(toy("planted")[0])
    scores = np.zeros((2, 256))
    scores[1, 3], scores[0, 9], scores[1, 200] = 3, 2, 1
    best = [(1, 3), (0, 9), (1, 200), (0, 0), (0, 1)]
    assert ranking(scores, facts)[:5] == best
    chosen = NeuronSet([(1, 200), (0, 9)], 2, 256, scores=scores)
    assert ranking(chosen, facts)[:5] == [(0, 9), (1, 200), (1, 3), (0, 0), (0, 1)]
    assert len(ranking(chosen, facts)) == 512
    assert ranking(NeuronSet(chosen.neurons, 2, 256), facts) == [(0, 9), (1, 200)]
    assert ranking([(1, 5), (0, 7)], facts) == [(1, 5), (0, 7)]
    with pytest.raises(StatisticsError, match="twice"):
        ranking([(1, 5), (1, 5)], facts)
    with pytest.raises(StatisticsError, match="scores of shape"):
        ranking(scores[:1], facts)
    scores[0, 0] = np.nan
    with pytest.raises(NotFinite):
        ranking(scores, facts)


def test_sizes_whole_layers_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, chat = toy("planted")
    few: dict[str, Any] = {"n_random_sets": 1}
    chosen = NeuronSet(planted_truth().neurons, 2, 256, scores=np.ones((2, 256)))
    table = dose_curve(model, chat, chosen, *asked(12), **few | {"n_random_sets": 0})
    assert table["size"].unique().tolist() == sorted({*SIZES, 8})
    assert table["random"].isna().all()
    short = dose_curve(model, chat, planted_truth().neurons[:3], *asked(12), folder=tmp_path, **few)
    assert short["size"].unique().tolist() == [1, 2, 3]
    monkeypatch.setitem(rl.refusal_reading.__globals__, "refusal_score", None)
    again = dose_curve(model, chat, planted_truth().neurons[:3], *asked(12), folder=tmp_path, **few)
    assert short.equals(again)
    with pytest.raises(StudyFolderError, match="another study"):
        dose_curve(model, chat, planted_truth().neurons[:2], *asked(12), folder=tmp_path, **few)
    monkeypatch.undo()
    layer = [(1, neuron) for neuron in range(256)]
    whole = dose_curve(model, chat, layer, *asked(12), sizes=[1, 256], **few)
    assert whole[whole["kind"] == "harmful"]["n_controls"].tolist() == [1, 0]


def test_bad_input_is_named_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chat = toy("planted")
    harmful, harmless = asked(12)
    truth = planted_truth().neurons
    monkeypatch.setitem(rl.refusal_reading.__globals__, "refusal_score", None)

    def call(neurons: Any = truth, *kinds: Any, **options: Any) -> None:
        dose_curve(model, chat, neurons, *(kinds or (harmful, harmless)), **options)

    for sizes in ([0], [9], [], [2, 2]):
        with pytest.raises(StatisticsError, match="each is from 1 to the 8"):
            call(sizes=sizes)
    with pytest.raises(UnknownNeuron, match="no neuron was given"):
        call([])
    with pytest.raises(UnknownNeuron, match="layers 0 to 1"):
        call([(0, 1), (5, 1)])
    with pytest.raises(MissingTwin):
        call(truth, harmful, harmless[1:])
    with pytest.raises(StatisticsError, match="n_random_sets=-1"):
        call(n_random_sets=-1)
    with pytest.raises(StatisticsError, match="matched='size'"):
        call(matched="size")
    with pytest.raises(StatisticsError, match="chose the neurons"):
        call(NeuronSet(truth, 2, 256, made_by=chosen_by(harmful[:1])))


@pytest.mark.skipif("bridge" not in FAMILIES, reason="mixtures of experts are wrapped by the bridge")
def test_mixtures_of_experts_have_no_neurons() -> None:
    with pytest.raises(UnsupportedModel, match="mixture of experts"):
        dose_curve(tiny_moe("mixtral")[0], toy("planted")[1], [(0, 1)], *asked(12))
