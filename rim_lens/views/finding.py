"""What a study says: findings, each with how sure it is, and the words they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from rim_lens.errors import StudyFolderError
from rim_lens.measures.heads.table import HeadRule
from rim_lens.views.words import share

if TYPE_CHECKING:
    import pandas as pd

Status = Literal["shown", "not shown", "cannot tell", "note"]

LEVEL = 0.05  # a p-value above it shows nothing
HIGH = 95.0  # percentile among random sets from which an effect counts as set apart from them
# Most of an effect may be shared with the twins, but not nearly all: as for single heads.
SPECIFIC = HeadRule().min_specific


@dataclass(frozen=True)
class Finding:
    """One thing a study says.

    Attributes:
        topic: A few words.
        status: "shown", "not shown" (which is not shown absent), "cannot tell" (too little data), or "note".
        text: Plain text with the numbers; not safe in HTML.
    """

    topic: str
    status: Status
    text: str

    def to_dict(self) -> dict[str, str]:
        """The finding as plain data."""
        return asdict(self)


def share_of(shares: pd.DataFrame, model: str, kind: str, condition: str) -> Mapping[str, Any]:
    """The row of `numbers.outcome_shares` of one model, kind of request and condition.

    Raises:
        StudyFolderError: There is none: the folder is incomplete.
    """
    rows = shares[(shares["model"] == model) & (shares["kind"] == kind) & (shares["condition"] == condition)]
    if len(rows) != 1:
        raise StudyFolderError(
            f"the outcomes of model {model!r}, {kind} requests, condition {condition!r} were looked for and"
            f" {len(rows)} found: the folder is incomplete. Run the study again with the same folder."
        )
    row: Mapping[str, Any] = rows.iloc[0].to_dict()
    return row


def refused_of(row: Mapping[str, Any], what: str = "") -> str:
    """How many were refused, of a row of `numbers.outcome_shares`."""
    interval = f"({share(row['share'])} [{share(row['low'])}, {share(row['high'])}])"
    return f"{int(row['refuse'])} of {int(row['n'])}{' ' + what if what else ''} {interval}"


def rate_of(rate: Mapping[str, Any], what: str) -> str:
    """How many were refused, of a `RefusalRate` as a gate keeps it."""
    interval = f"({share(rate['value'])} [{share(rate['low'])}, {share(rate['high'])}])"
    return f"{rate['counts']['refuse']} of {rate['n']} {what} {interval}"


def excludes_zero(interval: Mapping[str, float]) -> bool:
    """Whether an interval lies on one side of zero."""
    return interval["low"] > 0 or interval["high"] < 0
