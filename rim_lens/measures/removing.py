"""What a set is removed from: readings of refusal, reasoning and neutral text; and the lines of a table, with random sets beside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rim_lens.chat import ChatFormat, SpanBatch, render_conditions
from rim_lens.chat.conditions import Conditions, is_control
from rim_lens.errors import ConditionError, NotEnoughData
from rim_lens.hooks import Component
from rim_lens.lens import Model
from rim_lens.measures.controls import Unit
from rim_lens.measures.edits import Remember, set_effects
from rim_lens.measures.forced import answer_reading, divergence_reading
from rim_lens.measures.readings import Reading, accuracy_reading, refusal_reading
from rim_lens.measures.refusal.openers import opener_texts
from rim_lens.measures.removal_table import Line, by_verdict, specificities, written_reading
from rim_lens.measures.twins import with_families, witnesses
from rim_lens.measures.two_sides import named
from rim_lens.prompts import Prompt

# What is written takes a pass per token: fewer sets are read by it than by scores.
WRITTEN = ("written", "correct")


@dataclass(frozen=True)
class Asked:
    """Prompts, and everything that is read on them.

    Attributes:
        prompts: By kind: harmful, harmless, reasoning.
        conditions: Names.
        readings: (measure, kind, reading), in the order of the table.
        neutral: What the neutral texts are; None where there are none.
        n_neutral: How many.
    """

    prompts: dict[str, list[Prompt]]
    conditions: list[str]
    readings: list[tuple[str, str, Reading]]
    neutral: str | None
    n_neutral: int

    def settings(self) -> dict[str, Any]:
        """What was asked, as plain values."""
        return {
            "conditions": self.conditions,
            "neutral": self.neutral,
            "n": {kind: len(asked) for kind, asked in self.prompts.items()} | {"neutral": self.n_neutral},
            "digests": {
                f"{kind} {reading.batch.name}": reading.batch.digest
                for measure, kind, reading in self.readings
                if measure != "answer"
            },
        }


def both_kinds(
    harmful: Sequence[Prompt | str], harmless: Sequence[Prompt | str], what: str
) -> dict[str, list[Prompt]]:
    """Return named records of both kinds, twins in the family of their harmful request where they have none.

    Raises:
        MissingTwin: See `twin_places`.
        NotEnoughData: There are none of a kind.
    """
    prompts = {"harmful": named(harmful, "harmful"), "harmless": named(harmless, "harmless")}
    missing = [kind for kind, asked in prompts.items() if not asked]
    if missing:
        raise NotEnoughData(
            f"no {missing[0]} requests were given; what {what} does is measured on both kinds."
        )
    prompts["harmless"] = with_families(prompts["harmful"], prompts["harmless"])
    return prompts


def asked_of(
    model: Model,
    chat: ChatFormat,
    prompts: dict[str, list[Prompt]],
    reasoning: Sequence[Prompt | str],
    conditions: Conditions,
    *,
    score: Callable[[Model, SpanBatch], Reading] | None = None,
    written: bool = True,
    neutral: Sequence[str] | None = None,
    divergence: bool = True,
    writing: Mapping[str, Any],
    openers: Iterable[str] | None = None,
    extract: Callable[[str], Any] | None = None,
    max_rows: int,
    seed: int,
) -> Asked:
    """Render prompts in every condition, and say what is read on them; nothing is run.

    Args:
        model: The model.
        chat: Its chat format.
        prompts: Of `both_kinds`.
        reasoning: Questions with checked answers, or none.
        conditions: See `render_conditions`.
        score: Makes the reading of closed conditions; None: `refusal_reading` with these openers.
        written: Whether replies are written and judged.
        neutral: Texts; None takes what is at hand.
        divergence: Whether neutral text is read.
        writing: See `generate`.
        openers: See `refusal_score`.
        extract: See `reasoning_accuracy`.
        max_rows: Most prompts in one pass.
        seed: Of chains of thought.

    Raises:
        ConditionError: No condition is closed, or one cannot be rendered.
        AnswerError: A question has no checked answer.
        NotEnoughData: An empty list of texts.
    """
    batches = {kind: render_conditions(chat, asked, conditions, seed=seed) for kind, asked in prompts.items()}
    if all(batch.think == "open" for batch in batches["harmful"].values()):
        raise ConditionError(
            f"none of the conditions {', '.join(batches['harmful'])} is closed, and a score needs one; add 'off'."
        )
    prompts = dict(prompts)
    if reasoning:
        prompts["reasoning"] = named(reasoning, "reasoning")
        batches["reasoning"] = {
            name: batch
            for name, batch in render_conditions(chat, prompts["reasoning"], conditions, seed=seed).items()
            if not is_control(name)
        }
    texts, neutral_is = neutral_texts(chat, batches, neutral) if divergence else (None, None)
    if score is None:
        scoring = {} if openers is None else {"openers": opener_texts(openers)}

        def score(model: Model, batch: SpanBatch) -> Reading:
            return refusal_reading(model, batch, max_rows=max_rows, **scoring)

    readings: list[tuple[str, str, Reading]] = []
    for kind in ("harmful", "harmless"):
        for batch in batches[kind].values():
            if written:
                readings.append(("written", kind, written_reading(model, batch, chat, max_rows, writing)))
            if batch.think != "open":
                readings.append(("score", kind, score(model, batch)))
    for batch in batches.get("reasoning", {}).values():
        correct = accuracy_reading(model, batch, chat, extract=extract, max_rows=max_rows, **writing)
        readings.append(("correct", "reasoning", correct))
        if batch.think != "open":
            readings.append(("answer", "reasoning", answer_reading(model, batch, chat, max_rows)))
    if texts is not None:
        readings.append(("kl", "neutral", divergence_reading(model, texts, max_rows)))
    return Asked(prompts, list(batches["harmful"]), readings, neutral_is, 0 if texts is None else len(texts))


def removal_lines(
    asked: Asked,
    edit: Callable[[Sequence[Unit]], Component],
    chosen: Sequence[Unit],
    controls: Sequence[Sequence[Unit]],
    n_written: int,
    twins: Sequence[int] | None,
    *,
    remember: Remember | None,
    progress: bool,
    what: str,
) -> list[Line]:
    """Take every reading as it is, with the set removed, and with each random set.

    Args:
        asked: What is read.
        edit: Makes the editor of a set.
        chosen: The set.
        controls: Random sets.
        n_written: How many of these are read by what is written.
        twins: For each harmful request, the place of its twin; None without.
        remember: See `head_effects`.
        progress: Show progress bars.
        what: Their label.
    """
    lines: list[Line] = []
    families = witnesses(asked.prompts["harmful"], asked.prompts["harmless"], enumerate(twins or ()))
    for measure, kind, reading in asked.readings:
        sets = controls[:n_written] if measure in WRITTEN else controls
        editors = {str(place): edit(members) for place, members in enumerate([chosen, *sets])}
        before, effects = set_effects(reading, editors, remember, progress, f"{what}, {measure} {kind}")
        edited = [before + effects[:, place] for place in range(len(editors))]
        label = (measure, kind, reading.batch.name, reading.units)
        line = Line(*label, reading.batch.prompts, before, edited, families.get(kind, ()))
        lines += by_verdict(line, reading.batch) if measure == "written" else [line]
    return lines + specificities(lines, twins)


def neutral_texts(
    chat: ChatFormat, batches: Mapping[str, Mapping[str, SpanBatch]], given: Sequence[str] | None
) -> tuple[SpanBatch, str]:
    """The neutral texts, and what they are.

    Raises:
        NotEnoughData: An empty list was given.
    """
    if given is not None:
        if isinstance(given, str) or not len(given):
            raise NotEnoughData(
                "neutral text is a list of texts, and at least one; None takes what is at hand, or none."
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
