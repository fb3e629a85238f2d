"""Heads and neurons over checkpoints: each number by hand, and models that were weakened in known ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import rim_lens as rl
from rim_lens.errors import NotEnoughData, ReferenceMismatch, StatisticsError
from rim_lens.lens import Model, wrap_hf
from rim_lens.measures.circuits.moving import STATISTICS
from rim_lens.organisms.planted import planted, planted_truth
from rim_lens.organisms.toy.host import toy_tokenizer

TRUTH = planted_truth()


def weakened(share: float) -> Model:
    """The planted model whose AND neurons write less: what they and the reader after them do to refusal goes down together."""
    hf: Any = planted(0)
    with torch.no_grad():
        hf.transformer.h[0].mlp.c_proj.weight[[place for _, place in TRUTH.neurons]] *= share
    return wrap_hf(hf, toy_tokenizer())


@pytest.fixture(scope="module")
def asked() -> list[rl.Prompt]:
    return list(rl.load_prompts("harmful", language="toy", split="evaluate")[::5])


def test_each_number_by_hand_and_the_two_go_down_together(asked: list[rl.Prompt]) -> None:
    base = weakened(1.0)
    chat = rl.ChatFormat.from_model(base)
    shares = {f"run{seed}": [1 - 0.08 * (seed + 1), 1 - 0.16 * (seed + 1)] for seed in range(4)}
    runs = {name: [weakened(share) for share in some] for name, some in shares.items()}
    table = rl.halves_at_checkpoints(
        runs, chat, TRUTH.heads, TRUTH.neurons, asked, base=base, steps=dict.fromkeys(runs, (40, 80))
    )
    assert table[["run", "step"]].values.tolist()[:4] == [
        ["run0", 0],
        ["run0", 40],
        ["run0", 80],
        ["run1", 0],
    ]
    off = chat.render(asked, think="off")
    last = runs["run3"][1]
    row = table.iloc[-1]
    plain = rl.refusal_score(last, off).values
    effect = rl.refusal_score(last, off, rl.AblateHeads(TRUTH.heads)).values - plain
    before = (
        rl.refusal_score(base, off, rl.AblateHeads(TRUTH.heads)).values - rl.refusal_score(base, off).values
    )
    assert row["score"] == pytest.approx(plain.mean())
    assert row["heads_effect"] == pytest.approx(effect.mean())
    assert row["heads_effect_change"] == pytest.approx((effect - before).mean())
    assert row["heads_effect_change_low"] <= row["heads_effect_change"] <= row["heads_effect_change_high"]
    mass = rl.capture(last, off, rl.SpanAttention())["attention_mass"].sel(span="request")
    by_hand = np.mean([mass.sel(layer=layer, head=head).mean() for layer, head in TRUTH.heads])
    assert row["heads_mass"] == pytest.approx(by_hand, abs=1e-5)
    pooled = rl.capture(last, off, rl.NeuronActivations(pool="mean", positions="think"))["neuron_activation"]
    by_hand = np.mean([pooled.sel(layer=layer, neuron=neuron).mean() for layer, neuron in TRUTH.neurons])
    assert row["neurons_activation"] == pytest.approx(by_hand, rel=1e-4)
    # They fire as before; it is what they write that became less.
    assert abs(table["neurons_activation_change"]).max() < 1e-4
    assert (table.loc[table["step"] == 0, [f"{name}_change" for name in STATISTICS]] == 0).all(axis=None)
    assert table.loc[table["step"] == 0, "score_p"].isna().all()
    together = rl.halves_together(table, [("heads_effect", "neurons_effect")])
    assert together.drop_duplicates(["metric", "outcome"])[["metric", "outcome"]].values.tolist() == [
        ["heads_effect", "neurons_effect"],
        ["heads_effect", "score"],
        ["neurons_effect", "score"],
    ]
    across = together[(together["how"] == "across") & (together["outcome"] == "neurons_effect")].iloc[0]
    assert across["pearson"] > 0.95
    # Four runs have 24 pairings, of which the real one correlates most.
    assert across["p_pearson"] == pytest.approx(1 / 24)
    assert across["n_runs"] == 4


def test_mistakes(asked: list[rl.Prompt]) -> None:
    base = rl.load_model("planted")
    chat = rl.ChatFormat.from_model(base)
    call = lambda runs, **more: rl.halves_at_checkpoints(  # noqa: E731
        runs, chat, **{"heads": [(1, 1)], "neurons": [(0, 3)], "requests": asked, "base": base, **more}
    )
    with pytest.raises(NotEnoughData, match="without a checkpoint"):
        call({"a": []})
    with pytest.raises(NotEnoughData, match="one family"):
        call({"a": [base]}, requests=asked[:1])
    with pytest.raises(ReferenceMismatch, match="steps"):
        call({"a": [base]}, steps={"a": [1, 2]})
    with pytest.raises(NotEnoughData, match="at least one of each"):
        call({"a": [base]}, heads=[])
    with pytest.raises(StatisticsError, match="was asked for"):
        rl.halves_together(call({"a": [base]}), [("heads", "neurons")])
