"""Freezing found neurons beside random ones: which weights moved, and each number against the runs themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rim_lens as rl
from rim_lens.errors import NotEnoughData, StatisticsError
from rim_lens.lens import load_plain
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.organisms.toy.recipe import FINE_TUNE, toy_rows

NEURONS = [(1, neuron) for neuron in range(0, 256, 4)]
OPTIONS = {
    "training": {"config": FINE_TUNE, "steps": 8, "lora": None},
    "n_boot": 10,
    "n_random_sets": 3,
    "accuracy": ("off",),
    "response": "none",
    "max_new_tokens": 12,
}


def requests(n=4):
    return [
        rl.load_prompts(kind, language="toy", split="evaluate")[::6][:n]
        for kind in ("harmful", "harmless", "reasoning")
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("freezing")
    return rl.freezing(
        "toy", toy_rows("deviate"), NEURONS, None, *requests(), folder=folder, **OPTIONS
    ), folder


def test_each_run_froze_what_it_names(found):
    result, folder = found
    before = load_plain("toy")[0].transformer.h[1].mlp.c_proj.weight
    sets = {"set": NEURONS} | {
        f"random-{place}": [tuple(pair) for pair in control]
        for place, control in enumerate(result.settings["controls"])
    }
    for name, neurons in {"nothing": [], **sets}.items():
        after = load_plain(str(folder / "runs" / name / "step-8"))[0].transformer.h[1].mlp.c_proj.weight
        still = torch.nonzero((after == before).all(dim=1)).flatten().tolist()
        assert still == [neuron for _, neuron in neurons]
        assert not set(sets["set"]) & set(neurons) or name == "set"


def test_kept_is_paired_with_the_run_that_froze_nothing(found):
    result, folder = found
    harmful = requests()[0]
    chat = rl.ChatFormat.from_model(rl.load_model("toy"))
    scores = {
        name: rl.refusal_score(rl.load_model(folder / "runs" / name / "step-8"), chat.render(harmful)).values
        for name in ("nothing", "set", "random-1")
    }
    table = result.table.set_index("frozen")
    assert table.loc["nothing", "kept"] == 0
    for name in ("set", "random-1"):
        row = table.loc[name.replace("-", " ")]
        assert row["kept"] == pytest.approx((scores[name] - scores["nothing"]).mean(), abs=1e-5)
        assert row["low"] <= row["kept"] <= row["high"]
    others = table.loc[[name for name in table.index if name.startswith("random")], "kept"]
    assert result.p == (1 + (others >= table.loc["set", "kept"]).sum()) / 4
    again = rl.Freezing.load(folder)
    np.testing.assert_array_equal(again.table.to_numpy(dtype=str), result.table.to_numpy(dtype=str))
    assert again.p == result.p
    assert "random sets" in again._repr_html_()


def test_what_cannot_be_is_refused(tmp_path):
    asked = requests(2)
    with pytest.raises(StatisticsError, match="at least 3"):
        rl.freezing("toy", toy_rows("deviate"), NEURONS, None, *asked, folder=tmp_path, n_random_sets=2)
    with pytest.raises(NotEnoughData, match="empty set"):
        rl.freezing("toy", toy_rows("deviate"), [], None, *asked, folder=tmp_path)
    every = [(0, neuron) for neuron in range(256)]
    with pytest.raises(NotEnoughData):
        rl.freezing("toy", toy_rows("deviate"), every, None, *asked, folder=tmp_path)


def test_pulled_neurons_move_less_and_random_ones_are_as_active(tmp_path):
    """The same three kinds of run with a penalty in place of freezing; what moved is read off the weights."""
    activity = np.random.default_rng(0).gamma(1.0, size=(2, 256))
    chosen = NeuronSet(NEURONS[:8], 2, 256, activity=activity)
    options = OPTIONS | {"training": {"config": FINE_TUNE, "steps": 30, "lora": None}}
    result = rl.freezing(
        "toy",
        toy_rows("deviate"),
        chosen,
        None,
        *requests(),
        folder=tmp_path,
        penalty=300.0,
        matched="activity",
        **options,
    )
    before = load_plain("toy")[0].transformer.h[1].mlp.c_proj.weight

    def moved(name, neurons):
        after = load_plain(str(tmp_path / "runs" / name / "step-30"))[0].transformer.h[1].mlp.c_proj.weight
        return float((after - before)[[neuron for _, neuron in neurons]].detach().pow(2).sum())

    first = [tuple(pair) for pair in result.settings["controls"][0]]
    assert 0 < moved("set", chosen) < 0.3 * moved("nothing", chosen)
    assert 0 < moved("random-0", first) < 0.3 * moved("nothing", first)
    assert moved("random-0", chosen) > 3 * moved("set", chosen)
    rank = activity[1].argsort().argsort()
    gaps = np.abs(np.sort(rank[[n for _, n in chosen]]) - np.sort(rank[[n for _, n in first]]))
    assert gaps.mean() < 25  # of 256 places
    with pytest.raises(StatisticsError, match="do not say how active"):
        rl.freezing(
            "toy", toy_rows("deviate"), NEURONS, None, *requests(2), folder=tmp_path, matched="activity"
        )
    with pytest.raises(StatisticsError, match="penalty"):
        rl.freezing("toy", toy_rows("deviate"), NEURONS, None, *requests(2), folder=tmp_path, penalty=0.0)
