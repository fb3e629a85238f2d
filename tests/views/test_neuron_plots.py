"""Figures of neuron sets and of entanglement, held to the tables they are drawn from."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from rim_lens.measures.entanglement.result import Entanglement
from rim_lens.measures.neurons.choosing import sweep
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.views.plots import entanglement_rivals, neuron_sweep, neurons_by_layer


def found(ras: float, controls: list[float]) -> Entanglement:
    row = {
        "metric": "ras",
        "of": "set",
        "value": ras,
        "unit": "activation",
        "low": ras,
        "high": 2 * ras,
        "p": 0.5,
        "n_exchanged": 7,
    }
    sets = [{"of": "set", "number": 0, "ras": ras}]
    sets += [{"of": "random", "number": at, "ras": value} for at, value in enumerate(controls)]
    nothing = pd.DataFrame()
    table = pd.DataFrame([row | {"n_controls": len(controls)}])
    return Entanglement(table, pd.DataFrame(sets), nothing, nothing, {"n_neurons": 3})


def test_rivals_are_multiples_of_the_random_sets_mean():
    random, own = entanglement_rivals(found(0.6, [0.1, 0.2, 0.6, np.nan])).data
    assert own.x == pytest.approx((2.0,))
    assert own.error_x.array == pytest.approx((2.0,))
    assert own.error_x.arrayminus == pytest.approx((0.0,))
    assert "p = 0.5 among 7 sets on exchanged labels" in own.text[0]
    assert random.x == pytest.approx((1 / 3, 2 / 3, 2.0))


@pytest.mark.parametrize(("ras", "controls"), [(0.5, []), (np.nan, [1.0]), (0.5, [0.0, 0.0])])
def test_rivals_without_a_yardstick_are_refused(ras, controls):
    with pytest.raises(ValueError, match=r"random set|no metric"):
        entanglement_rivals(found(ras, controls))


def test_bars_count_the_neurons_of_each_layer_and_names_are_literal():
    one = NeuronSet([(0, 1), (2, 0), (2, 3)], 3, 4)
    figure = neurons_by_layer({"<b>found</b>": one, "none": one - one})
    assert [trace.y for trace in figure.data] == [(1, 0, 2), (0, 0, 0)]
    assert "<b>" not in figure.data[0].name
    with pytest.raises(ValueError, match="2 shapes"):
        neurons_by_layer({"a": one, "b": NeuronSet([], 3, 5)})


def test_the_sweep_draws_sizes_and_leaves_out_what_a_logarithm_cannot_show():
    rises = np.random.default_rng(0).normal(size=(6, 2, 50))
    rises[:, 0, :2] += 9
    table = sweep(rises, [1, 2, 40], min_fractions=(1.0, 0.5))
    figure = neuron_sweep(table, m=2)
    drawn = {trace.name: trace.y for trace in figure.data}
    for share, name in ((1.0, "all pairs"), (0.5, "50% of pairs")):
        sizes = table[table["min_fraction"] == share]["size"].tolist()
        assert list(drawn[f"chosen by {name}"]) == [size or None for size in sizes]
    assert drawn["chosen by all pairs"][0] is None
    assert figure.layout.annotations[0].x == pytest.approx(np.log10(2))
    with pytest.raises(ValueError, match="without a row"):
        neuron_sweep(table.iloc[:0])
