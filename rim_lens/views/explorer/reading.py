"""Readers behind the explorer: whole patterns of a few heads, and patterns of all heads summed over groups of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from rim_lens.capturing import capture
from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import SpanError, WrongHookShape
from rim_lens.hooks.base import Edit
from rim_lens.hooks.readers import Reader, Variable
from rim_lens.lens import Head, Model, ModelFacts, Site, hook_name

if TYPE_CHECKING:
    import xarray as xr

    from rim_lens.hooks.base import Component


class HeadPatterns(Reader):
    """Attention patterns of heads asked for by name: every query row, or the last ones.

    Gives ``attention_patterns`` (prompt, row_head, query, key), post-softmax, 0 on left padding. It grows with
    heads × queries × keys, hence by name only; `SpanAttention` sums inside the hook and keeps nothing of that size.

    Args:
        heads: (layer, head) pairs, in the order wanted.
        last: Only so many last rows; None for all.

    Raises:
        UnknownHead: The model lacks one of the heads.
    """

    reads: ClassVar[tuple[Site, ...]] = ("pattern",)

    def __init__(self, heads: Iterable[Head], last: int | None = None) -> None:
        super().__init__()
        if last is not None and last < 1:
            raise SpanError(f"last={last} rows were asked for; ask for one at least, or None for all.")
        self.heads = list(heads)
        self.last = last
        self._width = 0

    @override
    def layout(self, facts: ModelFacts, batch: SpanBatch | None) -> list[Variable]:
        heads = facts.check_heads(self.heads)
        if batch is None:
            raise SpanError("HeadPatterns needs the batch it reads: run it through rl.capture.")
        self._width = batch.tokens.shape[1]
        first = 0 if self.last is None else max(0, self._width - self.last)
        return [
            Variable(
                "attention_patterns",
                ("row_head", "query", "key"),
                (len(heads), self._width - first, self._width),
                {
                    "row_head": [f"L{layer}H{head}" for layer, head in heads],
                    "query": list(range(first, self._width)),
                },
                {"units": "share"},
            )
        ]

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        heads = facts.check_heads(self.heads)
        layers = sorted({layer for layer, _ in heads})
        return [(hook_name("pattern", layer), partial(self._take, layer, heads)) for layer in layers]

    def _take(self, layer: int, heads: list[Head], pattern: Float[Tensor, "prompt head query key"]) -> None:
        n_queries, n_keys = pattern.shape[-2:]
        if n_queries != n_keys or n_keys > self._width:
            raise WrongHookShape(
                f"HeadPatterns was laid out for {self._width} positions, and this pass has {n_queries} queries and"
                f" {n_keys} keys. Read a finished batch in one pass (rl.generate(...).batch), not under a cache."
            )
        wanted = self._width if self.last is None else min(self.last, self._width)
        # Prompts of like length run together, with the padding cut that none of them needs.
        real = self._real(pattern.shape[0]).to(pattern.device)[:, -wanted:, None]
        for place, (its_layer, head) in enumerate(heads):
            if its_layer == layer:
                rows = pattern[:, head, -min(wanted, n_queries) :].float()
                padded = torch.nn.functional.pad(rows, (self._width - n_keys, 0, wanted - rows.shape[1], 0))
                self.keep("attention_patterns", place, padded * real)  # what a padding row says means nothing

    def _real(self, n_prompts: int) -> Float[Tensor, "prompt pos"]:
        if self._batch is None:
            raise SpanError("HeadPatterns needs the batch it reads: run it through rl.capture.")
        mask = self._batch.attention_mask
        if mask.shape[0] != n_prompts:
            raise WrongHookShape(
                f"{mask.shape[0]} prompts are bound, but this pass has {n_prompts}; run it through rl.capture."
            )
        return torch.nn.functional.pad(mask, (self._width - mask.shape[1], 0)).float()


class NeuronsByToken(Reader):
    """Activations of neurons asked for by name at every position of one prompt.

    Gives ``neuron_by_token`` (prompt, row_neuron, pos), in the model's own units: `mlp.hook_post`, what `NeuronActivations`
    pools. Works on one prompt.

    Args:
        neurons: (layer, neuron) pairs, in the order wanted.

    Raises:
        UnknownNeuron: The model lacks one of the neurons.
        UnsupportedModel: The MLP is a mixture of experts.
    """

    reads: ClassVar[tuple[Site, ...]] = ("post",)

    def __init__(self, neurons: Iterable[tuple[int, int]]) -> None:
        super().__init__()
        self.neurons = list(neurons)

    @override
    def layout(self, facts: ModelFacts, batch: SpanBatch | None) -> list[Variable]:
        facts.check_neurons(self.neurons)
        if batch is None or len(batch) != 1:
            raise SpanError(
                "NeuronsByToken reads one prompt alone; run it through rl.capture on batch.select([row])."
            )
        return [
            Variable(
                "neuron_by_token",
                ("row_neuron", "pos"),
                (len(self.neurons), batch.tokens.shape[1]),
                {"row_neuron": [f"L{layer}N{neuron}" for layer, neuron in self.neurons]},
            )
        ]

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        facts.check_neurons(self.neurons)
        layers = sorted({layer for layer, _ in self.neurons})
        return [(hook_name("post", layer), partial(self._take, layer)) for layer in layers]

    def _take(self, layer: int, activation: Float[Tensor, "prompt pos neuron"]) -> None:
        for place, (its_layer, neuron) in enumerate(self.neurons):
            if its_layer == layer:
                self.keep("neuron_by_token", place, activation[:, :, neuron].float())


class GroupMasses(Reader):
    """Attention of every head from groups of query rows to groups of keys, summed inside the hook.

    The entry (from, to) is the mean over the rows of the group `from` of the attention *summed* over the keys of the group
    `to`. The last `from` is the single row of the last prompt token. Where the groups partition the tokens, each row of
    the table sums to 1. Works on one prompt.

    Args:
        groups: Which group each position is in, −1 for none (padding).
        n_groups: How many there are.
        last: Position of the last prompt token.
    """

    reads: ClassVar[tuple[Site, ...]] = ("pattern",)

    def __init__(self, groups: Int[Tensor, " pos"], n_groups: int, last: int) -> None:
        super().__init__()
        self.groups = groups
        self.n_groups = n_groups
        self.last = last

    @override
    def layout(self, facts: ModelFacts, batch: SpanBatch | None) -> list[Variable]:
        if batch is None or len(batch) != 1 or batch.tokens.shape[1] != len(self.groups):
            raise SpanError(
                f"GroupMasses was given groups of one prompt of {len(self.groups)} positions; read that prompt alone,"
                " through rl.capture."
            )
        shape = (facts.n_layers, facts.n_heads, self.n_groups + 1, self.n_groups)
        return [
            Variable("group_mass", ("layer", "head", "from", "to"), shape, attrs={"units": "share"}),
        ]

    @override
    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        return [(hook_name("pattern", layer), partial(self._sum, layer)) for layer in range(facts.n_layers)]

    def _sum(self, layer: int, pattern: Float[Tensor, "prompt head query key"]) -> None:
        if pattern.shape[-2:] != (len(self.groups), len(self.groups)):
            raise WrongHookShape(
                f"GroupMasses knows a prompt of {len(self.groups)} positions, and this pass has {tuple(pattern.shape[-2:])}."
            )
        member = torch.nn.functional.one_hot(self.groups + 1, self.n_groups + 1)[:, 1:]
        member = member.to(pattern.device, torch.float32)
        weight = member / member.sum(dim=0).clamp(min=1)
        last = torch.zeros(len(member), 1, device=pattern.device)
        last[self.last] = 1
        to = pattern.float() @ member
        self.keep("group_mass", layer, torch.einsum("qf,phqt->phft", torch.cat([weight, last], dim=1), to))


def head_patterns(
    model: Model,
    batch: SpanBatch,
    heads: Iterable[Head],
    *components: Component,
    last: int | None = None,
) -> xr.DataArray:
    """Whole attention patterns of a few heads, labelled.

    Args:
        model: Any HookedTransformer or TransformerBridge, in eval mode.
        batch: Prompts.
        heads: (layer, head) pairs, in the order wanted.
        *components: Editors active meanwhile.
        last: Only so many last query rows; None for all.

    Returns:
        DataArray (prompt, row_head, query, key), shares; rows and columns of left padding are 0. Memory: prompts × heads ×
        queries × keys × 4 bytes.

    Raises:
        UnknownHead: The model lacks one of the heads.

    >>> import rim_lens as rl
    >>> model = rl.load_model("toy")
    >>> chat = rl.ChatFormat.from_model(model)
    >>> off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:1], think="off")
    >>> patterns = rl.views.head_patterns(model, off, [(0, 5), (1, 3)], last=1)
    >>> patterns.dims, [round(total, 4) for total in patterns.sum("key").values.ravel().tolist()]
    (('prompt', 'row_head', 'query', 'key'), [1.0, 1.0])
    """
    return capture(model, batch, HeadPatterns(heads, last=last), *components)["attention_patterns"]
