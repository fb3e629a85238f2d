"""The proof at first contact: what it lets through, what it refuses, and when it is done again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rim_lens.errors import (
    EditHadNoEffect,
    HookDidNotFire,
    NotFinite,
    TrainingMode,
    UnsupportedModel,
    WrongHookShape,
)
from rim_lens.hooks import AblateHeads, AblateNeurons, SpanAttention
from rim_lens.lens import Model, add_hooks, all_logits, hook_name, hooked, sites, verify, wrap_hf
from tests.families import FAMILIES, Case, Oracle, hf_model, random_batch, tiny_moe, tokenizer, wrapped

ALL_SITES = ("pattern", "z", "post", "mlp_out", "attn_out", "resid_pre", "resid_post")
bridge_only = pytest.mark.skipif(
    "bridge" not in FAMILIES, reason="TransformerLens 2 has no TransformerBridge"
)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def passes_of(model: Model, action: Callable[[], object]) -> int:
    """Forward passes of the whole model that an action costs."""
    count = 0

    def tick(module: Any, args: Any) -> None:
        nonlocal count
        count += 1

    handle = model.register_forward_pre_hook(tick)
    try:
        action()
    finally:
        handle.remove()
    return count


def attached(model: Model) -> int:
    return sum(len(point.fwd_hooks) for point in model.hook_dict.values())


@pytest.mark.family_contract
def test_every_site_can_be_read_and_edited(case: Case) -> None:
    assert verify(case.model, reads=ALL_SITES, edits=ALL_SITES) == case.facts
    assert attached(case.model) == 0


@pytest.mark.family_contract
def test_processed_weights_are_proven_too(case_processed: Case) -> None:
    verify(case_processed.model, reads=ALL_SITES, edits=ALL_SITES)


# --- what is refused -----------------------------------------------------------------------------------


def test_a_hook_point_that_does_not_exist(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama", family)
    monkeypatch.setitem(sites._NAMES, "z", "blocks.{layer}.attn.hook_nowhere")
    with pytest.raises(UnsupportedModel, match=r"blocks\.0\.attn\.hook_nowhere"):
        verify(model, reads=("pattern", "z"))
    assert attached(model) == 0


def test_a_hook_point_that_never_fires(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """hook_result is registered by TransformerLens and fires only once a switch is set."""
    model = wrapped("llama", family)
    monkeypatch.setitem(sites._NAMES, "z", "blocks.{layer}.attn.hook_result")
    with pytest.raises(HookDidNotFire, match=r"blocks\.0\.attn\.hook_result"):
        verify(model, reads=("z",))
    assert attached(model) == 0


def test_one_layer_that_never_fires_is_enough(family: str) -> None:
    """A point that was swapped for another behind TransformerLens's back."""
    model = wrapped("llama", family)
    name = hook_name("pattern", 2)
    dead = type(model.hook_dict[name])()
    whole = model.hook_dict | {name: dead}

    class Swapped(type(model)):  # type: ignore[misc]
        hook_dict = whole

    model.__dict__.pop("hook_dict", None)
    model.__class__ = Swapped
    with pytest.raises(HookDidNotFire, match=r"blocks\.2\.attn\.hook_pattern"), SpanAttention().on(model):
        pass


@bridge_only
def test_patterns_under_another_attention() -> None:
    """Hugging Face's own attention, put in the bridge's place for its speed, has no pattern to show."""
    model = wrapped("llama", "bridge")
    verify(model, reads=("pattern",), edits=("z",))
    for block in model.blocks:
        block.attn.__dict__["forward"] = block.attn.original_component.forward
    model.original_model.set_attn_implementation("sdpa")
    with pytest.raises(HookDidNotFire, match="eager"):
        verify(model, reads=("pattern",))
    with (
        pytest.raises(HookDidNotFire, match="eager"),
        AblateHeads([(0, 1)], positions="prompt_last").on(model),
    ):
        pass
    with AblateHeads([(0, 1)]).on(model):  # z still passes through the out-projection
        pass
    for block in model.blocks:
        del block.attn.__dict__["forward"]
    verify(model, reads=("pattern",))


@bridge_only
def test_when_the_attention_implementation_is_switched() -> None:
    model = wrapped("llama", "bridge")
    verify(model, reads=("pattern",))
    model.original_model.set_attn_implementation("sdpa")
    assert passes_of(model, lambda: verify(model, reads=("pattern",))) == 1
    assert passes_of(model, lambda: verify(model, reads=("pattern",))) == 0


@pytest.mark.parametrize(
    ("site", "instead"),
    [
        ("z", "blocks.{layer}.hook_resid_pre"),
        ("post", "blocks.{layer}.hook_mlp_out"),
        ("resid_post", "blocks.{layer}.attn.hook_z"),
        ("pattern", "blocks.{layer}.attn.hook_z"),
    ],
)
def test_a_wrong_shape(family: str, site: Any, instead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sites._NAMES, site, instead)
    with pytest.raises(WrongHookShape, match="expected to have shape"):
        verify(wrapped("llama", family), reads=(site,))


def test_rows_that_do_not_sum_to_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sites._NAMES, "pattern", "blocks.{layer}.attn.hook_attn_scores")
    with pytest.raises(WrongHookShape, match="sum to 1"):
        verify(wrapped("gpt2_relu", family), reads=("pattern",))


@pytest.mark.parametrize("site", ["z", "post"])
def test_edits_that_do_nothing(family: str, site: Any) -> None:
    """Here because the projection after the site is zero; in the wild because the hook is not in the graph."""
    hf = hf_model("llama")
    oracle = Oracle(hf)
    projection = oracle.out_projection(1) if site == "z" else oracle.down_projection(1)
    projection.weight.zero_()
    model = wrap_hf(hf, tokenizer(), family=family)  # type: ignore[arg-type]
    verify(model, reads=(site,))
    editor = AblateHeads([(0, 0)]) if site == "z" else AblateNeurons([(0, 0)])
    with pytest.raises(EditHadNoEffect, match=hook_name(site, 1).replace(".", r"\.")), editor.on(model):
        pass
    assert attached(model) == 0


def test_nan_weights(family: str) -> None:
    hf = hf_model("llama")
    hf.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
    model = wrap_hf(hf, tokenizer(), family=family)  # type: ignore[arg-type]
    with pytest.raises(NotFinite, match="float32"):
        verify(model, reads=("z",))


def test_training_mode(family: str) -> None:
    model = wrapped("llama", family)
    verify(model, reads=("z",))
    model.train()
    with pytest.raises(TrainingMode), AblateHeads([(0, 0)]).on(model):
        pass
    model.eval()
    verify(model, reads=("z",))


@bridge_only
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts(architecture: str) -> None:
    model, _ = tiny_moe(architecture)
    for sites_asked in ({"reads": ("post",)}, {"edits": ("post",)}):
        with pytest.raises(UnsupportedModel, match="mixture of experts"):
            verify(model, **sites_asked)
    verify(model, reads=("pattern", "z", "mlp_out"), edits=("z", "pattern"))


@bridge_only
def test_a_mixture_of_experts_that_hides_is_found_by_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should an architecture not be recognised as one, its hook_post still has the wrong width."""
    import dataclasses

    from rim_lens.lens import attaching, model_facts

    model, _ = tiny_moe("mixtral")
    monkeypatch.setattr(
        attaching, "model_facts", lambda model: dataclasses.replace(model_facts(model), moe=False)
    )
    with pytest.raises(WrongHookShape, match="mixture of experts"):
        verify(model, reads=("post",))


# --- when it is done again -----------------------------------------------------------------------------


def test_once_per_model(family: str) -> None:
    model = wrapped("llama", family)
    assert passes_of(model, lambda: verify(model, reads=("z",), edits=("z",))) == 1 + 3
    assert passes_of(model, lambda: verify(model, reads=("z",), edits=("z",))) == 0
    assert passes_of(model, lambda: verify(model, reads=("z",))) == 0
    assert passes_of(model, lambda: verify(model, reads=("pattern",))) == 1
    assert passes_of(model, lambda: verify(model, reads=("pattern", "z"), edits=("z",))) == 0
    other = wrapped("llama", family)
    assert passes_of(other, lambda: verify(other, reads=("z",))) == 1


def test_a_failed_proof_is_not_remembered(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama", family)
    with monkeypatch.context() as patch:
        patch.setitem(sites._NAMES, "z", "blocks.{layer}.hook_resid_pre")
        for _ in range(2):
            with pytest.raises(WrongHookShape):
                verify(model, reads=("z",))
    verify(model, reads=("z",))


def test_not_when_weights_change(family: str) -> None:
    model = wrapped("llama", family)
    verify(model, reads=("z",), edits=("z",))
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    model.load_state_dict(model.state_dict())
    assert passes_of(model, lambda: verify(model, reads=("z",), edits=("z",))) == 0


def test_when_a_module_is_replaced(family: str) -> None:
    """Also by one that lies where the old one lay in memory."""
    model = wrapped("llama", family)
    model.add_module("extra", torch.nn.Identity().eval())
    verify(model, reads=("z",))
    assert passes_of(model, lambda: verify(model, reads=("z",))) == 0
    place, others = id(model.extra), []
    del model.extra
    for _ in range(1000):
        new = torch.nn.Identity().eval()
        if id(new) == place:
            break
        others.append(new)
    model.add_module("extra", new)
    assert passes_of(model, lambda: verify(model, reads=("z",))) == 1


@bridge_only
def test_when_compatibility_mode_is_switched_on() -> None:
    model = wrapped("llama", "bridge")
    verify(model, reads=("z",), edits=("z",))
    model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    assert passes_of(model, lambda: verify(model, reads=("z",), edits=("z",))) > 0
    assert passes_of(model, lambda: verify(model, reads=("z",), edits=("z",))) == 0


@pytest.mark.parametrize("switch", ["set_use_attn_result", "set_use_split_qkv_input"])
def test_when_transformer_lens_takes_another_path(family: str, switch: str) -> None:
    model = wrapped("llama", family)
    verify(model, reads=ALL_SITES, edits=ALL_SITES)
    getattr(model, switch)(True)
    assert passes_of(model, lambda: verify(model, reads=ALL_SITES, edits=ALL_SITES)) > 0
    batch = random_batch(seed=8)
    truth = Oracle(hf_model("llama")).run(batch.tokens, batch.attention_mask).logits
    real = batch.attention_mask.bool()
    found = all_logits(model, batch.tokens, batch.attention_mask)
    torch.testing.assert_close(found[real], truth[real], atol=1e-5, rtol=1e-5)


def test_a_proof_keeps_no_model_alive(family: str) -> None:
    model = wrapped("llama", family)
    verify(model, reads=("z",))
    ghost = weakref.ref(model)
    del model
    gc.collect()
    assert ghost() is None


def test_a_proof_leaves_no_trace(family: str) -> None:
    """Same random numbers, gradients and hooks as if it had never run."""
    model = wrapped("llama", family)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    verify(model, reads=ALL_SITES, edits=ALL_SITES)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert attached(model) == 0


# --- hooks by hand -------------------------------------------------------------------------------------


def test_hooks_that_fail_to_attach_leave_nothing(family: str) -> None:
    model = wrapped("llama", family)
    hooks = [(hook_name("z", 0), lambda tensor, hook: None), ("blocks.0.nothing", lambda tensor, hook: None)]
    with pytest.raises(UnsupportedModel, match=r"blocks\.0\.nothing"):
        add_hooks(model, hooks)
    assert attached(model) == 0


def test_only_ones_own_hooks_are_removed(family: str) -> None:
    model = wrapped("llama", family)
    calls: list[str] = []
    hooks = {
        name: (hook_name("z", 0), lambda tensor, hook, name=name: calls.append(name))
        for name in ("a", "b", "c")
    }
    remove_a = add_hooks(model, [hooks["a"]])
    batch = random_batch(seed=8)
    with hooked(model, [hooks["b"]]):
        remove_c = add_hooks(model, [hooks["c"]])
        all_logits(model, batch.tokens, batch.attention_mask)
        remove_a()
    all_logits(model, batch.tokens, batch.attention_mask)
    remove_a()
    remove_c()
    all_logits(model, batch.tokens, batch.attention_mask)
    assert calls == ["a", "b", "c", "c"]
    assert attached(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["add_hook", "register_forward_hook", "register_forward_pre_hook"])
def test_a_proof_is_nobodys_data(family: str, way: str) -> None:
    """Hooks that stand on a hook point see no probe, whichever way they were put there, and stand afterwards."""
    model, seen = wrapped("llama", family), []
    point = model.hook_dict[hook_name("z", 1)]

    def noting(*given: Any, **_: Any) -> None:
        seen.append(given)

    getattr(point, way)(noting)
    verify(model, reads=["pattern"], edits=["z"])
    assert seen == []
    batch = random_batch(seed=0)
    all_logits(model, batch.tokens, batch.attention_mask)
    assert len(seen) == 1
