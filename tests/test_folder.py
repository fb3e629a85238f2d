"""The study folder: whole or not at all, and never measured twice."""

from __future__ import annotations

import json
import multiprocessing
import os

import pytest

from rim_lens.errors import StudyFolderError
from rim_lens.folder import ResultFolder, write_whole


def test_a_result_is_measured_once(tmp_path):
    folder = ResultFolder(tmp_path)
    calls = []
    for _ in range(2):
        assert folder.once("a/b.json", lambda: calls.append(1) or {"x": float("inf")}) == {"x": float("inf")}
    assert len(calls) == 1
    assert not list(tmp_path.rglob("*.part"))


def test_an_exception_leaves_nothing_behind(tmp_path):
    folder = ResultFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        folder.once("a.json", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not folder.has("a.json")


def test_missing_and_corrupt_files_are_named(tmp_path):
    folder = ResultFolder(tmp_path)
    with pytest.raises(StudyFolderError, match=r"gate\.json does not exist"):
        folder.read("gate.json")
    (tmp_path / "gate.json").write_text("{", encoding="utf-8")
    with pytest.raises(StudyFolderError, match=r"gate\.json is corrupt.*Delete that file"):
        folder.read("gate.json")


def test_a_folder_belongs_to_one_study(tmp_path):
    folder = ResultFolder(tmp_path)
    folder.claim({"model": "a", "seed": (1, 2)})
    folder.claim({"model": "a", "seed": [1, 2]})  # as JSON gives it back
    with pytest.raises(StudyFolderError, match="different: model"):
        folder.claim({"model": "b", "seed": [1, 2]})


def test_a_folder_belongs_to_one_kind_of_study(tmp_path):
    """They keep files of the same names (gate.json, asked.json), which would be taken for each other's."""
    ResultFolder(tmp_path).claim({"model": "a"})
    for other in ("neuron_study.json", "checkpoint_study.json"):
        with pytest.raises(StudyFolderError, match=r"holds study\.json.*another kind of study.*empty folder"):
            ResultFolder(tmp_path).claim({"model": "a"}, other)
        assert not (tmp_path / other).exists()
    ResultFolder(tmp_path).claim({"model": "a"}, "neurons/neuron_study.json")  # below it is another folder


@pytest.mark.parametrize(
    "tail", ['{"key": "c", "val', '{"key": "c", "value": 3}', "\x00\x00", '{"key": "c"}\n']
)
def test_lines_survive_a_write_cut_short(tmp_path, tail):
    lines = ResultFolder(tmp_path).lines("x.jsonl")
    assert lines.get("a", lambda: 1) == 1
    assert lines.get("b", lambda: [2]) == [2]
    with (tmp_path / "x.jsonl").open("a", encoding="utf-8") as file:
        file.write(tail)
    again = ResultFolder(tmp_path).lines("x.jsonl")
    assert list(again) == ["a", "b"]
    assert again.get("a", lambda: pytest.fail("measured twice")) == 1
    again.get("d", lambda: 4)
    records = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert records == [{"key": "a", "value": 1}, {"key": "b", "value": [2]}, {"key": "d", "value": 4}]


def _writing(path, number, times):
    for _ in range(times):
        write_whole(path, json.dumps([number] * 20_000))
        json.loads(path.read_text())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_two_runs_that_write_one_result_at_once_leave_it_whole(tmp_path):
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=_writing, args=(tmp_path / "a.json", number, 500)) for number in (1, 2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0, 0]
    assert len(set(json.loads((tmp_path / "a.json").read_text()))) == 1
    assert not list(tmp_path.glob("*.part"))


def test_a_file_is_no_folder(tmp_path):
    taken = tmp_path / "notes.txt"
    taken.write_text("mine")
    with pytest.raises(StudyFolderError, match=r"notes\.txt is a file; results are kept in a folder"):
        ResultFolder(taken).claim({"a": 1})
    assert taken.read_text() == "mine"
