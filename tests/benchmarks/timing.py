"""CPU-seconds and peak memory of one thing beside another's, so that both see the same machine."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

MEGABYTE = 2**20


def cpu(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU-seconds of this process, and what came out. Not time: other work on a machine slows a run down."""
    begun = time.process_time()
    found = run()
    return time.process_time() - begun, found


def interleaved(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU-seconds of each way, run in turns: A B A B."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            gc.collect()
            seconds[name].append(cpu(run)[0])
    return {name: median(found) for name, found in seconds.items()}


class Peak(NamedTuple):
    """Megabytes: the most that was held above what was held before, and the most in all."""

    above: float
    whole: float


def peak_of(run: Callable[[], Any], first: Callable[[], Any]) -> Peak:
    """Most memory held during a run, in a process of its own.

    The process is a fork, so that models need not be made again. There each allocation of 64 kB and more is given back to
    the system when it is freed, and the system's own high-water mark is reset before the run: nothing that was held
    earlier hides what the run takes.

    Args:
        run: What is measured.
        first: The same on little: what is loaded and mapped once belongs to nobody's run.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_measured, args=(run, first, there))
    child.start()
    there.close()
    try:
        found: Peak = here.recv()
    except EOFError as problem:
        raise RuntimeError("the process whose memory was measured died") from problem
    finally:
        child.join()
    return found


def _measured(run: Callable[[], Any], first: Callable[[], Any], pipe: Any) -> None:
    first()
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    most = _status("VmHWM")
    pipe.send(Peak(most - before, most))


def _status(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1)) * 1024 / MEGABYTE
