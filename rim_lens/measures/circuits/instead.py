"""What a sender is made to send instead: another run's output, a mean, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import ReferenceMismatch, StatisticsError
from rim_lens.hooks import AblateHeads, AblateNeurons, PatchHeads, PatchNeurons, PatchResidual, bound, record
from rim_lens.hooks.alignment import Align
from rim_lens.hooks.editing import RowEditor, Rows
from rim_lens.hooks.positions import chosen_rows
from rim_lens.hooks.reference import Per
from rim_lens.lens import Head, Model, ModelFacts, Site

Method = Literal["patch", "zero", "mean", "resample"]
Activations = Mapping[tuple[Site, int], Float[Tensor, "prompt pos ..."]]


@dataclass(frozen=True, eq=False)
class Instead:
    """The other thing that senders are made to send; make one with `patched` or `ablated`.

    Attributes:
        method: "patch": what they send in the source run, token for token; "zero", "mean" and "resample": see `AblateHeads`.
        source: The source run's prompts; for "mean" and "resample" the reference; None for "zero".
        source_model: Runs the source, where it is another model (a tuned or base one of the same shapes).
        align: How tokens of spans of unequal length correspond.
        per: What a mean is taken over.
        seed: Of the donors.
    """

    method: Method
    source: SpanBatch | None = None
    source_model: Model | None = None
    align: Align = "end"
    per: Per = "position"
    seed: int = 0

    def __repr__(self) -> str:
        if self.source is None:
            return self.method
        model = " of another model" if self.source_model is not None else ""
        return f"{self.method} from {self.source.name} ({len(self.source)} prompts:{self.source.digest[:8]}){model}"

    def with_source(self, source: SpanBatch | None) -> Instead:
        """The same from other prompts."""
        return replace(self, source=source)

    def heads(self, heads: Iterable[Head]) -> RowEditor:
        """An editor that makes heads send it."""
        if self.method == "patch":
            return PatchHeads(heads, self._prompts, "all", align=self.align, source_model=self.source_model)
        return AblateHeads(heads, **self._ablation())

    def neurons(self, neurons: Iterable[tuple[int, int]]) -> RowEditor:
        """An editor that makes neurons send it."""
        if self.method == "patch":
            return PatchNeurons(
                neurons, self._prompts, "all", align=self.align, source_model=self.source_model
            )
        return AblateNeurons(neurons, **self._ablation())

    def stream(self, model: Model, layers: Sequence[int], layer: int, span: str) -> RowEditor:
        """An editor that puts a span's residual stream before a layer in place.

        Args:
            model: Runs the source, where no other model does.
            layers: Layers that will be asked for, this one among them: the source is run once for all.
            layer: The layer.
            span: The span.

        Raises:
            StatisticsError: A mean or a donor's stream was asked for.
        """
        if self.method != "patch":
            raise StatisticsError(
                f"edges from the span {span!r} were asked for with {self.method!r}; a stream is patched from another run"
                " (`patched`), or the span's values are zeroed ('zero'). Leave the span out, or use one of these."
            )
        known = self._recordings
        key = tuple(layers)
        if key not in known:
            known[key] = record(self.source_model or model, self._prompts, ["resid_pre"], layers)
        return PatchResidual([layer], known[key], span, "resid_pre", self.align)

    @cached_property
    def _recordings(self) -> dict[tuple[int, ...], Any]:
        return {}

    @property
    def _prompts(self) -> SpanBatch:
        if self.source is None:
            raise ReferenceMismatch(f"{self.method!r} needs prompts to be taken from; give a source batch.")
        return self.source

    def _ablation(self) -> dict[str, Any]:
        if self.method == "zero":
            return {"method": "zero"}
        per = {"per": self.per} if self.method == "mean" else {}
        return {
            "method": self.method,
            "reference": self._prompts,
            "align": self.align,
            "seed": self.seed,
            **per,
        }


def patched(source: SpanBatch, *, source_model: Model | None = None, align: Align = "end") -> Instead:
    """Senders send what they send in a source run: the twins', another condition's, another model's.

    Args:
        source: Prompts, row i standing for row i of the batch that is read.
        source_model: Runs them, where it is another model of the same shapes.
        align: How tokens of spans of unequal length correspond; those without a counterpart keep what is sent.

    >>> import rim_lens as rl
    >>> chat = rl.ChatFormat.from_model(rl.load_model("toy"))
    >>> patched(chat.render(["ban bread please + 3 4 6"], think="off")).method
    'patch'
    """
    return Instead("patch", source, source_model, align)


def ablated(
    method: Literal["zero", "mean", "resample"] = "zero",
    reference: SpanBatch | None = None,
    *,
    per: Per = "position",
    align: Align = "end",
    seed: int = 0,
) -> Instead:
    """Senders send nothing, a mean, or what they send on a donor prompt; see `AblateHeads`.

    Args:
        method: "zero", "mean" or "resample".
        reference: Prompts of the mean, or the donors.
        per: What a mean is taken over.
        align: How places within a span correspond.
        seed: Of the donors.

    Raises:
        ReferenceMismatch: Reference and method do not go together.

    >>> ablated()
    zero
    """
    if (method == "zero") != (reference is None):
        raise ReferenceMismatch(
            f"method={method!r} with reference={'a batch' if reference is not None else None}: a mean and a resampling need the"
            " prompts they are taken from (reference=batch), and zero takes none."
        )
    return Instead(method, reference, None, align, per, seed)


def edited(
    editor: RowEditor, model: Model, facts: ModelFacts, batch: SpanBatch, recorded: Activations
) -> dict[tuple[Site, int], Float[Tensor, "prompt pos ..."]]:
    """What an editor would make of recorded activations of a batch, without running the model on it.

    Args:
        editor: Of rows.
        model: Read for what the editor takes from elsewhere.
        facts: Of the model.
        batch: The prompts.
        recorded: Their activations.

    Returns:
        At the spots that the editor names.
    """
    found = {}
    with bound([editor], batch):
        for spot, change in editor.changes(model, facts).items():
            before = recorded[spot]
            rows = _rows(editor, batch)
            after = before.clone()
            after[rows.prompt, rows.pos] = change(before[rows.prompt, rows.pos], rows)
            found[spot] = after
    return found


def _rows(editor: RowEditor, batch: SpanBatch) -> Rows:
    rows = chosen_rows(editor.positions, batch, 0, *batch.tokens.shape) & batch.attention_mask.bool().cpu()
    prompt, pos = rows.nonzero(as_tuple=True)
    return Rows(prompt, torch.as_tensor(pos))
