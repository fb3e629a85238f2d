"""docs/freezing.md: the page is that of its figures, and what stands there of seeds is what the runs give."""

from __future__ import annotations

import json

import pytest

from tests import freezing_verdicts

FOUND = json.loads(freezing_verdicts.EVIDENCE.read_text())


def test_the_page_is_that_of_its_figures():
    assert freezing_verdicts.PAGE.read_text() == freezing_verdicts.page(FOUND)


def test_every_seed_has_all_its_runs_and_the_mean_over_seeds_is_theirs():
    names = {"nothing", "set", *(f"random {place}" for place in range(freezing_verdicts.N_RANDOM))}
    seeds = [seed for seed in FOUND["seeds"] if seed not in FOUND["without_neurons"]]
    gaps = []
    for seed in seeds:
        runs = {row["frozen"]: row for row in FOUND["runs"] if row["seed"] == seed}
        assert set(runs) == names
        lost = {name: row["lost"] for name, row in runs.items()}
        assert all(
            row["kept"] == pytest.approx(lost["nothing"] - lost[name], abs=1e-5) for name, row in runs.items()
        )
        random = [runs[name]["kept"] for name in names if name.startswith("random")]
        gaps.append(runs["set"]["kept"] - sum(random) / len(random))
    assert FOUND["over_seeds"]["kept"]["mean"] == pytest.approx(sum(gaps) / len(gaps))


@pytest.mark.timeout(300)
def test_the_command_still_measures(tmp_path):
    found = freezing_verdicts.held(0, tmp_path, tmp_path, steps=2)
    assert len(found.table) == 2 + freezing_verdicts.N_RANDOM
    told = freezing_verdicts.measured({0: found})
    assert [row["seed"] for row in told["runs"]] == [0] * len(found.table)
