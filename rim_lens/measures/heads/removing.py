"""What removing a set of heads does: to what is written, to refusal, to reasoning and to text that has nothing to do with either."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat
from rim_lens.chat.conditions import STANDARD, Conditions
from rim_lens.errors import StatisticsError
from rim_lens.folder import ResultFolder
from rim_lens.hooks import AblateHeads
from rim_lens.hooks.positions import Positions, told
from rim_lens.lens import Head, Model, known_by, verify
from rim_lens.measures.controls import random_heads_per_layer
from rim_lens.measures.edits import Editor, Remember, editor_name
from rim_lens.measures.heads.effects import set_name
from rim_lens.measures.heads.held_out import heads_to_edit
from rim_lens.measures.heads.removal import RemovalEffects
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.refusal.openers import opener_texts
from rim_lens.measures.removal_table import effect_tables, shuffled
from rim_lens.measures.removing import asked_of, both_kinds, removal_lines
from rim_lens.measures.twins import twin_places
from rim_lens.prompts import Prompt


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

    ===============  ==========================  ===================================================================
    measure          on                          in
    ===============  ==========================  ===================================================================
    refuse, comply   harmful and harmless        every condition: share of replies, judged as by `generate`. *refuse* on
    other, empty                                 harmless requests is over-refusal; *other* is neither refusal nor
                                                 compliance, and *empty* (of these) nothing at all
    refuse_in_think  harmful and harmless        open conditions: refusals inside the think block
    score            harmful and harmless        closed conditions: `refusal_score`, nats
    specificity      harmful − harmless          closed conditions: score of each harmful request minus that of its twin
    correct          reasoning                   every condition but controls: share of right answers written
    answer           reasoning                   closed ones of these: log-probability of the checked answer, nats
    kl               neutral                     KL(plain ‖ edited) of next-token predictions, nats per token
    ===============  ==========================  ===================================================================

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
        prompt, bootstrap over families; without width where all change alike); p (sign flips over families, where twins
        are known over those whose twins swap other words, max-statistic over the conditions of that measure and kind; NaN for kl, which cannot be negative); random (mean change by random
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
    prompts = both_kinds(harmful, harmless, "removing")
    writing: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "max_cot_tokens": max_cot_tokens,
        "close_unfinished": close_unfinished,
    }
    openers = opener_texts(openers)
    asked = asked_of(
        model,
        chat,
        prompts,
        reasoning,
        conditions,
        neutral=neutral,
        writing=writing,
        openers=openers,
        extract=extract,
        max_rows=max_rows,
        seed=seed,
    )
    settings = {
        "heads": [list(head) for head in chosen],
        "set": set_name(chosen),
        "editor": editor_name(editor),
        "positions": told(positions),
        **asked.settings(),
        "controls": [[list(head) for head in control] for control in controls],
        "n_written": min(n_written, len(controls)),
        **writing,
        "openers": openers,
        "seed": seed,
        "chat_format": chat.name,
        "model": facts.to_dict(),
        **known_by(model),
    }
    remember: Remember = {}
    if folder is not None:
        kept = ResultFolder(folder)
        kept.claim(settings, "removal/asked.json")
        remember = kept.lines("removal/readings.jsonl").get
    lines = removal_lines(
        asked,
        lambda members: editor(members, positions=positions),
        chosen,
        controls,
        n_written,
        twin_places(prompts["harmful"], prompts["harmless"]),
        remember=remember,
        progress=progress,
        what="heads",
    )
    return RemovalEffects(
        **effect_tables(lines, [set_name(control) for control in controls], "heads", seed), settings=settings
    )
