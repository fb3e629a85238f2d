"""A digest of whole weights, so that a result says which model it came from."""

from __future__ import annotations

import hashlib

import torch

from rim_lens.lens.facts import Model


def weights_digest(model: Model) -> str:
    """SHA-256 over every parameter and buffer, whole tensors, names and shapes included.

    The two families name their parameters differently, so a digest compares models of one family.

    Returns:
        The first 16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
