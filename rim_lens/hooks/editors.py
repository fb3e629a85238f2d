"""Editors: components that change activations on their way through the model."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import ReferenceMismatch
from rim_lens.hooks.base import Component, Edit, describe
from rim_lens.hooks.positions import Positions, RowOffset, chosen_rows
from rim_lens.hooks.reference import reference_means
from rim_lens.lens import Head, Model, ModelFacts, Site, hook_name

Method = Literal["zero", "mean"]


class _Ablation(Component):
    """Replace chosen columns of an activation, at chosen rows, by zero or by a mean over data."""

    site: ClassVar[Site]

    def __init__(self, method: Method, reference: SpanBatch | None, positions: Positions) -> None:
        super().__init__()
        if method not in ("zero", "mean"):
            raise ValueError(f"method {method!r} was asked for; there are 'zero' and 'mean'.")
        if (method == "mean") != (reference is not None):
            raise ReferenceMismatch(
                f"method={method!r} with reference={'a batch' if reference is not None else None}: a mean needs the"
                " prompts it is taken over (reference=batch), and zero takes none."
            )
        self.method = method
        self.reference = reference
        self.positions = positions

    def what(self) -> list[tuple[int, int]]:
        """The heads or neurons as given. Override this."""
        raise NotImplementedError

    def __repr__(self) -> str:
        data = "" if self.reference is None else f", reference={describe(self.reference)}"
        return f"{type(self).__name__}({self.what()}, {self.method!r}{data}, positions={describe(self.positions)})"

    def chosen(self, facts: ModelFacts) -> dict[int, list[int]]:
        """Columns to replace, by layer. Override this."""
        raise NotImplementedError

    @override
    def sites(self) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        reads: tuple[Site, ...] = (
            () if isinstance(self.positions, str) and self.positions == "all" else ("pattern",)
        )
        return reads, (self.site,)

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        columns = self.chosen(facts)
        means = (
            reference_means(model, facts, self.reference, self.site, sorted(columns), self.positions)
            if self.reference is not None
            else {}
        )
        offset = RowOffset()
        hooks: list[tuple[str, Edit]] = [
            (hook_name(self.site, layer), partial(self._edit, chosen, means.get(layer), offset))
            for layer, chosen in columns.items()
        ]
        reads, _ = self.sites()
        return [offset.hook(), *hooks] if reads else hooks

    def _edit(self, chosen: list[int], mean: Tensor | None, offset: RowOffset, activation: Tensor) -> Tensor:
        index = torch.tensor(chosen, device=activation.device)
        value = torch.zeros((), device=activation.device, dtype=activation.dtype)
        if mean is not None:
            value = mean.to(activation)[index]
        edited = activation.clone()
        if isinstance(self.positions, str) and self.positions == "all":
            edited[:, :, index] = value
            return edited
        rows = chosen_rows(
            self.positions, self._batch, offset.value, activation.shape[0], activation.shape[1]
        )
        prompts, positions = rows.nonzero(as_tuple=True)
        prompts, positions = prompts.to(activation.device), positions.to(activation.device)
        edited[prompts[:, None], positions[:, None], index[None]] = value
        return edited


class AblateHeads(_Ablation):
    """Remove heads: their output z, before W_O, becomes zero or its mean over a reference set.

    Zero is the paper's ablation (section 3); setting z of a head to zero equals zeroing that head's rows of
    W_O, grouped-query models included. The mean is over data (prompts and rows), never over heads.

    An effect of an ablation shows that the model, as it stands, uses the head. It does not show that the
    head alone does the work, nor that nothing would take its place after training.

    Args:
        heads: (layer, head) pairs.
        method: "zero" or "mean".
        reference: Prompts the mean is taken over, at the same `positions`; read anew each time the component
            is attached, so that it always belongs to the model at hand.
        positions: "all", "prompt_last", "generated", a span's name, or a mask [prompt, pos].

    Raises:
        UnknownHead: On attaching to a model that lacks one of the heads.
        ReferenceMismatch: method and reference do not go together.

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
    ) -> None:
        super().__init__(method, reference, positions)
        self.heads = list(heads)

    @override
    def what(self) -> list[tuple[int, int]]:
        return self.heads

    @override
    def chosen(self, facts: ModelFacts) -> dict[int, list[int]]:
        return _by_layer(facts.check_heads(self.heads))


class AblateNeurons(_Ablation):
    """Set MLP neurons (`hook_post`, the input of the down-projection) to zero or to their mean over data.

    Zero is the paper's causal check (section 4). Controls must be matched per layer: neurons of the last
    layers write straight into the logits, and a set drawn from them differs from one drawn anywhere.

    Args:
        neurons: (layer, neuron) pairs.
        method: "zero" or "mean".
        reference: Prompts the mean is taken over, at the same `positions`.
        positions: "all", "prompt_last", "generated", a span's name, or a mask [prompt, pos].

    Raises:
        UnknownNeuron: On attaching to a model that lacks one of the neurons.
        UnsupportedModel: The MLP is a mixture of experts.
        ReferenceMismatch: method and reference do not go together.
    """

    site = "post"

    def __init__(
        self,
        neurons: Iterable[tuple[int, int]],
        method: Method = "zero",
        reference: SpanBatch | None = None,
        positions: Positions = "all",
    ) -> None:
        super().__init__(method, reference, positions)
        self.neurons = list(neurons)

    @override
    def what(self) -> list[tuple[int, int]]:
        return self.neurons

    @override
    def chosen(self, facts: ModelFacts) -> dict[int, list[int]]:
        return _by_layer(facts.check_neurons(self.neurons))


def _by_layer(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    layers: dict[int, list[int]] = {}
    for layer, index in pairs:
        layers.setdefault(layer, []).append(index)
    return {layer: sorted(indices) for layer, indices in sorted(layers.items())}
