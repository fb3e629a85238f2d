"""Editors of attention: block a span's keys for some rows, or move the mass a head gives a span.

Both act on the rows after the softmax (`hook_pattern`), which works in every family; hooks on the scores are dead in
some. Nothing ever goes to a key after its query.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import ImpossibleEdit, SpanError, WrongHookShape
from rim_lens.hooks.base import Component, Edit
from rim_lens.hooks.positions import Positions, chosen_rows, is_word, require_rows, told
from rim_lens.lens import Head, Model, ModelFacts, Site, hook_name

_SLACK = 1e-5  # masses are sums of float32 numbers; what is further off was asked for wrongly


class _Rows(NamedTuple):
    """The attention rows that are edited at one hook of one pass."""

    layer: int
    heads: Int[Tensor, " head"]
    prompt: Int[Tensor, " row"]
    pos: Int[Tensor, " row"]  # absolute, also under a key-value cache
    n_prompts: int
    n_keys: int


class _AttentionEditor(Component):
    """Changes the attention of chosen query rows, in some heads or in all."""

    edits: ClassVar[tuple[Site, ...]] = ("pattern",)

    def __init__(self, query: Positions, heads: Iterable[Head] | None) -> None:
        super().__init__()
        self.query = query
        self.heads = None if heads is None else list(heads)
        self._width = 0  # of the prompts, as the first pass shows it where no batch is bound

    def change(self, rows: Float[Tensor, "row head key"], which: _Rows) -> Float[Tensor, "row head key"]:
        """Return the rows as they are to be. Override this."""
        raise NotImplementedError

    def queries(
        self, batch: SpanBatch | None, offset: int, n_prompts: int, n_queries: int
    ) -> Bool[Tensor, "prompt query"]:
        """Return which rows of a pass are edited."""
        if not is_word(self.query, "later"):
            return chosen_rows(self.query, batch, offset, n_prompts, n_queries)
        keys = chosen_keys(self.key_positions()[0], batch, n_prompts, offset + n_queries, self._width)
        last = torch.where(keys.any(dim=1), _last(keys), keys.shape[1])
        return offset + torch.arange(n_queries)[None] > last[:, None]

    def needed(self, batch: SpanBatch) -> tuple[Bool[Tensor, "prompt key"], str] | None:
        """Return keys of which each edited row must see at least one, and what is wrong where it does not. Override this."""
        raise NotImplementedError

    def key_positions(self) -> list[Positions]:
        """Return the keys asked for; "later" rows come after the first of them. Override this."""
        raise NotImplementedError

    def check_order(self, batch: SpanBatch) -> None:
        """Refuse keys that no row of any prompt can see. Override this where that means that nothing is done."""

    @override
    def check_prompts(self, batch: SpanBatch) -> None:
        asked = self.key_positions()
        if not is_word(self.query, "later"):
            asked.append(self.query)
        for positions in asked:
            require_rows(positions, batch, type(self).__name__)
        self.check_order(batch)
        found = self.needed(batch)
        if found is None:
            return
        keys, wrong = found
        real = batch.attention_mask.bool().cpu()
        rows = self.queries(batch, 0, len(batch), batch.tokens.shape[1]) & real
        bad = (rows & ((keys & real).cumsum(dim=1) == 0)).nonzero()
        if len(bad):
            prompt, pos = bad[0].tolist()
            raise ImpossibleEdit(
                f"{type(self).__name__}: position {pos} of prompt {batch.prompts[prompt].id!r} {wrong} ({len(bad)} such rows)."
                " Choose later query rows."
            )

    @override
    def acts_within(self, batch: SpanBatch) -> bool:
        rows = self.queries(batch, 0, *batch.tokens.shape)
        meant = [rows, *(_prompt_keys(key, batch) for key in self.key_positions())]
        return all(bool((mask & batch.attention_mask.bool().cpu()).any()) for mask in meant)

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        layers: dict[int, list[int]] = {}
        for layer, head in facts.heads() if self.heads is None else facts.check_heads(self.heads):
            layers.setdefault(layer, []).append(head)
        return [
            (hook_name("pattern", layer), partial(self._edit, layer, sorted(heads)))
            for layer, heads in sorted(layers.items())
        ]

    def keys(self, key: Positions, which: _Rows) -> Bool[Tensor, "row key"]:
        """Return which keys are meant, for each row."""
        chosen = chosen_keys(key, self._batch, which.n_prompts, which.n_keys, self._width)
        return chosen.to(which.prompt.device)[which.prompt]

    def visible(self, which: _Rows) -> Bool[Tensor, "row key"]:
        """Return the keys up to each row, padding left out where it is known."""
        causal = torch.arange(which.n_keys, device=which.pos.device)[None] <= which.pos[:, None]
        real = self._real(which.n_keys)
        return causal if real is None else causal & real.to(which.prompt.device)[which.prompt]

    def name(self, which: _Rows, row: int, head: int) -> str:
        """Where a row is, in words, for an error."""
        prompt = int(which.prompt[row])
        known = prompt if self._batch is None else repr(self._batch.prompts[prompt].id)
        return f"layer {which.layer}, head {int(which.heads[head])} at position {int(which.pos[row])} of prompt {known}"

    def _real(self, n_keys: int) -> Bool[Tensor, "prompt key"] | None:
        if self._batch is None:
            return None
        mask = self._batch.attention_mask.bool()
        return torch.nn.functional.pad(mask, (0, n_keys - mask.shape[1]), value=True)

    def _edit(
        self, layer: int, heads: list[int], pattern: Float[Tensor, "prompt head query key"]
    ) -> Tensor | None:
        n_prompts, _, n_queries, n_keys = pattern.shape
        offset = n_keys - n_queries
        if offset == 0:
            self._width = n_keys
        queries = self.queries(self._batch, offset, n_prompts, n_queries)
        real = self._real(n_keys)
        if real is not None:
            queries = queries & real[:, offset:]
        prompt, query = (index.to(pattern.device) for index in queries.nonzero(as_tuple=True))
        if len(prompt) == 0:
            return None
        head = torch.tensor(heads, device=pattern.device)
        which = _Rows(layer, head, prompt, query + offset, n_prompts, n_keys)
        place = prompt[:, None], head[None], query[:, None]
        edited = pattern.clone()
        edited[place] = self.change(pattern[place], which).to(pattern.dtype)
        return edited


class BlockAttention(_AttentionEditor):
    """Take some keys away from some query rows.

    Their entries are zeroed after the softmax and the row is renormalised, which equals −∞ before the softmax: the
    row attends as if the keys were not there. With ``mute=True`` the row is not renormalised: the head loses what
    it read there and nothing takes its place.

    It cuts the direct way from the keys to the rows. What the keys hold still reaches a row through rows in between
    that read them; ``query="later"`` (every row after the keys) cuts those ways too.

    Args:
        query: Rows that lose the keys: "all", "prompt_last", "generated", a span's name, a mask [prompt, pos], or
            "later": every row after the last of the keys, those of generated tokens included.
        key: Keys they lose: a span's name, a mask, "prompt_last", "generated" or "all". Spans hold prompt tokens;
            the keys of tokens written under a cache are in "generated" and "all" alone.
        heads: (layer, head) pairs; every head of every layer when None.
        mute: Do not renormalise.

    Raises:
        UnknownHead: On attaching to a model that lacks one of the heads.
        ImpossibleEdit: While the model runs: a row would be left with nothing to attend to, because it sees no
            other key (the first token sees itself alone) or because all of its attention, to the last bit, is on
            the blocked ones. Padding rows are left alone where a batch is bound.
            Before any pass: in every prompt all keys come after all rows, so that nothing would be blocked.
        EmptySpan: Some prompt has no token in the span.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:2], think="off")
    >>> scores = rl.refusal_score(model, off, rl.BlockAttention("prompt_last", "think"))
    """

    def __init__(
        self,
        query: Positions,
        key: Positions,
        heads: Iterable[Head] | None = None,
        mute: bool = False,
    ) -> None:
        super().__init__(query, heads)
        self.key = key
        self.mute = mute
        _check_later(self)

    @override
    def key_positions(self) -> list[Positions]:
        return [self.key]

    @override
    def check_order(self, batch: SpanBatch) -> None:
        if any(is_word(which, "generated") for which in (self.query, self.key)):
            return  # such come later
        real = batch.attention_mask.bool().cpu()
        keys = _prompt_keys(self.key, batch) & real
        rows = self.queries(batch, 0, len(batch), batch.tokens.shape[1]) & real
        if rows.any() and not (rows & (keys.cumsum(dim=1) > 0)).any():
            raise ImpossibleEdit(
                f"BlockAttention: every key (key={told(self.key)}) comes after the rows that are to lose it (query={told(self.query)}),"
                " in every prompt, and is not seen by them anyway. The order is BlockAttention(query, key): first who looks,"
                " then at what."
            )

    @override
    def needed(self, batch: SpanBatch) -> tuple[Bool[Tensor, "prompt key"], str] | None:
        keys = _prompt_keys(self.key, batch)
        if self.mute:
            return None
        return (
            ~keys,
            f"sees no key but those to be blocked (key={told(self.key)}), and mute=True is not asked for",
        )

    @override
    def change(self, rows: Float[Tensor, "row head key"], which: _Rows) -> Float[Tensor, "row head key"]:
        blocked = self.keys(self.key, which)
        kept = rows.float().masked_fill(blocked[:, None], 0.0)
        if self.mute:
            return kept
        before, left = rows.float().sum(dim=-1, keepdim=True), kept.sum(dim=-1, keepdim=True)
        # Below the smallest normal number there are no proportions left to restore.
        lost = ((left < torch.finfo(torch.float32).tiny) & (before > 0)).squeeze(-1)
        if lost.any():
            row, head = lost.nonzero()[0].tolist()
            others = bool((self.visible(which)[row] & ~blocked[row]).any())
            why = (
                "all of its attention, to the last bit, is on the blocked keys, and nothing is left to renormalise; use"
                " mute=True, or block them in other heads"
                if others
                else "it sees no other key; choose later query rows, or use mute=True"
            )
            raise ImpossibleEdit(
                f"BlockAttention(key={told(self.key)}) would leave {self.name(which, row, head)} with nothing to attend to:"
                f" {why}."
            )
        return kept * torch.where(left > 0, before / left, 1.0)


class MoveAttention(_AttentionEditor):
    """Set, add to or scale the attention mass that heads give a span; rows keep their sum.

    Masses are shares of a row's sum: 1, unless another editor took some of it (`BlockAttention(mute=True)`); a row
    without any attention left stays as it is. Inside the span the proportions stay, and so they do among the keys that give or take the difference. Raising
    the mass from m to t equals adding log(t/(1 − t)) − log(m/(1 − m)) to the span's scores before the softmax.

    Where a span has no mass at all in a row there are no proportions to keep: what comes in is spread evenly over
    its keys up to the row (also those that a sliding window hides). ``factor`` leaves a mass of 0 at 0.

    Args:
        heads: (layer, head) pairs; every head of every layer when None.
        span: Keys whose mass is changed: a span's name, a mask, "prompt_last" or "generated".
        to: The mass they are to have, 0 to 1.
        by: What their mass grows by (or shrinks by, where negative).
        factor: What their mass is multiplied with.
        from_: Keys that give or take the difference, those of the span left out; all other visible keys when None.
        query: Rows in which this is done: "prompt_last", "generated", "all", a span's name, a mask, or "later": every
            row after the last of the span's keys, those of generated tokens included.

    Raises:
        UnknownHead: On attaching to a model that lacks one of the heads.
        ImpossibleEdit: Not exactly one of `to`, `by` and `factor`, or one that no mass can meet. While the model
            runs: a row comes before the whole span, its mass would be above 1 or below 0, or `from_` has less than
            is to be taken. Nothing is clipped.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:2], think="off")
    >>> away = rl.MoveAttention([(1, 5)], "think", to=0.0)
    >>> data = rl.capture(model, off, rl.SpanAttention(["think"]), away)
    >>> float(data["attention_mass"].sel(layer=1, head=5).max())
    0.0
    """

    def __init__(
        self,
        heads: Iterable[Head] | None,
        span: Positions,
        *,
        to: float | None = None,
        by: float | None = None,
        factor: float | None = None,
        from_: Positions | None = None,
        query: Positions = "prompt_last",
    ) -> None:
        super().__init__(query, heads)
        given = {
            name: value for name, value in (("to", to), ("by", by), ("factor", factor)) if value is not None
        }
        if len(given) != 1:
            raise ImpossibleEdit(
                f"MoveAttention was given {', '.join(given) or 'none'} of to, by and factor; give exactly one."
            )
        ((name, value),) = given.items()
        low, high = {"to": (0.0, 1.0), "by": (-1.0, 1.0), "factor": (0.0, math.inf)}[name]
        if not math.isfinite(value) or not low <= value <= high:
            raise ImpossibleEdit(
                f"MoveAttention({name}={value}) was asked for; a share of attention allows {low} to {high}."
            )
        self.span = span
        self.to, self.by, self.factor = to, by, factor
        self.from_ = from_
        _check_later(self)

    @override
    def key_positions(self) -> list[Positions]:
        return [self.span] if self.from_ is None else [self.span, self.from_]

    @override
    def needed(self, batch: SpanBatch) -> tuple[Bool[Tensor, "prompt key"], str]:
        return _prompt_keys(self.span, batch), f"comes before the whole span ({told(self.span)})"

    @override
    def change(self, rows: Float[Tensor, "row head key"], which: _Rows) -> Float[Tensor, "row head key"]:
        visible = self.visible(which)
        span = self.keys(self.span, which) & visible
        source = visible & ~span
        if self.from_ is not None:
            source = source & self.keys(self.from_, which)
        blind = ~span.any(dim=1)
        if blind.any():
            row = int(blind.nonzero()[0])
            raise ImpossibleEdit(
                f"MoveAttention(span={told(self.span)}): {self.name(which, row, 0)} comes before the whole span, or is padding."
                " Choose later query rows; bind the batch (rl.capture, rl.generate and the measures do) to leave padding"
                " out."
            )
        rows = rows.double()
        total = rows.sum(dim=-1, keepdim=True)
        rows = rows / torch.where(total > 0, total, 1.0)
        span, source = span[:, None].expand_as(rows), source[:, None].expand_as(rows)
        mass, given = (rows * span).sum(dim=-1), (rows * source).sum(dim=-1)
        target = torch.where(total.squeeze(-1) > 0, self._target(mass), 0.0)
        self._check(which, mass, given, target, source)
        # A row with no other key keeps its sum, also where what was asked is off by rounding.
        return total * move_mass(rows, span, source, torch.where(source.any(dim=-1), target, mass))

    def _target(self, mass: Float[Tensor, "row head"]) -> Float[Tensor, "row head"]:
        if self.to is not None:
            return torch.full_like(mass, self.to)
        return mass + self.by if self.by is not None else mass * float(self.factor or 0.0)

    def _check(self, which: _Rows, mass: Tensor, given: Tensor, target: Tensor, source: Tensor) -> None:
        bad = (target < -_SLACK) | (target > mass + given + _SLACK)
        bad |= ~source.any(dim=-1) & (target < mass - _SLACK)
        if bad.any():
            row, head = bad.nonzero()[0].tolist()
            raise ImpossibleEdit(
                f"MoveAttention(span={told(self.span)}) cannot bring the mass of {self.name(which, row, head)} from"
                f" {float(mass[row, head]):.4g} to {float(target[row, head]):.4g}: the keys that give or take the"
                f" difference have {float(given[row, head]):.4g}. Ask for another mass, or leave from_=None."
            )
        spread = ((mass == 0) & (target > 0)) | ((given == 0) & (target < mass - _SLACK))
        if self._batch is None and spread.any():
            row, head = spread.nonzero()[0].tolist()
            raise SpanError(
                f"MoveAttention has to spread attention evenly at {self.name(which, row, head)}, and does not know which keys are"
                " padding. Bind the batch: run it through rl.capture, rl.generate or a measure."
            )


def _check_later(editor: _AttentionEditor) -> None:
    """Refuse rows after keys that never end."""
    key = editor.key_positions()[0]
    if is_word(editor.query, "later") and (is_word(key, "all") or is_word(key, "generated")):
        raise ImpossibleEdit(
            f"{type(editor).__name__}('later', {key!r}): no row comes after the last of those keys, as each generated"
            " token adds one. Name a span or pass a mask as key, or query='all'."
        )


def move_mass(
    rows: Float[Tensor, "*row key"],
    span: Bool[Tensor, "*row key"],
    source: Bool[Tensor, "*row key"],
    target: Float[Tensor, "*row"],
) -> Float[Tensor, "*row key"]:
    """Return rows whose mass on `span` is `target`; the difference comes from, or goes to, `source`.

    Within each of the two the proportions stay; where one has no mass, what it gets is spread evenly over its keys.
    All other keys keep what they have.

    Args:
        rows: Shares of attention, none negative.
        span: The keys whose mass is set.
        source: The keys that make up for it; none of them in `span`.
        target: Mass wanted, from 0 to the mass of span and source together; rounding beyond that is cut off.

    >>> row = torch.tensor([0.5, 0.25, 0.25])
    >>> span, source = torch.tensor([True, False, False]), torch.tensor([False, True, True])
    >>> move_mass(row, span, source, torch.tensor(0.75)).tolist()
    [0.75, 0.125, 0.125]
    """
    mass, given = (rows * span).sum(dim=-1, keepdim=True), (rows * source).sum(dim=-1, keepdim=True)
    wanted = target[..., None].clamp(min=0).minimum(mass + given)
    moved = torch.where(span, _rescaled(rows, span, mass, wanted), rows)
    return torch.where(source, _rescaled(rows, source, given, mass + given - wanted), moved)


def _rescaled(rows: Tensor, keys: Tensor, mass: Tensor, wanted: Tensor) -> Tensor:
    even = wanted / keys.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(mass > 0, rows / mass.clamp(min=torch.finfo(rows.dtype).tiny) * wanted, even)


def chosen_keys(
    key: Positions, batch: SpanBatch | None, n_prompts: int, n_keys: int, width: int
) -> Bool[Tensor, "prompt key"]:
    """Return which keys of this pass are meant.

    Args:
        key: "all", "prompt_last" (the last prompt token), "generated" (every token written so far), a span's name,
            or a mask [prompt, pos] over the prompt.
        batch: The prompts being read, where known.
        n_prompts: Rows of the batch dimension in this pass.
        n_keys: Keys in this pass, those in the cache included.
        width: Keys of the prompts alone; used where no batch is bound.

    Raises:
        SpanError: A span was named and no batch is bound.
        WrongHookShape: The pass has another number of prompts, or fewer keys, than the batch or mask.
        EmptySpan: Some prompt has no token in the span.
    """
    if is_word(key, "all"):
        return torch.ones(n_prompts, n_keys, dtype=torch.bool)
    if isinstance(key, str) and key in ("prompt_last", "generated"):
        last = torch.full((n_prompts,), width - 1) if batch is None else batch.prompt_last
        place = torch.arange(n_keys)[None]
        mask = place == last[:, None] if key == "prompt_last" else place > last[:, None]
    elif isinstance(key, Tensor):
        mask = key.bool().cpu()
    elif batch is None:
        raise SpanError(
            f"key={key!r} names a span, but no prompts are bound. Pass the mask itself (key=batch.spans[...]), or run"
            " through rl.capture, rl.generate or a measure, which bind the batch."
        )
    else:
        mask = batch.spans.require(key)
    if mask.shape[0] != n_prompts or mask.shape[1] > n_keys:
        raise WrongHookShape(
            f"the keys were given for {mask.shape[0]} prompts of {mask.shape[1]} positions, but this pass has {n_prompts}"
            f" of {n_keys}. Bind or pass the batch that is really being read."
        )
    return torch.nn.functional.pad(mask, (0, n_keys - mask.shape[1]))


def _prompt_keys(key: Positions, batch: SpanBatch) -> Bool[Tensor, "prompt pos"]:
    n_prompts, width = batch.tokens.shape
    return chosen_keys(key, batch, n_prompts, width, width)


def _last(mask: Bool[Tensor, "prompt key"]) -> Int[Tensor, " prompt"]:
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)
