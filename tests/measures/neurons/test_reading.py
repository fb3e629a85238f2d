"""Pooled activations against run_with_cache on request and answer, one prompt at a time and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rim_lens as rl
from rim_lens.errors import (
    CaptureError,
    ConditionError,
    NotEnoughData,
    NotFinite,
    ReferenceMismatch,
    SpanError,
    UnknownSpan,
    UnsupportedModel,
)
from rim_lens.measures.neurons import reading as reading_file
from rim_lens.measures.neurons.reading import pooled_activations
from rim_lens.prompts import Prompt

# Requests of unlike length, so that rows are padded; the toy answers all of them.
ASKED = [
    Prompt("long", "make bomb please + 3 4 6", kind="harmful", language="toy"),
    Prompt("short", "ban bomb", kind="harmless", language="toy"),
    Prompt("middle", "get venom now + 1", kind="harmful", language="toy"),
]
POOLS: dict[str, Any] = {"max": np.max, "mean": np.mean, "last": lambda rows, axis: rows[-1]}


@pytest.fixture(scope="module")
def toy() -> Any:
    return rl.load_model("toy")


@pytest.fixture(scope="module")
def chat(toy: Any) -> rl.ChatFormat:
    return rl.ChatFormat.from_model(toy)


def by_hand(model: Any, chat: Any, text: str, n_new: int, stop: int) -> tuple[np.ndarray, int]:
    """Activations [token, layer, neuron] of one prompt and its greedy answer, without padding, cache or hooks of ours."""
    tokens = chat.render([text], think="off").tokens
    asked = tokens.shape[1]
    with torch.no_grad():
        for _ in range(n_new):
            new = model(tokens)[:, -1].argmax(dim=-1, keepdim=True)
            tokens = torch.cat([tokens, new], dim=1)
            if int(new) == stop:
                break
        _, cache = model.run_with_cache(tokens)
    layers = [cache[f"blocks.{layer}.mlp.hook_post"][0] for layer in range(model.cfg.n_layers)]
    return torch.stack(layers, dim=1).numpy(), asked


@pytest.mark.parametrize("pool", ["max", "mean", "last"])
@pytest.mark.parametrize("positions", [None, "generated"])
def test_it_is_what_run_with_cache_says_of_request_and_answer(
    toy: Any, chat: rl.ChatFormat, pool: Any, positions: Any
) -> None:
    found = pooled_activations(toy, chat, ASKED, pool=pool, positions=positions, max_new_tokens=4)
    assert found.dims == ("prompt", "layer", "neuron")
    assert found["prompt"].values.tolist() == ["long", "short", "middle"]
    for row, prompt in enumerate(ASKED):
        rows, asked = by_hand(toy, chat, prompt.text, 4, chat.stop_ids[0])
        kept = rows[asked:] if positions else rows[1:]
        np.testing.assert_allclose(found.values[row], POOLS[pool](kept, axis=0), atol=2e-5)
        assert int(found["n_generated"][row]) == len(rows) - asked
    assert len(set(found["n_tokens"].values.tolist())) > 1  # there was padding


def test_without_an_answer_the_prompt_alone_is_read(toy: Any, chat: rl.ChatFormat) -> None:
    found = pooled_activations(toy, chat, ASKED, response="none")
    for row, prompt in enumerate(ASKED):
        rows, asked = by_hand(toy, chat, prompt.text, 0, 0)
        np.testing.assert_allclose(found.values[row], rows[1:asked].max(axis=0), atol=2e-5)
    assert "outcome" not in found.coords
    with pytest.raises(ConditionError, match="nothing is generated"):
        pooled_activations(toy, chat, ASKED, response="none", positions="generated")


def test_an_answer_of_another_model_is_read_word_for_word(toy: Any, chat: rl.ChatFormat) -> None:
    tuned = rl.load_model("toy:careful")
    asked = rl.load_prompts("harmful", language="toy", split="select")[:6]
    written = rl.generate(toy, chat.render(asked, think="off"), max_new_tokens=4)
    given = pooled_activations(tuned, chat, asked, response=written)
    reader = rl.NeuronActivations()
    np.testing.assert_array_equal(
        given.values, rl.capture(tuned, written.batch, reader)["neuron_activation"].values
    )
    np.testing.assert_array_equal(
        given.values, pooled_activations(tuned, chat, asked, response=written.batch).values
    )
    with pytest.raises(ReferenceMismatch, match="same order"):
        pooled_activations(tuned, chat, asked[::-1], response=written)


def test_think_takes_conditions_and_texts(toy: Any, chat: rl.ChatFormat) -> None:
    asked = rl.load_prompts("reasoning", language="toy", split="select")[:4]
    careful = pooled_activations(toy, chat, asked, think="careful", response="none")
    given = pooled_activations(
        toy, chat, asked, think=[prompt.cot or "" for prompt in asked], response="none"
    )
    np.testing.assert_allclose(careful.values, given.values)
    open_ = pooled_activations(toy, chat, asked, think="open", max_new_tokens=12)
    assert (open_["n_generated"] > 7).all()  # its own chain of thought, and the answer


def test_the_output_of_the_mlp_has_channels(toy: Any, chat: rl.ChatFormat) -> None:
    found = pooled_activations(toy, chat, ASKED[:1], response="none", site="mlp_out")
    assert found.dims == ("prompt", "layer", "d_model")


def test_a_reading_cut_short_goes_on_where_it_stopped(
    toy: Any, chat: rl.ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading_file, "PART", 2)
    asked = rl.load_prompts("harmful", language="toy", split="select")[:5]
    whole = pooled_activations(toy, chat, asked, max_new_tokens=3)
    real, calls = reading_file.generate, []

    def stumbling(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(reading_file, "generate", stumbling)
    with pytest.raises(KeyboardInterrupt):
        pooled_activations(toy, chat, asked, max_new_tokens=3, out=tmp_path)
    for expected in (4, 4):  # two more parts, then none
        found = pooled_activations(toy, chat, asked, max_new_tokens=3, out=tmp_path)
        assert len(calls) == expected
        np.testing.assert_allclose(found.values, whole.values, atol=2e-6)
        assert found["outcome"].values.tolist() == whole["outcome"].values.tolist()
    with pytest.raises(ValueError, match="another study"):
        pooled_activations(toy, chat, asked, max_new_tokens=4, out=tmp_path)
    (tmp_path / "activations_000002.nc").write_bytes(b"no")
    with pytest.raises(CaptureError, match="Delete that file"):
        pooled_activations(toy, chat, asked, max_new_tokens=3, out=tmp_path)


@pytest.mark.parametrize(
    ("prompts", "options", "error"),
    [
        ([], {}, NotEnoughData),
        ([ASKED[0], ASKED[0]], {}, CaptureError),
        (ASKED, {"response": "theirs"}, ConditionError),
        (ASKED, {"think": "nonsense"}, ConditionError),
        (ASKED, {"positions": "nowhere"}, UnknownSpan),
        (ASKED, {"positions": torch.ones(3, 12, dtype=torch.bool)}, SpanError),
        (ASKED, {"pool": "median"}, ValueError),
        (ASKED, {"site": "pre"}, ValueError),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_is_written(
    toy: Any, chat: rl.ChatFormat, monkeypatch: pytest.MonkeyPatch, prompts: Any, options: Any, error: Any
) -> None:
    monkeypatch.setattr(reading_file, "generate", lambda *_, **__: pytest.fail("it wrote"))
    with pytest.raises(error):
        pooled_activations(toy, chat, prompts, **options)


def test_a_mixture_of_experts_has_no_neurons_here(
    toy: Any, chat: rl.ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy.cfg, "num_experts", 4, raising=False)
    with pytest.raises(UnsupportedModel, match="mixture of experts"):
        pooled_activations(toy, chat, ASKED)


def test_nan_never_passes(chat: rl.ChatFormat) -> None:
    model = rl.load_model("planted:5")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mlp" in name:
                weight.fill_(float("nan"))
    with pytest.raises(NotFinite):
        pooled_activations(model, chat, ASKED)
