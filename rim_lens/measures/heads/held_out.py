"""Which heads a result stands for, and that they are not tested on the requests that chose them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rim_lens.errors import StatisticsError, UnknownHead
from rim_lens.lens import Head, ModelFacts
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.held_out import refuse_used
from rim_lens.prompts import Prompt


class ChosenHeads(tuple[Head, ...]):
    """Heads, and which requests chose them. A part of them (``heads[:3]``) is a plain tuple and does not know.

    Attributes:
        settings: See `chosen_by`.

    >>> from rim_lens.measures.held_out import chosen_by
    >>> ChosenHeads([(0, 5), (1, 1)], chosen_by([Prompt("a", "Name a fruit.")])).top()
    [(0, 5), (1, 1)]
    """

    settings: Mapping[str, Any]

    def __new__(cls, heads: Iterable[Head], settings: Mapping[str, Any]) -> ChosenHeads:
        """Hold both."""
        made = super().__new__(cls, heads)
        made.settings = settings
        return made

    def top(self) -> list[Head]:
        """All of them, as `RefusalHeads.top`."""
        return list(self)


def heads_to_ask(heads: RefusalHeads | Iterable[Head], requests: Sequence[Prompt | str]) -> Iterable[Head]:
    """Return the heads that are meant, where these requests did not choose them: of `RefusalHeads` its `top`.

    Raises:
        StatisticsError: Some request, or its family, chose the heads.
    """
    if isinstance(heads, RefusalHeads | ChosenHeads):
        refuse_used(heads.settings, requests, "heads")
        return heads.top()
    return heads


def heads_to_edit(
    heads: RefusalHeads | Iterable[Head], facts: ModelFacts, requests: Sequence[Prompt | str]
) -> list[Head]:
    """Return the heads that are meant, checked against the model and against what chose them.

    Of `RefusalHeads` it is the set `found`, which the select side chose: verdicts come from the evaluate side, and
    heads picked by them would be tested on what picked them.

    Args:
        heads: What `refusal_heads` found, or (layer, head) pairs.
        facts: The model's.
        requests: Those that the edit is to be tested on.

    Raises:
        UnknownHead: There is none, or the model lacks one.
        StatisticsError: Some request, or its family, chose the heads; or it is not recorded which did.
    """
    if not isinstance(heads, RefusalHeads):
        if isinstance(heads, ChosenHeads):
            refuse_used(heads.settings, requests, "heads")
        chosen = sorted(set(facts.check_heads(list(heads))))
        if not chosen:
            raise UnknownHead("no head was given; give (layer, head) pairs, or what rl.refusal_heads found.")
        return chosen
    if not heads.found:
        raise UnknownHead(
            "these RefusalHeads hold no found set: on the select side no removal lowered refusal enough. Name heads yourself,"
            " (layer, head) pairs chosen on other requests than these."
        )
    settings = heads.settings
    if "select_texts" not in settings:
        raise StatisticsError(
            "these RefusalHeads do not record which requests chose them, so that it cannot be told whether these did. Measure"
            " again with rl.refusal_heads, or give (layer, head) pairs."
        )
    refuse_used(settings, requests, "heads")
    return sorted(facts.check_heads(list(heads.found)))
