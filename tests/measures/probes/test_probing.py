"""Probes of models whose truth is known: what separates need not be what refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from rim_lens.chat import ChatFormat
from rim_lens.errors import CorruptWeights, NotEnoughData, StatisticsError, UnknownLayer, UnknownSpan
from rim_lens.generation import generate
from rim_lens.hooks import AblateDirection
from rim_lens.measures import refusal_score
from rim_lens.measures.probes.probing import probe
from rim_lens.measures.probes.result import ProbeResult
from rim_lens.measures.stats import bootstrap_interval
from rim_lens.measures.twins import families_by_swap
from rim_lens.organisms import load_model
from rim_lens.organisms.planted import READER
from rim_lens.prompts import Prompt
from tests.measures.refusal.test_direction import both, toy
from tests.speaking import Spoken

PLACES = ("assistant", "think_open", "think_close")


def unread() -> tuple[Any, ChatFormat]:
    """The planted model without its reader: harm stands in the stream as before, and nothing turns it into a refusal."""
    model = load_model("planted")
    with torch.no_grad():
        model.blocks[READER[0]].attn.W_O[READER[1]] = 0
    return model, ChatFormat.from_model(model)


def random_toy(seed: int = 0) -> tuple[Any, ChatFormat]:
    """The toy with random matrices of the same size and plain norms."""
    model = load_model("toy")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.std())
            else:
                parameter.fill_(float("ln" in name and name.endswith(("weight", "w"))))
    return model, ChatFormat.from_model(model)


@cache
def found_on(name: str, **changes: Any) -> ProbeResult:
    model, chat = (
        {"unread": unread, "random": random_toy}[name]() if name in ("unread", "random") else toy(name)
    )
    return probe(model, chat, *both(20), places=PLACES, ablate="all", n_controls=0, **changes)


def test_what_separates_is_ablated_and_refusal_falls_where_it_is_read() -> None:
    read, unused = (found_on(name).table for name in ("planted", "unread"))
    at_tags = read["place"] != "assistant"
    for table in (read, unused):
        assert (table["auc"] == 1).all()
        assert (table["share_positive"] == 1).all()
        assert (table["share_negative"] == 0).all()
    assert (read["effect_high"] < -10).all()
    assert (read["effect_twins"][at_tags].abs() < 4).all()
    assert set(read["state"]) == {"separates, lowers refusal"}
    # Layer 0 comes before the reader: the very same probes, on a model that never refuses.
    same = [found_on(name).probes["off"].direction[0] for name in ("planted", "unread")]
    np.testing.assert_allclose(same[0], same[1], atol=1e-5)
    assert (unused["baseline"] < 0).all()
    # What is left are the unembedding's noise weights on a channel that is large.
    assert unused["effect"].abs().max() < 0.1 * read["effect"].abs().min() + 0.5
    assert set(unused["state"]) == {"separates, no refusal to lower"}


def test_random_weights_separate_and_refuse_nothing() -> None:
    table = found_on("random").table
    last = table[table["place"] == "think_close"]
    assert (last["auc_low"] > 0.5).all()
    assert set(last["state"]) == {"separates, refusal unmoved"}
    assert table["effect"].abs().max() < 0.5


def test_labels_given_at_random_within_pairs_separate_nothing() -> None:
    model, chat = toy()
    harmful, harmless = both(20)
    turned = np.random.default_rng(1).random(len(harmful)) < 0.5
    pairs = [
        (replace(good, kind="harmful"), replace(bad, kind="harmless")) if turn else (bad, good)
        for bad, good, turn in zip(harmful, harmless, turned, strict=True)
    ]
    mixed = [list(side) for side in zip(*pairs, strict=True)]
    table = probe(model, chat, *mixed, places=PLACES, ablate=0).table
    assert ((table["auc_low"] <= 0.5) & (table["auc_high"] >= 0.5)).mean() >= 5 / 6
    assert table["auc"].between(0.2, 0.8).all()
    assert table["auc_cv"].between(0.2, 0.8).all()
    assert set(table["state"].str.split(", ").str[1]) == {"not tested"}


def test_every_number_of_a_row_by_hand() -> None:
    model, chat = toy()
    sides = [[p for p in prompts if p.split == "evaluate"] for prompts in both(20)]
    row = found_on("toy").table.set_index(["layer", "place"]).loc[1, "think_close"]
    one = found_on("toy").probe("off", 1, "think_close")
    streams = []
    for name in ("select", "evaluate"):
        for prompts in both(20):
            off = chat.render([p for p in prompts if p.split == name], think="off")
            _, cache_ = model.run_with_cache(off.tokens, attention_mask=off.attention_mask)
            streams.append(cache_["blocks.1.hook_resid_post"][:, -1].double().numpy())
    means = [stream.mean(axis=0) for stream in streams[:2]]
    np.testing.assert_allclose(one.direction, means[0] - means[1], atol=1e-5)
    assert one.threshold == pytest.approx((means[0] - means[1]) @ (means[0] + means[1]) / 2, abs=1e-4)
    scores = [stream @ one.direction for stream in streams[2:]]
    assert row["share_positive"] == (scores[0] > one.threshold).mean()
    assert row["share_negative"] == (scores[1] > one.threshold).mean()
    assert row["auc"] == np.mean([[float(high > low) for low in scores[1]] for high in scores[0]])
    editor = AblateDirection(torch.from_numpy(one.direction).float())
    effects = []
    for prompts, name in zip(sides, ("effect", "effect_twins"), strict=True):
        off = chat.render(prompts, think="off")
        effect = refusal_score(model, off, editor).values - refusal_score(model, off).values
        interval = bootstrap_interval(effect, families=[prompt.family for prompt in prompts])
        assert row[name] == pytest.approx(float(effect.mean()), abs=1e-5)
        assert row[f"{name}_low"] == pytest.approx(float(interval.low), abs=1e-5)
        effects.append(effect)
    # A request against its twin: requests told from their twins by the same words are no two witnesses.
    twin = {prompt.id: prompt for prompt in sides[1]}
    assert [prompt.twin for prompt in sides[0]] == list(twin)
    words = families_by_swap(sides[0], list(twin.values()))
    assert len(set(words)) < len({prompt.family for prompt in sides[0]})
    interval = bootstrap_interval(effects[0] - effects[1], families=words)
    for end, value in zip(
        ("", "_low", "_high"), (interval.estimate, interval.low, interval.high), strict=True
    ):
        assert row[f"specificity{end}"] == pytest.approx(float(value), abs=1e-5)
    assert row["baseline"] == pytest.approx(
        float(refusal_score(model, chat.render(sides[0], think="off")).mean())
    )


def test_the_requests_that_test_a_probe_do_not_train_it() -> None:
    model, chat = toy()
    fewer = [
        [p for p in prompts if p.split == "select"] + [p for p in prompts if p.split == "evaluate"][:10]
        for prompts in both(20)
    ]
    found = probe(model, chat, *fewer, places=PLACES, ablate=0)
    np.testing.assert_array_equal(found.probes["off"].direction, found_on("toy").probes["off"].direction)
    assert found.table["auc_cv"].tolist() == found_on("toy").table["auc_cv"].tolist()
    assert set(found.table["n_positive"]) == {10}


def test_the_best_by_cross_validation_are_ablated_beside_controls() -> None:
    model, chat = toy()
    table = probe(model, chat, *both(20), places=PLACES, ablate=2, n_controls=3).table
    tested = table[table["effect"].notna()]
    assert len(tested) == 2
    assert tested["auc_cv"].min() >= table["auc_cv"][table["effect"].isna()].max()
    assert set(tested["n_controls"]) == {3}
    assert set(tested["percentile"]) == {100.0}
    assert table["state"][table["effect"].isna()].str.endswith("not tested").all()
    named = probe(model, chat, *both(20), places=PLACES, ablate=[(1, "assistant")], n_controls=0).table
    assert named[named["effect"].notna()][["layer", "place"]].values.tolist() == [[1, "assistant"]]


def test_open_is_read_with_what_the_model_wrote_itself() -> None:
    """The toy writes the very steps that the careful chain has: both conditions are one."""
    model, chat = toy()
    found = probe(
        model,
        chat,
        *both(8),
        think=("open", "careful"),
        places=("think_open", "cot", "gap", "think_close"),
        max_new_tokens=12,
        ablate=[(1, "cot")],
        n_controls=0,
    )
    own, given = (found.table[found.table["condition"] == name] for name in ("open", "careful"))
    pd.testing.assert_frame_equal(
        own.drop(columns="condition").reset_index(drop=True),
        given.drop(columns="condition").reset_index(drop=True),
        atol=1e-4,
    )
    assert found.absent == {"open": ["gap"], "careful": ["gap"]}
    assert own["effect"].notna().sum() == 1
    cut = probe(model, chat, *both(8), think="open", places=["think_open"], max_new_tokens=2, ablate=1).table
    assert cut["effect"].isna().all()
    assert cut["state"].str.contains("not tested (the block is open", regex=False).all()


def test_a_class_that_is_empty_is_an_outcome() -> None:
    model, chat = toy()
    found = probe(model, chat, *both(8), contrast="refusal", think=("off", "careful"), places=PLACES)
    assert found.reasons == {
        "off": "one class empty: 0 of 8 complied",
        "careful": "one class empty: 0 of 8 refused",
    }
    assert found.reason == ("off: one class empty: 0 of 8 complied; careful: one class empty: 0 of 8 refused")
    assert found.probes == {}
    assert len(found.table) == 2 * 2 * len(PLACES)
    assert found.table[["auc", "effect", "share_positive"]].isna().all(axis=None)
    assert set(found.table["state"]) == set(found.reasons.values())
    assert "no probe" in repr(found)
    with pytest.raises(StatisticsError, match="0 of 8 complied"):
        found.probe("off", 0, "assistant")


def test_refused_against_fulfilled_by_the_models_own_responses() -> None:
    """A model tuned away from some refusals has both: its own answers make the classes."""
    model, chat = toy("toy:careful")
    found = probe(
        model, chat, *both(20), contrast="refusal", places=PLACES, ablate=1, n_controls=0, max_new_tokens=4
    )
    outcomes = found.settings["outcomes"]["off"]["evaluate"]
    assert min(outcomes["refuse"], outcomes["comply"]) >= 2
    assert set(found.table["n_positive"]) == {outcomes["refuse"]}
    assert set(found.table["n_negative"]) == {outcomes["comply"]}
    assert found.table["auc"].notna().all()
    asked = [p for p in both(20)[0] if p.split == "select"]
    off = chat.render(asked, think="off")
    said = np.array(generate(model, off, max_new_tokens=4).outcome)
    _, cache_ = model.run_with_cache(off.tokens, attention_mask=off.attention_mask)
    stream = cache_["blocks.1.hook_resid_post"][:, -1].double().numpy()
    expected = stream[said == "refuse"].mean(axis=0) - stream[said == "comply"].mean(axis=0)
    one = found.probe("off", 1, "think_close")
    np.testing.assert_allclose(one.direction, expected, atol=1e-5)


def test_it_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    found = found_on("toy", think=("off", "careful"))
    found.save(tmp_path / "new" / "folder")
    read = ProbeResult.load(tmp_path / "new" / "folder")
    pd.testing.assert_frame_equal(read.table, found.to_dataframe())
    assert (read.reasons, read.absent) == (found.reasons, found.absent)
    assert read.settings == json.loads(json.dumps(found.settings))
    for name, probes in found.probes.items():
        np.testing.assert_array_equal(read.probes[name].direction, probes.direction)
        np.testing.assert_array_equal(read.probes[name].threshold, probes.threshold)
        assert read.probes[name].places == probes.places
    assert repr(read) == repr(found)
    assert read.provenance == found.provenance
    assert found.settings["weights_digest"] in found.provenance
    with pytest.raises(CorruptWeights, match=r"ProbeResult\.save"):
        ProbeResult.load(tmp_path)
    file = tmp_path / "new" / "folder" / "probes.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    with pytest.raises(CorruptWeights, match="99"):
        ProbeResult.load(tmp_path / "new" / "folder")


@pytest.mark.family_contract
def test_the_same_table_on_every_family(spoken: Spoken) -> None:
    """Random models: shares and effects from the plain model's numbers, one prompt at a time."""
    harmful, harmless = both(4)
    found = probe(
        spoken.model,
        spoken.chat,
        harmful,
        harmless,
        places=["think_close"],
        ablate=0,
        openers=["REFUSE"],
    )
    streams: dict[str, list[torch.Tensor]] = {}
    for prompts in (harmful, harmless):
        for prompt in prompts:
            tokens = spoken.chat.render([prompt], think="off").tokens
            shown = spoken.oracle.run(tokens, torch.ones_like(tokens))
            streams.setdefault(f"{prompt.split} {prompt.kind}", []).append(
                torch.stack(shown.resid_post)[:, 0, -1].double()
            )
    stacked = {name: torch.stack(values) for name, values in streams.items()}
    means = [stacked[f"select {kind}"].mean(dim=0) for kind in ("harmful", "harmless")]
    direction = means[0] - means[1]
    torch.testing.assert_close(
        torch.from_numpy(found.probes["off"].direction[:, 0]), direction, atol=1e-4, rtol=1e-4
    )
    threshold = (direction * (means[0] + means[1])).sum(dim=-1) / 2
    for kind, column in (("harmful", "share_positive"), ("harmless", "share_negative")):
        above = ((stacked[f"evaluate {kind}"] * direction).sum(dim=-1) > threshold).double().mean(dim=0)
        assert found.table[column].tolist() == pytest.approx(above.tolist())


def test_what_is_asked_must_make_sense() -> None:
    model, chat = toy()
    harmful, harmless = both()
    for wrong, error in (
        ({"contrast": "words"}, ValueError),
        ({"ablate": -1}, ValueError),
        ({"folds": 1}, ValueError),
        ({"places": ["nowhere"]}, UnknownSpan),
        ({"places": ["cot"], "ablate": [(0, "gap")]}, UnknownSpan),
        ({"ablate": [(7, "cot")]}, UnknownLayer),
    ):
        with pytest.raises(error):
            probe(model, chat, harmful, harmless, **wrong)
    one_family: list[Prompt] = [replace(prompt, family="same") for prompt in harmful]
    with pytest.raises((NotEnoughData, ValueError)):
        probe(model, chat, one_family, harmless)


def test_one_opener_need_not_stand_in_a_list() -> None:
    model, chat = toy()
    options: dict[str, Any] = {"places": ["think_close"], "ablate": 1, "n_controls": 0, "limit": 6}
    one, several = (
        probe(model, chat, *both(12), openers=openers, **options) for openers in ("REFUSE", ["REFUSE"])
    )
    assert one.settings["openers"] == ["REFUSE"]
    assert one.table.equals(several.table)
