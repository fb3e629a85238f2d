"""What happens when heads are edited, one by one, in sets and in pairs; every number is an intervention, none an estimate.

effect = edited − baseline, in the unit of the `Reading` (nats of refusal log-odds: negative means that it refuses less).
An effect tells that the model, as it stands, uses the head. It does not tell that this is about refusal (measure the
twins as well, see `specificity`), that the head works alone, or what would take its place after training.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rim_lens.errors import UnknownHead
from rim_lens.hooks import AblateHeads
from rim_lens.hooks.positions import Positions, told
from rim_lens.lens import Head, model_facts
from rim_lens.measures.edits import Editor, Remember, editor_name, scan_of, set_effects
from rim_lens.measures.readings import Reading, require_reading
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.scanning import ScanBy

if TYPE_CHECKING:
    import xarray as xr


def head_name(head: Head) -> str:
    """A head in words.

    >>> head_name((1, 5))
    'L1H5'
    """
    return f"L{int(head[0])}H{int(head[1])}"


def set_name(heads: Iterable[Head]) -> str:
    """A set of heads in words, whatever their order.

    >>> set_name([(2, 0), (1, 5)])
    'L1H5+L2H0'
    """
    return "+".join(map(head_name, sorted(set(heads))))


def head_effects(
    reading: Reading,
    sets: Iterable[Head | Iterable[Head]],
    *,
    remember: Remember | None = None,
    editor: Editor = AblateHeads,
    positions: Positions = "all",
    scan: ScanBy = "auto",
    progress: bool = False,
) -> xr.DataArray:
    """Effect of editing heads, one set at a time: edited − baseline, prompt by prompt.

    Effects on the refusal score (`refusal_reading`) are read many sets at a time on a bridge in float32: only what a set can
    change is computed again, see docs/speed.md. A few of the numbers are held against plain readings in every scan, and where
    they differ (by more than 1e-4 nats and 1e-5 of the score) a warning says so and each set is read by itself. Everything else takes one reading for
    each set and one for the baseline.

    An effect says that the model needs this output here. It does not say what the output means, nor that it is about refusal
    (twins and random sets tell that from damage), nor that a head without one does nothing: heads that stand in for each other
    show nothing one by one, see `pair_interactions`.

    Args:
        reading: What effects are read by.
        sets: Heads, lists of heads, or both. A set named twice is measured once.
        remember: Where the numbers of each run are kept as soon as they are measured, and taken from if they are there:
            a dict, or a function ``(key, measure) → numbers`` such as a study's. Keys name measure, prompts and editor,
            not the model: use one store per model.
        editor: Called as ``editor(heads, positions=positions)``. `AblateHeads` zeroes, as the paper does; others:
            ``functools.partial(AblateHeads, method="mean", reference=batch)``, the same with "resample",
            ``functools.partial(ScaleHeads, factor=0.5)``.
        positions: Rows that are edited, see `AblateHeads`. With "all" also what is written meanwhile.
        scan: "auto", or "plain" for one reading per set whatever could be done. "rough": many at a time in half precision as
            well; its error, which is told by a warning and in the attribute ``scan``, may exceed most effects: use it to rank
            heads, and confirm the first of them in float32.
        progress: Show a progress bar.

    Returns:
        DataArray (prompt, set): coordinate ``set`` with names such as "L1H5" or "L1H5+L2H0", and beside it ``n_heads``
        (set), ``family`` and ``baseline`` (prompt). The attribute ``scan`` says which way numbers were measured: "packed",
        or "plain" and why.

    Raises:
        UnknownHead: A set is empty, or the model lacks one of its heads.
        ValueError: `scan` is none of these, or rough numbers are to be remembered, where they would pass for exact ones.
        ReferenceMismatch: What is remembered belongs to another number of prompts.
        RimLensError: As the editor and the measure.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:4], think="off")
    >>> effects = rl.head_effects(rl.refusal_reading(model, off), [(1, 1), (1, 2), [(1, 1), (1, 2)]])
    >>> (effects.mean("prompt") < -10).to_series().to_dict()
    {'L1H1': True, 'L1H2': False, 'L1H1+L1H2': True}
    """
    import xarray as xr

    require_reading(reading, "head_effects")
    if scan == "rough" and remember is not None:
        raise ValueError(
            "scan='rough' was asked for with remember=; rough numbers would be taken for exact ones later. Leave one out."
        )
    named = _named(reading, sets)
    editors = {name: editor(heads, positions=positions) for name, heads in named.items()}
    how = scan_of(reading, editors, remember, scan)
    baseline, effects = set_effects(reading, editors, remember, progress, "heads", how)
    if how.error:
        warnings.warn(how.told, RuntimeWarning, stacklevel=2)
    return xr.DataArray(
        effects,
        dims=("prompt", "set"),
        coords={
            "prompt": [prompt.id for prompt in reading.batch.prompts],
            "family": ("prompt", families_of(reading.batch.prompts)),
            "baseline": ("prompt", baseline),
            "set": list(named),
            "n_heads": ("set", [len(heads) for heads in named.values()]),
        },
        name="effect",
        attrs={
            "units": reading.units,
            "sign": "edited − baseline",
            "reading": reading.name,
            "editor": editor_name(editor),
            "positions": told(positions),
            "scan": how.told,
        },
    )


def _named(reading: Reading, sets: Iterable[Head | Iterable[Head]]) -> dict[str, list[Head]]:
    facts = model_facts(reading.model)
    named: dict[str, list[Head]] = {}
    for item in sets:
        members: list[Any] = list(item) if isinstance(item, Iterable) else [item]
        # (1, 5) is a head, ((1, 5), (2, 0)) a set of two
        heads = [tuple(members)] if members and not isinstance(members[0], Iterable) else members
        checked = sorted(facts.check_heads(heads))
        if not checked:
            raise UnknownHead("a set without heads was given; the baseline is measured anyway, leave it out.")
        named[set_name(checked)] = checked
    return named
