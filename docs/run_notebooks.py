"""Run the notebooks of demos/ and write them as .ipynb, with what they showed: for these pages, and for `make notebooks`.

    python docs/run_notebooks.py runs/notebooks

A notebook is run again only where it or the package has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMOS = ROOT / "demos"
# In the order in which they are read. smollm2 takes minutes: `make evidence` runs it, and its page is committed.
NAMES = (
    "quick_start",
    "attention_on_spans",
    "head_ablation",
    "patching",
    "safety_neurons",
    "circuit",
    "before_and_after",
    "your_own_model",
)
SLOWEST_CELL = 3600  # seconds; a whole notebook takes less than a minute where nothing else runs
PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"  # progress bars; without a kernel they are empty


def executed(name: str) -> Any:
    """The notebook with its outputs. An error in a cell is an error here."""
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(DEMOS / f"{name}.py", fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    # One thread each, as they run side by side; figures as data, so that a page needs the library but once.
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PLOTLY_RENDERER": "plotly_mimetype",
    }
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = ["--IPKernelApp.log_level=ERROR"]
    client = NotebookClient(notebook, timeout=SLOWEST_CELL, startup_timeout=300, extra_arguments=quiet)
    client.execute(env=env, cwd=str(DEMOS))
    notebook.metadata["run_on"] = datetime.now(UTC).date().isoformat()
    notebook.metadata.pop("widgets", None)
    return without_noise(notebook)


def without_noise(notebook: Any) -> Any:
    """Without progress bars and warnings, when cells ran, and the paths of this machine."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [
            output
            for output in cell.outputs
            if output.get("name") != "stderr" and WIDGET not in output.get("data", {})
        ]
        for output in cell.outputs:
            if "text" in output:
                output["text"] = output["text"].replace(str(ROOT), ".")
            elif "text/html" in output.get("data", {}):
                output["data"].pop("text/plain", None)
    return notebook


def digest(name: str) -> str:
    """Of all that an output depends on."""
    found = hashlib.sha256()
    package = [path for path in ROOT.glob("rim_lens/**/*.*") if {"cli", "__pycache__"}.isdisjoint(path.parts)]
    for path in (DEMOS / f"{name}.py", Path(__file__), ROOT / "constraints.txt", *sorted(package)):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def write_notebook(name: str, folder: Path) -> Path:
    """Run one notebook and write it, unless it lies there already as it would become."""
    import nbformat

    path, now = folder / f"{name}.ipynb", digest(name)
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["metadata"].get("rim_lens") == now:
        return path
    notebook = executed(name)
    notebook.metadata["rim_lens"] = now
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def write_notebooks(folder: Path, names: tuple[str, ...] = NAMES) -> list[Path]:
    """Run notebooks, two at a time, and write them into a folder."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda name: write_notebook(name, folder), names))


if __name__ == "__main__":
    out, *chosen = sys.argv[1:]
    for written in write_notebooks(Path(out), tuple(chosen) or NAMES):
        sys.stdout.write(f"{written}\n")
