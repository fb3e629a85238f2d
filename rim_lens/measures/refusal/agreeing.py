"""How far two judges, or two measures, agree beyond chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from rim_lens.errors import NotEnoughData, StatisticsError
from rim_lens.measures.refusal.rates import VERDICTS
from rim_lens.measures.stats import Families, bootstrap_interval, family_index

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Agreement:
    """Cohen's κ of two judges with what it is made of.

    Attributes:
        kappa: 1 is full agreement, 0 what two judges with these habits would show by chance. NaN where undefined.
        low: Lower end of the bootstrap interval over families; NaN where undefined.
        high: Upper end.
        n: Replies both judged.
        n_families: Independent units behind them.
        observed: Share of replies on which they agree.
        expected: Share on which they would agree by chance, given how often each says what.
        table: Counts, first judge in rows, second in columns.
        reason: Why `kappa` or its interval is NaN, else "".
        n_undefined: Resamples on which κ was undefined; left out of the interval.
    """

    kappa: float
    low: float
    high: float
    n: int
    n_families: int
    observed: float
    expected: float
    table: pd.DataFrame
    reason: str = ""
    n_undefined: int = 0

    def __str__(self) -> str:
        told = (
            f"κ undefined ({self.reason})"
            if np.isnan(self.kappa)
            else f"κ = {self.kappa:.2f} [{self.low:.2f}, {self.high:.2f}]"
        )
        return f"{told}, agree on {self.observed:.2f} (n = {self.n})"


def agreement(
    first: Any, second: Any, families: Families | None = None, *, level: float = 0.95, seed: int = 0
) -> Agreement:
    """Cohen's κ between two judges of the same replies (Cohen 1960), with an interval over families.

    κ = (observed − expected) / (1 − expected). It depends on how often each verdict occurs: where nearly all replies
    are refusals it is low or undefined although the judges agree, so read the table and the observed share beside it.
    It says nothing about which judge is right.

    Args:
        first: Verdicts, in order; or what `judge_all` or `generate` gave. Any labels will do.
        second: The same for the other judge.
        families: One label per reply. None: those of `judge_all`'s table where there is one, else each its own.
        level: Nominal coverage.
        seed: Of the bootstrap.

    Raises:
        NotEnoughData: No reply.
        StatisticsError: The two judged other replies, or another number.

    >>> print(agreement(["refuse"] * 6 + ["comply"] * 4, ["refuse"] * 5 + ["comply"] * 5))
    κ = 0.80 [0.29, 1.00], agree on 0.90 (n = 10)
    """
    import pandas as pd

    one, one_ids, its_families = _verdicts(first)
    two, two_ids, other_families = _verdicts(second)
    if len(one) != len(two) or (one_ids and two_ids and one_ids != two_ids):
        raise StatisticsError(
            f"the judges saw {len(one)} and {len(two)} replies, or not the same ones in the same order; κ compares"
            " verdicts on the same replies."
        )
    if not one:
        raise NotEnoughData("agreement over no reply is undefined.")
    if families is None:
        families = its_families or other_families or None
    index, n_families = family_index(families, len(one))
    seen = {*one, *two}
    labels = [label for label in VERDICTS if label in seen] + sorted(seen - set(VERDICTS))
    codes = np.array([[labels.index(a), labels.index(b)] for a, b in zip(one, two, strict=True)], dtype=float)
    counts = _counts(codes, len(labels))
    observed, expected = _shares(counts)
    low = high = float("nan")
    n_undefined = 0
    reason = ""
    value = kappa(counts)
    if np.isnan(value):
        reason = f"both judges say {labels[0]!r} of every reply, so that agreement by chance is complete"
    elif n_families < 2:
        reason = "all replies are of one family: no interval"
    else:
        interval = bootstrap_interval(
            codes, index, lambda rows: kappa(_counts(rows, len(labels))), level, seed=seed
        )
        low, high, n_undefined = float(interval.low), float(interval.high), interval.n_undefined
    table = pd.DataFrame(
        counts.astype(int), index=pd.Index(labels, name="first"), columns=pd.Index(labels, name="second")
    )
    return Agreement(value, low, high, len(one), n_families, observed, expected, table, reason, n_undefined)


def kappa(counts: Float[np.ndarray, "label label"]) -> float:
    """Cohen's κ of a square table of counts; NaN where agreement by chance is complete.

    >>> kappa(np.array([[20, 5], [10, 15]]))
    0.4
    """
    observed, expected = _shares(counts)
    return float("nan") if expected >= 1 else round((observed - expected) / (1 - expected), 12)


def _shares(counts: Float[np.ndarray, "label label"]) -> tuple[float, float]:
    n = counts.sum()
    expected = float((counts.sum(axis=1) * counts.sum(axis=0)).sum() / n**2)
    return float(np.trace(counts) / n), expected


def _counts(codes: Float[np.ndarray, "reply judge"], n_labels: int) -> Float[np.ndarray, "label label"]:
    counts = np.zeros((n_labels, n_labels))
    np.add.at(counts, (codes[:, 0].astype(int), codes[:, 1].astype(int)), 1)
    return counts


def _verdicts(given: Any) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Verdicts, and ids and families where they are known."""
    if hasattr(given, "outcome") and hasattr(given, "batch"):
        prompts = given.batch.prompts
        return (
            list(given.outcome),
            [(prompt.id, given.batch.name) for prompt in prompts],
            [prompt.family or prompt.id for prompt in prompts],
        )
    if hasattr(given, "columns"):
        return (
            [str(verdict) for verdict in given["verdict"]],
            list(zip(given["prompt"], given["condition"], strict=True)),
            [str(family) for family in given["family"]],
        )
    values: Sequence[Any] = list(given)
    return [str(value) for value in values], [], []
