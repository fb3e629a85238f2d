"""Work shared between processes, on one machine or on several: each measures a part, and all go on with all of the numbers.

Every process runs the same program on a model of its own. Where many things of one kind are measured (prompts, heads, random
sets), each process measures its part; what they found is exchanged, so that all hold the same numbers and take the same
decisions. Numbers are exchanged, never files: the first process keeps the folder that was asked for, each other a copy of its
own that goes when it ends. So a folder is what one process alone would have written, and any number of processes goes on with it.

`accelerate` starts the processes and says which is which. Nothing here touches it before `share_work`.
"""

from __future__ import annotations

import os
import pickle  # noqa: TID251 - to see whether an exception can be sent; nothing is stored
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rim_lens.batching import MAX_ROWS, MAX_TOKENS, micro_batches
from rim_lens.errors import SharingError

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(hours=2)
_CHUNK = 2**23  # bytes of a file that are sent at a time


def launched() -> int:
    """How many processes this program was launched as; 1 where no launcher said anything.

    >>> launched()
    1
    """
    return int(os.environ.get("WORLD_SIZE") or 1)


@dataclass
class Work:
    """This process among those that share their work.

    Attributes:
        rank: Its number; the first, 0, keeps the folders and says what is to be said.
        n: How many they are.
    """

    rank: int = 0
    n: int = 1
    _alone: bool = False
    _scratch: Path | None = None
    _copies: dict[Path, Path] = field(default_factory=dict)

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which writes reports and prints."""
        return self.rank == 0

    def folder(self, path: str | Path) -> Path:
        """Where this process keeps what belongs into a folder: the first there, each other in a copy that goes when it ends.

        All processes ask together, for the same folders in the same order.
        """
        path = Path(path)
        if self.n == 1 or self._alone:
            return path
        whole = path.resolve()
        mine = list(self._copies.values())
        if any(whole.is_relative_to(copy) for copy in mine):
            return path
        for asked, copy in self._copies.items():
            if whole.is_relative_to(asked):
                return copy / whole.relative_to(asked)
        copy = path if self.leads else self._room() / str(len(mine))
        self._copies[whole] = copy.resolve()
        self._copied(copy)
        return copy

    def _room(self) -> Path:
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix=f"rim_lens_process_{self.rank}_"))
        return self._scratch

    def _copied(self, folder: Path) -> None:
        """Give every process what the first has in its folder."""
        names = agreed("folder", lambda: [str(file.relative_to(folder)) for file in _files(folder)])
        for name in names:
            if not self.leads:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(b"")
            with (folder / name).open("rb" if self.leads else "ab") as file:
                read = partial(file.read, _CHUNK) if self.leads else bytes
                while content := agreed("file", read):
                    if not self.leads:
                        file.write(content)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix != ".part")


_work = Work()


@contextmanager
def share_work(patience: timedelta = PATIENCE) -> Iterator[Work]:
    """Share what is measured inside with the other processes of a launch; alone, nothing changes.

    Start the program with ``accelerate launch --multi_gpu --num_processes N …`` (on processors as well; torchrun does it too).
    All processes run the same lines. The command line does this by itself for demo, study, heads and neurons.

    Captures, generation, refusal scores, gradients, means over data and neurons' scores are shared by prompts; effects of
    heads, neurons and random sets by sets. The rest is done by every process. Numbers agree with those of one process but
    for the last bits, as passes hold other prompts together.

    A folder holds only what is whole, so that nothing stored is lost when a process dies: the others stop, and the
    same command goes on from there, with as many processes as you like. What was measured since the last exchange (a pass over
    prompts, about a minute of sets) is measured again.

    Args:
        patience: How long a process waits for the others before it gives up. One that dies is noticed at once.

    Yields:
        This process: ``leads``, ``rank``, ``n``, and ``folder(path)`` for what is kept.

    Raises:
        SharingError: Another process ended, does not answer, or does something else than this one.
        ValueError: Work is shared already.

    >>> with share_work() as work:
    ...     work.n, work.leads
    (1, True)
    """
    global _work  # noqa: PLW0603
    if _work.n > 1:
        raise ValueError("work is shared already; call share_work once, around all of it.")
    if launched() == 1:
        yield _work
        return
    from accelerate import PartialState

    # Only numbers are exchanged: gloo does it on every machine, and needs no accelerator of its own.
    state = PartialState(cpu=True, timeout=patience)
    _take_device(state.local_process_index)
    _work = Work(state.process_index, state.num_processes)
    try:
        with _ending_when_told():
            yield _work
    finally:
        if _work._scratch is not None:
            shutil.rmtree(_work._scratch, ignore_errors=True)
        _work = Work()
        state.destroy_process_group()
        PartialState._reset_state()


def leads() -> bool:
    """Whether this process writes and prints: the first, or the only one."""
    return _work.leads


def n_processes() -> int:
    """How many processes share what is measured next."""
    return 1 if _work._alone else _work.n


def own_folder(path: str | Path) -> Path:
    """`Work.folder` of this process."""
    return _work.folder(path)


def agreed(what: str, measure: Callable[[], T]) -> T:
    """What the first process measured; the others measure it as well, as what is shared within needs them all."""
    if n_processes() == 1:
        return measure()
    return _exchange(what, measure())[0]


def gathered(what: str, measure: Callable[[int, int], T]) -> list[T]:
    """What each process measured by itself, called with its number and how many they are, in the order of the processes.

    Within, nothing is shared. Where one process fails, all raise what it raised.
    """
    if n_processes() == 1:
        return [measure(0, 1)]
    problem: Exception | None = None
    value: Any = None
    _work._alone = True
    try:
        value = measure(_work.rank, _work.n)
    except Exception as caught:
        problem = caught
    finally:
        _work._alone = False
    found = _exchange(what, (_sendable(problem), value))
    if problem is not None:
        raise problem
    for its_problem, _ in found:
        if its_problem is not None:
            raise its_problem
    return [its_value for _, its_value in found]


def each(items: Sequence[T], measure: Callable[[T], R], what: str) -> Iterator[R]:
    """Measure every item; in order. Shared, every process measures one of the next, and all get all of them.

    Args:
        items: The same in every process.
        measure: What it gives has to be sent: numbers, arrays, tensors on the processor, and plain containers of them.
        what: What is done, the same in every process; it tells when they come apart.
    """
    n = n_processes()
    if n == 1:
        for item in items:
            yield measure(item)
        return
    for start in range(0, len(items), n):
        part = items[start : start + n]

        def mine(rank: int, n: int, part: Sequence[T] = part) -> list[R]:  # noqa: ARG001
            return [measure(part[rank])] if rank < len(part) else []

        for found in gathered(f"{what}, {start} of {len(items)}", mine):
            yield from found


def row_groups(
    lengths: Sequence[int], max_tokens: int = MAX_TOKENS, max_rows: int = MAX_ROWS
) -> list[list[int]]:
    """`micro_batches`, of fewer rows where processes share them, so that each gets some.

    >>> row_groups([3, 9, 4, 8], max_tokens=18)
    [[1, 3], [2, 0]]
    """
    share = -(-len(lengths) // n_processes())
    return micro_batches(lengths, max_tokens, max(1, min(max_rows, share)))


def _exchange(what: str, value: T) -> list[T]:
    from accelerate.utils import gather_object

    try:
        found = gather_object([(what, value)])
    except RuntimeError as problem:
        why = str(problem).split(". This is typically")[0].splitlines()[0]
        raise SharingError(
            f"another process ended or does not answer ({why}). What was stored is kept: start the"
            " same command again, with any number of processes."
        ) from problem
    others = sorted({its for its, _ in found} - {what})
    if others:
        raise SharingError(
            f"this process was at {what!r} while another was at {others[0]!r}. All have to run the same program on the same"
            " model and prompts; start it again, and if it comes back, with one process."
        )
    return [its_value for _, its_value in found]


def _sendable(problem: Exception | None) -> Exception | None:
    """An exception as it reaches the other processes; in words where it cannot be sent as it is."""
    if problem is None:
        return None
    try:
        pickle.loads(pickle.dumps(problem))  # noqa: S301 - our own
    except Exception:
        return SharingError(f"process {_work.rank} stopped: {type(problem).__name__}: {problem}")
    return problem


def _take_device(local: int) -> None:
    """Of several accelerators on this machine, "cuda" means another one to each process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())


@contextmanager
def _ending_when_told() -> Iterator[None]:
    """End as after an exception when the launcher says so, as it does when another process has died: files are closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
