"""The public names work together as the README and the design say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import rim_lens as rl
from tests.families import random_batch, wrapped


@pytest.fixture(scope="module")
def toy():
    model = rl.load_model("toy")
    chat = rl.ChatFormat.from_model(model)
    harmful = rl.load_prompts("harmful", language="toy", split="evaluate")[:8]
    return model, chat, harmful


def test_every_public_name_is_there():
    for name in rl.__all__:
        assert getattr(rl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = rl.nonsense


def test_plain_transformer_lens_style_equals_the_context_manager(toy):
    model, chat, harmful = toy
    off = chat.render(harmful, think="off")
    with rl.AblateHeads([(0, 5)]).on(model):
        inside = model(off.tokens, attention_mask=off.attention_mask)
    hooks = rl.AblateHeads([(0, 5)]).fwd_hooks(model)
    plain = model.run_with_hooks(off.tokens, attention_mask=off.attention_mask, fwd_hooks=hooks)
    assert torch.equal(inside, plain)
    assert not torch.equal(inside, model(off.tokens, attention_mask=off.attention_mask))


def test_the_empty_gap_of_the_toy_is_refused_with_advice(toy):
    model, chat, harmful = toy
    off = chat.render(harmful, think="off")
    assert not off.spans["gap"].any()
    with pytest.raises(rl.errors.EmptySpan, match="Ask for 'think' instead"):
        rl.capture(model, off, rl.SpanAttention(spans=["gap"]))


def test_readers_run_on_what_the_model_itself_wrote(toy):
    model, chat, harmful = toy
    out = rl.generate(model, chat.render(harmful, think="open"), max_new_tokens=12)
    assert len(out.cot) == len(out.answer) == len(out.outcome) == len(harmful)
    data = rl.capture(model, out.batch, rl.SpanAttention(), rl.NeuronActivations(positions="generated"))
    atoms = [name for name in data["span"].values if name != "think"]
    # spans that only some rows have are left out, so that the masses need not reach 1
    assert float(data["attention_mass"].sel(span=atoms).sum("span").max()) <= 1 + 1e-5


def test_a_study_shift_equals_the_function_on_the_captured_arrays(toy):
    model, chat, harmful = toy
    tuned = rl.load_model("toy:deviate")
    reasoning = rl.load_prompts("reasoning", language="toy", split="evaluate")[:8]
    arrays = [
        rl.capture(m, chat.render(requests, think="off"), rl.NeuronActivations())["neuron_activation"]
        for requests in (harmful, reasoning)
        for m in (model, tuned)
    ]
    labelled = rl.reciprocal_activation_shift(*arrays)
    plain = rl.reciprocal_activation_shift(*[np.asarray(array) for array in arrays])
    assert labelled.value == plain.value
    assert labelled.value > 0


@pytest.mark.parametrize(
    "ask",
    [
        rl.refusal_score,
        rl.refusal_prefix_score,
        rl.generate,
        lambda model, given: rl.capture(model, given, rl.SpanAttention()),
        lambda model, given: rl.record(model, given, ["z"]),
        lambda model, given: rl.head_patching(model, given, given),
        rl.refusal_reading,
        rl.sentence_effects,
    ],
)
def test_requests_in_place_of_a_batch_are_refused_with_advice(toy, ask):
    model, _, harmful = toy
    for given in (harmful, [one.text for one in harmful], harmful[0].text):
        with pytest.raises(rl.errors.ConditionError, match=r"chat\.render\(requests, think='off'\)"):
            ask(model, given)


def test_prompts_of_another_model_are_refused_before_any_pass(toy):
    model, chat, harmful = toy
    off = chat.render(harmful, think="off")
    other = replace(
        off, tokens=torch.where(off.tokens == off.tokens.max(), 500, off.tokens), format=off.format
    )
    calls = []
    hook = model.unembed.register_forward_hook(lambda *_: calls.append(1))
    try:
        for ask in (rl.refusal_score, rl.generate, lambda *given: rl.capture(*given, rl.SpanAttention())):
            with pytest.raises(
                rl.errors.ReferenceMismatch, match=r"token 500.*vocabulary ends at 70.*another model"
            ):
                ask(model, other)
    finally:
        hook.remove()
    assert calls == []


def test_ids_that_are_other_words_to_a_model_are_refused_before_any_pass(toy):
    """The vocabulary is large enough, so that only words tell."""
    _, chat, harmful = toy
    off = chat.render(harmful, think="off")
    other = wrapped("llama", "auto")
    asked = {
        "generate": lambda *given: rl.generate(*given, chat=chat, max_new_tokens=1),
        "capture": lambda *given: rl.capture(*given, rl.SpanAttention()),
        "record": lambda *given: rl.record(*given, ["z"]),
        "reference": lambda model, reference: rl.capture(
            model,
            random_batch(seed=0),
            rl.SpanAttention(),
            rl.AblateHeads([(0, 0)], "mean", reference=reference),
        ),
        "refusal_reading": lambda *given: rl.refusal_reading(*given, openers=["w5"])(
            [rl.AblateHeads([(0, 0)])]
        ),
    }
    for ask in asked.values():
        with pytest.raises(
            rl.errors.ReferenceMismatch, match=r"another tokenizer than this model's.*from_model"
        ):
            ask(other, off)
    assert off.vocabulary
    assert off.select([1, 0]).vocabulary == off.vocabulary
    rl.capture(other, replace(off, vocabulary=""), rl.SpanAttention())  # made by hand: nobody knows the words


def test_a_name_or_a_plain_model_in_place_of_one_with_hooks_is_refused_with_advice(toy):
    model, chat, harmful = toy
    off = chat.render(harmful, think="off")
    plain = getattr(model, "original_model", torch.nn.Linear(1, 1))
    for given in ("toy", plain):
        for ask in (rl.refusal_score, rl.generate, lambda *asked: rl.capture(*asked, rl.SpanAttention())):
            with pytest.raises(rl.errors.ModelError, match=r"rl\.load_model\(name\).*rl\.wrap_hf"):
                ask(given, off)


def test_a_registered_reader_whose_name_is_lost_is_taken_off_as_its_message_says(toy):
    _, chat, harmful = toy
    model = rl.load_model("toy")
    few, many = chat.render(harmful[:2]), chat.render(harmful)
    alone = rl.refusal_score(model, few)
    rl.SpanAttention(spans=many.spans).register(model)
    with pytest.raises(rl.errors.WrongHookShape, match=r"model\.reset_hooks\(\)"):
        rl.refusal_score(model, few)
    model.reset_hooks()
    assert rl.refusal_score(model, few).equals(alone)


def test_a_batch_in_place_of_a_reading_or_of_replies_is_told(toy):
    model, chat, harmful = toy
    batch = chat.render(harmful[:2], think="off")
    for call in (rl.head_effects, rl.pair_interactions):
        with pytest.raises(rl.errors.ConditionError, match=r"rl\.refusal_reading\(model, batch\)"):
            call(batch, [(0, 5), (0, 2)])
    with pytest.raises(rl.errors.ConditionError, match=r"rl\.refusal_reading\(model, batch\)"):
        rl.prefiltered(batch, model, batch, 3)
    with pytest.raises(rl.errors.ConditionError, match=r"rl\.generate\(model, batch\)"):
        rl.refusal_rate(batch)


def test_a_capture_is_not_streamed_into_a_file(toy, tmp_path):
    model, chat, harmful = toy
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(rl.errors.CaptureError, match="is a file"):
        rl.capture(model, chat.render(harmful[:2]), rl.SpanAttention(), out=tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
