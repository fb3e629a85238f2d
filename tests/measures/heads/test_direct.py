"""Direct effects against exact ablations in a model whose later layers are held at what they wrote before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rim_lens as rl
from rim_lens.chat import ChatFormat
from rim_lens.errors import (
    ConditionError,
    ImpossibleEdit,
    UnknownHead,
    UnknownLayer,
    UnsupportedModel,
    WrongHookShape,
)
from rim_lens.lens import hooked, model_facts, wrap_hf
from rim_lens.measures.heads.direct import direct_effects
from rim_lens.measures.heads.effects import head_effects
from rim_lens.measures.readings import refusal_reading
from rim_lens.measures.refusal.openers import opener_ids
from rim_lens.organisms.planted import DECOY_HEAD, READER, TOPIC_HEAD
from rim_lens.organisms.toy.host import TOKEN, toy_tokenizer
from tests.families import FAMILIES, VOCABULARY, Case, fill, random_batch
from tests.measures.heads.redundant import COPY, with_two_readers
from tests.speaking import REQUESTS, Spoken, fresh, ids_of, writer

WRITES = ("hook_attn_out", "hook_mlp_out")


def log_odds(logits: Tensor, openers: Sequence[int]) -> float:
    chances = logits.double().softmax(dim=-1)
    return float(chances[list(openers)].sum().logit())


def by_freezing(model: Any, ids: Sequence[int], openers: Sequence[int]) -> np.ndarray:
    """Zero z of one head in the last row; all that is written after it there stays as it was. One prompt, no padding."""
    facts, tokens = model_facts(model), torch.tensor([list(ids)])
    seen: dict[str, Tensor] = {}

    def run(hooks: list[Any]) -> float:
        with torch.no_grad(), hooked(model, hooks):
            return log_odds(model(tokens, return_type="logits")[0, -1], openers)

    def keep(name: str) -> Any:
        return lambda tensor, hook: seen.__setitem__(name, tensor.clone())

    def frozen(name: str) -> Any:
        def hook_function(tensor: Tensor, hook: Any) -> Tensor:
            return torch.cat([tensor[:, :-1], seen[name][:, -1:]], dim=1)

        return hook_function

    def zeroed(head: int) -> Any:
        def hook_function(tensor: Tensor, hook: Any) -> Tensor:
            tensor = tensor.clone()
            tensor[:, -1, head] = 0
            return tensor

        return hook_function

    names = [f"blocks.{layer}.{site}" for layer in range(facts.n_layers) for site in WRITES]
    baseline = run([(name, keep(name)) for name in names])
    effects = np.empty((facts.n_layers, facts.n_heads))
    for layer, head in facts.heads():
        later = [(name, frozen(name)) for name in names[2 * layer + 1 :]]
        effects[layer, head] = run([(f"blocks.{layer}.attn.hook_z", zeroed(head)), *later]) - baseline
    return effects


@pytest.mark.family_contract
def test_all_later_writes_held_the_ablation_is_the_direct_effect(spoken: Spoken) -> None:
    batch = spoken.chat.render(REQUESTS, think="off")
    found = direct_effects(spoken.model, batch)
    for row in range(len(batch)):
        expected = by_freezing(spoken.model, ids_of(batch, row), [TOKEN["REFUSE"]])
        np.testing.assert_allclose(found["direct_effect"][row], expected, atol=4e-5)
        assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(found["baseline"], rl.refusal_score(spoken.model, batch), atol=2e-5)
    for row in range(len(batch)):
        alone = direct_effects(spoken.model, batch.select([row]))
        np.testing.assert_allclose(
            found.isel(prompt=[row])["direct_effect"], alone["direct_effect"], atol=4e-5
        )
    assert not any(point.fwd_hooks for point in spoken.model.hook_dict.values())


def test_folded_and_centred_weights(case_processed: Case) -> None:
    """The same direct effect of every head, the value biases aside, which folding moves out of z: z W_O as it stands."""
    found = direct_effects(case_processed.model, case_processed.batch, openers=["w5", "w9"])["direct_effect"]
    for row in range(len(case_processed.batch)):
        expected = by_freezing(case_processed.model, ids_of(case_processed.batch, row), [5, 9])
        np.testing.assert_allclose(found[row], expected, atol=1e-4)


def test_with_the_last_mlp_silent_direct_and_exact_effects_are_one(spoken_gqa: Spoken) -> None:
    """In the last layer nothing but the MLP comes after a head."""
    model = fresh("qwen3", spoken_gqa.family)
    last = model_facts(model).n_layers - 1
    batch = spoken_gqa.chat.render(REQUESTS, think="off")
    with hooked(model, [(f"blocks.{last}.hook_mlp_out", lambda tensor, hook: tensor * 0)]):
        found = direct_effects(model, batch)["direct_effect"]
        exact = head_effects(
            refusal_reading(model, batch), [(last, head) for head in range(6)], positions="prompt_last"
        )
    np.testing.assert_allclose(found.sel(layer=last), exact, atol=4e-5)


@pytest.mark.skipif("bridge" not in FAMILIES, reason="Gemma is wrapped by the bridge alone")
@pytest.mark.parametrize("version", [2, 3])
def test_where_a_norm_follows_attention(version: int) -> None:
    """Gemma 2 and 3 normalise what attention gives before adding it; Gemma 2 caps its logits as well."""
    import transformers

    config, kind = (
        (transformers.Gemma2Config, transformers.Gemma2ForCausalLM)
        if version == 2
        else (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM)
    )
    hf = kind(
        config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=48,
            sliding_window=8,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            attn_implementation="eager",
        )
    )
    fill(hf)
    model = wrap_hf(hf.eval(), toy_tokenizer(), family="bridge")
    batch = random_batch(seed=4, n_prompts=3)
    found = direct_effects(model, batch, openers=["REFUSE"])["direct_effect"]
    for row in range(3):
        expected = by_freezing(model, ids_of(batch, row), [TOKEN["REFUSE"]])
        np.testing.assert_allclose(found[row], expected, atol=1e-4)
        assert np.abs(expected).max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("blocks.0.hook_attn_out", "not z W_O"),
        ("blocks.1.hook_resid_pre", "not the sum of what the layers write"),
    ],
)
def test_models_that_do_not_add_up_are_refused(family: str, name: str, told: str) -> None:
    """What a multiplier or a norm in an unknown place would do, done by a hook."""
    model = fresh("llama", family)
    batch = ChatFormat.from_model(model).render(REQUESTS, think="off")
    with (
        hooked(model, [(name, lambda tensor, hook: tensor * 1.2)]),
        pytest.raises(UnsupportedModel, match=told),
    ):
        direct_effects(model, batch)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cap_on_logits_is_kept_or_the_model_refused(family: str) -> None:
    """HookedTransformer caps where its configuration says so; the bridge's model does not know of this cap."""
    model = fresh("llama", family)
    batch = ChatFormat.from_model(model).render(REQUESTS, think="off")
    model.cfg.output_logits_soft_cap = 0.7
    if family == "bridge":
        with pytest.raises(UnsupportedModel, match="not final norm and unembedding"):
            direct_effects(model, batch)
        return
    found = direct_effects(model, batch)["direct_effect"]
    np.testing.assert_allclose(found[0], by_freezing(model, ids_of(batch, 0), [TOKEN["REFUSE"]]), atol=4e-5)


@pytest.mark.npm
@pytest.mark.parametrize("family", FAMILIES)
def test_the_row_that_is_read_comes_after_the_whitespace_that_the_model_writes(family: str) -> None:
    """What is written depends on the position, so that one batch has rows that skip nothing and rows that skip some."""
    taught = writer("qwen3", family, 64)
    chat = ChatFormat.from_model(taught.model)
    newline, sorry = chat.encode("\n")[0], chat.encode("Sorry")[0]
    batch = chat.render(["one", "one two three", "one two three four five"], think="off")
    assert (batch.lengths - batch.lengths[0]).tolist() == [0, 2, 4]
    model = taught.teach(int(batch.lengths[0]), [sorry, sorry, newline, sorry, newline, newline, sorry])
    skipped = rl.refusal_score(model, batch)["skipped"].values.tolist()
    assert skipped == [0, 1, 2]
    found = direct_effects(model, batch)["direct_effect"]
    for row, count in enumerate(skipped):
        expected = by_freezing(model, [*ids_of(batch, row), *[newline] * count], opener_ids(chat.tokenizer))
        np.testing.assert_allclose(found[row], expected, atol=4e-5)
        assert np.abs(expected).max() > 1e-4


def test_planted_heads_and_what_a_direct_effect_does_not_show() -> None:
    model = rl.load_model("planted")
    chat = rl.ChatFormat.from_model(model)
    off = chat.render(rl.load_prompts("harmful", language="toy", split="select")[::5], think="off")
    effect = direct_effects(model, off)["direct_effect"].mean("prompt")
    assert float(effect[READER]) < -10
    assert abs(float(effect[TOPIC_HEAD])) < 0.5  # it works through the MLP: −17 when removed
    assert abs(float(effect[DECOY_HEAD])) < 0.5
    twice = direct_effects(with_two_readers(), off)["direct_effect"].mean("prompt")
    top = twice.stack(cell=("layer", "head")).sortby(twice.stack(cell=("layer", "head")))
    assert {tuple(cell) for cell in top["cell"].values[:2]} == {READER, COPY}
    assert float(twice[COPY]) < -10  # while removing it changes nothing, see test_pairs


def test_projections(spoken_gqa: Spoken) -> None:
    batch = spoken_gqa.chat.render(REQUESTS, think="off")
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    found = direct_effects(spoken_gqa.model, batch, direction=direction, layer=1)
    oracle = spoken_gqa.oracle
    weight = oracle.out_projection(0).weight.view(32, 6, 12)  # Linear: [d_model, head × d_head]
    for row in range(len(batch)):
        tokens = torch.tensor([ids_of(batch, row)])
        z = oracle.run(tokens, torch.ones_like(tokens)).z[0][0, -1]
        expected = torch.einsum("hd,mhd->hm", z, weight) @ direction / direction.norm()
        np.testing.assert_allclose(found["projection"][row, 0], expected, atol=2e-5)
    assert np.isnan(found["projection"].sel(layer=1)).all()  # too late for a direction read before layer 1
    assert not np.isnan(found["direct_effect"]).any()
    longer = direct_effects(spoken_gqa.model, batch, direction=-3 * direction, layer=1)
    np.testing.assert_allclose(longer["projection"], -found["projection"], atol=1e-6)


def test_some_heads_and_mistakes(spoken_gqa: Spoken) -> None:
    model, batch = spoken_gqa.model, spoken_gqa.chat.render(REQUESTS, think="off")
    every = direct_effects(model, batch)["direct_effect"]
    some = direct_effects(model, batch, [(1, 4), (0, 2)])["direct_effect"]
    assert int((~np.isnan(some.isel(prompt=0))).sum()) == 2
    for cell in ((1, 4), (0, 2)):
        np.testing.assert_allclose(some[:, *cell], every[:, *cell], atol=1e-6)
    vector = torch.ones(32)
    with pytest.raises(UnknownHead):
        direct_effects(model, batch, [(2, 0)])
    with pytest.raises(UnknownLayer, match="without its layer"):
        direct_effects(model, batch, direction=vector)
    with pytest.raises(UnknownLayer):
        direct_effects(model, batch, direction=vector, layer=2)
    with pytest.raises(WrongHookShape, match="32 wide"):
        direct_effects(model, batch, direction=torch.ones(31), layer=1)
    with pytest.raises(ImpossibleEdit, match="norm 0"):
        direct_effects(model, batch, direction=vector * 0, layer=1)
    with pytest.raises(ConditionError, match="open think block"):
        direct_effects(model, spoken_gqa.chat.render(REQUESTS, think="open"))
