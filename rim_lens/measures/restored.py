"""Behaviour brought back by an edit: how much of a gap it closes, beside the same edit of random sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from rim_lens.errors import ImpossibleEdit
from rim_lens.hooks import Component
from rim_lens.measures.controls import Unit
from rim_lens.measures.edits import Remember, measured, measured_together
from rim_lens.measures.frames import frame_from_json, frame_to_json
from rim_lens.measures.kept import read_result, require_columns, write_result
from rim_lens.measures.readings import Reading
from rim_lens.measures.removal_table import beside_random, mean_columns
from rim_lens.measures.stats import bootstrap_interval, sign_flip_test

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1
FILE = "restored.json"
COLUMNS = (
    *("edit", "kind", "measure", "unit", "condition", "n", "n_families", "off", "baseline", "edited"),
    *("effect", "effect_low", "effect_high", "p", "restored", "restored_low", "restored_high"),
    *("random", "random_low", "random_high", "percentile", "p_controls", "n_controls", "state"),
)
MEASURED = "measured"
Values = Float[np.ndarray, " prompt"]
# heads or neurons → their editor
MakeEdit = Callable[[Sequence[Unit]], Component]


@dataclass(frozen=True)
class Edited:
    """Numbers per prompt with an edit of a set, and of each random set; or why there are none."""

    values: Values | None
    random: list[Values | None]
    state: str


def edited_by(
    reading: Reading,
    make: MakeEdit,
    members: Sequence[Unit],
    controls: Sequence[Sequence[Unit]],
    remember: Remember,
    what: str,
    progress: bool,
) -> Edited:
    """Take a reading with an edit of a set, and of each random set."""
    possible = ([edit] for one in (members, *controls) if (edit := _made(make, one)) is not None)
    measured_together(reading, possible, remember)
    try:
        values = measured(reading, [make(members)], remember)
    except ImpossibleEdit as problem:
        return Edited(None, [], str(problem))
    random: list[Values | None] = []
    for control in tqdm(controls, desc=f"random sets, {what}, {reading.batch.name}", disable=not progress):
        try:
            random.append(measured(reading, [make(control)], remember))
        except ImpossibleEdit:
            random.append(None)
    return Edited(values, random, MEASURED)


def _made(make: MakeEdit, members: Sequence[Unit]) -> Component | None:
    try:
        return make(members)
    except ImpossibleEdit:
        return None


def restored_lines(
    level: Values,
    baseline: Values,
    found: dict[str, Edited],
    families: Sequence[str],
    kind: str,
    measure: str,
    seed: int,
) -> list[dict[str, Any]]:
    """Rows of the table, one per edit: p corrected over edits, the share of the gap level − baseline that is closed."""
    there = {edit: its.values - baseline for edit, its in found.items() if its.values is not None}
    p: dict[str, float] = {}
    if there:
        stacked = np.stack(list(there.values()), axis=1)
        test = sign_flip_test(stacked, families=families, correction="max", seed=seed)
        p = dict(zip(there, np.atleast_1d(test.p).tolist(), strict=True))
    lines = []
    for edit, its in found.items():
        line: dict[str, Any] = dict.fromkeys(COLUMNS, float("nan"))
        line |= {
            "edit": edit,
            "kind": kind,
            "measure": measure,
            "unit": "share" if measure == "refuse" else "nats",
            "n": len(baseline),
            "n_families": len(set(families)),
            "off": float(level.mean()),
            "baseline": float(baseline.mean()),
            "n_controls": 0,
            "state": its.state,
        }
        if its.values is not None:
            effect = there[edit]
            line |= {"edited": float(its.values.mean()), "p": p[edit]}
            line |= mean_columns("effect", effect, families, seed)
            line |= _restored(effect, level - baseline, families, seed)
            line |= beside_random(
                float(effect.mean()),
                [float((values - baseline).mean()) for values in its.random if values is not None],
            )
        lines.append(line)
    return lines


def minus_twins(
    harmful: tuple[Values, Values, dict[str, Edited]],
    harmless: tuple[Values, Values, dict[str, Edited]],
    places: Sequence[int],
) -> tuple[Values, Values, dict[str, Edited]]:
    """Numbers of harmful requests minus those of their twins."""

    def minus(own: Values | None, twins: Values | None) -> Values | None:
        return None if own is None or twins is None else own - twins[places]

    found = {}
    for edit, its in harmful[2].items():
        theirs = harmless[2][edit]
        random = [minus(own, twins) for own, twins in zip(its.random, theirs.random, strict=False)]
        state = its.state if its.state != MEASURED else theirs.state
        found[edit] = Edited(minus(its.values, theirs.values), random, state)
    return harmful[0] - harmless[0][places], harmful[1] - harmless[1][places], found


def _restored(effect: Values, gap: Values, families: Sequence[str], seed: int) -> dict[str, float]:
    """Share of the gap that an edit closes; NaN where there is none to close."""
    shown = mean_columns("gap", gap, families, seed)
    if not shown["gap_low"] > 0:
        return dict.fromkeys(("restored", "restored_low", "restored_high"), float("nan"))

    def share(rows: np.ndarray) -> Any:
        moved, whole = rows.mean(axis=0)
        return moved / whole if whole > 0 else np.nan

    found = bootstrap_interval(np.stack([effect, gap], axis=1), list(families), share, seed=seed)
    return {
        "restored": float(found.estimate),
        "restored_low": float(found.low),
        "restored_high": float(found.high),
    }


def save_restored(table: pd.DataFrame, folder: str | Path) -> None:
    """Write a table of `restoring` or `restore_by_neurons`, with its ``attrs``, as restored.json into a folder.

    Args:
        table: What was returned, or rows of it.
        folder: Made where there is none.

    >>> import tempfile
    >>> import pandas as pd
    >>> table = pd.DataFrame({"kind": ["harmful"], "measure": ["score"], "effect": [2.5], "restored": [float("nan")]})
    >>> table.attrs = {"condition": "careful"}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_restored(table, folder)
    ...     again = load_restored(folder)
    >>> again.equals(table), again.attrs
    (True, {'condition': 'careful'})
    """
    content = {
        "format_version": FORMAT_VERSION,
        "table": frame_to_json(table),
        "settings": {str(name): value for name, value in table.attrs.items()},
    }
    write_result(folder, FILE, content)


def load_restored(folder: str | Path) -> pd.DataFrame:
    """Read what `save_restored` wrote.

    Raises:
        StudyFolderError: The file is missing or cannot be read, holds something else, or is of another format version.
    """

    def made(read: dict[str, Any]) -> pd.DataFrame:
        table = frame_from_json(read["table"])
        require_columns(table, ("kind", "measure", "effect", "restored"))
        table.attrs = dict(read["settings"])
        return table

    return read_result(folder, FILE, FORMAT_VERSION, made, "rl.save_restored")
