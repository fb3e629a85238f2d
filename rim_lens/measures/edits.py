"""What editing sets of heads or neurons does to a reading, set by set, none taken twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from rim_lens.errors import ReferenceMismatch
from rim_lens.hooks import Component
from rim_lens.measures.readings import Read, Reading
from rim_lens.measures.scanning import Scan, ScanBy

# heads or neurons, positions → an editor of them: `AblateHeads`, `AblateNeurons`, or one of your own
Editor = Callable[..., Component]
# Stores the numbers of one run under a key and measures none twice: a dict, or ``study_folder.lines(name).get``
Remember = Callable[[str, Callable[[], list[float]]], Sequence[float]] | MutableMapping[str, Sequence[float]]

_LONGEST_KEY = 2000


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
    baseline = measured(reading, [], remember, scan)
    effects = np.empty((len(reading.batch), len(editors)))
    shown = tqdm(editors.values(), desc=f"{what} {reading.batch.name}", disable=not progress)
    for place, component in enumerate(shown):
        effects[:, place] = measured(reading, [component], remember, scan) - baseline
    return baseline, effects


def scan_of(
    reading: Reading, editors: Mapping[str, Component], remember: Remember | None, by: ScanBy = "auto"
) -> Scan:
    """How these editors are going to be read, those that are remembered left out where that can be seen.

    Args:
        reading: The measure.
        editors: By name.
        remember: See `head_effects`.
        by: "auto" or "plain", see `head_effects`.
    """
    known = remember if isinstance(remember, MutableMapping) else {}
    return Scan(
        reading, [editor for editor in editors.values() if _key_of(reading, [editor]) not in known], by
    )


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

    def measure() -> list[float]:
        return read(components).tolist()

    if isinstance(remember, MutableMapping):
        if key not in remember:
            remember[key] = measure()
        values = remember[key]
    else:
        values = remember(key, measure)
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
