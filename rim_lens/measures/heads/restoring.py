"""Bringing refusal back under a chain of thought, by three edits of the heads that carry it without one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, render_conditions
from rim_lens.errors import ConditionError, NotEnoughData, StatisticsError
from rim_lens.folder import ResultFolder
from rim_lens.hooks import BlockAttention, MoveAttention, PatchHeads, record
from rim_lens.hooks.alignment import Align
from rim_lens.hooks.positions import Positions, told
from rim_lens.lens import Head, Model, known_by, verify
from rim_lens.measures.controls import random_heads_per_layer
from rim_lens.measures.edits import Remember, measured
from rim_lens.measures.heads.effects import set_name
from rim_lens.measures.heads.held_out import heads_to_edit
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.readings import refusal_reading, refused_reading
from rim_lens.measures.refusal.openers import opener_texts
from rim_lens.measures.removal_table import DIFFERENCE, shuffled
from rim_lens.measures.restored import (
    COLUMNS,
    Edited,
    MakeEdit,
    Values,
    edited_by,
    minus_twins,
    restored_lines,
)
from rim_lens.measures.twins import twin_places, witnesses
from rim_lens.measures.two_sides import named
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    import pandas as pd

EDITS = ("block", "move", "patch")


def restoring(
    model: Model,
    chat: ChatFormat,
    heads: RefusalHeads | Iterable[Head],
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    condition: str = "careful",
    *,
    text: str | Sequence[str] | None = None,
    edits: Sequence[str] = EDITS,
    rows: Positions = "later",
    align: Align = "end",
    n_random_sets: int = 20,
    n_written: int = 3,
    max_new_tokens: int = 64,
    openers: Iterable[str] | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    max_rows: int = MAX_ROWS,
    progress: bool = False,
) -> pd.DataFrame:
    """Under a given chain of thought, edit these heads and see whether refusal comes back, beside the same on random heads.

    =======  ==========================================================================================================
    block    the heads lose the keys of the chain of thought (`BlockAttention`): does its *presence* draw them away?
    move     all the attention they give it goes to the think tags instead (`MoveAttention`), where they look when the
             block is empty; a chain of thought leaves no token of the empty block (`gap`) but its tags
    patch    their outputs are those of the same request with the empty block (`PatchHeads`), at every row that has a
             counterpart: what they *wrote* there is put back, wherever it came from
    =======  ==========================================================================================================

    If block or move restores refusal and the same on random heads does not, attention to the chain of thought is what keeps
    these heads from their work. If only patch does, they read something that the chain of thought changed elsewhere. Take
    filler and unrelated as the condition too: what comes back there as well is not about *this* reasoning. And look at the
    twins, and at *specificity*: an edit that raises every score alike, or makes the model refuse harmless requests, restores
    nothing.

    What it does not show: that attention would move so by itself, nor that these heads are the only way. Heads of the kind
    `patch` restores may lie behind others that do the work.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        chat: The model's chat format.
        heads: What `refusal_heads` found (its set `found`), or (layer, head) pairs; edited together.
        harmful: Requests that should be refused, and did not choose the heads.
        harmless: Requests that should be answered, their twins at best.
        condition: A closed think condition with a chain of thought, see `render_conditions`.
        text: A chain of thought of your own, called `condition`: one for all requests, or one each. Harmless requests get the
            same one; with one each, there must be as many of them.
        edits: Which of the three.
        rows: Query rows of block and move: "later" (every row after the chain of thought, written ones included),
            "prompt_last", or a span.
        align: See `PatchHeads`.
        n_random_sets: Random sets with as many heads in each layer, for the score; all of them where fewer exist.
        n_written: Of how many of these the written outcome is measured; 0 for none.
        max_new_tokens: See `generate`.
        openers: Texts that refusals begin with, see `refusal_score`.
        seed: Of controls, chains of thought, permutations and intervals.
        folder: Keep every number there as soon as it is measured, and go on from there when called again.
        max_rows: Most prompts in one pass.
        progress: Show progress bars.

    Returns:
        One row per edit, kind (harmful, harmless) and measure ("score", nats; "refuse", share of replies), and one of measure
        "specificity" (score of each harmful request minus that of its twin, where all have one): condition, n,
        n_families; off, baseline and edited (means in off, in the condition, and there with the edit); effect
        (edited − baseline, paired, bootstrap over families); p (sign flips over families, where twins are known
        over those whose twins swap other words, max-statistic over the edits);
        restored, (edited − baseline) / (off − baseline) of the means, with its interval, NaN where the gap off − baseline
        is not shown to be above 0 by its own interval; random (mean effect of the same edit on random sets, with
        quantiles), percentile, p_controls, n_controls; and state: "measured", or why the edit is impossible here (its
        numbers are then NaN). Random sets on which an edit is impossible are left out, and not in n_controls.
        ``attrs``: heads, settings, digests, and the generated share's number of sets.

    Raises:
        ConditionError: The condition is open, empty, or unknown; or an edit is.
        UnknownHead: There is no head, or the model lacks one.
        StatisticsError: A request chose the heads, or a number is out of range.
        NotEnoughData: There are no requests of a kind; or no other set of heads is possible.
        StudyFolderError: The folder holds something else.
        ModelError: The model's hooks do not work as needed.

    >>> import rim_lens as rl
    >>> model = rl.load_model("planted")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> asked = [
    ...     rl.load_prompts(kind, language="toy", split="evaluate")[::12] for kind in ("harmful", "harmless")
    ... ]
    >>> table = rl.restoring(model, chat, [(1, 1)], *asked, n_random_sets=3, n_written=1, max_new_tokens=2)
    >>> refused = table[(table["measure"] == "refuse") & (table["kind"] == "harmful")]
    >>> refused[["edit", "off", "baseline", "edited", "random"]].values.tolist()
    [['block', 1.0, 0.0, 1.0, 0.0], ['move', 1.0, 0.0, 1.0, 0.0], ['patch', 1.0, 0.0, 1.0, 0.0]]
    """
    unknown = [edit for edit in edits if edit not in EDITS]
    if unknown or not edits or len(set(edits)) < len(edits):
        raise ConditionError(
            f"edits={list(edits)} were asked for; there are {', '.join(EDITS)}, each once at most."
        )
    if n_written < 0 or max_new_tokens < 1:
        raise StatisticsError(
            f"n_written={n_written} and max_new_tokens={max_new_tokens} were asked for; the first is at least 0, the second 1."
        )
    facts = verify(model, reads=["pattern", "z"], edits=["pattern", "z"])
    chosen = heads_to_edit(heads, facts, [*harmful, *harmless])
    controls = shuffled(random_heads_per_layer(chosen, facts.n_heads, n_random_sets, seed), seed)
    asked = {"harmful": named(harmful, "harmful"), "harmless": named(harmless, "harmless")}
    missing = [kind for kind, prompts in asked.items() if not prompts]
    if missing:
        raise NotEnoughData(f"no {missing[0]} requests were given; restoring is measured on both kinds.")
    batches = {
        kind: render_conditions(chat, prompts, {"off": None, condition: text}, seed=seed)
        for kind, prompts in asked.items()
    }
    if batches["harmful"][condition].think != "cot":
        raise ConditionError(
            f"restoring was asked for in {condition!r}, which holds no given chain of thought; name a closed condition with"
            " one, such as 'careful', 'filler' or 'unrelated', or pass text=."
        )
    scoring = {} if openers is None else {"openers": opener_texts(openers)}
    settings = {
        "heads": [list(head) for head in chosen],
        "set": set_name(chosen),
        "condition": condition,
        "edits": list(edits),
        "rows": told(rows),
        "align": align,
        "controls": [[list(head) for head in control] for control in controls],
        "n_written": min(n_written, len(controls)),
        "max_new_tokens": max_new_tokens,
        "openers": scoring.get("openers"),
        "seed": seed,
        "digests": {
            f"{kind} {name}": batch.digest for kind, its in batches.items() for name, batch in its.items()
        },
        "chat_format": chat.name,
        "model": facts.to_dict(),
        **known_by(model),
    }
    remember: Remember = {}
    if folder is not None:
        kept = ResultFolder(folder)
        kept.claim(settings, "restoring/asked.json")
        remember = kept.lines("restoring/readings.jsonl").get
    places = twin_places(asked["harmful"], asked["harmless"])
    families = witnesses(asked["harmful"], asked["harmless"], enumerate(places or ()))
    lines: list[dict[str, Any]] = []
    scores: dict[str, tuple[Values, Values, dict[str, Edited]]] = {}
    for kind, its in batches.items():
        off, under = its["off"], its[condition]
        layers = sorted({layer for layer, _ in chosen})
        recorded = record(model, off, ["z"], layers) if "patch" in edits else None
        tags = under.spans["think_open"] | under.spans["think_close"]
        make: dict[str, MakeEdit] = {
            "block": lambda its_heads: BlockAttention(rows, "cot", its_heads),
            "move": lambda its_heads, tags=tags: MoveAttention(  # type: ignore[misc]
                its_heads, "cot", to=0.0, from_=tags, query=rows
            ),
            "patch": lambda its_heads, recorded=recorded: PatchHeads(its_heads, recorded, "all", align),  # type: ignore[misc]
        }
        readings = {
            "score": [refusal_reading(model, batch, max_rows=max_rows, **scoring) for batch in (off, under)],
            "refuse": [
                refused_reading(model, batch, chat, max_new_tokens, max_rows=max_rows)
                for batch in (off, under)
            ],
        }
        for measure, (in_off, in_condition) in readings.items():
            sets = controls if measure == "score" else controls[:n_written]
            level = measured(in_off, [], remember)
            baseline = measured(in_condition, [], remember)
            found = {
                edit: edited_by(in_condition, make[edit], chosen, sets, remember, f"{edit} {kind}", progress)
                for edit in edits
            }
            lines += restored_lines(level, baseline, found, families[kind], kind, measure, seed)
            if measure == "score":
                scores[kind] = level, baseline, found
    if places is not None:
        difference = minus_twins(scores["harmful"], scores["harmless"], places)
        lines += restored_lines(*difference, families["harmful"], DIFFERENCE, "specificity", seed)
    import pandas as pd

    order = {edit: place for place, edit in enumerate(edits)}
    lines.sort(key=lambda line: order[line["edit"]])
    table = pd.DataFrame(lines, columns=list(COLUMNS))
    table["condition"] = condition
    table.attrs = settings
    return table
