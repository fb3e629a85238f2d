"""Scaling heads equals scaling their rows of W_O."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rim_lens.errors import UnknownHead
from rim_lens.hooks import AblateHeads, HeadOutputs, ScaleHeads, bound
from rim_lens.lens import last_logits
from tests.editing import agrees, logits_under, same
from tests.families import Case, close, rows_of

pytestmark = pytest.mark.family_contract

HEADS = [(0, 1), (1, 3), (1, 0)]


@pytest.mark.oracle("ScaleHeads", "the heads' rows of W_O scaled")
@pytest.mark.parametrize("factor", [2.5, -1.0])
def test_scaling_a_head_equals_scaling_its_rows_of_w_o(case: Case, factor: float) -> None:
    oracle, width = case.edited_oracle(), case.facts.d_head
    for layer, head in HEADS:
        projection = oracle.out_projection(layer)
        with torch.no_grad():
            weight = projection.weight if oracle.is_gpt2 else projection.weight.T
            weight[head * width : (head + 1) * width] *= factor
    agrees(case, [ScaleHeads(HEADS, factor)], lambda tokens, mask: oracle.run(tokens, mask).logits)


@pytest.mark.parametrize("positions", ["prompt_last", "cot"])
def test_at_chosen_rows(case_gqa: Case, positions: str) -> None:
    rows = rows_of(case_gqa.batch, positions)

    def change(layer: int, value: Tensor) -> Tensor:
        for prompt, pos in rows.nonzero().tolist():
            for its_layer, head in HEADS:
                if its_layer == layer:
                    value[prompt, pos, head] *= 3.0
        return value

    editor = ScaleHeads(HEADS, 3.0, positions)
    agrees(case_gqa, [editor], lambda tokens, mask: case_gqa.oracle.run(tokens, mask, change_z=change).logits)


def test_by_nothing_and_by_one(case_gqa: Case) -> None:
    assert torch.equal(
        logits_under(case_gqa, ScaleHeads(HEADS, 0)), logits_under(case_gqa, AblateHeads(HEADS))
    )
    plain = logits_under(case_gqa)
    assert torch.equal(logits_under(case_gqa, ScaleHeads(HEADS, 1)), plain)
    halved_twice = logits_under(case_gqa, ScaleHeads(HEADS, 0.5), ScaleHeads(HEADS, 0.5))
    same(case_gqa, halved_twice, logits_under(case_gqa, ScaleHeads(HEADS, 0.25)))


def test_a_reader_sees_the_scaled_head(case_gqa: Case) -> None:
    reader, editor, batch = HeadOutputs(), ScaleHeads([(0, 2)], -2.0), case_gqa.batch
    with bound([reader, editor], batch), editor.on(case_gqa.model), reader.on(case_gqa.model):
        last_logits(case_gqa.model, batch.tokens, batch.attention_mask)
    close(reader.collect()["head_output"][:, 0, 2], -2 * case_gqa.truth.z[0][:, -1, 2])


def test_what_is_refused(case_gqa: Case) -> None:
    with pytest.raises(UnknownHead, match="nothing would be edited"):
        ScaleHeads([], 2.0)
    bad: Any
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            ScaleHeads(HEADS, bad)
    with pytest.raises(UnknownHead), ScaleHeads([(0, 6)], 2.0).on(case_gqa.model):
        pass
    assert not any(point.fwd_hooks for point in case_gqa.model.hook_dict.values())
