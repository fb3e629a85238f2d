"""How far two models' weights are apart, name by name: the plainest rival of any measure of entanglement.

    drift = ‖W_tuned − W_base‖ / ‖W_base‖        (Frobenius norms over all weights)

Differences are taken in float32 and summed in float64. The base model's weights wait on disk, so that never more than
one model is in memory.

What it does not show: whether the movement matters. A large step along a direction that nothing reads changes nothing,
and two models of equal drift may behave differently; that is what a drift-matched control is for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rim_lens.errors import NotFinite, ReferenceMismatch, StudyFolderError
from rim_lens.lens import Model

if TYPE_CHECKING:
    import pandas as pd

# A bridge holds these beside the fused weight they were cut from: the same numbers once more.
_FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "in", "up")}
_SHARD = 2**28  # bytes of one file: what is held twice while it is written
_PIECE = 2**18  # numbers that are compared at a time


@dataclass(frozen=True, eq=False)
class WeightDrift:
    """Relative weight drift.

    Attributes:
        relative: ‖ΔW‖ / ‖W_base‖ over all weights, without a unit.
        table: One row per weight: name, n (numbers in it), base_norm, moved_norm, relative (NaN where the base is 0).
    """

    relative: float
    table: pd.DataFrame

    def __repr__(self) -> str:
        return f"WeightDrift({self.relative:.3g} of the base's norm, {len(self.table)} weights)"


def weights_of(model: Any) -> dict[str, Tensor]:
    """Name → weight, each once: names without wrappers, tied weights and fused copies left out.

    Args:
        model: A HookedTransformer, a TransformerBridge or any torch module.
    """
    named = {
        name.replace("._original_component", ""): parameter.detach()
        for name, parameter in model.named_parameters()
    }
    parts = {name: name.split(".") for name in named}
    parents = {(*part[:place], word) for part in parts.values() for place, word in enumerate(part)}

    def is_copy(part: list[str]) -> bool:
        return any(
            word in pieces and (*part[:place], fused) in parents
            for place, word in enumerate(part)
            for fused, pieces in _FUSED.items()
        )

    return {name: tensor for name, tensor in named.items() if not is_copy(parts[name])}


def keep_weights(model: Model, folder: str | Path) -> None:
    """Write a model's weights in their own dtype, in files of bounded size, for `weight_drift` to read later.

    Args:
        model: The model.
        folder: Is made where there is none. As large as the model.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    size = n_files = 0
    for name, tensor in weights_of(model).items():
        nbytes = tensor.numel() * tensor.element_size()
        if shard and size + nbytes > _SHARD:
            save_file(shard, folder / f"weights-{n_files:04d}.safetensors")
            shard, size, n_files = {}, 0, n_files + 1
        shard[name] = tensor.cpu().contiguous().clone()
        size += nbytes
    save_file(shard, folder / f"weights-{n_files:04d}.safetensors")


def weight_drift(base: Model | str | Path, tuned: Model) -> WeightDrift:
    """Measure how far the tuned model's weights are from the base's, relative to the base's norm.

    Args:
        base: The base model, or the folder that `keep_weights` wrote.
        tuned: The tuned model, of the same TransformerLens family.

    Raises:
        ReferenceMismatch: The two have other weights, by name or by shape.
        NotFinite: A weight is NaN or infinite.
        StudyFolderError: The folder holds no weights.

    >>> import rim_lens as rl
    >>> base, tuned = rl.load_model("toy"), rl.load_model("toy:careful")
    >>> weight_drift(base, base).relative, 0 < weight_drift(base, tuned).relative < 1
    (0.0, True)
    """
    import pandas as pd

    moved = weights_of(tuned)
    lines: list[dict[str, Any]] = []
    for name, before in _weights(base):
        after = moved.pop(name, None)
        if after is None or after.shape != before.shape:
            found = "none of that name" if after is None else f"shape {tuple(after.shape)}"
            raise ReferenceMismatch(
                f"the base's weight {name!r} has shape {tuple(before.shape)} and the tuned model {found}; weight drift is between"
                " models of one architecture in one TransformerLens family."
            )
        squares = _squares(before, after)
        if not all(map(math.isfinite, squares)):
            raise NotFinite(f"weight {name!r} holds NaN or infinity in one of the models.")
        norm, distance = map(math.sqrt, squares)
        lines.append({"name": name, "n": before.numel(), "base_norm": norm, "moved_norm": distance})
    if moved:
        raise ReferenceMismatch(
            f"the tuned model has {len(moved)} weights that the base lacks (first: {next(iter(moved))!r}); weight drift is"
            " between models of one architecture in one TransformerLens family."
        )
    table = pd.DataFrame(lines).sort_values("name", ignore_index=True)
    table["relative"] = (table["moved_norm"] / table["base_norm"]).where(table["base_norm"] > 0)
    total = math.sqrt(float((table["base_norm"] ** 2).sum()))
    return WeightDrift(math.sqrt(float((table["moved_norm"] ** 2).sum())) / total, table)


def _squares(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Squared norm of a weight before, and of its change; a piece at a time, as in float64 a large one is twice itself."""
    whole, moved = before.flatten(), after.flatten()
    norm = distance = 0.0
    for start in range(0, len(whole), _PIECE):
        old, new = (
            one[start : start + _PIECE].to(device="cpu", dtype=torch.float32) for one in (whole, moved)
        )
        change = new - old
        norm += float(old.double().square().sum())
        distance += float(change.double().square().sum())
    return norm, distance


def _weights(base: Model | str | Path) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(base, str | Path):
        yield from weights_of(base).items()
        return
    from safetensors import safe_open

    files = sorted(Path(base).glob("weights-*.safetensors"))
    if not files:
        raise StudyFolderError(f"{base} holds no weights; give the folder that keep_weights wrote.")
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping
                    yield name, file.get_tensor(name)
        except (
            Exception
        ) as problem:  # safetensors raises an exception of its own, outside any hierarchy of ours
            raise StudyFolderError(
                f"{path} cannot be read ({problem}). Delete its folder and read the base again."
            ) from problem
