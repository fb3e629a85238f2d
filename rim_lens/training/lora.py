"""LoRA adapters: put on a plain model, and written where `load_model` folds them in again."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rim_lens.errors import MissingExtra, StatisticsError

ADAPTER = "default"


@dataclass(frozen=True, slots=True)
class LoRA:
    """What is trained instead of the weights: W + (alpha / rank) · B A, with A and B of a small rank.

    The defaults are those of arXiv 2509.00544: rank 32 and alpha 64 on every matrix of attention and MLP.

    Attributes:
        rank: Rank of the product.
        alpha: Numerator of its scale.
        modules: Names of the matrices that get one; None means all linear maps of the blocks.
        first_layer: Layers before this one stay as they are.
    """

    rank: int = 32
    alpha: float = 64
    modules: tuple[str, ...] | None = None
    first_layer: int = 0


def require_peft() -> None:
    """Refuse to go on without peft.

    Raises:
        MissingExtra: It is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtra(
            "fine-tuning with LoRA was asked for, and the package 'peft' is not installed. Run: pip install peft, or"
            ' pip install "rim-lens[smollm2]"; or train the weights themselves with lora=None.'
        )


def add_lora(model: Any, lora: LoRA, seed: int) -> Any:
    """Put an adapter on a Hugging Face model, in place, and return peft's wrapper; only the adapter requires gradients.

    Args:
        model: A Hugging Face causal language model.
        lora: Rank, scale, places.
        seed: Of the adapter's start (A is random, B zero: at first nothing is added).

    Raises:
        MissingExtra: peft is not installed.
        StatisticsError: The rank is not positive.
    """
    require_peft()
    if lora.rank < 1:
        raise StatisticsError(f"a LoRA of rank {lora.rank} was asked for; give at least 1.")
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=list(lora.modules) if lora.modules else "all-linear",
        layers_to_transform=list(range(lora.first_layer, model.config.num_hidden_layers))
        if lora.first_layer
        else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # peft draws the adapter's start from the global generator
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def save_adapter(adapted: Any, out: Path, *, base: str, dtype: torch.dtype | None = None) -> None:
    """Write a peft model's adapter as safetensors with its configuration.

    Args:
        adapted: What `add_lora` gave.
        out: Folder for adapter_model.safetensors and adapter_config.json.
        base: The model it belongs to, as `load_model` knows it.
        dtype: Written as this; as trained where None.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(dtype or tensor.dtype).cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(adapted).items()
    }
    save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = adapted.peft_config[ADAPTER]
    named, mode = config.base_model_name_or_path, config.inference_mode
    config.base_model_name_or_path, config.inference_mode = base, True
    try:
        config.save_pretrained(str(out))
    finally:
        config.base_model_name_or_path, config.inference_mode = named, mode


def factors(module: Any) -> tuple[Tensor, Tensor, float] | None:
    """A [rank, in], B [out, rank] and the scale of a module's adapter; None where it has none."""
    if ADAPTER not in getattr(module, "lora_A", {}):
        return None
    return module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, float(module.scaling[ADAPTER])


def products(model: Any) -> Iterator[tuple[Tensor, Tensor, float]]:
    """`factors` of every module that has an adapter."""
    for module in model.modules():
        found = factors(module)
        if found is not None:
            yield found
