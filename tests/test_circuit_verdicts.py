"""docs/circuits.md says what docs/evidence holds, and a sample of what is measured comes out the same."""

from __future__ import annotations

import json

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.measures.circuits.nodes import edges_between
from rim_lens.measures.frames import frame_from_json
from rim_lens.organisms.planted import planted_truth
from rim_lens.organisms.toy.recipe import one_thread
from tests import circuit_verdicts
from tests.verdicts import toy_requests, with_labels_changed

FOUND = json.loads(circuit_verdicts.EVIDENCE.read_text())


def test_the_page_is_that_of_the_numbers() -> None:
    assert circuit_verdicts.PAGE.read_text() == circuit_verdicts.page(FOUND)


def test_a_planted_seed_comes_out_the_same() -> None:
    seed = circuit_verdicts.PLANTED_SEEDS[1]
    with one_thread():
        row = circuit_verdicts.planted_row(seed)
    kept = FOUND["planted"][1]
    assert (row["seed"], row["edges"], row["kept"]) == (seed, kept["edges"], kept["kept"])
    assert row["smallest_planted"] == pytest.approx(kept["smallest_planted"], abs=1e-2)
    assert row["faithfulness"][0] == pytest.approx(kept["faithfulness"][0], abs=1e-3)


def test_the_claims_of_the_page_hold_in_the_evidence() -> None:
    planted = FOUND["planted"]
    assert len(planted) >= 20
    assert all(row["exact"] for row in planted)
    assert min(row["faithfulness"][0] for row in planted) >= 0.95
    assert min(row["completeness"][0] for row in planted) >= 0.95
    for rows in (FOUND["random"], FOUND["permuted"]):
        runs, hits = (sum(row[name] for row in rows) for name in ("n_runs", "any"))
        # The level is .05, and no more within binomial error.
        assert hits / runs <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5


def test_everything_is_measured() -> None:
    """A page is written as far as measuring came, and names the rest; of the committed one nothing is left out."""
    assert FOUND["missing"] == []
    for part, some in circuit_verdicts.parts().items():
        assert len(FOUND[part]) == len(some), part
    assert "**Not measured yet**" not in circuit_verdicts.PAGE.read_text()
    told = circuit_verdicts.page({**FOUND, "missing": ["tuned-9-careful"]})
    assert "**Not measured yet** (the command goes on with them): tuned-9-careful." in told


def test_a_toy_comes_out_the_same() -> None:
    with one_thread():
        model = rl.load_model("toy")
        found = circuit_verdicts.toy_circuit(model, circuit_verdicts.toy_nodes(model))
    kept = FOUND["toy"][0]
    assert [node.name for node in found.kept()] == kept["kept"]
    own = [edge["edge"] for edge in kept["edges"] if edge["contrast"] == "twins"]
    assert set(found.top()) == set(own)
    (faithful,) = (
        test["share"]
        for test in kept["tests"]
        if (test["measure"], test["kind"]) == ("faithfulness", "harmful")
    )
    assert found.row("faithfulness", "harmful")["share"] == pytest.approx(faithful, abs=0.02)


def test_the_page_on_smollm2_says_what_was_measured() -> None:
    """A circuit of at most 30 nodes beside random ones, whatever comes of it; and what docs/smollm2-refusal.md says of it."""
    folder = circuit_verdicts.EVIDENCE.parent
    found = json.loads((folder / "circuit_smollm2-refusal.json").read_text())
    page = (folder / "circuit_smollm2-refusal.md").read_text()
    told = " ".join((folder.parent / "smollm2-refusal.md").read_text().split())
    assert found["settings"]["plan"]["n_nodes"] <= 30
    tests = frame_from_json(found["tests"])
    for name in ("faithfulness", "completeness"):
        row = tests[(tests["measure"] == name) & (tests["kind"] == "harmful")].iloc[0]
        share = f"{row['share']:.2f} [{row['share_low']:.2f}, {row['share_high']:.2f}]"
        assert share in page
        assert share in told
        assert row["n_controls"] >= 12
        assert f"of {row['n_controls']:.0f} random circuits, {row['random']:.2f}" in page
    asked = found["settings"]
    n_measured = asked["plan"]["n_edges"] - len(asked["not_tested"])
    assert f"{n_measured} of {asked['plan']['n_edges']} edges were measured" in told


def test_labels_exchanged_in_the_table_are_words_exchanged_in_the_requests() -> None:
    model, truth = rl.load_model("planted"), planted_truth()
    chat = rl.ChatFormat.from_model(model)
    search = rl.CircuitSearch(limit=4, n_random=0, n_random_senders=0)

    def measured(harmful: list[rl.Prompt], harmless: list[rl.Prompt]) -> rl.Circuit:
        return rl.circuit(
            model,
            chat,
            truth.heads,
            [],
            harmful,
            harmless,
            gate=False,
            search=search,
            spans=("request",),
        )

    harmful, harmless = toy_requests()
    found = measured(harmful, harmless)
    ids = [str(name) for name in found.effects["prompt"].values]
    changed = np.array([place % 2 == 0 for place in range(len(ids))])
    flips = dict(zip(ids, changed, strict=True))
    twin = {prompt.id: prompt for prompt in harmless}
    ordered = [twin[str(prompt.twin)] for prompt in harmful]
    words = np.array([flips.get(prompt.id, False) for prompt in harmful])
    turned = measured(*with_labels_changed(harmful, ordered, words))
    senders, hear = ([node for node in found.asked() if node.kind != kind] for kind in ("end", "span"))
    by_table = circuit_verdicts.exchanged(found, edges_between(senders, hear), changed)
    for name, values in (("effect", by_table.effect), ("back", by_table.back)):
        np.testing.assert_allclose(turned.effects[name].sel(contrast="twins").values, values, atol=2e-3)
