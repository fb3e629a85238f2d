"""Many edits read at once, exactly: the fast way to what one forward pass per edit gives.

It serves `refusal_score` under edits of heads' outputs or of neurons (zero, a mean over data, a factor, other runs' values), in
float32 or float64. Everything else, and every model on which the two ways disagree, is read the plain way: one reading per edit.
They are held against each other in each scan, on its own prompts: without an edit on the longest prompt and the shortest, and in
each group of edits under three of them on one of the two.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeGuard, get_args
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rim_lens.batching import MAX_ROWS, MAX_TOKENS, micro_batches
from rim_lens.errors import RimLensError, UnsupportedModel
from rim_lens.hooks.base import Component, attached, bound
from rim_lens.hooks.editing import RowEditor
from rim_lens.hooks.positions import chosen_rows, is_word
from rim_lens.hooks.reference import shared_means
from rim_lens.lens import require_eval, standing, tokenizer_of
from rim_lens.lens.attaching import wiring
from rim_lens.lens.taking_apart import taken_apart
from rim_lens.measures.marching import Changes, Sequences, Trunk, march, read_logits
from rim_lens.measures.readings import Reading
from rim_lens.measures.refusal.first_word import (
    MAX_SKIP,
    check_answer_is_next,
    first_words_of,
    forced_tokens,
)
from rim_lens.measures.refusal.openers import opener_ids, whitespace_ids
from rim_lens.measures.refusal.score import log_odds

ScanBy = Literal["auto", "plain", "rough"]

_FEWEST = 4  # edits that are worth a trunk and a check
_FEWEST_READS = 32  # edits × prompts
_TRUNKS_PER_GROUP = (
    16  # a group of edits costs about so many passes without edits, then its numbers are handed over
)
_TOLERANCE = 1e-4
_EXACT = (torch.float32, torch.float64)
# Models that cannot be read so, as they were wired then, and why
_refused: WeakKeyDictionary[Any, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()
_KEPT = 2**27  # numbers of a trunk that are held at a time


class Scan:
    """Readings under edits, in groups where that is faster, one by one where it is not possible.

    Args:
        reading: The measure.
        components: Editors that will be asked for, in this order or less.
        by: "auto"; or "plain": one reading per edit, always; or "rough": in groups in half precision too, whose error is told
            and often larger than an effect, so that effects rank heads and say no more.

    Raises:
        ValueError: `by` is none of these.
    """

    def __init__(self, reading: Reading, components: Sequence[Component], by: ScanBy = "auto") -> None:
        if by not in get_args(ScanBy):
            raise ValueError(f"scan={by!r} was asked for; there are 'auto', 'plain' and 'rough'.")
        self.reading, self.by = reading, by
        self._waiting = {id(component): component for component in components}
        self._found: dict[int, Float[np.ndarray, " prompt"]] = {}
        self._baseline: Float[np.ndarray, " prompt"] | None = None
        self._packed: _Packed | None = None
        self.plain_because = "it was asked for" if by == "plain" else _unserved(reading, by)
        if components and not self.plain_because and not any(map(served, components)):
            self.plain_because = "edits of this kind are read one by one"
        self.used = False
        self.refused = ""  # why the model did, if it did so here
        self.error = 0.0  # largest difference from plain readings that was seen, in half precision

    @property
    def told(self) -> str:
        """How the numbers came about, in words."""
        if not self.used:
            return f"plain ({self.plain_because or 'too few edits'})"
        if not self._half:
            return "packed"
        return (
            f"packed, rough ({_dtype(self.reading)}: off by up to {self.error:.2g} nats from those few that were read plainly as well,"
            " others may be by more; a ranking, and no more)"
        )

    @property
    def _half(self) -> bool:
        return _dtype(self.reading) not in _EXACT

    def __call__(self, components: Sequence[Component]) -> Float[np.ndarray, " prompt"]:
        """Read with these components active; with none, the baseline."""
        asked = components[0] if len(components) == 1 else None
        if not self.plain_because and len(components) <= 1:
            if (asked is None and self._baseline is None) or (
                asked is not None and id(asked) in self._waiting and id(asked) not in self._found
            ):
                self._group(asked)
            if asked is None and self._baseline is not None:
                return self._baseline
            if asked is not None and id(asked) in self._found:
                return self._found.pop(id(asked))
        return self.reading(components)

    @property
    def fewest(self) -> int:
        """How many edits are worth a group; one where each is read by itself."""
        return 1 if self.plain_because else max(_FEWEST, -(-_FEWEST_READS // len(self.reading.batch)))

    def holds(self, components: Sequence[Component]) -> bool:
        """Whether what these give was found already, with others."""
        if not components:
            return self._baseline is not None
        return len(components) == 1 and id(components[0]) in self._found

    def learn(self, used: bool, refused: str, error: float = 0.0) -> None:
        """Take note of how another scan of this reading went: what a model refuses, it refuses in every process."""
        self.used, self.error = self.used or used, max(self.error, error)
        if refused:
            self._refuse(refused, warn=False)

    def forget(self, components: Sequence[Component]) -> None:
        """These will not be asked for."""
        for component in components:
            self._waiting.pop(id(component), None)

    def _group(self, first: Component | None) -> None:
        """Measure the next edits together, from the one that is asked for."""
        waiting = list(self._waiting.values())
        begin = 0 if first is None else waiting.index(first)
        group = [component for component in waiting[begin:] if served(component)]
        group = [component for component in group if _like(component, group[0])]
        if len(group) < self.fewest:
            return
        if first is not None and group[0] is not first:
            return
        lengths = self.reading.batch.lengths.tolist()
        longest, shortest = [lengths.index(max(lengths))], [lengths.index(min(lengths))]

        def plain(at: int, rows: list[int]) -> tuple[int, list[int], Float[np.ndarray, " row"]]:
            return at, rows, plainly(self.reading, group[at - 1] if at else None, rows)

        # The plain way first: what does not fit is refused before the long scan, and in the same words.
        expected = [plain(1, longest)]
        if self._baseline is None:
            expected.append(plain(0, sorted({*longest, *shortest})))
        try:
            self._packed = self._packed or _Packed(self.reading)
            found = self._packed.readings(group)
            last = len(found) - 1
            expected += [
                plain(at, rows) for at, rows in {1 + len(found) // 2: shortest, last: longest}.items()
            ]
            for at, rows, values in expected:
                if self._half:
                    self.error = max(self.error, float(np.abs(found[at][rows] - values).max()))
                else:
                    _require_alike(found[at][rows], values, repr(group[at - 1]) if at else "no edit")
        except UnsupportedModel as problem:
            self._refuse(str(problem), warn=isinstance(problem, _Disagree))
            return
        except RimLensError:
            raise
        except Exception as problem:  # whatever goes wrong within a model's own code, the plain way is there
            told = f"this model does not run in packs ({type(problem).__name__}: {problem})"
            self._refuse(told, warn=True)
            return
        self.used = True
        if self._baseline is None:
            self._baseline = found[0]
        for component, values in zip(group, found[1:], strict=False):
            del self._waiting[id(component)]
            self._found[id(component)] = values

    def _refuse(self, why: str, warn: bool) -> None:
        model = self.reading.model
        self.plain_because = self.refused = why
        _refused[model] = wiring(model), why
        if warn:
            warnings.warn(f"{why}; all edits are read one by one instead.", RuntimeWarning, stacklevel=2)


class _Disagree(UnsupportedModel):
    """The two ways gave different numbers."""


def served(component: Component) -> TypeGuard[RowEditor]:
    """Whether an editor changes rows of heads' outputs or neurons and does nothing else."""
    return (
        isinstance(component, RowEditor)
        and set(component.edited_sites()) <= {"z", "post"}
        and type(component).hooks is RowEditor.hooks
        and type(component).fwd_hooks is Component.fwd_hooks
    )


def _like(component: Any, other: Any) -> bool:
    """Whether two editors change the same rows, and in the same way for all prompts."""
    one, two = component.positions, other.positions
    if component.by_row != other.by_row:
        return False
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one is two or (one.shape == two.shape and bool((one == two).all()))
    return isinstance(one, str) and isinstance(two, str) and one == two


def _dtype(reading: Reading) -> torch.dtype:
    return next(reading.model.parameters()).dtype


def _unserved(reading: Reading, by: ScanBy) -> str:
    if reading.first_word is None:
        return "the reading is not refusal_score alone"
    if by != "rough" and _dtype(reading) not in _EXACT:
        return f"the weights are {_dtype(reading)}"
    before, why = _refused.get(reading.model, (None, ""))
    if why and before == wiring(reading.model):
        return why
    # A hook may act on those prompts alone that are not checked.
    if standing(reading.model):
        return "there are hooks on the model"
    if "forward" in vars(reading.model):
        return "the model's forward pass was replaced by another"
    return ""


# The pass without edits, what each prompt wrote before its first word, and the scores
_Begun: TypeAlias = tuple[Trunk, list[list[int]], Float[np.ndarray, " prompt"]]


class _Packed:
    """The model of a reading by refusal score, taken apart, and its prompts.

    Raises:
        UnsupportedModel: The model cannot be run so.
    """

    def __init__(self, reading: Reading) -> None:
        assert reading.first_word is not None  # noqa: S101 - told to the type checker: the caller saw to it
        self.reading, self.batch, self.model = reading, reading.batch, reading.model
        self.settings: Mapping[str, Any] = reading.first_word
        tokenizer = tokenizer_of(self.model)
        self.bare = taken_apart(self.model)
        device = self.bare.facts.device
        self.openers = torch.tensor(opener_ids(tokenizer, self.settings.get("openers")), device=device)
        skip = self.settings.get("skip", "greedy")
        self.blank = torch.tensor([], dtype=torch.long, device=device)
        if skip == "greedy":
            self.blank = whitespace_ids(tokenizer, self.bare.facts.d_vocab).to(device)
        self.forced = (
            forced_tokens(self.model, self.batch, self.settings.get("whitespace")) if skip == "forced" else []
        )
        width = self.batch.tokens.shape[1]
        self.start = [width - length for length in self.batch.lengths.tolist()]
        self.ids = [row[start:] for row, start in zip(self.batch.tokens.tolist(), self.start, strict=True)]
        self._last: tuple[Any, _Begun] | None = None  # of the last group, where all prompts were in one pass

    def readings(self, components: Sequence[RowEditor]) -> list[Float[np.ndarray, " prompt"]]:
        """Refusal scores without an edit and under each of the first edits, as many as are worth one group.

        Args:
            components: That change the same rows.

        Raises:
            UnsupportedModel: The model cannot be run so.
            RimLensError: As the editors do where they do not fit model or prompts.
        """
        for component in components:
            component.check_prompts(self.batch)
        edits: list[Changes] = []
        edited = self._edited(components[0])
        n_layers, width = self.bare.facts.n_layers, self.bare.facts.d_model
        most = min(MAX_TOKENS, max(1, _KEPT // (n_layers * width)))
        scores: Float[np.ndarray, "edit prompt"] | None = None
        with torch.no_grad():
            for rows in micro_batches(self.batch.lengths.tolist(), max_tokens=most, max_rows=len(self.batch)):
                trunk, written, baseline = self._begun(rows, edited, components[0].by_row)
                if scores is None:
                    # One by one: a mean over data takes passes of its own.
                    changes = (component.changes(self.model, self.bare.facts) for component in components)
                    with shared_means():
                        edits = _worth(trunk, changes)
                    scores = np.empty((1 + len(edits), len(self.batch)))
                scores[0, rows] = baseline
                with bound(components[: len(edits)], self.batch, rows):
                    for numbers, logits in read_logits(self.bare, march(trunk, edits)):
                        for number, values in zip(numbers, logits, strict=True):
                            scores[1 + number, rows] = self._scores(values, written)
        assert scores is not None  # noqa: S101 - a batch has a prompt
        for number in range(len(edits)):
            missing = np.isnan(scores[1 + number]).nonzero()[0].tolist()
            if missing:
                scores[1 + number, missing] = plainly(self.reading, components[number], missing)
        return list(scores)

    def _edited(self, component: RowEditor) -> list[list[bool]]:
        chosen = chosen_rows(component.positions, self.batch, 0, *self.batch.tokens.shape)
        after = is_word(component.positions, "all") or is_word(component.positions, "generated")
        more = [after] * (MAX_SKIP + len(self.forced))
        return [row[start:] + more for row, start in zip(chosen.tolist(), self.start, strict=True)]

    def _begun(self, rows: list[int], edited: list[list[bool]], by_row: bool) -> _Begun:
        """The pass without edits; the last group's where that was the same."""
        if len(rows) < len(self.batch):
            return self._trunk(rows, edited, by_row)
        if self._last is None or self._last[0] != (rows, edited, by_row):
            self._last = (rows, edited, by_row), self._trunk(rows, edited, by_row)
        return self._last[1]

    def _trunk(self, rows: list[int], edited: list[list[bool]], by_row: bool = False) -> _Begun:
        """The pass without edits, once each prompt has come to its first word."""
        written: list[list[int]] = [list(self.forced) for _ in rows]
        width = max(
            len(self.ids[row]) for row in rows
        )  # of these prompts by themselves, as editors are bound to them
        while True:
            tokens = [self.ids[row] + more for row, more in zip(rows, written, strict=True)]
            skipped = [0 if self.forced else len(more) for more in written]
            trunk = Trunk(
                self.bare,
                Sequences(
                    tokens,
                    [edited[row][: len(ids)] for row, ids in zip(rows, tokens, strict=True)],
                    [len(ids) - 1 - more for ids, more in zip(tokens, skipped, strict=True)],
                    [width - len(self.ids[row]) for row in rows],
                    by_row,
                ),
            )
            logits = self.bare.logits(trunk.hidden[0])
            next_tokens = logits.argmax(dim=-1).tolist()
            scores = self._scores(logits, written)
            waits = np.isnan(scores).nonzero()[0].tolist()
            if not waits:
                return trunk, written, scores
            lasts = np.cumsum([1 + more for more in skipped]) - 1
            for place in waits:
                written[place] = [*written[place], next_tokens[lasts[place]]]

    def _scores(
        self, logits: Float[Tensor, "read d_vocab"], written: list[list[int]]
    ) -> Float[np.ndarray, " prompt"]:
        """Score of each prompt's first word; NaN where it would write other whitespace before it than is read here."""
        blank, likeliest = self._likeliest_blank(logits)
        odds = _log_odds(logits, self.openers).cpu().numpy()
        if not np.isfinite(odds).all():
            raise UnsupportedModel("NaN or infinity in the logits.")
        scores = np.full(len(written), np.nan)
        row = 0
        for prompt, tokens in enumerate(written):
            reads = [] if self.forced else tokens
            for skipped in range(len(reads) + 1):
                at = row + skipped
                if not blank[at] or skipped == MAX_SKIP:
                    scores[prompt] = odds[at]
                    break
                if skipped == len(reads) or likeliest[at] != reads[skipped]:
                    break
            row += len(reads) + 1
        return scores

    def _likeliest_blank(self, logits: Float[Tensor, "read d_vocab"]) -> tuple[list[bool], list[int]]:
        """Of each row, whether its likeliest token is whitespace, and its likeliest whitespace."""
        if not len(self.blank):
            return [False] * len(logits), [-1] * len(logits)
        if logits.dtype not in _EXACT:  # two largest are often exactly alike: the first counts, as everywhere
            top = logits.argmax(dim=-1)
            return torch.isin(top, self.blank).tolist(), top.tolist()
        found = logits[:, self.blank].max(dim=-1)
        # Cheaper than the place of the largest of all.
        blank = found.values == logits.amax(dim=-1)
        return blank.tolist(), self.blank[found.indices].tolist()


def _log_odds(logits: Float[Tensor, "read d_vocab"], ids: Int[Tensor, " opener"]) -> Float[Tensor, " read"]:
    """As `log_odds`, without a copy of every logit in float64; the openers' logits are lost."""
    logits = logits.float() if logits.dtype not in _EXACT else logits
    found = logits[:, ids].double().logsumexp(dim=1)
    return found - logits.index_fill_(1, ids, float("-inf")).logsumexp(dim=1)


def _worth(trunk: Trunk, edits: Iterable[Changes]) -> list[Changes]:
    """The first edits, as many as make a group: what they share is then a small part of it."""
    n_layers, whole = trunk.bare.facts.n_layers, sum(map(len, trunk.sequences.tokens))
    found: list[Changes] = []
    cost = 0.0
    for edit in edits:
        found.append(edit)
        cost += (n_layers - min(layer for _, layer in edit)) * len(trunk.pack) / (n_layers * whole)
        if cost >= _TRUNKS_PER_GROUP and len(found) >= _FEWEST:
            break
    return found


def plainly(reading: Reading, component: Component | None, rows: list[int]) -> Float[np.ndarray, " prompt"]:
    """Read some prompts the plain way, as `refusal_score` does all of them: an editor may need to know the whole batch."""
    components = [] if component is None else [component]
    model, batch, settings = reading.model, reading.batch, reading.first_word or {}
    check_answer_is_next(batch, "refusal_score")
    require_eval(model)
    ids = torch.tensor(opener_ids(tokenizer_of(model), settings.get("openers")))
    skip, max_rows = settings.get("skip", "greedy"), settings.get("max_rows", MAX_ROWS)
    odds: dict[int, float] = {}
    with attached(model, components, batch, writes=skip == "forced"):
        words = first_words_of(
            model,
            batch,
            components,
            skip=skip,
            whitespace=settings.get("whitespace"),
            max_rows=max_rows,
            what="refusal_score",
            only=rows,
        )
        for word in words:
            odds |= zip(word.rows, log_odds(word.logits, ids).tolist(), strict=True)
    return np.array([odds[row] for row in rows])


def _require_alike(
    found: Float[np.ndarray, " prompt"], expected: Float[np.ndarray, " prompt"], what: str
) -> None:
    error = np.abs(found - expected)
    if not (error <= _TOLERANCE + 1e-5 * np.abs(expected)).all():
        raise _Disagree(
            f"the fast scan gives other scores than a plain forward pass on this model (off by {error.max():.2g} nats under"
            f" {what})"
        )
