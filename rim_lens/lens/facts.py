"""What a model is made of, read once, the same for every TransformerLens family."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rim_lens.errors import (
    MissingTokenizer,
    ModelError,
    TrainingMode,
    UnknownHead,
    UnknownLayer,
    UnknownNeuron,
    UnsupportedModel,
)

# A HookedTransformer or a TransformerBridge. Neither class can be named here: each is missing from some
# supported TransformerLens, and the surface rim_lens uses is duck-typed.
Model = Any
Hook = Callable[..., Any]
Head = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Shapes and kind of a model.

    Attributes:
        family: "HookedTransformer" or "TransformerBridge".
        architecture: The Hugging Face class the weights come from, where known.
        name: The model's own name, where it has one.
        n_layers: Number of blocks.
        n_heads: Query heads per layer.
        n_key_value_heads: Key-value heads per layer; equals n_heads without grouped-query attention.
        d_model: Width of the residual stream.
        d_head: Width of a head.
        d_mlp: Neurons per layer.
        d_vocab: Rows of the unembedding.
        n_ctx: Longest sequence.
        gated: Whether the MLP multiplies an activated gate with an up-projection.
        moe: Whether the MLP is a mixture of experts (no per-neuron work there).
        act_fn: Name of the MLP's activation function.
        device: Where the input embedding lives.
        dtype: dtype of the weights.
    """

    family: str
    architecture: str
    name: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    gated: bool
    moe: bool
    act_fn: str
    device: torch.device
    dtype: torch.dtype

    def to_dict(self) -> dict[str, Any]:
        """Return the facts with kind of device and dtype as text, ready for JSON: which of several alike it was says nothing."""
        return {**asdict(self), "device": self.device.type, "dtype": str(self.dtype)}

    def heads(self) -> list[Head]:
        """Every (layer, head), layer by layer."""
        return [(layer, head) for layer in range(self.n_layers) for head in range(self.n_heads)]

    def check_layer(self, layer: int) -> int:
        """Return the layer, or raise UnknownLayer. Negative indices are refused: they hide mistakes."""
        index = _index(layer, self.n_layers)
        if index is None:
            raise UnknownLayer(
                f"layer {layer!r} was asked for; this model has layers 0 to {self.n_layers - 1}."
            )
        return index

    def check_heads(self, heads: Iterable[Head]) -> list[Head]:
        """Return the heads as a list of distinct pairs, or raise UnknownHead naming the first bad one."""
        checked: dict[Head, None] = {}
        for item in heads:
            pair = _pair(item, self.n_layers, self.n_heads)
            if pair is None:
                raise UnknownHead(
                    f"head {item!r} was asked for; a head is a pair (layer, head) of whole numbers, and this model has"
                    f" layers 0 to {self.n_layers - 1} with heads 0 to {self.n_heads - 1}."
                )
            checked[pair] = None
        return list(checked)

    def check_neurons(self, neurons: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the neurons as a sorted list of distinct pairs, or raise UnknownNeuron."""
        self.refuse_moe("per-neuron work")
        checked: set[tuple[int, int]] = set()
        for item in neurons:
            pair = _pair(item, self.n_layers, self.d_mlp)
            if pair is None:
                raise UnknownNeuron(
                    f"neuron {item!r} was asked for; a neuron is a pair (layer, neuron) of whole numbers, and this model"
                    f" has layers 0 to {self.n_layers - 1} with neurons 0 to {self.d_mlp - 1}."
                )
            checked.add(pair)
        return sorted(checked)

    def refuse_moe(self, what: str) -> None:
        """Raise UnsupportedModel when the MLP is a mixture of experts."""
        if self.moe:
            raise UnsupportedModel(
                f"{what} was asked for, but the MLP of this {self.architecture or 'model'} is a mixture of experts:"
                " its hook_post is the block's output, not neurons. Read hook_mlp_out"
                " (NeuronActivations(site='mlp_out')) or the router hooks instead."
            )


def _index(value: Any, size: int) -> int | None:
    """Return a whole number (also NumPy's and torch's) within the size as int; None for all else, True and 1.0 too."""
    if isinstance(value, bool):
        return None
    try:
        index = operator.index(value)
    except TypeError:
        return None
    return index if 0 <= index < size else None


def _pair(item: Any, n_first: int, n_second: int) -> tuple[int, int] | None:
    try:
        first, second = item
    except (TypeError, ValueError):
        return None
    checked = _index(first, n_first), _index(second, n_second)
    return None if checked[0] is None or checked[1] is None else (checked[0], checked[1])


def require_hooks(model: Model) -> None:
    """Raise ModelError unless it is a HookedTransformer or TransformerBridge."""
    cfg = getattr(model, "cfg", None)
    if cfg is None or not hasattr(model, "hook_dict") or not hasattr(cfg, "n_heads"):
        raise ModelError(
            f"a HookedTransformer or TransformerBridge is needed; {type(model).__name__} has no cfg and hook_dict."
            " Load one by rl.load_model(name), or wrap a Hugging Face model: rl.wrap_hf(model, tokenizer)."
        )


def model_facts(model: Model) -> ModelFacts:
    """Read layers, heads, widths, kind, device and dtype of a model.

    Args:
        model: Any HookedTransformer (TransformerLens 2, 3) or TransformerBridge (3, 4).

    Raises:
        ModelError: The object is neither.

    >>> import rim_lens as rl
    >>> facts = rl.model_facts(rl.load_model("toy"))
    >>> facts.n_layers, facts.n_heads, facts.gated
    (2, 8, False)
    """
    require_hooks(model)
    cfg = model.cfg
    family = "TransformerBridge" if hasattr(model, "original_model") else "HookedTransformer"
    parameter = next(model.parameters())
    block_mlp = getattr(model.blocks[0], "mlp", None)
    experts = getattr(cfg, "num_experts", None)
    architecture = getattr(cfg, "original_architecture", None) or getattr(cfg, "architecture", None) or ""
    gated = bool(getattr(cfg, "gated_mlp", False)) or "blocks.0.mlp.hook_pre_linear" in model.hook_dict
    return ModelFacts(
        family=family,
        architecture=str(architecture),
        name=str(getattr(cfg, "model_name", "") or ""),
        n_layers=int(cfg.n_layers),
        n_heads=int(cfg.n_heads),
        n_key_value_heads=int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads),
        d_model=int(cfg.d_model),
        d_head=int(cfg.d_head),
        d_mlp=int(cfg.d_mlp or 0),
        d_vocab=int(cfg.d_vocab),
        n_ctx=int(cfg.n_ctx),
        gated=gated,
        moe=bool(experts) or "MoE" in type(block_mlp).__name__,
        act_fn=str(cfg.act_fn),
        device=parameter.device,
        dtype=parameter.dtype,
    )


def tokenizer_of(model: Model) -> Any:
    """Return the model's tokenizer.

    Raises:
        MissingTokenizer: It has none.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise MissingTokenizer(
            "this model has no tokenizer. Give it one (model.set_tokenizer(tok), or tokenizer=tok when booting it)."
        )
    return tokenizer


def require_eval(model: Model) -> None:
    """Raise TrainingMode unless the model, with every module in it, is in eval mode; ModelError where it has no hooks."""
    require_hooks(model)
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise TrainingMode(
            f"{f'module {training!r}' if training else 'the model'} is in training mode, so dropout may enter every"
            " number. Call model.eval() first; rim_lens does not change your model's mode by itself."
        )
