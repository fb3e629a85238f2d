"""Checks on what `ChatFormat.render` is asked, before anything is tokenised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rim_lens.chat.rendering import Message
from rim_lens.errors import ConditionError

History = Sequence[Message] | Sequence[Sequence[Message]]
KINDS_OF_COT = ("careful", "confirm", "deviate", "heuristic", "filler", "unrelated")
# Words that stand for a condition with some other tool, and would else be rendered as a chain of thought of one word.
_NO_TEXTS = (
    "off",
    "open",
    "on",
    "closed",
    "close",
    "empty",
    "none",
    "cot",
    "think",
    "no_think",
    "true",
    "false",
)


def check_think(think: object) -> None:
    """Refuse what is neither a condition nor a text, and words that are meant for a condition.

    Raises:
        ConditionError: It is one of these.
    """
    word = isinstance(think, str) and think.strip().lower() in _NO_TEXTS
    if think is None or isinstance(think, bool) or word:
        raise ConditionError(
            f"think={think!r} is no condition: there are think='off' (an empty block, closed), think='open' (the model writes its"
            " chain of thought next), and a chain of thought, which is the text itself, or one for each request."
        )


def one_per_row(given: str | Sequence[str], n_rows: int, what: str) -> list[str]:
    """Repeat a single text, or check that there is one per row.

    Raises:
        ConditionError: There are more or fewer, or one is no text.
    """
    if not isinstance(given, Iterable):
        raise ConditionError(f"{what}={given!r} is no text; give one for all requests, or one each.")
    texts = [given] * n_rows if isinstance(given, str) else list(given)
    if len(texts) != n_rows:
        raise ConditionError(
            f"{what} has {len(texts)} texts for {n_rows} requests; give one for all, or one each."
        )
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConditionError(f"{what}: row {row} is {text!r}, not a text.")
    return texts


def check_cot(cot: str, row: int) -> None:
    """Refuse an empty chain of thought, and the name of a kind in place of a text.

    Raises:
        ConditionError: It is one of these.
    """
    if not cot.strip():
        raise ConditionError(
            f"the chain of thought of row {row} is empty; an empty block is think='off', the generation prompt alone"
            " think='open'."
        )
    *_, kind, form = ("", "", *cot.split(":"))
    if form in ("statement", "begun") and kind in KINDS_OF_COT:
        raise ConditionError(
            f"think={cot!r} is the name of a condition, not a text; write rl.render_conditions(chat, requests, [{cot!r}])."
        )
    if cot in KINDS_OF_COT:
        raise ConditionError(
            f"think={cot!r} is a kind of chain of thought, not a text; write think=chat.cots(requests, {cot!r})."
        )


def refuse_control(text: str, control: Iterable[str], what: str) -> None:
    """Refuse words for the assistant that hold a tag or another control string.

    Raises:
        ConditionError: They do.
    """
    found = next((token for token in sorted(control) if token in text), None)
    if found is not None:
        raise ConditionError(
            f"{what} holds {found!r}, which is the format's to write: spans could not be told apart. Give the text"
            " without tags and control tokens."
        )


def one_history_per_row(history: History | None, n_rows: int) -> list[Sequence[Message]]:
    """Repeat a shared history, or check that there is one per row; each goes user, assistant, user, assistant.

    Raises:
        ConditionError: The number, the roles or the messages do not fit.
    """
    if not history:
        return [()] * n_rows
    shared = isinstance(history[0], Mapping)
    histories: list[Any] = [history] * n_rows if shared else list(history)
    if len(histories) != n_rows:
        raise ConditionError(
            f"history has {len(histories)} conversations for {n_rows} requests; give one for all, or one each."
        )
    for row, messages in enumerate(histories):
        roles = [message.get("role") for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2) or not all(
            set(message) == {"role", "content"} and isinstance(message["content"], str)
            for message in messages
        ):
            raise ConditionError(
                f"the history of row {row} has roles {roles}; it must go user, assistant, user, assistant … with"
                ' messages {"role": ..., "content": text}. System words go into system=, the last request into requests.'
            )
    return histories
