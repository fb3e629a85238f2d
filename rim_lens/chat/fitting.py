"""Hold a chat format against a tokenizer's own template, so that a changed template is noticed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rim_lens.chat.formats import FormatSpec, Opener, template_text
from rim_lens.chat.labelling import Segment, joined
from rim_lens.chat.rendering import DEFAULT, EARLIER_REASONING, Message, Rendering
from rim_lens.errors import TemplateMismatch

USER: Message = {"role": "user", "content": "Probe request."}
REQUEST, ANSWER, SYSTEM = USER["content"], "Probe answer.", "Probe system."


def fit(spec: FormatSpec, tokenizer: Any) -> Rendering:
    """Compare a format with the tokenizer's template on probe messages, and take over what may differ.

    Taken over: who writes the opener, the text around system words (some templates put a preamble there), what is
    injected without a system message, and what becomes of reasoning in earlier turns. All else must be equal.
    A tokenizer without a template is rendered by the format as it stands.

    Raises:
        TemplateMismatch: The template renders otherwise than the format.
    """
    if template_text(tokenizer) is None:
        return Rendering(spec)
    plain = _apply(spec, tokenizer, USER)
    rendering = _with_opener(spec, plain)
    tail = joined(rendering.segments(REQUEST, _generation_prompt(rendering))).removeprefix(spec.bos)
    if not plain.startswith(spec.bos) or not plain.endswith(tail):
        raise _mismatch(spec, "a request", plain, spec.bos + tail)
    before_user = plain[len(spec.bos) : len(plain) - len(tail)]
    if spec.bos and spec.bos in before_user:
        raise _mismatch(spec, "the begin-of-sequence token", plain, spec.bos + tail)
    rendering = replace(rendering, injected=_injected(spec, before_user))
    if spec.system is not None:
        around = _around_system(rendering, tokenizer, tail)
        rendering = replace(rendering, spec=replace(rendering.spec, system=around))
    off = _apply(spec, tokenizer, USER, enable_thinking=False)
    ours = joined(rendering.segments(REQUEST, rendering.block("off"), system=DEFAULT))
    if off not in (plain, ours):  # most templates know no such switch and render the plain prompt
        raise _mismatch(spec, "a request with thinking switched off", off, ours)
    return _with_earlier_reasoning(rendering, tokenizer)


def _with_opener(spec: FormatSpec, plain: str) -> Rendering:
    """Find out whether the generation prompt ends with the opening tag, and with what whitespace after it."""
    for space in dict.fromkeys((spec.after_open, "", "\n")):
        held = Rendering(replace(spec, opener="template", after_open=space))
        if plain.endswith(joined(held.segments(REQUEST, held.block("open"))).removeprefix(spec.bos)):
            return held
    silent: Opener = "added" if spec.opener == "added" else "model"
    return Rendering(replace(spec, opener=silent))


def _generation_prompt(rendering: Rendering) -> list[Segment]:
    """What the template itself writes of the think block; an opener that rim_lens adds is not in it."""
    return rendering.block("open") if rendering.spec.opener == "template" else []


def _injected(spec: FormatSpec, text: str) -> tuple[Segment, ...]:
    for around in (spec.injected, spec.system):
        if text and around is not None:
            before, after = around
            words = text[len(before) : len(text) - len(after)]
            if text == before + words + after:
                return Segment(before, "template"), Segment(words, "system"), Segment(after, "template")
    return (Segment(text, "template"),) if text else ()


def _around_system(rendering: Rendering, tokenizer: Any, tail: str) -> tuple[str, str] | None:
    """What the template writes before and after system words, or None where it takes none."""
    spec = rendering.spec
    try:
        theirs = _apply(spec, tokenizer, {"role": "system", "content": SYSTEM}, USER)
    except TemplateMismatch:
        return None
    start, stop = len(spec.bos), len(theirs) - len(tail)
    if spec.system_in_user:
        start, stop, tail = start + len(spec.user), stop + len(spec.user), tail.removeprefix(spec.user)
    if not theirs.endswith(tail):
        raise _mismatch(spec, "a request after a system message", theirs, "…" + tail)
    before, found, after = theirs[start:stop].partition(SYSTEM)
    return (before, after) if found else None


def _with_earlier_reasoning(rendering: Rendering, tokenizer: Any) -> Rendering:
    spec = rendering.spec
    answers = (ANSWER, f"\n{ANSWER} ", f"{spec.think_open}Probe thought.{spec.think_close}\n\n{ANSWER} ")
    conversations = [(USER, {"role": "assistant", "content": words}, USER) for words in answers]
    theirs = [_apply(spec, tokenizer, *conversation) for conversation in conversations]
    ours: list[str] = []
    for number in range(len(EARLIER_REASONING)):
        candidate = replace(rendering, earlier_reasoning=number)
        ours = [
            joined(
                candidate.segments(REQUEST, _generation_prompt(candidate), DEFAULT, history=conversation[:2])
            )
            for conversation in conversations
        ]
        if ours == theirs:
            return candidate
    which = next(place for place in range(len(answers)) if ours[place] != theirs[place])
    raise _mismatch(spec, "an earlier turn", theirs[which], ours[which])


def _apply(spec: FormatSpec, tokenizer: Any, *messages: Message, enable_thinking: bool = True) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=enable_thinking,
            )
        )
    except Exception as problem:
        roles = ", ".join(message["role"] for message in messages)
        raise TemplateMismatch(
            f"the tokenizer's chat template refuses a conversation of {roles}, which format {spec.name!r} allows: {problem}"
        ) from problem


def _mismatch(spec: FormatSpec, what: str, theirs: str, ours: str) -> TemplateMismatch:
    return TemplateMismatch(
        f"format {spec.name!r} renders {what} as {ours!r}, the tokenizer's own chat template as {theirs!r}. The template"
        " is another or has changed: register a format that says what it does (rim_lens.register_format), or name another"
        " one (ChatFormat.from_tokenizer(tokenizer, format=...))."
    )
