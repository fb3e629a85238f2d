"""`make bench`: each figure and its rival in one run, as docs/evidence/bench.json and the tables in docs/speed.md.

Ratios of CPU-seconds of this process, not times, as other work on a machine slows a run down; rival and figure run in turns, so that
both see the same machine. Nothing here is asserted but that the numbers agree. Parts may be named, and are then run alone: the
others' figures stay as they were, each part with its own day, versions and load.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from rim_lens.provenance import provenance
from tests.benchmarks import capture, profiles, scans, streaming, writing
from tests.benchmarks.page import EVIDENCE, PAGE, written

# By name: the figures of a part, given the number of prompts, which the scans alone ask about
Part = Callable[[int], Iterator[dict[str, Any]]]
SCANS: dict[str, Part] = {
    "last-row": scans.last_row,
    "all-rows": scans.all_rows,
    "all-rows-apart": scans.all_rows_apart,
    "gradients": scans.gradients,
    "last-row-hooked": partial(scans.last_row, family="hooked"),
    "all-rows-hooked": partial(scans.all_rows, family="hooked"),
    "profiles": profiles.profiles,
}
PARTS: dict[str, Part] = {
    **{f"capture-{length}": partial(capture.at, length) for length in capture.LENGTHS},
    "streaming": streaming.streaming,
    "writing": writing.writing,
    **SCANS,
}
HOOKED = [name for name in PARTS if name.endswith("-hooked")]  # on TransformerLens 2 or 3


def main(n_prompts: int, names: list[str]) -> None:
    for name in names:
        figures: list[dict[str, Any]] = []
        for figure in PARTS[name](n_prompts):
            figures.append(figure)
            sys.stdout.write(f"{name}: {json.dumps(figure, ensure_ascii=False)}\n")
            sys.stdout.flush()
        command = f"make bench PARTS={name}" + (f" PROMPTS={n_prompts}" if name in SCANS else "")
        part = provenance(command, ("torch", "transformers", "transformer-lens")) | {
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "figures": figures,
        }
        # Read anew: another part may have been run meanwhile.
        parts = json.loads(EVIDENCE.read_text(encoding="utf-8"))["parts"] | {name: part}
        found = {"parts": {key: parts[key] for key in PARTS if key in parts}}
        EVIDENCE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(written(), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--prompts", type=int, default=24, help="of the scans")
    parser.add_argument(
        "parts", nargs="*", help=f"of {', '.join(PARTS)}; none for all but the last {len(HOOKED)}"
    )
    asked = parser.parse_args()
    unknown = [name for name in asked.parts if name not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]!r} was asked for; there are {', '.join(PARTS)}")
    main(asked.prompts, asked.parts or [name for name in PARTS if name not in HOOKED])
