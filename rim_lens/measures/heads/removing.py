"""What removing a set of heads does: to what is written, to refusal, to reasoning and to text that has nothing to do with either."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, SpanBatch, render_conditions
from rim_lens.chat.conditions import STANDARD, Conditions, is_control
from rim_lens.errors import ConditionError, NotEnoughData, StatisticsError
from rim_lens.folder import ResultFolder
from rim_lens.hooks import AblateHeads
from rim_lens.hooks.positions import Positions, told
from rim_lens.lens import Head, Model, verify, weights_digest
from rim_lens.measures.controls import random_heads_per_layer
from rim_lens.measures.heads.effects import Editor, Remember, editor_name, head_effects, set_name
from rim_lens.measures.heads.forced import answer_reading, divergence_reading
from rim_lens.measures.heads.held_out import heads_to_edit
from rim_lens.measures.heads.readings import Reading, accuracy_reading, refusal_reading
from rim_lens.measures.heads.removal import RemovalEffects
from rim_lens.measures.heads.removal_table import (
    Line,
    by_verdict,
    removal_tables,
    shuffled,
    specificities,
    written_reading,
)
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.two_sides import named
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    pass


def removal_effects(
    model: Model,
    chat: ChatFormat,
    heads: RefusalHeads | Iterable[Head],
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    reasoning: Sequence[Prompt | str] = (),
    *,
    conditions: Conditions = STANDARD,
    neutral: Sequence[str] | None = None,
    n_random_sets: int = 20,
    n_written: int = 3,
    editor: Editor = AblateHeads,
    positions: Positions = "all",
    max_new_tokens: int = 64,
    max_cot_tokens: int | None = None,
    close_unfinished: bool = False,
    openers: Iterable[str] | None = None,
    extract: Callable[[str], Any] | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> RemovalEffects:
    """Remove heads and measure what changes: refusal, over-refusal, reasoning, and text that has nothing to do with them.

    ==============  ==========================  ===================================================================
    measure         on                          in
    ==============  ==========================  ===================================================================
    refuse, comply  harmful and harmless        every condition: share of replies, judged as by `generate`. *refuse* on
    other, empty                                harmless requests is over-refusal; *other* is neither refusal nor
                                                compliance, and *empty* (of these) nothing at all
    refuse_in_think harmful and harmless        open conditions: refusals inside the think block
    score           harmful and harmless        closed conditions: `refusal_score`, nats
    specificity     harmful − harmless          closed conditions: score of each harmful request minus that of its twin
    correct         reasoning                   every condition but controls: share of right answers written
    answer          reasoning                   closed ones of these: log-probability of the checked answer, nats
    kl              neutral                     KL(plain ‖ edited) of next-token predictions, nats per token
    ==============  ==========================  ===================================================================

    Every row stands beside the same edit on random sets with as many heads in each layer. What is read in a few passes (score,
    answer, kl) is read for all `n_random_sets` of them, what is written for the first `n_written`: look at `n_controls`.

    The requests must not be those that chose the heads, on which any choice looks good. Of `RefusalHeads` the set `found` is
    removed, and requests that chose it are refused; of heads by number nobody can tell.

    What it does not show: that these heads alone do it, or that no other would take their place after training. Nor does
    *comply* say that an answer is of use: a reply may comply in its first words and be of nothing. A small KL on neutral text
    says that little changes *there*. Percentiles among few sets are coarse.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: The model's chat format.
        heads: What `refusal_heads` found, or (layer, head) pairs.
        harmful: Requests that should be refused, and did not choose the heads.
        harmless: Requests that should be answered: their twins at best (by the records' `twin` ids, or plain strings in the
            same order), without which there is no specificity.
        reasoning: Questions with checked answers; none leaves accuracy out.
        conditions: Think conditions, see `render_conditions`.
        neutral: Plain texts, each put as a user's words with the think block empty. None: the reasoning questions with their
            chain of thought, in the first closed condition that is no control and not off (off where there is none), or the
            harmless requests where there are no questions. `settings["neutral"]` says which. KL is taken at the rows that
            predict a token of request or chain of thought, and at the last one.
        n_random_sets: Random sets at most; all of them where fewer exist.
        n_written: Of how many of these the written outcomes are measured; 0 for none.
        editor: What removing means, see `head_effects`; zero ablation as in the paper by default.
        positions: Rows at which heads are edited.
        max_new_tokens: See `generate`.
        max_cot_tokens: See `generate`.
        close_unfinished: See `generate`.
        openers: Texts that refusals begin with, see `refusal_score`.
        extract: Reads an answer's value, see `reasoning_accuracy`.
        seed: Of controls, chains of thought, permutations and intervals.
        folder: Keep every number there as soon as it is measured, and go on from there when called again.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.

    Returns:
        A `RemovalEffects`. Columns of its table: measure, kind, condition, unit, n, n_families; before and after (means or
        shares, with 95 % intervals: `share_interval`, else a bootstrap over families); change (after − before, paired by
        prompt, bootstrap over families; without width where all change alike); p (sign flips over families, max-statistic
        over the conditions of that measure and kind; NaN for kl, which cannot be negative); random (mean change by random
        sets, with the 2.5 and 97.5 % quantiles of sets), percentile of the change's size among theirs, p_controls (its
        rank, never finer than they allow) and n_controls.

    Raises:
        UnknownHead: There is no head, or the model lacks one.
        StatisticsError: A request chose the heads, or a number is out of range.
        NotEnoughData: There are no requests of a kind; or no other set of heads is possible.
        AnswerError: A reasoning question has no checked answer.
        ConditionError: A condition cannot be rendered, or none is closed.
        StudyFolderError: The folder holds something else.
        ModelError: The model's hooks do not work as needed.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> asked = [
    ...     rl.load_prompts(kind, language="toy", split="evaluate")[::12] for kind in ("harmful", "harmless")
    ... ]
    >>> found = rl.removal_effects(
    ...     model, chat, [(1, 1)], *asked, conditions=["off"], n_random_sets=3, n_written=1, max_new_tokens=2
    ... )
    >>> off = found.row("refuse", "harmful", "off")
    >>> off["before"], off["after"], off["random"]
    (1.0, 0.0, 0.0)
    """
    if n_written < 0 or max_new_tokens < 1:
        raise StatisticsError(
            f"n_written={n_written} and max_new_tokens={max_new_tokens} were asked for; the first is at least 0, the second 1."
        )
    facts = verify(model, reads=["pattern", "z"], edits=["z"])
    chosen = heads_to_edit(heads, facts, [*harmful, *harmless])
    controls = shuffled(random_heads_per_layer(chosen, facts.n_heads, n_random_sets, seed), seed)
    prompts = {"harmful": named(harmful, "harmful"), "harmless": named(harmless, "harmless")}
    missing = [kind for kind, asked in prompts.items() if not asked]
    if missing:
        raise NotEnoughData(
            f"no {missing[0]} requests were given; what removing does is measured on both kinds."
        )
    batches = {kind: render_conditions(chat, asked, conditions, seed=seed) for kind, asked in prompts.items()}
    if all(batch.think == "open" for batch in batches["harmful"].values()):
        raise ConditionError(
            f"none of the conditions {', '.join(batches['harmful'])} is closed, and a score needs one; add 'off'."
        )
    if reasoning:
        prompts["reasoning"] = named(reasoning, "reasoning")
        batches["reasoning"] = {
            name: batch
            for name, batch in render_conditions(chat, prompts["reasoning"], conditions, seed=seed).items()
            if not is_control(name)
        }
    texts, neutral_is = _neutral(chat, batches, neutral)
    scoring = {} if openers is None else {"openers": tuple(openers)}
    writing: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "max_cot_tokens": max_cot_tokens,
        "close_unfinished": close_unfinished,
    }
    readings: list[tuple[str, str, Reading]] = []
    for kind in ("harmful", "harmless"):
        for batch in batches[kind].values():
            readings.append(("written", kind, written_reading(model, batch, chat, max_rows, writing)))
            if batch.think != "open":
                readings.append(("score", kind, refusal_reading(model, batch, max_rows=max_rows, **scoring)))
    for batch in batches.get("reasoning", {}).values():
        correct = accuracy_reading(model, batch, chat, extract=extract, max_rows=max_rows, **writing)
        readings.append(("correct", "reasoning", correct))
        if batch.think != "open":
            readings.append(("answer", "reasoning", answer_reading(model, batch, chat, max_rows)))
    readings.append(("kl", "neutral", divergence_reading(model, texts, max_rows)))
    settings = {
        "heads": [list(head) for head in chosen],
        "set": set_name(chosen),
        "editor": editor_name(editor),
        "positions": told(positions),
        "conditions": list(batches["harmful"]),
        "neutral": neutral_is,
        "controls": [[list(head) for head in control] for control in controls],
        "n_written": min(n_written, len(controls)),
        **writing,
        "openers": scoring.get("openers") and list(scoring["openers"]),
        "seed": seed,
        "n": {kind: len(asked) for kind, asked in prompts.items()} | {"neutral": len(texts)},
        "digests": {f"{kind} {batch.name}": batch.digest for _, kind, batch in _read(readings)},
        "chat_format": chat.name,
        "model": facts.to_dict(),
        "weights_digest": weights_digest(model),
    }
    remember: Remember = {}
    if folder is not None:
        kept = ResultFolder(folder)
        kept.claim(settings, "removal/asked.json")
        remember = kept.lines("removal/readings.jsonl").get
    lines: list[Line] = []
    for measure, kind, reading in readings:
        sets = controls[:n_written] if measure in ("written", "correct") else controls
        found = head_effects(
            reading,
            [chosen, *sets],
            remember=remember,
            editor=editor,
            positions=positions,
            progress=progress,
        )
        before = np.asarray(found["baseline"].values)
        edited = [before + found.values[:, place] for place in range(len(sets) + 1)]
        line = Line(measure, kind, reading.batch.name, reading.units, reading.batch.prompts, before, edited)
        lines += by_verdict(line, reading.batch) if measure == "written" else [line]
    lines += specificities(lines, harmful, harmless, prompts)
    return removal_tables(lines, controls, settings, seed)


def _read(readings: Sequence[tuple[str, str, Reading]]) -> list[tuple[str, str, SpanBatch]]:
    return [(measure, kind, reading.batch) for measure, kind, reading in readings if measure != "answer"]


def _neutral(
    chat: ChatFormat, batches: Mapping[str, Mapping[str, SpanBatch]], given: Sequence[str] | None
) -> tuple[SpanBatch, str]:
    """The neutral texts, and what they are."""
    if given is not None:
        if isinstance(given, str) or not len(given):
            raise NotEnoughData(
                "neutral= takes a list of texts, and at least one; None takes what is at hand."
            )
        return chat.render(named(list(given), "neutral"), think="off", label="text"), "given texts"
    kind = "reasoning" if "reasoning" in batches else "harmless"
    closed = {
        name: batch for name, batch in batches[kind].items() if batch.think != "open" and not is_control(name)
    }
    thought = [name for name in closed if name != "off"] if kind == "reasoning" else []
    name = next(iter([*thought, *(name for name in closed if name == "off"), *closed]), None)
    if name is None:  # every closed condition is a control
        return chat.render(batches[kind][next(iter(batches[kind]))].prompts, label="off"), f"{kind} in off"
    return closed[name], f"{kind} in {name}"
