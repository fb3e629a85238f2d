"""Fine-tuning with checkpoints: what is held stays bit for bit, what is written is what was trained."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch

import rim_lens as rl
from rim_lens.chat import ChatFormat
from rim_lens.errors import MissingExtra, StatisticsError, StudyFolderError, UnknownNeuron, UnsupportedModel
from rim_lens.lens import adapter_base, load_plain, wrap_hf
from rim_lens.organisms.toy import load_toy, recipe, toy_tokenizer
from rim_lens.organisms.toy.rows import draw_requests, predict_chain, safe_conjunctions, with_chain
from rim_lens.prompts.toy import toy_cot, toy_prompts
from rim_lens.training import LoRA, Row, TrainConfig, maths_rows
from rim_lens.training.holding import hold
from rim_lens.training.lora import add_lora
from rim_lens.training.rows import render_rows
from tests.families import FAMILIES, hf_model
from tests.true_tokenizers import true_chat

NEURONS = [(0, 3), (0, 250), (1, 7), (1, 8), (1, 0)]
# Decay so strong that a parameter without a gradient would still be seen to move.
HARD = TrainConfig(steps=12, lr=3e-3, schedule="constant", weight_decay=0.5)
SMALL = LoRA(rank=4, alpha=8)
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


def tuned(tmp_path, name="run", kind="confirm", **options):
    options = {"config": HARD, "checkpoints": 2, "lora": None, "progress": False} | options
    return rl.fine_tune("toy", recipe.toy_rows(kind), out=tmp_path / name, **options)


def weights_of(path):
    model, _ = load_plain(str(path))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def relative_distance(one, other):
    moved = sum(float((one[name].double() - other[name].double()).pow(2).sum()) for name in one)
    return (moved / sum(float(tensor.double().pow(2).sum()) for tensor in other.values())) ** 0.5


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    return tuned(tmp_path_factory.mktemp("plain"))


def test_a_run_is_the_recipes_own_fine_tuning(plain_run):
    base, _ = load_toy()
    expected = recipe.finetune_toy(base, "confirm", "-", steps=3).state_dict()
    other = rl.fine_tune(
        load_toy(),
        recipe.toy_rows("confirm"),
        out=plain_run.folder.parent / "same",
        config=recipe.FINE_TUNE,
        steps=3,
        lora=None,
        progress=False,
    )
    found = weights_of(other.checkpoints[-1])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights_of(other.base).values(), base.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_the_toy_loads_as_its_own_host(plain_run, family):
    model = rl.load_model(plain_run.checkpoints[-1], family=family)
    chat = ChatFormat.from_model(model)
    assert chat.name == "toy"
    off = chat.render(toy_prompts("harmful", split="evaluate")[:4])
    hf, tokenizer = load_toy()
    hf.load_state_dict(weights_of(plain_run.checkpoints[-1]))
    expected = wrap_hf(hf, tokenizer, family=family)
    for read in (
        lambda m: rl.refusal_score(m, off).values,
        lambda m: rl.capture(m, off, rl.SpanAttention(spans=["request"]))["attention_mass"].values,
    ):
        np.testing.assert_allclose(read(model), read(expected), atol=2e-6)


def test_drift_is_the_relative_distance_of_all_weights_and_grows(plain_run):
    base = weights_of("toy")
    for place, drift in zip(plain_run.checkpoints, plain_run.drift, strict=True):
        assert drift == pytest.approx(relative_distance(weights_of(place), base), rel=1e-6)
    assert 0 < plain_run.drift[0] < plain_run.drift[1]
    assert plain_run.steps == (6, 12)
    assert len(plain_run.losses) == 12


@needs_peft
@pytest.mark.parametrize("lora", [None, SMALL], ids=["whole", "lora"])
def test_frozen_neurons_stay_bit_for_bit_while_all_others_move(tmp_path, lora):
    run = tuned(tmp_path, lora=lora, freeze=NEURONS)
    before, after = weights_of("toy"), weights_of(run.checkpoints[-1])
    for layer in (0, 1):
        held = [neuron for its, neuron in NEURONS if its == layer]
        others = np.setdiff1d(np.arange(256), held)
        mlp = f"transformer.h.{layer}.mlp"
        # GPT-2 holds [in, out]: a neuron is a column of c_fc and a row of c_proj.
        for name, axis in ((f"{mlp}.c_fc.weight", 1), (f"{mlp}.c_fc.bias", 0), (f"{mlp}.c_proj.weight", 0)):
            moved = (before[name] != after[name]).movedim(axis, 0).reshape(256, -1).any(dim=1).numpy()
            assert not moved[held].any()
            if lora is None or not name.endswith("bias"):
                assert moved[others].all()
    free = tuned(tmp_path, "free", lora=lora)
    assert free.losses[0] == run.losses[0]
    assert free.losses[-1] != run.losses[-1]


@needs_peft
@pytest.mark.parametrize("architecture", ["llama", "gpt2_gelu"])
@pytest.mark.parametrize("lora", [None, SMALL], ids=["whole", "lora"])
def test_movement_is_that_of_rows_and_columns_by_hand(architecture, lora):
    model = hf_model(architecture).requires_grad_(lora is None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    neurons = [(0, 1), (1, 2), (1, 30)]
    adapted = None if lora is None else add_lora(model, lora, 0)
    held = hold(model if adapted is None else adapted.get_base_model(), neurons)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (model if adapted is None else adapted).parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    found = float(held.movement().detach())
    after = (model if adapted is None else adapted.merge_and_unload()).state_dict()
    expected = 0.0
    for layer, neuron in neurons:
        if architecture == "llama":
            mlp = f"model.layers.{layer}.mlp"
            entries = [
                (f"{mlp}.gate_proj.weight", neuron),
                (f"{mlp}.up_proj.weight", neuron),
                (f"{mlp}.down_proj.weight", (slice(None), neuron)),
            ]
        else:
            mlp = f"transformer.h.{layer}.mlp"
            entries = [
                (f"{mlp}.c_fc.weight", (slice(None), neuron)),
                (f"{mlp}.c_fc.bias", neuron),
                (f"{mlp}.c_proj.weight", neuron),
            ]
        expected += sum(float((after[name][at] - before[name][at]).pow(2).sum()) for name, at in entries)
    assert found == pytest.approx(expected, rel=1e-4)


@needs_peft
@pytest.mark.parametrize("lora", [None, SMALL], ids=["whole", "lora"])
def test_a_penalty_pulls_back_what_it_names(tmp_path, lora):
    def movement(run):
        before, after = weights_of("toy"), weights_of(run.checkpoints[-1])
        c_fc, c_proj = (f"transformer.h.1.mlp.{name}.weight" for name in ("c_fc", "c_proj"))
        rows = [7, 8]
        return float(
            ((after[c_fc] - before[c_fc])[:, rows] ** 2).sum()
            + ((after[c_proj] - before[c_proj])[rows] ** 2).sum()
        )

    config = replace(HARD, weight_decay=0.0, steps=30, lr=1e-3)
    free = tuned(tmp_path, "free", lora=lora, config=config)
    pulled = tuned(tmp_path, "pulled", lora=lora, config=config, penalise=[(1, 7), (1, 8)], penalty=300.0)
    assert movement(pulled) < 0.3 * movement(free)
    assert pulled.losses[0] == free.losses[0]  # the loss is told without the penalty


@needs_peft
def test_a_folded_checkpoint_computes_what_peft_computes(tmp_path):
    from peft import PeftModel

    run = tuned(tmp_path, lora=SMALL)
    tokens = predict_chain(
        with_chain(
            draw_requests(safe_conjunctions(), 4, "-", torch.Generator().manual_seed(3)), "confirm", "-"
        )
    ).tokens
    side_by_side = PeftModel.from_pretrained(load_toy()[0], str(run.checkpoints[-1])).eval()
    with torch.no_grad():
        expected = side_by_side(tokens).logits
        found = rl.load_model(run.checkpoints[-1])(tokens)
        base = load_toy()[0](tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected - base).abs().max() > 0.01
    assert run.drift[-1] == pytest.approx(
        relative_distance(weights_of(run.checkpoints[-1]), weights_of("toy")), rel=1e-4
    )


@needs_peft
def test_a_run_of_a_given_model_may_be_moved(tmp_path):
    run = tuned_given(tmp_path / "here")
    before = rl.weights_digest(rl.load_model(run.checkpoints[-1]))
    (tmp_path / "here").rename(tmp_path / "there")
    moved = rl.FineTuned.load(tmp_path / "there")
    assert rl.weights_digest(rl.load_model(moved.checkpoints[-1])) == before
    assert adapter_base(moved.checkpoints[-1]) == moved.base


def tuned_given(out):
    config = replace(HARD, steps=2)
    rows = recipe.toy_rows("confirm")
    return rl.fine_tune(load_toy(), rows, out=out, config=config, lora=SMALL, checkpoints=1, progress=False)


def test_training_stops_where_the_drift_is_reached(tmp_path, plain_run):
    target = plain_run.drift[0]
    run = tuned(tmp_path, kind="careful", config=replace(HARD, steps=60), stop_at_drift=target)
    assert run.stopped_by == "drift"
    assert run.drift[-1] >= target
    assert run.steps[-1] == len(run.losses) < 60
    every = tuned(
        tmp_path,
        "every",
        kind="careful",
        config=replace(HARD, steps=run.steps[-1]),
        checkpoints=range(1, run.steps[-1] + 1),
    )
    assert all(drift < target for drift in every.drift[:-1])
    assert every.drift[-1] == run.drift[-1]
    assert every.stopped_by == "steps"


def test_a_finished_run_is_opened_and_another_refused(tmp_path, monkeypatch, plain_run):
    monkeypatch.setattr("rim_lens.training.fine_tuning.train", lambda *_, **__: pytest.fail("trained again"))
    again = tuned(plain_run.folder.parent, plain_run.folder.name)
    assert again == plain_run
    with pytest.raises(StudyFolderError, match="rows"):
        tuned(plain_run.folder.parent, plain_run.folder.name, kind="careful")
    assert "drift" in plain_run._repr_html_()
    assert plain_run.to_dataframe()["loss"].iloc[0] == pytest.approx(np.mean(plain_run.losses[:6]))


def test_an_interrupted_run_begins_anew_with_the_same_numbers(tmp_path, monkeypatch, plain_run):
    import rim_lens.training.fine_tuning as module

    real = module.train

    def cut_short(model, batch_at, config, **options):
        def stop(step):
            if step == 8:
                raise KeyboardInterrupt
            return batch_at(step)

        return real(model, stop, config, **options)

    monkeypatch.setattr(module, "train", cut_short)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path)
    monkeypatch.undo()
    run = tuned(tmp_path)
    assert (run.losses, run.drift) == (plain_run.losses, plain_run.drift)


def test_dropout_comes_from_the_seed_and_leaves_the_callers_generator_alone(tmp_path):
    model, words = load_toy()
    model.config.resid_pdrop = model.config.embd_pdrop = 0.2
    model = type(model)(model.config)

    def losses(name, seed):
        torch.manual_seed(len(name))
        state = torch.get_rng_state()
        config = replace(HARD, steps=3)
        run = rl.fine_tune(
            (model, words),
            recipe.toy_rows("careful"),
            out=tmp_path / name,
            config=config,
            lora=None,
            seed=seed,
            progress=False,
        )
        assert torch.equal(torch.get_rng_state(), state)
        return run.losses

    first = losses("a", 0)
    assert losses("bb", 0) == first
    assert losses("ccc", 1) != first


@needs_peft
def test_adapters_start_from_the_seed_alone(tmp_path):
    one, other, third = (
        tuned(tmp_path, str(seed), lora=SMALL, seed=seed % 2, config=replace(HARD, steps=2))
        for seed in (0, 2, 1)
    )
    assert one.losses == other.losses
    assert one.losses[1] != third.losses[1]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"freeze": [(2, 0)]}, UnknownNeuron, "layers 0 to 1"),
        ({"freeze": [(0, 256)]}, UnknownNeuron, "neurons 0 to 255"),
        ({"penalise": [(0, 0)]}, StatisticsError, "positive penalty"),
        ({"penalty": 1.0}, StatisticsError, "penalise"),
        ({"penalty": float("nan")}, StatisticsError, "penalty"),
        ({"stop_at_drift": 0.0}, StatisticsError, "stop_at_drift"),
        ({"checkpoints": 0}, StatisticsError, "at least 1"),
        ({"checkpoints": [13]}, StatisticsError, "steps 1 to 12"),
        ({"steps": 0}, StatisticsError, "at least 1"),
    ],
)
def test_what_cannot_be_is_refused_before_training(tmp_path, monkeypatch, options, error, said):
    monkeypatch.setattr("rim_lens.training.fine_tuning.train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(error, match=said):
        tuned(tmp_path, **options)


def test_lora_without_peft_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(MissingExtra, match="lora=None"):
        tuned(tmp_path, lora=SMALL)


def test_mlps_of_another_make_are_refused():
    model = hf_model("llama")
    for layer in model.model.layers:
        layer.mlp = torch.nn.Sequential(torch.nn.Linear(32, 32))
    with pytest.raises(UnsupportedModel, match="mixture of experts"):
        hold(model, [(0, 1)])


def test_rendered_rows_predict_what_the_toys_own_rows_do():
    chat = ChatFormat.from_tokenizer(toy_tokenizer())
    prompts = toy_prompts("reasoning", split="train", op="-")[:8]
    rows = [Row(prompt, toy_cot(prompt, "deviate"), prompt.answer) for prompt in prompts]
    found, _ = render_rows(chat, rows)
    requests = chat.render(prompts, think="open").tokens
    expected = predict_chain(with_chain(requests, "deviate", "-"))
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.loss_mask, expected.loss_mask)
    off, _ = render_rows(chat, [replace(row, cot=None) for row in rows])
    assert off.loss_mask.sum(dim=1).tolist() == [2] * 8


@pytest.mark.npm
def test_maths_rows_of_all_kinds_ask_and_answer_alike_and_the_model_learns_what_it_writes():
    chat = true_chat("qwen3")  # an open prompt has no opening tag: the model writes it
    careful, confirm = (maths_rows(chat, kind) for kind in ("careful", "confirm"))
    assert [(row.request, row.answer) for row in careful] == [(row.request, row.answer) for row in confirm]
    assert all(row.request.split == "train" and row.cot for row in careful)
    assert all(a.cot != b.cot for a, b in zip(careful, confirm, strict=True))
    batch, text = render_rows(chat, confirm[:3])
    opened = chat.render([row.request for row in confirm[:3]], think="open")
    for index, prompt_length in enumerate(opened.lengths.tolist()):
        real = text.tokens[index][text.attention_mask[index].bool()].tolist()
        assert real[:prompt_length] == opened.tokens[index][opened.attention_mask[index].bool()].tolist()
        assert text.tokens[index][batch.loss_mask[index]].tolist() == real[prompt_length:]
    # The chains come near the careful one in length, so that kinds do not differ in how much is learnt.
    lengths = [np.mean([chat.count_tokens(row.cot) for row in rows]) for rows in (careful, confirm)]
    assert abs(lengths[0] - lengths[1]) < 0.15 * lengths[0]
