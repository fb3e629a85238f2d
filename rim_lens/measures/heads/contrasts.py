"""Where heads look in two conditions of the same requests, named, so that tables and pictures can be pointed at any pair."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rim_lens.chat import SpanBatch
from rim_lens.errors import ConditionError
from rim_lens.measures.heads.looking import empty_block_span


class Contrast(NamedTuple):
    """A move of the last prompt row's attention between two conditions.

    Attributes:
        name: Short, for column names.
        first: Condition in which attention rests on `leaves`.
        second: Condition in which it rests on `enters`.
        leaves: Span, in the first condition.
        enters: Span, in the second. None: where the empty think block is, `gap`, or `think` where it holds no token.
    """

    name: str
    first: str
    second: str
    leaves: str
    enters: str | None = None


# Paper, section 3: from the role word, when the model may think, into the empty block.
PAPER = Contrast("empty", "open", "off", "assistant")
# From the words of a chain of thought into the empty block that stands in their place.
CHAIN = Contrast("chain", "careful", "off", "cot")


def settled(contrasts: Iterable[Contrast], batches: dict[str, SpanBatch]) -> list[Contrast]:
    """Return contrasts with their target span named, checked against the conditions that are read.

    Args:
        contrasts: As asked for.
        batches: Condition → prompts.

    Raises:
        ConditionError: A contrast is of a condition that is not read, or two bear one name.
        EmptySpan: A span has no token in some prompt of its condition.
    """
    found: list[Contrast] = []
    for contrast in contrasts:
        absent = [name for name in (contrast.first, contrast.second) if name not in batches]
        if absent:
            raise ConditionError(
                f"contrast {contrast.name!r} is of condition {absent[0]!r}, and the conditions read are"
                f" {', '.join(batches)}. Add it to conditions=, or leave the contrast out."
            )
        if contrast.name in [other.name for other in found]:
            raise ConditionError(f"two contrasts are called {contrast.name!r}; give each a name of its own.")
        enters = contrast.enters or empty_block_span(batches[contrast.second])
        batches[contrast.first].spans.require(contrast.leaves)
        batches[contrast.second].spans.require(enters)
        found.append(contrast._replace(enters=enters))
    return found
