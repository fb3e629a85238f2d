"""Pages of results: Markdown to read, and beside it JSON with every number."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def markdown_table(lines: Sequence[Sequence[object]]) -> str:
    r"""A Markdown table; the first line is its head.

    >>> print(markdown_table([["a", "b"], [1, "x|y"]]))
    | a | b |
    | --- | --- |
    | 1 | x\|y |
    """

    def written(cells: Sequence[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join(
        [written(lines[0]), "|" + " --- |" * len(lines[0]), *(written(line) for line in lines[1:])]
    )


def plain(line: Mapping[Any, Any]) -> dict[str, Any]:
    """One row of a table as plain values for JSON; NaN becomes None.

    >>> plain({"n": np.int64(3), "p": float("nan")})
    {'n': 3, 'p': None}
    """
    return {
        str(name): None
        if isinstance(value, float) and math.isnan(value)
        else value.item()
        if isinstance(value, np.generic)
        else value
        for name, value in line.items()
    }


def told_versions(origin: Mapping[str, Any]) -> str:
    """Command, day and versions in one line, see `rim_lens.provenance`."""
    versions = ", ".join(f"{package} {number}" for package, number in origin["versions"].items())
    return f"`{origin['command']}`, {origin['date']}; {versions}."


def page_paths(folder: str | Path, kind: str, name: str) -> tuple[Path, Path]:
    """Where a page and its numbers go; the folder is made where it is missing.

    >>> [path.name for path in page_paths(".", "measures", "org/model")]
    ['measures_org_model.md', 'measures_org_model.json']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safe = "".join(character if character.isalnum() or character in "-." else "_" for character in name)
    return folder / f"{kind}_{safe}.md", folder / f"{kind}_{safe}.json"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as the evidence has it."""
    path.write_text(
        json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
