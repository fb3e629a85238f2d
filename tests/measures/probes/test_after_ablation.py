"""Groups on probes with heads removed: by hand, and where the truth is planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rim_lens.errors import UnknownHead
from rim_lens.hooks.recording import record
from rim_lens.measures.controls import percentile_among, random_heads_per_layer
from rim_lens.measures.heads.direct import direct_effects
from rim_lens.measures.probes.after_ablation import ProbesAfterAblation, probe_after_ablation
from rim_lens.organisms.planted import DECOY_HEAD, READER, TOPIC_HEAD
from rim_lens.prompts import Prompt
from tests.measures.probes.plainly import stream_without
from tests.measures.refusal.test_direction import both, toy

PLACES = ("think_close",)


def after(name: str, heads: list[tuple[int, int]], **changes: Any) -> ProbesAfterAblation:
    model, chat = toy(name)
    options: dict[str, Any] = {"places": PLACES, "n_sets": 4, **changes}
    return probe_after_ablation(model, chat, *both(20), heads, **options)


def test_shares_by_hand_and_random_sets_beside_them() -> None:
    model, chat = toy()
    heads = [(0, 5), (1, 2)]
    found = after("toy", heads)
    sets = random_heads_per_layer(heads, 8, 4, 0)
    sides = {
        kind: [p for p in prompts if p.split == "evaluate"]
        for kind, prompts in zip(("harmful", "harmless"), both(20), strict=True)
    }

    def share(prompts: list[Prompt], layer: int, removed: list[tuple[int, int]]) -> float:
        off = chat.render(prompts, think="off")
        probes = found.probes["off"]
        stream = stream_without(model, off, layer, removed)
        scores = stream[:, -1].numpy() @ probes.direction[layer, 0]
        return float((scores > probes.threshold[layer, 0]).mean())

    assert len(found.table) == 4
    for row in found.table.to_dict("records"):
        prompts, layer = sides[row["group"]], row["layer"]
        before = share(prompts, layer, [])
        random = [share(prompts, layer, control) for control in sets]
        assert row["before"] == pytest.approx(before)
        assert row["after"] == pytest.approx(share(prompts, layer, heads))
        assert row["change"] == pytest.approx(row["after"] - row["before"])
        assert row["random"] == pytest.approx(np.mean(random))
        place = percentile_among(row["change"], [value - before for value in random])
        assert (row["percentile"], row["n_controls"]) == (place.percentile, 4)
        kept = found.controls[(found.controls["group"] == row["group"]) & (found.controls["layer"] == layer)]
        assert kept["after"].tolist() == pytest.approx(random)
        assert row["n"] == len(prompts)


def test_removing_what_carries_harm_moves_harmful_prompts_across_and_a_decoy_does_not() -> None:
    true = after("planted", [TOPIC_HEAD], n_sets=7).table.set_index(["group", "layer"])
    assert (true["before"]["harmful"] == 1).all()
    assert (true["after"]["harmful"] == 0).all()
    assert (true["after"]["harmless"] == 0).all()
    assert (true["percentile"]["harmful"] == 100).all()
    assert (true["n_controls"] == 7).all()  # all there are
    decoy = after("planted", [DECOY_HEAD]).table
    assert (decoy["change"] == 0).all()
    reader = after("planted", [READER]).table.set_index(["group", "layer"])
    assert reader["change"]["harmful", 0] == 0  # it writes after that


def test_groups_by_response_on_probes_of_harm() -> None:
    found = after("toy:careful", [(0, 5)], contrast="harmful", groups="refusal", max_new_tokens=4, n_sets=2)
    outcomes = found.settings["outcomes"]["off"]
    counts = found.table.groupby("group")["n"].first().to_dict()
    assert counts == {"refused": outcomes["refuse"], "complied": outcomes["comply"]}
    assert set(found.table["state"]) == {"measured"}
    empty = after("toy", [(0, 5)], groups="refusal", max_new_tokens=4, n_sets=2)
    rows = empty.table[empty.table["group"] == "complied"]
    assert set(rows["state"]) == {"group empty: 0 complied"}
    assert rows["after"].isna().all()
    none = after("toy", [(0, 5)], contrast="refusal", max_new_tokens=4)
    assert none.reasons == {"off": "one class empty: 0 of 20 complied"}
    assert "0 of 20 complied" in repr(none)


def test_heads_that_are_not_there() -> None:
    for heads in ([], [(5, 0)]):
        with pytest.raises(UnknownHead):
            after("toy", heads)


def test_what_heads_write_along_a_probe() -> None:
    """z W_O of each head at the last row, projected; no head comes too late for the probe of the last layer."""
    model, chat = toy("planted")
    off = chat.render([p for p in both(20)[0] if p.split == "evaluate"], think="off")
    probes = after("planted", [TOPIC_HEAD], n_sets=1).probes["off"]
    z = record(model, off, ["z"])
    for layer in (0, 1):
        one = probes.at(layer, "think_close")
        found = direct_effects(model, off, direction=one)["projection"]
        unit = one.direction / np.linalg.norm(one.direction)
        for its_layer in range(2):
            written = np.einsum(
                "phd,hdm->phm",
                z.activations["z", its_layer][:, -1].double().numpy(),
                model.blocks[its_layer].attn.W_O.detach().double().numpy(),
            )
            if its_layer > layer:
                assert bool(found[:, its_layer].isnull().all())
            else:
                np.testing.assert_allclose(found[:, its_layer], written @ unit, atol=1e-4)
    assert int(np.abs(found.mean("prompt")).values[0].argmax()) == TOPIC_HEAD[1]


def test_where_both_classes_read_the_same_nothing_is_measured() -> None:
    """Before layer 0 the closing tag is the same vector in every prompt: no direction, and no share above it."""
    table = after("toy", [(0, 5)], site="resid_pre").table.set_index("layer")
    assert set(table.loc[0, "state"]) == {"both classes read the same"}
    assert table.loc[0, ["before", "after", "change", "percentile"]].isna().all(axis=None)
    assert set(table.loc[1, "state"]) == {"measured"}
