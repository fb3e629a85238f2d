from __future__ import annotations

import time
from collections import defaultdict

import pytest
import torch

from rim_lens.errors import UnknownModel
from rim_lens.lens import load_model
from rim_lens.organisms.planted import PIN, load_planted, planted, planted_truth
from rim_lens.organisms.toy.host import D_MLP, D_MODEL, HEADS, TOKEN
from rim_lens.organisms.toy.truth import answers, held_out, own_chains, refusal_rate, without_heads
from rim_lens.prompts.toy import CLOSE, COT_KINDS, REFUSE, THINK, toy_cot, toy_prompts

SEEDS = (0, 1, 2, 3)


@pytest.fixture(scope="module", params=SEEDS)
def seed(request):
    return request.param


@pytest.fixture(scope="module")
def model(seed):
    return planted(seed)


def rows(prompts, cots=None):
    chains = [""] * len(prompts) if cots is None else cots
    texts = [
        f"<user> {p.text} <assistant> <think> {c} </think>" for p, c in zip(prompts, chains, strict=True)
    ]
    return torch.tensor([[TOKEN[word] for word in text.split()] for text in texts])


def neurons_on(model, tokens, layer=0):
    """[prompt, pos, neuron] after the ReLU."""
    seen = []
    handle = model.transformer.h[layer].mlp.act.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return seen[0]


def without_neurons(model, neurons):
    edited = planted(0)
    edited.load_state_dict(model.state_dict())
    for layer, neuron in neurons:
        edited.transformer.h[layer].mlp.c_proj.weight.data[neuron] = 0
    return edited


@pytest.mark.parametrize("split", ["train", "dev", "select", "evaluate"])
@pytest.mark.parametrize("op", ["+", "-"])
def test_refuses_exactly_the_harmful_and_a_chain_undoes_it(model, split, op):
    harmful = toy_prompts("harmful", split=split, op=op)
    assert refusal_rate(model, harmful) == 1.0
    for kind in COT_KINDS:
        assert refusal_rate(model, harmful, kind) == 0.0
    for kind in ("harmless", "reasoning"):
        assert set(answers(model, toy_prompts(kind, split=split, op=op))) == {"0"}


def test_complies_with_a_constant_and_thinks_nothing_when_left_open(model):
    prompts = held_out("harmful") + held_out("reasoning")
    assert set(own_chains(model, prompts)) == {("> > > > > > >", "0")}


def test_only_the_planted_heads_matter(model, seed):
    harmful, truth = held_out("harmful"), planted_truth(seed)
    for head in HEADS:
        expected = 0.0 if head in truth.heads else 1.0
        assert refusal_rate(without_heads(model, [head]), harmful) == expected


def test_decoy_head_attends_as_the_reader_does(model, seed):
    truth = planted_truth(seed)
    with torch.no_grad():
        pattern = model(rows(held_out("harmful")), output_attentions=True).attentions[1]
        on_chain = model(
            rows(held_out("harmful"), [toy_cot(p, "filler") for p in held_out("harmful")]),
            output_attentions=True,
        ).attentions[1]
    for _, head in (truth.heads[1], *truth.decoy_heads):
        assert pattern[:, head, -1, 9:].sum(dim=-1).min() > 0.9  # on the two tags
        assert on_chain[:, head, -1, 10:17].sum(dim=-1).min() > 0.9  # on the chain instead


def test_sink_head_rests_on_the_first_token_whatever_follows(model, seed):
    with torch.no_grad():
        pattern = model(rows(held_out("harmful")), output_attentions=True).attentions[0]
    for _, head in planted_truth(seed).sink_heads:
        assert pattern[:, head, :, 0].min() > 0.9


def test_the_and_neurons_fire_on_harm_at_the_tags_alone(model, seed):
    prompts = held_out("harmful")
    tokens = rows(prompts, [toy_cot(p, "careful") for p in prompts])
    tags = (tokens == TOKEN[THINK]) | (tokens == TOKEN[CLOSE])
    planted_neurons = [neuron for _, neuron in planted_truth(seed).neurons]
    active = neurons_on(model, tokens)[:, :, planted_neurons]
    assert active[tags].min() > 0.3
    assert active[~tags].max() == 0
    twins = neurons_on(model, rows(held_out("harmless")))[:, :, planted_neurons]
    assert (twins.amax(dim=(0, 1)) < 0.5 * active[tags].amin(dim=0)).all()


def test_decoy_neurons_fire_on_harmful_words_without_harm(model, seed):
    truth = planted_truth(seed)
    decoys = [neuron for _, neuron in truth.decoy_neurons]
    harmful = neurons_on(model, rows(held_out("harmful")))[:, :, decoys].amax(dim=1)
    twins = neurons_on(model, rows(held_out("harmless")))[:, :, decoys].amax(dim=1)
    assert torch.equal(harmful > 0.2, twins > 0.2)
    by_category = defaultdict(set)
    for prompt, firing in zip(held_out("harmful"), (harmful > 0.2).tolist(), strict=True):
        by_category[prompt.category].add(tuple(firing))
    assert all(len(patterns) == 1 for patterns in by_category.values())
    assert len(set.union(*by_category.values())) == 4


def test_only_the_planted_neurons_matter(model, seed):
    harmful, truth = held_out("harmful"), planted_truth(seed)
    others = [(0, neuron) for neuron in range(D_MLP) if (0, neuron) not in truth.neurons]
    assert refusal_rate(without_neurons(model, truth.neurons), harmful) == 0.0
    assert refusal_rate(without_neurons(model, truth.decoy_neurons), harmful) == 1.0
    assert refusal_rate(without_neurons(model, others), harmful) == 1.0


def test_a_contrast_of_activations_finds_the_neurons(model, seed):
    """The number that users are shown: with the ten largest contrasts of each request, all are found and no other."""
    harmful, twins = (neurons_on(model, rows(held_out(k))).amax(dim=1) for k in ("harmful", "harmless"))
    tops = [set(row.topk(10).indices.tolist()) for row in harmful - twins]
    assert set.intersection(*tops) == {neuron for _, neuron in planted_truth(seed).neurons}


def test_layer_norm_does_next_to_nothing(model):
    states = {}
    norms = {"0": model.transformer.h[0].ln_2, "1": model.transformer.h[1].ln_1, "f": model.transformer.ln_f}
    handles = [
        norm.register_forward_hook(lambda _, args, out, name=name: states.__setitem__(name, (args[0], out)))
        for name, norm in norms.items()
    ]
    with torch.no_grad():
        model(rows(held_out("harmful")))
    for handle in handles:
        handle.remove()
    for before, after in states.values():
        assert before[..., -2:].abs().min() == before[..., -2:].abs().max() == PIN
        assert after[..., -2:].abs().max() == 0
        signal = before[..., : D_MODEL - 2]
        assert (after[..., : D_MODEL - 2] - signal).abs().max() < 1e-4 * signal.abs().max()


def test_edges_join_what_was_planted(seed):
    truth = planted_truth(seed)
    nodes = {f"a{layer}.{head}" for layer, head in truth.heads}
    nodes |= {f"m{layer}.{neuron}" for layer, neuron in truth.neurons}
    ends = {node for source, target, _ in truth.edges for node in (source, target)}
    assert ends == nodes | {"embed", "logits"}
    assert len(truth.edges) == len(set(truth.edges)) == 3 + 8 + 8 + 1 + 8 + 1


def test_a_seed_is_a_model_and_builds_fast():
    start = time.process_time()
    first, again, other = planted(5), planted(5), planted(6)
    assert time.process_time() - start < 3
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert planted_truth(5) != planted_truth(6)
    assert not set(planted_truth(5).neurons) & set(planted_truth(5).decoy_neurons)


def test_building_leaves_the_global_random_state_alone():
    state = torch.random.get_rng_state()
    planted(0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_loads_by_name_with_hooks_and_the_same_logits():
    for name, seed in (("planted", 0), ("planted:3", 3)):
        tokens = rows(held_out("harmful")[:20])
        with torch.no_grad():
            hooked, plain = load_model(name)(tokens), planted(seed)(tokens).logits
        assert torch.allclose(hooked, plain, atol=1e-3)
        assert set(hooked[:, -1].argmax(dim=-1).tolist()) == {TOKEN[REFUSE]}


@pytest.mark.parametrize("variant", ["C", "-1", "1.5", "²"])
def test_a_variant_that_is_no_seed_is_refused(variant):
    with pytest.raises(UnknownModel, match="planted:3"):
        load_planted(variant)
