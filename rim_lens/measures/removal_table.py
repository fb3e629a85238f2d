"""From numbers per prompt to the tables of `removal_effects` and `neuron_effects`: shares, intervals, tests and the place among random sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.generation import generate
from rim_lens.hooks.base import Component
from rim_lens.lens import Model
from rim_lens.measures.controls import Unit, control_p, percentile_among
from rim_lens.measures.readings import Reading
from rim_lens.measures.refusal.rates import VERDICTS, families_of, share_interval
from rim_lens.measures.stats import bootstrap_interval, family_index, sign_flip_test
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    *("measure", "kind", "condition", "unit", "n", "n_families"),
    *("before", "before_low", "before_high", "after", "after_low", "after_high"),
    *("change", "change_low", "change_high", "p"),
    *("random", "random_low", "random_high", "percentile", "p_controls", "n_controls"),
)
SHARE = "share"
DIFFERENCE = "harmful − harmless"
Values = Float[np.ndarray, " prompt"]


@dataclass(frozen=True)
class Line:
    """A row of the table to be: numbers per prompt, before, and after the edit of the set and of each random set."""

    measure: str
    kind: str
    condition: str
    unit: str
    prompts: Sequence[Prompt]
    before: Values
    edited: Sequence[Values] = field(repr=False)
    families: Sequence[str] = ()  # of `witnesses`; none given: the prompts' own

    @property
    def units_of_chance(self) -> Sequence[str]:
        """The family of each prompt: what tests and intervals take for one witness."""
        return self.families or families_of(self.prompts)

    @property
    def after(self) -> Values:
        """With the set in question edited."""
        return self.edited[0]

    @property
    def random(self) -> list[float]:
        """Mean change by each random set."""
        return [float((values - self.before).mean()) for values in self.edited[1:]]


# --- what was written --------------------------------------------------------------------------------

_IN_THINK, _EMPTY = len(VERDICTS), 2 * len(VERDICTS)


def written_reading(
    model: Model, batch: SpanBatch, chat: ChatFormat, max_rows: int, writing: Mapping[str, Any]
) -> Reading:
    """What each reply is, as one number: the verdict's place, plus marks for one found in thought and for no words."""

    def read(components: Sequence[Component]) -> Values:
        out = generate(model, batch, *components, chat=chat, max_rows=max_rows, **writing)
        return np.array(
            [
                VERDICTS.index(verdict) + _IN_THINK * (where == "think") + _EMPTY * (ending == "empty")
                for verdict, where, ending in zip(out.outcome, out.where, out.ending, strict=True)
            ],
            dtype=np.float64,
        )

    told_settings = ", ".join(f"{name}={value!r}" for name, value in sorted(writing.items()))
    return Reading(
        f"written({batch.name}, {len(batch)} prompts:{batch.digest[:8]}, {told_settings})",
        "code",
        model,
        batch,
        read,
    )


def by_verdict(line: Line, batch: SpanBatch) -> list[Line]:
    """Turn what replies are into shares, one line per verdict; refusals in thought where the model thinks."""

    def share(measure: str, says: Callable[[np.ndarray], np.ndarray]) -> Line:
        before, *edited = (
            says(np.rint(codes).astype(int)).astype(np.float64) for codes in (line.before, *line.edited)
        )
        return Line(measure, line.kind, line.condition, SHARE, line.prompts, before, edited, line.families)

    lines = [
        share(verdict, lambda codes, place=place: codes % _IN_THINK == place)  # type: ignore[misc]
        for place, verdict in enumerate(VERDICTS)
    ]
    lines.append(share("empty", lambda codes: codes >= _EMPTY))
    if batch.think == "open":
        refused_in_think = VERDICTS.index("refuse") + _IN_THINK
        lines.append(share("refuse_in_think", lambda codes: codes == refused_in_think))
    return lines


# --- tables ------------------------------------------------------------------------------------------


def specificities(lines: Sequence[Line], places: Sequence[int] | None) -> list[Line]:
    """Scores of harmful requests minus those of their twins, where every one has its twin, see `twin_places`."""
    if places is None:
        return []
    scores = {(line.kind, line.condition): line for line in lines if line.measure == "score"}
    found = []
    for (kind, condition), line in scores.items():
        if kind != "harmful":
            continue
        twins = scores["harmless", condition]
        found.append(
            Line(
                "specificity",
                DIFFERENCE,
                condition,
                line.unit,
                line.prompts,
                line.before - twins.before[places],
                [own - other[places] for own, other in zip(line.edited, twins.edited, strict=True)],
                line.families,
            )
        )
    return found


def effect_tables(
    lines: Sequence[Line], controls: Sequence[str], members: str, seed: int
) -> dict[str, pd.DataFrame]:
    """Make the tables: intervals over families, p corrected over conditions, the place among random sets.

    Args:
        lines: Rows to be.
        controls: Random sets, in words.
        members: What they are sets of, the name of their column.
        seed: Of permutations and bootstrap.

    Returns:
        The frames table, sets and rows of `EffectTables`.
    """
    import pandas as pd

    p = _corrected(lines, seed)
    table, sets, rows = [], [], []
    for line in lines:
        families = line.units_of_chance
        same = {"measure": line.measure, "kind": line.kind, "condition": line.condition}
        table.append(
            {
                **same,
                "unit": SHARE if line.measure == "correct" else line.unit,
                "n": len(line.before),
                "n_families": len(set(families)),
                **_level("before", line.before, families, line, seed),
                **_level("after", line.after, families, line, seed),
                **mean_columns("change", line.after - line.before, families, seed),
                "p": p.get((line.measure, line.kind, line.condition), float("nan")),
                **beside_random(float((line.after - line.before).mean()), line.random),
            }
        )
        sets += [
            {"control": number, members: controls[number], **same, "change": change}
            for number, change in enumerate(line.random)
        ]
        rows += [
            {**same, "prompt": prompt.id, "family": family, "before": float(before), "after": float(after)}
            for prompt, family, before, after in zip(
                line.prompts, families, line.before, line.after, strict=True
            )
        ]
    return {
        "table": pd.DataFrame(table, columns=list(COLUMNS)),
        "sets": pd.DataFrame(sets, columns=["control", members, "measure", "kind", "condition", "change"]),
        "rows": pd.DataFrame(rows),
    }


def _corrected(lines: Sequence[Line], seed: int) -> dict[tuple[str, str, str], float]:
    """Give p of each line, corrected over the conditions of its measure and kind."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line.measure != "kl":
            groups.setdefault((line.measure, line.kind), []).append(line)
    found = {}
    for (measure, kind), members in groups.items():
        changes = np.stack([line.after - line.before for line in members], axis=1)
        test = sign_flip_test(changes, families=members[0].units_of_chance, correction="max", seed=seed)
        for line, p in zip(members, np.atleast_1d(test.p).tolist(), strict=True):
            found[measure, kind, line.condition] = p
    return found


def _level(name: str, values: Values, families: Sequence[str], line: Line, seed: int) -> dict[str, float]:
    if line.unit == SHARE or line.measure == "correct":
        share = share_interval(values, list(families), seed=seed)
        return {
            name: float(share.estimate),
            f"{name}_low": float(share.low),
            f"{name}_high": float(share.high),
        }
    return mean_columns(name, values, families, seed)


def shuffled(controls: list[list[Unit]], seed: int) -> list[list[Unit]]:
    """Control sets in random order: where all there are come, they come by number, and the first are not any ones."""
    return [controls[place] for place in np.random.default_rng(seed).permutation(len(controls))]


def mean_columns(name: str, values: Values, families: Sequence[str], seed: int) -> dict[str, float]:
    """A mean with its bootstrap interval over families, NaN where there is one family."""
    if family_index(list(families), len(values))[1] < 2:
        return {name: float(values.mean()), f"{name}_low": float("nan"), f"{name}_high": float("nan")}
    found = bootstrap_interval(values, list(families), seed=seed)
    return {name: float(found.estimate), f"{name}_low": float(found.low), f"{name}_high": float(found.high)}


def beside_random(change: float, random: Sequence[float]) -> dict[str, float]:
    """A change among those by random sets; NaN where there are none.

    >>> beside_random(-3.0, [0.0, 1.0])["percentile"]
    100.0
    """
    if not len(random):
        blank = ("random", "random_low", "random_high", "percentile", "p_controls")
        return {**dict.fromkeys(blank, float("nan")), "n_controls": 0}
    low, high = np.quantile(random, [0.025, 0.975])
    return {
        "random": float(np.mean(random)),
        "random_low": float(low),
        "random_high": float(high),
        "percentile": percentile_among(change, random).percentile,
        "p_controls": control_p(change, random),
        "n_controls": len(random),
    }
