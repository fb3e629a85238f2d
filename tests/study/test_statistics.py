"""What heads do beside what their removal does: each number as the function gives it by hand, and what cannot be had, named."""

from __future__ import annotations

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.measures.heads.prefilter import gradient_scores
from rim_lens.organisms.planted import DECOY_HEAD, READER
from rim_lens.study import statistics
from rim_lens.study.study import Study

FAST = rl.Settings(max_new_tokens=6, n_random_sets=4, max_heads=2)
PARTS = ("heads", "statistics")


@pytest.fixture(scope="module")
def study() -> Study:
    return rl.Study("planted", n_requests=12, settings=FAST, parts=PARTS)


@pytest.fixture(scope="module")
def result(study, tmp_path_factory) -> rl.StudyResult:
    return study.run(tmp_path_factory.mktemp("statistics"))


def head(result: rl.StudyResult, at: tuple[int, int]) -> dict[str, float]:
    table = result.statistics["heads"]
    (row,) = table[(table["layer"] == at[0]) & (table["head"] == at[1])].to_dict("records")
    return row


def test_numbers_are_those_of_the_functions(study, result, tmp_path):
    bench = study._bench(tmp_path)
    assert result.parts == PARTS
    assert result.measured
    off = bench.render(bench.evaluate.harmful, "off")
    direct = rl.direct_effects(bench.model, off)["direct_effect"].mean("prompt")
    guessed = gradient_scores(bench.model, bench.render(bench.select.harmful, "off")).mean("prompt")
    for at in (READER, DECOY_HEAD, (0, 0)):
        row = head(result, at)
        assert row["direct"] == pytest.approx(float(direct[at]), abs=1e-4)
        assert row["estimate"] == pytest.approx(float(guessed[at]), abs=1e-3)
    open_, closed = (
        rl.capture(bench.model, bench.render(bench.evaluate.harmful, name), rl.SpanAttention())
        for name in ("open", "off")
    )
    moved = rl.mass_shift(open_, closed, "assistant").mean("prompt").values
    ours = result.statistics["heads"]["mass_shift"].to_numpy().reshape(moved.shape)
    assert ours == pytest.approx(moved, abs=1e-5)


def test_attention_alone_cannot_tell_the_reader_from_its_decoy_and_removal_does(result):
    reader, decoy = head(result, READER), head(result, DECOY_HEAD)
    assert reader["mass_shift"] == pytest.approx(decoy["mass_shift"], abs=0.05)
    assert reader["effect"] < -5
    assert abs(decoy["effect"]) < 0.5
    assert abs(decoy["direct"]) < 0.5


def test_pairs_are_the_found_heads_with_the_largest_and_what_is_missing_is_named(result):
    chosen = statistics.paired_heads(result.heads)
    assert set(result.heads.found) <= set(chosen)
    assert len(result.statistics["pairs"]) == len(chosen) * (len(chosen) - 1) // 2
    assert "chains of thought" in result.statistics["reasons"]["receiving"]
    assert np.isnan(result.statistics["heads"]["kurtosis"]).all()
    assert result.statistics["estimates"]["rank_correlation"] > 0.3
    text = rl.write_report(result).with_suffix(".md").read_text()
    assert "Pairs of heads removed together" in text
    assert "Not there: receiving" in text


def test_without_open_nothing_moves_and_the_rest_is_there(tmp_path):
    settings = rl.Settings(
        max_new_tokens=6, n_random_sets=4, max_heads=2, conditions=("off", "careful", "filler")
    )
    found = rl.Study("planted", n_requests=8, settings=settings, parts=PARTS).run(tmp_path).statistics
    assert "open is not among the conditions" in found["reasons"]["looking"]
    assert found["heads"]["argmax_shift"].isna().all()
    assert found["heads"]["direct"].notna().all()


def test_a_study_without_the_part_has_none(tmp_path):
    whole = rl.Study("planted", n_requests=6, settings=FAST, parts=("heads",)).run(tmp_path)
    assert whole.statistics is None
