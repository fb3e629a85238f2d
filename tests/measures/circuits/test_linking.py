"""Neurons in the think block, and circuits before and after an edit of weights whose consequences are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import rim_lens as rl
from rim_lens.errors import NotEnoughData, ReferenceMismatch
from rim_lens.lens import Model, wrap_hf
from rim_lens.organisms.planted import planted, planted_truth
from rim_lens.organisms.toy.host import toy_tokenizer
from tests.verdicts import toy_requests

TRUTH = planted_truth()
FEW = rl.CircuitSearch(limit=6, n_random=0, n_random_senders=0)


def without_writing() -> Model:
    """The planted model whose AND neurons fire and write nothing: what fine-tuning might do to them."""
    hf: Any = planted(0)
    with torch.no_grad():
        hf.transformer.h[0].mlp.c_proj.weight[[place for _, place in TRUTH.neurons]] = 0
    return wrap_hf(hf, toy_tokenizer())


@pytest.fixture(scope="module")
def circuits() -> tuple[rl.Circuit, rl.Circuit]:
    """Of the planted model, beside one whose AND neurons write nothing; and of that model itself."""
    found = []
    for model, more in (
        (rl.load_model("planted"), {"tuned": without_writing(), "contrasts": ("twins", "careful", "tuned")}),
        (without_writing(), {"gate": False}),
    ):
        chat = rl.ChatFormat.from_model(model)
        found.append(
            rl.circuit(model, chat, TRUTH.heads, {"and": TRUTH.neurons}, *toy_requests(), search=FEW, **more)
        )
    return found[0], found[1]


def mean(found: rl.Circuit, contrast: str, edge: str) -> float:
    return float(found.effects["effect"].sel(contrast=contrast, edge=edge).mean())


def test_what_the_tuned_neurons_do_not_write_the_reader_does_not_hear(circuits: Any) -> None:
    """They fire alike in both models: it is by their weights that they say something else."""
    base = circuits[0]
    assert mean(base, "tuned", "and L0 → L1H1.v") < -10
    assert mean(base, "tuned", "L0H5 → and L0") == 0
    reach = float(base.effects["reach"].sel(contrast="tuned").mean())
    assert mean(base, "tuned", "L1H1 → refusal") == pytest.approx(reach, abs=3)
    # A chain of thought takes the reader's attention away, and the request says the same as before.
    assert mean(base, "careful", "L1H1 → refusal") < -10
    assert abs(mean(base, "careful", "request → L0H5.v")) < 1e-3


def test_circuits_compared(circuits: Any) -> None:
    base, tuned = circuits
    table = rl.compare_circuits(base, tuned, contrast="twins").set_index("edge")
    change = tuned.effects["effect"].sel(contrast="twins") - base.effects["effect"].sel(contrast="twins")
    for name, row in table.iterrows():
        assert row["change"] == pytest.approx(float(change.sel(edge=name).mean()))
        assert row["base"] == pytest.approx(mean(base, "twins", str(name)))
    assert {"and L0 → L1H1.v", "L1H1 → refusal", "L0H5 → and L0"} <= set(table.index[table["change"] > 10])
    assert not table["in_tuned"].any()
    with pytest.raises(ReferenceMismatch, match="contrasts"):
        rl.compare_circuits(base, tuned, contrast="careful")
    other = replace(tuned, settings={**tuned.settings, "evaluate_digest": "another"})
    with pytest.raises(ReferenceMismatch, match="requests"):
        rl.compare_circuits(base, other)
    # In another condition the tokens are others, and the requests are the same.
    there = {**tuned.settings, "read_in": "careful", "evaluate_digest": "another"}
    assert (
        rl.compare_circuits(base, replace(tuned, settings=there), contrast="twins")
        .set_index("edge")
        .equals(table)
    )
    strange = tuned.effects.assign_coords(prompt=[f"{one} again" for one in tuned.effects["prompt"].values])
    with pytest.raises(ReferenceMismatch, match="requests"):
        rl.compare_circuits(base, replace(tuned, settings=there, effects=strange))
    with pytest.raises(ReferenceMismatch, match="nodes"):
        rl.compare_circuits(base, replace(tuned, nodes=tuned.nodes.iloc[1:]))


def test_neurons_in_thought_are_pooled_activations() -> None:
    model, other = rl.load_model("planted"), rl.load_model("planted:1")
    chat = rl.ChatFormat.from_model(model)
    asked = rl.load_prompts("harmful", language="toy", split="evaluate")[::6]
    neurons = [*TRUTH.neurons, (1, 4)]
    table = rl.neurons_in_thought(
        model, chat, neurons, asked, tuned=other, conditions=("off", "filler", "open"), max_new_tokens=12
    )
    assert len(table) == 2 * 2 * 3
    table = table.set_index(["node", "model", "condition"])
    off = chat.render(asked, think="off")
    kept = rl.record(model, off, ["post"], [0]).activations["post", 0][
        ..., [place for _, place in TRUTH.neurons]
    ]
    inside = off.spans["think"]
    by_hand = torch.stack([kept[row][inside[row]].mean() for row in range(len(asked))])
    first = table.loc[("neurons L0", "base", "off")]
    assert first["mean"] == pytest.approx(float(by_hand.mean()), rel=1e-5)
    assert np.isnan(first["change"])
    assert np.isnan(first["from_base"])
    written = rl.generate(model, chat.render(asked, think="open"), chat=chat, max_new_tokens=12).batch
    kept = rl.record(model, written, ["post"], [0]).activations["post", 0][
        ..., [place for _, place in TRUTH.neurons]
    ]
    inside = written.spans["think"]
    own = torch.stack([kept[row][inside[row]].mean() for row in range(len(asked))])
    third = table.loc[("neurons L0", "base", "open")]
    assert third["change"] == pytest.approx(float((own - by_hand).mean()), rel=1e-4)
    # Neurons of another noise seed stand elsewhere: here they do next to nothing.
    assert table.loc[("neurons L0", "tuned", "off")]["from_base"] < -0.5 * first["mean"]
    with pytest.raises(NotEnoughData, match="no neuron"):
        rl.neurons_in_thought(model, chat, [], asked)
    with pytest.raises(NotEnoughData, match="one family"):
        rl.neurons_in_thought(model, chat, neurons, asked[:1])
