"""PEFT adapters (LoRA and its kin): which model they are of, and folding them into its weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from rim_lens.errors import AdapterMismatch, CorruptWeights, MissingExtra, UnknownModel, UnsupportedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SHOWN = 3  # names of weights in a message


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(folder) / CONFIG).is_file()


def adapter_base(folder: str | Path) -> str:
    """The model an adapter was trained on, as its configuration names it; ``../base`` is seen from the adapter's folder.

    Raises:
        CorruptWeights: The configuration cannot be read.
        UnknownModel: It names no model, or the adapter's own folder.
    """
    path = Path(folder) / CONFIG
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as problem:
        raise CorruptWeights(
            f"{path} is no readable adapter configuration ({problem}). Save the adapter again (save_pretrained)."
        ) from problem
    if not base or not isinstance(base, str) or Path(base).resolve() == Path(folder).resolve():
        raise UnknownModel(
            f"{path} says base_model_name_or_path={base!r}, which names no model. Write the name or folder of the model there"
            " that the adapter was trained on."
        )
    beside = Path(folder) / base
    return str(beside.resolve()) if base.startswith("..") and beside.is_dir() else base


def require_adapter(folder: str | Path) -> None:
    """Refuse what could not be merged, before any model is loaded.

    Raises:
        MissingExtra: peft is not installed.
        CorruptWeights: The weights are missing, or not safetensors.
        UnsupportedModel: The adapter has no weights to fold in (prompt tuning), or peft does not know its kind.
    """
    folder = Path(folder)
    if importlib.util.find_spec("peft") is None:
        raise MissingExtra(
            f"{folder} holds an adapter, and the package 'peft', which reads it, is not installed. Run: pip install peft, or"
            ' pip install "rim-lens[smollm2]"'
        )
    if not (folder / WEIGHTS).is_file():
        others = sorted(path.name for path in folder.iterdir() if path.name != CONFIG)
        raise CorruptWeights(
            f"{folder} has {CONFIG} but no {WEIGHTS}; found beside it: {', '.join(others) or 'nothing'}. Weights as .bin are"
            " pickles, which rim_lens does not open: save them with safe_serialization=True."
        )
    if _config(folder).is_prompt_learning:
        raise UnsupportedModel(
            f"{folder} holds an adapter of kind {_config(folder).peft_type}, which puts trained rows before the prompt: they"
            " cannot be folded into weights, and spans would not know them. LoRA and its kin can be loaded."
        )


def merge_adapter(model: Any, folder: str | Path) -> Any:
    """Add an adapter's product to the weights it belongs to, and return the plain model.

    That the merged model gives the logits of model and adapter side by side is checked on a few tokens: with tied
    embeddings, for instance, a product folded into one end would silently act at the other as well.

    Args:
        model: The Hugging Face model the adapter was trained on; changed in place.
        folder: adapter_config.json and adapter_model.safetensors.

    Raises:
        AdapterMismatch: The adapter has weights for which the model has no place, or other shapes, or lacks some.
        UnsupportedModel: It cannot be folded in without changing what the model computes.
        MissingExtra: peft is not installed.
        CorruptWeights: The weights are missing, unreadable, or not finite.
    """
    require_adapter(folder)
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        adapted: Any = PeftModel(model, _config(Path(folder)))
        loaded = adapted.load_adapter(str(folder), "default", torch_device=str(model.device))
    except SafetensorError as problem:
        raise CorruptWeights(
            f"{Path(folder) / WEIGHTS} cannot be read ({problem}). Save it again."
        ) from problem
    except (ValueError, RuntimeError, KeyError) as problem:
        # torch heads a list of every mismatch with a line that says nothing
        said = [line.strip() for line in str(problem).splitlines() if line.strip()]
        raise AdapterMismatch(_told(model, folder, " ".join(said[:2]).rstrip("."))) from problem
    lacking = [
        name for name in loaded.missing_keys if ".default" in name
    ]  # older peft names the model's as well
    if lacking or loaded.unexpected_keys:
        parts = [
            f"{len(names)} weights {told} ({', '.join(sorted(names)[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
            for names, told in (
                (loaded.unexpected_keys, "have no place in the model"),
                (lacking, "are not in the file"),
            )
            if names
        ]
        raise AdapterMismatch(_told(model, folder, "; ".join(parts)))
    tokens = torch.arange(min(8, model.config.vocab_size), device=model.device)[None]
    with torch.no_grad():
        expected = adapted.eval()(tokens).logits.float()
        merged: Any = adapted.merge_and_unload().eval()
        found = merged(tokens).logits.float()
    if not bool(torch.isfinite(expected).all()):
        raise CorruptWeights(
            f"model and adapter ({folder}) give NaN or infinity together: one of them is damaged."
        )
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1):
        raise UnsupportedModel(
            f"the adapter in {folder} was folded into {type(model).__name__}, and the logits are off by {error:.2g} of the"
            " largest: it acts where weights are shared (tied embeddings), or not at all positions. Merge it yourself and"
            " pass the model to wrap_hf."
        )
    return merged


def _config(folder: Path) -> Any:
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as problem:
        raise UnsupportedModel(
            f"the installed peft does not understand {folder / CONFIG} ({problem}). Install the version that wrote it."
        ) from problem


def _told(model: Any, folder: str | Path, found: str) -> str:
    config = model.config
    return (
        f"the adapter in {folder} does not fit the {type(model).__name__} of {config.num_hidden_layers} layers and width"
        f" {config.hidden_size} that was loaded as {adapter_base(folder)!r}: {found}. Load it with the model it was trained on"
        f" (base_model_name_or_path in {CONFIG})."
    )
