"""What editors of rows share: an activation [prompt, pos, ...] changed at the rows asked for and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import SpanError
from rim_lens.hooks.base import Component, Edit
from rim_lens.hooks.positions import Positions, RowOffset, chosen_rows, is_word, prompt_width, require_rows
from rim_lens.lens import Model, ModelFacts, Site, hook_name


class Rows(NamedTuple):
    """The rows that are changed in a pass, one entry each.

    Attributes:
        prompt: Which prompt of the pass a row belongs to.
        pos: Its absolute position, also under a key-value cache.
    """

    prompt: Int[Tensor, " row"]
    pos: Int[Tensor, " row"]


# The chosen rows of an activation, and which they are → their replacement. It may change its argument in place.
Change = Callable[[Float[Tensor, "row ..."], Rows], Float[Tensor, "row ..."]]


class RowEditor(Component):
    """Changes an activation [prompt, pos, ...] in chosen rows.

    Subclasses say at which hook points and how (`changes`); which rows is `positions`, the same in all.
    """

    def __init__(self, positions: Positions) -> None:
        super().__init__()
        self.positions = positions

    def changes(self, model: Model, facts: ModelFacts) -> dict[tuple[Site, int], Change]:
        """Return what is done at each (site, layer). Called after the proof; override this."""
        raise NotImplementedError

    def edited_sites(self) -> tuple[Site, ...]:
        """Return the sites that `changes` may name. Override this."""
        raise NotImplementedError

    @property
    def by_row(self) -> bool:
        """Whether what a row becomes depends on which prompt and position it is (`Rows`), not on what is there alone."""
        return False

    def own_pass(self, model: Model) -> list[tuple[str, Edit]]:  # noqa: ARG002
        """Return hooks that refuse a pass of other prompts than those bound; where `by_row`, override this."""
        return []

    @override
    def sites(self) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        return ("pattern",) if self._looks_at_pattern() else (), self.edited_sites()

    @override
    def check_prompts(self, batch: SpanBatch) -> None:
        require_rows(self.positions, batch, type(self).__name__)

    @override
    def acts_within(self, batch: SpanBatch) -> bool:
        rows = chosen_rows(self.positions, batch, 0, *batch.tokens.shape)
        return bool((rows & batch.attention_mask.bool().cpu()).any())

    def _looks_at_pattern(self) -> bool:
        # The attention pattern of layer 0 tells where a pass under a key-value cache begins.
        return self.by_row or not is_word(self.positions, "all")

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        offset = RowOffset()
        changes = self.changes(model, facts)
        return [
            *self.own_pass(model),
            *([offset.hook()] if self._looks_at_pattern() else []),
            *(
                (hook_name(site, layer), partial(self._edit, change, partial(offset.at, site, layer)))
                for (site, layer), change in changes.items()
            ),
        ]

    def _edit(
        self, change: Change, offset_at: Callable[[int, int | None], int], activation: Tensor
    ) -> Tensor | None:
        n_prompts, n_rows = activation.shape[:2]
        offset = offset_at(n_rows, prompt_width(self.positions, self._batch))
        rows = chosen_rows(self.positions, self._batch, offset, n_prompts, n_rows)
        prompt, row = (index.to(activation.device) for index in rows.nonzero(as_tuple=True))
        if len(prompt) == 0:
            return None
        edited, which = activation.clone(), Rows(prompt, row + offset)
        if len(prompt) == n_prompts * n_rows:  # all rows, in order: nothing to gather and put back
            return change(edited.flatten(0, 1), which).view(activation.shape)
        edited[prompt, row] = change(edited[prompt, row], which)
        return edited


class AligningEditor(RowEditor):
    """An editor of rows that puts in what other prompts have at a row's counterpart: a row without one stays as it is."""

    def __init__(self, positions: Positions) -> None:
        super().__init__(positions)
        self._unaligned: Int[Tensor, " prompt"] | None = None  # set where prompts are checked

    @property
    def unaligned(self) -> Int[Tensor, " prompt"]:
        """Rows asked for that have no counterpart and stay as they are, by prompt of the batch bound last.

        Raises:
            SpanError: No prompts were bound yet.
        """
        if self._unaligned is None:
            raise SpanError(
                f"{type(self).__name__} has not been bound to any prompts yet, so nothing was aligned. Run it first:"
                " rl.capture, rl.generate and rl.refusal_score bind their prompts."
            )
        return self._unaligned
