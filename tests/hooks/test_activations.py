"""Pooled activations against what the plain model's projections received, pooled by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import EmptySpan, SpanError, UnsupportedModel
from rim_lens.hooks import HeadOutputs, NeuronActivations, Reader, ResidualStream, bound
from rim_lens.lens import Decoder, all_logits, hook_name, last_logits
from tests.families import FAMILIES, Case, close, random_batch

pytestmark = pytest.mark.family_contract


def read(case: Case, reader: Reader, batch: SpanBatch | None = None) -> Tensor:
    batch = batch or case.batch
    (variable,) = reader.layout(case.facts, batch)
    with bound([reader], batch), reader.on(case.model):
        last_logits(case.model, batch.tokens, batch.attention_mask)
    found = reader.collect()[variable.name]
    assert tuple(found.shape) == (len(batch), *variable.shape)
    return found


def pool_by_hand(layers: list[Tensor], rows: Tensor, pool: str) -> Tensor:
    """[prompt, layer, ...] of [prompt, pos, ...], prompt by prompt."""
    out = []
    for prompt in range(rows.shape[0]):
        places = rows[prompt].nonzero().flatten()
        picked = [activation[prompt, places] for activation in layers]
        out.append(
            torch.stack(
                [
                    a.max(dim=0).values if pool == "max" else a.mean(dim=0) if pool == "mean" else a[-1]
                    for a in picked
                ]
            )
        )
    return torch.stack(out)


@pytest.mark.parametrize("pool", ["max", "mean", "last"])
def test_neurons_over_every_token_but_padding_and_sink(case: Case, pool: Any) -> None:
    rows = case.batch.attention_mask.bool() & ~case.batch.spans["sink"]
    close(read(case, NeuronActivations(pool=pool)), pool_by_hand(case.truth.post, rows, pool))


@pytest.mark.parametrize("pool", ["max", "mean", "last"])
def test_neurons_over_a_span(case: Case, pool: Any) -> None:
    rows = case.batch.spans["think"]
    found = read(case, NeuronActivations(pool=pool, positions="think"))
    close(found, pool_by_hand(case.truth.post, rows, pool))


@pytest.mark.parametrize("pool", ["max", "mean", "last"])
def test_neurons_equal_the_cache(case: Case, pool: Any) -> None:
    """The same against TransformerLens's own cache: the hook point is the one it names."""
    batch = case.batch
    with torch.no_grad():
        _, cache = case.model.run_with_cache(batch.tokens, attention_mask=batch.attention_mask)
    layers = [cache[hook_name("post", layer)] for layer in range(case.facts.n_layers)]
    rows = batch.spans["request"] | batch.spans["answer"]
    close(read(case, NeuronActivations(pool, positions=rows)), pool_by_hand(layers, rows, pool), 1e-6)


def test_processed_weights_leave_the_neurons_alone(case_processed: Case) -> None:
    rows = case_processed.batch.attention_mask.bool() & ~case_processed.batch.spans["sink"]
    close(
        read(case_processed, NeuronActivations()), pool_by_hand(case_processed.truth.post, rows, "max"), 5e-5
    )


def test_output_of_the_mlp(case: Case) -> None:
    found = read(case, NeuronActivations(pool="mean", positions="cot", site="mlp_out"))
    close(found, pool_by_hand(case.truth.mlp_out, case.batch.spans["cot"], "mean"))


def test_head_outputs(case: Case) -> None:
    last = torch.zeros_like(case.batch.attention_mask, dtype=torch.bool)
    last[:, -1] = True
    close(read(case, HeadOutputs()), pool_by_hand(case.truth.z, last, "last"))
    close(
        read(case, HeadOutputs("mean", "request")),
        pool_by_hand(case.truth.z, case.batch.spans["request"], "mean"),
    )


def test_head_outputs_through_w_o_sum_to_the_attention_output(case: Case) -> None:
    z = read(case, HeadOutputs())
    attn_out = read(case, ResidualStream(site="attn_out"))
    for layer in range(case.facts.n_layers):
        attention = case.model.blocks[layer].attn
        w_o = attention.W_O
        assert w_o.shape == (case.facts.n_heads, case.facts.d_head, case.facts.d_model)
        bias = getattr(attention, "b_O", None)
        written = torch.einsum("phd,hdm->pm", z[:, layer], w_o)
        close(written, attn_out[:, layer] - (0 if bias is None else bias))
        close(attn_out[:, layer], case.truth.attn_out[layer][:, -1])


def test_residual_stream(case: Case) -> None:
    found = read(case, ResidualStream())
    for layer, truth in enumerate(case.truth.resid_post):
        close(found[:, layer], truth[:, -1])
    before = read(case, ResidualStream(site="resid_pre"))
    close(before[:, 1:], found[:, :-1])


def test_batched_equals_one_by_one(case: Case) -> None:
    reader = NeuronActivations(pool="max")
    together = read(case, reader)
    for prompt in range(len(case.batch)):
        close(read(case, reader, case.batch.select([prompt]))[0], together[prompt])


def test_positions_all_leaves_padding_out(case_gqa: Case) -> None:
    rows = case_gqa.batch.attention_mask.bool()
    for pool in ("max", "mean", "last"):
        found = read(case_gqa, NeuronActivations(pool, positions="all"))
        close(found, pool_by_hand(case_gqa.truth.post, rows, pool))


def test_what_the_model_wrote(case_gqa: Case) -> None:
    batch = random_batch(seed=3, n_generated=3)
    truth = case_gqa.oracle.run(batch.tokens, batch.attention_mask)
    rows = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    rows[:, -3:] = True
    close(
        read(case_gqa, NeuronActivations("mean", positions="generated"), batch),
        pool_by_hand(truth.post, rows, "mean"),
    )
    close(read(case_gqa, HeadOutputs(), batch), torch.stack([z[:, -4] for z in truth.z], dim=1))


def test_under_a_cache(case_gqa: Case) -> None:
    """A span of the prompt is read at the prefill; a generated row at its own step."""
    batch = case_gqa.batch
    new = torch.tensor([[5, 6]] * len(batch))
    truth = case_gqa.oracle.run(
        torch.cat([batch.tokens, new], dim=1), torch.cat([batch.attention_mask, torch.ones_like(new)], dim=1)
    )
    span = NeuronActivations("mean", positions="request")
    written = NeuronActivations("last", positions="generated")
    width = batch.tokens.shape[1]
    with bound([span, written], batch), span.on(case_gqa.model), written.on(case_gqa.model):
        decoder = Decoder(case_gqa.model)
        decoder.prefill(batch.tokens, batch.attention_mask)
        for step in range(2):
            decoder.step(new[:, step])
            found = written.collect()["neuron_activation"]
            close(found, torch.stack([post[:, width + step] for post in truth.post], dim=1))
    close(
        span.collect()["neuron_activation"], pool_by_hand(case_gqa.truth.post, batch.spans["request"], "mean")
    )


def test_registered_result_is_labelled(case_gqa: Case) -> None:
    mask = case_gqa.batch.spans["cot"]
    reader = NeuronActivations("max", positions=mask).register(case_gqa.model)
    try:
        all_logits(case_gqa.model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)
        array = reader.result["neuron_activation"]
        assert array.dims == ("prompt", "layer", "neuron")
        assert array.attrs["pool"] == "max"
        close(torch.from_numpy(array.values), pool_by_hand(case_gqa.truth.post, mask, "max"))
    finally:
        reader.remove()


# --- what is refused -----------------------------------------------------------------------------------


def test_a_pool_over_nothing_is_refused_before_any_compute(case_gqa: Case) -> None:
    for reader in (NeuronActivations(positions="gap"), HeadOutputs(positions="generated")):
        with pytest.raises(EmptySpan, match="4 of 4 prompts"):
            reader.layout(case_gqa.facts, case_gqa.batch)


def test_a_pool_over_nothing_in_some_prompts_is_refused_when_registered(case_gqa: Case) -> None:
    """It would come out as −∞, 0, or the value of a row nobody asked for."""
    mask = case_gqa.batch.spans["cot"].clone()
    mask[1] = False
    for pool in ("max", "mean", "last"):
        reader = NeuronActivations(pool, positions=mask)
        with reader.on(case_gqa.model), pytest.raises(EmptySpan, match="prompt 1"):
            all_logits(case_gqa.model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)


def test_unknown_padding_is_refused(case_gqa: Case) -> None:
    reader = NeuronActivations()
    with reader.on(case_gqa.model), pytest.raises(SpanError, match="padding"):
        all_logits(case_gqa.model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)


def test_misspelt_options_are_refused() -> None:
    with pytest.raises(ValueError, match="'max', 'mean' and 'last'"):
        NeuronActivations(pool="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mlp_out"):
        NeuronActivations(site="pre")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resid_post"):
        ResidualStream(site="resid_mid")  # type: ignore[arg-type]


@pytest.mark.skipif("bridge" not in FAMILIES, reason="mixtures of experts are wrapped by the bridge alone")
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_has_no_neurons_but_an_output(architecture: str) -> None:
    from tests.families import Oracle, tiny_moe

    model, hf = tiny_moe(architecture)
    batch = random_batch(seed=4)
    with pytest.raises(UnsupportedModel, match="mlp_out"), NeuronActivations().on(model):
        pass
    reader = NeuronActivations("mean", positions="request", site="mlp_out")
    with bound([reader], batch), reader.on(model):
        last_logits(model, batch.tokens, batch.attention_mask)
    outputs: list[Tensor] = []
    handles = [
        block.mlp.register_forward_hook(
            lambda m, a, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        for block in Oracle(hf).blocks
    ]
    positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        hf(batch.tokens, attention_mask=batch.attention_mask, position_ids=positions)
    for handle in handles:
        handle.remove()
    expected = pool_by_hand(
        [o.view(*batch.tokens.shape, -1) for o in outputs], batch.spans["request"], "mean"
    )
    close(reader.collect()["mlp_output"], expected)
