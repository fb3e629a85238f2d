"""A folder of results: each is written when it is there, whole or not at all, and never measured twice."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rim_lens.errors import SharingError, StudyFolderError
from rim_lens.sharing import agreed

FORMAT_VERSION = 1
# Each stands at the head of a folder of its own kind; their other files bear the same names.
STUDIES = ("study.json", "neuron_study.json", "checkpoint_study.json")


class ResultFolder:
    """Named results below one folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def claim(self, design: dict[str, Any], name: str = "study.json") -> None:
        """Make the folder this question's own, or check that it already is.

        Args:
            design: What is asked.
            name: The file it is kept in.

        Raises:
            StudyFolderError: The folder was claimed for another question or kind of study, the file is corrupt, or the folder is
                a file.
            SharingError: Another process that shares the work asks something else, or of other weights.
        """
        if self.path.exists() and not self.path.is_dir():
            raise StudyFolderError(f"{self.path} is a file; results are kept in a folder. Name one.")
        first = agreed(name, lambda: design)
        if first != design:
            differs = ", ".join(sorted(key for key in {*design, *first} if design.get(key) != first.get(key)))
            raise SharingError(
                f"the processes that share the work ask different things (different: {differs}). Give all the same model, prompts"
                " and settings."
            )
        kind = next(
            (other for other in STUDIES if name in STUDIES and other != name and self.has(other)), None
        )
        if kind is not None:
            raise StudyFolderError(
                f"{self.path} holds {kind}, so it is the folder of another kind of study than {name}. Give an empty folder; what is"
                " there stays untouched."
            )
        mine = {"format_version": FORMAT_VERSION, "design": design}
        if self.has(name):
            found = self.read(name)
            if found.get("format_version") != FORMAT_VERSION:
                raise StudyFolderError(
                    f"{self.path} was written in format {found.get('format_version')}, this version writes"
                    f" {FORMAT_VERSION}. Give an empty folder."
                )
            asked, other = json.loads(json.dumps(design)), found.get("design") or {}
            if other != asked:
                changed = sorted(key for key in {*asked, *other} if asked.get(key) != other.get(key))
                raise StudyFolderError(
                    f"{self.path} holds another study (different: {', '.join(changed)}). Give an empty folder; what is"
                    " there stays untouched."
                )
        else:
            self.write(name, mine)

    def has(self, name: str) -> bool:
        """Whether a result is there."""
        return (self.path / name).exists()

    def read(self, name: str) -> Any:
        """Read a JSON result.

        Raises:
            StudyFolderError: It is missing or corrupt.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise StudyFolderError(
                f"{path} does not exist: the study has not come that far, or is not there."
            ) from error
        except ValueError as error:
            raise StudyFolderError(
                f"{path} is corrupt ({error}). Delete that file and run the study again: only it is measured anew."
            ) from error

    def write(self, name: str, value: Any) -> None:
        """Write a JSON result, whole or not at all."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(value, indent=1, allow_nan=True) + "\n")

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a JSON result, measuring it only if it is not there yet."""
        if not self.has(name):
            self.write(name, agreed(name, measure))
        return self.read(name)

    def lines(self, name: str) -> Lines:
        """A result that grows line by line."""
        return Lines(self.path / name)


class Lines:
    """A JSON-lines file of key → value that can be cut short anywhere and gone on with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        if path.exists():
            whole = b""
            for line in path.read_bytes().splitlines(keepends=True):
                record = _parsed(line)
                if record is None:
                    break  # the last line of a run that was stopped while writing
                self.values[record["key"]] = record["value"]
                whole += line
            if whole != path.read_bytes():
                path.write_bytes(whole)

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return a value, measuring and appending it if it is not there yet."""
        if key not in self.values:
            value = agreed(key, measure)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
            self.values[key] = value
        return self.values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)


def _parsed(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"key", "value"} <= set(record) else None


def write_whole(path: Path, content: str | bytes) -> None:
    """Write whole or not at all, over what is there; lines end in newlines on every system."""
    # Two runs may write the same result at once: each into a file of its own.
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        unfinished.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
