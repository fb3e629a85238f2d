"""What removing a set of heads does: to what is written, to refusal, to reasoning and to text that has nothing to do with either."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from jaxtyping import Float

from rim_lens.batching import MAX_ROWS
from rim_lens.chat import ChatFormat, SpanBatch, render_conditions
from rim_lens.chat.conditions import STANDARD, Conditions, is_control
from rim_lens.errors import ConditionError, NotEnoughData, StatisticsError, StudyFolderError
from rim_lens.folder import ResultFolder
from rim_lens.generation import generate
from rim_lens.hooks import AblateHeads
from rim_lens.hooks.base import Component
from rim_lens.hooks.positions import Positions, told
from rim_lens.lens import Head, Model, verify, weights_digest
from rim_lens.measures.controls import control_p, percentile_among, random_heads_per_layer
from rim_lens.measures.frames import frame_from_json, frame_to_json
from rim_lens.measures.heads.effects import Editor, Remember, editor_name, head_effects, set_name
from rim_lens.measures.heads.forced import answer_reading, divergence_reading
from rim_lens.measures.heads.held_out import heads_to_edit
from rim_lens.measures.heads.readings import Reading, accuracy_reading, refusal_reading
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.refusal.rates import VERDICTS, families_of, share_interval
from rim_lens.measures.stats import bootstrap_interval, family_index, sign_flip_test
from rim_lens.measures.two_sides import Side, named, twin_places
from rim_lens.prompts import Prompt

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 1
COLUMNS = (
    *("measure", "kind", "condition", "unit", "n", "n_families"),
    *("before", "before_low", "before_high", "after", "after_low", "after_high"),
    *("change", "change_low", "change_high", "p"),
    *("random", "random_low", "random_high", "percentile", "p_controls", "n_controls"),
)
SHARE = "share"
Values = Float[np.ndarray, " prompt"]


@dataclass(frozen=True, eq=False)
class RemovalEffects:
    """What removing a set of heads does, beside random sets with as many heads in each layer.

    Attributes:
        table: One row per measure, kind of prompts and think condition; see `removal_effects`.
        sets: One row per random set and row of the table: control (number), heads, measure, kind, condition, change.
        rows: One row per prompt and row of the table: measure, kind, condition, prompt, family, before, after.
        settings: What was asked, what was used as neutral text, digests of prompts and weights.
    """

    table: pd.DataFrame
    sets: pd.DataFrame
    rows: pd.DataFrame
    settings: dict[str, Any]

    def __repr__(self) -> str:
        settings = self.settings
        return (
            f"RemovalEffects({settings['set']} by {settings['editor']}, {len(self.table)} rows, beside"
            f" {len(settings['controls'])} random sets)"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.table.copy()

    def row(self, measure: str, kind: str, condition: str) -> dict[str, Any]:
        """One row of the table.

        Raises:
            StatisticsError: There is none.
        """
        table = self.table
        here = table[
            (table["measure"] == measure) & (table["kind"] == kind) & (table["condition"] == condition)
        ]
        if len(here) != 1:
            there = sorted({(m, k, c) for m, k, c in table[["measure", "kind", "condition"]].values.tolist()})
            raise StatisticsError(
                f"no row is of {measure!r} on {kind!r} in {condition!r}; there are {there}."
            )
        return {str(name): value for name, value in here.iloc[0].to_dict().items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON; NaN becomes None."""
        return {
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            **{name: frame_to_json(getattr(self, name)) for name in ("table", "sets", "rows")},
        }

    def save(self, folder: str | Path) -> None:
        """Write removal.json into a folder, which is made where there is none."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        (folder / "removal.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            StudyFolderError: The file is missing or cannot be read, or is of another format version.
        """
        path = Path(folder) / "removal.json"
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            version = read["format_version"]
            if version == FORMAT_VERSION:
                frames = {name: frame_from_json(read[name]) for name in ("table", "sets", "rows")}
                return cls(settings=read["settings"], **frames)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise StudyFolderError(
                f"{path} is no readable result ({problem}). Give the folder that RemovalEffects.save wrote."
            ) from problem
        raise StudyFolderError(
            f"{path}: format version {version} was found, and this rim_lens reads {FORMAT_VERSION}. Measure again."
        )


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
            readings.append(("written", kind, _written_reading(model, batch, chat, max_rows, writing)))
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
    lines: list[_Line] = []
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
        line = _Line(measure, kind, reading.batch.name, reading.units, reading.batch.prompts, before, edited)
        lines += _by_verdict(line, reading.batch) if measure == "written" else [line]
    lines += _specificities(lines, harmful, harmless, prompts)
    return _tables(lines, controls, settings, seed)


@dataclass(frozen=True)
class _Line:
    """A row of the table to be: numbers per prompt, before, and after the edit of the set and of each random set."""

    measure: str
    kind: str
    condition: str
    unit: str
    prompts: Sequence[Prompt]
    before: Values
    edited: Sequence[Values] = field(repr=False)

    @property
    def after(self) -> Values:
        return self.edited[0]

    @property
    def random(self) -> list[float]:
        """Mean change by each random set."""
        return [float((values - self.before).mean()) for values in self.edited[1:]]


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


# --- what was written --------------------------------------------------------------------------------

_IN_THINK, _EMPTY = len(VERDICTS), 2 * len(VERDICTS)


def _written_reading(
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


def _by_verdict(line: _Line, batch: SpanBatch) -> list[_Line]:
    def share(measure: str, says: Callable[[np.ndarray], np.ndarray]) -> _Line:
        before, *edited = (
            says(np.rint(codes).astype(int)).astype(np.float64) for codes in (line.before, *line.edited)
        )
        return _Line(measure, line.kind, line.condition, SHARE, line.prompts, before, edited)

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


def _specificities(
    lines: Sequence[_Line],
    harmful: Sequence[Prompt | str],
    harmless: Sequence[Prompt | str],
    prompts: Mapping[str, list[Prompt]],
) -> list[_Line]:
    """Scores of harmful requests minus those of their twins, where every one has its twin."""
    places = twin_places(Side(prompts["harmful"], prompts["harmless"]))
    plain = all(isinstance(asked, str) for asked in (*harmful, *harmless))
    if places is None and plain and len(harmful) == len(harmless):
        places = list(range(len(harmful)))
    if places is None:
        return []
    scores = {(line.kind, line.condition): line for line in lines if line.measure == "score"}
    found = []
    for (kind, condition), line in scores.items():
        if kind != "harmful":
            continue
        twins = scores["harmless", condition]
        found.append(
            _Line(
                "specificity",
                "harmful − harmless",
                condition,
                line.unit,
                line.prompts,
                line.before - twins.before[places],
                [own - other[places] for own, other in zip(line.edited, twins.edited, strict=True)],
            )
        )
    return found


def _tables(
    lines: Sequence[_Line], controls: Sequence[Sequence[Head]], settings: dict[str, Any], seed: int
) -> RemovalEffects:
    import pandas as pd

    p = _corrected(lines, seed)
    table, sets, rows = [], [], []
    for line in lines:
        families = families_of(line.prompts)
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
            {"control": number, "heads": set_name(controls[number]), **same, "change": change}
            for number, change in enumerate(line.random)
        ]
        rows += [
            {**same, "prompt": prompt.id, "family": family, "before": float(before), "after": float(after)}
            for prompt, family, before, after in zip(
                line.prompts, families, line.before, line.after, strict=True
            )
        ]
    return RemovalEffects(
        table=pd.DataFrame(table, columns=list(COLUMNS)),
        sets=pd.DataFrame(sets, columns=["control", "heads", "measure", "kind", "condition", "change"]),
        rows=pd.DataFrame(rows),
        settings=settings,
    )


def _corrected(lines: Sequence[_Line], seed: int) -> dict[tuple[str, str, str], float]:
    """Give p of each line, corrected over the conditions of its measure and kind."""
    groups: dict[tuple[str, str], list[_Line]] = {}
    for line in lines:
        if line.measure != "kl":
            groups.setdefault((line.measure, line.kind), []).append(line)
    found = {}
    for (measure, kind), members in groups.items():
        changes = np.stack([line.after - line.before for line in members], axis=1)
        test = sign_flip_test(changes, families=families_of(members[0].prompts), correction="max", seed=seed)
        for line, p in zip(members, np.atleast_1d(test.p).tolist(), strict=True):
            found[measure, kind, line.condition] = p
    return found


def _level(name: str, values: Values, families: Sequence[str], line: _Line, seed: int) -> dict[str, float]:
    if line.unit == SHARE or line.measure == "correct":
        share = share_interval(values, list(families), seed=seed)
        return {
            name: float(share.estimate),
            f"{name}_low": float(share.low),
            f"{name}_high": float(share.high),
        }
    return mean_columns(name, values, families, seed)


def shuffled(controls: list[list[Head]], seed: int) -> list[list[Head]]:
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
