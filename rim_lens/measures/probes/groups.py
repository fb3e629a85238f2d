"""The prompts that probes are trained on and held against: by kind of request, or by the model's own response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.chat.conditions import Conditions, render_conditions
from rim_lens.errors import ConditionError, RimLensError
from rim_lens.generation import generate
from rim_lens.lens import Model
from rim_lens.measures.refusal.rates import families_of
from rim_lens.measures.two_sides import Side

Contrast = Literal["harmful", "refusal"]
CONTRASTS: dict[str, tuple[str, str]] = {
    "harmful": ("harmful", "harmless"),
    "refusal": ("refused", "complied"),
}


@dataclass(frozen=True, eq=False)
class Groups:
    """Prompts of one side in one condition, by group.

    Attributes:
        batches: "harmful" and "harmless"; where responses were asked for also "refused" and "complied", which are parts of
            "harmful". An open condition is read with what the model itself wrote.
        outcomes: How many harmful requests got which response; empty where none was asked for.
        scored: The same requests with the think block closed, for a refusal score: "harmful", "harmless". Behind the
            model's own chain of thought, given back to it, where it wrote and closed one.
        unscored: Why there are none; "" where there are.
    """

    batches: dict[str, SpanBatch]
    outcomes: dict[str, int] = field(default_factory=dict)
    scored: dict[str, SpanBatch] = field(default_factory=dict)
    unscored: str = ""

    def families(self, group: str) -> list[str]:
        """Family of each prompt of a group."""
        return families_of(self.batches[group].prompts)

    def lacking(self, groups: tuple[str, str]) -> str:
        """Why no probe can be trained on two groups: a class that is empty, or of one family; else ""."""
        counts = [len(self.batches[group]) for group in groups]
        of = sum(self.outcomes.values()) or sum(counts)
        for group, count in zip(groups, counts, strict=True):
            if count == 0:
                return f"one class empty: 0 of {of} {group}"
        for group, count in zip(groups, counts, strict=True):
            if len(set(self.families(group))) < 2:
                return f"one class of a single family: {count} of {of} {group}"
        return ""


def check_contrast(contrast: str) -> tuple[str, str]:
    """Return the positive and the negative group of a contrast.

    Raises:
        ValueError: It is not "harmful" or "refusal".
    """
    if contrast not in CONTRASTS:
        raise ValueError(
            f"contrast={contrast!r} was asked for; it is 'harmful' (harmful against harmless requests) or 'refusal' (harmful"
            " requests that were refused against such as were fulfilled, by the model's own responses)."
        )
    return CONTRASTS[contrast]


def grouped(
    model: Model,
    chat: ChatFormat,
    side: Side,
    think: Conditions,
    *,
    responses: bool,
    seed: int = 0,
    **writing: Any,
) -> dict[str, Groups]:
    """Render the requests of one side in each condition, let the model write where that is needed, and group them.

    Args:
        model: Any HookedTransformer or TransformerBridge.
        chat: Its format.
        side: Requests.
        think: Conditions, see `rim_lens.chat.conditions.render_conditions`; own texts one for all requests.
        responses: Whether harmful requests are grouped by the model's own responses too.
        seed: Of the texts.
        **writing: Passed to `rl.generate`.

    Raises:
        ConditionError: A text of one's own that is not one for all requests, or an unknown condition.
    """
    if isinstance(think, str):
        think = (think,)
    if isinstance(think, Mapping) and not all(
        text is None or isinstance(text, str) for text in think.values()
    ):
        raise ConditionError(
            "a text for each request was given, and harmful and harmless requests are rendered alike here; give one text for"
            " all, or the name of a kind of chain of thought."
        )
    rendered = {
        kind: render_conditions(chat, requests, think, seed=seed)
        for kind, requests in (("harmful", side.harmful), ("harmless", side.harmless))
    }
    return {
        name: _one(
            model, chat, {kind: batches[name] for kind, batches in rendered.items()}, responses, writing
        )
        for name in rendered["harmful"]
    }


def _one(
    model: Model, chat: ChatFormat, batches: dict[str, SpanBatch], responses: bool, writing: dict[str, Any]
) -> Groups:
    opened = batches["harmful"].think == "open"
    read, scored, unscored = dict(batches), dict(batches), ""
    outcomes: dict[str, int] = {}
    for kind, batch in batches.items():
        if not opened and not (responses and kind == "harmful"):
            continue
        out = generate(model, batch, chat=chat, **writing)
        if opened:
            read[kind] = out.batch
        if responses and kind == "harmful":
            for group, verdict in (("refused", "refuse"), ("complied", "comply")):
                rows = [row for row, found in enumerate(out.outcome) if found == verdict]
                read[group] = read[kind].select(rows)
            outcomes = {verdict: out.outcome.count(verdict) for verdict in ("refuse", "comply", "other")}
    if opened:
        scored, unscored = _closed(chat, read)
    return Groups(read, outcomes, scored, unscored)


def _closed(chat: ChatFormat, written: dict[str, SpanBatch]) -> tuple[dict[str, SpanBatch], str]:
    closed = {}
    for kind in ("harmful", "harmless"):
        batch = written[kind]
        rows = [row for row in range(len(batch)) if batch.finished_thinking[row] and batch.cots[row].strip()]
        if len(rows) < 2:
            return (
                {},
                f"the block is open, and the model wrote and closed its own in {len(rows)} {kind} prompts",
            )
        cots = [batch.cots[row] for row in rows]
        try:
            closed[kind] = chat.render(
                [batch.prompts[row] for row in rows], think=cots, label=f"{batch.name}, own chain given back"
            )
        except RimLensError as problem:  # whatever a model writes must not end a study
            return {}, f"the block is open, and the model's own cannot be given back to it ({problem})"
    return closed, ""
