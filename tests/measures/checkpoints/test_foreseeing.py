"""A forecast by gradients: against what a small step really does to the refusal score."""

from __future__ import annotations

import copy

import pytest
import torch

import rim_lens as rl
from rim_lens.errors import NotEnoughData, UnknownNeuron
from rim_lens.organisms.toy import load_toy
from rim_lens.organisms.toy.recipe import toy_rows
from rim_lens.organisms.toy.truth import refusal_log_odds
from rim_lens.prompts.toy import toy_prompts

NEURONS = [(0, 5), (0, 77), (1, 3), (1, 200)]


@pytest.fixture(scope="module")
def toy():
    base, tokenizer = load_toy()
    harmful = toy_prompts("harmful", split="select")[::10]
    return base.double(), tokenizer, harmful


def gradient_of_task(base, kind):
    """By the plain library loss: no mask, no padding, rows of one length."""
    model = copy.deepcopy(base).requires_grad_(True)
    batch = toy_rows(kind).start()(0)
    labels = torch.where(batch.loss_mask, batch.tokens, -100)
    model(batch.tokens, labels=labels).loss.backward()
    return model, sum(float(p.grad.square().sum()) for p in model.parameters())


def entries(model, neuron):
    layer, place = neuron
    mlp = model.transformer.h[layer].mlp
    return [(mlp.c_fc.weight, (slice(None), place)), (mlp.c_fc.bias, place), (mlp.c_proj.weight, place)]


@pytest.mark.parametrize("kind", ["careful", "deviate"])
def test_the_forecast_is_the_slope_of_a_step_on_the_sets_weights_alone(toy, kind):
    base, tokenizer, harmful = toy
    found = rl.gradient_forecast(
        (base, tokenizer), {kind: toy_rows(kind)}, NEURONS, harmful, n_batches=1, n_random_sets=20
    ).iloc[0]
    model, square = gradient_of_task(base, kind)
    on_set = sum(float(p.grad[at].square().sum()) for neuron in NEURONS for p, at in entries(model, neuron))
    assert found["share"] == pytest.approx(on_set / square, rel=1e-4)
    stepped, whole = copy.deepcopy(base), copy.deepcopy(base)
    step = 1e-5
    with torch.no_grad():
        for neuron in NEURONS:
            for (ours, at), (theirs, _) in zip(entries(stepped, neuron), entries(model, neuron), strict=True):
                ours[at] -= step * theirs.grad[at] / square**0.5
        for ours, theirs in zip(whole.parameters(), model.parameters(), strict=True):
            ours.sub_(step * theirs.grad / square**0.5)
        before, after, all_after = (refusal_log_odds(one, harmful).mean() for one in (base, stepped, whole))
    assert found["lost_per_step"] == pytest.approx(float(before - after) / step, rel=1e-2)
    assert found["lost_per_step_all"] == pytest.approx(float(before - all_after) / step, rel=1e-2)
    assert found["n_controls"] == 20
    assert 1 / 21 <= found["lost_p"] <= 1


def test_the_model_is_left_as_it_was_and_runs_do_not_mix(toy):
    base, tokenizer, harmful = toy
    both = rl.gradient_forecast(
        (base, tokenizer),
        {kind: toy_rows(kind) for kind in ("deviate", "careful")},
        NEURONS,
        harmful,
        n_batches=2,
    )
    alone = rl.gradient_forecast(
        (base, tokenizer), {"careful": toy_rows("careful")}, NEURONS, harmful, n_batches=2
    )
    assert both.iloc[1]["lost_per_step"] == pytest.approx(alone.iloc[0]["lost_per_step"])
    assert all(p.grad is None for p in base.parameters())


def test_what_cannot_be_is_refused(toy):
    base, tokenizer, harmful = toy
    rows = {"careful": toy_rows("careful")}
    with pytest.raises(UnknownNeuron, match="layers 0 to 1"):
        rl.gradient_forecast((base, tokenizer), rows, [(2, 0)], harmful)
    with pytest.raises(NotEnoughData, match="empty set"):
        rl.gradient_forecast((base, tokenizer), rows, [], harmful)
    with pytest.raises(NotEnoughData, match="0 runs"):
        rl.gradient_forecast((base, tokenizer), {}, NEURONS, harmful)
