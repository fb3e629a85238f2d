"""Importing rim_lens is cheap, measured in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LATE = {"plotly", "circuitsvis", "xarray", "anywidget", "matplotlib", "transformer_lens"}
ROOT = Path(__file__).parents[2]


def run(code: str) -> dict[str, Any]:
    """Run code in a fresh interpreter; it leaves its answer in `answer`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}\nprint(json.dumps(answer))"],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_imported_when() -> None:
    """The package alone brings nothing heavy; its names bring no plots, no arrays, and no TransformerLens."""
    answer = run(
        "import rim_lens\n"
        "answer = {'package': sorted(sys.modules)}\n"
        "for name in rim_lens.__all__: getattr(rim_lens, name)\n"
        "answer['names'] = sorted(sys.modules)"
    )
    assert not (LATE | {"torch", "transformers", "numpy"}) & set(answer["package"])
    assert not LATE & set(answer["names"])


def test_every_public_name_costs_at_most_a_quarter_of_transformer_lens() -> None:
    """Processor time in one process, TransformerLens first. A busy machine disturbs, so the least of three shares counts."""
    shares = [
        run(
            "import time\n"
            "start = time.process_time()\n"
            "import transformer_lens\n"
            "between = time.process_time()\n"
            "import rim_lens\n"
            "for name in rim_lens.__all__: getattr(rim_lens, name)\n"
            "answer = {'share': (time.process_time() - between) / (between - start)}"
        )["share"]
        for _ in range(3)
    ]
    assert min(shares) <= 0.25
