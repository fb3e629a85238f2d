"""What removing neurons does, against zeroed rows of W_out in the plain model, measures called by hand, and planted truth."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rim_lens as rl
from rim_lens.chat import ChatFormat
from rim_lens.errors import (
    AnswerError,
    ConditionError,
    MissingTwin,
    NotEnoughData,
    NotFinite,
    ReferenceMismatch,
    StatisticsError,
    StudyFolderError,
    UnknownNeuron,
    UnsupportedModel,
)
from rim_lens.lens import wrap_hf
from rim_lens.measures.controls import control_p, percentile_among, random_neurons_per_layer
from rim_lens.measures.forced import divergence_reading
from rim_lens.measures.held_out import chosen_by
from rim_lens.measures.neurons.beside import set_name
from rim_lens.measures.neurons.effects import NeuronEffects, neuron_effects
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.measures.readings import prefix_reading, refusal_reading
from rim_lens.measures.removing import removal_lines
from rim_lens.measures.stats import sign_flip_test
from rim_lens.measures.twins import families_by_swap
from rim_lens.organisms.planted import planted_truth
from rim_lens.organisms.toy.host import TOKEN, toy_tokenizer
from tests.families import FAMILIES, Oracle, tiny_moe
from tests.measures.refusal.test_direction import toy
from tests.speaking import REQUESTS, fresh, ids_of, toy_speaking

BOTH = "harmful − harmless"
TWINS = tuple(
    replace(one, id=f"t{one.id}", text=one.text.replace("make", "ban").replace("report", "find"))
    for one in REQUESTS
)
PAIRED = tuple(replace(one, twin=f"t{one.id}") for one in REQUESTS)


@cache
def asked(step: int = 3) -> tuple[list[rl.Prompt], list[rl.Prompt]]:
    harmful, harmless = (
        rl.load_prompts(kind, language="toy", split="evaluate")[::step] for kind in ("harmful", "harmless")
    )
    return harmful, harmless


@cache
def removed(which: str) -> NeuronEffects:
    neurons = getattr(planted_truth(), which)
    return neuron_effects(*toy("planted"), neurons, *asked(), n_random_sets=20 if which == "neurons" else 0)


@pytest.mark.family_contract
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", ["gpt2_gelu", "qwen3"])
def test_removing_is_zeroing_rows_of_w_out_in_the_plain_model(architecture: str, family: str) -> None:
    """The bias of the down-projection stays; one prompt at a time, no padding, no hooks."""
    model = fresh(architecture, family)
    chat = ChatFormat.from_model(model)
    neurons = [(0, 3), (0, 17), (1, 5)]
    found = neuron_effects(model, chat, neurons, PAIRED, TWINS, n_random_sets=2)
    controls = [[tuple(neuron) for neuron in control] for control in found.settings["controls"]]
    sets = [(), neurons, *controls]

    def scores(prompts: Any, removing: Any) -> np.ndarray:
        oracle, batch = Oracle(toy_speaking(architecture)), chat.render(prompts, think="off")
        for layer, neuron in removing:
            oracle.zero_rows(oracle.down_projection(layer), neuron, neuron + 1)
        values = []
        for row in range(len(batch)):
            tokens = torch.tensor([ids_of(batch, row)])
            chances = oracle.run(tokens, torch.ones_like(tokens)).logits[0, -1].double().softmax(dim=-1)
            values.append(float(chances[TOKEN["REFUSE"]].logit()))
        return np.array(values)

    own, twins = ([scores(prompts, removing) for removing in sets] for prompts in (PAIRED, TWINS))
    for kind, values in (
        ("harmful", own),
        ("harmless", twins),
        (BOTH, [one - other for one, other in zip(own, twins, strict=True)]),
    ):
        row = found.row("specificity" if kind == BOTH else "score", kind, "off")
        changes = [float((after - values[0]).mean()) for after in values[1:]]
        assert row["before"] == pytest.approx(values[0].mean(), abs=3e-5)
        assert row["change"] == pytest.approx(changes[0], abs=3e-5)
        assert abs(changes[0]) > 1e-3
        assert row["random"] == pytest.approx(np.mean(changes[1:]), abs=3e-5)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_planted_neurons_carry_refusal_and_neither_decoys_nor_random_ones_do() -> None:
    found = removed("neurons")
    assert found.verdict == "refusal"
    harmful, twins, gap = (
        found.row("score", "harmful", "off"),
        found.row("score", "harmless", "off"),
        found.row("specificity", BOTH, "off"),
    )
    assert harmful["change"] < -10
    assert abs(twins["change"]) < 1
    assert gap["change"] < -10
    assert harmful["before"] > 0 > harmful["after"]
    assert (harmful["percentile"], gap["percentile"], gap["n_controls"]) == (100, 100, 20)
    assert gap["p_controls"] == pytest.approx(1 / 21)
    assert -1 < harmful["random_low"] <= harmful["random_high"] < 1
    decoys = removed("decoy_neurons")
    assert abs(decoys.row("score", "harmful", "off")["change"]) < 2  # what noise they write, of 17


def test_every_number_by_hand_on_the_toy() -> None:
    model, chat = toy("toy")
    harmful, harmless = asked(9)
    reasoning = rl.load_prompts("reasoning", language="toy", split="evaluate")[::30]
    neurons = [(0, 4), (0, 90), (1, 17), (1, 200), (1, 201)]
    texts = ["find tree please + 1 1 1", "study song now - 3 1 0"]
    found = neuron_effects(
        model,
        chat,
        neurons,
        harmful,
        harmless,
        reasoning=reasoning,
        neutral_text=texts,
        written=True,
        n_written=1,
        n_random_sets=6,
        max_new_tokens=2,
        seed=3,
    )
    drawn = random_neurons_per_layer(neurons, 256, 6, 3)
    controls = [[tuple(neuron) for neuron in control] for control in found.settings["controls"]]
    assert sorted(controls) == sorted(drawn)
    off, twins = chat.render(harmful, think="off"), chat.render(harmless, think="off")

    def score(batch: Any, removing: Any) -> np.ndarray:
        editors = [rl.AblateNeurons(removing)] if removing else []
        return np.asarray(rl.refusal_score(model, batch, *editors).values)

    sets = [[], neurons, *controls]
    own, theirs = ([score(batch, removing) for removing in sets] for batch in (off, twins))
    row, gap = found.row("score", "harmful", "off"), found.row("specificity", BOTH, "off")
    families, swaps = [prompt.family for prompt in harmful], families_by_swap(harmful, harmless)
    assert len(set(swaps)) < len(set(families))
    for kind, (before, after, *_) in (("harmful", own), ("harmless", theirs)):
        line = found.row("score", kind, "off")
        assert line["n_families"] == len(set(swaps))
        assert line["p"] == pytest.approx(float(sign_flip_test(after - before, families=swaps, seed=3).p))
    changes = [float((values - own[0]).mean()) for values in own[1:]]
    assert row["percentile"] == percentile_among(changes[0], changes[1:]).percentile
    gaps = [one - other for one, other in zip(own, theirs, strict=True)]
    assert gap["n_families"] == len(set(swaps))
    assert gap["p"] == pytest.approx(float(sign_flip_test(gaps[1] - gaps[0], families=swaps, seed=3).p))
    sizes = [float((values - gaps[0]).mean()) for values in gaps[1:]]
    assert gap["p_controls"] == pytest.approx(control_p(sizes[0], sizes[1:]))
    out = rl.generate(model, off, rl.AblateNeurons(neurons), max_new_tokens=2)
    assert found.row("refuse", "harmful", "off")["after"] == pytest.approx(
        np.mean([one == "refuse" for one in out.outcome])
    )
    assert found.row("refuse", "harmful", "off")["n_controls"] == 1
    right = rl.generate(
        model, chat.render(reasoning, think="off"), rl.AblateNeurons(neurons), max_new_tokens=2
    )
    assert found.row("correct", "reasoning", "off")["after"] == pytest.approx(
        rl.reasoning_accuracy(right).value
    )
    kl = divergence_reading(model, chat.render(texts))([rl.AblateNeurons(neurons)])
    assert found.row("kl", "neutral", "text")["after"] == pytest.approx(kl.mean())
    assert found.row("kl", "neutral", "text")["n_controls"] == 6
    assert found.settings["neutral"] == "given texts"


def test_on_models_that_learnt_nothing_no_set_is_called_refusal() -> None:
    """Random weights in the toy's words: any neuron matters, none for refusal; and no set stands out among others."""
    verdicts, sizes = [], []
    for seed in range(2):
        model = fresh("llama", FAMILIES[0], seed)
        like = [(layer, neuron) for layer in range(3) for neuron in range(12)]
        neurons = random_neurons_per_layer(like, 40, 1, seed)[0]
        found = neuron_effects(
            model, ChatFormat.from_model(model), neurons, *asked(), n_random_sets=19, seed=seed
        )
        verdicts.append(found.verdict)
        sizes.append(abs(found.row("score", "harmful", "off")["change"]))
    assert not {"refusal", "not tested"} & set(verdicts), verdicts
    assert max(sizes) > 0.3


def test_verdicts_follow_the_stated_rule() -> None:
    found = removed("neurons")

    def changed(**rows: dict[str, float]) -> str:
        table = found.table.copy()
        for name, values in rows.items():
            measure, kind = {
                "own": ("score", "harmful"),
                "twins": ("score", "harmless"),
                "gap": ("specificity", BOTH),
            }[name]
            for column, value in values.items():
                table.loc[(table["measure"] == measure) & (table["kind"] == kind), column] = value
        return replace(found, table=table).verdict

    assert changed() == "refusal"
    assert changed(gap={"p_controls": 0.06}) == "like random"
    assert changed(gap={"p_controls": float("nan")}) == "like random"
    assert changed(gap={"p": 0.2}) == "general"
    assert changed(gap={"change": 5.0}) == "general"
    assert changed(own={"p": 0.2}) == "none"
    assert changed(own={"p": 0.2}, twins={"p": 0.01, "change": -2.0}) == "general"
    assert changed(gap={"n_controls": 18}) == "not tested"
    assert changed(gap={"n_families": 5}) == "not tested"
    assert changed(own={"p": float("nan")}) == "none"
    few = neuron_effects(*toy("planted"), planted_truth().neurons, *asked(12), n_random_sets=0)
    assert few.verdict == "not tested"
    bare = [[replace(one, twin=None, family=f"{one.kind} {one.family}") for one in kind] for kind in asked()]
    without = neuron_effects(*toy("planted"), planted_truth().neurons, *bare, n_random_sets=0)
    assert without.verdict == "not tested"
    assert "specificity" not in set(without.table["measure"])


def test_kept_gone_on_with_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, chat = toy("planted")
    neurons = planted_truth().neurons
    few: dict[str, Any] = {"n_random_sets": 3, "folder": tmp_path}
    first = neuron_effects(model, chat, neurons, *asked(12), **few)
    lines = (tmp_path / "neuron_effects/readings.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 2 * (3 + 2)
    (tmp_path / "neuron_effects/readings.jsonl").write_text("".join(lines[:-3]) + lines[-1][:40])
    measured, score = [], rl.refusal_score

    def counted(*arguments: Any, **settings: Any) -> Any:
        measured.append(1)
        return score(*arguments, **settings)

    monkeypatch.setitem(refusal_reading.__globals__, "refusal_score", counted)
    second = neuron_effects(model, chat, neurons, *asked(12), **few)
    assert len(measured) == 3
    assert first.table.equals(second.table)
    again = NeuronEffects.load(tmp_path)
    for name in ("table", "sets", "rows"):
        left, right = getattr(first, name), getattr(again, name)
        assert left.equals(right.astype(left.dtypes)), name
    assert again.settings == first.settings
    assert again.verdict == first.verdict == "not tested"
    assert "8 neurons in 1 layers" in repr(again)
    assert "<b>not tested</b>" in again._repr_html_()
    with pytest.raises(StudyFolderError, match="another study"):
        neuron_effects(model, chat, neurons[:3], *asked(12), **few)
    (tmp_path / "effects.json").write_text("{}")
    with pytest.raises(StudyFolderError, match="no readable result"):
        NeuronEffects.load(tmp_path)


def test_sets_of_neurons_with_what_they_know() -> None:
    model, chat = toy("planted")
    truth = planted_truth().neurons
    rng = np.random.default_rng(0)
    activity = rng.random((2, 256))
    near = [(0, int(place)) for place in np.argsort(activity[0])[:3]]
    found = NeuronSet(near, 2, 256, activity=activity)
    effects = neuron_effects(model, chat, found, *asked(12), n_random_sets=5, matched="activity")
    for control in effects.settings["controls"]:
        assert all(activity[0, neuron] < np.quantile(activity[0], 0.15) for _, neuron in control)
    measured = neuron_effects(model, chat, truth, *asked(12), n_random_sets=5, matched="activity")
    assert measured.settings["matched"] == "activity"
    assert measured.settings["controls"] != effects.settings["controls"]
    used = NeuronSet(truth, 2, 256, made_by=chosen_by(asked(12)[0][2:3]))
    with pytest.raises(StatisticsError, match="chose the neurons"):
        neuron_effects(model, chat, used, *asked(12))
    with pytest.raises(ReferenceMismatch, match="choose neurons of this model"):
        neuron_effects(model, chat, NeuronSet(truth, 3, 256), *asked(12))
    reading = neuron_effects(model, chat, truth, *asked(12), n_random_sets=2, readings=prefix_reading)
    expected = prefix_reading(model, chat.render(asked(12)[0], think="off"))
    row = reading.row("score", "harmful", "off")
    assert row["before"] == pytest.approx(expected().mean())
    assert row["after"] == pytest.approx(expected([rl.AblateNeurons(truth)]).mean())
    mean = neuron_effects(
        model, chat, truth, *asked(12), n_random_sets=0, method="mean", reference=chat.render(asked(12)[1])
    )
    batch = chat.render(asked(12)[0], think="off")
    editor = rl.AblateNeurons(truth, "mean", chat.render(asked(12)[1]))
    assert mean.row("score", "harmful", "off")["after"] == pytest.approx(
        float(rl.refusal_score(model, batch, editor).mean()), abs=1e-5
    )
    assert mean.verdict == "not tested"


def test_names_of_sets() -> None:
    assert set_name([(1, 3), (0, 2), (1, 3)]) == "L0N2+L1N3"
    many = [(0, neuron) for neuron in range(9)]
    assert set_name(many) == set_name(reversed(many)) != set_name([*many[:-1], (0, 9)])
    assert set_name(many).startswith("9 neurons in 1 layers:")


def test_bad_input_is_named_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chat = toy("planted")
    harmful, harmless = asked(12)
    truth = planted_truth().neurons

    def runs(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setitem(removal_lines.__globals__, "set_effects", runs)

    def call(neurons: Any = truth, *kinds: Any, **options: Any) -> None:
        neuron_effects(model, chat, neurons, *(kinds or (harmful, harmless)), **options)

    with pytest.raises(UnknownNeuron, match="no neuron was given"):
        call([])
    with pytest.raises(UnknownNeuron, match="no neuron was given"):
        call(NeuronSet([], 2, 256))
    with pytest.raises(UnknownNeuron, match="layers 0 to 1"):
        call([(0, 256)])
    with pytest.raises(UnknownNeuron, match="layers 0 to 1"):
        call([(0.0, 1)])
    with pytest.raises(NotEnoughData, match="no harmless requests"):
        call(truth, harmful, [])
    with pytest.raises(NotEnoughData, match="all 256 neurons"):
        call([(1, neuron) for neuron in range(256)])
    with pytest.raises(MissingTwin, match=r"1 of \d+ harmful requests have no twin"):
        call(truth, harmful, harmless[:-1])
    with pytest.raises(NotEnoughData, match="of 1 family"):
        call(truth, harmful[:1], harmless[:1])
    one_swap = [rl.Prompt(f"h{n}", f"make {what}") for n, what in enumerate(("lamp", "soup", "bread"))]
    benign = [rl.Prompt(f"b{n}", f"ban {what}") for n, what in enumerate(("lamp", "soup", "bread"))]
    with pytest.raises(NotEnoughData, match="one swap of words"):
        call(
            truth,
            [replace(one, twin=f"b{n}", family=f"f{n}") for n, one in enumerate(one_swap)],
            [replace(one, family=f"f{n}") for n, one in enumerate(benign)],
        )
    with pytest.raises(ConditionError, match="none of the conditions"):
        call(conditions=["open"])
    with pytest.raises(AnswerError, match="no checked answer"):
        call(reasoning=[replace(one, answer=None) for one in harmful])
    with pytest.raises(StatisticsError, match="n_random_sets=-1"):
        call(n_random_sets=-1)
    with pytest.raises(StatisticsError, match="matched='size'"):
        call(matched="size")
    with pytest.raises(ReferenceMismatch, match="take"):
        call(method="mean")
    with pytest.raises(NotEnoughData, match="list of texts"):
        call(neutral_text=[])
    with pytest.raises(StatisticsError, match="there are"):
        removed("neurons").verdict_in("careful")


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
@pytest.mark.skipif("bridge" not in FAMILIES, reason="mixtures of experts are wrapped by the bridge")
def test_mixtures_of_experts_have_no_neurons(architecture: str) -> None:
    model = tiny_moe(architecture)[0]
    with pytest.raises(UnsupportedModel, match="mixture of experts"):
        neuron_effects(model, toy("planted")[1], [(0, 1)], *asked(12))


def test_nan_never_passes() -> None:
    hf = toy_speaking("gpt2_relu")
    with torch.no_grad():
        hf.transformer.h[1].mlp.c_proj.weight[3, 4] = float("nan")
    model = wrap_hf(hf, toy_tokenizer())
    with pytest.raises(NotFinite):
        neuron_effects(model, ChatFormat.from_model(model), [(0, 1)], PAIRED, TWINS, n_random_sets=1)
