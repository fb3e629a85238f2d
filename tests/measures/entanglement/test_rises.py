"""p of entanglement from the pairs that chose: the same by hand, and refused where the base is no model."""

from __future__ import annotations

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.errors import ConditionError, StatisticsError
from rim_lens.measures.entanglement.between import entangled
from rim_lens.measures.entanglement.reading import ModelReading
from rim_lens.measures.entanglement.rises import rises_of

SHORT = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def asked() -> dict[str, list[rl.Prompt]]:
    return {
        f"{kind}_{split}": rl.load_prompts(kind, language="toy", split=split)[::step]
        for kind in ("harmful", "harmless", "reasoning")
        for split, step in (("select", 5), ("evaluate", 7))
    }


@pytest.fixture(scope="module")
def pairs(asked):
    return rl.counterfactual_pairs(asked["harmful_select"], asked["harmless_select"], "twins")


def test_rises_are_the_difference_of_two_readings(pairs):
    model = rl.load_model("toy")
    chat = rl.ChatFormat.from_model(model)
    more, less = (
        rl.pooled_activations(model, chat, [getattr(pair, form) for pair in pairs], **SHORT).values
        for form in ("more", "less")
    )
    assert np.array_equal(rises_of(model, chat, pairs, "own", **SHORT), more.astype(np.float64) - less)


@pytest.mark.parametrize("response", ["own", "none"])
def test_pairs_give_the_p_of_their_exchanged_labels(asked, pairs, tmp_path, response):
    given = (asked["harmful_evaluate"], asked["reasoning_evaluate"], [(0, 1), (1, 7), (1, 9)])
    options = {"harmless": asked["harmless_evaluate"], "response": response, "n_boot": 10, **SHORT}
    found = rl.entanglement("toy", "toy:deviate", None, *given, pairs=pairs, folder=tmp_path, **options)
    model = rl.load_model("toy")
    rise = rises_of(model, rl.ChatFormat.from_model(model), pairs, response, **SHORT)
    by_hand = entangled(
        ModelReading.load(tmp_path / "base"),
        ModelReading.load(tmp_path / "tuned"),
        given[2],
        difference=rise,
        difference_families=[pair.family for pair in pairs],
        n_boot=10,
    )
    assert found.row("safety_drop")["p"] == by_hand.row("safety_drop")["p"]
    assert found.row("safety_drop")["exchanged"] == by_hand.row("safety_drop")["exchanged"]
    without = rl.entanglement("toy", "toy:deviate", None, *given, **options)
    assert found.row("safety_drop")["exchanged"] != without.row("safety_drop")["exchanged"]
    assert found.row("safety_drop")["percentile"] == without.row("safety_drop")["percentile"]
    with pytest.raises(ConditionError, match="give the model"):
        rl.entanglement(
            ModelReading.load(tmp_path / "base"), "toy:deviate", None, *given, pairs=pairs, **options
        )


def test_requests_that_chose_are_refused(asked, pairs):
    with pytest.raises(StatisticsError, match="chose"):
        rl.entanglement(
            "toy", "toy", None, asked["harmful_select"], asked["reasoning_evaluate"], [(0, 1)], pairs=pairs
        )
