"""The table of tested heads on planted effects, and on random numbers where there is none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from rim_lens.errors import NotEnoughData, StatisticsError, UnknownHead
from rim_lens.measures.heads.table import COLUMNS, VERDICTS, HeadRule, corrected_p, head_table
from rim_lens.measures.stats import sign_flip_test
from tests.chance import assert_level_held

Head = tuple[int, int]
HEADS: list[Head] = [(layer, head) for layer in range(3) for head in range(4)]
N = 24

FAMILIES = [f"f{row // 2}" for row in range(N)]


def effects(**at: float) -> dict[Head, np.ndarray]:
    """Effects around zero, but for heads such as L1H2=-3.0."""
    rng = np.random.default_rng(0)
    planted = {(int(name[1]), int(name[3])): value for name, value in at.items()}
    return {head: planted.get(head, 0.0) + 0.3 * rng.standard_normal(N) for head in HEADS}


def row_of(table, head: Head):
    return table[(table["layer"] == head[0]) & (table["head"] == head[1])].iloc[0]


def test_verdicts() -> None:
    harmful = effects(L1H0=-3.0, L1H1=-3.0, L2H0=2.0)
    twins = {head: values * 0 + 0.1 for head, values in harmful.items()}
    twins[1, 1] = harmful[1, 1] + 0.3 * np.random.default_rng(1).standard_normal(N)
    found = [(1, 0), (1, 1), (2, 0), (2, 1)]
    table = head_table(harmful, twins, found, FAMILIES)
    assert tuple(table.columns) == COLUMNS
    assert len(table) == len(HEADS)
    assert row_of(table, (1, 0))["verdict"] == "refusal"
    assert row_of(table, (1, 1))["verdict"] == "general"  # the twins move as much
    assert row_of(table, (2, 0))["verdict"] == "refusal"  # raises refusal, and of harmful requests alone
    assert row_of(table, (2, 1))["verdict"] == "none"
    for head in HEADS:
        here = row_of(table, head)
        assert here["tested"] == (head in found)
        assert np.isnan(here["p"]) == (head not in found)
        assert (here["verdict"] == "not tested") == (head not in found)
        assert here["effect"] == pytest.approx(harmful[head].mean())
        assert here["effect_twins"] == pytest.approx(twins[head].mean())
        assert here["specificity"] == pytest.approx((harmful[head] - twins[head]).mean())
        assert here["effect_low"] <= here["effect"] <= here["effect_high"]
        assert here["specificity_low"] <= here["specificity"] <= here["specificity_high"]


def test_the_yardstick_is_the_other_heads_of_the_layer() -> None:
    harmful = effects(L1H0=-3.0, L1H1=-3.0)
    twins = {head: np.zeros(N) for head in HEADS}
    table = head_table(harmful, twins, [(1, 0), (1, 1)], FAMILIES)
    for head in ((1, 0), (1, 1)):
        assert row_of(table, head)["percentile"] >= 66  # the other one may be as large
        assert row_of(table, head)["n_controls"] == 3  # all others, or the yardstick were those found small
    assert row_of(table, (2, 0))["n_controls"] == 3
    assert np.isnan(row_of(table, (2, 0))["percentile"])
    whole = head_table(harmful, twins, [(1, head) for head in range(4)], FAMILIES)
    assert row_of(whole, (1, 0))["percentile"] == row_of(table, (1, 0))["percentile"]
    assert row_of(whole, (1, 2))["percentile"] < 50


def test_tested_heads_come_first_by_effect() -> None:
    table = head_table(
        effects(L0H0=-1.0, L1H0=-3.0), {head: np.zeros(N) for head in HEADS}, [(0, 0), (1, 0)], FAMILIES
    )
    assert table["tested"].tolist() == [True, True] + [False] * 10
    assert table.loc[0, ["layer", "head"]].tolist() == [1, 0]
    assert table["effect"][2:].is_monotonic_increasing


def test_nothing_chosen_tests_nothing() -> None:
    table = head_table(effects(L0H0=-1.0), effects(), [], FAMILIES)
    assert table["p"].isna().all()
    assert set(table["verdict"]) == {"not tested"}
    assert head_table({}, {}, [], FAMILIES).empty


def test_the_same_seed_gives_the_same_table() -> None:
    arguments = (effects(L0H0=-1.0), effects(), [(0, 0)], FAMILIES)
    assert head_table(*arguments, seed=3).equals(head_table(*arguments, seed=3))


def test_families_not_requests_are_the_units() -> None:
    """Forty equal requests of three families say what three requests say: no p below 1/4."""
    harmful = {(0, 0): np.full(42, -3.0) + np.repeat([0.0, 0.1, 0.2], 14)}
    table = head_table(harmful, {(0, 0): np.zeros(42)}, [(0, 0)], [f"f{row // 14}" for row in range(42)])
    assert table["p"][0] == pytest.approx(0.25)
    assert table["verdict"][0] == "none"


def test_one_family_is_refused_and_unlabelled_requests_are_families_of_their_own() -> None:
    harmful = {(0, 0): np.full(8, -3.0) + np.linspace(0, 1, 8)}
    twins = {(0, 0): np.zeros(8)}
    with pytest.raises(NotEnoughData, match="1 request family"):
        head_table(harmful, twins, [(0, 0)], ["same"] * 8)
    table = head_table(harmful, twins, [(0, 0)], [""] * 8)
    assert table["p"][0] == pytest.approx(2 / 2**8)
    assert table["verdict"][0] == "refusal"


def test_a_tested_head_without_effects_is_named() -> None:
    with pytest.raises(UnknownHead, match=r"\(2, 3\)"):
        head_table({(0, 0): np.zeros(8)}, {(0, 0): np.zeros(8)}, [(2, 3)], [str(row) for row in range(8)])


def test_no_effect_at_all_is_none() -> None:
    zeros = {(0, 0): np.zeros(N), (0, 1): np.zeros(N)}
    table = head_table(zeros, zeros, [(0, 0)], FAMILIES)
    assert table["p"][0] == 1
    assert table["verdict"][0] == "none"


def test_the_more_heads_are_tested_the_more_it_takes() -> None:
    harmful = effects(L0H0=-0.15)
    twins = {head: np.zeros(N) for head in HEADS}
    p = [row_of(head_table(harmful, twins, HEADS[:n], FAMILIES), (0, 0))["p"] for n in (1, 4, 12)]
    assert p[0] < p[1] < p[2]


def test_where_there_is_nothing_a_head_is_called_something_no_more_often_than_one_time_in_twenty() -> None:
    """Heads fixed beforehand, effects random: heavy tails, requests of a family alike, heads alike."""
    runs, n_families = 500, 9
    families = [f"f{row // 2}" for row in range(2 * n_families)]
    rng = np.random.default_rng(2)
    some, refusal = 0, 0
    for run in range(runs):
        common = rng.laplace(size=n_families)
        harmful, twins = (
            {
                (0, head): np.repeat(common + rng.laplace(size=n_families), 2)
                + rng.normal(size=2 * n_families)
                for head in range(2)
            }
            for _ in range(2)
        )
        table = head_table(harmful, twins, [(0, 0), (0, 1)], families, seed=run)
        tested = table[table["tested"]]
        some += bool((tested["p"] <= 0.05).any())
        refusal += bool((tested["verdict"] == "refusal").any())
    error = 3 * (0.05 * 0.95 / runs) ** 0.5
    assert some / runs <= 0.05 + error
    assert some / runs >= 0.05 - error  # nor so careful that nothing could ever be found
    assert refusal <= some


def test_a_planted_effect_is_seen() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for run in range(40):
        harmful = {(0, head): (-1.5 * (head == 0)) + rng.normal(size=N) for head in range(4)}
        twins = {(0, head): rng.normal(size=N) for head in range(4)}
        table = head_table(harmful, twins, [(0, 0)], FAMILIES, seed=run)
        hits += row_of(table, (0, 0))["verdict"] == "refusal"
    assert hits >= 36


def test_torch_and_thread_state_are_left_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    head_table(effects(L0H0=-1.0), effects(), [(0, 0)], FAMILIES)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_where_heads_look_names_those_without_an_effect() -> None:
    harmful, twins = effects(L1H0=-3.0), {head: np.zeros(N) for head in HEADS}
    looks = pd.DataFrame(
        [
            {"layer": layer, "head": head, "sink": 0.9 * (head == 1), "moving": float(head < 3)}
            for layer, head in HEADS
        ]
    )
    table = head_table(harmful, twins, [(1, 0), (1, 1), (1, 2), (1, 3)], FAMILIES, statistics=looks)
    found = [row_of(table, (1, head))["verdict"] for head in range(4)]
    assert found == ["refusal", "sink", "positional", "none"]
    assert row_of(table, (0, 1))["verdict"] == "not tested"
    ranks = table["verdict"].map(VERDICTS.index)
    assert ranks.is_monotonic_increasing


def test_an_effect_on_twins_alone_is_general_and_most_of_one_on_both_as_well() -> None:
    harmful, twins = effects(L0H0=0.0, L0H1=-3.0, L0H2=-3.0), effects(L0H0=8.0, L0H1=-2.7, L0H2=-1.5)
    table = head_table(harmful, twins, HEADS[:4], FAMILIES)
    assert [row_of(table, (0, head))["verdict"] for head in range(4)] == [
        "general",
        "general",
        "refusal",
        "none",
    ]
    assert row_of(table, (0, 1))["p_specific"] <= 0.05  # significant, but a tenth of the effect
    loose = head_table(harmful, twins, HEADS[:4], FAMILIES, rule=HeadRule(min_specific=0.0))
    assert row_of(loose, (0, 1))["verdict"] == "refusal"


def test_a_real_but_tiny_effect_is_none() -> None:
    harmful = {(0, 0): np.full(N, -0.2) + np.linspace(0, 0.01, N)}
    table = head_table(harmful, {(0, 0): np.zeros(N)}, [(0, 0)], FAMILIES)
    assert table["p"][0] <= 0.05
    assert table["verdict"][0] == "none"


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"moves": 1.5}, {"min_effect": float("nan")}])
def test_a_rule_that_nothing_or_everything_would_pass_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(StatisticsError, match=next(iter(wrong))):
        HeadRule(**wrong)


def test_heads_too_small_for_a_verdict_set_no_bar() -> None:
    rng = np.random.default_rng(3)
    families = list("abcdef")
    strong = {(0, 0): -4 + rng.standard_normal(6)}
    # As steady as can be under some flip of signs, and far too small to be called anything.
    small = {(1, place): 0.01 * signs for place, signs in enumerate(1.0 - 2 * np.eye(6))}
    effects = strong | small
    held = sign_flip_test(np.stack(list(effects.values()), axis=1), families=families, correction="max")
    alone = sign_flip_test(strong[0, 0], families=families)
    p = corrected_p(effects, list(effects), families, least=0.25)
    assert p[0, 0] == alone.p < held.p[0]
    assert [p[head] for head in small] == held.p[1:].tolist()
    assert list(corrected_p(effects, list(effects), families).values()) == held.p.tolist()


def test_leaving_small_heads_out_keeps_the_level() -> None:
    """A head near the threshold is left out or not by its sizes alone, so that the chance of any finding stays."""
    rng = np.random.default_rng(0)
    smallest = []
    for _ in range(2000):
        spread = rng.uniform(0.1, 0.6, size=8)
        values = rng.standard_normal((6, 8)) * spread
        effects = {(0, head): values[:, head] for head in range(8)}
        p = corrected_p(effects, list(effects), list("abcdef"), least=0.3)
        large = [p[head] for head in effects if np.sqrt(np.mean(effects[head] ** 2)) >= 0.3]
        smallest.append(min(large, default=1.0))
    assert_level_held(smallest)
