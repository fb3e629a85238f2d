"""Every row of the multiverse is what the plain way to that choice gives."""

from __future__ import annotations

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.errors import StatisticsError
from rim_lens.measures.entanglement import multiverse as multiverse_file
from rim_lens.measures.entanglement.multiverse import multiverse
from rim_lens.measures.neurons.choosing import chosen
from rim_lens.measures.neurons.pairs import counterfactual_pairs


@pytest.fixture(scope="module")
def given():
    models = [rl.load_model(name) for name in ("toy", "toy:deviate")]
    pairs = counterfactual_pairs(
        *(rl.load_prompts(kind, language="toy", split="select")[::5] for kind in ("harmful", "harmless")),
        kind="twins",
    )
    asked = [
        rl.load_prompts(kind, language="toy", split="evaluate")[:10] for kind in ("harmful", "reasoning")
    ]
    return models, rl.ChatFormat.from_model(models[0]), pairs, asked


SMALL = {
    "pools": ["max", "mean"],
    "sites": ["post"],
    "responses": ["none", "own"],
    "ms": [1, 12],
    "n_sets": 15,
}


@pytest.fixture(scope="module")
def made(given, tmp_path_factory):
    models, chat, pairs, asked = given
    folder = tmp_path_factory.mktemp("multiverse")
    return folder, multiverse(*models, chat, pairs, *asked, **SMALL, folder=folder)


def test_rows_are_those_of_the_plain_way(given, made):
    models, chat, pairs, asked = given
    _, table = made
    assert len(table) == 2 * 2 * 2 * 2 * 2
    for response in ("none", "own"):
        row = table[
            (table["pool"] == "mean")
            & (table["response"] == response)
            & (table["m"] == 12)
            & (table["min_fraction"] == 0.5)
            & (table["average"] == "after")
        ].iloc[0]
        read = [
            rl.pooled_activations(models[0], chat, prompts, response=response, pool="mean").values
            for prompts in ([pair.more for pair in pairs], [pair.less for pair in pairs])
        ]
        mask = chosen(read[0] - read[1], 12, min_fraction=0.5).mask
        assert row["n_neurons"] == mask.sum() > 0
        found = rl.entanglement(
            *models, chat, *asked, np.argwhere(mask).tolist(),
            response=response, pool="mean", average="after", n_random_sets=15, n_boot=1,
        )  # fmt: skip
        assert row["ras"] == pytest.approx(found.value("ras"), rel=1e-6)
        assert row["all"] == pytest.approx(found.value("ras", "all"), rel=1e-6)
        assert row["percentile"] == found.row("ras")["percentile"]
        assert 1 / 16 <= row["p"] <= 1


def test_where_no_neuron_is_chosen_the_row_says_so(made):
    _, table = made
    empty = table[table["n_neurons"] == 0]
    assert len(empty)
    assert empty["ras"].isna().all()
    assert empty["reason"].str.contains("no neuron").all()
    assert f"of {len(table)} chose no neuron" in table.attrs["told"]


def test_what_is_there_is_not_worked_out_again(given, made, monkeypatch):
    models, chat, pairs, asked = given
    folder, table = made
    monkeypatch.setattr(multiverse_file, "entangled", None)
    again = multiverse(*models, chat, pairs, *asked, **SMALL, folder=folder)
    assert again.equals(table)


@pytest.mark.parametrize(
    "change", [{"pools": []}, {"pools": ["median"]}, {"averages": ["never"]}, {"ms": []}]
)
def test_unknown_choices_load_no_model(given, change):
    def never():
        raise AssertionError("loaded")

    with pytest.raises(StatisticsError):
        multiverse(never, never, None, given[2], *given[3], **change)


def test_requests_that_choose_are_not_measured_on(given):
    models, chat, pairs, asked = given
    with pytest.raises(StatisticsError, match="chose the neurons"):
        multiverse(*models, chat, pairs, [pairs[0].more], asked[1])
