"""Which heads a result stands for, and that they are not tested on the requests that chose them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from rim_lens.errors import StatisticsError, UnknownHead
from rim_lens.lens import Head, ModelFacts
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.prompts import Prompt, as_prompts


def text_digest(prompt: Prompt) -> str:
    """Twelve hexadecimal digits of a request's words, by which it is known again under any id.

    >>> text_digest(Prompt("a", "Name a fruit.")) == text_digest(Prompt("b", "Name a fruit."))
    True
    """
    return hashlib.sha256(prompt.text.encode()).hexdigest()[:12]


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
    used = [one for one in as_prompts(requests) if text_digest(one) in settings["select_texts"]]
    # A plain string's family is its place in the list, and says nothing across lists.
    related = [
        one for one in requests if isinstance(one, Prompt) and one.family in settings["select_families"]
    ]
    if used or related:
        first = (used or related)[0]
        why = "chose the heads" if used else f"are of a family that chose the heads ({first.family!r})"
        raise StatisticsError(
            f"{len(used or related)} of {len(requests)} requests {why} (first: {first.id!r}); a selection is never tested on"
            " what it was made on. Give requests of the evaluate side: those whose ids and families are in neither"
            " found.settings['select_ids'] nor found.settings['select_families'] (of records with splits:"
            " rl.load_prompts(..., split='evaluate'))."
        )
    return sorted(facts.check_heads(list(heads.found)))
