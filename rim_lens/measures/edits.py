"""What editing sets of heads or neurons does to a reading, set by set, none taken twice."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from rim_lens.errors import ImpossibleEdit, ReferenceMismatch
from rim_lens.hooks import Component
from rim_lens.measures.readings import Read, Reading
from rim_lens.measures.scanning import Scan, ScanBy
from rim_lens.sharing import gathered, n_processes

# heads or neurons, positions → an editor of them: `AblateHeads`, `AblateNeurons`, or one of your own
Editor = Callable[..., Component]
# Stores the numbers of one run under a key and measures none twice: a dict, or ``study_folder.lines(name).get``
Remember = Callable[[str, Callable[[], list[float]]], Sequence[float]] | MutableMapping[str, Sequence[float]]

_LONGEST_KEY = 2000
_ROUND = 60.0  # seconds after which processes that share a scan tell each other what they found


def set_effects(
    reading: Reading,
    editors: Mapping[str, Component],
    remember: Remember | None = None,
    progress: bool = False,
    what: str = "sets",
    scan: Scan | None = None,
) -> tuple[Float[np.ndarray, " prompt"], Float[np.ndarray, "prompt set"]]:
    """Return the baseline and, for each editor, edited − baseline, prompt by prompt.

    Every editor looks at the prompts before the first pass. Many editors are read together where that can be done exactly,
    see `rim_lens.measures.scanning`.

    Args:
        reading: The measure.
        editors: By name.
        remember: See `head_effects`.
        progress: Show a progress bar.
        what: Its label.
        scan: How they are read; made here when None.
    """
    for component in editors.values():
        component.check_prompts(reading.batch)
    scan = scan or scan_of(reading, editors, remember)
    remember = measured_together(reading, [[], *([one] for one in editors.values())], remember, scan)
    baseline = measured(reading, [], remember, scan)
    effects = np.empty((len(reading.batch), len(editors)))
    shown = tqdm(editors.values(), desc=f"{what} {reading.batch.name}", disable=not progress)
    for place, component in enumerate(shown):
        effects[:, place] = measured(reading, [component], remember, scan) - baseline
    return baseline, effects


def scan_of(
    reading: Reading, editors: Mapping[str, Component], remember: Remember | None, by: ScanBy = "auto"
) -> Scan:
    """How these editors are going to be read, those that are remembered left out.

    Args:
        reading: The measure.
        editors: By name.
        remember: See `head_effects`.
        by: "auto", "plain" or "rough", see `head_effects`.
    """
    return Scan(
        reading,
        [
            editor
            for editor in editors.values()
            if remember is None or not _is_known(remember, _key_of(reading, [editor]))
        ],
        by,
    )


def measured_together(
    reading: Reading,
    edits: Iterable[Sequence[Component]],
    remember: Remember | None,
    scan: Scan | None = None,
) -> Remember | None:
    """Let the processes that share the work measure what is not remembered of these edits, each its part; alone, do nothing.

    After a while they tell each other what they found, which is then remembered in all of them, and share out the rest. Where
    fewer edits than processes are left, those are read with the prompts shared. A part is never so small that it would be read
    another way than the whole; what is too few for two parts is read by all.

    Args:
        reading: The measure.
        edits: Components of each run; none of them for the baseline.
        remember: See `head_effects`.
        scan: How edits are read; learns what the scans of the parts did.

    Returns:
        Where the numbers are: what was given, or a new store.
    """
    if n_processes() == 1:
        return remember
    remember = {} if remember is None else remember
    by_key = {_key_of(reading, edit): edit for edit in edits}
    # Places, not keys, are told to the others: an editor's name may hang on this process (an address, a last bit).
    keys, asked = list(by_key), list(by_key.values())
    waiting = [place for place, key in enumerate(keys) if not _is_known(remember, key)]
    n, fewest = n_processes(), scan.fewest if scan else 1
    while len(waiting) >= n and (n_parts := sum(bool(asked[place]) for place in waiting) // fewest) > 1:

        def part(rank: int, n: int, waiting: Sequence[int] = tuple(waiting), n_parts: int = n_parts) -> Any:
            n_parts = min(n, n_parts)
            mine = waiting[rank::n_parts] if rank < n_parts else ()
            return _part(reading, {place: asked[place] for place in mine}, scan)

        for found, used, refused, error in gathered(f"{len(waiting)} edits", part):
            for place, values in found.items():
                waiting.remove(place)
                if values is not None:
                    remembered(remember, keys[place], partial(list, values))
            if scan is not None:
                scan.learn(used, refused, error)
    if scan is not None:
        scan.forget([one for place, edit in enumerate(asked) if place not in waiting for one in edit])
    return remember


def _part(
    reading: Reading, edits: Mapping[int, Sequence[Component]], scan: Scan | None
) -> tuple[dict[int, list[float] | None], bool, str, float]:
    """What this process found in a while, None for an edit that is not possible; whether in packs; why the model refused; how rough."""
    own = Scan(reading, [one for edit in edits.values() for one in edit], scan.by if scan else "plain")
    found: dict[int, list[float] | None] = {}
    begin = time.monotonic()
    for place, edit in edits.items():
        if found and time.monotonic() - begin > _ROUND and not own.holds(edit):
            break
        try:
            found[place] = own(edit).tolist()
        except ImpossibleEdit:
            found[place] = None
    return found, own.used, own.refused, own.error


def _is_known(remember: Remember, key: str) -> bool:
    if isinstance(remember, MutableMapping):
        return key in remember
    try:
        remember(key, _nothing)
    except _NotKnown:
        return False
    return True


def _nothing() -> list[float]:
    raise _NotKnown


class _NotKnown(Exception):
    """What is not remembered was not to be measured."""


def remembered(remember: Remember, key: str, measure: Callable[[], Any]) -> Any:
    """What is remembered under a key, measured first where nothing is."""
    if not isinstance(remember, MutableMapping):
        return remember(key, measure)
    if key not in remember:
        remember[key] = measure()
    return remember[key]


def measured(
    reading: Reading,
    components: Sequence[Component],
    remember: Remember | None,
    read: Read | None = None,
) -> Float[np.ndarray, " prompt"]:
    """Take a reading with components active, or from what is remembered of it.

    Args:
        reading: The measure.
        components: None of them for the baseline.
        remember: See `head_effects`.
        read: What takes the reading, instead of `reading` itself: a `Scan` of it.

    Raises:
        ReferenceMismatch: What is remembered belongs to another number of prompts.
    """
    read = read or reading
    if remember is None:
        return read(components)
    key = _key_of(reading, components)

    values = remembered(remember, key, lambda: read(components).tolist())
    if len(values) != len(reading.batch):
        raise ReferenceMismatch(
            f"{len(values)} numbers are remembered for {key!r}, and there are {len(reading.batch)} prompts. Use another store"
            " for other prompts."
        )
    return np.asarray(values, dtype=np.float64)


def _key_of(reading: Reading, components: Sequence[Component]) -> str:
    """What a run is found by; the many neurons of a large set by their digest."""
    told = f"{reading.name}: {', '.join(map(repr, components)) or 'baseline'}"
    if len(told) <= _LONGEST_KEY:
        return told
    return f"{told[:_LONGEST_KEY]}…{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def editor_name(editor: Editor) -> str:
    """An editor in words, with its settings."""
    inner = getattr(editor, "func", editor)
    name = getattr(inner, "__name__", type(inner).__name__)
    settings = getattr(editor, "keywords", {})
    shown = [f"{key}={value!r}" for key, value in settings.items() if isinstance(value, (str, int, float))]
    return f"{name}({', '.join(shown)})" if shown else str(name)
