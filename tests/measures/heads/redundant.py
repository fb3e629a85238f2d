"""The planted model with its reader twice: either does the whole work, so that removing one changes nothing."""

from __future__ import annotations

from typing import Any

import torch

from rim_lens.lens import wrap_hf
from rim_lens.organisms.planted import _AT, _CHANNELS, _PLUS, READER, planted
from rim_lens.organisms.toy.host import D_HEAD, D_MODEL, N_HEADS, toy_tokenizer

COPY = (1, 4)
BOUND = 0.8  # what one reader writes is about 1


def with_two_readers(family: str = "auto") -> Any:
    """Copy the reader into another slot, and let a neuron after both take away what exceeds one of them.

    Heads add up in the residual stream, so that two alone would write twice as much, and either's removal would cost
    half of it; what makes them redundant is the bound that comes after: min(refuse, BOUND) = refuse − ReLU(refuse − BOUND).
    """
    hf = planted()
    block = hf.transformer.h[1]
    source, target = (slice(head * D_HEAD, (head + 1) * D_HEAD) for head in (READER[1], COPY[1]))
    with torch.no_grad():
        joint = block.attn.c_attn.weight.view(D_MODEL, 3, N_HEADS * D_HEAD)
        joint[:, :, target] = joint[:, :, source].clone()
        bias = block.attn.c_attn.bias.view(3, N_HEADS * D_HEAD)
        bias[:, target] = bias[:, source].clone()
        block.attn.c_proj.weight[target] = block.attn.c_proj.weight[source].clone()
        mlp, refuse = block.mlp, _AT["refuse"]
        mlp.c_fc.weight[:, 0] = 0
        mlp.c_fc.weight[refuse, 0] = 1
        mlp.c_fc.bias[0] = -BOUND
        mlp.c_proj.weight[0] = 0
        mlp.c_proj.weight[0, refuse] = -1
        spare = slice(len(_CHANNELS), _PLUS)
        mlp.c_proj.weight[0, spare] = 1 / (_PLUS - len(_CHANNELS))  # every writer sums to zero, see `planted`
    return wrap_hf(hf, toy_tokenizer(), family=family)  # type: ignore[arg-type]
