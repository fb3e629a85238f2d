"""Processes as a launcher would start them, forked from one that has imported everything: a start costs nothing then.

``python -m tests.launching FOLDER`` runs the launches that tests/test_sharing.py looks at, and writes what came of each into
FOLDER/launches.json.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate.utils  # noqa: F401 - once, before anything forks

import rim_lens as rl
from rim_lens import sharing
from rim_lens.errors import NotFinite
from rim_lens.measures.heads.prefilter import gradient_scores
from rim_lens.measures.neurons.scoring import activation_contrast, snip, wanda
from rim_lens.measures.probes.reading import stream_at

N_REQUESTS = 6
LONGEST = 900.0  # seconds that any launch may take


def launch(n: int, run: Callable[[sharing.Work], Any]) -> list[dict[str, Any]]:
    """Run a function in n processes that share work; what each returned or raised, and how it ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = Path(tempfile.mkdtemp(prefix="rim_lens_launch_"))
    children = []
    for rank in range(n):
        pid = os.fork()
        if not pid:
            _child(rank, n, port, said / str(rank), run)
        children.append(pid)
    begin = time.monotonic()
    ended: list[dict[str, Any]] = []
    for rank, pid in enumerate(children):
        while not (found := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() - begin > LONGEST:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        told = json.loads((said / str(rank)).read_text()) if (said / str(rank)).exists() else {}
        ended.append({**told, "code": os.waitstatus_to_exitcode(found[1])})
    shutil.rmtree(said)
    return ended


def _child(rank: int, n: int, port: int, said: Path, run: Callable[[sharing.Work], Any]) -> None:
    os.environ.update(
        WORLD_SIZE=str(n),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(n),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    told: dict[str, Any] = {}
    code = 0
    begin = time.monotonic()
    try:
        with rl.share_work() as work:
            told["found"] = run(work)
    except BaseException as problem:
        told.update(raised=type(problem).__name__, message=str(problem))
        code = 1
    said.write_text(json.dumps({**told, "seconds": time.monotonic() - begin, "cpu": time.process_time()}))
    os._exit(code)


def study_into(folder: Path) -> Callable[[sharing.Work], None]:
    """A small study of heads on the planted organism."""
    settings = rl.Settings(n_random_sets=6, n_test=4, max_new_tokens=2, conditions=("off", "careful"))

    def run(_: sharing.Work) -> None:
        rl.Study("planted", n_requests=N_REQUESTS, settings=settings, parts=("heads",)).run(folder)

    return run


def measures(_: sharing.Work) -> dict[str, Any]:
    """Everything that is shared by prompts or by sets, on the toy."""
    model = rl.load_model("toy")
    chat = rl.ChatFormat.from_model(model)
    harmful = rl.load_prompts("harmful", language="toy", split="select")[:N_REQUESTS]
    off, open_ = (chat.render(harmful, think=think) for think in ("off", "open"))
    editor = partial(rl.AblateHeads, method="mean", reference=off)
    heads = [(layer, head) for layer in range(2) for head in range(8)]
    reading = rl.refusal_reading(model, off)
    written = rl.generate(model, open_, max_new_tokens=8)
    effects = rl.head_effects(reading, heads, editor=editor)
    refused = rl.refused_reading(model, off, chat, max_new_tokens=2)
    kept: dict[str, Any] = {}
    few = rl.head_effects(refused, heads[:5], remember=kept)
    with rl.capture(model, off, rl.SpanAttention(), rl.NeuronActivations(pool="max")) as data:
        captured = [data[name].values.tolist() for name in data]
    return {
        "written": written.batch.tokens.tolist(),
        "outcome": list(written.outcome),
        "capture": captured,
        "score": rl.refusal_score(model, off).values.tolist(),
        "prefixes": rl.refusal_prefix_score(model, off).values.tolist(),
        "effects": effects.values.tolist(),
        "how": effects.attrs["scan"],
        "refused": few.values.tolist(),
        "remembered": kept,
        "gradients": gradient_scores(model, off).values.tolist(),
        "stream": stream_at(model, off, ["assistant"]).values.tolist(),
        "wanda": wanda(model, written.batch).tolist(),
        "snip": snip(model, written.batch).tolist(),
        "contrast": activation_contrast(model, rl.load_model("toy:C"), written.batch).tolist(),
    }


def killed_at(name: str, run: Callable[[sharing.Work], None], folder: Path) -> Callable[[sharing.Work], None]:
    """The same, but the second process dies without a word at the first exchange after a result is there."""

    def until(work: sharing.Work) -> None:
        exchange = sharing._exchange

        def dying(what: str, value: Any) -> list[Any]:
            if work.rank == 1 and (folder / name).exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return exchange(what, value)

        sharing._exchange = dying
        run(work)

    return until


def stamps(folder: Path) -> dict[str, int]:
    """When each result was written."""
    return {
        str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()
    }


def _agreeing(work: sharing.Work) -> Any:
    """What shared calls give, and how much of it each process did."""
    done: list[int] = []

    def squared(item: int) -> int:
        done.append(item)
        assert sharing.n_processes() == 1  # nothing is shared within a part
        return item**2

    return {
        "each": list(sharing.each(range(7), squared, "squares")),
        "done": done,
        "agreed": sharing.agreed("rank", lambda: work.rank),
        "groups": sharing.row_groups([5] * 6),
    }


def _failing(work: sharing.Work) -> None:
    def measure(rank: int, n: int) -> int:
        if rank == 1:
            raise NotFinite("seen by the second process alone")
        return rank

    del work
    sharing.gathered("failing", measure)


def _unsendable(work: sharing.Work) -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    def measure(rank: int, n: int) -> int:
        if rank == 1:
            raise Odd(rank, n)
        return rank

    del work
    sharing.gathered("unsendable", measure)


def _apart(work: sharing.Work) -> None:
    sharing.agreed(f"from {work.rank}", lambda: None)


def _copying(folder: Path) -> Callable[[sharing.Work], Any]:
    def run(work: sharing.Work) -> Any:
        mine = work.folder(folder)
        found = (mine / "deep" / "a.bin").read_bytes()
        (mine / "deep" / f"{work.rank}.txt").write_text("mine")
        inner = work.folder(folder / "deep")
        return {
            "size": len(found),
            "sum": sum(found),
            "seen": sorted(file.name for file in inner.iterdir()),
            "own": mine == folder,
            "again": work.folder(inner) == inner,
            "scratch": str(work._scratch or ""),
        }

    return run


def main(root: Path) -> None:
    """All launches, cheapest first."""
    copied = root / "copied" / "deep"
    copied.mkdir(parents=True)
    (copied / "a.bin").write_bytes(bytes(range(256)) * 40_000)  # more than one piece
    one, many = root / "one", root / "many"
    run = study_into(many)
    found: dict[str, Any] = {
        "agreeing": launch(3, _agreeing),
        "failing": launch(2, _failing),
        "unsendable": launch(2, _unsendable),
        "apart": launch(2, _apart),
        "copying": launch(2, _copying(root / "copied")),
        "measures": [*launch(2, measures), {"found": measures(sharing.Work())}],
        "killed": launch(2, killed_at("heads/select.jsonl", run, many)),
    }
    before = stamps(many)
    lines = {name: (many / name).read_text() for name in before if name.endswith(".jsonl")}
    found["again"] = launch(4, run)
    found["stored"] = {"before": before, "lines": lines, "after": stamps(many)}
    study_into(one)(sharing.Work())
    (root / "launches.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
