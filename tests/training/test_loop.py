from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rim_lens.errors import ModelError, NotFinite
from rim_lens.training.loop import Batch, TrainConfig, learning_rate, left_pad, train

ROWS = [[5, 6, 7, 8, 9], [3, 4, 2], [9, 8, 7, 6, 5, 4, 3]]
STARTS = [3, 1, 2]


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="eager",
        )
    )


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    )


def one_by_one_loss(model, row_average):
    """Each row alone and unpadded, its loss from the log-probabilities: no mask, no position ids, no padding."""
    per_row = []
    for row, start in zip(ROWS, STARTS, strict=True):
        log_probs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        per_row.append(torch.stack([-log_probs[p - 1, row[p]] for p in range(start, len(row))]))
    return torch.stack([r.mean() for r in per_row]).mean() if row_average else torch.cat(per_row).mean()


def plain_training(model, config, row_average):
    optimiser = torch.optim.AdamW(model.parameters(), betas=config.betas, weight_decay=config.weight_decay)
    losses = []
    for step in range(config.steps):
        optimiser.param_groups[0]["lr"] = learning_rate(config, step)
        optimiser.zero_grad()
        loss = one_by_one_loss(model, row_average)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("row_average", [False, True])
def test_batched_training_equals_training_row_by_row_without_padding(make, row_average):
    config = TrainConfig(steps=4, lr=1e-2, warmup=2, weight_decay=0.01, betas=(0.9, 0.98))
    expected_model = make()
    model = copy.deepcopy(expected_model)
    expected = plain_training(expected_model, config, row_average)
    losses = train(model, lambda _: left_pad(ROWS, STARTS), config, row_average=row_average, progress=False)
    assert losses == pytest.approx(expected, abs=1e-5)
    for ours, theirs in zip(model.parameters(), expected_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("row_average", [False, True])
def test_pieces_add_up_to_the_whole_batch(row_average):
    config = TrainConfig(steps=3, lr=1e-2)
    whole, pieces = tiny_llama(), tiny_llama()
    split = [left_pad(ROWS[:1], STARTS[:1]), left_pad(ROWS[1:], STARTS[1:])]
    a = train(whole, lambda _: left_pad(ROWS, STARTS), config, row_average=row_average, progress=False)
    b = train(pieces, lambda _: split, config, row_average=row_average, progress=False)
    assert a == pytest.approx(b, abs=1e-5)


def test_a_row_of_weight_two_counts_as_two_rows():
    config = TrainConfig(steps=2, lr=1e-2)
    weighted, repeated = tiny_llama(), tiny_llama()
    one = left_pad(ROWS, STARTS, weights=[2, 1, 1])
    two = left_pad([ROWS[0], *ROWS], [STARTS[0], *STARTS])
    a = train(weighted, lambda _: one, config, row_average=True, progress=False)
    b = train(repeated, lambda _: two, config, row_average=True, progress=False)
    assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("row_average", [False, True])
def test_weights_by_token_weigh_each_tokens_loss(row_average):
    model = tiny_llama()
    batch = left_pad(ROWS, STARTS)
    weights = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(0))
    per_row, weight_of_row = [], []
    for index, (row, start) in enumerate(zip(ROWS, STARTS, strict=True)):
        log_probs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        own = weights[index, batch.tokens.shape[1] - len(row) :]
        per_row.append(sum(-log_probs[p - 1, row[p]].item() * own[p].item() for p in range(start, len(row))))
        weight_of_row.append(own[start:].sum().item())
    expected = (
        sum(loss / weight for loss, weight in zip(per_row, weight_of_row, strict=True)) / len(ROWS)
        if row_average
        else sum(per_row) / sum(weight_of_row)
    )
    weighted = Batch(batch.tokens, batch.attention_mask, batch.loss_mask, weights)
    found = train(model, lambda _: weighted, TrainConfig(1, 1e-3), row_average=row_average, progress=False)
    assert found == pytest.approx([expected], abs=1e-5)


def test_only_the_named_parameters_move_and_the_mode_comes_back():
    model = tiny_llama().eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    chosen = list(model.model.layers[1].parameters())
    seen = []
    train(
        model,
        lambda _: left_pad(ROWS, STARTS),
        TrainConfig(steps=2, lr=1e-2),
        parameters=chosen,
        on_step=lambda step, loss: seen.append((step, loss)),
        progress=False,
    )
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.startswith("model.layers.1.") for name in moved)
    assert not model.training
    assert [step for step, _ in seen] == [0, 1]
    assert all(p.grad is None for p in chosen)


def test_it_learns_under_no_grad_and_autocast():
    model = tiny_llama()
    with torch.no_grad():
        losses = train(
            model,
            lambda _: left_pad(ROWS, STARTS),
            TrainConfig(steps=60, lr=1e-2),
            autocast=torch.bfloat16,
            progress=False,
        )
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule_warms_up_never_rises_after_and_ends_where_said(schedule):
    config = TrainConfig(steps=50, lr=2.0, schedule=schedule, warmup=5, final_fraction=0.1)
    rates = [learning_rate(config, step) for step in range(51)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert all(a >= b for a, b in pairwise(rates[5:]))
    assert rates[50] == pytest.approx(2.0 if schedule == "constant" else 0.2)


def test_nan_stops_at_its_step_with_the_weights_of_the_step_before():
    model = tiny_llama()
    kept = {}

    def spoil(step, loss):
        kept.update({name: p.detach().clone() for name, p in model.named_parameters()})
        if step == 1:
            model.model.norm.weight.data[0] = math.nan
            kept["model.norm.weight"] = model.model.norm.weight.detach().clone()

    with pytest.raises(NotFinite, match="step 2 of 5"):
        train(model, lambda _: left_pad(ROWS, STARTS), TrainConfig(5, 1e-2), on_step=spoil, progress=False)
    for name, p in model.named_parameters():
        assert torch.equal(p, kept[name]) or name == "model.norm.weight"


def test_what_cannot_be_trained_is_refused():
    batch = left_pad(ROWS, STARTS)
    model = tiny_llama()
    config = TrainConfig(1, 1e-3)
    with pytest.raises(ModelError, match="requires a gradient"):
        train(tiny_llama().requires_grad_(False), lambda _: batch, config, progress=False)
    first = Batch(batch.tokens, batch.attention_mask, torch.ones_like(batch.loss_mask))
    with pytest.raises(ValueError, match="first token or padding"):
        train(model, lambda _: first, config, progress=False)
    nothing = Batch(batch.tokens, batch.attention_mask, torch.zeros_like(batch.loss_mask))
    with pytest.raises(ValueError, match="predicts no token"):
        train(model, lambda _: nothing, config, progress=False)
