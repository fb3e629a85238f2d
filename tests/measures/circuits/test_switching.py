"""Nodes and edges switched off: against the tests of `circuit`, against its edges, and all edges of a sender against patching it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.errors import ReferenceMismatch, StatisticsError
from rim_lens.hooks import Component, PatchHeads, PatchNeurons
from rim_lens.measures.circuits.cutting import Cutting
from rim_lens.measures.circuits.instead import patched
from rim_lens.measures.circuits.nodes import END, edges_between, head_node, neuron_nodes
from rim_lens.measures.circuits.paths import PathRun
from rim_lens.measures.circuits.settling import next_word_odds
from rim_lens.measures.held_out import refuse_used
from rim_lens.organisms.planted import planted_truth
from tests.families import Case
from tests.measures.circuits.test_paths import OPENERS, other_tokens
from tests.verdicts import toy_requests

TRUTH = planted_truth()
SEARCH = rl.CircuitSearch(limit=8, n_random=0, n_random_senders=0)


@pytest.fixture(scope="module")
def planted() -> tuple[rl.Circuit, rl.CircuitSwitches]:
    model = rl.load_model("planted")
    chat = rl.ChatFormat.from_model(model)
    questions = rl.load_prompts("reasoning", language="toy", split="evaluate")
    heads = [*TRUTH.heads, *TRUTH.decoy_heads]
    found = rl.circuit(
        model,
        chat,
        heads,
        {"and": TRUTH.neurons},
        *toy_requests(),
        reasoning=questions,
        contrasts=("twins", "careful"),
        search=SEARCH,
    )
    return found, rl.CircuitSwitches(model, chat, found, *toy_requests(), questions)


def after(switches: rl.CircuitSwitches, off: Any, kind: str, alone: bool = False) -> float:
    table = switches.read(off, alone=alone).set_index("kind")
    return float(table["after"][kind])


def test_nodes_off_are_the_tests_of_the_circuit(planted: Any) -> None:
    found, switches = planted
    kept = [node.name for node in found.kept()]
    assert kept == ["L0H5", "L1H1", "and L0"]
    for kind in ("harmful", "harmless", "reasoning", "reasoning answers"):
        row = found.row("completeness", kind)
        assert after(switches, kept, kind) == pytest.approx(row["after"], abs=1e-4)
        assert after(switches, [], kind) == pytest.approx(row["full"], abs=1e-4)
        assert after(switches, [], kind, alone=True) == pytest.approx(
            found.row("faithfulness", kind)["after"], abs=1e-4
        )
        for name in kept if kind in ("harmful", "harmless") else ():  # where nodes are taken out one by one
            expected = found.row("minimality", kind, name)["after"]
            assert after(switches, [name], kind, alone=True) == pytest.approx(expected, abs=1e-4)
    table = switches.read([], alone=True).set_index("kind")
    assert table["share"]["harmful"] == pytest.approx(found.row("faithfulness", "harmful")["share"], abs=1e-5)
    assert table["none"]["harmful"] == pytest.approx(found.row("faithfulness", "harmful")["none"], abs=1e-4)
    # planted answers 0 to every question, right or not, and its circuit has no part in that.
    right = switches.read(kept).set_index("kind").loc["reasoning right"]
    answers = [prompt.answer for prompt in switches.asked.reasoning.prompts]
    assert right["full"] == right["after"] == pytest.approx(np.mean([one == "0" for one in answers]))


@pytest.mark.parametrize("contrast", ["twins", "careful"])
def test_one_edge_off_is_its_effect(planted: Any, contrast: str) -> None:
    """Spans, queries, keys and values, neurons and the refusal score, request by request."""
    found, switches = planted
    model, chat = switches.model, switches.chat
    if contrast != "twins":
        switches = rl.CircuitSwitches(model, chat, found, *toy_requests(), contrast=contrast)
    effects = found.effects["effect"].sel(contrast=contrast)
    sizes = np.abs(effects).max("prompt")
    for name in map(str, sizes["edge"].values[np.argsort(-sizes.values)][:12]):
        moved = switches.values([name], False)["harmful"] - switches.values([], False)["harmful"]
        np.testing.assert_allclose(
            moved, effects.sel(edge=name), atol=2e-3 * float(sizes.max()), err_msg=name
        )
    assert float(sizes.max()) > 10


@pytest.mark.family_contract
def test_all_edges_of_senders_off_are_the_senders_patched(case: Case) -> None:
    """Grouped heads, gates, norms: what nobody hears is as if it were not said, also where a sender hears another one that is cut."""
    batch = case.batch.select([0, 3])
    model, facts = case.model, case.facts
    source = other_tokens(batch)
    first, second = head_node((0, 1)), head_node((1, 2))
    some = neuron_nodes("some", [(0, 3), (0, 7), (1, 4)])
    every = [
        *map(head_node, facts.heads()),
        *neuron_nodes(
            "all", [(layer, place) for layer in range(facts.n_layers) for place in range(facts.d_mlp)]
        ),
    ]
    senders = [first, second, *some]
    run = PathRun(model, batch, senders, [*every, END], patched(source), OPENERS)
    cutting = Cutting(run, run.batch)

    def score(components: list[Component]) -> np.ndarray:
        return next_word_odds(model, run.batch, components, run.ending.ids)

    for cut in ([first], [second], [first, second], senders):
        found = score(cutting.components(edges_between(cut, [*every, END]), []))
        heads = [head for node in cut for head in node.heads]
        neurons = [neuron for node in cut for neuron in node.neurons]
        editors: list[Component] = [PatchHeads(heads, source)]
        editors += [PatchNeurons(neurons, source)] if neurons else []
        expected = score(editors)
        np.testing.assert_allclose(found, expected, atol=2e-4)
        assert np.abs(expected - run.ending.baseline).min() > 1e-3
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_on_other_prompts_edges_carry_the_background(planted: Any) -> None:
    """With no other run, all edges out of a head amount to the head replaced by its mean; edges from spans stay."""
    _, switches = planted
    edges = [str(edge) for edge in switches.asked.edges if edge.sender.name == "L1H1"]
    assert edges == ["L1H1 → refusal"]  # in the last layer, and no neurons after it are given
    for kind in ("harmless", "reasoning"):
        assert after(switches, edges, kind) == pytest.approx(after(switches, ["L1H1"], kind), abs=0.05)
    spans = [str(edge) for edge in switches.asked.edges if edge.sender.kind == "span"]
    assert after(switches, spans, "harmless") == after(switches, [], "harmless")
    assert after(switches, spans, "harmful") < after(switches, [], "harmful") - 10
    # A receiver that is off hears nothing that matters.
    off = ["L1H1", "think → L1H1.v"]
    assert after(switches, off, "harmful") == after(switches, ["L1H1"], "harmful")


def test_a_selection_is_saved_untested(planted: Any, tmp_path: Any) -> None:
    found, switches = planted
    some = switches.selection(["L0H5", "think → L1H1.v"])
    assert [node.name for node in some.kept()] == ["L1H1", "and L0"]
    assert set(found.top()) - set(some.top()) == {"request → L0H5.v", "L0H5 → and L0", "think → L1H1.v"}
    assert len(some.tests) == 0
    some.save(tmp_path)
    again = rl.Circuit.load(tmp_path)
    assert (again.kept(), again.top()) == (some.kept(), some.top())
    assert again.settings["switched_off"] == ["L0H5", "think → L1H1.v"]
    with pytest.raises(StatisticsError, match="chose the heads"):
        refuse_used(again.settings, switches.asked.evaluate.harmful, "heads")
    assert len(found.tests) > 0
    # It can be opened again, as what it is.
    reopened = rl.CircuitSwitches(switches.model, switches.chat, again, *toy_requests())
    assert reopened.selection().kept() == some.kept()


def test_mistakes(planted: Any) -> None:
    found, switches = planted
    with pytest.raises(StatisticsError, match="'L9H9' was to be switched off"):
        switches.read(["L9H9"])
    with pytest.raises(StatisticsError, match="'tuned' was asked for"):
        rl.CircuitSwitches(switches.model, switches.chat, found, *toy_requests(), contrast="tuned")
    bad, good = toy_requests()
    with pytest.raises(ReferenceMismatch, match="other requests"):
        rl.CircuitSwitches(switches.model, switches.chat, found, bad[::2], good[::2])
    with pytest.raises(ReferenceMismatch, match="other weights"):
        rl.CircuitSwitches(rl.load_model("planted:1"), switches.chat, found, bad, good)
