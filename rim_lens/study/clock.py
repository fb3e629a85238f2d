"""How long each stage of a study takes."""

from __future__ import annotations

import time
from collections.abc import Callable

from rim_lens.folder import ResultFolder


class Clock:
    """Announces each stage and records how long it took in all its runs together."""

    def __init__(self, folder: ResultFolder, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._stage, self._start = "", 0.0

    def __call__(self, stage: str, text: str) -> Clock:
        """Say what begins; the clock runs inside ``with clock(stage, text):``."""
        self._stage = stage
        self._say(text)
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = self._folder.read("timings.json") if self._folder.has("timings.json") else {}
        spent[self._stage] = round(spent.get(self._stage, 0.0) + time.perf_counter() - self._start, 2)
        self._folder.write("timings.json", spent)
