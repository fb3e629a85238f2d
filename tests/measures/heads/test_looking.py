"""Where heads look: counted by hand from the full pattern, on random models of both families and on the planted one."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import rim_lens as rl
from rim_lens.chat.spans import ATOMS, COMPOSITES, SpanBatch
from rim_lens.errors import CaptureError, EmptySpan, StatisticsError, UnknownSpan
from rim_lens.prompts.records import Prompt
from tests.families import FAMILIES
from tests.speaking import REQUESTS, Spoken, speaker
from tests.true_tokenizers import load_tokenizer

COTS = ["3 4 > 0 6 > 6", "so 1 2 > 3", "please > kindly now > so > then", "well just", "6 5 > 4 > 3 > so > 1"]
KINDS = ("harmful", "harmless", "harmful", "harmless", "harmful")
MIXED = tuple(replace(prompt, kind=kind) for prompt, kind in zip(REQUESTS, KINDS, strict=True))


def batches(spoken: Spoken) -> dict[str, SpanBatch]:
    return {
        "open": spoken.chat.render(MIXED, think="open"),
        "off": spoken.chat.render(MIXED, think="off"),
        "cot": spoken.chat.render(MIXED, think=COTS),
    }


@functools.cache
def captured(architecture: str, family: str) -> dict[str, xr.Dataset]:
    spoken = speaker(architecture, family)
    return {
        name: rl.capture(spoken.model, batch, rl.SpanAttention(), max_rows=2)
        for name, batch in batches(spoken).items()
    }


def rows_of(spoken: Spoken, batch: SpanBatch) -> list[list[torch.Tensor]]:
    """Last rows [layer][head, key] of each prompt by itself, from TransformerLens's own cache."""
    found = []
    for row in range(len(batch)):
        alone = batch.select([row])
        with torch.no_grad():
            _, cache = spoken.model.run_with_cache(alone.tokens, attention_mask=alone.attention_mask)
        layers = range(spoken.model.cfg.n_layers)
        found.append([cache[f"blocks.{layer}.attn.hook_pattern"][0, :, -1] for layer in layers])
    return found


def atoms_of(name: str) -> tuple[str, ...]:
    return COMPOSITES.get(name, (name,))


# --- against the full pattern ------------------------------------------------------------------------


@pytest.mark.family_contract
@pytest.mark.parametrize(("leaves", "enters"), [("assistant", "think"), ("request", "think_close"), ("sink", "request")])  # fmt: skip
def test_argmax_shift_counted_by_hand(spoken: Spoken, leaves: str, enters: str) -> None:
    data, both = captured(spoken.architecture, spoken.family), batches(spoken)
    found = rl.argmax_shift(data["open"], data["off"], leaves=leaves, enters=enters)
    tops = [rows_of(spoken, both[name]) for name in ("open", "off")]
    for prompt in range(len(MIXED)):
        atoms = [both[name].atoms_of(prompt) for name in ("open", "off")]
        for layer in range(found.sizes["layer"]):
            for head in range(found.sizes["head"]):
                before, after = (
                    atoms[side][int(tops[side][prompt][layer][head].argmax())] for side in (0, 1)
                )
                expected = before in atoms_of(leaves) and after in atoms_of(enters)
                assert bool(found[prompt, layer, head]) == expected
    assert found.attrs == {"first": "open", "second": "off", "leaves": leaves, "enters": enters}


@pytest.mark.family_contract
def test_mass_shift_summed_by_hand(spoken: Spoken) -> None:
    data, both = captured(spoken.architecture, spoken.family), batches(spoken)
    rows = {name: rows_of(spoken, both[name]) for name in both}

    def mass(name: str, span: str) -> np.ndarray:
        return np.array(
            [
                [layer[:, both[name].select([prompt]).spans[span][0]].sum(dim=-1).tolist() for layer in rows[name][prompt]]
                for prompt in range(len(MIXED))
            ]
        )  # fmt: skip

    shift = rl.mass_shift(data["off"], data["cot"], "think")
    np.testing.assert_allclose(shift, mass("off", "think") - mass("cot", "think"), atol=1e-5)
    across = rl.mass_shift(data["open"], data["cot"], "assistant", "cot")
    np.testing.assert_allclose(across, mass("open", "assistant") - mass("cot", "cot"), atol=1e-5)
    assert (across.attrs["first"], across.attrs["second"]) == ("open", "cot")
    # A shift has a sign, and both conditions are in it.
    back = rl.mass_shift(data["cot"], data["off"], "think")
    np.testing.assert_array_equal(shift, -back)


def test_statistics_do_not_mind_batches_and_padding(spoken_gqa: Spoken) -> None:
    spoken = spoken_gqa
    data = captured(spoken.architecture, spoken.family)
    alone = {
        name: rl.capture(spoken.model, batch, rl.SpanAttention(), max_rows=1)
        for name, batch in batches(spoken).items()
    }
    for one, other in ((data, alone), (alone, data)):
        found = rl.argmax_shift(one["open"], other["off"], enters="think")
        assert found.equals(rl.argmax_shift(data["open"], data["off"], enters="think"))
    assert abs(rl.mass_shift(data["open"], alone["open"], "request")).max() < 1e-5
    share = rl.entropy_share(alone["cot"])
    xr.testing.assert_allclose(share, rl.entropy_share(data["cot"]), atol=1e-4)


def test_prompts_are_paired_by_id_and_not_by_place(spoken_gqa: Spoken) -> None:
    data = captured("qwen3", spoken_gqa.family)
    turned = data["off"].isel(prompt=[3, 1, 4, 0, 2])
    for change in (
        lambda off: rl.argmax_shift(data["open"], off, enters="think"),
        lambda off: rl.mass_shift(data["open"], off, "request"),
    ):
        xr.testing.assert_equal(
            change(turned).drop_vars("n_tokens", errors="ignore"),
            change(data["off"]).drop_vars("n_tokens", errors="ignore"),
        )


def test_entropy_share_by_hand(spoken_gqa: Spoken) -> None:
    batch = batches(spoken_gqa)["off"]
    found = rl.entropy_share(captured("qwen3", spoken_gqa.family)["off"])
    for prompt, layers in enumerate(rows_of(spoken_gqa, batch)):
        for layer, heads in enumerate(layers):
            for head, entries in enumerate(heads.double()):
                nats = -sum(p * math.log(p) for p in entries.tolist() if p)
                expected = nats / math.log(len(entries))
                assert float(found[prompt, layer, head]) == pytest.approx(expected, abs=1e-4)
                assert 0 <= expected <= 1


# --- laws --------------------------------------------------------------------------------------------


def dataset(masses: np.ndarray, ids: list[str]) -> xr.Dataset:
    """One-row data of one layer with these masses on all atoms; the argmax is the atom with most."""
    attrs = {"flag_meanings": " ".join(ATOMS), "spans_present": " ".join((*ATOMS, *COMPOSITES))}
    dims = ("prompt", "layer", "head")
    entropy = -(masses * np.log(masses)).sum(axis=-1)
    return xr.Dataset(
        {
            "attention_mass": ((*dims, "span"), masses, {"units": "share"}),
            "attention_argmax": (dims, masses.argmax(axis=-1).astype("int8"), attrs),
            "attention_entropy": (dims, entropy),
            "visible_keys": (("prompt", "layer"), np.full(masses.shape[:2], len(ATOMS), dtype="int32")),
        },
        coords={
            "prompt": ids,
            "span": list(ATOMS),
            "layer": range(masses.shape[1]),
            "head": range(masses.shape[2]),
            "kind": ("prompt", ["harmful"] * len(ids)),
        },
    )


# Shrinking a seed makes nothing simpler, and takes minutes.
@settings(max_examples=6, deadline=None, phases=(Phase.generate,))
@given(seed=st.integers(0, 10**6), n=st.integers(1, 5))
def test_what_one_span_loses_others_win(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    ids = [f"p{place}" for place in range(n)]
    first, second = (dataset(rng.dirichlet(np.full(len(ATOMS), 0.3), (n, 2, 3)) + 1e-12, ids) for _ in "ab")
    total = sum(rl.mass_shift(first, second, atom) for atom in ATOMS)
    np.testing.assert_allclose(total, 0, atol=1e-9)
    # Wherever a head leaves, it enters exactly one atom.
    moves = sum(rl.argmax_shift(first, second, leaves="request", enters=atom).astype(int) for atom in ATOMS)
    assert (moves == rl.argmax_in(first, "request")).all()
    think = sum(rl.argmax_in(first, atom).astype(int) for atom in COMPOSITES["think"])
    assert (rl.argmax_in(first, "think").astype(int) == think).all()
    assert (rl.entropy_share(first) <= 1 + 1e-9).all()
    statistics = rl.head_statistics(first, second)
    moved = rl.argmax_shift(first, second).mean("prompt")
    np.testing.assert_allclose(statistics["argmax_shift"].sel(kind="harmful"), moved)


# --- the table ---------------------------------------------------------------------------------------


def test_head_statistics_are_means_over_the_prompts_of_a_kind(spoken_gqa: Spoken) -> None:
    data = captured("qwen3", spoken_gqa.family)
    first, second = data["open"], data["off"]
    table = rl.head_statistics(first, second, leaves="request", enters="think_close")
    assert table.attrs == {"first": "open", "second": "off", "leaves": "request", "enters": "think_close"}
    assert table["n_prompts"].to_series().to_dict() == {"harmful": 3, "harmless": 2}
    shift = rl.argmax_shift(first, second, leaves="request", enters="think_close").values
    for kind in ("harmful", "harmless"):
        rows = [place for place, own in enumerate(KINDS) if own == kind]
        one = table.sel(kind=kind)
        assert one["argmax_shift"].dims == ("layer", "head")
        np.testing.assert_allclose(one["argmax_shift"], shift[rows].mean(axis=0))
        mass = {name: d["attention_mass"].sel(span="request").values[rows] for name, d in data.items()}
        np.testing.assert_allclose(one["mass_shift"], (mass["open"] - mass["off"]).mean(axis=0), atol=1e-6)
        for place, own in (("first", first), ("second", second)):
            at = one.sel(condition=place)
            sink = own["attention_mass"].sel(span="sink").values[rows]
            np.testing.assert_allclose(at["sink_mass"], sink.mean(axis=0), atol=1e-6)
            on_sink = own["attention_argmax"].values[rows] == ATOMS.index("sink")
            np.testing.assert_allclose(at["sink_argmax"], on_sink.mean(axis=0))
            entropy = own["attention_entropy"].values[rows].mean(axis=0)
            np.testing.assert_allclose(at["entropy"], entropy, atol=1e-5)
            np.testing.assert_allclose(
                at["leaves_mass"], mass["open" if place == "first" else "off"].mean(axis=0), atol=1e-6
            )
        # The closing tag is not there while the block is open: no number, and not 0.
        assert one["enters_mass"].sel(condition="first").isnull().all()
        assert (one["enters_mass"].sel(condition="second") > 0).all()


def test_kinds_captured_apart_give_the_same_table(spoken_gqa: Spoken) -> None:
    data = captured("qwen3", spoken_gqa.family)
    together = rl.head_statistics(data["open"], data["off"], enters="think")
    apart = []
    for kind in ("harmful", "harmless"):
        rows = [place for place, own in enumerate(KINDS) if own == kind]
        parts = [
            rl.capture(spoken_gqa.model, batches(spoken_gqa)[name].select(rows), rl.SpanAttention())
            for name in ("open", "off")
        ]
        apart.append(rl.head_statistics(*parts, enters="think"))
    joined = xr.concat(apart, "kind")
    xr.testing.assert_allclose(joined.transpose("condition", "kind", "layer", "head"), together, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_planted_reader_and_its_decoy_look_alike(seed: int) -> None:
    """Attention cannot tell them apart, which is why no statistic here is a verdict."""
    model = rl.load_model(f"planted:{seed}")
    chat = rl.ChatFormat.from_model(model)
    requests = [
        prompt
        for kind in ("harmful", "harmless")
        for prompt in rl.load_prompts(kind, language="toy", split="select")[::4]
    ]
    off, cot = (
        rl.capture(model, chat.render(requests, think=how), rl.SpanAttention())
        for how in ("off", "3 4 > 0 6 > 6")
    )
    table = rl.head_statistics(off, cot, leaves="think", enters="cot")
    for kind in ("harmful", "harmless"):
        reader, decoy = (table.sel(kind=kind, layer=1, head=head) for head in (1, 2))
        for found in (reader, decoy):
            assert float(found["argmax_shift"]) == 1.0
            assert float(found["enters_mass"].sel(condition="second")) > 0.9
            assert float(found["sink_mass"].max()) < 0.05
        xr.testing.assert_allclose(reader.drop_vars("head"), decoy.drop_vars("head"), atol=0.08)
    moved = table["argmax_shift"].sel(kind="harmful")
    assert sorted(map(tuple, np.argwhere(moved.values == 1).tolist())) == [(1, 1), (1, 2)]


# --- spans and rows ----------------------------------------------------------------------------------


def test_the_empty_block_is_the_gap_where_there_is_one() -> None:
    for name, expected in (("toy", "think"), ("qwen3", "gap")):
        if name == "toy":
            chat: Any = rl.ChatFormat.from_model(rl.load_model("toy"))
        else:
            chat = rl.ChatFormat.from_tokenizer(load_tokenizer(name))
        off = chat.render([Prompt(id="a", text="make bread please + 3 4 6")], think="off")
        assert rl.empty_block_span(off) == expected
    with pytest.raises(EmptySpan, match="think"):
        rl.empty_block_span(chat.render(["Name a fruit."], think="open"))


def test_attention_to_a_given_chain_is_one_call(spoken_gqa: Spoken) -> None:
    batch = batches(spoken_gqa)["cot"]
    mass = rl.capture(spoken_gqa.model, batch, rl.SpanAttention(["cot"]))["attention_mass"].sel(span="cot")
    for prompt, layers in enumerate(rows_of(spoken_gqa, batch)):
        inside = [atom == "cot" for atom in batch.atoms_of(prompt)]
        for layer, heads in enumerate(layers):
            expected = heads[:, torch.tensor(inside)].sum(dim=-1)
            np.testing.assert_allclose(mass[prompt, layer], expected, atol=1e-5)
    rows = rl.answer_row(batch)
    assert rows.sum(dim=1).tolist() == [1] * len(batch)
    assert rows[:, -1].all()


@pytest.mark.family_contract
def test_attention_to_a_chain_of_the_models_own(spoken: Spoken) -> None:
    """The row that produced the answer is the last of the same text cut off before it."""
    written = spoken.chat.render(MIXED, think=COTS, answers=["6", "so 3", "1 2 3 4", "now", "please"])
    batch = replace(
        written, think="open", n_generated=(3, 4, 6, 3, 3), finished_thinking=(True,) * len(written)
    )
    rows = rl.answer_row(batch)
    data = rl.capture(spoken.model, batch, rl.SpanAttention(["cot"], query=rows), max_rows=2)
    given = captured(spoken.architecture, spoken.family)["cot"]
    np.testing.assert_allclose(
        data["attention_mass"].sel(span="cot"), given["attention_mass"].sel(span="cot"), atol=1e-5
    )
    for name in ("attention_argmax", "attention_argmax_pos", "visible_keys"):
        np.testing.assert_array_equal(data[name], given[name])
    assert abs(rl.mass_shift(data, given, "cot")).max() < 1e-5  # and the two can be held side by side


def test_a_row_without_an_answer_is_named(spoken_gqa: Spoken) -> None:
    written = batches(spoken_gqa)["cot"]
    with pytest.raises(EmptySpan, match=r"no row of 1 of 5 .*'p2'"):
        rl.answer_row(replace(written, finished_thinking=(True, True, False, True, True)))
    with pytest.raises(EmptySpan, match=r"no row of 1 of 5 .*'p1'"):
        rl.answer_row(replace(written, n_generated=(0, 3, 0, 0, 0)))
    with pytest.raises(EmptySpan, match="still open"):
        rl.answer_row(batches(spoken_gqa)["open"])


# --- what is refused ---------------------------------------------------------------------------------


@pytest.fixture
def open_and_off() -> tuple[xr.Dataset, xr.Dataset]:
    data = captured("qwen3", FAMILIES[0])
    return data["open"], data["off"]


def test_a_span_that_is_not_there_is_refused_with_advice(open_and_off: tuple[xr.Dataset, xr.Dataset]) -> None:
    with pytest.raises(EmptySpan, match=r"'gap'.*'off'.*Ask for 'think' instead"):
        rl.argmax_shift(*open_and_off)
    with pytest.raises(EmptySpan, match=r"'cot'.*'open'"):
        rl.mass_shift(*open_and_off, "cot")
    with pytest.raises(EmptySpan, match="'gap'"):
        rl.head_statistics(*open_and_off)
    with pytest.raises(UnknownSpan, match="reasoning"):
        rl.argmax_shift(*open_and_off, enters="reasoning")


def test_prompts_that_do_not_match_are_refused(open_and_off: tuple[xr.Dataset, xr.Dataset]) -> None:
    first, second = open_and_off
    fewer = second.isel(prompt=[0, 1, 2])
    other = second.assign_coords(prompt=["p0", "p1", "p2", "p3", "other"])
    twice = second.isel(prompt=[0, 1, 2, 3, 3])
    nameless = second.drop_vars("prompt")
    for wrong, message in (
        (fewer, "5 and 3"),
        (other, "'other'"),
        (twice, "each once"),
        (nameless, "no prompt ids"),
    ):
        for statistic in (
            lambda data: rl.argmax_shift(first, data, enters="think"),
            lambda data: rl.mass_shift(first, data, "request"),
            lambda data: rl.head_statistics(first, data, enters="think"),
        ):
            with pytest.raises(StatisticsError, match=message):
                statistic(wrong)  # fmt: skip
    with pytest.raises(StatisticsError, match="layers and heads"):
        rl.argmax_shift(first, second.isel(layer=[0]), enters="think")


def test_rows_pooled_over_a_span_are_refused(spoken_gqa: Spoken) -> None:
    batch = batches(spoken_gqa)["off"]
    pooled = rl.capture(spoken_gqa.model, batch, rl.SpanAttention(query="request"))
    with pytest.raises(StatisticsError, match="one row per prompt"):
        rl.mass_shift(pooled, pooled, "request")
    with pytest.raises(StatisticsError, match="one row per prompt"):
        rl.entropy_share(pooled)


def test_masses_that_cannot_be_subtracted_are_refused(spoken_gqa: Spoken) -> None:
    data = captured("qwen3", spoken_gqa.family)
    some = rl.capture(spoken_gqa.model, batches(spoken_gqa)["off"], rl.SpanAttention(["request"]))
    with pytest.raises(CaptureError, match="'think' was not read, only request"):
        rl.mass_shift(some, some, "think")
    reader = rl.SpanAttention(["request"], normalise="uniform")
    relative = rl.capture(spoken_gqa.model, batches(spoken_gqa)["off"], reader)
    with pytest.raises(StatisticsError, match="normalise="):
        rl.mass_shift(data["open"], relative, "request")


def test_a_shift_between_two_models_says_so() -> None:
    one, other = (rl.load_model(name) for name in ("toy", "toy:careful"))
    chat = rl.ChatFormat.from_model(one)
    requests = rl.load_prompts("harmful", language="toy", split="evaluate")[:2]
    off, careful = (rl.render_conditions(chat, requests, [name])[name] for name in ("off", "careful"))
    before, thinking, after = (
        rl.capture(model, batch, rl.SpanAttention(["request"]))
        for model, batch in ((one, off), (one, careful), (other, off))
    )
    assert (
        set(rl.mass_shift(before, thinking, "request").attrs) & {"first_weights", "second_weights"} == set()
    )
    told = rl.mass_shift(before, after, "request").attrs
    assert (told["first_weights"], told["second_weights"]) == (
        before.attrs["weights_digest"],
        after.attrs["weights_digest"],
    )
