"""Render requests as a model's chat template would, tokenise once, and name every token's span."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rim_lens.chat.asking import (
    History,
    check_cot,
    check_think,
    one_history_per_row,
    one_per_row,
    refuse_control,
)
from rim_lens.chat.fitting import fit
from rim_lens.chat.formats import FormatSpec, find_format, named_format
from rim_lens.chat.labelling import Segment, assign, character_ranges, check, joined, merge, without_holes
from rim_lens.chat.reading import Reader
from rim_lens.chat.rendering import Default, Rendering
from rim_lens.chat.spans import ATOMS, Condition, SpanBatch, Spans
from rim_lens.chat.vocabulary import vocabulary_digest
from rim_lens.errors import ConditionError, MissingPadToken, MissingTokenizer, SpanError
from rim_lens.prompts.records import Prompt, as_prompts

NO_PAD = -1


class ChatFormat:
    r"""A tokenizer's chat format: text and token ids with named spans for any request, and back again.

    What belongs to which span (`rim_lens.chat.spans.ATOMS`):

    - `request` is the user's words of the *last* user turn, `turn_end` the end-of-turn token right after them, `assistant`
      the role word of the header of the last assistant turn (the one that is being written). The words of earlier turns are
      `template`. Text that looks like a tag inside the user's, the system's or an earlier turn's words is no tag.
    - `cot` is everything strictly between the tags when there is visible text, the newlines next to the tags included; `gap`
      is the same place when there is whitespace only, also in a block that is open and still empty. Newlines after the
      closing tag are `template`, and so is the end-of-turn token after an answer.
    - Several think blocks in one turn: all tags are tags, all that stands inside is `cot` (or `gap`), all visible text
      outside is `answer`. A closing tag without an opening one closes a block that began with the turn.
    - gpt-oss: the analysis channel is the chain of thought. `think_open` is ``<|channel|>analysis<|message|>``, `think_close`
      the ``<|end|>`` of that message; the header of the next message is `template`, any other channel's text `answer`.
    - Formats without think tags of their own (llama3_1, gemma3, chatml) get plain-text tags, as SmolLM2 recipes use:
      ``<think>\n\n</think>\n\n``. Their open condition holds the opener, as nothing else would tell the model to think.
    - `sink` is the first real token of a row and wins over every other atom.
    - Shared tokens: see `rim_lens.chat.labelling`.

    A control token spelled out in the user's own words (``<|im_end|>``) is tokenised as the chat template would: rim_lens
    still labels it `request`, but the model sees the turn end.

    Attributes:
        spec: The format's pieces, as found on this tokenizer.
        tokenizer: The Hugging Face tokenizer.
        pad_token_id: What pads rows on the left, or None.

    >>> from rim_lens.organisms.toy.host import toy_tokenizer
    >>> chat = ChatFormat.from_tokenizer(toy_tokenizer())
    >>> off = chat.render(["make bread please + 3 4 6"], think="off")
    >>> off.texts[0]
    '<user> make bread please + 3 4 6 <assistant> <think> </think>'
    >>> chat.decode(off.tokens[0][off.spans["request"][0]])
    'make bread please + 3 4 6'
    """

    def __init__(self, tokenizer: Any, spec: FormatSpec, pad_token_id: int | None = None) -> None:
        _require_offsets(tokenizer)
        self.tokenizer = tokenizer
        self.pad_token_id: int | None = tokenizer.pad_token_id if pad_token_id is None else pad_token_id
        self._rendering: Rendering = fit(spec, tokenizer)
        self.spec = self._rendering.spec
        spec = self.spec
        pieces = "\0".join(
            (spec.user, *spec.assistant, *(spec.system or ()), spec.earlier_lead, spec.after_close)
        )
        control = {spec.bos, spec.turn_end, spec.answer_end, spec.think_open, spec.think_close, *spec.stops}
        control |= {token for token in spec.vocabulary if token in pieces or token in spec.think_open}
        self._single_tokens = frozenset(
            token for token in control if token and _token_id(tokenizer, token) is not None
        )
        # What a chain of thought or an answer may not hold.
        self._control = {spec.think_open, spec.think_close, *self._single_tokens}
        self._reader = Reader(self.spec, self._single_tokens)
        self._pieces: dict[int, str] = {}

    @classmethod
    def from_model(cls, model: Any, format: str | None = None, pad_token_id: int | None = None) -> ChatFormat:  # noqa: A002
        """Find the chat format of a model by its tokenizer.

        Args:
            model: Any object with a `tokenizer` (HookedTransformer, TransformerBridge).
            format: Name of a format, where it is not to be looked for.
            pad_token_id: What to pad with, where the tokenizer has no pad token.

        Raises:
            MissingTokenizer: The model has none, or a slow one.
            UnknownChatFormat: No registered format fits.
            TemplateMismatch: The tokenizer's template renders otherwise than the format.
        """
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise MissingTokenizer(
                f"{type(model).__name__} has no tokenizer, so that there is no chat template to read. Set model.tokenizer,"
                " or use ChatFormat.from_tokenizer(tokenizer)."
            )
        return cls.from_tokenizer(tokenizer, format=format, pad_token_id=pad_token_id)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        format: str | None = None,  # noqa: A002
        pad_token_id: int | None = None,
    ) -> ChatFormat:
        """Find the chat format by the tokenizer's vocabulary and chat template.

        Args:
            tokenizer: A fast Hugging Face tokenizer.
            format: Name of a format, where it is not to be looked for.
            pad_token_id: What to pad with, where the tokenizer has no pad token.

        Raises:
            MissingTokenizer: The tokenizer is a slow one, without character offsets.
            UnknownChatFormat: No registered format fits, or none has that name.
            TemplateMismatch: The tokenizer's template renders otherwise than the format.
        """
        _require_offsets(tokenizer)
        spec = (
            find_format(tokenizer, lambda token: _token_id(tokenizer, token) is not None)
            if format is None
            else named_format(format)
        )
        return cls(tokenizer, spec, pad_token_id)

    # --- facts ---------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the format."""
        return self.spec.name

    @property
    def default_system(self) -> str | None:
        """The words that the template injects when no system message is given, or None."""
        return next((segment.text for segment in self._rendering.injected if segment.atom == "system"), None)

    @property
    def opener_in_prompt(self) -> bool:
        """Whether an open prompt already ends with the opening think tag."""
        return self.spec.opener != "model"

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end the assistant's turn."""
        ids = [
            _token_id(self.tokenizer, token) for token in (self.spec.answer_end, *self.spec.stops) if token
        ]
        ids.append(self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(found for found in ids if found is not None))

    @property
    def tag_ids(self) -> dict[str, tuple[int, ...]]:
        """Ids of the think tags, each tokenised on its own (in a text, a neighbour may merge with the last of them)."""
        return {
            name: tuple(self.encode(tag))
            for name, tag in (("think_open", self.spec.think_open), ("think_close", self.spec.think_close))
        }

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS or anything else added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Int[Tensor, " pos"] | Sequence[int]) -> str:
        """Text of token ids, control tokens included, spaces left as they are."""
        ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def count_tokens(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self.encode(text))

    def cots(self, requests: Sequence[Prompt | str], kind: str) -> list[str]:
        """Chains of thought of one kind for these requests, ready for ``render(think=...)``.

        Args:
            requests: Records or strings.
            kind: "careful", "confirm", "deviate", "heuristic", "filler" or "unrelated".
        """
        from rim_lens.prompts.cots import cot_texts

        return list(cot_texts(as_prompts(requests), kind, self.count_tokens))

    # --- rendering -----------------------------------------------------------------------------------

    def render(
        self,
        requests: Sequence[Prompt | str] | Prompt | str,
        think: str | Sequence[str] = "off",
        system: str | Default | None = None,
        history: History | None = None,
        label: str = "",
        answers: str | Sequence[str] | None = None,
        end_turn: bool = False,
        begin: str | Sequence[str] | None = None,
    ) -> SpanBatch:
        r"""Render requests under one think condition, as left-padded token ids with named spans.

        The prompt is tokenised once, as a whole and with nothing added (a BOS comes from the format, once), and each span is
        checked by decoding its tokens back to the text it claims. A given answer is tokenised apart and follows the prompt, so
        that a row with an answer begins with exactly the tokens of the row without: the prompt a model answers is the prompt it
        was trained on, also where the tokenizer would merge or split whitespace otherwise before the answer's first word
        (SmolLM2: ``\n\n`` is one token at the end of a prompt and two before a word).

        Args:
            requests: Records or strings.
            think: "off" (empty block, closed), "open" (generation prompt: the model writes its own chain of thought next;
                `opener_in_prompt` says whether that holds the opening tag), or a given chain of thought without tags,
                closed: one for all, or one per request.
            system: System words. None: no system turn, also where the template would inject one. `DEFAULT`: whatever the
                template injects.
            history: Earlier turns as messages with "role" and "content", user first and assistant last: one history
                for all, or one per request. Reasoning in earlier assistant turns is dropped where the template drops it.
            label: A free name for the condition, used as a label in results.
            answers: What the assistant says after the block: one for all, or one per request.
            end_turn: Close the answer with the end-of-turn token.
            begin: First words of the chain of thought, after which the model goes on by itself; only with think="open". One
                for all, or one per request. The block is opened for it, also where the model would write the opening tag.

        Raises:
            ConditionError: The think condition, history, system or answer cannot be rendered in this format.
            SpanError: A text cannot be located exactly in its tokens.
            MissingPadToken: Rows of unequal length, and no pad token.
        """
        prompts = as_prompts([requests] if isinstance(requests, (str, Prompt)) else requests)
        if not prompts:
            raise ConditionError("no requests were given; a batch needs at least one.")
        condition, cots = self._condition(think, len(prompts))
        if begin is not None:
            cots = self._beginnings(begin, condition, len(prompts))
        said = None if answers is None else one_per_row(answers, len(prompts), "answers")
        self._check_answers(said, condition, end_turn)
        if isinstance(system, str) and self.spec.system is None:
            raise ConditionError(
                f"format {self.name!r} has no system turn on this tokenizer; leave system=None, or put the words into the"
                " request."
            )
        histories = one_history_per_row(history, len(prompts))
        rows = [
            self._rendering.segments(
                prompt.text,
                self._rendering.block(condition, cots[row]),
                system=system,
                history=histories[row],
            )
            for row, prompt in enumerate(prompts)
        ]
        ids, atoms = self._tokenise(rows)
        texts = [joined(segments) for segments in rows]
        if said is not None:
            answer_rows = [self._rendering.answer(answer, end_turn) for answer in said]
            answer_ids, answer_atoms = self._tokenise(answer_rows)
            ids = [
                prompt_part + answer_part for prompt_part, answer_part in zip(ids, answer_ids, strict=True)
            ]
            atoms = [
                prompt_part + answer_part
                for prompt_part, answer_part in zip(atoms, answer_atoms, strict=True)
            ]
            texts = [text + joined(segments) for text, segments in zip(texts, answer_rows, strict=True)]
        return self._batch(
            ids,
            atoms,
            prompts=tuple(prompts),
            texts=tuple(texts),
            think=condition,
            label=label,
            cots=tuple(cot.strip() for cot in cots),
            answers=tuple(answer.strip() for answer in said or [""] * len(prompts)),
            finished_thinking=(condition != "open",) * len(prompts),
        )

    def extend(
        self,
        batch: SpanBatch,
        new_tokens: Int[Tensor, "prompt new"],
        new_mask: Bool[Tensor, "prompt new"] | None = None,
    ) -> SpanBatch:
        """Append what a model wrote and label it, together with the turn it continues.

        The whole assistant turn is read again from its token ids, so that the opener may stand in the prompt and the closing
        tag in the completion, and a block that was empty becomes `cot` when text follows. Rows that ended early are
        left-padded again. `n_generated`, `cots`, `answers` and `finished_thinking` are filled.

        Args:
            batch: Prompts of this format, or a batch that was extended before.
            new_tokens: Int [prompt, new], in the order written.
            new_mask: True where a token was written. None: a row ends with its first stop token, which is kept, or before
                its trailing pads.

        Raises:
            SpanError: The batch is of another format, or the rows do not match.
            MissingPadToken: Rows of unequal length, and no pad token.
        """
        if batch.format != self.name:
            raise SpanError(
                f"the batch is in format {batch.format!r}, this is {self.name!r}; use the format it came from."
            )
        if new_tokens.ndim != 2 or new_tokens.shape[0] != len(batch):
            raise SpanError(
                f"new_tokens has shape {tuple(new_tokens.shape)} for {len(batch)} prompts; give one row per prompt."
            )
        if new_mask is not None and new_mask.shape != new_tokens.shape:
            raise SpanError(
                f"new_mask has shape {tuple(new_mask.shape)}, new_tokens {tuple(new_tokens.shape)}."
            )
        all_ids, all_atoms, texts, turns, counts = [], [], [], [], []
        for row in range(len(batch)):
            real = batch.attention_mask[row].bool()
            ids = batch.tokens[row][real].tolist()
            old = batch.atoms_of(row)
            new = (
                new_tokens[row][new_mask[row].bool()].tolist()
                if new_mask is not None
                else self._written(new_tokens[row].tolist())
            )
            if "assistant" not in old:
                raise SpanError(
                    f"row {row}: the batch has no assistant header, so that there is no turn to continue."
                )
            head = len(old) - old[::-1].index("assistant")
            text, ranges = character_ranges([*ids[head:], *new], self.decode, self._pieces)
            turn = self._reader.read_turn(text, ranges)
            numbers = assign(turn.segments, ranges, strict=False, where=f"row {row}")
            all_ids.append([*ids, *new])
            all_atoms.append([*old[:head], *(turn.segments[number].atom for number in numbers)])
            texts.append(batch.texts[row] + self.spec.separator * bool(new) + self.decode(new))
            turns.append(turn)
            counts.append(len(new) + (batch.n_generated[row] if batch.n_generated else 0))
        return self._batch(
            all_ids,
            all_atoms,
            prompts=batch.prompts,
            texts=tuple(texts),
            think=batch.think,
            label=batch.label,
            n_generated=tuple(counts),
            cots=tuple(turn.cot for turn in turns),
            answers=tuple(turn.answer for turn in turns),
            finished_thinking=tuple(turn.finished for turn in turns),
        )

    def parse(
        self,
        tokens: Int[Tensor, "prompt pos"] | Sequence[Sequence[int]],
        attention_mask: Int[Tensor, "prompt pos"] | None = None,
        prompts: Sequence[Prompt] | None = None,
        think: Condition | None = None,
        system: str | None = None,
        label: str = "",
    ) -> SpanBatch:
        """Name the spans of token ids that came from elsewhere.

        Only ids are read, so control tokens are taken at face value: the last user header that an assistant header follows
        begins the last user turn. What cannot be told from ids: system words that stand in the user's turn (Gemma; pass
        `system`), and turns spelled out in the user's own words (`render` and `extend` know better).

        Args:
            tokens: Int [prompt, pos], left-padded, or one list of ids per row.
            attention_mask: 1 where a token is real. None: leading pad tokens are padding.
            prompts: The record behind each row. None: records made from the words found.
            think: Condition of the batch. None: deduced, which all rows must then share.
            system: The system words, needed for Gemma only.
            label: A free name for the condition.

        Raises:
            SpanError: A row has no user turn followed by an assistant header.
            ConditionError: The rows are in different conditions and `think` was not given.
        """
        rows = self._rows(tokens, attention_mask)
        ids, atoms, requests, turns, texts = [], [], [], [], []
        for row, row_ids in enumerate(rows):
            text, ranges = character_ranges(row_ids, self.decode, self._pieces)
            head = self._reader.read_head(text, ranges, system, f"row {row}")
            inside = [
                (max(start - head.stop, 0), stop - head.stop) for start, stop in ranges if stop > head.stop
            ]
            turn = self._reader.read_turn(text[head.stop :], inside)
            segments = merge([*head.segments, *turn.segments])
            numbers = assign(segments, ranges, strict=False, where=f"row {row}")
            ids.append(row_ids)
            atoms.append([segments[number].atom for number in numbers])
            requests.append(head.request)
            turns.append(turn)
            texts.append(text)
        conditions = {
            "open" if not turn.finished else "off" if turn.empty or not turn.cot else "cot" for turn in turns
        }
        if think is None and len(conditions) > 1:
            raise ConditionError(
                f"the rows are in different think conditions ({', '.join(sorted(conditions))}); parse them apart, or say"
                " which condition the batch stands for with think=."
            )
        return self._batch(
            ids,
            atoms,
            prompts=tuple(prompts if prompts is not None else as_prompts(requests)),
            texts=tuple(texts),
            think=think or conditions.pop(),
            label=label,
            cots=tuple(turn.cot for turn in turns),
            answers=tuple(turn.answer for turn in turns),
            finished_thinking=tuple(turn.finished for turn in turns),
        )

    def label_tokens(self, token_ids: Sequence[int], system: str | None = None) -> list[str]:
        """The atom of each token of one sequence, read from ids alone (see `parse`).

        Raises:
            SpanError: There is no user turn followed by an assistant header.
        """
        return self.parse([list(token_ids)], think="off", system=system).atoms_of(0)

    # --- what is asked ---------------------------------------------------------------------------

    def _condition(self, think: str | Sequence[str], n_rows: int) -> tuple[Condition, list[str]]:
        if think == "off":
            return "off", [""] * n_rows
        if think == "open":
            return "open", [""] * n_rows
        check_think(think)
        cots = one_per_row(think, n_rows, "think")
        for row, cot in enumerate(cots):
            check_cot(cot, row)
            refuse_control(cot, self._control, f"the chain of thought of row {row}")
        return "cot", cots

    def _beginnings(self, begin: str | Sequence[str], condition: Condition, n_rows: int) -> list[str]:
        if condition != "open":
            raise ConditionError(
                "begin= was given for a block that is closed; it is the beginning of a chain of thought that the model goes"
                " on with: use think='open', or think=<the whole text>."
            )
        words = [text.rstrip() for text in one_per_row(begin, n_rows, "begin")]
        for row, text in enumerate(words):
            check_cot(text, row)
            refuse_control(text, self._control, f"the beginning of the chain of thought of row {row}")
        return words

    def _check_answers(self, answers: list[str] | None, condition: Condition, end_turn: bool) -> None:
        if answers is None:
            if end_turn:
                raise ConditionError("end_turn=True closes an answer, and no answers were given.")
            return
        if condition == "open":
            raise ConditionError(
                "an answer was given for open prompts, where the model is still to think; use think='off' or a given chain"
                " of thought."
            )
        if end_turn and not self.spec.answer_end:
            raise ConditionError(f"format {self.name!r} has no end-of-turn token; leave end_turn=False.")
        for row, answer in enumerate(answers):
            refuse_control(answer, self._control, f"the answer of row {row}")

    # --- text to tokens ------------------------------------------------------------------------------

    def _tokenise(self, rows: list[list[Segment]]) -> tuple[list[list[int]], list[list[str]]]:
        texts = [joined(segments) for segments in rows]
        for row, text in enumerate(texts):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise SpanError(
                    f"row {row}: the text holds half a surrogate pair, which is no character; remove it."
                )
        try:
            encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        except Exception as problem:
            raise SpanError(f"the tokenizer refused the rendered text: {problem}") from problem
        atoms = []
        for row, segments in enumerate(rows):
            ranges = without_holes(encoded["offset_mapping"][row])
            numbers = assign(segments, ranges, strict=True, where=f"row {row}")
            check(segments, ranges, numbers, encoded["input_ids"][row], self.decode, self._same, f"row {row}")
            atoms.append([segments[number].atom for number in numbers])
        return encoded["input_ids"], atoms

    def _same(self, decoded: str, claimed: str) -> bool:
        """Whether two texts are one to this tokenizer (its own normalisation; spaces, where they have no tokens)."""
        if decoded == claimed:
            return True
        if self.spec.separator:
            return decoded.split() == claimed.split()
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        return normalizer is not None and bool(
            normalizer.normalize_str(decoded) == normalizer.normalize_str(claimed)
        )

    def _batch(
        self,
        ids: Sequence[Sequence[int]],
        atoms: Sequence[Sequence[str]],
        **facts: Any,
    ) -> SpanBatch:
        longest = max(map(len, ids))
        if self.pad_token_id is None and any(len(row) != longest for row in ids):
            raise MissingPadToken(
                f"the rows are {min(map(len, ids))} to {longest} tokens long and the tokenizer has no pad token. Name one:"
                " ChatFormat.from_tokenizer(tokenizer, pad_token_id=...) (masked everywhere, so any id will do, for instance"
                f" {self.tokenizer.eos_token_id}), or set tokenizer.pad_token."
            )
        pad = NO_PAD if self.pad_token_id is None else self.pad_token_id
        tokens = torch.full((len(ids), longest), pad, dtype=torch.long)
        mask = torch.zeros((len(ids), longest), dtype=torch.long)
        labels = torch.full((len(ids), longest), -1)
        for row, (row_ids, row_atoms) in enumerate(zip(ids, atoms, strict=True)):
            start = longest - len(row_ids)
            tokens[row, start:] = torch.tensor(row_ids, dtype=torch.long)
            mask[row, start:] = 1
            labels[row, start:] = torch.tensor([ATOMS.index(atom) for atom in ("sink", *row_atoms[1:])])
        spans = Spans({atom: labels == number for number, atom in enumerate(ATOMS)})
        return SpanBatch(
            tokens=tokens,
            attention_mask=mask,
            spans=spans,
            format=self.name,
            pad_token_id=pad,
            vocabulary=vocabulary_digest(self.tokenizer),
            **facts,
        )

    # --- tokens to text ------------------------------------------------------------------------------

    def _written(self, ids: list[int]) -> list[int]:
        """A row of new tokens up to and with its first stop token, or without its trailing pads."""
        stops = set(self.stop_ids)
        for place, token in enumerate(ids):
            if token in stops:
                return ids[: place + 1]
        while ids and ids[-1] == self.pad_token_id:
            ids = ids[:-1]
        return ids

    def _rows(
        self,
        tokens: Int[Tensor, "prompt pos"] | Sequence[Sequence[int]],
        mask: Int[Tensor, "prompt pos"] | None,
    ) -> list[list[int]]:
        rows = tokens.tolist() if isinstance(tokens, Tensor) else [list(row) for row in tokens]
        if mask is not None:
            rows = [
                [token for token, real in zip(row, real_row, strict=True) if real]
                for row, real_row in zip(rows, mask.tolist(), strict=True)
            ]
        else:
            for row in rows:
                while row and row[0] == self.pad_token_id:
                    del row[0]
        if not rows or not all(rows):
            raise SpanError("a row has no tokens; give at least one real token per row.")
        return rows


def _token_id(tokenizer: Any, token: str) -> int | None:
    """The id of a single token, or None where the vocabulary lacks it."""
    found: int | None = tokenizer.backend_tokenizer.token_to_id(token)
    return found


def _require_offsets(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise MissingTokenizer(
            f"spans need character offsets, which {type(tokenizer).__name__} does not give; load the tokenizer with"
            " AutoTokenizer.from_pretrained(..., use_fast=True)."
        )
