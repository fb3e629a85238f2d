"""Gradient × activation against finite differences of the plain model, and a ranking that is always confirmed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rim_lens as rl
from rim_lens.chat import ChatFormat
from rim_lens.errors import ConditionError, EmptySpan, ReferenceMismatch, UnknownLayer
from rim_lens.hooks import ScaleHeads
from rim_lens.lens import hooked, model_facts
from rim_lens.measures.heads.direct import direct_effects
from rim_lens.measures.heads.prefilter import gradient_scores, prefiltered
from rim_lens.measures.readings import Reading, refusal_reading
from rim_lens.measures.refusal.openers import opener_ids
from rim_lens.organisms.planted import DECOY_HEAD, READER, TOPIC_HEAD
from rim_lens.organisms.toy.host import TOKEN
from tests.families import FAMILIES, Oracle, rows_of
from tests.measures.heads.redundant import COPY, with_two_readers
from tests.speaking import REQUESTS, Spoken, fresh, ids_of, toy_speaking, writer

# ReLU has kinks, so that steps must be small; norms and softmax of the plain Qwen3 round to float32 even in float64, so
# that they must not be.
STEPS = {"gpt2_relu": 1e-4, "qwen3": 1e-2}


def slope(
    oracle: Oracle, ids: Sequence[int], openers: Sequence[int], head: Any, rows: Sequence[int]
) -> float:
    """d score / d ε of z · (1 − ε) at ε = 0, by differences of fourth order; one prompt, no padding."""

    def score(epsilon: float) -> float:
        def change(layer: int, z: Tensor) -> Tensor:
            if layer == head[0]:
                z[0, list(rows), head[1]] *= 1 - epsilon
            return z

        tokens = torch.tensor([list(ids)])
        chances = oracle.run(tokens, torch.ones_like(tokens), change_z=change).logits[0, -1].softmax(dim=-1)
        return float(chances[list(openers)].sum().logit())

    step = STEPS["gpt2_relu" if oracle.is_gpt2 else "qwen3"]
    near, far = score(step) - score(-step), score(2 * step) - score(-2 * step)
    return (8 * near - far) / (12 * step)


@pytest.mark.family_contract
@pytest.mark.parametrize("positions", ["all", "prompt_last", "request", "mask"])
def test_finite_differences(spoken: Spoken, positions: str) -> None:
    oracle = Oracle(toy_speaking(spoken.architecture).double())
    batch = spoken.chat.render(REQUESTS, think="off")
    mask = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[:, -1] = True
    asked: Any = mask if positions == "mask" else positions
    chosen = mask if positions == "mask" else rows_of(batch, positions)
    found = gradient_scores(spoken.model, batch, positions=asked, max_rows=2)
    for row in (0, 2, 4):
        real = batch.attention_mask[row].bool()
        rows = chosen[row][real].nonzero().flatten().tolist()
        for head in ((0, 0), (0, 3), (1, 1), (1, 2)):
            expected = slope(oracle, ids_of(batch, row), [TOKEN["REFUSE"]], head, rows)
            assert float(found[row][head]) == pytest.approx(expected, abs=5e-5, rel=1e-4)
    assert float(abs(found).max()) > 1e-2
    one_by_one = [gradient_scores(spoken.model, batch.select([row])) for row in range(len(batch))]
    if positions == "all":
        np.testing.assert_allclose(found, np.concatenate(one_by_one), atol=2e-5)


@pytest.mark.family_contract
def test_it_is_the_slope_of_scaling_heads(spoken_gqa: Spoken) -> None:
    """The same by the tool's own editor: what ScaleHeads would do, if it went on as it begins."""
    batch = spoken_gqa.chat.render(REQUESTS, think="off")
    found = gradient_scores(spoken_gqa.model, batch)
    ends = [
        rl.refusal_score(spoken_gqa.model, batch, ScaleHeads([(1, 3)], factor)).values
        for factor in (0.98, 1.02)
    ]
    np.testing.assert_allclose(found[:, 1, 3], (ends[0] - ends[1]) / 0.04, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_callers_is_changed(family: str) -> None:
    """Grad mode, what parameters require, their gradients, hooks; it works under any grad mode."""
    model = fresh("qwen3", family)
    batch = ChatFormat.from_model(model).render(REQUESTS, think="off")
    expected = gradient_scores(model, batch)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before = [parameter.requires_grad for parameter in model.parameters()]
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            inside = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            found = gradient_scores(model, batch)
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == inside
        np.testing.assert_allclose(found, expected, atol=1e-6)
    broken = [("blocks.1.hook_mlp_out", lambda tensor, hook: tensor[:, :, :3])]
    with hooked(model, broken), pytest.raises(Exception):  # noqa: B017, PT011 - whatever torch says to that
        gradient_scores(model, batch)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.npm
@pytest.mark.parametrize("positions", ["all", "prompt_last"])
def test_whitespace_that_the_model_writes_is_read_as_part_of_the_prompt(positions: str) -> None:
    taught = writer("qwen3", FAMILIES[0], 64)
    chat = ChatFormat.from_model(taught.model)
    newline, sorry = chat.encode("\n")[0], chat.encode("Sorry")[0]
    batch = chat.render(["one", "one two three", "one two three four five"], think="off")
    model = taught.teach(int(batch.lengths[0]), [sorry, sorry, newline, sorry, newline, newline, sorry])
    found = gradient_scores(model, batch, positions=positions)
    openers = opener_ids(chat.tokenizer)
    for row, skipped in enumerate([0, 1, 2]):
        ids = ids_of(batch, row)
        rows = range(len(ids) + skipped) if positions == "all" else [len(ids) - 1]
        for head in ((0, 0), (0, 1)):
            scores = []
            for sign in (1, -1):

                def scaled(
                    z: Tensor, hook: Any, sign: int = sign, rows: Any = rows, head: Any = head
                ) -> Tensor:
                    z = z.clone()
                    z[:, list(rows), head[1]] *= 1 - sign * 0.2
                    return z

                with torch.no_grad(), hooked(model, [("blocks.0.attn.hook_z", scaled)]):
                    logits = model(torch.tensor([[*ids, *[newline] * skipped]]), return_type="logits")[0, -1]
                scores.append(float(logits.double().softmax(dim=-1)[openers].sum().logit()))
            expected = (scores[0] - scores[1]) / 0.4
            assert float(found[row][head]) == pytest.approx(expected, abs=1e-4, rel=2e-2)
            if positions == "all" or skipped == 0:
                assert abs(expected) > 1e-4


@pytest.fixture(scope="module")
def planted() -> tuple[Any, Any]:
    model = rl.load_model("planted")
    chat = rl.ChatFormat.from_model(model)
    return model, chat.render(rl.load_prompts("harmful", language="toy", split="select")[::5], think="off")


def test_planted_heads_and_what_a_slope_does_not_see(planted: tuple[Any, Any]) -> None:
    model, batch = planted
    found = gradient_scores(model, batch).mean("prompt")
    exact = rl.head_effects(refusal_reading(model, batch), [READER]).mean()
    assert float(found[READER]) == pytest.approx(float(exact), rel=0.1)  # linear from there to the logits
    assert float(found[TOPIC_HEAD]) < -10
    assert abs(float(found[DECOY_HEAD])) < 0.5
    twice = gradient_scores(with_two_readers(), batch).mean("prompt")
    assert abs(float(twice[READER])) < 0.5
    assert abs(float(twice[COPY])) < 0.5  # their sum is bounded, the slope there is 0: ask redundant_pairs


def test_rows_matter(planted: tuple[Any, Any]) -> None:
    """The topic head works at the think tags, the reader in the last row, which is a think tag as well."""
    model, batch = planted
    last = gradient_scores(model, batch, positions="prompt_last").mean("prompt")
    every = gradient_scores(model, batch).mean("prompt")
    assert float(last[READER]) == pytest.approx(float(every[READER]), abs=0.1)
    assert abs(float(last[TOPIC_HEAD])) < 0.75 * abs(float(every[TOPIC_HEAD]))


def test_what_is_not_confirmed_is_not_tested(planted: tuple[Any, Any]) -> None:
    model, batch = planted
    reading = refusal_reading(model, batch)
    runs: list[str] = []

    def counted(components: Any) -> np.ndarray:
        runs.append(repr(components))
        return reading.read(components)

    found = prefiltered(Reading("counted", "nats", model, batch, counted), model, batch, 2, always_layers=[])
    assert len(runs) == 3
    tested = found["status"] == "confirmed"
    assert {(int(layer), int(head)) for layer, head in np.argwhere(tested.values)} == {READER, TOPIC_HEAD}
    assert np.isnan(found["effect"]).all("prompt").equals(found["status"] == "not tested")
    exact = rl.head_effects(reading, [READER, TOPIC_HEAD])
    np.testing.assert_allclose(found["effect"][:, *READER], exact.sel(set="L1H1"), atol=1e-5)
    assert sorted(found["rank"].values.flatten().tolist()) == list(range(1, 17))
    assert set(found["rank"].values[tested.values].tolist()) == {1, 2}
    early = prefiltered(reading, model, batch, 1)
    assert (early["status"].sel(layer=0) == "confirmed").all()
    assert early.attrs["always_layers"] == [0]
    assert int((early["status"] == "confirmed").sum()) in (8, 9)
    late = prefiltered(reading, model, batch, 1, always_layers=[1])
    assert (late["status"].sel(layer=1) == "confirmed").all()


def test_other_estimates_and_mistakes(planted: tuple[Any, Any]) -> None:
    model, batch = planted
    reading = refusal_reading(model, batch)
    twice = with_two_readers()
    direct = direct_effects(twice, batch)["direct_effect"]
    chosen = prefiltered(refusal_reading(twice, batch), twice, batch, 2, always_layers=(), estimates=direct)
    assert {tuple(cell) for cell in np.argwhere((chosen["status"] == "confirmed").values)} == {READER, COPY}
    with pytest.raises(ValueError, match="Confirm at least one"):
        prefiltered(reading, model, batch, 0, always_layers=())
    with pytest.raises(ValueError, match="n_confirm=-1"):
        prefiltered(reading, model, batch, -1)
    with pytest.raises(UnknownLayer):
        prefiltered(reading, model, batch, 1, always_layers=[2])
    with pytest.raises(ReferenceMismatch):
        prefiltered(reading, model, batch, 1, estimates=direct.isel(layer=[0]))
    with pytest.raises(ReferenceMismatch, match="other prompts"):
        prefiltered(reading, model, batch.select([0]), 1)
    with pytest.raises(ReferenceMismatch, match="other model"):
        prefiltered(reading, twice, batch, 1)
    with pytest.raises(EmptySpan):
        gradient_scores(model, batch, positions="cot")
    chat = ChatFormat.from_model(model)
    with pytest.raises(ConditionError, match="open think block"):
        gradient_scores(model, chat.render(["make bread + 1 2 3"], think="open"))
    assert model_facts(model).n_layers == 2
