"""Many edits at once against one forward pass per edit, in every architecture and with every rule for whitespace."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch

import rim_lens as rl
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.errors import ConditionError, UnknownHead
from rim_lens.hooks import (
    AblateHeads,
    AblateNeurons,
    PatchHeads,
    PatchNeurons,
    ScaleHeads,
    ScaleNeurons,
    reference,
)
from rim_lens.lens import hooked, model_facts, wrap_hf
from rim_lens.lens.bare_bridge import BareBridge
from rim_lens.lens.bare_hooked import BareHooked
from rim_lens.lens.loading import Family, bridge_class, hooked_class
from rim_lens.measures import marching, scanning
from rim_lens.measures.edits import set_effects
from rim_lens.measures.heads.effects import head_effects
from rim_lens.measures.readings import Reading, refusal_reading
from rim_lens.measures.refusal import first_word
from rim_lens.measures.scanning import Scan
from rim_lens.organisms.toy.host import toy_tokenizer
from tests.families import FAMILIES, fill, hf_model
from tests.speaking import REQUESTS, speaker

pytestmark = pytest.mark.family_contract
on_the_bridge = pytest.mark.skipif(bridge_class() is None, reason="a TransformerBridge is taken apart")
on_hooked = pytest.mark.skipif(hooked_class() is None, reason="a HookedTransformer is taken apart")

VOCABULARY = 71
# Of unequal length, and with a beginning that they share.
PROMPTS = [replace(prompt, text=f"make bread please {prompt.text}") for prompt in REQUESTS]
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
GROUPED: dict[str, Any] = {**COMMON, "num_key_value_heads": 2, "head_dim": 12}


def hf_of(architecture: str) -> Any:
    import transformers as t

    made: dict[str, Any] = {
        # windows shorter than the prompts, caps that bite
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(
                **GROUPED,
                sliding_window=5,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
                query_pre_attn_scalar=7,
            )
        ),
        "gemma3": lambda: t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(
                **GROUPED,
                sliding_window=5,
                query_pre_attn_scalar=7,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            )
        ),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=6)),
        "qwen2": lambda: t.Qwen2ForCausalLM(
            t.Qwen2Config(**{name: value for name, value in GROUPED.items() if name != "head_dim"})
        ),
        "phi3": lambda: t.Phi3ForCausalLM(
            t.Phi3Config(**{name: value for name, value in GROUPED.items() if name != "head_dim"})
        ),
        "neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**COMMON)),
        "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
        ),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=4)),
    }
    if architecture not in made:
        return hf_model(architecture)
    model = made[architecture]()
    fill(model)
    return model.eval()


ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary", "rotary_dim": 8}
# What our loader does not convert, but a HookedTransformer can be
NATIVE: dict[str, dict[str, Any]] = {
    # Gemma 2: windows shorter than the prompts, caps that bite, norms on both sides, grouped queries
    "windows": {
        **ROTARY,
        "normalization_type": "RMS",
        "use_local_attn": True,
        "window_size": 5,
        "attn_types": ["local", "global", "local"],
        "attn_scores_soft_cap": 2.0,
        "output_logits_soft_cap": 3.0,
        "use_normalization_before_and_after": True,
        "n_key_value_heads": 2,
        "gated_mlp": True,
    },
    # GPT-NeoX: attention and MLP beside one another, part of each head rotated
    "parallel": {**ROTARY, "rotary_dim": 4, "normalization_type": "LN", "parallel_attn_mlp": True},
    "folded": {
        "positional_embedding_type": "standard",
        "normalization_type": "LNPre",
        "use_attn_scale": False,
    },
    "no_norms": {"positional_embedding_type": "standard", "normalization_type": None},
    "alibi": {"positional_embedding_type": "alibi", "normalization_type": "LN"},
}
BRIDGED = (
    *("gpt2_relu", "gpt2_gelu", "llama", "qwen3"),
    *("gemma2", "gemma3", "mistral", "qwen2", "phi3", "neox", "mixtral", "qwen3_moe"),
)
HOOKED = ("gpt2_relu", "gpt2_gelu", "llama", "qwen3", "qwen2", "windows", "parallel", "folded", "no_norms")
KINDS = [
    (architecture, family)
    for family, architectures in (("bridge", BRIDGED), ("hooked", HOOKED))
    for architecture in architectures
    if family in FAMILIES
]


def native(**options: Any) -> Any:
    """A HookedTransformer of its own, of random weights; in float64, as nothing keeps its numbers small."""
    from transformer_lens import HookedTransformerConfig

    made: Any = hooked_class()
    cfg = HookedTransformerConfig(
        n_layers=3,
        d_model=32,
        n_heads=4,
        d_head=8,
        d_mlp=40,
        n_ctx=128,
        d_vocab=VOCABULARY,
        act_fn="gelu",
        dtype=torch.float64,
        **options,
    )
    model = made(cfg)
    model.tokenizer = toy_tokenizer()
    fill(model)
    return model.eval()


@functools.cache
def told(architecture: str, family: Family = FAMILIES[0]) -> tuple[Any, SpanBatch]:
    if architecture in NATIVE:
        model = native(**NATIVE[architecture])
    else:
        hf = hf_of(architecture)
        if not architecture.startswith("gpt2"):
            hf.config.max_position_embeddings = 128
        model = wrap_hf(hf, toy_tokenizer(), family=family)
    return model, ChatFormat.from_model(model).render(PROMPTS, think="off")


def editors(model: Any, batch: SpanBatch, positions: Any) -> list[Any]:
    """Every head by itself, sets over layers, factors, means, neurons."""
    facts = model_facts(model)
    last = facts.n_layers - 1
    found: list[Any] = [AblateHeads([head], positions=positions) for head in facts.heads()]
    found += [
        AblateHeads([(0, 1), (last, 0), (last, 3)], positions=positions),
        ScaleHeads([(1, 2), (0, 0)], 1.7, positions=positions),
        AblateHeads([(1, 1), (last, 2)], method="mean", reference=batch, positions=positions),
    ]
    if not facts.moe:
        found += [
            AblateNeurons([(0, 3), (last, 5)], positions=positions),
            AblateNeurons([(last, neuron) for neuron in range(30)], positions=positions),
            ScaleNeurons([(1, neuron) for neuron in range(20)], -1.0, positions=positions),
        ]
    return found


def packed_readings(reading: Reading, components: Sequence[Any]) -> list[np.ndarray]:
    return scanning._Packed(reading).readings(components)


def differ(reading: Reading, components: Sequence[Any]) -> float:
    """Largest difference of the fast way from the plain one; that edits do something is asserted."""
    fast = np.array(packed_readings(reading, components))
    plain = np.array([reading([]), *(reading([component]) for component in components)])
    assert fast.shape == plain.shape
    # In the last layer, edits of rows that are not read do nothing.
    assert np.median(np.abs(plain[1:] - plain[0]).max(axis=1)) > 1e-3
    return float(np.abs(fast - plain).max())


@pytest.mark.parametrize("positions", ["all", "prompt_last", "request", "mask"])
@pytest.mark.parametrize(("architecture", "family"), KINDS)
def test_fast_is_slow(architecture: str, family: str, positions: str) -> None:
    model, batch = told(architecture, family)
    assert len(set(batch.lengths.tolist())) > 2
    asked: Any = positions
    if positions == "mask":
        asked = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(4)) < 0.4
        asked[:, -2] = True
    reading = refusal_reading(model, batch)
    assert differ(reading, editors(model, batch, asked)) < 1e-5


def editors_by_row(model: Any, batch: SpanBatch, positions: Any) -> list[Any]:
    """What is put into a row differs from prompt to prompt: other runs' values, means of spans."""
    facts = model_facts(model)
    chat, last = ChatFormat.from_model(model), facts.n_layers - 1
    source = rl.record(model, chat.render(PROMPTS[::-1], think="bread please make 3"), ["z"])
    turned = chat.render(PROMPTS[::-1], think="off")
    found: list[Any] = [PatchHeads([head], source, positions) for head in facts.heads()]
    found += [
        PatchHeads([(0, 1), (last, 3)], turned, positions, "start"),
        AblateHeads([(1, 1), (last, 2)], method="resample", reference=batch, positions=positions, seed=3),
        AblateHeads([(0, 2)], method="mean", per="span", reference=batch, positions=positions),
        AblateHeads([(1, 0)], method="mean", per="position", reference=batch, positions=positions),
    ]
    if not facts.moe:
        found += [
            PatchNeurons([(0, neuron) for neuron in range(30)], turned, positions),
            AblateNeurons([(1, neuron) for neuron in range(30)], "resample", turned, positions=positions),
        ]
    return found


@pytest.mark.parametrize("positions", ["all", "prompt_last", "request", "mask"])
@pytest.mark.parametrize(
    ("architecture", "family"),
    [kind for kind in KINDS if kind[0] in ("gpt2_gelu", "llama", "gemma3", "mixtral", "windows")],
)
def test_fast_is_slow_where_each_prompt_has_values_of_its_own(
    architecture: str, family: str, positions: str
) -> None:
    model, batch = told(architecture, family)
    asked: Any = positions
    if positions == "mask":
        asked = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(4)) < 0.4
        asked[:, -2] = True
    reading = refusal_reading(model, batch)
    components = editors_by_row(model, batch, asked)
    assert differ(reading, components) < 1e-5
    assert len(packed_readings(reading, components)) == 1 + len(components)


@pytest.mark.parametrize("tokens", [1, 40, 100])
def test_values_of_each_prompt_in_small_passes(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Editors are bound to the prompts of each pass, without the padding that these do not need."""
    model, batch = told("llama")
    monkeypatch.setattr(scanning, "MAX_TOKENS", tokens)
    monkeypatch.setattr(marching, "_ROWS", tokens)
    for positions in ("all", "prompt_last"):
        assert differ(refusal_reading(model, batch), editors_by_row(model, batch, positions)) < 1e-5


@pytest.mark.parametrize("positions", ["all", "prompt_last", "generated"])
@pytest.mark.parametrize("skip", ["none", "forced"])
def test_rules_for_whitespace(monkeypatch: pytest.MonkeyPatch, skip: str, positions: str) -> None:
    model, batch = told("llama")
    monkeypatch.setattr(first_word, "forced_tokens", lambda *_: [5, 9])
    monkeypatch.setattr(scanning, "forced_tokens", lambda *_: [5, 9])
    reading = refusal_reading(model, batch, skip=skip)
    components = editors(model, batch, positions)
    if positions == "generated":
        if skip == "none":
            with pytest.raises(ConditionError, match="acts on nothing"):
                head_effects(reading, model_facts(model).heads(), positions=positions)
            return
        components = [editor for editor in components if getattr(editor, "method", "") != "mean"]
    assert differ(reading, components) < 1e-5


@pytest.mark.parametrize("positions", ["all", "prompt_last"])
@pytest.mark.parametrize("seed", range(3))
def test_whitespace_that_is_written_by_some_and_not_by_others(
    monkeypatch: pytest.MonkeyPatch, seed: int, positions: str
) -> None:
    """A random part of the vocabulary counts as whitespace, so that prompts skip between none and four tokens, and edits
    change how many and which."""
    model, batch = told("qwen3")
    blank = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))[:40]
    for module in (first_word, scanning):
        monkeypatch.setattr(module, "whitespace_ids", lambda *_: blank)
    reading = refusal_reading(model, batch)
    skipped = rl.refusal_score(model, batch)["skipped"].values
    assert len(set(skipped.tolist())) > 1
    components = editors(model, batch, positions)
    other = [rl.refusal_score(model, batch, component)["skipped"].values for component in components]
    assert any((found != skipped).any() for found in other)
    assert differ(reading, components) < 1e-5


@pytest.mark.parametrize("tokens", [1, 40, 100])
def test_small_passes_and_small_groups(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """One prompt and one edit at a time, or some; and groups of a few edits each."""
    model, batch = told("llama")
    reading = refusal_reading(model, batch)
    monkeypatch.setattr(scanning, "MAX_TOKENS", tokens)
    monkeypatch.setattr(marching, "_ROWS", tokens)
    monkeypatch.setattr(marching, "_LOGITS", tokens * 10)
    assert differ(reading, editors(model, batch, "all")) < 1e-5
    assert differ(reading, editors(model, batch, "prompt_last")) < 1e-5
    monkeypatch.setattr(scanning, "_TRUNKS_PER_GROUP", 1)
    heads = model_facts(model).heads()
    begun: list[int] = []
    made = scanning.Trunk.__init__
    monkeypatch.setattr(
        scanning.Trunk, "__init__", lambda self, *args: (begun.append(len(args[1])), made(self, *args))[1]
    )
    components = [AblateHeads([head]) for head in heads]
    assert 4 <= len(packed_readings(reading, components)) - 1 < len(heads)
    fast, plain = (head_effects(reading, heads, scan=by) for by in ("auto", "plain"))
    assert (fast.attrs["scan"], plain.attrs["scan"]) == ("packed", "plain (it was asked for)")
    # What a group does not change is done once for all groups, where all prompts go in one pass.
    assert (begun.count(len(batch)) == 2) == (tokens == 100)
    np.testing.assert_allclose(fast, plain, atol=1e-5)


def test_what_prompts_share_is_run_once() -> None:
    """The packs: a stem of the template, no padding; of the last row alone, one row per prompt."""
    model, batch = told("llama")
    lengths = batch.lengths.tolist()
    packed = scanning._Packed(refusal_reading(model, batch))
    rows = list(range(len(batch)))
    with torch.no_grad():
        whole = packed._trunk(rows, packed._edited(AblateHeads([(0, 0)])))[0]
        last = packed._trunk(rows, packed._edited(AblateHeads([(0, 0)], positions="prompt_last")))[0]
    n_shared = 0
    while len({tuple(ids[: n_shared + 1]) for ids in packed.ids}) == 1:
        n_shared += 1
    assert whole.pack.n_stem == n_shared > 3
    assert len(whole.pack) == sum(lengths) - n_shared * (len(lengths) - 1)
    assert len(last.pack) == len(batch)
    assert last.pack.past_real.sum(dim=1).tolist() == [length - 1 for length in lengths]


@pytest.mark.parametrize("editor", [AblateHeads, AblateNeurons])
def test_means_over_data_are_taken_once(monkeypatch: pytest.MonkeyPatch, editor: Any) -> None:
    model, batch = told("llama")
    passes: list[int] = []
    run = reference.last_logits

    def counted(*args: Any) -> torch.Tensor:
        passes.append(1)
        return run(*args)

    monkeypatch.setattr(reference, "last_logits", counted)
    components = [
        editor([(layer, number)], method="mean", reference=batch) for layer in range(3) for number in range(4)
    ]
    assert differ(refusal_reading(model, batch), components) < 1e-5
    assert len(passes) == 1 + len(components)  # one for all, and on the plain way one for each


def test_it_is_used_where_it_can_be_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = told("llama")
    reading, heads = refusal_reading(model, batch), model_facts(model).heads()
    runs: list[str] = []

    def read(components: Any) -> np.ndarray:
        runs.append(repr(list(components)))
        return reading.read(components)

    counted = Reading(reading.name, "nats", model, batch, read, first_word=reading.first_word)
    store: dict[str, Any] = {}
    first = head_effects(counted, heads, remember=store)
    assert not runs
    assert len(store) == len(heads) + 1
    again = head_effects(counted, heads, remember=store)
    assert not runs
    assert float(abs(again - first).max()) == 0
    assert head_effects(counted, heads[:2]).attrs["scan"] == "plain (too few edits)"
    assert len(runs) == 3
    own = Reading("mine", "nats", model, batch, read)
    assert head_effects(own, heads).attrs["scan"] == "plain (the reading is not refusal_score alone)"
    assert len(runs) == 3 + 1 + len(heads)
    runs.clear()
    # Among editors that are served, some that are not: each its own way, in one call.
    mixed: dict[str, Any] = {str(head): AblateHeads([head]) for head in heads}
    mixed["resampled"] = AblateHeads([(0, 1)], method="resample", reference=batch)  # too few of its kind
    mixed["last"] = AblateHeads([(1, 1)], positions="prompt_last")
    baseline, effects = set_effects(counted, mixed)
    assert len(runs) == 2
    for place, component in enumerate(mixed.values()):
        np.testing.assert_allclose(baseline + effects[:, place], reading([component]), atol=1e-5)
    # A user's own hook counts in both ways.
    hook = [("blocks.1.hook_mlp_out", lambda value, hook: value * 1.5)]
    with hooked(model, hook):
        found = head_effects(reading, heads)
        assert found.attrs["scan"] == "plain (there are hooks on the model)"
    assert float(abs(found - first).max()) > 1e-3


def test_what_a_model_refused_elsewhere_is_refused_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process found that this model does not run in packs: the next scan here knows, and none warns."""
    monkeypatch.setattr(scanning, "_refused", WeakKeyDictionary())
    model, batch = told("llama")
    reading = refusal_reading(model, batch)
    components = [AblateHeads([head]) for head in model_facts(model).heads()]
    with warnings.catch_warnings(action="error"):
        scan = Scan(reading, components)
        scan.learn(False, "")
        assert Scan(reading, components).fewest > 1
        scan.learn(False, "it fell apart")
        again = Scan(reading, components)
    assert (scan.told, again.told) == ("plain (it fell apart)",) * 2
    assert again.fewest == 1


def test_numbers_that_differ_are_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on which the two ways disagree is read the plain way, with a warning."""
    model, batch = told("llama")
    reading, heads = refusal_reading(model, batch), model_facts(model).heads()
    plain = head_effects(reading, heads, scan="plain")
    made = scanning.Trunk.__init__

    def off(self: Any, *args: Any) -> None:
        made(self, *args)
        self.before[1] = self.before[1] * 1.001

    def broken(self: Any, *args: Any) -> None:
        raise TypeError("a part is missing")

    for wrong, said in ((off, "the fast scan gives other scores"), (broken, "a part is missing")):
        monkeypatch.setattr(scanning, "_refused", WeakKeyDictionary())
        monkeypatch.setattr(scanning.Trunk, "__init__", wrong)
        with pytest.warns(RuntimeWarning, match=said):
            found = head_effects(reading, heads)
        np.testing.assert_array_equal(found, plain)
        assert said in found.attrs["scan"]
        with warnings.catch_warnings(action="error"):  # it is known now, and not tried again
            assert head_effects(reading, heads).attrs["scan"] == found.attrs["scan"]


def test_half_precision_ranks_where_it_is_asked_to() -> None:
    """In bfloat16: plain unless asked; asked, in packs, with the error told; never remembered."""
    exact, batch = told("llama")
    heads = model_facts(exact).heads()
    truth = head_effects(refusal_reading(exact, batch), heads)
    model = wrap_hf(hf_of("llama").to(torch.bfloat16), toy_tokenizer(), family=FAMILIES[0])
    reading = refusal_reading(model, batch)
    with warnings.catch_warnings(action="error"):
        assert head_effects(reading, heads).attrs["scan"] == "plain (the weights are torch.bfloat16)"
    with pytest.warns(RuntimeWarning, match="a ranking, and no more"):
        rough = head_effects(reading, heads, scan="rough")
    assert rough.attrs["scan"].startswith("packed, rough (torch.bfloat16: off by up to 0.")
    assert "others may be by more" in rough.attrs["scan"]  # what was checked is no bound
    sizes = [np.abs(found.values).mean(0) for found in (truth, rough)]
    assert np.corrcoef(*sizes)[0, 1] > 0.9
    assert 0 < np.abs(rough - truth).max() < 0.5
    with pytest.raises(ValueError, match="taken for exact ones"):
        head_effects(reading, heads, remember={}, scan="rough")
    again = head_effects(refusal_reading(exact, batch), heads, scan="rough")
    assert again.attrs["scan"] == "packed"  # float32 is exact, asked or not
    np.testing.assert_array_equal(again, truth)


def test_mistakes_are_told_as_on_the_plain_way() -> None:
    model, batch = told("llama")
    with pytest.raises(UnknownHead):
        Scan(refusal_reading(model, batch), [AblateHeads([(layer, 0)]) for layer in range(8)])([])
    opened = ChatFormat.from_model(model).render(PROMPTS, think="open")
    with pytest.raises(ConditionError, match="open think block"):
        head_effects(refusal_reading(model, opened), model_facts(model).heads())
    with pytest.raises(ValueError, match="'auto', 'plain' and 'rough'"):
        head_effects(refusal_reading(model, batch), [(0, 0)], scan="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_effects(family: str) -> None:
    spoken = speaker("qwen3", family)
    batch = spoken.chat.render(PROMPTS, think="off")
    reading = refusal_reading(spoken.model, batch)
    heads = model_facts(spoken.model).heads()
    fast, plain = (head_effects(reading, heads, scan=by) for by in ("auto", "plain"))
    np.testing.assert_allclose(fast, plain, atol=1e-5)
    assert fast.attrs["scan"] == "packed"


@on_hooked
@pytest.mark.parametrize(
    ("architecture", "switch", "told_why"),
    [
        ("alibi", None, "positions are alibi"),
        ("gpt2_gelu", "use_attn_in", "use_attn_in is on"),
        ("llama", "use_attn_result", "use_attn_result is on"),
        ("llama", "use_split_qkv_input", "use_split_qkv_input is on"),
    ],
)
def test_a_hooked_transformer_that_cannot_be_taken_apart_is_read_one_by_one(
    architecture: str, switch: str | None, told_why: str
) -> None:
    model, batch = told(architecture, "hooked")
    reading, heads = refusal_reading(model, batch), model_facts(model).heads()
    if switch:
        getattr(model, f"set_{switch}")(True)
    try:
        found = head_effects(reading, heads)
    finally:
        if switch:
            getattr(model, f"set_{switch}")(False)
    assert found.attrs["scan"] == f"plain ({told_why}.)"
    assert head_effects(reading, heads).attrs["scan"] == ("packed" if switch else found.attrs["scan"])


@on_hooked
@pytest.mark.parametrize("architecture", ["windows", "folded"])
def test_a_hooked_transformer_is_afterwards_as_before(architecture: str) -> None:
    model, batch = told(architecture, "hooked")
    reading = refusal_reading(model, batch)
    scores = reading()

    def state() -> list[Any]:
        found: list[Any] = [(name, id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()]
        for name, module in model.named_modules():
            found.append((name, id(module), sorted(vars(module)), len(module._forward_hooks)))
        return found

    before = state()
    bare = BareHooked(model)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    for block in bare.layers:
        assert {parameter.data_ptr() for parameter in block.parameters()} <= shared
    packed_readings(reading, [AblateHeads([(0, 0)])])
    assert state() == before
    np.testing.assert_array_equal(reading(), scores)


@on_the_bridge
def test_nothing_is_copied_and_nothing_stays() -> None:
    model, batch = told("gemma2")
    reading = refusal_reading(model, batch)
    scores = reading()  # the bridge puts hooks of its own on its norms in its first pass

    def state() -> list[Any]:
        hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
        return [[(name, id(parameter)) for name, parameter in model.named_parameters()], hooks]

    before = state()
    bare = BareBridge(model)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in bare.hf.parameters()} <= shared
    packed_readings(reading, [AblateHeads([(0, 0)])])
    assert model.original_model.config._attn_implementation == "eager"
    assert state() == before
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    np.testing.assert_array_equal(reading(), scores)


@on_the_bridge
def test_a_model_that_was_cached_once_is_read_in_packs() -> None:
    """What transformers leaves on a model that was asked for hidden states or attentions listens, and changes nothing."""
    model, batch = told("llama")
    model.run_with_cache(batch.tokens, attention_mask=batch.attention_mask)
    reading = refusal_reading(model, batch)
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    found = head_effects(reading, heads)
    assert found.attrs["scan"] == "packed"
    np.testing.assert_allclose(found, head_effects(reading, heads, scan="plain"), atol=1e-5)


@pytest.mark.parametrize("way", ["point", "component", "before", "every module"])
def test_hooks_of_pytorchs_own_are_seen_wherever_they_act(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """One acts on a single prompt, on which the two ways are not held against each other."""
    model = rl.load_model("toy")
    chat = ChatFormat.from_model(model)
    batch = chat.render(rl.load_prompts("harmful", language="toy", split="select")[:8], think="off")
    reading = refusal_reading(model, batch)
    heads = [(layer, head) for layer in range(2) for head in range(4)]
    lengths = batch.lengths.tolist()
    checked = {lengths.index(max(lengths)), lengths.index(min(lengths))}
    alone = next(row for row in range(len(batch)) if row not in checked)
    words = batch.tokens[alone][batch.attention_mask[alone].bool()]
    read: list[torch.Tensor] = []

    def halved(value: torch.Tensor) -> torch.Tensor:
        mine = torch.tensor([torch.equal(row[-len(words) :], words) for row in read[-1]])
        return torch.where(mine[:, None, None], value * 0.3, value)

    own = type(model).forward

    def noting(self: Any, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        read.append(tokens)
        return own(self, tokens, *args, **kwargs)

    monkeypatch.setattr(
        type(model), "forward", noting
    )  # no hook: nothing but the one of this test is to be seen
    mlp, point = model.blocks[1].mlp, model.hook_dict["blocks.1.hook_mlp_out"]
    if way == "every module":
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, value: halved(value) if module is mlp else None
        )
    elif way == "before":
        handle = point.register_forward_pre_hook(lambda module, args: (halved(args[0]),))
    else:
        target = mlp if way == "component" else point
        handle = target.register_forward_hook(lambda module, args, value: halved(value))
    try:
        found = head_effects(reading, heads)
        plain = np.stack([reading([AblateHeads([head])]) for head in heads], 1) - reading([])[:, None]
    finally:
        handle.remove()
    assert found.attrs["scan"] == "plain (there are hooks on the model)"
    np.testing.assert_allclose(found.values, plain, atol=1e-5)
    assert abs(plain[alone] - head_effects(reading, heads).values[alone]).max() > 1e-2
    assert head_effects(reading, heads).attrs["scan"] == "packed"


def test_a_forward_pass_of_another_is_read_one_by_one() -> None:
    """It may do something else to prompts that are not checked."""
    model, batch = told("llama")
    reading = refusal_reading(model, batch)
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    own = model.forward
    model.forward = own
    assert "replaced" in head_effects(reading, heads).attrs["scan"]
    del model.forward
    assert head_effects(reading, heads).attrs["scan"] == "packed"
