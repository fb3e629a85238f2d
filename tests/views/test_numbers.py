from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from rim_lens.study import StudyResult
from rim_lens.views import numbers
from tests.views.planted import CONTENT

Make = Callable[..., StudyResult]


def test_shares_count_what_was_planted(planted: Make) -> None:
    shares = numbers.outcome_shares(planted()).set_index(["model", "kind", "condition"])
    for condition, refused in CONTENT.items():
        row = shares.loc[("base", "harmful", condition)]
        assert (row["refuse"], row["comply"], row["n"]) == (refused, 24 - refused, 24)
        assert row["low"] <= row["share"] <= row["high"]
        assert row["n_families"] == 12
    assert shares.loc[("without_heads", "harmful", "off"), "other"] == 24
    # Wilson's interval at 24 of 24: z² / (n + z²) below 1.
    z2 = 1.959964**2
    assert shares.loc[("base", "harmful", "off"), "low"] == pytest.approx(24 / (24 + z2))


def test_a_contrast_is_the_paired_mean_and_p_counts_every_sign(planted: Make) -> None:
    result = planted(
        n=12, n_families=6, refused={"off": 9, "careful": 2, "filler": 9, "unrelated": 4, "open": 5}
    )
    table = numbers.contrasts(result, "score", "harmful")
    scores = result.scores[result.scores["kind"] == "harmful"]
    wide = scores.pivot(index="prompt", columns="condition", values="score")
    family = scores.drop_duplicates("prompt").set_index("prompt")["family"].loc[wide.index]
    pairs = list(zip(table["a"], table["b"], strict=True))
    sums = np.stack([(wide[a] - wide[b]).groupby(family).sum().to_numpy() for a, b in pairs], axis=1)
    scaled = sums / np.linalg.norm(sums, axis=0)
    signs = np.array(list(product([-1, 1], repeat=6)))
    largest = np.abs(signs @ scaled).max(axis=1)
    for place, (a, b) in enumerate(pairs):
        row = table.iloc[place]
        assert row["shift"] == pytest.approx(float((wide[a] - wide[b]).mean()))
        assert row["p"] == pytest.approx(np.mean(largest >= abs(scaled[:, place].sum()) - 1e-9))
        assert row["low"] <= row["shift"] <= row["high"]


def test_attention_changes_are_ranked_and_carry_what_ablation_said(planted: Make) -> None:
    result = planted()
    table = numbers.attention_changes(result, "think", "careful", "off", top=32)
    assert table["change"].abs().is_monotonic_decreasing
    careful, off = (
        numbers.attention_mass(result, "harmful", condition).sel(span="think")
        for condition in ("careful", "off")
    )
    first = table.iloc[0]
    assert abs(first["change"]) == pytest.approx(float(np.abs(careful - off).max()), abs=1e-6)
    scan = result.heads.scan.set_index(["layer", "head"])["effect"]
    for row in table.to_dict(orient="records"):
        pair = (row["layer"], row["head"])
        assert row["effect_select"] == pytest.approx(scan[pair])
        assert row["verdict"] == ("refusal" if pair in ((1, 2), (2, 5)) else "not tested")


def test_nothing_found_leaves_the_tested_heads_without_a_name_for_any(planted: Make) -> None:
    table = numbers.head_effects(planted(found=()).heads)
    assert not table["found"].any()
    assert set(table.loc[table["tested"], "verdict"]) == {"none"}
