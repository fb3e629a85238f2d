"""Scaling neurons equals scaling their rows of the down-projection; clamping them, loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rim_lens.errors import UnknownNeuron
from rim_lens.hooks import AblateNeurons, NeuronActivations, ScaleNeurons, bound
from rim_lens.lens import last_logits
from tests.editing import agrees, logits_under, same
from tests.families import Case, rows_of

pytestmark = pytest.mark.family_contract

NEURONS = [(0, 7), (1, 2), (1, 39), (0, 30), (0, 31), (1, 11)]


@pytest.mark.oracle("ScaleNeurons", "the neurons' rows of the down-projection scaled")
def test_scaling_neurons_equals_scaling_their_rows_of_the_down_projection(case: Case) -> None:
    oracle = case.edited_oracle()
    for layer, neuron in NEURONS:
        projection = oracle.down_projection(layer)
        with torch.no_grad():
            weight = projection.weight if oracle.is_gpt2 else projection.weight.T
            weight[neuron] *= -1.5
    agrees(case, [ScaleNeurons(NEURONS, -1.5)], lambda tokens, mask: oracle.run(tokens, mask).logits)


@pytest.mark.oracle("ScaleNeurons, clamped", "inputs of the down-projection scaled and clamped, with loops")
@pytest.mark.parametrize("positions", ["all", "cot", "prompt_last"])
def test_clamping_after_scaling(case: Case, positions: str) -> None:
    rows = rows_of(case.batch, positions, extra=2)

    def change(layer: int, value: Tensor) -> Tensor:
        for its_layer, neuron in NEURONS:
            if its_layer == layer:
                for prompt, pos in rows[:, : value.shape[1]].nonzero().tolist():
                    value[prompt, pos, neuron] = min(max(4.0 * float(value[prompt, pos, neuron]), -0.1), 0.2)
        return value

    editor = ScaleNeurons(NEURONS, 4.0, clamp=(-0.1, 0.2), positions=positions)
    agrees(case, [editor], lambda tokens, mask: case.oracle.run(tokens, mask, change_post=change).logits)


def test_bounds_may_be_open_or_one_value(case_gqa: Case) -> None:
    at_zero = logits_under(case_gqa, ScaleNeurons(NEURONS, clamp=(0, 0)))
    assert torch.equal(at_zero, logits_under(case_gqa, AblateNeurons(NEURONS)))
    both = logits_under(case_gqa, ScaleNeurons(NEURONS, clamp=(0.0, 0.1)))
    low = ScaleNeurons(NEURONS, clamp=(0.0, math.inf))
    high = ScaleNeurons(NEURONS, clamp=(-math.inf, 0.1))
    same(case_gqa, logits_under(case_gqa, low, high), both)
    assert torch.equal(logits_under(case_gqa, ScaleNeurons(NEURONS)), logits_under(case_gqa))


def test_a_reader_sees_clamped_neurons(case_gqa: Case) -> None:
    batch = case_gqa.batch
    reader, editor = NeuronActivations("max"), ScaleNeurons([(1, n) for n in range(52)], clamp=(-9, 0.05))
    with bound([reader, editor], batch), editor.on(case_gqa.model), reader.on(case_gqa.model):
        last_logits(case_gqa.model, batch.tokens, batch.attention_mask)
    found = reader.collect()["neuron_activation"]
    assert float(found[:, 1].max()) == pytest.approx(0.05)
    assert float(found[:, 0].max()) > 0.06


def test_what_is_refused(case_gqa: Case) -> None:
    with pytest.raises(UnknownNeuron, match="nothing would be edited"):
        ScaleNeurons([], 2.0)
    with pytest.raises(ValueError, match="finite"):
        ScaleNeurons(NEURONS, math.nan)
    for clamp in ((1.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="low"):
            ScaleNeurons(NEURONS, clamp=clamp)
    with pytest.raises(UnknownNeuron), ScaleNeurons([(0, 52)], 2.0).on(case_gqa.model):
        pass
    assert not any(point.fwd_hooks for point in case_gqa.model.hook_dict.values())
