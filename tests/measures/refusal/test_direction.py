"""The refusal direction: its parts against the plain model, the whole on models whose truth is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from rim_lens.chat import ChatFormat
from rim_lens.errors import CorruptWeights, GateNotPassed, NoDirection, NotEnoughData
from rim_lens.measures import bootstrap_interval
from rim_lens.measures.refusal.direction import RefusalDirection, refusal_direction
from rim_lens.measures.refusal.score import refusal_score
from rim_lens.organisms import load_model
from rim_lens.organisms.planted import _AT
from rim_lens.organisms.toy.host import TOKEN
from rim_lens.prompts import Prompt, load_prompts
from tests.families import Oracle
from tests.hooks.test_directions import biased_at, orthogonalised
from tests.speaking import Spoken

FEW = 6


@cache
def toy_requests(kind: str, n: int = FEW) -> tuple[Prompt, ...]:
    """Some of each side, of several families, each harmful one with its twin."""
    found: list[Prompt] = []
    for split in ("select", "evaluate"):
        every = load_prompts(kind, language="toy", split=split)
        found += every[:: len(every) // n][:n]
    return tuple(found)


def both(n: int = FEW) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    return toy_requests("harmful", n), toy_requests("harmless", n)


@cache
def toy(name: str = "toy") -> tuple[Any, ChatFormat]:
    model = load_model(name)
    return model, ChatFormat.from_model(model)


@cache
def found_on(name: str, **changes: Any) -> RefusalDirection:
    model, chat = toy(name)
    return refusal_direction(model, chat, *both(20), **{"max_kl": 1.0, "n_random": 3, **changes})


def alone(oracle: Oracle, chat: ChatFormat, prompts: list[Prompt]) -> Any:
    """The plain model on one prompt at a time, without padding."""
    for prompt in prompts:
        tokens = chat.render([prompt], think="off").tokens
        yield oracle.run(tokens, torch.ones_like(tokens))


def score_of(log_probs: torch.Tensor) -> float:
    refuse = float(log_probs[TOKEN["REFUSE"]])
    return refuse - math.log1p(-math.exp(refuse))


def last_log_probs(oracle: Oracle, chat: ChatFormat, prompts: list[Prompt]) -> torch.Tensor:
    return torch.stack(
        [shown.logits[0, -1].double().log_softmax(dim=-1) for shown in alone(oracle, chat, prompts)]
    )


@pytest.mark.family_contract
def test_every_number_equals_that_of_the_plain_model(spoken: Spoken) -> None:
    """Means, ablation, KL and addition by hand: weights made orthogonal, a bias put in, prompts one by one."""
    harmful, harmless = both()
    found = refusal_direction(
        spoken.model, spoken.chat, harmful, harmless, gate=False, max_kl=1e9, n_random=1, openers=["REFUSE"]
    )
    chosen = found.table[found.table["verdict"] == "chosen"].iloc[0]
    assert (chosen["layer"], chosen["offset"]) == (found.layer, found.offset)
    sides = {
        kind: [prompt for prompt in prompts if prompt.split == "select"]
        for kind, prompts in (("harmful", harmful), ("harmless", harmless))
    }
    layer, offset = found.layer, found.offset
    assert layer > 0
    means = {
        kind: torch.stack(
            [shown.resid_post[layer - 1][0, offset] for shown in alone(spoken.oracle, spoken.chat, prompts)]
        ).mean(dim=0)
        for kind, prompts in sides.items()
    }
    torch.testing.assert_close(found.vector, means["harmful"] - means["harmless"], atol=1e-5, rtol=1e-4)

    plain = {kind: last_log_probs(spoken.oracle, spoken.chat, prompts) for kind, prompts in sides.items()}
    without = orthogonalised(spoken.oracle, found.vector)
    ablated = {kind: last_log_probs(without, spoken.chat, prompts) for kind, prompts in sides.items()}
    effect = np.mean([score_of(row) for row in ablated["harmful"]]) - np.mean(
        [score_of(row) for row in plain["harmful"]]
    )
    kl = (plain["harmless"].exp() * (plain["harmless"] - ablated["harmless"])).sum(dim=-1).mean()
    more = biased_at(spoken.oracle, layer, found.vector)
    added = np.mean([score_of(row) for row in last_log_probs(more, spoken.chat, sides["harmless"])])
    assert chosen["effect"] == pytest.approx(effect, abs=2e-4)
    assert chosen["kl"] == pytest.approx(float(kl), abs=2e-4)
    assert chosen["score_added"] == pytest.approx(added, abs=2e-4)
    assert chosen["norm"] == pytest.approx(float(found.vector.norm()))
    assert set(found.table["offset"]) == {-3, -2, -1}
    assert dict(zip(found.table["offset"], found.table["position"], strict=True)) == {
        -3: "assistant",
        -2: "think_open",
        -1: "think_close",
    }
    tested = found.table[found.table["verdict"] != "not tested"]
    assert float(tested["effect"].min()) == chosen["effect"]


@pytest.mark.parametrize(("name", "times"), [("toy", 5), ("planted", 5)])
def test_it_is_what_refusal_runs_along(name: str, times: int) -> None:
    found = found_on(name)
    ablated = found.effects.set_index(["edit", "requests"])
    on_harmful = ablated.loc[("ablate", "harmful")]
    assert on_harmful["high"] < -8
    assert on_harmful["p"] < 0.01
    assert abs(ablated.loc[("ablate", "harmless"), "effect"]) < 3
    assert ablated.loc[("ablate", "harmful - twins"), "high"] < -8
    assert ablated.loc[("add", "harmless"), "low"] > 8
    assert bool(found.table.loc[found.table["verdict"] == "chosen", "induces"].item())
    within = found.controls[found.controls["kind"] == "within"]
    assert len(within) == 3
    assert within["ablate_effect"].abs().max() < -on_harmful["effect"] / times


def test_the_planted_direction_is_harm() -> None:
    """Enabling (what tells a request from its twin) and harm make it up; no other channel does."""
    found = found_on("planted")
    unit = found.vector / found.vector.norm()
    harm, enabling = float(unit[_AT["harm"]]), float(unit[_AT["enabling here"]])
    assert harm > 0.4
    assert harm**2 + enabling**2 > 0.85
    assert found.layer == 1
    assert found.position in ("think_open", "think_close")


def test_effects_are_those_of_its_own_editors_on_evaluate() -> None:
    model, chat = toy()
    found = found_on("toy")
    harmful, harmless = ([prompt for prompt in prompts if prompt.split == "evaluate"] for prompts in both(20))
    for prompts, editor, row in (
        (harmful, found.ablate(), 0),
        (harmless, found.ablate(), 1),
        (harmless, found.add(), 2),
    ):
        batch = chat.render(prompts, think="off")
        effect = refusal_score(model, batch, editor).values - refusal_score(model, batch).values
        interval = bootstrap_interval(effect, families=[prompt.family for prompt in prompts])
        shown = found.effects.iloc[row]
        assert shown["effect"] == pytest.approx(float(effect.mean()), abs=1e-6)
        assert (shown["low"], shown["high"]) == pytest.approx((interval.low, interval.high), abs=1e-6)
        assert shown["n"] == len(prompts)


def test_the_requests_that_test_it_do_not_choose_it() -> None:
    model, chat = toy()
    harmful, harmless = both(20)

    def rest(prompts: tuple[Prompt, ...]) -> list[Prompt]:
        out = [p for p in prompts if p.split == "evaluate"]
        return [p for p in prompts if p.split == "select"] + out[: len(out) // 2]

    found, fewer = (
        found_on("toy"),
        refusal_direction(model, chat, rest(harmful), rest(harmless), max_kl=1.0, n_random=1),
    )
    assert torch.equal(found.vector, fewer.vector)
    pd.testing.assert_frame_equal(found.table, fewer.table)
    assert fewer.effects["n"][0] == found.effects["n"][0] // 2


def test_strings_are_cut_into_halves() -> None:
    model, chat = toy()
    harmful, harmless = ([prompt.text for prompt in prompts] for prompts in both(12))
    found = refusal_direction(model, chat, harmful, harmless, max_kl=1.0, n_random=1)
    assert found.settings["n_select"] == found.settings["n_evaluate"] == [12, 12]
    assert set(found.effects["requests"]) == {"harmful", "harmless"}  # strings name no twins
    assert found.effects["high"][0] < -5


def test_few_candidates_are_tested_where_so_asked() -> None:
    every, one = found_on("toy"), found_on("toy", max_candidates=1)
    assert one.table["separation"].tolist() == every.table["separation"].tolist()
    tested = one.table[one.table["verdict"] != "not tested"]
    assert len(tested) == 1
    assert tested["separation"].item() == every.table["separation"].max()
    assert one.settings["n_tested"] == 1
    assert one.table["effect"].isna().sum() == len(one.table) - 1


def test_the_same_twice() -> None:
    model, chat = toy()
    first, second = found_on("toy"), refusal_direction(model, chat, *both(20), max_kl=1.0, n_random=3)
    assert torch.equal(first.vector, second.vector)
    for name in ("table", "effects", "controls"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name))
    other = refusal_direction(model, chat, *both(20), max_kl=1.0, n_random=3, seed=1)
    assert not other.controls.equals(first.controls)
    assert torch.equal(first.vector, other.vector)


def test_it_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    found = found_on("toy", max_candidates=1)
    found.save(tmp_path / "new" / "folder")
    read = RefusalDirection.load(tmp_path / "new" / "folder")
    assert torch.equal(read.vector, found.vector)
    assert read.vector.dtype == found.vector.dtype
    assert (read.layer, read.offset, read.position) == (found.layer, found.offset, found.position)
    for name in ("table", "effects", "controls"):
        pd.testing.assert_frame_equal(getattr(read, name), getattr(found, name))
    assert read.settings == json.loads(json.dumps(found.settings))
    assert repr(read) == repr(found)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "direction.json",
        "direction.safetensors",
    ]


def test_folders_without_a_direction(tmp_path: Path) -> None:
    with pytest.raises(CorruptWeights, match=r"RefusalDirection\.save"):
        RefusalDirection.load(tmp_path)
    found_on("toy").save(tmp_path)
    written = json.loads((tmp_path / "direction.json").read_text())
    (tmp_path / "direction.json").write_text(json.dumps({**written, "format_version": 99}))
    with pytest.raises(CorruptWeights, match="99"):
        RefusalDirection.load(tmp_path)
    (tmp_path / "direction.json").write_text(json.dumps(written))
    (tmp_path / "direction.safetensors").write_bytes(b"none")
    with pytest.raises(CorruptWeights):
        RefusalDirection.load(tmp_path)


def test_a_model_that_does_not_refuse_stops_at_the_gate() -> None:
    model, chat = toy()
    harmful, harmless = both()
    with pytest.raises(GateNotPassed, match="at least 50%"):
        refusal_direction(model, chat, harmless, harmful)
    backwards = refusal_direction(model, chat, harmful, harmless, gate=False, max_kl=1.0, n_random=1)
    assert backwards.settings["gate"] is False


def test_no_direction_within_the_bound() -> None:
    model, chat = toy()
    with pytest.raises(NoDirection, match=r"none of 3 candidates .* smallest KL"):
        refusal_direction(model, chat, *both(), max_kl=1e-6)
    with pytest.raises(NoDirection, match="no difference of means"):
        refusal_direction(model, chat, *both(), max_layer=0.5)  # the template's own embeddings


def test_a_family_on_both_sides_is_refused() -> None:
    model, chat = toy()
    harmful, harmless = both()
    mixed = [replace(prompt, family=f"{i % 2}") for i, prompt in enumerate(harmful)]
    with pytest.raises(ValueError, match="tested on what chose it"):
        refusal_direction(model, chat, mixed, harmless)


def test_what_is_asked_must_make_sense() -> None:
    model, chat = toy()
    harmful, harmless = both()
    for wrong in (
        {"max_kl": 0.0},
        {"max_layer": 0.0},
        {"max_layer": 1.5},
        {"n_random": 0},
        {"max_candidates": 0},
    ):
        with pytest.raises(ValueError, match="were asked for"):
            refusal_direction(model, chat, harmful, harmless, **wrong)  # type: ignore[arg-type]
    one_family = [replace(prompt, family="same") for prompt in harmful]
    for bad, good in (
        (one_family, harmless),
        (harmful, [replace(prompt, family="same") for prompt in harmless]),
        ([p for p in harmful if p.split == "select"], harmless),
        (harmful, [p for p in harmless if p.split == "evaluate"]),
    ):
        with pytest.raises(NotEnoughData, match="side has"):
            refusal_direction(model, chat, bad, good)
