"""Peak memory of a piece of work, in a process of its own (Linux)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes of resident memory that a run needs at its peak, above what was resident when it began.

    Raises:
        RuntimeError: The run failed.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            before = _resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            run()
            os.write(write, str(_resident("VmHWM") - before).encode())
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or not text:
        raise RuntimeError("the run whose memory was to be measured failed; see above.")
    return int(text)


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", status)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}; peaks are measured on Linux.")
    return int(found[1]) * 1024
