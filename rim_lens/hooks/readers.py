"""What every reader shares: a layout known before any compute, and numbers reduced inside the hook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import CaptureError
from rim_lens.hooks.base import Component
from rim_lens.lens import Hook, Model, ModelFacts, model_facts

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Variable:
    """One array a reader gives, per prompt.

    Attributes:
        name: Its name in the dataset.
        dims: Dimension names after "prompt".
        shape: Sizes of those.
        coords: Labels of those that have any beyond their index.
        attrs: Units, description and settings, stored beside the numbers.
        dtype: NumPy dtype name.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"


class Reader(Component):
    """A component that reads activations and keeps per-prompt numbers.

    `capture` asks for the `layout` first, then runs batches and calls `collect` after each. Registered by
    hand, `result` holds the numbers of the last forward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self._read: dict[str, dict[int, Tensor]] = {}  # variable → layer → [prompt, ...]
        self._facts: ModelFacts | None = None

    def layout(self, facts: ModelFacts, batch: SpanBatch | None) -> list[Variable]:
        """Return the variables this reader gives; checks its arguments against the batch. Override this."""
        raise NotImplementedError

    @override
    def fwd_hooks(self, model: Model) -> list[tuple[str, Hook]]:
        """Verify the model and return hooks for `model.run_with_hooks(fwd_hooks=...)`."""
        self._facts = model_facts(model)
        self._read = {}
        return super().fwd_hooks(model)

    def keep(self, variable: str, layer: int, values: Tensor) -> None:
        """Keep one layer's numbers of the pass under way, on the layer's own device."""
        self._read.setdefault(variable, {})[layer] = values

    def collect(self) -> dict[str, Tensor]:
        """Return the last pass's numbers on the CPU, [prompt, layer, ...], and forget them.

        Raises:
            CaptureError: No forward pass has been read.
        """
        if not self._read:
            raise CaptureError(
                f"{type(self).__name__} has read nothing: run model(tokens, attention_mask=...) while it is attached."
            )
        read, self._read = self._read, {}
        return {
            name: torch.stack([layers[layer].cpu() for layer in sorted(layers)], dim=1)
            for name, layers in read.items()
        }

    @property
    def result(self) -> xr.Dataset:
        """The last forward pass as a labelled dataset (dims prompt, layer, …).

        Raises:
            CaptureError: No forward pass has been read.
        """
        import xarray as xr

        kept = dict(self._read)
        arrays = self.collect()
        self._read = kept
        if self._facts is None:  # only when collect() was fed by hand
            raise CaptureError(f"{type(self).__name__} was never attached to a model.")
        variables = self.layout(self._facts, self._batch)
        return xr.Dataset(
            {v.name: (("prompt", *v.dims), arrays[v.name].numpy(), dict(v.attrs)) for v in variables},
            coords={dim: list(labels) for v in variables for dim, labels in v.coords.items()},
        )
