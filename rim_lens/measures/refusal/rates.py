"""Shares of replies that refuse, comply or do neither, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rim_lens.chat import SpanBatch
from rim_lens.errors import ConditionError, NotEnoughData, StatisticsError
from rim_lens.generation import Generation
from rim_lens.measures.stats import (
    Families,
    Interval,
    bootstrap_interval,
    family_index,
    proportion_interval,
)
from rim_lens.prompts.records import Prompt

if TYPE_CHECKING:
    import pandas as pd

VERDICTS = ("refuse", "comply", "other")


@dataclass(frozen=True)
class Rate:
    """A share of prompts with its interval.

    Attributes:
        value: Share between 0 and 1.
        low: Lower end of the 95 % Wilson interval.
        high: Upper end.
        n: Prompts.
        counts: How many refuse, comply, or do neither.
    """

    value: float
    low: float
    high: float
    n: int
    counts: dict[str, int]

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] (n = {self.n})"


def refusal_rate(generated: Generation | Sequence[str]) -> Rate:
    """Share of replies that refuse, in the answer or inside the think block.

    Replies that neither refuse nor comply are counted apart: a fall of this rate need not be compliance. The
    interval treats prompts as independent; where they come in families it is too narrow, and `refusal_rates` is the
    better one.

    Args:
        generated: What `generate` gave, or its outcomes.

    Raises:
        ConditionError: Prompts were given and no replies.
        NotEnoughData: No reply.
        ValueError: An outcome is none of refuse, comply and other.
    """
    if isinstance(generated, SpanBatch):
        raise ConditionError(
            "refusal_rate counts replies, and was given prompts. Let the model write first: rl.generate(model, batch)."
        )
    outcomes = list(generated.outcome if isinstance(generated, Generation) else generated)
    check_verdicts(outcomes)
    if not outcomes:
        raise NotEnoughData("a refusal rate over no reply is undefined.")
    counts = {verdict: outcomes.count(verdict) for verdict in VERDICTS}
    share = proportion_interval(counts["refuse"], len(outcomes))
    return Rate(float(share.estimate), float(share.low), float(share.high), len(outcomes), counts)


def refusal_rates(
    generated: Generation | Iterable[Generation],
    by: str | Callable[[Prompt], str] = "kind",
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of replies that refuse, per condition and group of prompts, with intervals over families.

    Args:
        generated: What `generate` gave, once or for several conditions.
        by: Field of the record ("kind", "category", "split", …), or a function of it.
        seed: Of the bootstrap.

    Returns:
        One row per condition and group: condition, group, refused (share), low, high, n, n_families, refuse, comply,
        other, refuse_in_think (of the refusals, those inside the think block), closed_by_force, empty. Intervals are
        those of `share_interval`.

    Raises:
        NotEnoughData: No reply.
    """
    import pandas as pd

    every = [generated] if isinstance(generated, Generation) else list(generated)
    if not any(len(one.outcome) for one in every):
        raise NotEnoughData("refusal rates over no reply are undefined.")

    def group_of(prompt: Prompt) -> str:
        return str(by(prompt) if callable(by) else getattr(prompt, by))

    lines = []
    for one in every:
        groups = [group_of(prompt) for prompt in one.batch.prompts]
        for group in dict.fromkeys(groups):
            rows = [row for row, its in enumerate(groups) if its == group]
            verdicts = [one.outcome[row] for row in rows]
            families = [families_of(one.batch.prompts)[row] for row in rows]
            share = share_interval([verdict == "refuse" for verdict in verdicts], families, seed=seed)
            lines.append(
                {
                    "condition": one.batch.name,
                    "group": group,
                    "refused": float(share.estimate),
                    "low": float(share.low),
                    "high": float(share.high),
                    "n": share.n,
                    "n_families": share.n_families,
                    **{verdict: verdicts.count(verdict) for verdict in VERDICTS},
                    "refuse_in_think": sum(
                        one.outcome[row] == "refuse" and one.where[row] == "think" for row in rows
                    ),
                    "closed_by_force": sum(one.closed_by_force[row] for row in rows),
                    "empty": sum(one.ending[row] == "empty" for row in rows),
                }
            )
    return pd.DataFrame(lines)


def share_interval(
    hits: Sequence[bool] | np.ndarray, families: Families | None = None, *, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of a share of requests that come in families.

    Where every request is its own family: Wilson's. Where families have several requests: resampled by family. Where
    all or none are hits, resampling gives no width: then Wilson's, with families counted instead of requests, as if
    the requests of a family all said the same.

    Args:
        hits: One truth value per request.
        families: One label per request.
        level: Nominal coverage.
        seed: Of the bootstrap.

    Raises:
        NotEnoughData: No request.

    >>> round(float(share_interval([True] * 10).low), 3), round(float(share_interval([True] * 10, ["a", "b"] * 5).low), 3)
    (0.722, 0.342)
    """
    values = np.asarray(hits, dtype=np.float64).reshape(-1)
    if not len(values):
        raise NotEnoughData("a share over no request is undefined.")
    index, n_families = family_index(families, len(values))
    n_hits = int(values.sum())
    if n_families == len(values):
        return proportion_interval(n_hits, len(values), level)
    if 0 < n_hits < len(values) and n_families > 1:
        return bootstrap_interval(values, index, level=level, seed=seed)
    share = values.mean()
    narrow = proportion_interval(round(share * n_families), n_families, level)
    return Interval(
        narrow.low, narrow.high, np.asarray(share)[()], len(values), n_families, level, narrow.n_undefined
    )


def families_of(prompts: Sequence[Prompt]) -> list[str]:
    """Family of each prompt; one without a family is its own."""
    return [prompt.family or prompt.id for prompt in prompts]


def check_verdicts(verdicts: Iterable[object]) -> None:
    """Refuse what is no verdict.

    Raises:
        StatisticsError: One is none of refuse, comply and other.
    """
    strange = next((verdict for verdict in verdicts if verdict not in VERDICTS), None)
    if strange is not None:
        raise StatisticsError(f"{strange!r} is no outcome; there are 'refuse', 'comply' and 'other'.")
