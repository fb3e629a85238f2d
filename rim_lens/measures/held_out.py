"""What chose heads or neurons is known again, so that nothing is tested on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from rim_lens.errors import StatisticsError
from rim_lens.prompts import Prompt, as_prompts


def text_digest(prompt: Prompt) -> str:
    """Twelve hexadecimal digits of a request's words, by which it is known again under any id.

    >>> text_digest(Prompt("a", "Name a fruit.")) == text_digest(Prompt("b", "Name a fruit."))
    True
    """
    return hashlib.sha256(prompt.text.encode()).hexdigest()[:12]


def chosen_by(requests: Sequence[Prompt]) -> dict[str, list[str]]:
    """What a selection has to record of the requests it is made on, for `refuse_used`.

    >>> sorted(chosen_by([Prompt("a", "Name a fruit.", family="fruit")]))
    ['select_families', 'select_ids', 'select_texts']
    """
    return {
        "select_ids": [prompt.id for prompt in requests],
        "select_texts": sorted({text_digest(prompt) for prompt in requests}),
        "select_families": sorted({prompt.family for prompt in requests if prompt.family}),
    }


def refuse_used(settings: Mapping[str, Any], requests: Sequence[Prompt | str], what: str) -> None:
    """Refuse requests, or relatives of them, that a selection was made on.

    Args:
        settings: What the selection recorded, see `chosen_by`.
        requests: Those it is to be tested on.
        what: "heads" or "neurons".

    Raises:
        StatisticsError: Some request, or its family, chose them.
    """
    used = [one for one in as_prompts(requests) if text_digest(one) in settings["select_texts"]]
    # A plain string's family is its place in the list, and says nothing across lists.
    related = [
        one for one in requests if isinstance(one, Prompt) and one.family in settings["select_families"]
    ]
    if used or related:
        first = (used or related)[0]
        why = f"chose the {what}" if used else f"are of a family that chose the {what} ({first.family!r})"
        raise StatisticsError(
            f"{len(used or related)} of {len(requests)} requests {why} (first: {first.id!r}); a selection is never tested on"
            " what it was made on. Give requests of the evaluate side: those whose ids and families are in neither"
            " 'select_ids' nor 'select_families' of what the selection recorded (of records with splits:"
            " rl.load_prompts(..., split='evaluate'))."
        )
