"""Tables as JSON and back, with their types and without NaN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def frame_to_json(table: pd.DataFrame) -> dict[str, Any]:
    """Return column types and rows; NaN becomes None.

    >>> import pandas as pd
    >>> frame_to_json(pd.DataFrame({"layer": [0], "effect": [float("nan")]}))
    {'columns': {'layer': 'int64', 'effect': 'float64'}, 'rows': [[0, None]]}
    """
    rows = [
        [None if isinstance(cell, float) and np.isnan(cell) else cell for cell in row]
        for row in table.astype(object).values.tolist()
    ]
    return {"columns": {name: str(dtype) for name, dtype in table.dtypes.items()}, "rows": rows}


def frame_from_json(read: dict[str, Any]) -> pd.DataFrame:
    """Return the table that `frame_to_json` wrote."""
    import pandas as pd

    return pd.DataFrame(read["rows"], columns=list(read["columns"])).astype(read["columns"])
