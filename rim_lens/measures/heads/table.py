"""The table of tested heads: effects, what they are held against, and the verdict that follows by a stated rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from rim_lens.errors import NotEnoughData, StatisticsError, UnknownHead
from rim_lens.lens import Head
from rim_lens.measures.controls import percentile_among
from rim_lens.measures.stats import bootstrap_interval, family_index, sign_flip_test

if TYPE_CHECKING:
    import pandas as pd

VERDICTS = ("refusal", "general", "positional", "sink", "none", "not tested")
COLUMNS = (
    *("layer", "head", "found", "tested", "effect", "effect_low", "effect_high", "p"),
    *("effect_twins", "twins_low", "twins_high", "p_twins"),
    *(
        "specificity",
        "specificity_low",
        "specificity_high",
        "p_specific",
        "percentile",
        "n_controls",
        "verdict",
    ),
)

Effects = Mapping[Head, Float[np.ndarray, " prompt"]]


@dataclass(frozen=True, slots=True)
class HeadRule:
    """When a head is called what.

    ============  ==================================================================================================
    refusal       tested, its removal has an effect on harmful requests (p ≤ alpha, at least `min_effect` nats), and
                  part of it is missing on their twins: the difference has the same sign, p_specific ≤ alpha, and at
                  least `min_specific` times the effect's size
    general       an effect on harmful requests or on twins (p_twins likewise), without that
    sink          tested, no effect; rests on the first token with at least `sink_mass` in every condition looked at
    positional    tested, no effect; its attention makes the move that was looked for on at least `moves` of the harmful
                  requests and of the twins
    none          tested, no effect, neither of these
    not tested    not among the heads that the select side chose for testing, whatever it looks at
    ============  ==================================================================================================

    Each p is corrected over the tested heads whose effects could be that large (`corrected_p`, max statistic), so that where no head is specific the chance of any
    *refusal* verdict is at most alpha, as far as families are independent and their differences symmetric about zero
    (`families_by_swap` says when families are not; docs/heads.md holds the level on models that know no refusal).

    Attributes:
        alpha: Level of both tests.
        min_effect: Smallest size of an effect, nats.
        min_specific: Smallest size of the specificity, as a share of the effect's.
        sink_mass: Smallest mean mass on the first token of a sink.
        moves: Smallest share of requests on which a positional head moves its attention.
    """

    alpha: float = 0.05
    min_effect: float = 0.25
    min_specific: float = 0.25
    sink_mass: float = 0.5
    moves: float = 0.5

    def __post_init__(self) -> None:
        """Refuse thresholds that nothing or everything would pass.

        Raises:
            StatisticsError: One is out of range.
        """
        shares = {name: getattr(self, name) for name in ("alpha", "sink_mass", "moves")}
        wrong = {name: value for name, value in shares.items() if not 0 < value <= 1}
        if wrong or not self.min_effect >= 0 or not self.min_specific >= 0:
            raise StatisticsError(
                f"{self} was asked for; alpha, sink_mass and moves lie above 0 and up to 1, min_effect and min_specific are"
                " not negative."
            )

    def verdict(self, row: Mapping[str, Any], sink: float = 0.0, moving: float = 0.0) -> str:
        """Name a row of the table.

        Args:
            row: tested, effect, p, effect_twins, p_twins, specificity, p_specific.
            sink: Smallest mean mass on the first token over conditions.
            moving: Largest share, over contrasts, of requests on which attention moves, the smaller of both kinds.

        >>> effects = {"effect": -4.0, "effect_twins": -1.0, "specificity": -3.0}
        >>> HeadRule().verdict({"tested": True, "p": 0.01, "p_twins": 0.3, "p_specific": 0.02, **effects})
        'refusal'
        """
        if not row["tested"]:
            return "not tested"
        effect, gap = row["effect"], row["specificity"]
        affects = row["p"] <= self.alpha and abs(effect) >= self.min_effect
        specific = row["p_specific"] <= self.alpha and gap * effect > 0
        if affects and specific and abs(gap) >= self.min_specific * abs(effect):
            return "refusal"
        if affects or (row["p_twins"] <= self.alpha and abs(row["effect_twins"]) >= self.min_effect):
            return "general"
        if sink >= self.sink_mass:
            return "sink"
        return "positional" if moving >= self.moves else "none"


def head_table(
    effects: Effects,
    twin_effects: Effects,
    tested: Sequence[Head],
    families: Sequence[str],
    *,
    found: Sequence[Head] = (),
    statistics: pd.DataFrame | None = None,
    rule: HeadRule | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Test heads, one by one, on requests that did not choose them.

    Args:
        effects: Per head, edited − baseline refusal score on harmful requests, nats, paired by request: the tested heads
            and, as the yardstick, other heads of their layers.
        twin_effects: The same on the harmless twins, request by request; of the tested heads at least.
        tested: Heads chosen elsewhere; only these are tested and corrected for.
        families: Request family of each prompt; signs are flipped and intervals drawn by family.
        found: The set that was chosen as a set, for the column of that name.
        statistics: Where heads look: layer, head and numbers, joined to the rows. The columns ``sink`` and ``moving``
            enter the verdict, see `HeadRule.verdict`.
        rule: When a head is called what.
        seed: Of the permutations and the bootstrap.

    Returns:
        One row per head of `effects`: layer, head, found, tested; effect with its interval, p (sign flips over families,
        max-statistic over the tested heads, see `corrected_p`; NaN for others), effect on twins likewise, specificity
        (harmful − twins) with its interval and its p (likewise), percentile of |effect| among all other heads of its layer
        and their number, the statistics, and the verdict. Most telling first.

    Raises:
        NotEnoughData: Fewer than two families.
        UnknownHead: A tested head has no effects.
    """
    import pandas as pd

    rule = rule or HeadRule()
    chosen = sorted(set(tested))
    absent = [head for head in chosen if head not in effects or head not in twin_effects]
    if absent:
        raise UnknownHead(f"head {absent[0]} was to be tested, but its effects on both kinds were not given.")
    n_families = family_index(families, len(families))[1]
    if n_families < 2:
        raise NotEnoughData(f"{n_families} request family; a test over requests needs at least two.")
    p = corrected_p(effects, chosen, families, rule.min_effect, seed)
    p_twins = corrected_p(twin_effects, chosen, families, rule.min_effect, seed)
    gaps = {head: effects[head] - twin_effects[head] for head in twin_effects if head in effects}
    p_gap = corrected_p(gaps, chosen, families, rule.min_effect * rule.min_specific, seed)
    rows = []
    for head in sorted(effects):
        layer, number = head
        others = [other for other in effects if other[0] == layer and other != head]
        sizes = [float(effects[other].mean()) for other in others]
        place = percentile_among(float(effects[head].mean()), sizes) if sizes and head in p else None
        rows.append(
            {
                "layer": layer,
                "head": number,
                "found": head in found,
                "tested": head in p,
                **_interval("effect", ("effect_low", "effect_high"), effects[head], families, seed),
                "p": p.get(head, float("nan")),
                **_interval(
                    "effect_twins", ("twins_low", "twins_high"), twin_effects.get(head), families, seed
                ),
                "p_twins": p_twins.get(head, float("nan")),
                **_interval(
                    "specificity", ("specificity_low", "specificity_high"), gaps.get(head), families, seed
                ),
                "p_specific": p_gap.get(head, float("nan")),
                "percentile": float("nan") if place is None else place.percentile,
                "n_controls": len(others),
            }
        )
    table = pd.DataFrame(rows, columns=[name for name in COLUMNS if name != "verdict"])
    if statistics is not None:
        table = table.merge(statistics, on=["layer", "head"], how="left", validate="one_to_one")
    table["verdict"] = [
        rule.verdict(row, row.get("sink", 0.0), row.get("moving", 0.0)) for row in table.to_dict("records")
    ]
    rank = table["verdict"].map(VERDICTS.index)
    order = np.lexsort((table["effect"], rank, ~table["tested"]))
    return table.iloc[order].reset_index(drop=True)


def corrected_p(
    effects: Effects, heads: Sequence[Head], families: Sequence[str], least: float = 0.0, seed: int = 0
) -> dict[Head, float]:
    """Return the sign-flip p of each head, corrected by the max statistic over the heads that could matter.

    A head whose effects have a root mean square below `least` has a mean below it under every flip of signs, so that no
    flip could have made it a finding, and it does not set the bar for the others. That a head is left out so does not
    hang on the signs, which keeps the test exact. Small heads are themselves corrected over all.

    Args:
        effects: Per head, effects by request.
        heads: Those that are tested.
        families: Of each request; their signs are flipped together.
        least: Smallest size of a mean effect that counts.
        seed: Of the permutations.

    >>> sizes = {(0, 0): 4.0, (0, 1): 0.01}
    >>> effects = {head: np.full(6, size) for head, size in sizes.items()}
    >>> corrected_p(effects, list(effects), list("abcdef"), least=0.25)
    {(0, 0): 0.03125, (0, 1): 0.03125}
    """
    if not heads:
        return {}
    stacked = np.stack([effects[head] for head in heads], axis=1)

    def test(values: Float[np.ndarray, "prompt head"]) -> Float[np.ndarray, " head"]:
        found = sign_flip_test(values, families=families, correction="max", seed=seed)
        return np.atleast_1d(np.asarray(found.p))

    p = test(stacked)
    # A hair below: the size of a constant effect is its mean, and rounding must not part the two.
    large = np.sqrt(np.mean(stacked**2, axis=0)) >= least * (1 - 1e-9)
    if large.any() and not large.all():
        p[large] = test(stacked[:, large])
    return dict(zip(heads, p.tolist(), strict=True))


def _interval(
    name: str,
    ends: tuple[str, str],
    values: Float[np.ndarray, " prompt"] | None,
    families: Sequence[str],
    seed: int,
) -> dict[str, float]:
    if values is None:
        return dict.fromkeys((name, *ends), float("nan"))
    found = bootstrap_interval(values, families=families, seed=seed)
    return dict(zip((name, *ends), (float(found.estimate), float(found.low), float(found.high)), strict=True))
