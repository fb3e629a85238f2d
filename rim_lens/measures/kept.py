"""One JSON file per result: written whole, and read back or refused in words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rim_lens.errors import StudyFolderError
from rim_lens.folder import write_whole

Result = TypeVar("Result")


def write_result(folder: str | Path, file: str, content: Mapping[str, Any]) -> None:
    """Write a result into a folder, which is made where there is none, over what is there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    write_whole(folder / file, text + "\n")


def read_result(
    folder: str | Path, file: str, version: int, made: Callable[[dict[str, Any]], Result], writer: str
) -> Result:
    """Read what `write_result` wrote.

    Args:
        folder: Where it lies.
        file: Its name.
        version: The format version that can be read.
        made: Makes the result of the file's content; a KeyError, TypeError, ValueError or AttributeError there says that the
            content is something else.
        writer: What writes such a file, for the message.

    Raises:
        StudyFolderError: The file is missing or cannot be read, holds something else, or is of another format version.
    """
    path = Path(folder) / file
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if read["format_version"] == version:
            return made(read)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise StudyFolderError(
            f"{path} is no readable result ({problem}). Give the folder that {writer} wrote."
        ) from problem
    raise StudyFolderError(
        f"{path}: format version {read['format_version']} was found, and this rim_lens reads {version}. Measure again."
    )


def require_columns(table: Any, columns: Any) -> None:
    """Refuse a table that lacks columns.

    Raises:
        ValueError: It lacks some; `read_result` says it in words.
    """
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(f"its table has no column {', '.join(missing)}")


def without_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    """Numbers for JSON; NaN becomes None.

    >>> without_nan({"low": float("nan"), "n": 3})
    {'low': None, 'n': 3}
    """
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def with_nan(values: Mapping[str, float | None]) -> dict[str, float]:
    """What `without_nan` was given.

    >>> with_nan({"low": None, "n": 3})
    {'low': nan, 'n': 3}
    """
    return {name: float("nan") if value is None else value for name, value in values.items()}
