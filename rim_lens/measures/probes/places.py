"""Places of a prompt by name: spans, single tokens of them, tokens counted from the assistant header."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rim_lens.chat.spans import ATOMS, COMPOSITES, NEAREST, SpanBatch
from rim_lens.errors import EmptySpan, UnknownSpan

# The six positions of the paper (section 3): five single tokens, and the mean over the chain of thought.
SIX = ("turn_end", "assistant", "think_open", "gap", "think_close", "cot")

_NAME = re.compile(
    r"(?P<span>[a-z_]+?)(?::(?P<end>first|last)|(?P<step>[+-]\d+)|@(?P<share>0(?:\.\d+)?|1(?:\.0+)?))?"
)


def place_rows(batch: SpanBatch, places: Sequence[str]) -> Float[Tensor, "prompt place pos"]:
    """Return, for each place, the weights by which the rows of a prompt are averaged there.

    ==================  ==================================================================================
    cot, gap …          the mean over the rows of that span (a single token: its row)
    cot:first, :last    its first or last token
    assistant+1, -1     a token counted from the last token of the assistant header; +0 is that token
    prompt_last         the row that produces the first generated token
    cot@0.25            a quarter of the way from the first to the last token of the span, between two rows
                        in proportion: lengths are made comparable so
    ==================  ==================================================================================

    Weights add to 1; where a prompt has no such row they are all 0 (`place_present`).

    Args:
        batch: Prompts.
        places: Names, each once.

    Raises:
        UnknownSpan: A name that means no place, or one given twice.
    """
    check_places(places)
    return torch.stack([_weights(batch, name) for name in places], dim=1)


def place_present(batch: SpanBatch, places: Sequence[str]) -> Bool[Tensor, "prompt place"]:
    """Return which prompts have which places."""
    return place_rows(batch, places).any(dim=2)


def require_place(batch: SpanBatch, places: Sequence[str]) -> Bool[Tensor, "prompt place"]:
    """Return which prompts have which places, or refuse where no prompt has any.

    Raises:
        EmptySpan: No place has a token in any prompt; the message names nearest spans that have.
    """
    present = place_present(batch, places)
    if not bool(present.any()):
        near = sorted({NEAREST[name] for name in places if name in NEAREST} & set(batch.spans.present()))
        advice = f" Ask for {', '.join(map(repr, near))} instead." if near else ""
        raise EmptySpan(
            f"none of the places {list(places)} has a token in {batch.name!r}; its spans are"
            f" {', '.join(batch.spans.present())}.{advice}"
        )
    return present


def check_places(places: Sequence[str]) -> None:
    """Refuse names that mean no place.

    Raises:
        UnknownSpan: A name that means no place, one given twice, or none at all.

    >>> check_places(["cot", "assistant+1", "think_close:last", "cot@0.5"])
    """
    if isinstance(places, str) or not places or len(set(places)) < len(places):
        raise UnknownSpan(f"places={places!r} was asked for; give a list of names, each once.")
    for name in places:
        found = _NAME.fullmatch(name)
        span = found["span"] if found else None
        known = span in ATOMS or span in COMPOSITES or name == "prompt_last"
        if found is None or not known or (found["step"] and span != "assistant"):
            raise UnknownSpan(
                f"no place is called {name!r}; places are spans ({', '.join((*ATOMS, *COMPOSITES))}), their ends"
                " ('cot:first', 'cot:last'), shares of their length ('cot@0.5'), tokens counted from the assistant header"
                " ('assistant+1', 'assistant-2') and 'prompt_last'."
            )


def _weights(batch: SpanBatch, name: str) -> Float[Tensor, "prompt pos"]:
    weights = torch.zeros(batch.tokens.shape)
    width = batch.tokens.shape[1]
    if name == "prompt_last":
        return weights.scatter(1, batch.prompt_last.expand(len(batch))[:, None], 1.0)
    found = _NAME.fullmatch(name)
    assert found is not None  # noqa: S101 - checked by every caller
    mask = batch.spans[found["span"]]
    if not (found["end"] or found["step"] or found["share"]):
        return mask.float() / mask.sum(dim=1, keepdim=True).clamp(min=1)
    for row in mask.any(dim=1).nonzero().flatten().tolist():
        rows = mask[row].nonzero().flatten()
        if found["step"]:
            at = int(rows[-1]) + int(found["step"])
            if 0 <= at < width and bool(batch.attention_mask[row, at]):
                weights[row, at] = 1.0
        elif found["end"]:
            weights[row, rows[0 if found["end"] == "first" else -1]] = 1.0
        else:
            at_share = float(found["share"]) * (len(rows) - 1)
            low = min(int(at_share), max(0, len(rows) - 2))
            weights[row, rows[low]] += 1 - (at_share - low)
            if len(rows) > 1:
                weights[row, rows[low + 1]] += at_share - low
    return weights
