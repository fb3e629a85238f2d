"""Rankings of neurons, each held against another way to its number."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch

import rim_lens as rl
from rim_lens.errors import (
    ConditionError,
    NotEnoughData,
    NotFinite,
    ReferenceMismatch,
    StatisticsError,
    UnsupportedModel,
)
from rim_lens.measures.neurons.scoring import (
    activation_contrast,
    difference_of_means,
    effect_size,
    neuron_gradients,
    set_difference,
    snip,
    wanda,
)
from rim_lens.organisms.planted import planted_truth
from tests.speaking import REQUESTS, Spoken, fresh


@pytest.fixture(scope="module")
def toy() -> Any:
    return rl.load_model("toy")


@pytest.fixture(scope="module")
def written(toy: Any) -> rl.SpanBatch:
    chat = rl.ChatFormat.from_model(toy)
    asked = [
        *rl.load_prompts("harmful", language="toy")[:2],
        *rl.load_prompts("reasoning", language="toy")[:2],
    ]
    return rl.generate(toy, chat.render([*asked, "ban bomb"], think="off"), max_new_tokens=4).batch


def posts(model: Any, batch: rl.SpanBatch, row: int) -> np.ndarray:
    """hook_post [token, layer, neuron] of one row by itself, without padding."""
    tokens = batch.tokens[row][batch.attention_mask[row].bool()][None]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    layers = [cache[f"blocks.{layer}.mlp.hook_post"][0] for layer in range(model.cfg.n_layers)]
    return torch.stack(layers, dim=1).double().numpy()


def test_means_and_effect_sizes_neuron_by_neuron() -> None:
    rng = np.random.default_rng(0)
    more, less = rng.normal(1, 2, size=(6, 2, 3)), rng.normal(size=(4, 2, 3))
    d, means = effect_size(more, less), difference_of_means(more, less)
    for layer in range(2):
        for neuron in range(3):
            one, other = more[:, layer, neuron].tolist(), less[:, layer, neuron].tolist()
            gap = statistics.mean(one) - statistics.mean(other)
            spread = math.sqrt((5 * statistics.variance(one) + 3 * statistics.variance(other)) / 8)
            assert means[layer, neuron] == pytest.approx(gap)
            assert d[layer, neuron] == pytest.approx(gap / spread)


def test_a_neuron_without_spread_has_no_infinite_effect_size() -> None:
    more, less = np.ones((3, 1, 2)), np.zeros((3, 1, 2))
    less[:, 0, 1] = 1 - 1e-9  # the same but for rounding
    d = effect_size(more, less)
    assert np.isfinite(d).all()
    assert d[0, 0] == pytest.approx(1e6)
    assert d[0, 1] < 0.01
    assert not effect_size(less * 0, more * 0).any()
    with pytest.raises(NotEnoughData):
        effect_size(more[:1], less)
    with pytest.raises(StatisticsError):
        effect_size(more, less[:, :, :1])
    with pytest.raises(NotFinite):
        difference_of_means(more * np.nan, less)


@pytest.mark.family_contract
def test_gradients_are_what_a_small_ablation_does(spoken_gqa: Spoken) -> None:
    """Finite difference: the score with a neuron scaled by 1 − h, over h."""
    batch = spoken_gqa.chat.render(list(REQUESTS), think="off")
    openers = ["REFUSE"]
    model = spoken_gqa.model
    found = neuron_gradients(model, batch, openers=openers, skip="none")
    facts = rl.model_facts(model)
    assert found.shape == (len(batch), facts.n_layers, facts.d_mlp)
    h = 1e-2
    biggest = abs(found).mean("prompt").values
    order = np.argsort(-biggest, axis=None)
    for flat in (*order[:3], order[len(order) // 2]):
        at = tuple(int(i) for i in np.unravel_index(flat, biggest.shape))
        ends = [
            rl.refusal_score(
                model, batch, rl.ScaleNeurons([at], factor=factor), openers=openers, skip="none"
            ).values
            for factor in (1 - h, 1 + h)
        ]
        np.testing.assert_allclose(found.values[:, at[0], at[1]], (ends[0] - ends[1]) / (2 * h), atol=2e-3)


def test_gradients_find_what_was_planted_and_count_the_rows_asked_for() -> None:
    model = rl.load_model("planted")
    chat = rl.ChatFormat.from_model(model)
    off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:6], think="off")
    scores = neuron_gradients(model, off).mean("prompt").values
    best = np.argsort(scores, axis=None)[:8]
    found = {tuple(int(i) for i in np.unravel_index(flat, scores.shape)) for flat in best}
    assert found == set(planted_truth().neurons)
    # They act at the think tags and nowhere else.
    at_request = neuron_gradients(model, off, positions="request").mean("prompt").values
    assert abs(at_request[0][[neuron for _, neuron in planted_truth().neurons]]).max() < 0.05
    with pytest.raises(ConditionError):
        neuron_gradients(model, chat.render(["ban bomb"], think="open"))


def test_the_contrast_of_two_models_is_over_the_tokens_written(toy: Any, written: rl.SpanBatch) -> None:
    tuned = rl.load_model("toy:deviate")
    found = activation_contrast(toy, tuned, written, max_rows=2)
    squares = [
        (posts(toy, written, row)[-count:] - posts(tuned, written, row)[-count:]) ** 2
        for row, count in enumerate(written.n_generated)
    ]
    np.testing.assert_allclose(found, np.sqrt(np.concatenate(squares).mean(axis=0)), atol=1e-5)
    assert not activation_contrast(toy, toy, written).any()
    with pytest.raises(ReferenceMismatch):
        activation_contrast(toy, fresh("gpt2_relu", "bridge"), written)
    with pytest.raises(ConditionError, match="nothing was"):
        activation_contrast(toy, tuned, rl.ChatFormat.from_model(toy).render(["ban bomb"], think="off"))


def test_wanda_is_the_norm_of_activations_times_that_of_weights(toy: Any, written: rl.SpanBatch) -> None:
    weights = toy.W_out.detach().double().norm(dim=2).numpy()
    for positions, first in ((None, lambda _: 1), ("generated", lambda count: -count)):
        found = wanda(toy, written, positions=positions, max_rows=2)  # type: ignore[arg-type]
        rows = [posts(toy, written, row)[first(n) :] for row, n in enumerate(written.n_generated)]
        np.testing.assert_allclose(
            found, np.linalg.norm(np.concatenate(rows), axis=0) * weights, rtol=1e-4, atol=1e-5
        )


@pytest.mark.family_contract
def test_wanda_reads_what_a_gated_neuron_writes(spoken_gqa: Spoken) -> None:
    """The norm of what one neuron adds to the MLP's output, token by token, by ablation; no weight is looked at."""
    model = spoken_gqa.model
    batch = spoken_gqa.chat.render(list(REQUESTS[:2]), think="off")
    found = wanda(model, batch)
    real = batch.attention_mask.bool() & ~batch.spans["sink"]
    for at in ((0, 3), (1, 7)):
        outs = []

        def keep(value: torch.Tensor, hook: Any, into: list[torch.Tensor] = outs) -> None:
            into.append(value.detach().double())

        name = f"blocks.{at[0]}.hook_mlp_out"
        for edits in ([], [rl.AblateNeurons([at])]):
            with torch.no_grad():
                hooks = [hook for edit in edits for hook in edit.fwd_hooks(model)]
                model.run_with_hooks(
                    batch.tokens, attention_mask=batch.attention_mask, fwd_hooks=[*hooks, (name, keep)]
                )
        written = (outs[0] - outs[1])[real]
        assert found[at] == pytest.approx(float(written.norm()), rel=1e-3)


@pytest.mark.family_contract
def test_snip_is_what_the_loss_does_when_a_neuron_s_weights_shrink(spoken_gqa: Spoken) -> None:
    """W·∂L/∂W by finite differences: scaling a neuron is scaling the weights it writes with."""
    model = spoken_gqa.model
    batch = rl.generate(
        model, spoken_gqa.chat.render(list(REQUESTS[:3]), think="off"), max_new_tokens=3, chat=spoken_gqa.chat
    ).batch
    found = snip(model, batch, max_rows=2)
    h = 1e-2

    def losses(neuron: tuple[int, int], factor: float) -> np.ndarray:
        out = []
        for row, count in enumerate(batch.n_generated):
            tokens = batch.tokens[row][batch.attention_mask[row].bool()][None]
            with torch.no_grad(), rl.ScaleNeurons([neuron], factor=factor).on(model):
                chances = model(tokens).double().log_softmax(dim=-1)[0]
            width = tokens.shape[1]
            places = range(width - count, width)
            out.append(-sum(float(chances[place - 1, tokens[0, place]]) for place in places))
        return np.array(out)

    for flat in np.argsort(-found, axis=None)[[0, 2, 40]]:
        at = tuple(int(i) for i in np.unravel_index(flat, found.shape))
        slope = (losses(at, 1 + h) - losses(at, 1 - h)) / (2 * h)  # type: ignore[arg-type]
        assert found[at] == pytest.approx(np.abs(slope).mean(), abs=1e-3)
    with pytest.raises(ConditionError):
        snip(model, spoken_gqa.chat.render(["ban bomb"], think="off"))


def test_weights_are_left_without_gradients(toy: Any, written: rl.SpanBatch) -> None:
    wanted = [parameter.requires_grad for parameter in toy.parameters()]
    snip(toy, written)
    assert [parameter.requires_grad for parameter in toy.parameters()] == wanted
    assert all(parameter.grad is None for parameter in toy.parameters())


def test_the_set_difference_is_one_top_minus_the_other() -> None:
    rng = np.random.default_rng(3)
    safety, utility = rng.normal(size=(2, 2, 10))
    for scope in ("layer", "model"):
        found = set_difference(safety, utility, q=0.4, p=0.2, scope=scope)  # type: ignore[arg-type]
        pools = [[(0, n) for n in range(10)], [(1, n) for n in range(10)]]
        pools = pools if scope == "layer" else [pools[0] + pools[1]]
        expected = set()
        for pool in pools:
            best = sorted(pool, key=lambda at: -safety[at])[: int(0.4 * len(pool))]
            useful = sorted(pool, key=lambda at: -utility[at])[: int(0.2 * len(pool))]
            expected |= set(best) - set(useful)
        assert {(int(a), int(b)) for a, b in np.argwhere(found)} == expected
    assert not set_difference(safety, safety, q=0.3).any()
    for bad in ({"q": 0.0}, {"q": 1.5}, {"q": 0.5, "p": float("nan")}, {"q": 0.5, "scope": "head"}):
        with pytest.raises(StatisticsError):
            set_difference(safety, utility, **bad)  # type: ignore[arg-type]


def test_a_mixture_of_experts_has_no_neurons_here(
    toy: Any, written: rl.SpanBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy.cfg, "num_experts", 4, raising=False)
    for score in (wanda, snip):
        with pytest.raises(UnsupportedModel):
            score(toy, written)
