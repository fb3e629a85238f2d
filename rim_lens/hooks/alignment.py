"""Which row of one prompt stands for which row of another, by span and position rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rim_lens.chat.spans import ATOMS, SpanBatch
from rim_lens.errors import EmptySpan, ReferenceMismatch
from rim_lens.hooks.positions import Positions, chosen_rows, is_word, told

Align = Literal["end", "start", "stretch"]
RULES: tuple[Align, ...] = ("end", "start", "stretch")


@dataclass(frozen=True, eq=False)  # tensors have no one truth value
class Alignment:
    """The counterparts of a batch's tokens in a source.

    Attributes:
        source: Position of each token's counterpart in its source row; −1 where it has none, on padding too.
        real: Which positions of the batch are tokens.
    """

    source: Int[Tensor, "prompt pos"]
    real: Bool[Tensor, "prompt pos"]

    @property
    def found(self) -> Bool[Tensor, "prompt pos"]:
        """Which tokens have a counterpart."""
        return self.source >= 0

    def missing(self, rows: Bool[Tensor, "prompt pos"] | None = None) -> Int[Tensor, " prompt"]:
        """Count the tokens (of the rows given, or all) that have no counterpart and so stay as they are."""
        lost = self.real & ~self.found
        return (lost if rows is None else lost & rows).sum(dim=1)


def align(
    target: SpanBatch, source: SpanBatch, rule: Align = "end", source_rows: Sequence[int] | None = None
) -> Alignment:
    """Find, for every token of the target prompts, the source token that stands for it.

    Only tokens of the same atom correspond, in order, by their rank within it. Of an atom with n tokens in the
    target and m in the source:

    - "end": the last tokens correspond, the one before the last, and so on;
    - "start": the first ones do;
    - "stretch": token k of n stands at (k + ½) / n of the atom, and so does its counterpart among the m; where
      m < n, neighbours share one.

    With n = m all three give the same, one to one. A token beyond the shorter side ("end", "start"), or whose atom
    the source lacks, has no counterpart. A span whose tokens mean other things in another order (a rewritten CoT)
    aligns by this rule all the same: that two tokens correspond does not show that they say the same.

    Args:
        target: Prompts whose tokens are asked about.
        source: Prompts that the counterparts are sought in.
        rule: "end", "start" or "stretch".
        source_rows: The source row for each target row; row i for row i when None.

    Raises:
        ReferenceMismatch: There is not one source row for each target row.

    >>> import rim_lens as rl
    >>> chat = rl.ChatFormat.from_model(rl.load_model("toy"))
    >>> requests = rl.load_prompts("harmful", language="toy", split="select")[:2]
    >>> off, cot = chat.render(requests, think="off"), chat.render(requests, think=chat.cots(requests, "careful"))
    >>> align(off, cot).missing().tolist(), align(cot, off).missing().tolist() == cot.spans["cot"].sum(dim=1).tolist()
    ([0, 0], True)
    """
    check_rule(rule)
    rows = list(range(len(source))) if source_rows is None else list(source_rows)
    if len(rows) != len(target):
        raise ReferenceMismatch(
            f"{len(target)} prompts were to be aligned with {len(rows)} source prompts; row i of the source stands for"
            " row i of the target, so give as many."
        )
    found = torch.full(target.tokens.shape, -1)
    for atom in ATOMS:
        here, there = target.spans[atom].cpu(), source.spans[atom].cpu()[rows]
        if not here.any() or not there.any():
            continue
        n, m = here.sum(dim=1, keepdim=True), there.sum(dim=1, keepdim=True)
        rank = here.long().cumsum(dim=1) - 1
        if rule == "end":
            rank = rank + m - n
        elif rule == "stretch":
            rank = (2 * rank + 1) * m // (2 * n).clamp(min=1)
        places = torch.argsort(~there, dim=1, stable=True)  # the atom's tokens first, in order
        has = here & (rank >= 0) & (rank < m)
        counterpart = places.gather(1, rank.clamp(0, places.shape[1] - 1))
        found[has] = counterpart[has]
    return Alignment(found, target.attention_mask.bool().cpu())


def require_counterparts(
    alignment: Alignment, batch: SpanBatch, positions: Positions, what: str
) -> Int[Tensor, " prompt"]:
    """Refuse prompts of which no row that is asked for has a counterpart.

    Args:
        alignment: The batch's counterparts.
        batch: The prompts.
        positions: Rows asked for, as editors take them.
        what: Who asks, for the message.

    Returns:
        Tokens asked for that have no counterpart and stay as they are, by prompt.

    Raises:
        EmptySpan: Nothing would be edited in some prompt.
    """
    rows = chosen_rows(positions, batch, 0, *batch.tokens.shape) & alignment.real
    bare = (~(rows & alignment.found).any(dim=1)).nonzero().flatten().tolist()
    if bare:
        first = bare[0]
        atoms = sorted({atom for atom in ATOMS if bool((batch.spans[atom][first].cpu() & rows[first]).any())})
        spans = f"spans {', '.join(atoms)}" if atoms else "no token of the prompt"
        advice = (
            " Tokens still to be written have no counterpart: a mean for them is of what a model wrote"
            " (method='mean', reference=rl.generate(...).batch)."
            if is_word(positions, "generated")
            else ""
        )
        raise EmptySpan(
            f"{what}: positions={told(positions)} means {spans} of prompt {batch.prompts[first].id!r} (row {first}), of which"
            f" nothing has a counterpart in its source prompt; so in {len(bare)} of {len(batch)} prompts. Ask for a"
            f" span that both sides have: rim_lens.hooks.align(target, source).found shows where.{advice}"
        )
    return alignment.missing(rows)


def check_rule(rule: str) -> None:
    """Raise ValueError unless the rule is one of RULES."""
    if rule not in RULES:
        raise ValueError(f"align={rule!r} was asked for; there are {', '.join(map(repr, RULES))}.")
