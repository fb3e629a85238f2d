"""A worker is killed in the middle of a run of two, and a run of three goes on: ``python -m tests.killed_worker``.

Writes docs/evidence/killed_worker.md. The commands are those of a user; only the kill is ours.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.launching import stamps
from tests.same_results import TIMES, largest_difference

PAGE = Path(__file__).resolve().parents[1] / "docs" / "evidence" / "killed_worker.md"
ASKED = ["-m", "rim_lens", "heads", "toy", "--requests", "8", "--no-probes", "--no-removing"]
# Of the launcher, and of the first process where it is not told to end before it can say so
SAYING = ("Signal 9", "SIGTERM", "another process ended", "exitcode")
MIDDLE = "heads/select.jsonl"  # when this is there, the second process is killed
SPELLED = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def launched(n: int) -> list[str]:
    """The words of ``accelerate launch`` for n processes."""
    return ["accelerate", "launch", "--multi_gpu", "--num_processes", str(n), *SPELLED]


def start(words: Sequence[str], out: Path) -> subprocess.Popen[str]:
    """Start the command with its folder."""
    python = (
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:]]
        if words
        else [sys.executable]
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.Popen(
        [*python, *ASKED, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )


def worker(launcher: int, rank: int) -> psutil.Process:
    """The process of that number below a launcher."""
    found = [
        child
        for child in psutil.Process(launcher).children(recursive=True)
        if child.environ().get("RANK") == str(rank)
    ]
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} processes of rank {rank} below the launcher")
    return found[0]


def run(root: Path) -> list[str]:
    """All three runs; the page's lines."""
    one, many = root / "one", root / "many"
    begin = time.monotonic()
    alone = start([], one)
    alone.communicate()
    seconds = {"one": time.monotonic() - begin}

    begin = time.monotonic()
    first = start(launched(2), many)
    while not (many / MIDDLE).exists():
        if first.poll() is not None:
            raise RuntimeError(f"it ended before {MIDDLE} was there: {first.communicate()[0]}")
        time.sleep(0.01)
    victim = worker(first.pid, 1)
    victim.send_signal(signal.SIGKILL)
    seconds["killed"] = time.monotonic() - begin
    begin = time.monotonic()
    said = first.communicate()[0]
    seconds["noticed"] = time.monotonic() - begin
    before = stamps(many)
    lines = {name: (many / name).read_text() for name in before if name.endswith(".jsonl")}

    begin = time.monotonic()
    again = start(launched(3), many)
    told = again.communicate()[0]
    seconds["again"] = time.monotonic() - begin
    after = stamps(many)
    results = sorted(name for name in before if name not in TIMES)
    rewritten = [name for name in results if name not in lines and after.get(name) != before[name]]
    anew = [name for name, text in lines.items() if not (many / name).read_text().startswith(text)]
    difference = largest_difference(one, many)
    if alone.returncode or again.returncode or not first.returncode or rewritten or anew or difference > 1e-6:
        raise RuntimeError(f"not as it should be: {rewritten} {anew} {difference}\n{said}\n{told}")
    kept = sum(text.count("\n") for text in lines.values())
    whole = sum((many / name).read_text().count("\n") for name in lines)
    # Where Python lies on this machine is nothing that anyone else has.
    spoken = said.replace(sys.executable, "python").splitlines()
    notices = [line.strip() for line in spoken if any(word in line for word in SAYING)]
    return [
        f"| one process | `python {' '.join(ASKED)}` | {alone.returncode} | {seconds['one']:.0f} | {len(stamps(one))} files |",
        f"| two, the second killed (SIGKILL) as soon as {MIDDLE} is there | `{' '.join(launched(2))} {' '.join(ASKED)}` |"
        f" {first.returncode} | {seconds['killed']:.0f} + {seconds['noticed']:.1f} until all had ended | {len(results)} results,"
        f" {kept} lines |",
        f"| the same command with three | `{' '.join(launched(3))} {' '.join(ASKED)}` | {again.returncode} |"
        f" {seconds['again']:.0f} | {len(after)} files |",
        "",
        f"Of the {len(results)} results that were there when the worker died, {len(results)} are as they were, none was written again;"
        f" files that grow line by line had {kept} then and begin with the same now, of {whole}. The largest difference of"
        f" any number in the folder from that of the one process: {difference:.1e} (relative to the number, or to 1 where it is smaller).",
        "",
        "What was said when the second was gone:",
        "",
        "```text",
        *notices,
        "```",
    ]


def main() -> None:
    """Run it and write the page."""
    with tempfile.TemporaryDirectory(prefix="rim_lens_killed_") as folder:
        table = run(Path(folder))
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "accelerate", "transformer-lens")
    )
    PAGE.write_text(
        "\n".join(
            [
                "# A worker is killed, and another number of them goes on",
                "",
                f"`make evidence-sharing`, {datetime.date.today().isoformat()}: {versions}, Python {platform.python_version()},"
                f" {os.cpu_count()} cores, processors only (gloo). One run; the numbers of the toy are the same in every one.",
                "",
                "| Run | Command | Exit code | Seconds | Stored |",
                "| --- | --- | --- | --- | --- |",
                *table,
                "",
            ]
        ),
        encoding="utf-8",
    )
    sys.stdout.write(f"{PAGE}\n")


if __name__ == "__main__":
    main()
