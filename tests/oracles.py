"""The table of oracles in docs/oracles.md: each editor, what it was held against, and the largest difference.

A test marked ``oracle(editor, against)`` that runs with ``--oracles FILE`` leaves there the largest difference that its
`tests.families.close` saw, by family and TransformerLens version; ``python -m tests.oracles`` writes the page from it.
The same tests, with their tolerance, run in every suite: the page shows by how much they pass.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

How = Literal["pass", "cache"]

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "docs" / "evidence" / "oracles.json"
PAGE = ROOT / "docs" / "oracles.md"

_seen: dict[How, float] | None = None
_found: dict[str, Any] = {}


def saw(difference: float, how: How) -> None:
    """Note a difference of the test under way, if it is an oracle's."""
    if _seen is not None:
        _seen[how] = max(difference, _seen.get(how, 0.0))


@contextmanager
def watching(editor: str, against: str, family: str, architecture: str) -> Iterator[None]:
    """Keep the largest differences that are seen within the context."""
    global _seen  # noqa: PLW0603 - `close` is called from everywhere and knows nothing of the test
    _seen = {}
    try:
        yield
    finally:
        seen, _seen = _seen, None
    row = _found.setdefault(editor, {}).setdefault(against, {})
    cell = row.setdefault(f"{family} {version('transformer-lens')}", {})
    for how, difference in seen.items():
        entry = cell.setdefault(how, {"largest": 0.0, "architectures": []})
        entry["largest"] = max(entry["largest"], difference)
        entry["architectures"] = sorted({*entry["architectures"], architecture})


def write(path: Path) -> None:
    """Merge what was seen into the file: what other families and versions left there stays."""
    from rim_lens.provenance import provenance

    before = json.loads(path.read_text(encoding="utf-8"))["oracles"] if path.exists() else {}
    for editor, rows in _found.items():
        for against, cells in rows.items():
            before.setdefault(editor, {}).setdefault(against, {}).update(cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = provenance("make evidence-oracles")
    path.write_text(json.dumps(head | {"oracles": before}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def page(found: dict[str, Any]) -> str:
    """The page, from the file's content."""
    columns = sorted(
        {column for rows in found["oracles"].values() for cells in rows.values() for column in cells}
    )
    lines = [
        "# Oracles: what each editor was held against",
        "",
        "Each editor against an independent way to the same logits, on the plain Hugging Face model of the same weights: its",
        "weights changed, or its projections' inputs and attention scores edited by hand with loops. Random models of four",
        "architectures (two GPT-2, Llama and Qwen3 with grouped queries; logits of size 1 to 10), left-padded prompts of unequal",
        "length. A cell is the largest absolute difference of any logit, in one full pass / in generation step by step under a",
        "key-value cache; – where that was not run. *bridge* is TransformerBridge, *compat_plain* the bridge in compatibility mode,",
        "*hooked* HookedTransformer; the number is TransformerLens's version.",
        "",
        "That two computations agree shows that the edit is the one that is named. It does not show that the edit is the right",
        "one for a question.",
        "",
        f"`{found['command']}`, {found['date']}, torch {found['versions']['torch']} (CPU, float32). The tests behind it run in `make test`.",
        "",
        "| Editor | Held against | " + " | ".join(columns) + " |",
        "| --- | --- |" + " --- |" * len(columns),
    ]
    for editor, rows in sorted(found["oracles"].items()):
        for against, cells in rows.items():
            told = " | ".join(_cell(cells.get(column)) for column in columns)
            lines.append(f"| {editor} | {against} | {told} |")
    return "\n".join(lines) + "\n"


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    return " / ".join(f"{cell[how]['largest']:.0e}" if how in cell else "–" for how in ("pass", "cache"))


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(EVIDENCE.read_text(encoding="utf-8"))), encoding="utf-8")
