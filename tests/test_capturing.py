"""Capture against direct caching, one prompt at a time; and what happens when it is cut short."""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import rim_lens as rl
from rim_lens import capture_store, capturing
from rim_lens.chat import SpanBatch
from rim_lens.chat.spans import Spans
from rim_lens.errors import CaptureError, EmptySpan, NotFinite, TrainingMode
from rim_lens.hooks import (
    AblateHeads,
    AttentionRows,
    Component,
    HeadOutputs,
    NeuronActivations,
    ResidualStream,
    SpanAttention,
)
from rim_lens.lens import Model, ModelFacts, hook_name, hooked
from rim_lens.prompts.records import Prompt
from tests.families import FAMILIES, Case, close, random_batch
from tests.speaking import REQUESTS, Spoken, fresh, ids_of, speaker

COT = "3 4 > 0 6 > 6"
N_PROMPTS = 7


def some(seed: int = 5, **options: Any) -> SpanBatch:
    """Seven prompts of unequal length, labelled."""
    batch = random_batch(seed=seed, n_prompts=N_PROMPTS, **options)
    prompts = tuple(
        Prompt(
            id=f"p{row}",
            text="",
            category=f"c{row % 3}",
            family=f"f{row % 2}",
            kind=("harmful", "harmless")[row % 2],
        )
        for row in range(N_PROMPTS)
    )
    return replace(batch, prompts=prompts)


def hooks_on(model: Any) -> int:
    return sum(len(point.fwd_hooks) for point in model.hook_dict.values())


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Lengths of the prompts in each forward pass that capture makes."""
    seen: list[list[int]] = []
    plain = capturing.last_logits

    def counting(model: Model, tokens: Tensor, mask: Tensor, **options: Any) -> Tensor:
        seen.append(mask.sum(dim=1).tolist())
        return plain(model, tokens, mask, **options)

    monkeypatch.setattr(capturing, "last_logits", counting)
    return seen


class StopsAt(Component):
    """Raises when the pass of that number begins; `count` and `what` belong to the test, not to the settings."""

    def __init__(self) -> None:
        super().__init__()
        self._count = 0
        self._at: int | None = None
        self._act: Callable[[], None] = lambda: None

    def arm(self, at: int, act: Callable[[], None]) -> StopsAt:
        self._count, self._at, self._act = 0, at, act
        return self

    def disarm(self) -> StopsAt:
        self._at = None
        return self

    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Any]]:
        return [(hook_name("resid_pre", 0), self._look)]

    def _look(self, tensor: Tensor) -> None:
        self._count += 1
        if self._count == self._at:
            self._act()


def raises(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


# --- the numbers -----------------------------------------------------------------------------------------


@pytest.mark.family_contract
def test_as_cached_directly_one_prompt_at_a_time(case: Case) -> None:
    batch = some()
    readers = (
        SpanAttention(["sink", "request", "think", "answer"]),
        NeuronActivations(),
        ResidualStream(),
        HeadOutputs("mean", "request"),
    )
    data = rl.capture(case.model, batch, *readers, max_rows=3)
    for row in range(len(batch)):
        ids = torch.tensor([ids_of(batch, row)])
        real = batch.attention_mask[row].bool()
        with torch.no_grad():
            _, cache = case.model.run_with_cache(ids)
        for layer in range(case.facts.n_layers):
            here = data.isel(prompt=row, layer=layer)
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0]
            for name in ("sink", "request", "think", "answer"):
                keys = batch.spans[name][row][real]
                close(
                    torch.tensor(here["attention_mass"].sel(span=name).values),
                    pattern[:, -1, keys].sum(dim=-1),
                )
            post = cache[f"blocks.{layer}.mlp.hook_post"][0, 1:]
            close(torch.tensor(here["neuron_activation"].values), post.amax(dim=0), 3e-5)
            residual = cache[f"blocks.{layer}.hook_resid_post"][0, -1]
            close(torch.tensor(here["residual"].values), residual, 3e-5)
            z = cache[f"blocks.{layer}.attn.hook_z"][0][batch.spans["request"][row][real]]
            close(torch.tensor(here["head_output"].values), z.mean(dim=0), 3e-5)


def test_batched_equals_one_by_one(case_gqa: Case) -> None:
    batch = some()
    readers = (SpanAttention(), NeuronActivations("mean"), AttentionRows([(1, 2), (0, 0)]))
    whole = rl.capture(case_gqa.model, batch, *readers)
    for limits in ({"max_rows": 1}, {"max_rows": 2}, {"max_tokens": 30}, {"max_tokens": 1}):
        xr.testing.assert_allclose(
            rl.capture(case_gqa.model, batch, *readers, **limits), whole, rtol=1e-5, atol=1e-5
        )


def test_prompts_run_by_length_and_come_back_in_order(case_gqa: Case, passes: list[list[int]]) -> None:
    batch = some()
    data = rl.capture(case_gqa.model, batch, SpanAttention(["request"]), max_rows=2)
    assert [max(lengths) for lengths in passes] == sorted(batch.lengths.tolist(), reverse=True)[::2]
    assert sum(map(len, passes)) == N_PROMPTS
    assert data["prompt"].values.tolist() == [f"p{row}" for row in range(N_PROMPTS)]
    backwards = rl.capture(
        case_gqa.model, batch.select(range(N_PROMPTS)[::-1]), SpanAttention(["request"]), max_rows=2
    )
    xr.testing.assert_allclose(backwards.sel(prompt=data["prompt"]), data, rtol=1e-5, atol=1e-6)


def test_labels(case_gqa: Case) -> None:
    batch = some()
    data = rl.capture(case_gqa.model, batch, SpanAttention(["request", "think"]), NeuronActivations())
    facts = case_gqa.facts
    assert data["attention_mass"].dims == ("prompt", "layer", "head", "span")
    assert data["neuron_activation"].dims == ("prompt", "layer", "neuron")
    assert dict(data.sizes) == {
        **{"prompt": N_PROMPTS, "layer": facts.n_layers, "head": facts.n_heads, "span": 2},
        "neuron": facts.d_mlp,
    }
    assert data["span"].values.tolist() == ["request", "think"]
    assert data["layer"].values.tolist() == list(range(facts.n_layers))
    assert data["n_tokens"].values.tolist() == batch.lengths.tolist()
    for row, prompt in enumerate(batch.prompts):
        for label in ("category", "family", "kind"):
            assert data[label].values[row] == getattr(prompt, label)
    assert data["attention_mass"].attrs["units"] == "share"
    assert data["neuron_activation"].attrs["pool"] == "max"
    assert data.attrs["condition"] == "cot"
    assert data.attrs["weights_digest"] == rl.weights_digest(case_gqa.model)
    assert data.attrs["prompts_digest"] == batch.digest
    assert json.loads(data.attrs["model"])["n_heads"] == facts.n_heads
    assert data.attrs["transformer_lens"]
    assert "SpanAttention" in data.attrs["readers"]


def test_the_condition_is_the_label(spoken_gqa: Spoken) -> None:
    batch = spoken_gqa.chat.render(REQUESTS, think=COT, label="careful")
    data = rl.capture(spoken_gqa.model, batch, SpanAttention())
    assert (data.attrs["condition"], data.attrs["think"], data.attrs["chat_format"]) == (
        "careful",
        "cot",
        "toy",
    )


def test_masks_follow_their_prompts_whatever_runs_together(case_gqa: Case) -> None:
    batch = some()
    mask = batch.spans["answer"] | batch.spans["cot"]
    named = rl.capture(
        case_gqa.model, batch, NeuronActivations("max", mask), SpanAttention(["request"], query=mask)
    )
    for limits in ({"max_rows": 2}, {"max_rows": 3}):
        readers = (NeuronActivations("max", mask), SpanAttention(["request"], query=mask))
        data = rl.capture(case_gqa.model, batch, *readers, **limits)
        xr.testing.assert_allclose(data, named, rtol=1e-5, atol=1e-5)
        assert readers[0].positions is mask
    for row in range(N_PROMPTS):
        ids = torch.tensor([ids_of(batch, row)])
        with torch.no_grad():
            _, cache = case_gqa.model.run_with_cache(ids)
        post = cache["blocks.1.mlp.hook_post"][0][mask[row][batch.attention_mask[row].bool()]]
        close(torch.tensor(named["neuron_activation"].values[row, 1]), post.amax(dim=0), 3e-5)


def test_editors_are_active_while_reading(case_gqa: Case) -> None:
    """The same as zeroing by hand at z, and reading from the cache of that pass."""
    batch, heads = some(), [(0, 1), (1, 4)]
    data = rl.capture(
        case_gqa.model,
        batch,
        NeuronActivations(),
        AblateHeads(heads),
        HeadOutputs("last"),
        SpanAttention(["request"]),
        max_rows=3,
    )

    def zero(z: Tensor, hook: Any, head: int) -> Tensor:
        z = z.clone()
        z[:, :, head] = 0
        return z

    hooks = [(f"blocks.{layer}.attn.hook_z", functools.partial(zero, head=head)) for layer, head in heads]
    for row in range(N_PROMPTS):
        ids = torch.tensor([ids_of(batch, row)])
        with torch.no_grad(), case_gqa.model.hooks(fwd_hooks=hooks):
            _, cache = case_gqa.model.run_with_cache(ids)
        keys = batch.spans["request"][row][batch.attention_mask[row].bool()]
        for layer in range(2):
            post = cache[f"blocks.{layer}.mlp.hook_post"][0, 1:].amax(dim=0)
            close(torch.tensor(data["neuron_activation"].values[row, layer]), post, 3e-5)
            mass = cache[f"blocks.{layer}.attn.hook_pattern"][0, :, -1, keys].sum(dim=-1)
            close(torch.tensor(data["attention_mass"].values[row, layer, :, 0]), mass)
    assert not data["head_output"].values[:, 0, 1].any()
    assert not data["head_output"].values[:, 1, 4].any()
    assert data["head_output"].values[:, 1, 1].any()
    plain = rl.capture(case_gqa.model, batch, NeuronActivations())
    assert not np.allclose(plain["neuron_activation"], data["neuron_activation"], atol=1e-3)
    assert "AblateHeads" in data.attrs["editors"]
    assert plain.attrs["editors"] == "[]"


# --- what is refused, before any pass --------------------------------------------------------------------


def test_what_cannot_be_labelled_is_refused(case_gqa: Case, passes: list[list[int]]) -> None:
    batch, model = some(), case_gqa.model
    before = hooks_on(model)
    with pytest.raises(CaptureError, match="no reader"):
        rl.capture(model, batch)
    with pytest.raises(CaptureError, match="no reader"):
        rl.capture(model, batch, AblateHeads([(0, 1)]))
    with pytest.raises(CaptureError, match="two readers give 'attention_mass'"):
        rl.capture(model, batch, SpanAttention(["request"]), SpanAttention(["answer"]))
    once = SpanAttention(["request"])
    with pytest.raises(CaptureError, match="two readers"):
        rl.capture(model, batch, once, once)
    twins = replace(batch, prompts=(batch.prompts[0], *batch.prompts[:6]))
    with pytest.raises(CaptureError, match="'p0' occurs more than once"):
        rl.capture(model, twins, SpanAttention())
    with pytest.raises(EmptySpan, match="gap"):
        rl.capture(model, batch, SpanAttention(["gap"]))
    with pytest.raises(EmptySpan, match="gap"):
        rl.capture(model, batch, NeuronActivations("max", "gap"))
    assert passes == []
    assert hooks_on(model) == before


def test_nothing_is_written_where_the_arguments_are_refused(case_gqa: Case, tmp_path: Path) -> None:
    with pytest.raises(EmptySpan):
        rl.capture(case_gqa.model, some(), SpanAttention(["gap"]), out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_training_mode_is_refused() -> None:
    model = fresh("qwen3", FAMILIES[0])
    model.train()
    with pytest.raises(TrainingMode):
        rl.capture(model, some(), SpanAttention())


# --- on disk ---------------------------------------------------------------------------------------------

READERS = (
    lambda: SpanAttention(["request", "think"]),
    lambda: NeuronActivations("max", "answer"),
    lambda: AttentionRows([(1, 2)]),
)


def readers() -> list[Any]:
    return [make() for make in READERS]


def same(found: xr.Dataset, expected: xr.Dataset) -> None:
    """Equal numbers (as far as padding allows), labels, attributes."""
    xr.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert list(found.data_vars) == list(expected.data_vars)
    assert set(found.coords) == set(expected.coords)
    for name in (*expected.data_vars, *expected.coords):
        assert found[name].dims == expected[name].dims
        assert found[name].dtype.kind in {"U": "UO"}.get(expected[name].dtype.kind, expected[name].dtype.kind)
        assert set(found[name].attrs) == set(expected[name].attrs)
        for key, value in expected[name].attrs.items():
            assert np.array_equal(found[name].attrs[key], value)
    assert {k: v for k, v in found.attrs.items() if k != "fingerprint"} == {
        key: value for key, value in expected.attrs.items() if key != "fingerprint"
    }


def test_memory_equals_disk(case_gqa: Case, tmp_path: Path) -> None:
    batch = some()
    in_memory = rl.capture(case_gqa.model, batch, *readers(), max_rows=3)
    with rl.capture(case_gqa.model, batch, *readers(), out=tmp_path, max_rows=3) as on_disk:
        same(on_disk, in_memory)
        xr.testing.assert_equal(on_disk, in_memory)  # the same passes: to the last bit
        assert on_disk["attention_argmax"].dtype == np.int8
        assert on_disk["attention_argmax_pos"].dtype == on_disk["visible_keys"].dtype == np.int32
    assert [path.name for path in tmp_path.iterdir()] == ["capture.nc"]
    with xr.open_dataset(tmp_path / "capture.nc", engine="h5netcdf") as plainly:
        xr.testing.assert_equal(plainly.drop_vars("stored"), in_memory)  # plain netCDF, no rim_lens needed


def test_called_again_it_reads_and_does_not_run(
    case_gqa: Case, tmp_path: Path, passes: list[list[int]]
) -> None:
    batch = some()
    with rl.capture(case_gqa.model, batch, *readers(), out=tmp_path) as first:  # not read into memory yet
        n_passes = len(passes)
        stamp = (tmp_path / "capture.nc").stat().st_mtime_ns
        with rl.capture(case_gqa.model, batch, *readers(), out=tmp_path) as second:
            xr.testing.assert_identical(first.load(), second.load())
    assert len(passes) == n_passes
    assert (tmp_path / "capture.nc").stat().st_mtime_ns == stamp
    with rl.open_capture(tmp_path) as third:
        xr.testing.assert_identical(third, second)


@pytest.mark.parametrize(
    "error", [RuntimeError("power"), KeyboardInterrupt()], ids=["exception", "interrupt"]
)
def test_cut_short_it_goes_on_where_it_stopped(
    case_gqa: Case, tmp_path: Path, passes: list[list[int]], error: BaseException
) -> None:
    batch, model, stop = some(), case_gqa.model, StopsAt()
    whole = rl.capture(model, batch, *readers(), stop, max_rows=2)
    passes.clear()
    before = hooks_on(model)
    with pytest.raises(type(error)):
        rl.capture(model, batch, *readers(), stop.arm(3, raises(error)), out=tmp_path, max_rows=2)
    assert hooks_on(model) == before
    assert stop._batch is None
    with pytest.raises(CaptureError, match=r"4 of 7 prompts.*cut short"):
        rl.open_capture(tmp_path)
    longest_first = sorted(batch.lengths.tolist(), reverse=True)
    assert sorted(length for lengths in passes[:2] for length in lengths) == sorted(longest_first[:4])

    passes.clear()
    with rl.capture(model, batch, *readers(), stop.disarm(), out=tmp_path, max_rows=2) as data:
        same(data, whole)
    assert sorted(length for lengths in passes for length in lengths) == sorted(longest_first[4:])


def test_killed_it_goes_on_where_it_stopped(tmp_path: Path, passes: list[list[int]]) -> None:
    """No clean-up at all: the process is gone in the middle of the third pass."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    batch, model, stop = some(), speaker("qwen3", FAMILIES[0]).model, StopsAt()
    whole = rl.capture(model, batch, *readers(), stop, max_rows=2)

    def child() -> None:
        gone = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        rl.capture(model, batch, *readers(), stop.arm(3, gone), out=tmp_path, max_rows=2)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    passes.clear()
    with rl.capture(model, batch, *readers(), stop.disarm(), out=tmp_path, max_rows=2) as data:
        same(data, whole)
    assert sum(map(len, passes)) == 3


def test_two_runs_that_begin_at_once_share_a_file(
    case_gqa: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another makes the same file while this one does, and has stored a row by then."""
    create, write = capture_store._create, xr.Dataset.to_netcdf

    def created(path: Path, *args: Any) -> None:
        def written(dataset: xr.Dataset, *its: Any, **more: Any) -> None:
            write(dataset, *its, **more)
            monkeypatch.setattr(xr.Dataset, "to_netcdf", write)
            create(path, *args)
            with h5netcdf.File(path, "a") as file:
                file.variables["attention_mass"][0] = 7.0
                file.variables["stored"][0] = 1

        monkeypatch.setattr(xr.Dataset, "to_netcdf", written)
        create(path, *args)

    monkeypatch.setattr(capture_store, "_create", created)
    with rl.capture(case_gqa.model, some(), SpanAttention(), out=tmp_path) as found:
        assert (found["attention_mass"][0] == 7.0).all()
        assert (found["attention_mass"][1:] <= 1.0).all()
    assert [file.name for file in tmp_path.iterdir()] == ["capture.nc"]


def test_a_file_that_cannot_be_made_whole_is_not_left(
    case_gqa: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = xr.Dataset.to_netcdf

    def cut(*given: Any, **more: Any) -> None:
        write(*given, **more)
        raise OSError("no space left on device")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", cut)
    with pytest.raises(OSError, match="no space left"):
        rl.capture(case_gqa.model, some(), SpanAttention(), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_stop_it_and_keep_what_was_stored(
    tmp_path: Path, passes: list[list[int]]
) -> None:
    batch, stop = some(), StopsAt()
    model = fresh("qwen3", FAMILIES[0])
    whole = rl.capture(model, batch, *readers(), stop)
    weight = next(
        p for name, p in model.named_parameters() if p.ndim == 2 and p.shape[0] == 71
    )  # the embedding
    sound = weight.detach().clone()

    def break_it() -> None:
        with torch.no_grad():
            weight.fill_(float("nan"))

    longest_first = sorted(range(N_PROMPTS), key=lambda row: (-int(batch.lengths[row]), row))
    stop.arm(2, break_it)  # the pass under way has read its embedding: the next one is broken
    with pytest.raises(
        NotFinite,
        match=rf"NaN or infinity in '\w+' at prompt 'p({'|'.join(map(str, longest_first[4:6]))})'",
    ):
        rl.capture(model, batch, *readers(), stop, out=tmp_path, max_rows=2)
    with pytest.raises(CaptureError, match="4 of 7"):
        rl.open_capture(tmp_path)
    with torch.no_grad():
        weight.copy_(sound)
    passes.clear()
    with rl.capture(model, batch, *readers(), stop.disarm(), out=tmp_path, max_rows=2) as data:
        same(data, whole)
    assert sum(map(len, passes)) == 3


# --- another capture, or no capture ----------------------------------------------------------------------


def other_spans(batch: SpanBatch) -> SpanBatch:
    atoms = batch.spans.atoms()
    return replace(batch, spans=Spans({**atoms, "request": atoms["answer"], "answer": atoms["request"]}))


def relabelled(batch: SpanBatch) -> SpanBatch:
    return replace(batch, prompts=tuple(replace(prompt, category="other") for prompt in batch.prompts))


MASK = random_batch(seed=5, n_prompts=N_PROMPTS).spans["answer"]
OTHER_MASK = random_batch(seed=5, n_prompts=N_PROMPTS).spans["request"]


@pytest.mark.parametrize(
    "change",
    [
        {"batch": some(6)},
        {"batch": other_spans(some())},
        {"batch": relabelled(some())},
        {"batch": replace(some(), label="filler")},
        {
            "batch": some().select(range(6)),
            "readers": [SpanAttention(["request"], query=MASK[:6])],
            "editors": [AblateHeads([(0, 1)], positions=OTHER_MASK[:6])],
        },
        {"readers": [SpanAttention(["request", "answer"])]},
        {"readers": [SpanAttention(["request"], query="cot")]},
        {"readers": [SpanAttention(["request"], query=OTHER_MASK)]},
        {"readers": [SpanAttention(["request"], query=MASK), NeuronActivations()]},
        {"editors": [AblateHeads([(0, 1)], positions=MASK)]},
        {"editors": [AblateHeads([(0, 2)], positions=OTHER_MASK)]},
        {"editors": [AblateHeads([(0, 1)], positions=OTHER_MASK), AblateHeads([(0, 1)])]},
        {"editors": []},
        {"seed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_capture_in_the_same_folder_is_refused(
    change: dict[str, Any], tmp_path: Path, passes: list[list[int]]
) -> None:
    def run(batch: SpanBatch, readers: list[Any], editors: list[Any], seed: int) -> xr.Dataset:
        model = speaker("qwen3", FAMILIES[0]).model if seed == 0 else fresh("qwen3", FAMILIES[0], seed)
        return rl.capture(model, batch, *readers, *editors, out=tmp_path)

    plain = {
        "batch": some(),
        "readers": [SpanAttention(["request"], query=MASK)],
        "editors": [AblateHeads([(0, 1)], positions=OTHER_MASK)],
        "seed": 0,
    }
    with run(**plain) as data:
        before = data["attention_mass"].values
    n_passes = len(passes)
    with pytest.raises(CaptureError, match="another capture"):
        run(**{**plain, **change})
    assert len(passes) == n_passes
    with run(**plain) as data:  # and nothing was lost
        assert np.array_equal(data["attention_mass"].values, before)


@pytest.mark.parametrize("then", ["none", "other heads", "own hook"])
def test_what_stood_on_the_model_is_part_of_a_capture(case_gqa: Case, tmp_path: Path, then: str) -> None:
    """An editor that was registered acts in every pass: rows read under it and without it do not stand in one file."""
    batch, model, stop = some(), case_gqa.model, StopsAt()
    own = (hook_name("z", 0), lambda value, hook: value * 0)
    now = {
        "none": nullcontext(),
        "other heads": AblateHeads([(0, 2)]).on(model),
        "own hook": hooked(model, [own]),
    }[then]
    with AblateHeads([(0, 1)]).on(model):
        edited = rl.capture(model, batch, SpanAttention(), max_rows=2)
        cut = stop.arm(3, raises(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            rl.capture(model, batch, SpanAttention(), cut, out=tmp_path, max_rows=2)
    with now, pytest.raises(CaptureError, match="another capture"):
        rl.capture(model, batch, SpanAttention(), stop.disarm(), out=tmp_path, max_rows=2)
    with AblateHeads([(0, 1)]).on(model):  # in the way it was begun it goes on
        data = rl.capture(model, batch, SpanAttention(), stop, out=tmp_path, max_rows=2).load()
    data.close()
    assert np.allclose(data["attention_mass"], edited["attention_mass"], atol=1e-6)
    assert "AblateHeads([(0, 1)]" in data.attrs["on_the_model"]
    assert "on_the_model" not in rl.capture(model, batch, SpanAttention()).attrs


@pytest.mark.parametrize("way", ["module", "before", "every module"])
def test_what_pytorch_put_on_a_model_is_part_of_a_capture(case_gqa: Case, tmp_path: Path, way: str) -> None:
    """Rows read under it and without it do not stand in one file."""
    batch, model, stop = some(), case_gqa.model, StopsAt()
    mlp, point = model.blocks[0].mlp, model.hook_dict[hook_name("mlp_out", 0)]

    def zero(module: Any, args: Any, value: Any) -> Any:
        return value * 0 if module is mlp else None

    put = {
        "module": lambda: mlp.register_forward_hook(zero),
        "before": lambda: point.register_forward_pre_hook(lambda module, args: (args[0] * 0,)),
        "every module": lambda: torch.nn.modules.module.register_module_forward_hook(zero),
    }[way]
    handle = put()
    try:
        cut = stop.arm(3, raises(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            rl.capture(model, batch, SpanAttention(), cut, out=tmp_path, max_rows=2)
    finally:
        handle.remove()
    with pytest.raises(CaptureError, match="another capture"):
        rl.capture(model, batch, SpanAttention(), stop.disarm(), out=tmp_path, max_rows=2)


def test_a_mean_over_other_prompts_is_another_capture(case_gqa: Case, tmp_path: Path) -> None:
    editors = [AblateHeads([(0, 1)], "mean", reference=some(seed)) for seed in (7, 8)]
    rl.capture(case_gqa.model, some(), SpanAttention(), editors[0], out=tmp_path).close()
    with pytest.raises(CaptureError, match="another capture"):
        rl.capture(case_gqa.model, some(), SpanAttention(), editors[1], out=tmp_path)


def test_a_corrupt_file_is_refused_and_told(case_gqa: Case, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="does not exist"):
        rl.open_capture(tmp_path)
    rl.capture(case_gqa.model, some(), SpanAttention(), out=tmp_path).close()
    path = tmp_path / "capture.nc"
    sound = path.read_bytes()
    for broken in (
        b"",
        b"not a netCDF file",
        sound[:100],
        sound[: len(sound) // 2],
        bytes(len(sound)),
        sound[8:],
    ):
        path.write_bytes(broken)
        for call in (
            lambda: rl.open_capture(tmp_path),
            lambda: rl.capture(case_gqa.model, some(), SpanAttention(), out=tmp_path),
        ):
            with pytest.raises(CaptureError, match=r"corrupt.*Delete it"):
                call()
        assert path.read_bytes() == broken
    path.unlink()
    xr.Dataset({"x": ("y", np.arange(3))}).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(CaptureError, match="not a capture"):
        rl.open_capture(tmp_path)
    path.write_bytes(sound)
    rl.open_capture(tmp_path).close()


@pytest.mark.parametrize("place", range(0, 96, 12))
def test_a_damaged_head_is_refused_or_harmless_never_an_obscure_error(
    case_gqa: Case, tmp_path: Path, place: int
) -> None:
    with rl.capture(case_gqa.model, some(), SpanAttention(), out=tmp_path) as data:
        whole = data.load()
    path = tmp_path / "capture.nc"
    broken = bytearray(path.read_bytes())
    broken[place : place + 4] = b"\xa5\x5a\xa5\x5a"
    path.write_bytes(bytes(broken))
    try:
        with rl.open_capture(tmp_path) as data:
            xr.testing.assert_identical(data.load(), whole)
    except CaptureError as error:
        assert "corrupt" in str(error)  # noqa: PT017


def test_a_file_that_another_process_writes_is_refused(case_gqa: Case, tmp_path: Path) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    stop = StopsAt()
    with pytest.raises(RuntimeError):
        rl.capture(
            case_gqa.model,
            some(),
            SpanAttention(),
            stop.arm(2, raises(RuntimeError())),
            out=tmp_path,
            max_rows=3,
        )
    context = multiprocessing.get_context("fork")
    opened, done = context.Event(), context.Event()

    def child() -> None:
        with h5netcdf.File(tmp_path / "capture.nc", "a"):
            opened.set()
            done.wait(60)

    process = context.Process(target=child)
    process.start()
    try:
        assert opened.wait(60)
        with pytest.raises(CaptureError, match="another process"):
            rl.capture(case_gqa.model, some(), SpanAttention(), stop.disarm(), out=tmp_path, max_rows=3)
    finally:
        done.set()
        process.join(60)
    rl.capture(case_gqa.model, some(), SpanAttention(), stop, out=tmp_path, max_rows=3).close()


# --- memory ----------------------------------------------------------------------------------------------


def peak(task: Callable[[], Any]) -> float:
    """Highest resident memory of this process while it does something, in MiB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed must not hide what is taken now
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    task()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def measured(send: Any, folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from rim_lens.lens import wrap_hf
    from tests.families import tokenizer

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=71, n_positions=16, n_embd=16, n_layer=1, n_head=2, n_inner=4096, attn_implementation="eager", activation_function="relu",
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = wrap_hf(GPT2LMHeadModel(config), tokenizer(), family=FAMILIES[0])  # type: ignore[arg-type]
    row = random_batch(seed=1, n_prompts=1, shortest=9, longest=9)

    def batch(n: int) -> SpanBatch:
        many = row.select([0] * n)
        return replace(many, prompts=tuple(Prompt(id=str(number), text="") for number in range(n)))

    few, many = batch(300), batch(2700)

    def run(prompts: SpanBatch, out: Path | None) -> None:
        rl.capture(model, prompts, SpanAttention(), NeuronActivations(), out=out, max_rows=32).close()

    run(few, folder / "warm")
    send.send(
        (
            peak(lambda: run(few, folder / "few")),
            peak(lambda: run(many, folder / "many")),
            peak(lambda: run(many, None)),
        )
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc and trims glibc's heap")
def test_memory_is_flat_in_the_number_of_prompts(tmp_path: Path) -> None:
    """2 400 prompts more, of 16 kB each: 38 MiB more in memory, and next to nothing more with a folder."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=measured, args=(send, tmp_path))
    process.start()
    assert receive.poll(120)
    few, many, in_memory = receive.recv()
    process.join(60)
    assert in_memory - few > 28  # the measure can tell
    assert many - few < 18, f"{many - few:.0f} MiB more for 2400 prompts more"


class CountsPatterns(Component):
    """Counts the tensors of size query × key alive at the end of a pass."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._found: set[int] = set()

    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Any]]:
        return [(hook_name("resid_post", facts.n_layers - 1), self._look)]

    def _look(self, tensor: Tensor) -> None:
        alive = [item for item in gc.get_objects() if isinstance(item, Tensor)]
        self._found = {
            item.data_ptr() for item in alive if item.ndim == 4 and tuple(item.shape[-2:]) == (self._size, self._size)
            and item.shape[1] > 1
        }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_size_query_by_key_is_kept(family: str) -> None:
    batch = random_batch(seed=3, n_prompts=3, shortest=31, longest=37)
    model = fresh("llama", family)  # three layers
    alone, beside = CountsPatterns(37), CountsPatterns(37)
    rl.capture(model, batch, ResidualStream(), alone)
    every = (SpanAttention(), NeuronActivations(), HeadOutputs(), AttentionRows([(0, 1), (2, 3)]))
    rl.capture(model, batch, *every, beside)
    assert len(beside._found) <= max(1, len(alone._found))


# --- through another process -----------------------------------------------------------------------------


def test_another_process_reads_the_same(case_gqa: Case, tmp_path: Path) -> None:
    import subprocess

    in_memory = rl.capture(case_gqa.model, some(), *readers())
    rl.capture(case_gqa.model, some(), *readers(), out=tmp_path).close()
    told = (
        "import json, sys, xarray as xr\n"
        "d = xr.open_dataset(sys.argv[1], engine='h5netcdf')\n"
        "t = lambda v: v.tolist() if hasattr(v, 'tolist') else v\n"
        "json.dump({'attrs': {k: t(v) for k, v in d.attrs.items()}, **{n: [list(d[n].dims), d[n].values.tolist(),"
        " {k: t(v) for k, v in d[n].attrs.items()}] for n in d.variables}}, sys.stdout)\n"
    )
    found = json.loads(
        subprocess.run(
            [sys.executable, "-c", told, str(tmp_path / "capture.nc")],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    found["attrs"].pop("fingerprint")
    assert found.pop("attrs") == in_memory.attrs
    assert found.pop("stored")[1] == [1] * N_PROMPTS
    assert set(found) == set(in_memory.variables)
    for name, (dims, values, attrs) in found.items():
        assert tuple(dims) == in_memory[name].dims
        assert values == in_memory[name].values.tolist()
        assert attrs == in_memory[name].attrs


@pytest.fixture(autouse=True)
def no_folder_is_littered(tmp_path: Path) -> Iterator[None]:
    """Nothing is written that was not asked for."""
    here = set(Path.cwd().iterdir())
    yield
    new = {path.name for path in set(Path.cwd().iterdir()) - here}
    assert not {name for name in new if name.endswith((".nc", ".part"))}
