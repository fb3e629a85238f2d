"""Token-exact spans: which key belongs to which part of a chat prompt.

Atoms are disjoint and cover every key that is not padding. Composites are unions of atoms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rim_lens.errors import ConditionError, EmptySpan, SpanError, UnknownSpan
from rim_lens.prompts.records import Prompt

Condition = Literal["off", "open", "cot"]
T = TypeVar("T")

ATOMS: tuple[str, ...] = (
    "sink",
    "system",
    "request",
    "turn_end",
    "assistant",
    "think_open",
    "cot",
    "gap",
    "think_close",
    "answer",
    "template",
)
COMPOSITES: dict[str, tuple[str, ...]] = {"think": ("think_open", "cot", "gap", "think_close")}
NEAREST: dict[str, str] = {"gap": "think", "cot": "think", "system": "template", "turn_end": "template"}


class Spans(Mapping[str, Bool[Tensor, "prompt pos"]]):
    """Boolean masks by span name; composites are made when asked for.

    Indexing returns the mask, also when it is empty. `require` refuses an empty one.
    """

    def __init__(self, atoms: Mapping[str, Bool[Tensor, "prompt pos"]]) -> None:
        unknown = set(atoms) - set(ATOMS)
        if unknown:
            raise UnknownSpan(f"spans {sorted(unknown)} are not atoms; the atoms are {', '.join(ATOMS)}.")
        some = next(iter(atoms.values()))
        self._atoms = {name: atoms.get(name, torch.zeros_like(some)) for name in ATOMS}

    def __getitem__(self, name: str) -> Bool[Tensor, "prompt pos"]:
        if name in COMPOSITES:
            return torch.stack([self._atoms[atom] for atom in COMPOSITES[name]]).any(dim=0)
        if name not in self._atoms:
            raise UnknownSpan(f"no span is called {name!r}; there are {', '.join((*ATOMS, *COMPOSITES))}.")
        return self._atoms[name]

    def __iter__(self) -> Iterator[str]:
        yield from ATOMS
        yield from COMPOSITES

    def __len__(self) -> int:
        return len(ATOMS) + len(COMPOSITES)

    def require(self, name: str) -> Bool[Tensor, "prompt pos"]:
        """Return the mask of a span that has at least one token in every prompt.

        Raises:
            UnknownSpan: No span bears that name.
            EmptySpan: Some prompt has no token there.
        """
        mask = self[name]
        empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            nearest = NEAREST.get(name)
            advice = f" Ask for {nearest!r} instead." if nearest and self[nearest].any(dim=1).all() else ""
            raise EmptySpan(
                f"span {name!r} has no token in {len(empty)} of {mask.shape[0]} prompts (first: prompt {empty[0]});"
                f" a mass over nothing is undefined, not zero.{advice}"
            )
        return mask

    def present(self) -> list[str]:
        """Names of the spans that have a token in every prompt, atoms first."""
        return [name for name in self if bool(self[name].any(dim=1).all())]

    def atoms(self) -> dict[str, Bool[Tensor, "prompt pos"]]:
        """The atoms alone, by name."""
        return dict(self._atoms)


@dataclass(frozen=True)
class SpanBatch:
    """Prompts as left-padded token ids, each key labelled.

    Attributes:
        tokens: Int [prompt, pos], left-padded.
        attention_mask: Int [prompt, pos], 1 where a token is real.
        spans: Masks by name; the atoms partition the real tokens.
        prompts: The record behind each row.
        texts: The rendered text of each row, before tokenisation.
        think: Condition of the batch: "off", "open" or "cot".
        format: Name of the chat format.
        pad_token_id: What fills the left side; -1 where the tokenizer has no pad token and no row needed one.
        n_generated: Tokens at the end of each row that follow the prompt: what the model itself wrote, and a closing tag
            that was forced on it meanwhile, where there is one (`Generation.n_forced`); empty where it wrote none.
        cots: The reasoning of each row, stripped; "" where there is none. Several think blocks are joined by a newline.
        answers: What the assistant's turn says outside think blocks, stripped; "" where nothing is said (yet).
        finished_thinking: Per row, whether no think block is left open and either one was closed or an answer began.
        label: A free name for the condition, used as a label in results ("off", "careful", "filler" …).
        vocabulary: Digest of the words that the ids stand for; "" where that is not known. A model of other words is refused.
    """

    tokens: Int[Tensor, "prompt pos"]
    attention_mask: Int[Tensor, "prompt pos"]
    spans: Spans
    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    think: Condition
    format: str
    pad_token_id: int
    n_generated: tuple[int, ...] = ()
    cots: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    finished_thinking: tuple[bool, ...] = ()
    label: str = ""
    vocabulary: str = ""

    def __post_init__(self) -> None:
        n_prompts = self.tokens.shape[0]
        if (
            not len(self.prompts) == len(self.texts) == n_prompts
            or self.attention_mask.shape != self.tokens.shape
        ):
            raise SpanError(
                f"a batch of {n_prompts} rows has {len(self.prompts)} records, {len(self.texts)} texts and a mask of"
                f" shape {tuple(self.attention_mask.shape)}; they must agree."
            )
        for name in ("n_generated", "cots", "answers", "finished_thinking"):
            if len(getattr(self, name)) not in (0, n_prompts):
                raise SpanError(
                    f"{name} has {len(getattr(self, name))} entries for {n_prompts} rows; give one per row."
                )
        if (self.attention_mask[:, 1:] < self.attention_mask[:, :-1]).any():
            raise SpanError(
                "the rows are not left-padded: a real token stands before a pad. Put all padding at the left."
            )
        counts = torch.stack(list(self.spans.atoms().values())).sum(dim=0)
        if not torch.equal(counts, self.attention_mask.to(counts.dtype)):
            raise SpanError(
                "the atoms do not partition the real tokens: some key is in two spans, in none, or a pad is in one."
            )

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def lengths(self) -> Int[Tensor, " prompt"]:
        """Real tokens per row."""
        return self.attention_mask.sum(dim=1)

    @property
    def prompt_last(self) -> Int[Tensor, " prompt"]:
        """Position of the last prompt token: the row that produces the first generated token."""
        written = torch.tensor(self.n_generated or [0] * len(self))
        return self.tokens.shape[1] - 1 - written

    @property
    def name(self) -> str:
        """The label, or the condition where no label was given."""
        return self.label or self.think

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of what a model reads and how it is labelled: token ids, mask and atoms."""
        what = hashlib.sha256()
        for tensor in (self.tokens, self.attention_mask.long(), *self.spans.atoms().values()):
            what.update(f"{tuple(tensor.shape)}".encode())
            what.update(tensor.cpu().contiguous().numpy().data)
        return what.hexdigest()[:16]

    def atoms_of(self, row: int) -> list[str]:
        """The atom of each real token of a row, in order."""
        numbers = torch.stack([self.spans[atom][row] for atom in ATOMS]).int().argmax(dim=0)
        return [ATOMS[number] for number in numbers[self.attention_mask[row].bool()].tolist()]

    def select(self, rows: Sequence[int] | Int[Tensor, " row"]) -> SpanBatch:
        """Return some rows, in the order given, without the left padding that none of them needs."""
        index = torch.as_tensor(rows, dtype=torch.long)
        mask = self.attention_mask[index]
        start = int(mask.shape[1] - mask.sum(dim=1).max()) if len(index) else 0
        chosen = index.tolist()
        return replace(
            self,
            tokens=self.tokens[index, start:],
            attention_mask=mask[:, start:],
            spans=Spans({name: span[index, start:] for name, span in self.spans.atoms().items()}),
            prompts=tuple(self.prompts[row] for row in chosen),
            texts=tuple(self.texts[row] for row in chosen),
            n_generated=_take(self.n_generated, chosen),
            cots=_take(self.cots, chosen),
            answers=_take(self.answers, chosen),
            finished_thinking=_take(self.finished_thinking, chosen),
        )


def require_batch(batch: object, what: str) -> None:
    """Refuse requests that were not rendered, where prompts are to be read.

    Raises:
        ConditionError: It is no SpanBatch.
    """
    if not isinstance(batch, SpanBatch):
        raise ConditionError(
            f"{what} reads prompts that were rendered, and was given a {type(batch).__name__}. Render the requests first:"
            " batch = chat.render(requests, think='off'), with chat = rl.ChatFormat.from_model(model)."
        )


def _take(values: tuple[T, ...], rows: Sequence[int]) -> tuple[T, ...]:
    return tuple(values[row] for row in rows) if values else ()
