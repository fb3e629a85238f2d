"""docs/neurons.md says what docs/evidence holds, and a sample of what is measured comes out the same."""

from __future__ import annotations

import json

import pytest

from rim_lens.organisms.toy.recipe import one_thread
from tests import neuron_verdicts

FOUND = json.loads(neuron_verdicts.EVIDENCE.read_text())
NULLS = json.loads(neuron_verdicts.NULLS.read_text())


def test_the_page_is_that_of_the_numbers():
    assert neuron_verdicts.PAGE.read_text() == neuron_verdicts.page(FOUND, NULLS)


@pytest.mark.parametrize("seed", [0, 17])
def test_a_planted_seed_comes_out_the_same(seed):
    with one_thread():
        row = neuron_verdicts.planted_row(seed)
    kept = FOUND["planted"][seed]
    assert (row["precision"], row["recall"], row["verdict"]) == (1.0, 1.0, "refusal")
    assert [one["size"] for one in row["sweep"]] == [one["size"] for one in kept["sweep"]]
    assert row["specificity"] == pytest.approx(kept["specificity"], abs=1e-3)


def test_the_claims_of_the_page_hold_in_the_evidence():
    planted, mixed = FOUND["planted"], FOUND["permuted"]["mixed"]
    assert len(planted) >= 20
    assert all(row["precision"] == row["recall"] == 1 and not row["decoys_chosen"] for row in planted)
    runs = mixed["n_runs"] + sum(row["n_runs"] for row in FOUND["random"])
    assert runs >= 200
    # The level is .05: no more than that, within binomial error, is called refusal where there is none.
    assert mixed["low"] <= 0.05
    assert all(row["low"] <= 0.05 for row in FOUND["random"])
    for situation in NULLS["situations"].values():
        share = situation["shares"]["exchanged, pairs that chose"]["ras"]["0.05"]
        assert abs(share - 0.05) <= 3 * (0.05 * 0.95 / situation["n_runs"]) ** 0.5
