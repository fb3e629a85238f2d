"""Neurons that are kept where they were while everything else is trained: frozen exactly, or pulled back.

A neuron's weights are what it reads by (its row of the gate and the up-projection, or of the one in-projection, with its
bias) and what it writes (its column of the down-projection). With LoRA they are those of W + scale · B A: a row of B and a
column of A, at zero, leave them as they are.

Freezing holds weights, not activations: what the neuron reads is written by layers that are trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rim_lens.errors import UnknownNeuron, UnsupportedModel
from rim_lens.training.lora import factors

# What the in-projections and the out-projection of an MLP are called.
READS = ("gate_proj", "up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h")
WRITES = ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h")


@dataclass(frozen=True, eq=False)
class Slices:
    """Entries of one parameter along one axis, and what they were."""

    parameter: Tensor
    axis: int
    index: Int[Tensor, " neuron"]
    before: Tensor

    @classmethod
    def of(cls, parameter: Tensor, axis: int, index: Int[Tensor, " neuron"]) -> Slices:
        """Remember some entries as they are now."""
        return cls(parameter, axis, index, parameter.detach().index_select(axis, index).clone())

    def now(self) -> Tensor:
        """The entries as they are now, differentiable."""
        return self.parameter.index_select(self.axis, self.index)

    def without_gradient(self, gradient: Tensor) -> Tensor:
        """A gradient with theirs set to zero."""
        return gradient.index_fill(self.axis, self.index, 0.0)

    def restore(self) -> None:
        """Write the entries back."""
        with torch.no_grad():
            self.parameter.index_copy_(self.axis, self.index, self.before)


@dataclass(frozen=True, eq=False)
class Held:
    """Weights of some neurons in a model that is about to be trained.

    Attributes:
        whole: Entries that are trained themselves.
        reads: (A, B, scale, rows of B) of adapters on in-projections.
        writes: (A, B, scale, columns of A) of adapters on out-projections.
    """

    whole: list[Slices]
    reads: list[tuple[Tensor, Tensor, float, Int[Tensor, " neuron"]]]
    writes: list[tuple[Tensor, Tensor, float, Int[Tensor, " neuron"]]]

    def movement(self) -> Float[Tensor, ""]:
        """Squared distance of the effective weights from where they were, differentiable."""
        parts = [((one.now() - one.before) ** 2).sum() for one in self.whole]
        parts += [((scale * (b[rows] @ a)) ** 2).sum() for a, b, scale, rows in self.reads]
        parts += [((scale * (b @ a[:, columns])) ** 2).sum() for a, b, scale, columns in self.writes]
        return torch.stack(parts).sum() if parts else torch.zeros(())

    def frozen(self) -> list[Slices]:
        """The entries that, held, hold the effective weights; those of adapters are set to zero here."""
        held = list(self.whole)
        with torch.no_grad():
            for _, b, _, rows in self.reads:
                held.append(Slices.of(b.index_fill_(0, rows, 0.0), 0, rows))
            for a, _, _, columns in self.writes:
                held.append(Slices.of(a.index_fill_(1, columns, 0.0), 1, columns))
        return held


def hold(model: Any, neurons: Iterable[tuple[int, int]]) -> Held:
    """Find the weights of neurons in a Hugging Face model, with an adapter on it or without.

    Args:
        model: The model as it starts (for a peft model, what its `get_base_model` gives).
        neurons: (layer, neuron) pairs.

    Raises:
        UnknownNeuron: The model lacks one.
        UnsupportedModel: Its MLPs are not of a known make (a mixture of experts, one matrix for gate and up).
    """
    pairs = sorted({(int(layer), int(neuron)) for layer, neuron in neurons})
    mlps = _mlps(model)
    whole, reads, writes = [], [], []
    for layer in sorted({layer for layer, _ in pairs}):
        if not 0 <= layer < len(mlps):
            raise UnknownNeuron(
                f"neurons of layer {layer} were to be held; the model has layers 0 to {len(mlps) - 1}."
            )
        ins, out = _projections(mlps[layer], model)
        for module in ins:
            index = _index(pairs, layer, module, "out")
            whole += _trained(module, "out", index)
            found = factors(module)
            if found is not None:
                reads.append((*found, index))
        index = _index(pairs, layer, out, "in")
        whole += _trained(out, "in", index)
        found = factors(out)
        if found is not None:
            writes.append((*found, index))
    return Held(whole, reads, writes)


def weights_by_neuron(model: Any) -> list[list[tuple[Tensor, int]]]:
    """Per layer, the parameters of a plain model that hold neurons' weights, and the axis along which they have neurons.

    Raises:
        UnsupportedModel: Its MLPs are not of a known make.
    """
    layers = []
    for mlp in _mlps(model):
        ins, out = _projections(mlp, model)
        found = [(module.weight, _axis(module, "out")) for module in ins]
        found += [(module.bias, 0) for module in ins if module.bias is not None]
        layers.append([*found, (out.weight, _axis(out, "in"))])
    return layers


@contextmanager
def frozen(held: Held) -> Iterator[list[Slices]]:
    """Give their entries no gradient; write them back after each step (`Slices.restore`), as decay moves them too."""
    entries = held.frozen()
    handles = [
        one.parameter.register_hook(one.without_gradient)  # type: ignore[no-untyped-call]
        for one in entries
        if one.parameter.requires_grad
    ]
    try:
        yield entries
    finally:
        for handle in handles:
            handle.remove()


def _mlps(model: Any) -> list[Any]:
    """The MLP of every block."""
    n_layers = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers:
            mlps = [getattr(block, "mlp", None) for block in module]
            if all(mlp is not None for mlp in mlps):
                return mlps
    raise UnsupportedModel(
        f"neurons of a {type(model).__name__} were to be held, and no list of {n_layers} blocks with an 'mlp' was found in it."
        " Train without freeze= and penalise=."
    )


def _projections(mlp: Any, model: Any) -> tuple[list[Any], Any]:
    children = dict(mlp.named_children())
    ins = [children[name] for name in READS if name in children]
    outs = [children[name] for name in WRITES if name in children]
    if not ins or len(outs) != 1:
        raise UnsupportedModel(
            f"neurons of a {type(model).__name__} were to be held; its MLP is made of {', '.join(children) or 'nothing known'},"
            f" and known are {', '.join(READS)} with one of {', '.join(WRITES)} (no mixture of experts, no fused gate and up)."
        )
    return ins, outs[0]


def _index(pairs: list[tuple[int, int]], layer: int, module: Any, axis: str) -> Int[Tensor, " neuron"]:
    wanted = [neuron for its, neuron in pairs if its == layer]
    weight = _plain(module).weight
    width = weight.shape[_axis(module, axis)]
    strange = next((neuron for neuron in wanted if not 0 <= neuron < width), None)
    if strange is not None:
        raise UnknownNeuron(
            f"neuron ({layer}, {strange}) was to be held; the layer has neurons 0 to {width - 1}."
        )
    return torch.tensor(wanted, device=weight.device)


def _trained(module: Any, axis: str, index: Int[Tensor, " neuron"]) -> list[Slices]:
    """Entries of a module's own weight and bias, where these are trained."""
    plain = _plain(module)
    found = [(plain.weight, _axis(module, axis))]
    if axis == "out" and plain.bias is not None:
        found.append((plain.bias, 0))
    return [Slices.of(parameter, place, index) for parameter, place in found if parameter.requires_grad]


def _plain(module: Any) -> Any:
    """The module below an adapter."""
    return getattr(module, "base_layer", module)


def _axis(module: Any, axis: str) -> int:
    """Which axis of the weight is that of the outputs ("out") or of the inputs ("in"); GPT-2 has it the other way."""
    from transformers.pytorch_utils import Conv1D

    return int(axis == "in") ^ isinstance(_plain(module), Conv1D)
