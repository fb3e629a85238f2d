"""Heads two at a time: what the removal of both does beyond what either does alone.

interaction = effect of both − effect of the one − effect of the other. Of the same sign as the effect of both, the two
stand in for each other: where either alone does the whole work, both single effects are 0 and a search by single
effects, `find_heads` among them, passes both by. Of the opposite sign, they share a path (the one reads what the other
writes, so that removing both costs no more than removing one), or the score has come to its floor.

An interaction belongs to a scale: heads that add up in nats do not add up in refused replies, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from rim_lens.errors import NotEnoughData
from rim_lens.hooks import AblateHeads
from rim_lens.hooks.positions import Positions
from rim_lens.lens import Head, model_facts
from rim_lens.measures.edits import Editor, Remember
from rim_lens.measures.heads.effects import head_effects, head_name, set_name
from rim_lens.measures.readings import Reading, require_reading
from rim_lens.measures.stats import bootstrap_interval, family_index, sign_flip_test

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

LEVEL = 0.05
PAIR_COLUMNS = (
    *("pair", "effect_first", "effect_second", "effect", "interaction", "low", "high", "p", "kind"),
)


def pair_effects(
    reading: Reading,
    heads: Iterable[Head],
    *,
    remember: Remember | None = None,
    editor: Editor = AblateHeads,
    positions: Positions = "all",
    progress: bool = False,
) -> xr.Dataset:
    """Effects of every pair of these heads and of its two heads alone, prompt by prompt.

    With n heads, n (n + 1) / 2 readings and one for the baseline.

    Args:
        reading: What effects are read by.
        heads: At least two; each is paired with each.
        remember: See `head_effects`; single effects that are there already cost nothing.
        editor: See `head_effects`.
        positions: See `head_effects`.
        progress: Show a progress bar.

    Returns:
        Dataset (prompt, pair) with ``effect`` (both edited), ``effect_first``, ``effect_second`` and ``interaction``, in
        the reading's unit, and the coordinates ``pair`` ("L0H5+L1H1", the lower layer first) and ``family`` (prompt).

    Raises:
        NotEnoughData: Fewer than two heads.
        UnknownHead: The model lacks one.
    """
    import xarray as xr

    require_reading(reading, "pair_effects")
    known = sorted(model_facts(reading.model).check_heads(heads))
    if len(known) < 2:
        raise NotEnoughData(f"pairs of {len(known)} head were asked for; give at least two heads.")
    pairs = list(combinations(known, 2))
    measured = head_effects(
        reading,
        [*known, *pairs],
        remember=remember,
        editor=editor,
        positions=positions,
        progress=progress,
    )
    names = [set_name(pair) for pair in pairs]
    both, first, second = (
        measured.sel(set=chosen).values
        for chosen in (names, [head_name(a) for a, _ in pairs], [head_name(b) for _, b in pairs])
    )
    return xr.Dataset(
        {
            "effect": (("prompt", "pair"), both),
            "effect_first": (("prompt", "pair"), first),
            "effect_second": (("prompt", "pair"), second),
            "interaction": (("prompt", "pair"), both - first - second),
        },
        coords={
            "prompt": measured["prompt"].values,
            "family": ("prompt", measured["family"].values),
            "pair": names,
        },
        attrs=measured.attrs | {"sign": "edited − baseline; interaction: both − first − second"},
    )


def pair_interactions(
    reading: Reading,
    heads: Iterable[Head],
    *,
    remember: Remember | None = None,
    editor: Editor = AblateHeads,
    positions: Positions = "all",
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Test, for every pair of these heads, whether both together do more, or less, than the sum of each alone.

    Args:
        reading: What effects are read by.
        heads: The top heads, say; chosen on other requests.
        remember: See `head_effects`.
        editor: See `head_effects`.
        positions: See `head_effects`.
        seed: Of the permutations and the bootstrap.
        progress: Show a progress bar.

    Returns:
        One row per pair, largest interaction first: pair; mean effect of the first alone, of the second alone and of both;
        interaction with its 95 % interval (paired by request, families resampled); p (sign flips over families, max-statistic
        over the pairs of this table); kind: *redundant* (p ≤ .05, and the interaction has the sign of the effect of both:
        they stand in for each other, at least in part), *overlapping* (p ≤ .05, the opposite sign), *additive* (not told apart
        from the sum, which does not prove that it is the sum) or *undecided* (so few families that no p comes to .05).
        Numbers per prompt: `pair_effects`.

    Raises:
        NotEnoughData: Fewer than two heads, or requests of one family alone.
        UnknownHead: The model lacks one.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[::6], think="off")
    >>> table = rl.pair_interactions(rl.refusal_reading(model, off), [(0, 5), (1, 1)])
    >>> table["pair"][0], table["kind"][0]  # the reader reads what the topic head began: one path
    ('L0H5+L1H1', 'overlapping')
    """
    _n_families(reading)
    found = pair_effects(
        reading, heads, remember=remember, editor=editor, positions=positions, progress=progress
    )
    return _table(found, seed)


def redundant_pairs(
    reading: Reading,
    candidates: Sequence[Head],
    *,
    max_readings: int = 200,
    min_effect: float = 0.25,
    remember: Remember | None = None,
    editor: Editor = AblateHeads,
    positions: Positions = "all",
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Search for two heads of which either alone does the work: no effect one by one, a large one together.

    Every pair of the candidates is measured: with n of them n (n + 1) / 2 readings and one for the baseline, 137 for
    16, so that `max_readings` = 200 allows 19. Choose candidates by what sees such heads: attention to the span in
    question, or `direct_effects` for late ones. Single ablations do not see them, and neither does gradient × activation,
    whose slope at a saturated sum is 0.

    What it does not show: pairs with a head outside the candidates, and redundancy of three or more (a pair of them has
    no effect either). The test is corrected over all pairs measured; still, the pairs were chosen on these requests, so
    measure their effect on others.

    Args:
        reading: What effects are read by; best on requests of the `select` split.
        candidates: Heads to look among.
        max_readings: More are refused, before the first.
        min_effect: Smallest mean effect of both, in the reading's unit and either direction, that counts.
        remember: See `head_effects`.
        editor: See `head_effects`.
        positions: See `head_effects`.
        seed: Of the permutations and the bootstrap.
        progress: Show a progress bar.

    Returns:
        Rows of `pair_interactions` whose kind is *redundant*, whose effect is at least `min_effect` and larger than that of
        its two heads alone taken together; none where there is no such pair. ``attrs``: candidates, n_pairs and n_readings.

    Raises:
        ValueError: The candidates would take more than `max_readings`.
        NotEnoughData: Fewer than two candidates, or requests of fewer than six families.
        UnknownHead: The model lacks a candidate.
    """
    known = model_facts(reading.model).check_heads(candidates)
    n_pairs = len(known) * (len(known) - 1) // 2
    n_readings = n_pairs + len(known) + 1
    if n_readings > max_readings:
        raise ValueError(
            f"{len(known)} candidates make {n_pairs} pairs and {n_readings} readings, and max_readings={max_readings} are"
            " allowed. Give fewer candidates (the first of a ranking), or allow more."
        )
    n_families = _n_families(reading)
    if 2.0 ** (1 - n_families) > LEVEL:
        raise NotEnoughData(
            f"the requests are of {n_families} families, with which no p comes to {LEVEL}: nothing could be found. Give"
            " requests of six families at least."
        )
    table = pair_interactions(
        reading,
        known,
        remember=remember,
        editor=editor,
        positions=positions,
        seed=seed,
        progress=progress,
    )
    alone = table["effect_first"].abs() + table["effect_second"].abs()
    large = (table["effect"].abs() >= min_effect) & (table["effect"].abs() > alone)
    found = table[(table["kind"] == "redundant") & large].reset_index(drop=True)
    found.attrs |= {
        "candidates": [head_name(head) for head in known],
        "n_pairs": n_pairs,
        "n_readings": n_readings,
    }
    return found


def _n_families(reading: Reading) -> int:
    require_reading(reading, "a test of pairs")
    prompts = reading.batch.prompts
    count = family_index([prompt.family for prompt in prompts], len(prompts))[1]
    if count < 2:
        raise NotEnoughData("all requests are of one family; a test over requests needs at least two.")
    return count


def _table(found: xr.Dataset, seed: int) -> pd.DataFrame:
    import pandas as pd

    families = found["family"].values.tolist()
    values = found["interaction"].values
    interval = bootstrap_interval(values, families=families, seed=seed)
    test = sign_flip_test(values, families=families, correction="max", seed=seed)
    effect = found["effect"].values.mean(axis=0)
    kinds = np.where(np.sign(interval.estimate) == np.sign(effect), "redundant", "overlapping")
    rest = "additive" if test.finest <= LEVEL else "undecided"
    table = pd.DataFrame(
        {
            "pair": found["pair"].values,
            "effect_first": found["effect_first"].values.mean(axis=0),
            "effect_second": found["effect_second"].values.mean(axis=0),
            "effect": effect,
            "interaction": interval.estimate,
            "low": interval.low,
            "high": interval.high,
            "p": test.p,
            "kind": np.where(np.asarray(test.p) <= LEVEL, kinds, rest),
        },
        columns=list(PAIR_COLUMNS),
    )
    order = table["interaction"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)
