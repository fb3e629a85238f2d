"""Think conditions against each other: what a chain of thought does to refusal, beyond filler and beyond shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.chat.conditions import controls_of, is_control, render_conditions, with_controls
from rim_lens.errors import ConditionError, StatisticsError
from rim_lens.generation import Generation, generate
from rim_lens.hooks.base import Component
from rim_lens.lens import Model
from rim_lens.measures.refusal.prefixes import refusal_prefix_score
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.refusal.score import refusal_score
from rim_lens.measures.stats import bootstrap_interval, sign_flip_test
from rim_lens.prompts.records import Prompt, as_prompts

if TYPE_CHECKING:
    import pandas as pd

# A batch, read with the components → one number per prompt
Score = Callable[[SpanBatch], Any]
Measure = Literal["score", "prefix", "generated"]

UNITS = {
    "score": "nats of refusal log-odds at the first word",
    "prefix": "nats, log-probability ratio of refusal to compliance prefixes",
    "generated": "share of replies that refuse",
}


@dataclass(frozen=True)
class _Measured:
    values: np.ndarray
    generation: Generation | None


def compare_conditions(
    model: Model,
    chat: ChatFormat,
    requests: Sequence[Prompt | str],
    conditions: Sequence[str] = ("careful", "open"),
    *components: Component,
    measure: Measure | Score = "generated",
    texts: dict[str, str | Sequence[str]] | None = None,
    max_new_tokens: int = 64,
    max_cot_tokens: int | None = None,
    close_unfinished: bool = False,
    tolerance: int = 0,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> pd.DataFrame:
    """Compare think conditions on the same requests, each with off and with the controls it needs.

    The filler and the unrelated control of every condition are added where they were not asked for, and off as the
    baseline; ``added`` marks them and ``attrs["note"]`` says so. Read an effect in this order: `effect` is what the
    condition does against off; what filler does is due to *some* tokens standing there; what unrelated does beyond it is
    due to text shaped like reasoning; only `beyond_filler` and `beyond_unrelated` are about *this* reasoning.

    What it does not show: why. And an open condition has no control of its own length, as the model decides how long it
    thinks: there, the beyond-columns compare with controls of a written chain's length.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: The format.
        requests: Records or strings; the unit of every test, families kept together.
        conditions: Names (`rim_lens.chat.conditions`), or keys of `texts`.
        *components: Editors active meanwhile.
        measure: "generated" (1 where the reply refuses, in the answer or inside the think block), "score"
            (`refusal_score`) or "prefix" (`refusal_prefix_score`); or a function of a batch that gives a number per
            prompt, under which components are attached by the caller. Scores need a closed block.
        texts: Chains of thought of your own by name, closed: one for all requests, or one each.
        max_new_tokens: See `generate`.
        max_cot_tokens: See `generate`.
        close_unfinished: See `generate`.
        tolerance: How many tokens filler and unrelated may differ from what they match.
        seed: Of controls, permutations and bootstrap.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.

    Returns:
        One row per condition, off first: condition, control (is it one), added, n, n_families, cot_tokens (mean length of
        the chain of thought, self-written ones included), value (mean of the measure), effect (paired difference to off)
        with low, high and p (sign flips over families), p_corrected (max-statistic over all conditions but off),
        beyond_filler and beyond_unrelated (paired difference to the control) with _low and _high; and, where replies
        were generated, refuse, comply, other, refuse_in_think (refusals inside the think block), refuse_after,
        unfinished (blocks left open), closed_by_force and empty. Intervals are bootstraps over families (NaN with fewer
        than two).

    Raises:
        ConditionError: An unknown condition, or a score was asked of one that leaves the block open.
        StatisticsError: A measure gave another number of values than there are requests.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> harmful = rl.load_prompts("harmful", language="toy", split="select")[::5]
    >>> table = rl.compare_conditions(model, chat, harmful, ["careful"], measure="score")
    >>> table["condition"].tolist(), bool(table["effect"][1] < 0)
    (['off', 'careful', 'filler', 'unrelated'], True)
    """
    import pandas as pd

    records = as_prompts(requests)
    own = dict(texts or {})
    conditions = (conditions,) if isinstance(conditions, str) else conditions
    if components and not isinstance(measure, str):
        raise ConditionError(
            "components were given beside a measure of your own, which runs the model itself: they would not be active."
            " Attach them in your function, or use measure='generated', 'score' or 'prefix'."
        )
    names, added = with_controls((*conditions, *(name for name in own if name not in conditions)), tuple(own))
    batches = render_conditions(
        chat, records, {name: own.get(name) for name in names}, seed=seed, tolerance=tolerance
    )
    still_open = [name for name, batch in batches.items() if batch.think == "open"]
    if still_open and measure != "generated":
        raise ConditionError(
            f"{', '.join(still_open)} {'leaves' if len(still_open) == 1 else 'leave'} the think block open, where a score"
            " of the next token is the CoT's; use measure='generated', or leave it out."
        )
    measured = {}
    for name, batch in batches.items():
        measured[name] = _measure(
            model,
            batch,
            components,
            measure,
            chat=chat,
            max_new_tokens=max_new_tokens,
            max_cot_tokens=max_cot_tokens,
            close_unfinished=close_unfinished,
            max_rows=max_rows,
            progress=progress,
        )
    families = families_of(records)
    others = [name for name in names if name != "off"]
    effects = {name: measured[name].values - measured["off"].values for name in others}
    raw = {name: sign_flip_test(effect, families=families, seed=seed) for name, effect in effects.items()}
    together = sign_flip_test(
        np.stack([effects[name] for name in others], axis=1), families=families, correction="max", seed=seed
    )
    corrected = dict(zip(others, np.atleast_1d(together.p).tolist(), strict=True))
    lines = []
    for name in names:
        batch, found = batches[name], measured[name]
        written = found.generation.batch if found.generation else batch
        line: dict[str, Any] = {
            "condition": name,
            "control": is_control(name),
            "added": name in added,
            "n": len(records),
            "n_families": len(set(families)),
            "cot_tokens": float(written.spans["cot"].sum(dim=1).double().mean()),
            "value": float(found.values.mean()),
        }
        line |= _difference("", effects.get(name), families, seed)
        line["p"] = float(raw[name].p) if name in raw else float("nan")
        line["p_corrected"] = corrected.get(name, float("nan"))
        for word, control in zip(
            ("filler", "unrelated"), controls_of(name, tuple(own)) or (None, None), strict=True
        ):
            beyond = None if control is None else found.values - measured[control].values
            line |= _difference(f"beyond_{word}", beyond, families, seed)
        if found.generation is not None:
            line |= _outcomes(found.generation)
        lines.append(line)
    table = pd.DataFrame(lines)
    told = f"{', '.join(added)} {'was' if len(added) == 1 else 'were'} added: no comparison without off, filler and unrelated."
    table.attrs = {
        "measure": measure if isinstance(measure, str) else getattr(measure, "__name__", "function"),
        "unit": UNITS.get(measure, "") if isinstance(measure, str) else "",
        "baseline": "off",
        "added": list(added),
        "note": told if added else "",
        "max_statistic_over": len(others),
    }
    return table


def _measure(
    model: Model,
    batch: SpanBatch,
    components: Sequence[Component],
    measure: Measure | Score,
    *,
    chat: ChatFormat,
    max_rows: int,
    **writing: Any,
) -> _Measured:
    if measure == "generated":
        written = generate(model, batch, *components, chat=chat, max_rows=max_rows, **writing)
        hits = np.array([verdict == "refuse" for verdict in written.outcome], dtype=np.float64)
        return _Measured(hits, written)
    if measure == "score":
        return _Measured(refusal_score(model, batch, *components, max_rows=max_rows).values, None)
    if measure == "prefix":
        return _Measured(refusal_prefix_score(model, batch, *components, max_rows=max_rows).values, None)
    if not callable(measure):
        raise ConditionError(
            f"measure={measure!r} is unknown; it is 'generated', 'score', 'prefix' or a function of a batch."
        )
    values = np.asarray(measure(batch), dtype=np.float64).reshape(-1)
    if len(values) != len(batch):
        raise StatisticsError(
            f"the measure gave {len(values)} numbers for {len(batch)} prompts ({batch.name}); it must give one each."
        )
    return _Measured(values, None)


def _difference(name: str, values: np.ndarray | None, families: Sequence[str], seed: int) -> dict[str, float]:
    mean, low, high = (name, f"{name}_low", f"{name}_high") if name else ("effect", "low", "high")
    nothing = float("nan")
    if values is None:
        return {mean: nothing, low: nothing, high: nothing}
    if len(set(families)) < 2:
        return {mean: float(values.mean()), low: nothing, high: nothing}
    interval = bootstrap_interval(values, list(families), seed=seed)
    return {mean: float(interval.estimate), low: float(interval.low), high: float(interval.high)}


def _outcomes(written: Generation) -> dict[str, int]:
    pairs = list(zip(written.outcome, written.where, strict=True))
    return {
        **{verdict: written.outcome.count(verdict) for verdict in ("refuse", "comply", "other")},
        "refuse_in_think": pairs.count(("refuse", "think")),
        "refuse_after": pairs.count(("refuse", "answer")),
        "unfinished": sum(not done for done in written.batch.finished_thinking),
        "closed_by_force": sum(written.closed_by_force),
        "empty": written.ending.count("empty"),
    }
