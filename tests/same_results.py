"""How far the numbers in two result folders are apart, file by file: JSON, JSON lines, netCDF and safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

TIMES = {
    "timings.json",
    "plan.json",
}  # a plan tells seconds as well, by the speed of the machine at that moment
REPORTS = {".html", ".md"}


def largest_difference(one: Path, two: Path) -> float:
    """The largest difference of any number, relative to 1 or to the number where that is larger.

    Raises:
        AssertionError: A file is in one folder alone, or something else than a number differs.
    """
    names = [_names(folder) for folder in (one, two)]
    assert names[0] == names[1], sorted(set(names[0]) ^ set(names[1]))
    assert names[0], f"{one} holds no results"
    return max(_apart(one / name, two / name) for name in names[0])


def _names(folder: Path) -> list[str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    kept = [file for file in files if file.name not in TIMES and file.suffix not in REPORTS]
    return sorted(str(file.relative_to(folder)) for file in kept if file.name != "report.json")


def _apart(one: Path, two: Path) -> float:
    if one.suffix in (".json", ".jsonl"):
        read = [[json.loads(text) for text in _texts(path)] for path in (one, two)]
        return max(_pairs(*(sorted(found, key=_key) for found in read), str(one)), default=0.0)
    if one.suffix == ".nc":
        first, second = _stored(one), _stored(two)
        assert first.keys() == second.keys(), one
        return max((_arrays(first[name], second[name], f"{one}: {name}") for name in first), default=0.0)
    if one.suffix == ".safetensors":
        from safetensors.numpy import load_file

        arrays = load_file(one), load_file(two)
        assert set(arrays[0]) == set(arrays[1]), one
        return max(_arrays(arrays[0][name], arrays[1][name], f"{one}: {name}") for name in arrays[0])
    raise AssertionError(f"{one}: nothing here reads {one.suffix}")


def _stored(path: Path) -> dict[str, np.ndarray]:
    """Every array of a netCDF file, which is an HDF5 file."""
    import h5py

    found: dict[str, np.ndarray] = {}

    def add(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = np.asarray(item[()])

    with h5py.File(path) as file:
        file.visititems(add)
    return found


def _texts(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _key(record: Any) -> str:
    # Lines stand in the order in which they were measured, which is nothing that is measured.
    return str(record.get("key", "")) if isinstance(record, dict) else ""


def _pairs(one: Any, two: Any, where: str) -> Iterator[float]:
    if isinstance(one, dict) and isinstance(two, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            yield from _pairs(one[key], two[key], f"{where}, {key}")
    elif isinstance(one, list) and isinstance(two, list):
        assert len(one) == len(two), where
        for place, (first, second) in enumerate(zip(one, two, strict=True)):
            yield from _pairs(first, second, f"{where}, {place}")
    elif isinstance(one, float) and isinstance(two, float):
        yield _number(one, two)
    else:
        assert one == two, f"{where}: {one!r} and {two!r}"


def _number(one: float, two: float) -> float:
    if one == two or (math.isnan(one) and math.isnan(two)):
        return 0.0
    return abs(one - two) / max(1.0, abs(one))


def _arrays(one: np.ndarray, two: np.ndarray, where: str) -> float:
    assert one.shape == two.shape, where
    if not np.issubdtype(one.dtype, np.floating):
        assert (one == two).all(), where
        return 0.0
    assert (np.isnan(one) == np.isnan(two)).all(), where
    if not one.size:
        return 0.0
    return float(np.nanmax(np.abs(one - two) / np.maximum(1.0, np.abs(one)), initial=0.0))
