"""A digest of whole weights, so that a result says which model it came from."""

from __future__ import annotations

import torch
import xxhash

from rim_lens.lens.facts import Model


def weights_digest(model: Model) -> str:
    """XXH3 over every tensor of the model's state_dict, whole, names and shapes included.

    The two families name their parameters differently, so a digest compares models of one family. It tells weights apart, and is no
    seal: every call that names its model reads them all, and XXH3 reads faster than SHA-256. It does not show what a state_dict leaves
    out: settings (the epsilon of norms) and buffers that are not saved (frequencies of rotary positions).

    Returns:
        The first 16 hexadecimal digits of 128 bits.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
