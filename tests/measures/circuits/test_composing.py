"""Composition of weights against whole matrices, and against TransformerLens where norms are folded in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rim_lens as rl
from rim_lens.measures.circuits.composing import composition
from rim_lens.measures.circuits.nodes import head_node, neuron_nodes
from tests.families import Case


def test_whole_matrices_give_the_same(case: Case) -> None:
    model, facts = case.model, case.facts
    low, high = neuron_nodes("some", [(0, 3), (0, 7), (1, 2), (1, 9)])
    sender, receiver = head_node((0, 1)), head_node((1, 2))
    table = composition(model, [sender, low], [receiver, high]).set_index("edge")["composition"]
    assert len(table) == 8
    share = facts.n_heads // facts.n_key_value_heads

    def weight(layer: int, name: str, head: int) -> torch.Tensor:
        whole = getattr(model.blocks[layer].attn, f"W_{name}").detach().double()
        return whole[head if whole.shape[0] == facts.n_heads else head // share]

    # The norm's weights, from the plain model.
    block = case.oracle.blocks[1]
    norms = (
        (block.ln_1, block.ln_2)
        if case.oracle.is_gpt2
        else (block.input_layernorm, block.post_attention_layernorm)
    )
    first, second = (torch.diag(norm.weight.detach().double()) for norm in norms)
    mlp = model.blocks[1].mlp
    into = [mlp.W_in, *([mlp.W_gate] if facts.gated else [])]
    sent = {
        sender.name: weight(0, "V", 1) @ weight(0, "O", 1),
        low.name: model.blocks[0].mlp.W_out[[3, 7]].detach().double(),
    }
    look = first @ weight(1, "Q", 2) @ weight(1, "K", 2).T @ first
    heard = {
        "L1H2.q": look,
        "L1H2.k": look.T,
        "L1H2.v": first @ weight(1, "V", 2) @ weight(1, "O", 2),
        "some L1": second @ torch.cat([one[:, [2, 9]].detach().double() for one in into], dim=1),
    }
    for name, left in sent.items():
        for way, right in heard.items():
            expected = float((left @ right).norm() / left.norm() / right.norm())
            assert table[f"{name} → {way}"] == pytest.approx(expected, rel=1e-4), (name, way)


def test_transformer_lens_gives_the_same_of_heads(case_processed: Case) -> None:
    model, facts = case_processed.model, case_processed.facts
    if not hasattr(model, "all_composition_scores"):
        pytest.skip("this TransformerLens scores no compositions")
    senders = [head_node((0, head)) for head in range(facts.n_heads)]
    receivers = [head_node((1, head)) for head in range(facts.n_heads)]
    table = composition(model, senders, receivers)
    for way in "qkv":
        theirs = model.all_composition_scores(way.upper())[0, :, 1, :]
        ours = table[table["input"] == way].pivot(index="sender", columns="receiver", values="composition")
        np.testing.assert_allclose(ours.values, theirs.detach().numpy(), rtol=1e-3)


def test_planted_writers_and_readers_stand_out() -> None:
    """Weights carry noise; the AND neurons write where the reader's values read, and so the reader's edge is the largest."""
    from rim_lens.organisms.planted import planted_truth

    model, truth = rl.load_model("planted"), planted_truth()
    (node,) = neuron_nodes("and", truth.neurons)
    readers = [head_node((1, head)) for head in range(8)]
    table = composition(model, [node], readers)
    assert table.loc[table["composition"].idxmax(), "edge"] == "and L0 → L1H1.v"
    topic = composition(model, [head_node((0, 5))], neuron_nodes("and", truth.neurons))
    assert topic["percentile"].tolist() == [100.0]
    assert topic["n_controls"].tolist() == [7]
