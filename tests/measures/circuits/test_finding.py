"""The whole call: planted truth on a sample of noise seeds, the plan held against what is read, and what is kept and refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import rim_lens as rl
from rim_lens.errors import (
    ConditionError,
    EmptySpan,
    GateNotPassed,
    StatisticsError,
    StudyFolderError,
    UnknownHead,
)
from rim_lens.lens import model_facts, wrap_hf
from rim_lens.measures.circuits.asking import Question
from rim_lens.measures.circuits.instead import ablated
from rim_lens.measures.circuits.keeping import Replacements, every_neuron, members
from rim_lens.measures.circuits.nodes import END, edges_between, head_node
from rim_lens.measures.circuits.settling import next_word_odds
from rim_lens.measures.circuits.table import Measured, edge_table
from rim_lens.measures.circuits.testing import outside, random_circuits, whole
from rim_lens.measures.refusal.openers import opener_ids
from rim_lens.measures.two_sides import paired, two_sides
from rim_lens.organisms.planted import planted, planted_truth
from rim_lens.organisms.toy.host import toy_tokenizer
from tests.circuit_verdicts import PLANTED_EDGES, planted_circuit
from tests.families import FAMILIES, Case
from tests.verdicts import toy_requests

READER = -16.226  # nats: what the planted reader loses with the twin's words of the AND neurons
FEW = rl.CircuitSearch(limit=4, n_random=1, n_random_senders=1)


@pytest.fixture(scope="module")
def counted() -> tuple[rl.Circuit, int]:
    """A planted circuit with reasoning questions, and how many prompts were read for it."""
    model, truth = rl.load_model("planted"), planted_truth()
    chat = rl.ChatFormat.from_model(model)
    read = [0]

    def count(tensor: torch.Tensor, hook: Any) -> None:
        if tensor.shape[1] > 1:  # and not a token that is written
            read[0] += tensor.shape[0]

    model.hook_dict["hook_embed"].add_hook(count)
    questions = rl.load_prompts("reasoning", language="toy", split="evaluate")
    search = replace(FEW, limit=8)
    found = rl.circuit(
        model, chat, truth.heads, {"and": truth.neurons}, *toy_requests(), reasoning=questions, search=search
    )
    return found, read[0]


def test_random_nodes_hold_nothing_that_was_given() -> None:
    """Two sets of neurons in one layer: a node like the one may not hold the other's."""
    model, truth = rl.load_model("planted"), planted_truth()
    other = [(0, place) for place in range(8, 208) if (0, place) not in truth.neurons]
    question = Question(
        model,
        rl.ChatFormat.from_model(model),
        truth.heads,
        {"and": truth.neurons, "other": other},
        *toy_requests(),
        reasoning=[],
        spans=(),
        contrasts=["twins"],
        tuned=None,
        read_in="off",
        search=replace(FEW, n_random_senders=20),
    )
    given = {*truth.neurons, *other}
    node = next(node for node in question.nodes if set(node.neurons) == set(truth.neurons))
    drawn = {neuron for one in question.random_nodes()[node] for neuron in one.neurons}
    assert len(drawn) > 30
    assert not drawn & given


@pytest.mark.parametrize("seed", [3, 11])
def test_the_planted_edges_and_no_others(seed: int) -> None:
    found = planted_circuit(seed, rl.CircuitSearch(limit=20, n_random=2, n_random_senders=0))
    assert set(found.top()) == set(PLANTED_EDGES)
    assert [node.name for node in found.kept()] == ["L0H5", "L1H1", "and L0"]
    faithful, complete = (found.row(name, "harmful") for name in ("faithfulness", "completeness"))
    assert faithful["share"] >= 0.95
    assert complete["share"] >= 0.95
    assert max(abs(faithful["random_high"]), abs(complete["random_high"])) < 0.1
    # Each of the three is needed: the circuit is a chain.
    assert min(found.row("minimality", "harmful", node.name)["share"] for node in found.kept()) > 0.8
    # On twins there is nothing to lose: the circuit neither makes nor unmakes a refusal there.
    assert abs(found.row("completeness", "harmless")["change"]) < 1


def test_the_plan_holds(counted: tuple[rl.Circuit, int]) -> None:
    found, read = counted
    plan = found.settings["plan"]
    assert plan["n_edges"] == len(found.edges)
    assert 0.5 * plan["n_rows"] < read <= plan["n_rows"]
    assert plan["n_batches"] == 3  # two heads, one node of neurons
    kinds = {"harmful", "harmless", "reasoning", "reasoning answers", "reasoning accuracy"}
    assert set(found.tests["kind"]) == kinds
    assert found.row("faithfulness", "reasoning accuracy")["unit"] == "1 right, 0 wrong"


@pytest.mark.family_contract
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_planted_circuit(family: Any) -> None:
    model, truth = wrap_hf(planted(0), toy_tokenizer(), family=family), planted_truth()
    search = rl.CircuitSearch(limit=8, n_random=2, n_random_senders=1, n_random_receivers=1, n_confirm=8)
    found = rl.circuit(
        model,
        rl.ChatFormat.from_model(model),
        [*truth.heads, *truth.decoy_heads],
        {"and": truth.neurons},
        *toy_requests(),
        search=search,
        rule=rl.EdgeRule(alpha=0.2),  # four families
    )
    assert set(found.top()) == set(PLANTED_EDGES)
    assert found.row("faithfulness", "harmful")["share"] >= 0.95
    assert found.row("completeness", "harmful")["share"] >= 0.95
    reader = found.edges.set_index("edge").loc["and L0 → L1H1.v"]
    # The same to three digits in every family and version.
    assert reader["effect"] == pytest.approx(READER, rel=1e-3)


def test_reasoning_suffers_by_what_does_the_sums() -> None:
    """The toy's own sums: removing what refusal needs, and what sums need, told apart by accuracy."""
    model = rl.load_model("toy")
    chat = rl.ChatFormat.from_model(model)
    questions = rl.load_prompts("reasoning", language="toy", split="evaluate")[::6]
    heads = [(layer, head) for layer in range(2) for head in range(8)]
    neurons = rl.propose_nodes(model, chat, *toy_requests(), n_neurons=64, limit=12).neurons
    search = rl.CircuitSearch(
        limit=12, n_random=0, n_random_senders=0, n_random_receivers=0, n_confirm=20, max_new_tokens=2
    )
    found = rl.circuit(
        model, chat, heads, neurons, *toy_requests(), reasoning=questions, search=search, gate=False
    )
    row = found.row("completeness", "reasoning accuracy")
    assert row["full"] == 1.0  # the toy adds without fault
    assert row["n"] == len(questions)
    by_hand = rl.accuracy_reading(model, chat.render(questions, think="off"), chat, 2)
    units = members(found.kept())
    twins = chat.render(paired(two_sides(*toy_requests(), 12, 0)[0]).harmless, think="off")
    replaced = Replacements(model, model_facts(model), by_hand.batch, ablated("mean", twins), True)
    assert row["after"] == by_hand(replaced.of(*units)).mean()


def test_kept_and_read_back(counted: tuple[rl.Circuit, int], tmp_path: Any) -> None:
    found = counted[0]
    found.save(tmp_path)
    again = rl.Circuit.load(tmp_path)
    for name in ("nodes", "edges", "tests"):
        assert getattr(again, name).equals(getattr(found, name)), name
    assert again.effects.identical(found.effects)
    assert (again.gate, again.kept(), repr(again)) == (found.gate, found.kept(), repr(found))
    assert found.to_dataframe() is not found.edges
    (tmp_path / "circuit.json").write_text('{"format_version": 99}')
    with pytest.raises(StudyFolderError, match="version 99"):
        rl.Circuit.load(tmp_path)
    (tmp_path / "circuit.json").unlink()
    with pytest.raises(StudyFolderError, match="no readable circuit"):
        rl.Circuit.load(tmp_path)


def test_as_a_graph(counted: tuple[rl.Circuit, int]) -> None:
    found = counted[0]
    whole, own = found.to_networkx(every=True), found.to_networkx()
    assert set(whole) == set(found.nodes["name"])
    assert whole.number_of_edges() == len(found.edges)
    assert own.number_of_edges() == int(found.edges["in_circuit"].sum()) == len(found.top())
    assert whole.edges["and L0", "L1H1", "v"]["effect"] == pytest.approx(
        float(found.effects["effect"].sel(contrast="twins", edge="and L0 → L1H1.v").mean())
    )
    with pytest.raises(StatisticsError, match="'careful' was asked for"):
        found.to_networkx("careful")
    with pytest.raises(StatisticsError, match="no test is of"):
        found.row("faithfulness", "twins")


def test_exchanged_labels_turn_the_tested_number_and_p_counts_them_all() -> None:
    """With four families, 16 ways of signs: p is the share of ways in which some edge comes out as far as this one does."""
    rng = np.random.default_rng(0)
    edges = edges_between([head_node((0, head)) for head in range(3)], [END])
    effect, back = rng.normal(2, 1, (8, 3)), rng.normal(-2, 3, (8, 3))
    families = list("aabbccdd")
    reach = np.full(8, 4.0)
    rule = rl.EdgeRule(min_effect=0, min_share=0)
    table = edge_table("twins", Measured(edges, effect, effect, back, reach, reach, {}), families, rule)
    both = (effect - back) / 2
    sums = both.reshape(4, 2, 3).sum(axis=1)
    sums = sums / np.linalg.norm(sums, axis=0)
    signs = np.array([[1 - 2 * (way >> bit & 1) for bit in range(4)] for way in range(16)])
    largest = np.abs(signs @ sums).max(axis=1)
    for row in table.to_dict("records"):
        place = [str(edge) for edge in edges].index(row["edge"])
        expected = (largest >= abs(sums[:, place].sum()) - 1e-9).mean()
        assert row["p"] == pytest.approx(expected)
        assert row["both"] == pytest.approx(both[:, place].mean())
    turned = edge_table("twins", Measured(edges, back, back, effect, -reach, -reach, {}), families, rule)
    assert turned.set_index("edge")["p"].to_dict() == table.set_index("edge")["p"].to_dict()


def test_replaced_units_are_those_of_the_editors(case_gqa: Case) -> None:
    """Worked out once or by the editors themselves on the running model: the same scores."""
    model, facts = case_gqa.model, case_gqa.facts
    batch, reference = case_gqa.batch.select([0, 3]), case_gqa.batch
    ids = torch.tensor(opener_ids(model.tokenizer, ["w5", "w9"]))
    heads, neurons = outside(whole(facts, ([], []), "all"), ([(0, 1), (1, 2)], [(0, 3), (1, 7)]))
    assert len(heads) == 10
    assert len(neurons) == 2 * facts.d_mlp - 2
    for instead in (ablated("mean", reference), ablated("resample", reference, seed=1)):
        replaced = Replacements(model, facts, batch, instead, with_neurons=True)
        found = next_word_odds(model, batch, replaced.of(heads, neurons), ids)
        editors = [instead.heads(heads), instead.neurons(neurons)]
        np.testing.assert_allclose(found, next_word_odds(model, batch, editors, ids), atol=1e-4)
        assert np.abs(found - next_word_odds(model, batch, [], ids)).max() > 1e-3
    assert replaced.of([], []) == []


def test_random_circuits_have_the_shape_of_the_circuit() -> None:
    facts = model_facts(rl.load_model("planted"))
    units = ([(0, 5), (1, 1), (1, 2)], [(0, 3), (0, 4)])
    drawn = random_circuits(facts, units, 10, 0)
    assert len(drawn) == 10
    for heads, neurons in drawn:
        assert sorted(layer for layer, _ in heads) == [0, 1, 1]
        assert [layer for layer, _ in neurons] == [0, 0]
        assert not set(heads) & set(units[0])
    # In the scope of heads, neurons are the circuit's own: none outside it, and all of them outside a random one.
    everything = whole(facts, units, "heads")
    assert outside(everything, units) == ([head for head in facts.heads() if head not in units[0]], [])
    assert outside(everything, drawn[0])[1] == sorted(set(units[1]) - set(drawn[0][1]))
    assert outside(whole(facts, units, "all"), units)[1] == sorted(set(every_neuron(facts)) - set(units[1]))
    assert len(every_neuron(facts)) == 512


def test_a_whole_layer_of_neurons_has_no_random_one_beside_it() -> None:
    model = rl.load_model("planted")
    chat, whole_layer = rl.ChatFormat.from_model(model), [(0, neuron) for neuron in range(256)]
    search = rl.CircuitSearch(limit=4, n_random=0, n_random_senders=2, n_random_receivers=2)
    found = rl.circuit(model, chat, [(0, 5), (1, 1)], whole_layer, *toy_requests(), search=search)
    edges = found.edges.set_index("edge")
    assert edges.loc["neurons L0 → L1H1.v", "n_controls"] == 0
    assert edges.loc["L0H5 → neurons L0", "n_controls"] == 2
    assert edges.loc["L0H5 → neurons L0", "n_controls_receiver"] == 0


def test_mistakes() -> None:
    model = rl.load_model("planted")
    chat = rl.ChatFormat.from_model(model)
    requests = toy_requests()
    plan = lambda *args, **more: rl.plan_circuit(model, chat, *args, *requests, search=FEW, **more)  # noqa: E731
    with pytest.raises(UnknownHead):
        plan([(2, 0)], [])
    with pytest.raises(StatisticsError, match="no node"):
        plan([], [])
    with pytest.raises(StatisticsError, match="'tuned' compares"):
        plan([(0, 5)], [], contrasts=("tuned",))
    with pytest.raises(ConditionError, match="is what is read"):
        plan([(0, 5)], [], contrasts=("off",))
    with pytest.raises(ConditionError, match="open"):
        plan([(0, 5)], [], contrasts=("open",))
    with pytest.raises(EmptySpan):
        plan([(0, 5)], [], spans=("gap",))
    with pytest.raises(StatisticsError, match="scope"):
        rl.CircuitSearch(scope="some")  # type: ignore[arg-type]
    with pytest.raises(StatisticsError, match="alpha"):
        rl.EdgeRule(alpha=0)
    facts = model_facts(model)
    evaluate = [prompt for prompt in requests[0] if prompt.split == "evaluate"]
    chosen = rl.NeuronSet(
        [(0, 1)],
        facts.n_layers,
        facts.d_mlp,
        made_by={
            "select_ids": [],
            "select_texts": [],
            "select_families": sorted({str(prompt.family) for prompt in evaluate}),
        },
    )
    with pytest.raises(StatisticsError, match="chose the neurons"):
        plan([(0, 5)], chosen)
    bad, good = ([replace(one, twin=None) for one in kind] for kind in requests)
    with pytest.raises(GateNotPassed):
        rl.circuit(model, chat, [(0, 5)], [], good, bad, search=FEW)
