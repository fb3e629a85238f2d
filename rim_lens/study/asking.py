"""What a folder was asked for so far: parts and tuned models, to which later runs add."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rim_lens.errors import StudyFolderError
from rim_lens.folder import ResultFolder
from rim_lens.study.tuned import Source

FILE = "asked.json"


def asked_before(folder: ResultFolder) -> dict[str, Any]:
    """Parts and tuned models that a folder was asked for so far; none in a new one."""
    asked: dict[str, Any] = folder.read(FILE) if folder.has(FILE) else {"parts": [], "tuned": {}}
    return asked


def asked_now(
    folder: ResultFolder, known: Sequence[str], parts: Iterable[str], tuned: Mapping[str, Source]
) -> dict[str, Any]:
    """The same with these parts and tuned models as well; which were asked for is not what is measured.

    Args:
        folder: The study's.
        known: All parts there are, in order.
        parts: Those asked for now.
        tuned: Models by name.

    Raises:
        StudyFolderError: The folder holds another model under one of the names.
    """
    before = asked_before(folder)
    named = {
        name: str(source) if isinstance(source, str | Path) else "given" for name, source in tuned.items()
    }
    for name, source in before["tuned"].items():
        if named.get(name, source) != source:
            raise StudyFolderError(
                f"{folder.path} holds a tuned model {name!r} that is {source!r}, and {named[name]!r} was asked for under"
                " that name. Give it another name, or an empty folder."
            )
    both = {*parts, *before["parts"]}
    return {"parts": [part for part in known if part in both], "tuned": before["tuned"] | named}
