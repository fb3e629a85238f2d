"""The digest sees every single weight, and nothing but weights."""

from __future__ import annotations

import pytest
import torch

from rim_lens.lens import verify, weights_digest
from tests.families import FAMILIES, wrapped


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", ["gpt2_relu", "qwen3"])
def test_every_weight_counts(architecture: str, family: str) -> None:
    model = wrapped(architecture, family)
    before = weights_digest(model)
    assert len(before) == 16
    assert set(before) <= set("0123456789abcdef")
    for name, parameter in model.named_parameters():
        for place in (0, parameter.numel() // 2, parameter.numel() - 1):
            index = torch.unravel_index(torch.tensor(place), parameter.shape)
            kept = parameter.data[index].clone()
            parameter.data[index] = torch.nextafter(kept, torch.tensor(float("inf")))
            assert weights_digest(model) != before, (name, place)
            parameter.data[index] = kept
    assert weights_digest(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_weights_equal_digest(family: str) -> None:
    model = wrapped("llama", family)
    verify(model, reads=("pattern",), edits=("z",))
    assert weights_digest(model) == weights_digest(wrapped("llama", family))
    assert weights_digest(model) != weights_digest(wrapped("llama", family, seed=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_weights_are_seen(family: str) -> None:
    """The same numbers at another place are another model."""
    model = wrapped("llama", family)
    before = weights_digest(model)
    scale = dict(model.named_parameters())
    shaped: dict[torch.Size, list[str]] = {}
    for name, parameter in scale.items():
        shaped.setdefault(parameter.shape, []).append(name)
    first, second = next(names for names in shaped.values() if len(names) > 1)[:2]
    kept = scale[first].data.clone()
    scale[first].data.copy_(scale[second].data)
    scale[second].data.copy_(kept)
    assert weights_digest(model) != before


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_has_a_digest(family: str) -> None:
    model = wrapped("gpt2_relu", family)
    whole = weights_digest(model)
    assert weights_digest(model.to(torch.bfloat16)) != whole
