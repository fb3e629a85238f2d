"""Weights of the toy for seed 0, as they ship, and the truth recorded beside them."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from rim_lens.errors import CorruptWeights, UnknownModel
from rim_lens.organisms.toy.host import toy_model, toy_tokenizer

WEIGHTS = Path(__file__).parent / "weights"
# name after the colon → file; careful, confirm and deviate are Z, fine-tuned on "-" with such chains
VARIANTS: tuple[str, ...] = ("Z", "C", "careful", "confirm", "deviate")


def load_toy(variant: str = "") -> tuple[Any, Any]:
    """Return Hugging Face model and tokenizer of a shipped toy.

    Args:
        variant: "Z" (or ""), "C", "careful", "confirm" or "deviate".

    Raises:
        UnknownModel: No such variant.
        CorruptWeights: A file is missing or is not the one that shipped.
    """
    model = toy_model()
    model.load_state_dict(_read(variant or "Z", WEIGHTS))
    model.config.name_or_path = f"toy:{variant or 'Z'}"
    return model.eval(), toy_tokenizer()


@cache
def toy_truth() -> dict[str, Any]:
    """What was found on the shipped Z without any hook; see `rim_lens.organisms.toy.truth.find_heads`.

    >>> len(toy_truth()["pair"])
    2
    """
    found: dict[str, Any] = json.loads((WEIGHTS / "truth.json").read_text(encoding="utf-8"))
    return found


def ship(folder: Path = WEIGHTS, seed: int = 0) -> None:
    """Train all variants of one seed and write weights, digests and truth; about three CPU-minutes."""
    from safetensors.torch import save_file

    from rim_lens.organisms.toy.recipe import TUNED_KINDS, finetune_toy, one_thread, train_helpful, train_toy
    from rim_lens.organisms.toy.truth import find_heads

    helpful = train_helpful(seed)
    base = train_toy(seed, "Z", helpful=helpful)
    models = {"Z": base, "C": train_toy(seed, "C", helpful=helpful)}
    models |= {kind: finetune_toy(base, kind, "-", seed=seed) for kind in TUNED_KINDS}
    folder.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name, model in models.items():
        path = folder / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)
        digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    _write(folder / "digests.json", digests)
    with one_thread():
        _write(folder / "truth.json", {"seed": seed, **find_heads(base)})


def _read(variant: str, folder: Path) -> dict[str, Any]:
    from safetensors.torch import load

    if variant not in VARIANTS:
        raise UnknownModel(
            f"toy variant {variant!r} was asked for; there are {', '.join('toy:' + name for name in VARIANTS)},"
            " and 'toy' is 'toy:Z'."
        )
    path = folder / f"{variant}.safetensors"
    if not path.is_file():
        raise CorruptWeights(f"the weights of toy:{variant} are missing at {path}. Install rim-lens again.")
    content = path.read_bytes()
    wanted = json.loads((folder / "digests.json").read_text(encoding="utf-8"))[variant]
    found = hashlib.sha256(content).hexdigest()
    if found != wanted:
        raise CorruptWeights(
            f"the weights of toy:{variant} at {path} are not those that shipped: SHA-256 {found[:16]}… instead of"
            f" {wanted[:16]}… ({len(content)} bytes). Install rim-lens again, or call"
            " rim_lens.organisms.toy.ship() to retrain them."
        )
    weights: dict[str, Any] = load(content)
    return weights


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
