"""Gradient estimates against finite differences on the running model, and what they propose against planted truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import rim_lens as rl
from rim_lens.errors import StatisticsError
from rim_lens.hooks.putting import Put
from rim_lens.lens import Site
from rim_lens.measures.circuits.estimating import estimates
from rim_lens.measures.circuits.instead import patched
from rim_lens.measures.circuits.nodes import END, Edge, edges_between, head_node, neuron_nodes, span_node
from rim_lens.measures.circuits.paths import PathRun
from rim_lens.measures.circuits.settling import next_word_odds
from rim_lens.measures.refusal.openers import opener_ids
from rim_lens.measures.two_sides import paired, two_sides
from rim_lens.organisms.planted import planted_truth
from tests.circuit_verdicts import PLANTED_EDGES
from tests.families import Case
from tests.measures.circuits.test_paths import OPENERS, other_tokens
from tests.verdicts import toy_requests

STEP = 0.02


def by_differences(run: PathRun, edge: Edge) -> np.ndarray:
    """The slope along what the receiver hears, from two passes with a small part of the change, forwards and back."""
    receiver = run.receiver(edge.receiver)
    values = receiver.values(edge.input, run.stream(receiver, edge.sender)[None])
    as_it_is = receiver.values(edge.input, receiver.stream[None])
    scores = []
    for share in (STEP, -STEP):
        part = {
            spot: (columns, torch.lerp(as_it_is[spot][1], new, share))
            for spot, (columns, new) in values.items()
        }
        scores.append(next_word_odds(run.model, run.batch, [Put(part)], run.ending.ids))
    return (scores[0] - scores[1]) / (2 * STEP)


@pytest.mark.family_contract
def test_estimates_are_slopes(case: Case) -> None:
    """Of every kind of sender, receiver and input, heads that share keys and values among them."""
    batch = case.batch.select([0, 3])
    low, high = neuron_nodes("some", [(0, 3), (0, 7), (1, 4), (1, 5)])
    senders = [head_node((0, 1)), low, span_node("request")]
    receivers = [head_node((1, 2)), head_node((1, 3)), high, END]
    run = PathRun(case.model, batch, senders, receivers, patched(other_tokens(batch)), OPENERS, max_rows=1)
    edges = edges_between(senders, receivers)
    found = estimates(run, edges)
    heard = [place for place, edge in enumerate(edges) if edge.receiver is not END]
    expected = np.stack([by_differences(run, edges[place]) for place in heard], axis=1)
    scale = np.abs(expected).max(axis=0)
    assert (scale > 1e-3).all()
    np.testing.assert_allclose(found[:, heard] / scale, expected / scale, atol=0.02)
    ends = [edge for edge in edges if edge.receiver is END]
    np.testing.assert_allclose(
        found[:, [place for place in range(len(edges)) if place not in heard]], run.effects(ends)
    )


@pytest.fixture(scope="module")
def few() -> rl.Circuit:
    """The planted circuit with few edges measured, each beside random senders and receivers."""
    model, truth = rl.load_model("planted"), planted_truth()
    chat = rl.ChatFormat.from_model(model)
    heads = [*truth.heads, *truth.decoy_heads, *truth.sink_heads]
    sets = {"and": truth.neurons, "decoy": truth.decoy_neurons}
    search = rl.CircuitSearch(limit=8, n_random=0, n_random_senders=2, n_random_receivers=3, n_confirm=6)
    rule = rl.EdgeRule(alpha=0.2)  # four families
    return rl.circuit(model, chat, heads, sets, *toy_requests(), search=search, rule=rule)


def test_planted_edges_are_among_few_that_are_measured(few: rl.Circuit) -> None:
    assert set(few.top()) == set(PLANTED_EDGES)
    into = few.edges["receiver"] != "refusal"
    assert int(into.sum()) == 6
    left_out = few.settings["not_tested"]
    assert len(left_out) + len(few.edges) == few.settings["plan"]["n_edges"]
    assert not set(left_out) & set(few.edges["edge"])
    assert max(map(abs, left_out.values())) < 0.5


def test_random_receivers_hear_the_same_sender(few: rl.Circuit) -> None:
    rows = few.edges.set_index("edge")
    reader = rows.loc["and L0 → L1H1.v"]
    assert (reader["percentile_receiver"], reader["n_controls_receiver"], reader["n_controls"]) == (100, 3, 2)
    assert rows.loc["L1H1 → refusal", "n_controls_receiver"] == 0
    assert np.isnan(rows.loc["L1H1 → refusal", "percentile_receiver"])
    # A span has no random sender, and has random receivers.
    assert rows.loc["request → L0H5.v", ["n_controls", "n_controls_receiver"]].tolist() == [0, 3]


def test_proposals_are_slopes_times_what_the_twin_would_put_out() -> None:
    model = rl.load_model("toy")
    chat = rl.ChatFormat.from_model(model)
    requests = toy_requests()
    found = rl.propose_nodes(
        model, chat, *requests, n_heads=4, n_neurons=40, n_neuron_layers=1, heads=[(1, 3)], limit=6
    )
    assert found.heads[0] == (1, 3)
    ranked = np.abs(found.head_estimates.values).ravel().argsort()[::-1][:4]
    assert set(found.heads[1:]) <= {divmod(int(place), 8) for place in ranked}
    assert sorted(found.neurons.per_layer.tolist()) == [0, 40]
    select = paired(two_sides(*requests, 6, 0)[0])
    off, twins = (chat.render(side, think="off") for side in (select.harmful, select.harmless))
    own, other = (rl.record(model, batch, ["z", "post"]).activations for batch in (off, twins))
    ids = torch.tensor(opener_ids(model.tokenizer, None))

    def slope(site: Site, layer: int, column: int) -> float:
        spot = (site, layer)
        scores = []
        for share in (STEP, -STEP):
            moved = torch.lerp(own[spot], other[spot], share)[:, :, [column]]
            scores.append(next_word_odds(model, off, [Put({spot: ([column], moved)})], ids))
        return float((scores[0] - scores[1]).mean()) / (2 * STEP)

    scores = found.neurons.scores
    assert scores is not None
    for layer, head in found.heads[1:3]:
        assert slope("z", layer, head) == pytest.approx(float(found.head_estimates[layer, head]), rel=0.05)
    for layer, neuron in sorted(found.neurons.neurons, key=lambda one: -abs(scores[one]))[:2]:
        assert slope("post", layer, neuron) == pytest.approx(float(scores[layer, neuron]), rel=0.05)
    with pytest.raises(StatisticsError, match="20 heads"):
        rl.propose_nodes(model, chat, *requests, n_heads=20)
    asked = replace(rl.CircuitSearch(limit=6), n_random=0)
    evaluate = [[replace(one, split=flip[str(one.split)]) for one in kind] for kind in requests]
    with pytest.raises(StatisticsError, match="chose the neurons"):
        rl.plan_circuit(model, chat, [], found.neurons, *evaluate, search=asked)


flip = {"select": "evaluate", "evaluate": "select", "train": "train", "dev": "dev"}


def test_what_is_written_after_replaced_prompts_runs_freely() -> None:
    """Under a key-value cache, against whole passes in which values are put on the prompt's rows alone."""
    model = rl.load_model("toy")
    chat = rl.ChatFormat.from_model(model)
    asked = rl.load_prompts("harmless", language="toy", split="select")[:3]
    batch = chat.render(asked, think="open")
    values = rl.record(model, batch, ["z"], [0]).activations["z", 0].flip(2)
    put = Put({("z", 0): (list(range(8)), values)})
    out = rl.generate(model, batch, put, chat=chat, max_new_tokens=5)
    assert out.batch.texts != rl.generate(model, batch, chat=chat, max_new_tokens=5).batch.texts

    def whole(tensor: Tensor, hook: object) -> Tensor:
        tensor = tensor.clone()
        tensor[:, : values.shape[1]] = values
        return tensor

    tokens, mask = batch.tokens, batch.attention_mask
    for _ in range(5):
        with torch.no_grad():
            logits = model.run_with_hooks(
                tokens, attention_mask=mask, fwd_hooks=[("blocks.0.attn.hook_z", whole)]
            )
        tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    for row in range(3):
        n = out.batch.n_generated[row]
        written = (
            out.batch.tokens[row][-n:]
            if n == 5
            else out.batch.tokens[row][out.batch.attention_mask[row].bool()][-n:]
        )
        assert written.tolist() == tokens[row, batch.tokens.shape[1] :][:n].tolist()


def test_proposed_heads_are_not_tested_on_requests_that_chose_them() -> None:
    """Nor where the sides are drawn anew."""
    model = rl.load_model("toy")
    chat, requests = rl.ChatFormat.from_model(model), toy_requests()
    heads = rl.propose_nodes(model, chat, *requests, n_heads=2, n_neurons=0, limit=6).heads
    search = rl.CircuitSearch(limit=6)
    rl.plan_circuit(model, chat, heads, [], *requests, search=search)
    other = {"select": "evaluate", "evaluate": "select"}
    swapped = [
        [replace(one, split=other[one.split]) for one in side if one.split in other] for side in requests
    ]
    with pytest.raises(StatisticsError, match="chose the heads"):
        rl.plan_circuit(model, chat, heads, [], *swapped, search=search)
    for test in (rl.removal_effects, rl.restoring):  # nor edited on them
        with pytest.raises(StatisticsError, match="chose the heads"):
            test(model, chat, heads, *requests)
