"""Heads of two models side by side: planted changes, a model against itself, and the toy after fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import rim_lens as rl
from rim_lens.errors import ConditionError, NotEnoughData, ReferenceMismatch, StudyFolderError, UnknownHead
from rim_lens.measures.heads.comparing import compare_heads, rank_correlation
from rim_lens.measures.stats import bootstrap_interval, resampled_requests, sign_flip_test
from rim_lens.organisms.planted import DECOY_HEAD, READER
from tests.chance import UNHURRIED
from tests.measures.refusal.test_direction import toy

N, FAMILIES = 24, [f"f{row // 2}" for row in range(24)]
HEADS = [(0, 1), (0, 3), (1, 0), (1, 2)]


def measured(
    seed: int, shift: dict[tuple[int, int], float], tested: Any = HEADS, **settings: Any
) -> rl.RefusalHeads:
    """A result of drawn effects: the heads stand for −1, −2, −3 and −4 nats, plus a shift."""
    rng = np.random.default_rng(seed)
    names = [f"L{layer}H{head}" for layer, head in HEADS]
    start = np.array([-1.0 - place + shift.get(head, 0.0) for place, head in enumerate(HEADS)])
    effects = {
        "harmful": start + 0.2 * rng.standard_normal((N, 4)),
        "harmless": 0.2 * rng.standard_normal((N, 4)),
    }
    data = {kind: ((f"{kind}_prompt", f"{kind}_head"), values) for kind, values in effects.items()}
    data |= {f"{kind}_baseline": (f"{kind}_prompt", rng.standard_normal(N)) for kind in effects}
    coords: dict[str, Any] = {f"{kind}_prompt": [f"{kind}{row}" for row in range(N)] for kind in effects}
    coords |= {f"{kind}_head": names for kind in effects} | {"family": ("harmful_prompt", FAMILIES)}
    table = pd.DataFrame(HEADS, columns=["layer", "head"])
    table["tested"] = [head in tested for head in HEADS]
    table["verdict"] = ["refusal" if head in tested else "not tested" for head in HEADS]
    table["moves_empty"], table["sink"] = 0.25 * seed, 0.5
    same = {
        "evaluate_digest": "d",
        "twins_digests": ["s", "t"],
        "read_in": "off",
        "editor": "AblateHeads",
        "positions": "'all'",
        "openers": None,
        "chat_format": "toy",
        "rule": {"alpha": 0.05},
        "model": {"n_layers": 2, "n_heads": 4},
        "weights_digest": str(seed),
    }
    return rl.RefusalHeads(
        table=table,
        found=(),
        set={},
        scan=pd.DataFrame(),
        effects=xr.Dataset(data, coords=coords),
        attention=xr.Dataset(),
        gate={},
        settings=same | settings,
    )


def test_changes_by_hand() -> None:
    base, tuned = measured(0, {}), measured(1, {(1, 0): 2.5})
    found = compare_heads(base, tuned)
    assert len(found.table) == 4
    top = found.table.iloc[0]
    assert (top["layer"], top["head"]) == (1, 0)  # the one that was changed
    assert top["p"] < 0.01
    assert found.table["p"][1:].min() > 0.05
    order = [HEADS.index(head) for head in found.table[["layer", "head"]].itertuples(index=False, name=None)]
    harmful = [one.effects["harmful"].values for one in (base, tuned)]
    gaps = [one.effects["harmful"].values - one.effects["harmless"].values for one in (base, tuned)]
    for name, (before, after) in (("change", harmful), ("change_specificity", gaps)):
        difference = (after - before)[:, order]
        interval = bootstrap_interval(difference, FAMILIES)
        np.testing.assert_allclose(found.table[name], difference.mean(axis=0))
        np.testing.assert_allclose(found.table[f"{name}_low"], np.asarray(interval.low))
        test = sign_flip_test(difference, families=FAMILIES, correction="max")
        np.testing.assert_allclose(found.table[name.replace("change", "p")], np.asarray(test.p))
    np.testing.assert_allclose(found.table["effect_tuned"], harmful[1].mean(axis=0)[order])
    assert found.table["moves_empty_tuned"].tolist() == [0.25] * 4
    assert found.baseline["harmful"]["change"] == pytest.approx(
        float((tuned.effects["harmful_baseline"] - base.effects["harmful_baseline"]).mean())
    )
    draws = [
        pd.Series(harmful[0][rows].mean(axis=0)).rank().corr(pd.Series(harmful[1][rows].mean(axis=0)).rank())
        for rows in resampled_requests(FAMILIES, 2000, seed=0)
    ]
    assert found.correlation["value"] == pytest.approx(0.4)  # ranks 4 3 2 1 and 3 2 4 1
    assert [found.correlation["low"], found.correlation["high"]] == pytest.approx(
        np.quantile(draws, [0.025, 0.975]).tolist()
    )


def test_a_model_against_itself() -> None:
    found = compare_heads(measured(0, {}), measured(0, {}))
    for name in ("change", "change_twins", "change_specificity"):
        assert (found.table[name] == 0).all()
        assert (found.table[name.replace("change", "p")] == 1).all()
        assert (found.table[f"{name}_low"] == 0).all()
    assert found.correlation["value"] == pytest.approx(1)
    assert found.baseline["harmless"]["change"] == 0


def test_only_heads_tested_in_both_are_compared() -> None:
    found = compare_heads(measured(0, {}, tested=HEADS[:3]), measured(1, {}, tested=HEADS[2:]))
    assert found.table[["layer", "head"]].values.tolist() == [[1, 0]]
    assert found.untested == {"base": [[0, 1], [0, 3]], "tuned": [[1, 2]]}
    assert np.isnan(found.correlation["value"])
    with pytest.raises(NotEnoughData, match="also_test="):
        compare_heads(measured(0, {}, tested=HEADS[:2]), measured(1, {}, tested=HEADS[2:]))


def test_what_cannot_be_compared_is_refused() -> None:
    base = measured(0, {})
    for name, other in (
        ("evaluate_digest", "e"),
        ("read_in", "filler"),
        ("editor", "ScaleHeads"),
        ("rule", {}),
    ):
        with pytest.raises(ReferenceMismatch, match=name):
            compare_heads(base, measured(1, {}, **{name: other}))
    compare_heads(base, measured(1, {}, twins_digests=["another", "t"]))  # other twins chose, the same tested
    with pytest.raises(ReferenceMismatch, match="twins of the evaluate side"):
        compare_heads(base, measured(1, {}, twins_digests=["s", "u"]))
    with pytest.raises(ReferenceMismatch, match="n_heads=4"):
        compare_heads(base, measured(1, {}, model={"n_layers": 2, "n_heads": 8}))
    swapped = base.effects.isel(harmless_prompt=slice(None, None, -1))
    with pytest.raises(ReferenceMismatch, match="harmless"):
        compare_heads(base, replace(base, effects=swapped))
    alone = base.effects.assign_coords(family=("harmful_prompt", ["f"] * N))
    with pytest.raises(NotEnoughData, match="one family"):
        compare_heads(replace(base, effects=alone), base)


@UNHURRIED
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=9))
def test_rank_correlation_is_that_of_ranks(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array(side, dtype=np.float64) for side in zip(*pairs, strict=True))
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert np.isnan(rank_correlation(first, second))
        return
    expected = pd.Series(first).rank().corr(pd.Series(second).rank())
    assert rank_correlation(first, second) == pytest.approx(expected)


@cache
def found_in(name: str, also: tuple[tuple[int, int], ...] = ()) -> rl.RefusalHeads:
    every = [rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless")]
    search = rl.HeadSearch(limit=50, n_test=2, n_random_sets=3, max_heads=1)
    return rl.refusal_heads(*toy(name), *every, conditions=["off"], search=search, also_test=also, gate=False)


def heads_tested(found: rl.RefusalHeads) -> tuple[tuple[int, int], ...]:
    rows = found.table[found.table["tested"]]
    return tuple((int(layer), int(head)) for layer, head in rows[["layer", "head"]].values)


def test_heads_asked_for_are_tested_with_the_others() -> None:
    also = (DECOY_HEAD, (0, 0))
    found = found_in("planted", also)
    assert set(also) <= set(heads_tested(found))
    assert set(heads_tested(found)) - set(also) == set(heads_tested(found_in("planted"))) - set(also)
    assert found.settings["also_test"] == [[0, 0], list(DECOY_HEAD)]
    rows = found.table.set_index(["layer", "head"])
    assert rows.loc[DECOY_HEAD, "verdict"] == "none"
    assert rows.loc[READER, "verdict"] == "refusal"
    with pytest.raises(UnknownHead):
        found_in("planted", ((5, 0),))


@pytest.mark.parametrize("name", ["toy:careful", "toy:deviate"])
def test_the_toy_after_fine_tuning(name: str) -> None:
    """Its topic head carries refusal before, and has less to carry where fine-tuning wore refusal down."""
    base = found_in("toy")
    tuned = found_in(name, heads_tested(base))
    found = compare_heads(base, tuned)
    assert set(heads_tested(base)) == set(found.table[["layer", "head"]].itertuples(index=False, name=None))
    assert found.untested["base"] == []
    topic = found.table[(found.table["layer"] == 0) & (found.table["head"] == 5)].iloc[0]
    assert topic["verdict_base"] == "refusal"
    assert topic["effect_base"] < -4
    for model, its in (("base", base), ("tuned", tuned)):
        row = its.table[(its.table["layer"] == 0) & (its.table["head"] == 5)].iloc[0]
        assert topic[f"effect_{model}"] == pytest.approx(row["effect"])
        assert topic[f"specificity_{model}"] == pytest.approx(row["specificity"])
    assert found.baseline["harmful"]["high"] < -1  # both refuse less than before
    assert found.settings["weights_digest"]["base"] != found.settings["weights_digest"]["tuned"]
    assert "rank correlation" in repr(found)


@pytest.mark.parametrize(
    "heads", [HEADS, HEADS[:2]], ids=["four heads", "two heads, so that no correlation is defined"]
)
def test_a_comparison_is_read_back_as_it_was(heads: Any, tmp_path: Path) -> None:
    base, tuned = measured(0, {}, tested=heads), measured(1, {(1, 0): 2.5})
    base.table.loc[0, "moves_empty"] = np.nan
    found = compare_heads(base, tuned)
    assert np.isnan(found.correlation["value"]) == (len(heads) < 3)
    assert found.table["moves_empty_base"].isna().sum() == 1
    found.save(tmp_path / "new")
    again = rl.HeadComparison.load(tmp_path / "new")
    pd.testing.assert_frame_equal(again.table, found.table)
    assert (again.baseline, again.untested, again.settings) == (
        found.baseline,
        found.untested,
        found.settings,
    )
    np.testing.assert_equal(again.correlation, found.correlation)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["compared_heads.json"]
    assert "Comparison" in again._repr_html_()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "HeadComparison.save"),
        ("{", "HeadComparison.save"),
        ("[]", "HeadComparison.save"),
        ('{"format_version": 99}', "format version 99"),
        ('{"format_version": 1, "table": {"columns": {}, "rows": []}}', "no column layer"),
        ('{"format_version": 1, "table": []}', "HeadComparison.save"),
    ],
)
def test_other_files_are_no_comparison(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "compared_heads.json").write_text(content)
    with pytest.raises(StudyFolderError, match=said):
        rl.HeadComparison.load(tmp_path)


def test_effects_of_both_models_have_intervals_of_their_own() -> None:
    base, tuned = measured(0, {}), measured(1, {(1, 0): 2.5})
    table = compare_heads(base, tuned, seed=3).table.set_index(["layer", "head"])
    for name, one in (("base", base), ("tuned", tuned)):
        for place, head in enumerate(HEADS):
            values = one.effects["harmful"].values[:, place]
            alone = bootstrap_interval(values, FAMILIES, seed=3)
            assert table.loc[head, f"effect_{name}_low"] == pytest.approx(float(alone.low))
            assert table.loc[head, f"effect_{name}_high"] == pytest.approx(float(alone.high))


def test_what_is_no_table_of_heads_is_told() -> None:
    name: Any = "base"
    with pytest.raises(ConditionError, match=r"was given a str.*rl\.refusal_heads"):
        compare_heads(name, measured(0, {}))
