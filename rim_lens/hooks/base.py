"""What every component can do: be a context manager on a model, give its hooks, or stay registered."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rim_lens.chat.spans import SpanBatch
from rim_lens.chat.vocabulary import vocabulary_digest
from rim_lens.errors import CaptureError, ConditionError, ReferenceMismatch
from rim_lens.lens import ComponentHook, Hook, Model, ModelFacts, Site, add_hooks, hooked, model_facts, verify

# tensor at a hook point → its replacement, or None to leave it
Edit = Callable[[Tensor], Tensor | None]


class Component:
    """A reader or editor of activations.

    Three ways to use one, on any HookedTransformer or TransformerBridge::

        with component.on(model):            # stacks with others, gone after the block or an exception
            model(tokens, attention_mask=mask)
        model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=component.fwd_hooks(model))
        component.register(model)            # stays until component.remove()

    On first contact with a model it proves that its hook points work there (see `rim_lens.lens.verify`).
    """

    reads: ClassVar[tuple[Site, ...]] = ()
    edits: ClassVar[tuple[Site, ...]] = ()

    def __init__(self) -> None:
        self._batch: SpanBatch | None = None
        self._members: list[int] | None = None  # which prompts of the whole bound batch `_batch` holds
        self._checked: SpanBatch | None = None
        self._removers: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        told = ", ".join(f"{name}={describe(value)}" for name, value in settings.items())
        return f"{type(self).__name__}({told})"

    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        """Return (hook name, function of the tensor) pairs. Called after the proof; override this."""
        raise NotImplementedError

    def sites(self) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        """Return the sites this component reads and edits, to be proven before the first use."""
        return self.reads, self.edits

    def check_prompts(self, batch: SpanBatch) -> None:
        """Refuse prompts that this component cannot work on; called with the whole batch before any pass over it."""

    def acts_within(self, batch: SpanBatch) -> bool:  # noqa: ARG002
        """Whether something of it is done to the tokens of these prompts, and not only to such as are still written."""
        return True

    def fwd_hooks(self, model: Model) -> list[tuple[str, Hook]]:
        """Verify the model and return hooks for `model.run_with_hooks(fwd_hooks=...)`.

        Raises:
            ModelError: A hook point is missing, never fires, has another shape, or ignores edits.
        """
        reads, edits = self.sites()
        facts = verify(model, reads=reads, edits=edits)
        kind, what = type(self).__name__, repr(self)
        return [(name, ComponentHook(edit, kind, what)) for name, edit in self.hooks(model, facts)]

    @contextmanager
    def on(self, model: Model) -> Iterator[Self]:
        """Attach to a model for the length of a `with`."""
        with hooked(model, self.fwd_hooks(model)):
            yield self

    def register(self, model: Model) -> Self:
        """Attach to a model until `remove` is called."""
        self._removers.append(add_hooks(model, self.fwd_hooks(model)))
        return self

    def remove(self) -> None:
        """Detach from every model it was registered on. Harmless when there is none."""
        while self._removers:
            self._removers.pop()()


@contextmanager
def bound(
    components: Sequence[Component], batch: SpanBatch, rows: Sequence[int] | None = None
) -> Iterator[SpanBatch]:
    """Say which prompts the next forward passes read; needed where spans or generated rows are asked for.

    Args:
        components: Readers and editors.
        batch: The prompts.
        rows: Only these of them are read next. Masks [prompt, pos] that a component was given for the whole batch are
            cut to them meanwhile.

    Yields:
        The prompts that are read next, in that order.
    """
    part = batch if rows is None else batch.select(rows)
    unique = {id(component): component for component in components}.values()
    for component in unique:
        _check(component, batch)
    before = [_cut(component, batch, part, rows) for component in unique]
    try:
        yield part
    finally:
        for component, earlier in zip(unique, before, strict=True):
            vars(component).update(earlier)


@contextmanager
def attached(
    model: Model, components: Sequence[Component], batch: SpanBatch, writes: bool = True
) -> Iterator[None]:
    """Attach components for the length of a `with` in which the batch is going to be read.

    They look at the prompts first: attaching may run reference prompts, which nobody should wait for in vain.

    Args:
        model: Any HookedTransformer or TransformerBridge.
        components: Readers and editors, none of them twice.
        batch: The prompts.
        writes: Whether tokens are read after those of the batch, in every prompt.

    Raises:
        CaptureError: A component was given twice, and would act twice.
        ConditionError: No token follows the prompts, and a component acts on such alone.
        ReferenceMismatch: The prompts were rendered for another model.
    """
    if len({id(component) for component in components}) < len(components):
        raise CaptureError("the same component was given twice, and would act twice; give each once.")
    check_vocabulary(model, batch, "the batch")
    with ExitStack() as stack:
        for component in components:
            _check(component, batch)
            if not writes and not component.acts_within(batch):
                raise ConditionError(
                    f"{component!r} acts on nothing but tokens that are written after these prompts, and here the prompts"
                    " are read with none after them, or none but whitespace in some: the effect would be 0. Name rows of the prompt ('all', 'prompt_last', a span), or"
                    " use it in rl.generate, or in rl.capture of what was written (rl.generate(...).batch)."
                )
        for component in components:
            stack.enter_context(component.on(model))
        yield


def check_vocabulary(model: Model, batch: SpanBatch, what: str) -> None:
    """Refuse prompts that were rendered for a model with another vocabulary.

    Raises:
        ReferenceMismatch: A token lies outside this model's vocabulary, or stands for another word in it.
    """
    top, size = int(batch.tokens.max()), model_facts(model).d_vocab
    advice = "Render the prompts with this model's own format, rl.ChatFormat.from_model(model)."
    if top >= size:
        raise ReferenceMismatch(
            f"{what} holds token {top}, but this model's vocabulary ends at {size - 1}: it was rendered for another model. {advice}"
        )
    own = vocabulary_digest(getattr(model, "tokenizer", None))
    if own and batch.vocabulary and own != batch.vocabulary:
        raise ReferenceMismatch(
            f"{what} was rendered in the words of another tokenizer than this model's (vocabularies {batch.vocabulary} and {own}):"
            f" its ids stand for other words here. {advice}"
        )


def _check(component: Component, batch: SpanBatch) -> None:
    if component._checked is not batch:  # it is bound again for each part of the batch
        component.check_prompts(batch)
        component._checked = batch


def _cut(
    component: Component, batch: SpanBatch, part: SpanBatch, rows: Sequence[int] | None
) -> dict[str, Any]:
    """Bind the prompts and cut the masks; return what stood there before."""
    before: dict[str, Any] = {"_batch": component._batch, "_members": component._members}
    component._batch = part
    component._members = list(range(len(batch))) if rows is None else list(rows)
    if rows is not None:
        for name, value in list(vars(component).items()):
            if not name.startswith("_") and isinstance(value, Tensor) and value.shape == batch.tokens.shape:
                before[name] = value
                setattr(component, name, value[list(rows), -part.tokens.shape[1] :])
    return before


def describe(value: Any) -> str:
    """A setting of a component in words; what is too long to print by its size and a digest.

    >>> import torch
    >>> describe("prompt_last"), describe(torch.ones(2, 3))
    ("'prompt_last'", 'tensor(2, 3):f4691328')
    """
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        return f"tensor{tuple(value.shape)}:{hashlib.sha256(data).hexdigest()[:8]}"
    if isinstance(value, SpanBatch):
        return f"{len(value)} prompts:{value.digest[:8]}"
    return repr(value)
