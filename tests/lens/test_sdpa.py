"""Rows under sdpa against the pattern the bridge computes, in every family; and a model that is afterwards as it was."""

from __future__ import annotations

import copy
import functools
import warnings
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import rim_lens as rl
from rim_lens.errors import CaptureError, WrongHookShape
from rim_lens.hooks import (
    AblateHeads,
    AttentionRows,
    BlockAttention,
    Component,
    HeadOutputs,
    MoveAttention,
    NeuronActivations,
    PatchHeads,
    ResidualStream,
    SpanAttention,
    bound,
)
from rim_lens.hooks.base import attached
from rim_lens.lens import (
    ComponentHook,
    Decoder,
    RowHook,
    all_logits,
    hook_name,
    hooked,
    last_logits,
    model_facts,
    quiet,
    running,
    sdpa_kept,
    verify,
    why_not_sdpa,
    wrap_hf,
)
from rim_lens.lens import sdpa as sdpa_module
from rim_lens.lens.attaching import is_quiet, wiring
from rim_lens.lens.attention import Attention, Pattern, QueriesAndKeys
from rim_lens.lens.loading import bridge_class
from tests.families import close, fill, hf_model, random_batch, tokenizer, wrapped
from tests.measures.test_scanning import COMMON, GROUPED, hf_of

pytestmark = pytest.mark.skipif(bridge_class() is None, reason="sdpa is kept on a TransformerBridge")

TIGHT = 1e-5
SERVED = (
    "llama",
    "smollm2",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2_uncapped",
    "gemma3",
    "mistral",
    "mixtral",
    "qwen3_moe",
)


def hf(architecture: str) -> Any:
    import transformers as t

    made: dict[str, Any] = {
        # SmolLM2's shape: nine heads in three groups, embeddings tied
        "smollm2": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(
                **COMMON
                | {
                    "hidden_size": 36,
                    "num_attention_heads": 9,
                    "num_key_value_heads": 3,
                    "tie_word_embeddings": True,
                }
            )
        ),
        "gemma": lambda: t.GemmaForCausalLM(
            t.GemmaConfig(**GROUPED | {"num_key_value_heads": 1, "tie_word_embeddings": True})
        ),
        "gemma2_uncapped": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(
                **GROUPED,
                sliding_window=5,
                attn_logit_softcapping=None,
                final_logit_softcapping=3.0,
                query_pre_attn_scalar=7,
            )
        ),
        "gpt_oss": lambda: t.GptOssForCausalLM(
            t.GptOssConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1, sliding_window=5)
        ),
    }
    if architecture not in made:
        return hf_of(architecture)
    model = made[architecture]()
    fill(model)
    return model.eval()


@functools.cache
def told(architecture: str) -> Any:
    return wrap_hf(hf(architecture), tokenizer(), family="bridge")


def batch(seed: int = 3, **options: Any) -> Any:
    """Left-padded, longer than the windows."""
    return random_batch(seed=seed, **options)


def rows_seen(model: Any, run: Any) -> dict[int, list[Tensor]]:
    """By layer, what a look at every query row of each pass sees: [prompt, head, query, key]."""
    seen: dict[int, list[Tensor]] = {}

    def look(layer: int, attention: Attention) -> None:
        each = torch.eye(attention.n_queries, dtype=torch.bool)[:, None].expand(-1, attention.n_prompts, -1)
        rows = torch.stack([attention.mean(queries) for queries in each], dim=2)
        seen.setdefault(layer, []).append(rows)

    hooks = [
        (hook_name("pattern", layer), ComponentHook(RowHook(functools.partial(look, layer)), "look"))
        for layer in range(model_facts(model).n_layers)
    ]
    with hooked(model, hooks):
        run()
    return seen


def state(model: Any) -> list[Any]:
    """All that could be changed and left: attributes of modules and configs, hooks, tensors."""
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        found.append((name, id(module), sorted(vars(module)), len(module._forward_hooks)))
        config = vars(module).get("config")
        if config is not None and hasattr(config, "__dict__"):
            found.append({key: repr(value) for key, value in vars(config).items()})
    found.extend((name, tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items())
    return found


# --- the numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("architecture", SERVED)
def test_rows_and_logits_are_those_of_the_pattern(architecture: str, padded: bool) -> None:
    model = told(architecture)
    prompts = batch(shortest=9 if padded else 14)
    real = prompts.attention_mask.bool()
    assert bool(real.all()) != padded
    assert why_not_sdpa(model) == ""
    run = functools.partial(all_logits, model, prompts.tokens, prompts.attention_mask)
    found: dict[str, Any] = {}
    eager = rows_seen(model, lambda: found.update(eager=run()))
    with sdpa_kept(model):
        fused = rows_seen(model, lambda: found.update(fused=run()))
    assert len(eager) == len(fused) == model_facts(model).n_layers
    for layer, (rows,) in eager.items():
        close(fused[layer][0].transpose(1, 2)[real], rows.transpose(1, 2)[real], TIGHT)
    close(found["fused"][real], found["eager"][real], 5e-5)
    assert float(found["eager"].std()) > 0.1  # there was something to disagree about


@pytest.mark.parametrize("architecture", SERVED)
def test_readers_capture_the_same(architecture: str) -> None:
    """All readers at once, one row and many, named heads, with and without editors that leave patterns alone."""
    model, prompts = told(architecture), batch(n_prompts=6)
    heads = [(1, 3), (0, 0), (model_facts(model).n_layers - 1, 1), (1, 0)]
    donor = batch(seed=8, n_prompts=6)
    for editors in ([], [AblateHeads([(0, 2)], positions="cot"), PatchHeads([(1, 1)], donor, "prompt_last")]):
        for readers in (
            lambda: [SpanAttention(normalise="uniform"), AttentionRows(heads, query="request")],
            lambda: [SpanAttention(query="think"), HeadOutputs("mean", "cot"), ResidualStream()],
        ):
            eager = rl.capture(model, prompts, *readers(), *editors, max_rows=4, attention="eager")
            fused = rl.capture(model, prompts, *readers(), *editors, max_rows=4)
            assert fused.attrs["attention"] == "sdpa"
            assert eager.attrs["attention"] == "eager (it was asked for)"
            for name in eager.data_vars:
                scale = max(1.0, float(abs(eager[name]).max()))
                close(
                    torch.tensor(fused[name].values) / scale, torch.tensor(eager[name].values) / scale, TIGHT
                )


def test_a_step_under_a_cache_sees_what_came_before() -> None:
    model, prompts = told("gemma3"), batch()

    def run(model: Any = model) -> None:
        decoder = Decoder(model)
        decoder.prefill(prompts.tokens, prompts.attention_mask)
        for step in range(3):
            decoder.step(torch.arange(len(prompts)) + 7 + step)

    eager = rows_seen(model, run)
    with sdpa_kept(model):
        fused = rows_seen(model, run)
    for layer, passes in eager.items():
        assert [tuple(rows.shape[-2:]) for rows in passes][1:] == [(1, 15), (1, 16), (1, 17)]
        for one, other in zip(passes[1:], fused[layer][1:], strict=True):
            close(other, one, TIGHT)


@pytest.mark.parametrize("n_chosen", [1, 3, 130])
def test_means_over_chosen_rows_by_hand(n_chosen: int) -> None:
    """Grouped heads, a bool mask, more rows than are held at a time; an additive mask says the same."""
    generator = torch.Generator().manual_seed(n_chosen)
    query = torch.randn(2, 6, 140, 8, generator=generator)
    key = torch.randn(2, 2, 150, 8, generator=generator)
    mask = torch.rand(2, 1, 140, 150, generator=generator) < 0.5
    mask[..., 0] = True
    scores = query @ key.repeat_interleave(3, dim=1).transpose(2, 3) * 0.3
    pattern = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    queries = torch.zeros(2, 140, dtype=torch.bool)
    for prompt in range(2):
        queries[
            prompt, torch.randperm(140, generator=generator)[: n_chosen - (prompt if n_chosen > 1 else 0)]
        ] = True
    expected = torch.stack([pattern[prompt, :, queries[prompt]].mean(dim=1) for prompt in range(2)])
    added = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    for seen in (
        Pattern(pattern),
        QueriesAndKeys(query, key, mask, 0.3),
        QueriesAndKeys(query, key, added, 0.3),
    ):
        close(seen.mean(queries), expected, 1e-6)
        close(seen.mean(queries, [5, 0, 3]), expected[:, [5, 0, 3]], 1e-6)


def test_in_half_precision_rows_are_within_its_error() -> None:
    model = wrap_hf(hf("qwen3").to(torch.bfloat16), tokenizer(), family="bridge")
    prompts = batch()
    assert why_not_sdpa(model) == ""
    eager, fused = (
        rl.capture(model, prompts, SpanAttention(["request", "cot"]), attention=way)["attention_mass"].values
        for way in ("eager", "sdpa")
    )
    assert fused.dtype == eager.dtype == "float32"
    close(torch.tensor(fused), torch.tensor(eager), 0.05)


# --- which way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("gemma2", "scores are capped"),
        ("gpt2_relu", "projections of its own"),
        ("phi3", "projections of its own"),
        ("neox", "projections of its own"),
        ("gpt_oss", "attention sinks"),
    ],
)
def test_what_cannot_be_done_is_refused_and_computed_whole(architecture: str, why: str) -> None:
    model, prompts = told(architecture), batch()
    assert why in why_not_sdpa(model)
    if architecture == "gpt_oss":  # whose rows do not sum to 1: refused either way
        with pytest.raises(WrongHookShape, match="sink"):
            rl.capture(model, prompts, SpanAttention())
    else:
        with pytest.raises(CaptureError, match=f"attention='sdpa' was asked for.*{why}"):
            rl.capture(model, prompts, SpanAttention(), attention="sdpa")
        found = rl.capture(model, prompts, SpanAttention(["request"]))
        assert found.attrs["attention"].startswith("eager (")
        assert why in found.attrs["attention"]


def test_editors_of_patterns_take_the_eager_way() -> None:
    model, prompts = told("llama"), batch()
    for editor in (
        BlockAttention("prompt_last", "request"),
        MoveAttention([(1, 1)], "request", factor=0.5),
    ):
        found = rl.capture(model, prompts, SpanAttention(["request", "cot"]), editor)
        assert found.attrs["attention"] == f"eager ({type(editor).__name__} works on whole patterns)"
        with pytest.raises(CaptureError, match=type(editor).__name__):
            rl.capture(model, prompts, SpanAttention(), editor, attention="sdpa")
    with BlockAttention("prompt_last", "request").on(model) as editor, bound([editor], prompts):
        assert "BlockAttention" in why_not_sdpa(model)  # also where it was attached from outside
    assert why_not_sdpa(model) == ""


@pytest.mark.parametrize("name", ["attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_rot_q"])
def test_a_hook_of_the_users_own_on_what_does_not_fire_takes_the_eager_way(name: str) -> None:
    model, prompts = told("llama"), batch()
    fired: list[int] = []
    with model.hooks(fwd_hooks=[(f"blocks.1.{name}", lambda value, hook: fired.append(1))]):
        found = rl.capture(model, prompts, SpanAttention(["request"]))
    assert found.attrs["attention"] == f"eager (there is a hook on blocks.1.{name})"
    assert fired


@pytest.mark.parametrize("site", ["q", "k", "v", "z", "post", "attn_out", "resid_pre", "resid_post"])
def test_what_fires_shows_the_same_and_can_be_edited(site: Any) -> None:
    model, prompts = told("qwen3"), batch()
    real = prompts.attention_mask.bool()

    def double(value: Tensor, hook: Any) -> Tensor:
        seen.append(value.clone())
        value = value.clone()
        value[:, :, ..., :2] *= 2
        return value

    found = []
    for way in ("eager", "sdpa"):
        seen: list[Tensor] = []
        with hooked(model, [(hook_name(site, 1), double)]), ExitStack() as stack:
            assert why_not_sdpa(model) == ""
            if way == "sdpa":
                stack.enter_context(sdpa_kept(model))
            logits = last_logits(model, prompts.tokens, prompts.attention_mask)
        found.append((seen[0][real], logits))
    close(found[1][0], found[0][0], 3e-5)
    close(found[1][1], found[0][1], 5e-5)
    plain = last_logits(model, prompts.tokens, prompts.attention_mask)
    assert float((plain - found[0][1]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["blocks.1.ln1.hook_out", "blocks.0.ln2.hook_in", "ln_final.hook_out"])
def test_a_hook_on_a_norm_fires_also_where_it_comes_late(name: str) -> None:
    """Norms without hooks are the model's own meanwhile."""
    model, prompts = told("llama"), batch()
    run = functools.partial(last_logits, model, prompts.tokens, prompts.attention_mask)
    hooks = [(name, lambda value, hook: value * 1.5 + 0.3)]
    with hooked(model, hooks):
        expected = run()
    with sdpa_kept(model):
        plain = run()
        with hooked(model, hooks):
            close(run(), expected, 5e-5)
        assert torch.equal(run(), plain)
    assert float((plain - expected).abs().max()) > 1e-2


def test_numbers_that_disagree_are_noticed_on_first_contact(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = wrapped("llama", "bridge"), batch()
    plain = QueriesAndKeys._mask_of
    monkeypatch.setattr(QueriesAndKeys, "_mask_of", lambda self, rows: plain(self, (rows - 1).clamp(min=0)))
    with pytest.warns(RuntimeWarning, match="other numbers than the bridge"):
        assert "other numbers" in why_not_sdpa(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        assert "eager" in rl.capture(model, prompts, SpanAttention(["request"])).attrs["attention"]


def test_proven_once_and_again_when_the_wiring_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("llama", "bridge")
    proofs: list[int] = []
    plain = sdpa_module._compared
    monkeypatch.setattr(sdpa_module, "_compared", lambda *args: proofs.append(1) or plain(*args))
    for _ in range(3):
        assert why_not_sdpa(model) == ""
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    assert why_not_sdpa(model) == ""
    assert len(proofs) == 1
    model.original_model.config._attn_implementation = "sdpa"
    assert why_not_sdpa(model) == ""
    assert len(proofs) == 2
    block = model.blocks[0].attn
    block.__dict__["forward"] = functools.partial(type(block).forward, block)
    assert "replaced by another" in why_not_sdpa(model)


@pytest.mark.parametrize("way", ["compat_plain", "compat_processed"])
def test_compatibility_mode_is_proven_like_any_other(way: str) -> None:
    model, prompts = wrapped("llama", way), batch()
    eager, fused = (
        rl.capture(model, prompts, SpanAttention(), attention=asked) for asked in ("eager", "auto")
    )
    close(torch.tensor(fused["attention_mass"].values), torch.tensor(eager["attention_mass"].values), TIGHT)


def test_another_word_is_refused() -> None:
    unknown: Any = "flash"
    with pytest.raises(ValueError, match="'auto', 'sdpa' and 'eager'"):
        rl.capture(told("llama"), batch(), SpanAttention(), attention=unknown)


def test_no_pattern_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of size query × key is made: softmax, which makes the pattern, sees one row."""
    model, prompts = told("llama"), batch()
    widths: list[int] = []
    plain = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor,
        "softmax",
        lambda self, *args, **more: widths.append(self.shape[-2]) or plain(self, *args, **more),
    )
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda *args, **more: pytest.fail("a pattern was made")
    )
    rl.capture(model, prompts, SpanAttention(), attention="sdpa")
    assert widths
    assert set(widths) == {1}


# --- afterwards --------------------------------------------------------------------------------------------


class Raises(Component):
    """Fails in the middle of a pass."""

    def hooks(self, model: Any, facts: Any) -> list[tuple[str, Any]]:
        return [(hook_name("post", 1), self._fail)]

    def _fail(self, activation: Tensor) -> None:
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("how", ["captured", "exception", "nested", "interrupt"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_model_is_afterwards_exactly_as_before(architecture: str, how: str) -> None:
    model, prompts = told(architecture), batch()
    run = functools.partial(all_logits, model, prompts.tokens, prompts.attention_mask)
    why_not_sdpa(model)
    verify(model, reads=["pattern", "post"])
    before, logits, wired = state(model), run(), wiring(model)
    if how == "captured":
        assert rl.capture(model, prompts, SpanAttention(), NeuronActivations()).attrs["attention"] == "sdpa"
    elif how == "exception":
        with pytest.raises(RuntimeError, match="in the middle"):
            rl.capture(model, prompts, SpanAttention(), Raises(), attention="sdpa")
    elif how == "interrupt":
        with pytest.raises(KeyboardInterrupt), sdpa_kept(model):
            raise KeyboardInterrupt
    else:
        with sdpa_kept(model):
            kept = state(model)
            fused = run()
            assert wiring(model) == wired  # no proof is redone for a moment's switch
            with pytest.raises(RuntimeError), sdpa_kept(model):
                raise RuntimeError
            inner = rl.capture(model, prompts, SpanAttention(["request"]))
            assert inner.attrs["attention"] == "sdpa"
            assert [item[2:] for item in kept if isinstance(item, tuple) and len(item) == 4] == [
                item[2:] for item in state(model) if isinstance(item, tuple) and len(item) == 4
            ]
            assert torch.equal(run(), fused)
        outer = rl.capture(model, prompts, SpanAttention(["request"]), attention="eager")
        close(
            torch.tensor(inner["attention_mass"].values), torch.tensor(outer["attention_mass"].values), TIGHT
        )
    assert state(model) == before
    assert torch.equal(run(), logits)  # to the last bit
    assert wiring(model) == wired


def test_another_model_of_the_same_config_is_left_alone() -> None:
    one = told("llama")
    other = wrap_hf(copy.deepcopy(hf("llama")), tokenizer(), family="bridge")
    prompts = batch()
    plain = all_logits(other, prompts.tokens, prompts.attention_mask)
    with sdpa_kept(one):
        assert torch.equal(all_logits(other, prompts.tokens, prompts.attention_mask), plain)


def test_models_of_one_config_keep_sdpa_independently() -> None:
    """As two threads do: the one that began first ends first, and the other's passes still see no key after the query."""
    one = wrapped("llama", "bridge")
    plain_hf = hf_model("llama", seed=1)
    for module in plain_hf.modules():
        if hasattr(module, "config"):
            module.config = one.original_model.config
    other = wrap_hf(plain_hf, tokenizer(), family="bridge")
    tokens = torch.arange(2, 14)[None]
    plain = all_logits(other, tokens, torch.ones_like(tokens))
    assert why_not_sdpa(one) == why_not_sdpa(other) == ""
    before = state(one), state(other)
    seen: list[Tensor] = []

    def first_ends(value: Tensor, hook: Any) -> None:
        if first is not None:
            first.__exit__(None, None, None)

    first: Any = sdpa_kept(one)
    first.__enter__()
    with sdpa_kept(other), hooked(other, [("blocks.0.hook_resid_pre", first_ends)]):
        close(all_logits(other, tokens, torch.ones_like(tokens)), plain, TIGHT)
        first = None
        rows = rows_seen(other, lambda: seen.append(all_logits(other, tokens, torch.ones_like(tokens))))
    assert set(rows) == {0, 1, 2}
    close(seen[0], plain, TIGHT)
    assert (state(one), state(other)) == before


def test_within_quiet_nothing_is_looked_at() -> None:
    model, prompts = told("llama"), batch()
    with sdpa_kept(model), quiet():
        assert rows_seen(model, lambda: last_logits(model, prompts.tokens, prompts.attention_mask)) == {}


@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_full_backward_pre_hook"])
def test_a_hook_before_what_does_not_fire_takes_the_eager_way(kind: str) -> None:
    """PyTorch's own hooks on a hook point, which TransformerLens does not list."""
    model = told("llama")
    assert why_not_sdpa(model) == ""
    handle = getattr(model.hook_dict[hook_name("pattern", 1)], kind)(lambda *_: None)
    try:
        assert "there is a hook on blocks.1.attn.hook_pattern" in why_not_sdpa(model)
    finally:
        handle.remove()
    assert why_not_sdpa(model) == ""


@pytest.mark.parametrize("point", ["hook_normalized", "hook_scale"])
def test_a_hook_before_a_norms_point_fires(point: str) -> None:
    model, prompts = told("llama"), batch()
    fired: list[Any] = []
    handle = model.hook_dict[f"blocks.1.ln1.{point}"].register_forward_pre_hook(lambda *_: fired.append(1))
    try:
        last_logits(model, prompts.tokens, prompts.attention_mask, attention="sdpa")
    finally:
        handle.remove()
    assert fired == [1]


def test_a_hook_on_the_attention_within_takes_the_eager_way() -> None:
    """The step-by-step way passes it by; under sdpa it would fire."""
    model = wrapped("llama", "bridge")
    assert why_not_sdpa(model) == ""
    within = model.blocks[1].attn.original_component
    handle = within.register_forward_hook(lambda module, args, found: (found[0] * 2, *found[1:]))
    assert why_not_sdpa(model) == "there is a hook on the attention that the bridge wraps in layer 1"
    handle.remove()
    assert why_not_sdpa(model) == ""


def test_a_proof_within_quiet_is_a_proof() -> None:
    """Reference passes are quiet, and may be the first long ones: what they find is kept for all later passes."""
    model = wrapped("llama", "bridge")
    with quiet():
        assert why_not_sdpa(model) == ""
        assert is_quiet()
    assert why_not_sdpa(model, gradients=True) == ""


def test_a_proof_leaves_backward_hooks_alone() -> None:
    """Its gradients are nobody's data; afterwards the hook is there as before."""
    model, prompts = wrapped("llama", "bridge"), batch()
    seen: list[Any] = []
    point = model.hook_dict[hook_name("z", 0)]
    point.add_hook(lambda gradient, hook: seen.append(gradient.shape), dir="bwd")
    assert why_not_sdpa(model, gradients=True) == ""
    assert seen == []
    with hooked(model, [("hook_embed", lambda value, hook: value.detach().requires_grad_())]):
        model(prompts.tokens, attention_mask=prompts.attention_mask).sum().backward()
    assert seen == [(*prompts.tokens.shape, 4, 8)]


def test_a_capture_cut_short_goes_on_in_the_same_way_alone(tmp_path: Any) -> None:
    model, prompts = told("llama"), batch()
    rl.capture(model, prompts, SpanAttention(), out=tmp_path).close()
    with pytest.raises(CaptureError, match="way of computing attention"):
        rl.capture(model, prompts, SpanAttention(), out=tmp_path, attention="eager")
    with rl.capture(model, prompts, SpanAttention(), out=tmp_path, attention="sdpa") as again:
        assert again.attrs["attention"] == "sdpa"


def test_a_switch_that_adds_a_hook_point_is_seen() -> None:
    """`hook_attn_in` fires in the bridge's own attention alone, and only since it was switched on."""
    model, batch = wrapped("llama", "bridge"), random_batch(seed=8)
    before = rl.capture(model, batch, SpanAttention())
    model.set_use_attn_in(True)
    try:
        with hooked(model, [("blocks.0.attn.hook_attn_in", lambda value, hook: value * 0)]):
            found = rl.capture(model, batch, SpanAttention())
    finally:
        model.set_use_attn_in(False)
    assert before.attrs["attention"] == "sdpa"
    assert found.attrs["attention"].startswith("eager (")
    assert float(abs(found["attention_mass"] - before["attention_mass"]).max()) > 0.01


# --- long passes of whole prompts ------------------------------------------------------------------------


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Passes of eight tokens and more count as long; what kept sdpa is noted."""
    noted: list[Any] = []

    def kept(model: Any) -> Any:
        noted.append(model)
        return sdpa_kept(model)

    monkeypatch.setattr(running, "LONG", 8)
    monkeypatch.setattr(running, "sdpa_kept", kept)
    return noted


@pytest.mark.parametrize("architecture", SERVED)
def test_long_passes_keep_sdpa_and_give_the_same(
    architecture: str, entered: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = told(architecture), batch(n_prompts=6)
    real = prompts.attention_mask.bool()
    editors = [
        AblateHeads([(0, 2)], positions="cot"),
        PatchHeads([(1, 1)], batch(seed=8, n_prompts=6), "prompt_last"),
    ]

    def numbers() -> list[Tensor]:
        with ExitStack() as stack:
            stack.enter_context(attached(model, editors, prompts, writes=False))
            with bound(editors, prompts, range(len(prompts))) as part:
                return [
                    last_logits(model, part.tokens, part.attention_mask),
                    all_logits(model, part.tokens, part.attention_mask)[real],
                    Decoder(model).prefill(part.tokens, part.attention_mask),
                ]

    fused = numbers()
    assert len(entered) >= 3
    entered.clear()
    monkeypatch.setattr(running, "LONG", 1000)
    for one, other in zip(fused, numbers(), strict=True):
        close(one, other, 5e-5)
    assert entered == []


def test_steps_and_short_passes_do_not(entered: list[Any]) -> None:
    model, prompts = told("llama"), batch()
    decoder = Decoder(model)
    decoder.prefill(prompts.tokens, prompts.attention_mask)
    assert len(entered) == 1
    decoder.step(torch.arange(len(prompts)) + 7)
    last_logits(model, prompts.tokens[:, -7:], prompts.attention_mask[:, -7:])
    last_logits(model, prompts.tokens, prompts.attention_mask, attention="eager")
    assert len(entered) == 1
    last_logits(model, prompts.tokens[:, -7:], prompts.attention_mask[:, -7:], attention="sdpa")
    assert len(entered) == 2


@pytest.mark.parametrize("architecture", SERVED)
def test_gradients_of_long_passes_are_the_same(
    architecture: str, entered: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = told(architecture), batch(n_prompts=6)
    real = prompts.attention_mask.bool()
    names = [
        hook_name(site, layer) for layer in range(model_facts(model).n_layers) for site in ("z", "mlp_out")
    ]

    def slopes() -> list[Tensor]:
        found: list[Tensor] = []

        def track(value: Tensor, hook: Any) -> Tensor:
            found.append(value if value.requires_grad else value.detach().requires_grad_())
            return found[-1]

        with hooked(model, [(name, track) for name in names]):
            logits = last_logits(model, prompts.tokens, prompts.attention_mask, gradients=True)
            return [slope[real] for slope in torch.autograd.grad(logits[:, 3].sum(), found)]

    fused = slopes()
    assert len(entered) == 1
    monkeypatch.setattr(running, "LONG", 1000)
    for one, other in zip(fused, slopes(), strict=True):
        close(one / other.abs().max(), other / other.abs().max(), 5e-5)
    assert len(entered) == 1


@pytest.mark.parametrize("wrong", ["other", "broken"])
def test_gradients_that_disagree_keep_the_eager_way(
    wrong: str, entered: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes without a graph keep sdpa all the same."""
    model, prompts = wrapped("llama", "bridge"), batch()
    plain = sdpa_module._slopes

    def slopes(model: Any, *given: Any) -> Tensor:
        fused = "forward" in vars(model.blocks[0].attn)
        if fused and wrong == "broken":
            raise RuntimeError("no derivative")
        return plain(model, *given) * (1.01 if fused else 1)

    monkeypatch.setattr(sdpa_module, "_slopes", slopes)
    assert why_not_sdpa(model) == ""
    assert ("no derivative" if wrong == "broken" else "other ones") in why_not_sdpa(model, gradients=True)
    last_logits(model, prompts.tokens, prompts.attention_mask, gradients=True)
    assert entered == []
    last_logits(model, prompts.tokens, prompts.attention_mask)
    assert len(entered) == 1


def test_a_hook_on_whole_patterns_is_seen_in_a_long_pass(entered: list[Any]) -> None:
    model, prompts = told("llama"), batch()
    plain = last_logits(model, prompts.tokens, prompts.attention_mask)
    assert len(entered) == 1

    def first_key(pattern: Tensor, hook: Any) -> Tensor:
        moved = torch.zeros_like(pattern)
        moved[..., -1] = 1
        return moved

    with hooked(model, [(hook_name("pattern", 0), first_key)]):
        moved = last_logits(model, prompts.tokens, prompts.attention_mask)
    assert len(entered) == 1
    assert float((moved - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "mistral"])
def test_text_after_a_long_prompt_is_the_same(
    architecture: str, entered: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by sdpa or step by step, also where windows are shorter than the prompts."""
    model, prompts = told(architecture), batch()
    found = []
    for long in (8, 1000):
        monkeypatch.setattr(running, "LONG", long)
        decoder = Decoder(model)
        logits = [decoder.prefill(prompts.tokens, prompts.attention_mask)]
        for _ in range(5):
            logits.append(decoder.step(logits[-1].argmax(-1)))
        found.append(torch.stack(logits))
    assert len(entered) == 1
    assert torch.equal(found[0].argmax(-1), found[1].argmax(-1))
    close(*found, 5e-5)
