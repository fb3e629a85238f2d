"""Editors of heads: their output z, before W_O, removed, replaced or scaled."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import UnknownHead
from rim_lens.hooks.ablating import Ablation, Method, by_layer, check_factor
from rim_lens.hooks.alignment import Align
from rim_lens.hooks.editing import Change, RowEditor, Rows
from rim_lens.hooks.positions import Positions
from rim_lens.hooks.reference import Per
from rim_lens.lens import Head, Model, ModelFacts, Site


class AblateHeads(Ablation):
    """Remove heads: their output z, before W_O, becomes zero, a mean, or another prompt's.

    Zero is the paper's ablation (section 3); setting z of a head to zero equals zeroing that head's rows of
    W_O, grouped-query models included. The mean is over data (prompts and rows), never over heads. Resampling
    keeps z where the model is used to it: each prompt gets that of a donor prompt, drawn anew from the reference
    for each prompt and never a prompt of its own tokens; all heads of the set take the same donor.

    An effect of an ablation shows that the model, as it stands, uses the head. It does not show that the
    head alone does the work, nor that nothing would take its place after training. A single draw of donors is
    one sample: repeat with other seeds before you conclude. On a bridge whose compatibility mode has folded
    weights, the part of z that value biases contribute (GPT-2) sits in the output bias, and zero leaves it there.

    Args:
        heads: (layer, head) pairs, at least one.
        method: "zero", "mean" or "resample".
        reference: Prompts the mean or the donors are taken from; read anew each time the component
            is attached, so that it always belongs to the model at hand. Resampling keeps them on the CPU meanwhile
            (see `Recording`).
        positions: "all", "prompt_last", "generated", a span's name, or a mask [prompt, pos].
        per: What a mean is taken over. "all": the reference's rows at the same `positions`. "span": each atom's rows
            apart; a row gets the mean of its atom. "position": each place within an atom apart, over the reference
            prompts long enough to have it. "span" and "position" leave generated rows as they are, and need the prompts
            to be bound (by rl.capture, rl.generate, rl.refusal_score or `bound`), as does resampling.
        align: How places within a span correspond, for per="position" and for resampling; see `align`.
        seed: Of the donors. A prompt's donor depends on the seed and its index in the batch alone.

    Raises:
        UnknownHead: No head was named; or, on attaching, the model lacks one.
        ReferenceMismatch: method and reference do not go together, the reference is of another vocabulary, or holds
            no other prompt to resample from.
        EmptySpan: When prompts are bound: a span to be edited is in no reference prompt (per="span"), or nothing in
            some prompt would be edited.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:2], think="off")
    >>> with rl.AblateHeads([(0, 1), (1, 3)]).on(model):
    ...     logits = model(off.tokens, attention_mask=off.attention_mask)
    """

    site = "z"

    def __init__(
        self,
        heads: Iterable[Head],
        method: Method = "zero",
        reference: SpanBatch | None = None,
        positions: Positions = "all",
        per: Per = "all",
        align: Align = "end",
        seed: int = 0,
    ) -> None:
        super().__init__(method, reference, positions, per, align, seed)
        self.heads = some_heads(heads)

    @override
    def what(self) -> list[tuple[int, int]]:
        return self.heads

    @override
    def chosen(self, facts: ModelFacts) -> dict[int, list[int]]:
        return by_layer(facts.check_heads(self.heads))


class ScaleHeads(RowEditor):
    """Multiply the output z of heads, before W_O, by a factor.

    Equals scaling those heads' rows of W_O: 0 removes them, −1 reverses what they write, 2 doubles it.

    Args:
        heads: (layer, head) pairs, at least one.
        factor: Any finite number.
        positions: "all", "prompt_last", "generated", a span's name, or a mask [prompt, pos].

    Raises:
        UnknownHead: No head was named; or, on attaching, the model lacks one.
    """

    def __init__(self, heads: Iterable[Head], factor: float, positions: Positions = "all") -> None:
        super().__init__(positions)
        self.heads = some_heads(heads)
        self.factor = check_factor(factor)

    @override
    def edited_sites(self) -> tuple[Site, ...]:
        return ("z",)

    @override
    def changes(self, model: Model, facts: ModelFacts) -> dict[tuple[Site, int], Change]:
        columns = by_layer(facts.check_heads(self.heads))
        return {("z", layer): partial(self._scale, torch.tensor(chosen)) for layer, chosen in columns.items()}

    def _scale(self, index: Tensor, values: Tensor, rows: Rows) -> Tensor:  # noqa: ARG002
        values[:, index.to(values.device)] *= self.factor
        return values


def some_heads(heads: Iterable[Head]) -> list[Head]:
    """Return the heads as a list, or raise UnknownHead where there is none."""
    named = list(heads)
    if not named:
        raise UnknownHead("no head was named, so nothing would be edited; give (layer, head) pairs.")
    return named
