"""CPU-seconds of one thing beside another's, so that both see the same machine."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any


def cpu(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU-seconds of this process, and what came out. Not time: other work on a machine slows a run down."""
    begun = time.process_time()
    found = run()
    return time.process_time() - begun, found


def interleaved(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU-seconds of each way, run in turns: A B A B; a first turn, in which memory is asked for, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(rounds):
        for name, run in ways.items():
            gc.collect()
            seconds[name].append(cpu(run)[0])
    return {name: median(found) for name, found in seconds.items()}
