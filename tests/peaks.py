"""Peak memory of a piece of work, in a process of its own (Linux)."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MEGABYTE = 2**20


class Peak(NamedTuple):
    """Megabytes: the most that was held above what was held before, and the most in all."""

    above: float
    whole: float


def peak_of(run: Callable[[], Any], first: Callable[[], Any] = lambda: None) -> Peak:
    """Most memory held during a run, in a process of its own.

    The process is a fork, so that models need not be made again. There each allocation of 64 kB and more is given back to
    the system when it is freed, and the system's own high-water mark is reset before the run: nothing that was held
    earlier hides what the run takes.

    Args:
        run: What is measured.
        first: The same on little: what is loaded and mapped once belongs to nobody's run.

    Raises:
        RuntimeError: The run failed, or there is no /proc, as anywhere but on Linux.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise RuntimeError("peaks are measured on Linux, by what /proc says.")
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
