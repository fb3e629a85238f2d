"""The page of oracles is what its evidence says, and leaves no editor and no family out."""

from __future__ import annotations

import json

from rim_lens import hooks
from tests import oracles


def test_the_page_is_made_from_the_evidence() -> None:
    found = json.loads(oracles.EVIDENCE.read_text(encoding="utf-8"))
    assert oracles.PAGE.read_text(encoding="utf-8") == oracles.page(found)


def test_every_editor_is_held_against_something_in_every_family_with_and_without_a_cache() -> None:
    found = json.loads(oracles.EVIDENCE.read_text(encoding="utf-8"))["oracles"]
    editors = {
        name
        for name in hooks.__all__
        if isinstance(kind := getattr(hooks, name), type)
        and issubclass(kind, hooks.Component)
        and not issubclass(kind, hooks.Reader)
    } - {"Component"}
    assert len(editors) >= 13
    columns = {column for rows in found.values() for cells in rows.values() for column in cells}
    assert {column.split()[0] for column in columns} == {"bridge", "compat_plain", "hooked"}
    for editor in editors:
        held = [
            (column, how)
            for key, rows in found.items()
            if editor in key.replace(",", " ").split()
            for cells in rows.values()
            for column, cell in cells.items()
            for how in cell
        ]
        assert set(held) == {(column, how) for column in columns for how in ("pass", "cache")}, editor


def test_differences_stay_within_the_contract() -> None:
    found = json.loads(oracles.EVIDENCE.read_text(encoding="utf-8"))["oracles"]
    largest = [
        entry["largest"]
        for rows in found.values()
        for cells in rows.values()
        for cell in cells.values()
        for entry in cell.values()
    ]
    assert max(largest) < 2e-5
    assert max(largest) > 0


def test_only_a_test_under_watch_is_noted(tmp_path) -> None:
    oracles.saw(5.0, "pass")
    before = dict(oracles._found)
    try:
        oracles._found.clear()
        with oracles.watching("Editor", "a loop", "bridge", "llama"):
            oracles.saw(0.25, "pass")
            oracles.saw(0.125, "pass")
            oracles.saw(0.5, "cache")
        oracles.saw(7.0, "cache")
        oracles.write(tmp_path / "new" / "oracles.json")
        found = json.loads((tmp_path / "new" / "oracles.json").read_text())["oracles"]
        ((column, cell),) = found["Editor"]["a loop"].items()
        assert column.startswith("bridge ")
        assert {how: entry["largest"] for how, entry in cell.items()} == {"pass": 0.25, "cache": 0.5}
        assert f"| {cell['pass']['largest']:.0e} / 5e-01 |" in oracles.page(
            json.loads((tmp_path / "new" / "oracles.json").read_text())
        )
    finally:
        oracles._found.clear()
        oracles._found.update(before)
