"""Work shared by 2, 3 and 4 processes: the numbers of one process, and nothing stored is lost when one of them is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rim_lens as rl
from rim_lens import sharing
from rim_lens.folder import ResultFolder
from tests.same_results import TIMES, largest_difference

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="launches are forked")
EQUAL = 1e-6


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Everything is launched once, from a process of its own: forking the one that runs the tests would not be clean."""
    root = tmp_path_factory.mktemp("launches")
    here = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.launching", str(root)],
        cwd=here,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def launches(root) -> dict[str, Any]:
    return json.loads((root / "launches.json").read_text())


def test_each_process_does_a_part_and_all_know_all(launches):
    ended = launches["agreeing"]
    assert [process["code"] for process in ended] == [0, 0, 0]
    for process in ended:
        assert process["found"]["each"] == [item**2 for item in range(7)]
        assert process["found"]["agreed"] == 0
        assert process["found"]["groups"] == [[0, 1], [2, 3], [4, 5]]
    assert [process["found"]["done"] for process in ended] == [[0, 3, 6], [1, 4], [2, 5]]


def test_what_one_process_raises_all_raise(launches):
    assert [process["raised"] for process in launches["failing"]] == ["NotFinite", "NotFinite"]
    assert [process["raised"] for process in launches["unsendable"]] == ["SharingError", "Odd"]
    assert "process 1 stopped: Odd: 1 and 2" in launches["unsendable"][0]["message"]


def test_processes_that_come_apart_are_told(launches):
    for process in launches["apart"]:
        assert process["raised"] == "SharingError"
        assert "from 0" in process["message"]
        assert "from 1" in process["message"]


def test_every_process_has_the_first_ones_folder_as_its_own(launches):
    first, second = (process["found"] for process in launches["copying"])
    for found in (first, second):
        assert (found["size"], found["sum"]) == (10_240_000, sum(range(256)) * 40_000)
        assert found["again"]
    assert (first["own"], second["own"]) == (True, False)
    assert (first["seen"], second["seen"]) == (["0.txt", "a.bin"], ["1.txt", "a.bin"])
    assert first["scratch"] == ""
    assert not Path(second["scratch"]).exists()


def test_two_processes_measure_what_one_does(launches):
    first, second, alone = (process["found"] for process in launches["measures"])
    assert first == second  # to the last bit: all go on with the same numbers
    assert alone["how"] == "packed"
    for name, value in alone.items():
        if name in ("how", "outcome", "remembered"):
            assert first[name] == value, name
            continue
        pairs = zip(first[name], value, strict=True) if name == "capture" else [(first[name], value)]
        for mine, its in pairs:
            np.testing.assert_allclose(mine, its, rtol=EQUAL, atol=EQUAL, err_msg=name)


def test_a_killed_process_stops_the_others_and_loses_nothing(launches):
    first, second = launches["killed"]
    assert second["code"] == -9
    assert (first["code"], first["raised"]) == (1, "SharingError")
    assert "What was stored is kept" in first["message"]
    stored = launches["stored"]
    before, after = stored["before"], stored["after"]
    assert "heads/select.jsonl" in before
    assert "heads/heads.json" not in before  # it was in the middle
    for name, stamp in before.items():
        if name not in TIMES and name not in stored["lines"]:
            assert after[name] == stamp, f"{name} was written again"


def test_a_restart_with_other_processes_comes_to_the_numbers_of_one(launches, root):
    assert [process["code"] for process in launches["again"]] == [0] * 4
    assert largest_difference(root / "one", root / "many") <= EQUAL
    for name, text in launches["stored"]["lines"].items():
        assert text
        assert (root / "many" / name).read_text().startswith(text), f"{name} was begun anew"


def test_the_comparison_of_folders_sees_a_difference(root, tmp_path):
    for name in ("one", "two"):
        ResultFolder(tmp_path / name).write("a.json", {"x": [1.0, 2.0 if name == "one" else 2.1]})
    assert largest_difference(tmp_path / "one", tmp_path / "two") == pytest.approx(0.05)
    with pytest.raises(AssertionError, match=r"gate\.json"):
        largest_difference(root / "one", tmp_path / "two")


def test_alone_nothing_is_shared_and_no_launcher_is_asked(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "accelerate", None)  # importing it would raise
    with rl.share_work() as work:
        assert (work.rank, work.n, work.leads) == (0, 1, True)
        assert work.folder(tmp_path) == tmp_path
        assert list(sharing.each([1, 2], str, "texts")) == ["1", "2"]
        assert sharing.gathered("numbers", lambda rank, n: (rank, n)) == [(0, 1)]
        assert sharing.agreed("number", lambda: 3) == 3
