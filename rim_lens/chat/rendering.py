"""From words to text: the pieces of one row in order, each with the atom it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from rim_lens.chat.formats import FormatSpec
from rim_lens.chat.labelling import Segment, merge, separate
from rim_lens.chat.spans import Condition

Message = Mapping[str, str]


class Default(Enum):
    """Asks for what the template injects when no system message is given."""

    DEFAULT = "what the template injects when no system message is given"


DEFAULT = Default.DEFAULT

# What a template may do with an earlier assistant turn: keep a think block, or drop it and strip what follows.
EARLIER_REASONING: tuple[Callable[[str, str], str], ...] = (
    lambda words, _close: words,
    lambda words, close: words.split(close)[-1].lstrip("\n") if close in words else words,
    lambda words, close: words.split(close)[-1].strip() if close in words else words,
    lambda words, close: words.split(close)[-1],
    lambda words, close: words.split(close)[-1].strip(),
)


@dataclass(frozen=True)
class Rendering:
    """A format with all that its pieces do not say, as found on one tokenizer.

    Attributes:
        spec: The format's pieces.
        injected: What the template writes between BOS and first user turn when no system message is given.
        earlier_reasoning: Index into `EARLIER_REASONING`.
    """

    spec: FormatSpec
    injected: tuple[Segment, ...] = ()
    earlier_reasoning: int = 0

    def block(self, condition: Condition, cot: str = "") -> list[Segment]:
        """The think block of a condition; empty where an open prompt leaves the opener to the model.

        Of an open block `cot` is the beginning, after which the model goes on: no whitespace follows it, as that would
        be part of the model's next token.
        """
        spec = self.spec
        opening = Segment(spec.think_open, "think_open")
        if condition == "open" and cot:
            return [opening, Segment(spec.after_open + cot, "cot")]
        if condition == "open":
            return [] if spec.opener == "model" else [opening, Segment(spec.after_open, "gap")]
        inside = Segment(spec.after_open + cot + spec.before_close, "cot" if cot else "gap")
        return [
            opening,
            inside,
            Segment(spec.think_close, "think_close"),
            Segment(spec.after_close, "template"),
        ]

    def segments(
        self,
        request: str,
        block: Sequence[Segment],
        system: str | Default | None = None,
        history: Sequence[Message] = (),
    ) -> list[Segment]:
        """The pieces of a prompt, neighbours of one atom joined, none empty."""
        spec = self.spec
        pieces = [Segment(spec.bos, "template")]
        system_turn = self._system_turn(system)
        if not (spec.system_in_user and isinstance(system, str)):
            pieces += system_turn
            system_turn = []
        for message in history:
            if message["role"] == "user":
                pieces += self._user_turn(message["content"], system_turn, words="template", end="template")
                system_turn = []
            else:
                pieces += self._earlier_answer(message["content"])
        before_role, role, after_role = spec.assistant
        pieces += [
            *self._user_turn(request, system_turn, words="request", end="turn_end"),
            Segment(before_role, "template"),
            Segment(role, "assistant"),
            Segment(after_role, "template"),
            *block,
        ]
        return merge(separate(pieces, spec.separator))

    def answer(self, words: str, end_turn: bool) -> list[Segment]:
        """The pieces that follow a prompt when the assistant's words are given."""
        pieces = [Segment(words, "answer"), Segment(self.spec.answer_end if end_turn else "", "template")]
        return merge(
            [Segment(self.spec.separator + piece.text, piece.atom) for piece in pieces if piece.text]
        )

    def _system_turn(self, system: str | Default | None) -> list[Segment]:
        if system is DEFAULT:
            return list(self.injected)
        if system is None or self.spec.system is None:
            return []
        before, after = self.spec.system
        words = self._trimmed(str(system), "system")
        return [Segment(before, "template"), Segment(words, "system"), Segment(after, "template")]

    def _user_turn(self, content: str, system_turn: list[Segment], words: str, end: str) -> list[Segment]:
        spec = self.spec
        return [
            Segment(spec.user, "template"),
            *system_turn,
            Segment(self._trimmed(content, "user"), words),
            Segment(spec.turn_end, end),
            Segment(spec.between, "template"),
        ]

    def _earlier_answer(self, content: str) -> list[Segment]:
        spec = self.spec
        words = EARLIER_REASONING[self.earlier_reasoning](
            self._trimmed(content, "assistant"), spec.think_close
        )
        end = spec.answer_end if spec.earlier_end is None else spec.earlier_end
        return [
            Segment(piece, "template")
            for piece in (*spec.assistant, spec.earlier_lead, words, end, spec.between)
        ]

    def _trimmed(self, words: str, role: str) -> str:
        return words.strip() if role in self.spec.trims else words
