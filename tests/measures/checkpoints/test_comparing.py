"""Checkpoints compared: each number against measuring that one model by itself, and one model in memory at a time."""

from __future__ import annotations

import gc
import math
import shutil
import weakref

import numpy as np
import pytest

import rim_lens as rl
from rim_lens.errors import AnswerError, NotEnoughData, StatisticsError, StudyFolderError
from rim_lens.measures.checkpoints import comparing
from rim_lens.measures.checkpoints.ending import at_the_end
from rim_lens.measures.twins import families_by_swap
from rim_lens.organisms.toy.recipe import FINE_TUNE, toy_rows
from rim_lens.training import FineTuned

NEURONS = [(0, 3), (0, 9), (1, 7), (1, 20)]
OPTIONS = {"neurons": NEURONS, "n_random_sets": 5, "n_boot": 10, "max_new_tokens": 12}


def requests(n=8):
    return [
        rl.load_prompts(kind, language="toy", split="evaluate")[::5][:n]
        for kind in ("harmful", "harmless", "reasoning")
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        kind: rl.fine_tune(
            "toy",
            toy_rows(kind),
            out=folder / kind,
            config=FINE_TUNE,
            steps=24,
            checkpoints=2,
            lora=None,
            progress=False,
        )
        for kind in ("careful", "deviate")
    }


@pytest.fixture(scope="module")
def found(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    return rl.compare(runs, None, *requests(), folder=folder, **OPTIONS), folder


def test_each_row_is_what_measuring_that_model_alone_gives(found, runs):
    comparison, _ = found
    harmful, harmless, reasoning = requests()
    run = runs["deviate"]
    base, tuned = rl.load_model("toy"), rl.load_model(run.checkpoints[-1])
    chat = rl.ChatFormat.from_model(base)
    row = comparison.row("deviate", 24)
    scores = [float(rl.refusal_score(model, chat.render(harmful)).mean()) for model in (base, tuned)]
    assert row["score_harmful"] == pytest.approx(scores[1], abs=1e-5)
    assert row["lost"] == pytest.approx(scores[0] - scores[1], abs=1e-5)
    out = rl.generate(tuned, chat.render(harmless))
    assert row["refused_harmless"] == rl.refusal_rate(out).value
    right = rl.reasoning_accuracy(rl.generate(tuned, chat.render(reasoning, think="open"), max_new_tokens=12))
    assert row["accuracy_open"] == right.value
    assert row["weight_drift"] == pytest.approx(run.drift[-1], rel=1e-4)
    alone = rl.entanglement(
        "toy",
        str(run.checkpoints[-1]),
        chat,
        harmful,
        reasoning,
        NEURONS,
        harmless=harmless,
        n_random_sets=5,
        n_boot=10,
        max_new_tokens=12,
    )
    for metric, of, column in (
        ("ras", "set", "ras"),
        ("ras", "all", "ras_all"),
        ("kl", "model", "kl"),
        ("cka_ratio", "model", "cka_ratio_model"),
    ):
        np.testing.assert_allclose(row[column], alone.value(metric, of), rtol=1e-5)
    assert row["ras_p"] == alone.row("ras")["p"]
    assert row["ras_random"] == pytest.approx(alone.row("ras")["random"])


def test_twins_that_swap_the_same_words_are_one_family(found):
    lines = found[0].prompts
    harmful, harmless, _ = requests()
    words = families_by_swap(harmful, harmless)
    assert len(set(words)) < len({prompt.family for prompt in harmful})
    for kind in ("harmful", "harmless"):
        assert lines[(lines["kind"] == kind) & (lines["step"] == 24)]["family"].tolist() == words * 2
    ends = at_the_end(found[0]).set_index("run").loc["deviate"]
    assert ends["lost_families"] == ends["lost_rate_harmless_families"] == len(set(words))


def test_pairs_that_chose_give_the_p_of_entanglement_with_them(runs, tmp_path, monkeypatch):
    """And are read once, in the base."""
    harmful, harmless, reasoning = requests(4)
    sides = [rl.load_prompts(kind, language="toy", split="select")[::6] for kind in ("harmful", "harmless")]
    pairs = rl.counterfactual_pairs(*sides, "twins")
    one, asked = {"deviate": runs["deviate"]}, (None, harmful, harmless, reasoning)
    found = rl.compare(one, *asked, pairs=pairs, folder=tmp_path, **OPTIONS)
    alone = rl.entanglement(
        "toy",
        str(runs["deviate"].checkpoints[-1]),
        None,
        harmful,
        reasoning,
        NEURONS,
        harmless=harmless,
        pairs=pairs,
        n_random_sets=5,
        n_boot=10,
        max_new_tokens=12,
    )
    assert found.row("deviate", 24)["ras_p"] == alone.row("ras")["p"]
    monkeypatch.setattr(comparing, "opened", lambda *_: pytest.fail("loaded again"))
    again = rl.compare(one, *asked, pairs=pairs, folder=tmp_path, **OPTIONS)
    assert again.row("deviate", 24)["ras_p"] == alone.row("ras")["p"]
    with pytest.raises(StatisticsError, match="chose"):
        rl.compare(one, *asked, pairs=rl.counterfactual_pairs(harmful, harmless, "twins"), **OPTIONS)


def test_the_base_stands_at_step_0_of_every_run_with_nothing_moved(found):
    comparison, _ = found
    assert comparison.runs == ["careful", "deviate"]
    assert comparison.table["step"].tolist() == [0, 12, 24] * 2
    for run in comparison.runs:
        row = comparison.row(run, 0)
        assert [row[name] for name in ("lost", "lost_rate", "ras", "kl", "weight_drift")] == [0.0] * 5
        assert row["refused_harmful"] == 1.0
        assert math.isnan(row["ras_p"])
    assert set(comparison.random["set"]) == set(range(5))
    assert len(comparison.prompts) == 6 * 24
    with pytest.raises(StatisticsError, match=r"steps \[0, 12, 24\]"):
        comparison.row("careful", 13)


def test_a_comparison_comes_back_from_disk(found):
    comparison, folder = found
    again = rl.Comparison.load(folder)
    for frame in ("table", "random", "prompts"):
        np.testing.assert_array_equal(
            comparison.to_dataframe(frame).to_numpy(dtype=str), again.to_dataframe(frame).to_numpy(dtype=str)
        )
    assert "careful" in repr(again)
    assert "<table>" in again._repr_html_()
    (folder / "comparison.json").write_text("{")
    with pytest.raises(StudyFolderError, match="no readable result"):
        rl.Comparison.load(folder)
    comparison.save(folder)


def test_what_is_measured_is_not_measured_again(found, runs, monkeypatch):
    comparison, folder = found
    monkeypatch.setattr(comparing._Reader, "_measure", lambda *_: pytest.fail("measured again"))
    again = rl.compare(runs, None, *requests(), folder=folder, **OPTIONS)
    np.testing.assert_array_equal(comparison.table.to_numpy(dtype=str), again.table.to_numpy(dtype=str))
    with pytest.raises(StudyFolderError, match="neurons"):
        rl.compare(runs, None, *requests(), folder=folder, **OPTIONS | {"neurons": [(0, 1)]})


def test_killed_in_the_middle_of_a_model_and_taken_up_again_gives_the_same(runs, tmp_path, monkeypatch):
    asked, one = requests(3), {"deviate": runs["deviate"]}
    expected = rl.compare(one, None, *asked, folder=tmp_path / "whole", **OPTIONS)
    real, n = comparing.read_model, 0

    def killed(*args, **options):
        nonlocal n
        n += 1
        if n == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(comparing, "read_model", killed)
    with pytest.raises(KeyboardInterrupt):
        rl.compare(one, None, *asked, folder=tmp_path / "cut", **OPTIONS)
    monkeypatch.undo()
    measured, measure = [], comparing._Reader._measure
    monkeypatch.setattr(
        comparing._Reader, "_measure", lambda *args: (measured.append(args[3]), measure(*args))
    )
    again = rl.compare(one, None, *asked, folder=tmp_path / "cut", **OPTIONS)
    assert measured == ["000-deviate/001"]
    for frame in ("table", "random", "prompts"):
        np.testing.assert_array_equal(
            expected.to_dataframe(frame).to_numpy(dtype=str), again.to_dataframe(frame).to_numpy(dtype=str)
        )


def test_one_model_is_in_memory_at_a_time():
    alive = []

    def loading(name):
        def load():
            gc.collect()
            assert not [one for one in alive if one() is not None]
            model = rl.load_model(name)
            alive.append(weakref.ref(model))
            return model

        return load

    names = ["toy", "toy:careful", "toy:deviate"]
    rl.compare([loading(name) for name in names], None, *requests(4), accuracy=(), response="none", **OPTIONS)
    gc.collect()
    assert len(alive) == 3
    assert not [one for one in alive if one() is not None]


def test_drift_matched_and_forecast_and_correlations_are_of_the_rows(found):
    comparison, _ = found
    matched = comparison.drift_matched("deviate", "careful").set_index("step")
    ours, theirs = ([comparison.row(run, step) for step in (0, 12, 24)] for run in ("deviate", "careful"))
    share = np.interp(ours[1]["weight_drift"], [row["weight_drift"] for row in theirs], [0.0, 1.0, 2.0])
    expected = np.interp(share, [0, 1, 2], [row["lost"] for row in theirs])
    assert matched.loc[12, "lost_control"] == pytest.approx(expected)
    assert matched.loc[12, "lost_difference"] == pytest.approx(ours[1]["lost"] - expected)
    assert matched.loc[12, "lost_low"] <= matched.loc[12, "lost_difference"] <= matched.loc[12, "lost_high"]
    assert set(comparison.correlations()["metric"]) >= {"ras", "kl", "weight_drift", "ras_all"}
    line = comparison.correlations("ras").set_index("how").loc["pooled"]
    assert line["n_random"] == 5
    assert "2 runs" in line["reason"]
    assert "4 runs" in comparison.forecast(1, "ras")["reason"].iloc[0]
    with pytest.raises(StatisticsError, match="give 1 to 1"):
        comparison.forecast(2)
    with pytest.raises(StatisticsError, match="weights, kl"):
        comparison.drift_matched("deviate", "careful", by="steps")


def test_joined_comparisons_keep_their_groups(found):
    comparison, _ = found
    both = rl.Comparison.joined({"seed 0": comparison, "seed 1": comparison})
    assert both.runs == [f"seed {seed}/{kind}" for seed in (0, 1) for kind in ("careful", "deviate")]
    pooled = both.correlations("ras").set_index("how").loc["pooled"]
    assert pooled["n"] == 8
    assert "4 ways" in pooled["reason"]  # exchanged within each base only
    assert both.row("seed 1/deviate", 24)["ras"] == comparison.row("deviate", 24)["ras"]


@pytest.mark.parametrize(
    ("models", "options", "error", "said"),
    [
        ([], {}, StatisticsError, "none was given"),
        (["toy"], {}, NotEnoughData, "no checkpoint"),
        ({"a": ["toy:careful"]}, {}, StatisticsError, "base="),
        (["toy", "x/step-3", "y/step-3"], {}, StatisticsError, "once"),
        (["toy", "toy:careful"], {"neurons": []}, NotEnoughData, "empty set"),
        (["toy", "toy:careful"], {"n_boot": 0}, StatisticsError, "n_boot"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(monkeypatch, models, options, error, said):
    monkeypatch.setattr(comparing, "opened", lambda *_: pytest.fail("loaded"))
    with pytest.raises(error, match=said):
        rl.compare(models, None, *requests(2), **OPTIONS | options)


def test_questions_without_answers_are_refused_where_accuracy_is_asked_for():
    harmful, harmless, _ = requests(2)
    with pytest.raises(AnswerError, match="accuracy="):
        rl.compare(["toy", "toy:careful"], None, harmful, harmless, ["make bread please + 3 4 6"], **OPTIONS)


def test_runs_of_two_bases_are_refused(runs):
    other = FineTuned(
        **{
            name: getattr(runs["careful"], name)
            for name in ("folder", "steps", "losses", "drift", "stopped_by", "settings")
        },
        base="toy:C",
    )
    with pytest.raises(StatisticsError, match="toy, toy:C"):
        rl.compare({"a": runs["careful"], "b": other}, None, *requests(2), **OPTIONS)


TINY = {"neurons": [(1, 3)], "response": "none", "n_boot": 5, "n_random_sets": 2, "accuracy": ()}


def test_other_weights_in_the_same_folder_are_refused(runs, tmp_path):
    step = tmp_path / "run" / "step-24"
    shutil.copytree(runs["careful"].checkpoints[-1], step)
    asked, kept = requests(3), tmp_path / "compared"
    rl.compare(["toy", str(step)], None, *asked, folder=kept, **TINY)
    shutil.rmtree(step)
    shutil.copytree(runs["deviate"].checkpoints[-1], step)
    with pytest.raises(StudyFolderError, match="another study"):
        rl.compare(["toy", str(step)], None, *asked, folder=kept, **TINY)


def test_given_models_are_known_by_their_weights(tmp_path):
    base, careful, deviate = (rl.load_model(name) for name in ("toy", "toy:careful", "toy:deviate"))
    asked = requests(3)
    first = rl.compare([base, careful], None, *asked, folder=tmp_path, **TINY)
    assert rl.compare([base, careful], None, *asked, folder=tmp_path, **TINY).table.equals(first.table)
    with pytest.raises(StudyFolderError, match="another study"):
        rl.compare([base, deviate], None, *asked, folder=tmp_path, **TINY)
    loads = tmp_path / "loads"
    rl.compare(["toy", lambda: careful], None, *asked, folder=loads, **TINY)
    rl.compare(["toy", lambda: careful], None, *asked, folder=loads, **TINY)
    with pytest.raises(StudyFolderError, match="loads others"):
        rl.compare(["toy", lambda: deviate], None, *asked, folder=loads, **TINY)


def test_other_words_under_the_same_ids_are_refused(tmp_path):
    harmful, harmless, reasoning = requests(6)
    plain = [[one.text for one in side] for side in (harmful, harmless)]
    models = ["toy", "toy:careful"]
    rl.compare(models, None, *(side[:3] for side in plain), reasoning[:3], folder=tmp_path, **TINY)
    with pytest.raises(StudyFolderError, match="prompts"):
        rl.compare(models, None, *(side[3:] for side in plain), reasoning[:3], folder=tmp_path, **TINY)


def test_a_comparison_and_its_models_may_be_moved(runs, tmp_path, monkeypatch):
    shutil.copytree(runs["careful"].folder, tmp_path / "here" / "careful")
    asked = requests(3)
    before = rl.compare(
        FineTuned.load(tmp_path / "here" / "careful"), None, *asked, folder=tmp_path / "here" / "cmp", **TINY
    )
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setattr(comparing, "read_model", lambda *_, **__: pytest.fail("measured again"))
    after = rl.compare(
        FineTuned.load(tmp_path / "there" / "careful"),
        None,
        *asked,
        folder=tmp_path / "there" / "cmp",
        **TINY,
    )
    assert after.table.drop(columns="model").equals(before.table.drop(columns="model"))


def test_a_run_of_another_base_is_refused(runs, tmp_path):
    with pytest.raises(StatisticsError, match="began with 'toy'"):
        rl.compare(runs, None, *requests(3), base="toy:careful", **TINY)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "toy"}')
    with pytest.raises(StatisticsError, match="began with 'toy'"):
        rl.compare(["toy:careful", str(tmp_path)], None, *requests(3), **TINY)
