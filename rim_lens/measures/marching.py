"""Many edits of one batch in few passes: each begins where it first acts, all that it cannot change is shared.

What an edit leaves as it was is computed once, in a *trunk* without edits: the layers below the edit, and the rows before
the first edited one, whose keys and values are kept. Copies of the remaining rows, one per edit, then go up the layers
together. Rows that all prompts begin with, and that are edited alike, stand once in each copy. The last layer and the
unembedding are done on the rows that are read and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rim_lens.batching import MAX_TOKENS
from rim_lens.hooks.editing import Change, Rows
from rim_lens.lens import Site
from rim_lens.lens.bare import Bare, Edit
from rim_lens.lens.packing import Pack, Past

Changes = Mapping[tuple[Site, int], Change]

_LOGITS = 2**23  # so many are held at a time
_ROWS = 2048  # of copies that go up together; more is no faster on a CPU, and takes memory
_SITES: tuple[Any, ...] = ("z", "post")


@dataclass(frozen=True)
class Sequences:
    """Prompts without padding.

    Attributes:
        tokens: Of each prompt, what was written after it included.
        edited: Which of them are edited.
        reads: First row whose logits are looked at; all after it are as well.
        start: Position of the first token in the padded batch.
        by_row: Whether the same row of two prompts may be edited in two ways.
    """

    tokens: list[list[int]]
    edited: list[list[bool]]
    reads: list[int]
    start: list[int]
    by_row: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_shared(self) -> int:
        """How many tokens all prompts begin with, at least one row of each left out."""
        found = 0
        for column in zip(*self.tokens, strict=False):
            if len(set(column)) > 1:
                break
            found += 1
        return min(found, *self.reads)


class Trunk:
    """The pass without edits, and what edited copies take from it.

    Args:
        bare: The model.
        sequences: The prompts.
    """

    def __init__(self, bare: Bare[Any], sequences: Sequences) -> None:
        self.bare, self.sequences, self.device = bare, sequences, bare.facts.device
        whole = _Layout(sequences, [0] * len(sequences), sequences.n_shared)
        self.layout = _copied(sequences)
        self.pack, pack = self.layout.pack(self.device), whole.pack(self.device)
        self.rows = Rows(self.pack.prompt, self._in_batch(sequences))
        self.edited = torch.tensor(self.layout.pick(sequences.edited), device=self.device).nonzero().flatten()
        self.reads = self._index(self.layout, sequences)
        kept = torch.tensor([whole.row(*place) for place in self.layout.places], device=self.device)
        past = self.layout.past_rows(whole).to(self.device)
        places = bare.places(pack)
        hidden = places.embedded
        self.before: list[Tensor] = []
        self.past: list[Past | None] = []
        for layer in range(bare.facts.n_layers):
            self.before.append(hidden[:, kept])
            hidden = bare.block(layer, hidden, places, pack)
            keys, values = bare.keys_and_values
            self.past.append(Past(keys[0][:, past], values[0][:, past]) if past.shape[1] else None)
        self.hidden = hidden[:, self._index(whole, sequences)]
        self.places = bare.places(self.pack)

    def _in_batch(self, sequences: Sequences) -> Tensor:
        found = [sequences.start[prompt] + pos for prompt, pos in self.layout.places]
        return torch.tensor(found, device=self.device)

    def _index(self, layout: _Layout, sequences: Sequences) -> Int[Tensor, " read"]:
        found = [
            layout.row(prompt, pos)
            for prompt, tokens in enumerate(sequences.tokens)
            for pos in range(sequences.reads[prompt], len(tokens))
        ]
        return torch.tensor(found, device=self.device)


class _Layout:
    """Which row of a pack is which token of which prompt."""

    def __init__(self, sequences: Sequences, begins: Sequence[int], stem_ends: int) -> None:
        self.sequences = sequences
        begins_with = min(begins)
        self.stem = range(begins_with, max(stem_ends, begins_with))
        self.begins = [max(begin, self.stem.stop) if len(self.stem) else begin for begin in begins]
        self.past = [begins_with if len(self.stem) else begin for begin in begins]
        self.places = [(0, pos) for pos in self.stem]
        self.offsets = []
        for prompt, tokens in enumerate(sequences.tokens):
            self.offsets.append(len(self.places) - self.begins[prompt])
            self.places += [(prompt, pos) for pos in range(self.begins[prompt], len(tokens))]

    def row(self, prompt: int, pos: int) -> int:
        return pos - self.stem.start if pos in self.stem else self.offsets[prompt] + pos

    def pick(self, values: Sequence[Sequence[Any]]) -> list[Any]:
        return [values[prompt][pos] for prompt, pos in self.places]

    def past_rows(self, whole: _Layout) -> Int[Tensor, "prompt key"]:
        """Rows of another layout that come before this one's, padded."""
        most = max(self.past)
        return torch.tensor(
            [
                [whole.row(prompt, min(pos, max(count - 1, 0))) for pos in range(most)]
                for prompt, count in enumerate(self.past)
            ],
            dtype=torch.long,
        ).reshape(len(self.past), most)

    def pack(self, device: torch.device) -> Pack:
        lengths = [
            len(tokens) - begin for tokens, begin in zip(self.sequences.tokens, self.begins, strict=True)
        ]
        place = torch.arange(max(lengths))[None]
        real = place < torch.tensor(lengths)[:, None]
        first = torch.tensor(self.offsets) + torch.tensor(self.begins)
        key = torch.arange(max(self.past))[None]
        return Pack(
            tokens=torch.tensor(self.pick(self.sequences.tokens), device=device),
            prompt=torch.tensor([prompt for prompt, _ in self.places], device=device),
            pos=torch.tensor([pos for _, pos in self.places], device=device),
            n_stem=len(self.stem),
            tails=torch.where(real, first[:, None] + place, first[:, None]).to(device),
            tail_real=real.to(device),
            past_pos=key.expand(len(lengths), -1).to(device),
            past_real=(key < torch.tensor(self.past)[:, None]).to(device),
        )


def _copied(sequences: Sequences) -> _Layout:
    """Rows that an edit can change, or that are read."""
    begins = [
        min(edited.index(True) if any(edited) else read, read)
        for edited, read in zip(sequences.edited, sequences.reads, strict=True)
    ]
    alike = 0
    for column in zip(*(edited[: sequences.n_shared] for edited in sequences.edited), strict=True):
        if len(set(column)) > 1 or (sequences.by_row and column[0]):
            break
        alike += 1
    shared = min(begins) < alike
    return _Layout(sequences, begins, alike if shared else 0)


# Copies, with the numbers of their edits
_Live = tuple[Float[Tensor, "copy row d_model"], list[int]]


def march(trunk: Trunk, edits: Sequence[Changes]) -> Iterator[tuple[int, Float[Tensor, "read d_model"]]]:
    """Yield each edit's number with the residual stream after the last layer, at the rows that are read.

    Args:
        trunk: The pass without edits.
        edits: What each changes, by site ("z" or "post") and layer.
    """
    n_layers = trunk.bare.facts.n_layers
    most = max(1, (_ROWS if trunk.device.type == "cpu" else MAX_TOKENS) // len(trunk.pack))
    live: _Live | None = None
    for layer in range(n_layers):
        if live is not None:
            live = _step(trunk, edits, layer, live)
        begun = [which for which, edit in enumerate(edits) if min(at for _, at in edit) == layer]
        fork = _forks(trunk, edits, layer) if begun else None
        while begun and fork is not None:
            some, begun = begun[:most], begun[most:]
            new = fork(some)
            if live is not None and len(live[1]) + len(some) > most:
                yield from _finished(trunk, edits, layer + 1, live)
                live = None
            live = (new, some) if live is None else (torch.cat([live[0], new]), live[1] + some)
    if live is not None:
        yield from _finished(trunk, edits, n_layers, live)


def _finished(
    trunk: Trunk, edits: Sequence[Changes], layer: int, live: _Live
) -> Iterator[tuple[int, Float[Tensor, "read d_model"]]]:
    for above in range(layer, trunk.bare.facts.n_layers):
        live = _step(trunk, edits, above, live)
    yield from zip(live[1], live[0], strict=True)


def _step(trunk: Trunk, edits: Sequence[Changes], layer: int, live: _Live) -> _Live:
    """Take copies through a layer; out of the last one come the rows that are read."""
    hidden, which = live
    now = _edits_at(edits, which, layer, trunk, None)
    bare, whole = trunk.bare, len(trunk.reads) == len(trunk.pack)
    run = (layer, hidden, trunk.places, trunk.pack, trunk.past[layer], now)
    if layer < bare.facts.n_layers - 1 or whole:
        return bare.block(*run), which
    written, _ = bare.attention(*run)
    now = _edits_at(edits, which, layer, trunk, trunk.reads)
    reads = trunk.reads
    return bare.after_attention(layer, hidden[:, reads], written[:, reads], trunk.places, now), which


def _forks(
    trunk: Trunk, edits: Sequence[Changes], layer: int
) -> Callable[[list[int]], Float[Tensor, "copy row d_model"]]:
    """What copies are after the layer in which they are edited first: below it they are the trunk's."""
    bare, before = trunk.bare, trunk.before[layer]
    written, z = bare.attention(layer, before, trunk.places, trunk.pack, trunk.past[layer])
    reads = None
    if layer == bare.facts.n_layers - 1 and len(trunk.reads) < len(trunk.pack):
        reads = trunk.reads
        before, written, z = before[:, reads], written[:, reads], z[:, reads]

    def fork(which: list[int]) -> Float[Tensor, "copy row d_model"]:
        now = _edits_at(edits, which, layer, trunk, reads)
        given = written.expand(len(which), -1, -1)
        if "z" in now:
            given = bare.written(layer, now["z"](z.repeat(len(which), 1, 1, 1)))
        return bare.after_attention(
            layer,
            before.expand(len(which), -1, -1),
            given,
            trunk.places,
            {"post": now["post"]} if "post" in now else {},
        )

    return fork


def _edits_at(
    edits: Sequence[Changes], which: list[int], layer: int, trunk: Trunk, only: Tensor | None
) -> dict[Any, Edit]:
    """What is changed in a layer, by site; `only` some rows may be there."""
    at, rows = trunk.edited, trunk.rows
    if only is not None:
        kept = torch.isin(only, at)
        at, rows = kept.nonzero().flatten(), Rows(rows.prompt[only], rows.pos[only])
    found: dict[Any, Edit] = {}
    for site in _SITES:
        changes = [
            (place, edits[number][site, layer])
            for place, number in enumerate(which)
            if (site, layer) in edits[number]
        ]
        if changes and len(at):
            found[site] = partial(_changed, changes, at, Rows(rows.prompt[at], rows.pos[at]))
    return found


def _changed(changes: list[tuple[int, Change]], at: Tensor, rows: Rows, values: Tensor) -> Tensor:
    for place, change in changes:
        values[place, at] = change(values[place, at], rows)
    return values


def read_logits(
    bare: Bare[Any], found: Iterator[tuple[int, Float[Tensor, "read d_model"]]]
) -> Iterator[tuple[list[int], Float[Tensor, "edit read d_vocab"]]]:
    """Unembed the rows that are read, some edits at a time."""
    waiting: list[tuple[int, Tensor]] = []

    def unembedded() -> tuple[list[int], Tensor]:
        rows = torch.stack([hidden for _, hidden in waiting])
        return [number for number, _ in waiting], bare.logits(rows.flatten(0, 1)).view(*rows.shape[:2], -1)

    for number, hidden in found:
        waiting.append((number, hidden))
        if (len(waiting) + 1) * len(hidden) * bare.facts.d_vocab > _LOGITS:
            yield unembedded()
            waiting = []
    if waiting:
        yield unembedded()
