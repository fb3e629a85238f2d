"""Safety neurons where the truth is known, where there is none, and what is refused before anything is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.errors import (
    GateNotPassed,
    MissingIntent,
    NotEnoughData,
    StatisticsError,
    StudyFolderError,
    UnsupportedModel,
)
from rim_lens.measures.neurons import safety as safety_file
from rim_lens.measures.neurons.pairs import Pair, counterfactual_pairs
from rim_lens.measures.neurons.safety import safety_neurons
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.measures.twins import families_by_swap
from rim_lens.organisms.planted import planted_truth

HARMFUL, HARMLESS = (rl.load_prompts(kind, language="toy") for kind in ("harmful", "harmless"))
TWINS = [pair for pair in counterfactual_pairs(HARMFUL, HARMLESS, "twins") if pair.more.split is not None]
PAIRS = [pair for pair in TWINS if pair.more.split in ("select", "evaluate")][::5]
SELECT = [pair for pair in PAIRS if pair.more.split == "select"]


def planted(seed: int = 0) -> tuple[Any, rl.ChatFormat]:
    model = rl.load_model(f"planted:{seed}")
    return model, rl.ChatFormat.from_model(model)


@pytest.fixture(scope="module")
def found() -> NeuronSet:
    return safety_neurons(*planted(), PAIRS, m=8, scope="model", n_random_sets=20)


# --- where the truth is known ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("by", ["contrast", "effect_size", "gradient"])
def test_what_was_planted_is_found_exactly(seed: int, by: Any) -> None:
    if by == "effect_size":
        # Noise neurons of small and even rises have large d: it does not rank the planted ones first.
        chosen = safety_neurons(*planted(seed), SELECT, m=64, scope="model", by=by, test=False)
        assert set(planted_truth(seed).neurons) <= set(chosen)
        return
    chosen = safety_neurons(*planted(seed), SELECT, m=8, scope="model", by=by, test=False)
    assert chosen.neurons == planted_truth(seed).neurons
    assert chosen.effects is None


def test_the_sweep_shows_what_another_m_would_give(found: NeuronSet) -> None:
    truth = set(planted_truth().neurons)
    assert found.neurons == planted_truth().neurons
    rows = {(row["m"], row["min_fraction"]): row["size"] for row in found.made_by["sweep"]}
    assert rows[8, 1.0] == 8
    assert rows[4, 1.0] == 4
    for m, precision, recall in ((4, 1.0, 0.5), (8, 1.0, 1.0), (32, 0.6, 1.0)):
        chosen = set(safety_neurons(*planted(), SELECT, m=m, scope="model", test=False))
        assert rows[m, 1.0] == len(chosen)
        shared = len(chosen & truth)
        assert shared / 8 == recall
        assert shared / len(chosen) == precision if m < 32 else shared / len(chosen) <= precision


def test_it_is_tested_on_requests_that_did_not_choose_it(found: NeuronSet) -> None:
    assert found.effects.verdict == "refusal"
    tested = set(found.effects.rows["prompt"])
    assert tested == {form.id for p in PAIRS if p.more.split == "evaluate" for form in (p.less, p.more)}
    assert set(found.made_by["select_ids"]) == {form.id for p in SELECT for form in (p.less, p.more)}
    assert not tested & set(found.made_by["select_ids"])
    gate = found.made_by["gate"]
    assert gate["generated"] == {"less": 0.0, "more": 1.0}
    assert gate["score"]["difference"] > 5
    assert found.made_by["stability"]["jaccard"] == 1.0


def test_it_is_the_paper_s_rule_written_out() -> None:
    """Answers, activations and sets with loops: top m of each layer of each pair, and what all pairs share."""
    model = rl.load_model("toy")
    chat = rl.ChatFormat.from_model(model)
    pairs = SELECT[:6]
    found = safety_neurons(model, chat, pairs, m=20, test=False)
    pooled = []
    for pair in pairs:
        both = []
        for form in (pair.more, pair.less):
            written = rl.generate(model, chat.render([form], think="off"))
            _, cache = model.run_with_cache(written.batch.tokens)
            both.append([cache[f"blocks.{layer}.mlp.hook_post"][0, 1:].max(dim=0).values for layer in (0, 1)])
        pooled.append([(more - less).numpy() for more, less in zip(*both, strict=True)])
    shared = None
    for pair_rises in pooled:
        top = {
            (layer, int(neuron))
            for layer, rises in enumerate(pair_rises)
            for neuron in sorted(range(256), key=lambda j, r=rises: -r[j])[:20]
            if rises[neuron] > 0
        }
        shared = top if shared is None else shared & top
    assert set(found) == shared
    assert 0 < len(found) < 40
    mean = np.mean(pooled, axis=0)
    np.testing.assert_allclose(found.scores, mean, atol=1e-5)


# --- where there is no refusal -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_nothing_passes_where_labels_are_permuted(seed: int) -> None:
    """Half of the swaps of words exchange sides, on both sides of the split; the gate is off."""
    verbs = sorted({pair.more.text.split()[0] for pair in PAIRS})
    turned = set(np.random.default_rng(seed).permutation(verbs)[: len(verbs) // 2])
    pairs = [
        Pair(replace(p.less, text=p.more.text), replace(p.more, text=p.less.text), "twins")
        if p.more.text.split()[0] in turned
        else p
        for p in PAIRS
    ]
    found = safety_neurons(
        *planted(seed), pairs, m=8, scope="model", min_fraction=0.3, gate=False, n_random_sets=20
    )
    assert len(found)
    assert found.effects.verdict not in ("refusal", "not tested")
    assert not found.made_by["gate"]["asked"]
    with pytest.raises(GateNotPassed, match="gate=False"):
        safety_neurons(*planted(seed), pairs, test=False)


def test_the_gate_says_what_was_found() -> None:
    model, chat = planted()
    turned = [Pair(pair.more, pair.less) for pair in SELECT]
    with pytest.raises(GateNotPassed, match=r"-\d+\.\d+ nats.*0% of the more refused side"):
        safety_neurons(model, chat, turned, test=False)
    # Under a chain of thought this model refuses nothing.
    with pytest.raises(GateNotPassed, match="'careful'"):
        safety_neurons(model, chat, SELECT, think="careful", test=False)
    # Where it thinks for itself there is no score, and what it writes decides.
    with pytest.raises(GateNotPassed, match="'open'"):
        safety_neurons(model, chat, SELECT, think="open", test=False)
    # The prompt alone: by score.
    read = safety_neurons(model, chat, SELECT, response="none", m=8, scope="model", test=False)
    assert read.made_by["gate"]["generated"] is None
    # Signs are flipped by swapped words, of which there are fewer than conjunctions.
    swaps = set(families_by_swap([pair.more for pair in SELECT], [pair.less for pair in SELECT]))
    assert len(swaps) < len({pair.family for pair in SELECT})
    assert read.made_by["gate"]["score"]["finest"] == 2.0 ** -len(swaps)


def test_pairs_that_agree_on_nothing_give_an_empty_set_that_says_so() -> None:
    model, chat = planted()
    turned = [Pair(replace(p.more, twin=None), replace(p.less, twin=None)) for p in SELECT[::2]]
    mixed = [*turned, *SELECT[1::2], *(pair for pair in PAIRS if pair.more.split == "evaluate")]
    found = safety_neurons(model, chat, mixed, m=1, scope="model", gate=False)
    assert len(found) == 0
    assert found.effects is None
    assert "no neuron" in found.made_by["not_tested"]


# --- controls, folders, other requests ---------------------------------------------------------------


def test_neutral_sentences_choose_by_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy has no sentences; its filler word stands for the neutral one, and the harmful verb for intent."""
    model, chat = planted()
    pairs = [replace(pair, kind="intent") for pair in SELECT]

    def with_another_filler(prompts: Any, kind: str) -> list[Pair]:
        assert kind == "neutral"
        fillers = [prompt.text.split()[2] for prompt in prompts]
        words = ["well" if filler != "well" else "so" for filler in fillers]
        return [
            Pair(one, replace(one, id=one.id + "+neutral", text=one.text.replace(f" {old} ", f" {new} ")))
            for one, old, new in zip(prompts, fillers, words, strict=True)
        ]

    monkeypatch.setattr(safety_file, "counterfactual_pairs", with_another_filler)
    for by in ("contrast", "gradient"):
        found = safety_neurons(model, chat, pairs, m=8, scope="model", by=by, test=False)  # type: ignore[arg-type]
        neutral = found.made_by["neutral"]
        assert neutral["shared"] == 0
        assert neutral["size"] == len(neutral["neurons"])
        assert neutral["shared_by_chance"] < 0.5
    assert "skipped" in safety_neurons(model, chat, SELECT, m=8, scope="model", test=False).made_by["neutral"]
    monkeypatch.undo()
    with pytest.raises(MissingIntent):  # the true ones need the records' intent
        safety_neurons(model, chat, pairs, test=False)


def test_a_run_cut_short_goes_on_and_the_folder_holds_the_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: NeuronSet
) -> None:
    model, chat = planted()
    options: dict[str, Any] = {"m": 8, "scope": "model", "n_random_sets": 20, "folder": tmp_path}

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(safety_file, "neuron_effects", stop)
        with pytest.raises(KeyboardInterrupt):
            safety_neurons(model, chat, PAIRS, **options)
    assert NeuronSet.load(tmp_path) == found  # chosen, and not tested yet
    assert NeuronSet.load(tmp_path).effects is None
    with monkeypatch.context() as patch:
        patch.setattr("rim_lens.measures.neurons.reading.generate", stop)  # nothing is read again
        again = safety_neurons(model, chat, PAIRS, **options)
    back = NeuronSet.load(tmp_path)
    assert again == back == found
    assert back.made_by == again.made_by == found.made_by
    assert back.effects.verdict == "refusal"
    np.testing.assert_array_equal(back.activity, found.activity)  # type: ignore[arg-type]
    with pytest.raises(StudyFolderError, match="different: m"):
        safety_neurons(model, chat, PAIRS, **{**options, "m": 9})


def test_other_requests_can_test(found: NeuronSet) -> None:
    model, chat = planted()
    mine = safety_neurons(
        model, chat, SELECT, m=8, scope="model", harmful=HARMFUL, harmless=HARMLESS, n_random_sets=20
    )
    assert mine == found
    tested = set(mine.effects.rows["prompt"])
    assert tested == {p.id for p in (*HARMFUL, *HARMLESS) if p.split == "evaluate"}
    bare = [replace(p, split=None) for p in HARMFUL if p.split == "select"]
    twins = [replace(p, split=None) for p in HARMLESS if p.split == "select"]
    with pytest.raises(StatisticsError, match="never tested"):
        safety_neurons(model, chat, SELECT, harmful=bare, harmless=twins)


def test_strings_make_pairs_that_are_cut_by_pair() -> None:
    model, chat = planted()
    pairs = [(pair.less.text, pair.more.text) for pair in SELECT]
    found = safety_neurons(model, chat, pairs, m=8, scope="model", n_random_sets=20)
    assert found.neurons == planted_truth().neurons
    assert len(found.made_by["select_ids"]) in (len(pairs), len(pairs) + 1)
    assert found.effects.row("specificity", "harmful − harmless", "off")["change"] < -5


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"m": 0}, StatisticsError, "m=0"),
        ({"m": 257}, StatisticsError, "256 neurons"),
        ({"m": 513, "scope": "model"}, StatisticsError, "512 neurons"),
        ({"scope": "head"}, StatisticsError, "scope"),
        ({"by": "magic"}, StatisticsError, "magic"),
        ({"min_fraction": 0.0}, StatisticsError, "min_fraction"),
        ({"by": "effect_size", "min_fraction": 0.5}, StatisticsError, "no vote"),
        ({"by": "gradient", "think": "open"}, StatisticsError, "no answer is next"),
        ({"by": "gradient", "positions": "generated"}, StatisticsError, "before any is written"),
        ({"site": "mlp_out"}, UnsupportedModel, "no neurons"),
        ({"response": "theirs"}, StatisticsError, "theirs"),
        ({"think": "nonsense"}, ValueError, "nonsense"),
        ({"test": True}, NotEnoughData, "nothing to test on"),
        ({"test": True, "harmful": HARMFUL}, NotEnoughData, "no harmless"),
        ({"test": True, "harmful": HARMFUL[:1], "harmless": HARMLESS[:1]}, NotEnoughData, "two families"),
    ],
)
def test_what_is_impossible_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, options: Any, error: Any, said: str
) -> None:
    monkeypatch.setattr(safety_file, "pooled_activations", lambda *_, **__: pytest.fail("it read"))
    with pytest.raises(error, match=said):
        safety_neurons(*planted(), SELECT, **{"test": False, **options})


def test_pairs_with_intent_need_twins_to_test_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safety_file, "pooled_activations", lambda *_, **__: pytest.fail("it read"))
    pairs = [replace(pair, kind="intent") for pair in PAIRS]
    with pytest.raises(NotEnoughData, match="both forms"):
        safety_neurons(*planted(), pairs)


def test_a_mixture_of_experts_has_no_neurons_here(monkeypatch: pytest.MonkeyPatch) -> None:
    model, chat = planted(9)
    monkeypatch.setattr(model.cfg, "num_experts", 4, raising=False)
    with pytest.raises(UnsupportedModel, match="mixture of experts"):
        safety_neurons(model, chat, SELECT, test=False)
