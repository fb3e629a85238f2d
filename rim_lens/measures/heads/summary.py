"""Where each head looks in two conditions, averaged over the prompts of each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rim_lens.measures.heads.looking import (
    CONDITIONS,
    argmax_in,
    argmax_shift,
    entropy_share,
    mass,
    mass_shift,
    matched,
    present,
    told,
)

if TYPE_CHECKING:
    import xarray as xr


def head_statistics(
    first: xr.Dataset, second: xr.Dataset, *, leaves: str = "assistant", enters: str = "gap"
) -> xr.Dataset:
    """Where each head looks in two conditions, averaged over the prompts of each kind.

    Where a head looks does not show what it does: a decoy can look just as a head that carries refusal. `head_effects` measures
    that.

    Args:
        first: From ``rl.capture(model, open_, rl.SpanAttention())``; harmful and harmless requests together, or of one
            kind only (join two with ``xr.concat([...], "kind")``).
        second: The same of the same requests in another condition.
        leaves: See `argmax_shift`.
        enters: See `argmax_shift`.

    Returns:
        Dataset with dimensions ``kind`` (as the records say, in the order met), ``layer`` and ``head``:

        - ``argmax_shift``: share of prompts whose argmax leaves `leaves` and enters `enters` (paper, section 3).
        - ``mass_shift``: mean mass on `leaves`, first − second (positive: the second condition takes attention away).
        - ``n_prompts`` (kind).

        and, with a dimension ``condition`` ("first", "second"; the attributes say which those are):

        - ``leaves_mass``, ``enters_mass``: mean mass on each; NaN in a condition where some prompt has no such token.
        - ``sink_mass``, ``sink_argmax``: mean mass on the first token, and share of prompts whose argmax it is.
        - ``entropy`` in nats and ``entropy_share`` of the log of the visible keys, means.

    Raises:
        EmptySpan: Some prompt has no token in `leaves` in the first condition, or in `enters` in the second.
        CaptureError: A span was not read; `rl.SpanAttention()` without names reads all there are.
        StatisticsError: The datasets are not of the same prompts, or are of no single row per prompt.
    """
    import xarray as xr

    first, second = matched(first, second)
    numbers: dict[str, xr.DataArray] = {
        "argmax_shift": argmax_shift(first, second, leaves=leaves, enters=enters),
        "mass_shift": mass_shift(first, second, leaves),
    }
    units = first["attention_mass"].attrs.get("units", "")
    notes = {"argmax_shift": "share of prompts", "mass_shift": units, "sink_argmax": "share of prompts"}
    for name, span, optional in (
        ("leaves_mass", leaves, "second"),
        ("enters_mass", enters, "first"),
        ("sink_mass", "sink", ""),
    ):
        notes[name] = units
        numbers[name] = _both(
            [
                xr.full_like(data["attention_entropy"], np.nan)
                if condition == optional and span not in present(data)
                else mass(data, span).drop_vars("span")
                for condition, data in zip(CONDITIONS, (first, second), strict=True)
            ]
        )
    numbers["sink_argmax"] = _both([argmax_in(data, "sink") for data in (first, second)])
    numbers["entropy"] = _both([data["attention_entropy"] for data in (first, second)])
    numbers["entropy_share"] = _both([entropy_share(data) for data in (first, second)])
    notes |= {"entropy": "nats", "entropy_share": "share of the log of the visible keys"}
    kinds = first["kind"].values.tolist()
    order = list(dict.fromkeys(kinds))
    data = xr.Dataset(
        {
            name: xr.concat(
                [values.isel(prompt=[at for at, own in enumerate(kinds) if own == kind]).mean("prompt") for kind in order],
                dim="kind",
            )
            for name, values in numbers.items()
        }
    )  # fmt: skip
    data = data.assign_coords(kind=order)
    data["n_prompts"] = ("kind", [kinds.count(kind) for kind in order])
    for name, unit in notes.items():
        data[name].attrs = {"units": unit}
    data.attrs = {**told(first, second), "leaves": leaves, "enters": enters}
    return data.transpose("condition", "kind", "layer", "head")


def _both(values: list[xr.DataArray]) -> xr.DataArray:
    """Stack two conditions; what is known of a prompt may differ between them, and is left behind."""
    import xarray as xr

    bare = [array.reset_coords(drop=True) for array in values]
    return xr.concat(bare, dim="condition").assign_coords(condition=list(CONDITIONS))
