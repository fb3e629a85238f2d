"""Ablations against the plain model with its weights zeroed, or its projections' inputs edited by hand."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rim_lens.chat.spans import ATOMS
from rim_lens.errors import (
    EmptySpan,
    NotFinite,
    ReferenceMismatch,
    SpanError,
    UnknownHead,
    UnknownNeuron,
    UnsupportedModel,
    WrongHookShape,
)
from rim_lens.hooks import AblateHeads, AblateNeurons, NeuronActivations, bound
from rim_lens.lens import Decoder, all_logits, last_logits
from tests.editing import N_NEW, agrees, copying, differs, logits_under, pairs_by_hand, same
from tests.families import FAMILIES, Case, close, random_batch, rows_of, tiny_moe

pytestmark = pytest.mark.family_contract

HEADS = [(0, 1), (1, 3), (1, 0)]
NEURONS = [(0, 7), (1, 2), (1, 40 - 1)]


def setter(pairs: list[tuple[int, int]], rows: Tensor, values: dict[int, Tensor] | None = None) -> Callable:
    """Set z of a head, or a neuron, to 0 or to a value, at chosen rows, with loops."""

    def change(layer: int, value: Tensor) -> Tensor:
        for its_layer, index in pairs:
            if its_layer == layer:
                for prompt, pos in rows.nonzero().tolist():
                    value[prompt, pos, index] = 0 if values is None else values[layer][index]
        return value

    return change


# --- the whole sequence: the weights say the same ------------------------------------------------------


@pytest.mark.oracle("AblateHeads zero", "the head's rows of W_O zeroed")
@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize("layer", [0, 1])
def test_ablating_a_head_equals_zeroing_its_rows_of_w_o(case: Case, layer: int, head: int) -> None:
    oracle, width = case.edited_oracle(), case.facts.d_head
    oracle.zero_rows(oracle.out_projection(layer), head * width, (head + 1) * width)
    found = logits_under(case, AblateHeads([(layer, head)]))
    same(case, found, oracle.run(case.batch.tokens, case.batch.attention_mask).logits)
    differs(case, found)


def test_ablating_heads_of_several_layers(case: Case) -> None:
    oracle, width = case.edited_oracle(), case.facts.d_head
    for layer, head in HEADS:
        oracle.zero_rows(oracle.out_projection(layer), head * width, (head + 1) * width)
    expected = oracle.run(case.batch.tokens, case.batch.attention_mask).logits
    same(case, logits_under(case, AblateHeads(HEADS)), expected)
    same(case, logits_under(case, *(AblateHeads([pair]) for pair in HEADS)), expected)


def test_ablating_every_head_leaves_no_attention_output(case: Case) -> None:
    """What is left of the attention is its bias."""
    found = logits_under(case, AblateHeads(case.facts.heads()))
    oracle = case.edited_oracle()
    for layer in range(case.facts.n_layers):
        oracle.zero_rows(oracle.out_projection(layer), 0, case.facts.n_heads * case.facts.d_head)
    same(case, found, oracle.run(case.batch.tokens, case.batch.attention_mask).logits)


@pytest.mark.oracle("AblateNeurons zero", "the neurons' rows of the down-projection zeroed")
def test_ablating_neurons_equals_zeroing_their_rows_of_the_down_projection(case: Case) -> None:
    oracle = case.edited_oracle()
    for layer, neuron in NEURONS:
        oracle.zero_rows(oracle.down_projection(layer), neuron, neuron + 1)
    found = logits_under(case, AblateNeurons(NEURONS))
    same(case, found, oracle.run(case.batch.tokens, case.batch.attention_mask).logits)
    differs(case, found)


def test_processed_weights_still_have_the_neurons(case_processed: Case) -> None:
    oracle = case_processed.edited_oracle()
    for layer, neuron in NEURONS:
        oracle.zero_rows(oracle.down_projection(layer), neuron, neuron + 1)
    real = case_processed.batch.attention_mask.bool()
    truth = oracle.run(case_processed.batch.tokens, case_processed.batch.attention_mask).logits
    found = logits_under(case_processed, AblateNeurons(NEURONS))
    close(found[real].log_softmax(-1), truth[real].log_softmax(-1), 1e-4)


def test_processed_weights_move_a_constant_out_of_z(case_processed: Case) -> None:
    """Zero means another thing there: what the biases put into every value is folded into the output bias.

    Without such biases (Llama, Qwen3) it is the plain model's ablation; with them (GPT-2) the constant stays.
    """
    oracle, batch, facts = case_processed.oracle, case_processed.batch, case_processed.facts
    width = facts.n_heads * facts.d_head
    left: dict[int, Tensor] = {}
    for layer, block in enumerate(oracle.blocks):
        constant = torch.zeros(width)
        if oracle.is_gpt2:
            projection = block.attn.c_attn
            constant = projection.bias[2 * width :] + block.ln_1.bias @ projection.weight[:, 2 * width :]
        left[layer] = constant.view(facts.n_heads, -1)
    everywhere = torch.ones_like(batch.attention_mask, dtype=torch.bool)
    truth = oracle.run(batch.tokens, batch.attention_mask, change_z=setter(HEADS, everywhere, left)).logits
    real = batch.attention_mask.bool()
    found = logits_under(case_processed, AblateHeads(HEADS))
    close(found[real].log_softmax(-1), truth[real].log_softmax(-1), 1e-4)


def test_heads_and_neurons_stack(case: Case) -> None:
    oracle, width = case.edited_oracle(), case.facts.d_head
    for layer, head in HEADS:
        oracle.zero_rows(oracle.out_projection(layer), head * width, (head + 1) * width)
    for layer, neuron in NEURONS:
        oracle.zero_rows(oracle.down_projection(layer), neuron, neuron + 1)
    expected = oracle.run(case.batch.tokens, case.batch.attention_mask).logits
    same(case, logits_under(case, AblateHeads(HEADS), AblateNeurons(NEURONS)), expected)
    same(case, logits_under(case, AblateNeurons(NEURONS), AblateHeads(HEADS)), expected)


def test_nothing_to_ablate_is_refused() -> None:
    with pytest.raises(UnknownHead, match="nothing would be edited"):
        AblateHeads([])
    with pytest.raises(UnknownNeuron, match="nothing would be edited"):
        AblateNeurons(iter([]))


def test_a_head_named_twice_is_ablated_once(case_gqa: Case) -> None:
    assert torch.equal(
        logits_under(case_gqa, AblateHeads([(1, 2), (1, 2)])), logits_under(case_gqa, AblateHeads([(1, 2)]))
    )


# --- chosen rows ---------------------------------------------------------------------------------------


@pytest.mark.oracle(
    "AblateHeads, AblateNeurons zero, chosen rows", "inputs of the projections zeroed there, with loops"
)
@pytest.mark.parametrize("positions", ["prompt_last", "cot", "think", "mask"])
def test_edits_at_chosen_rows(case: Case, positions: str) -> None:
    batch = case.batch
    if positions == "mask":
        generator = torch.Generator().manual_seed(2)
        mask = (torch.rand(batch.tokens.shape, generator=generator) < 0.4) & batch.attention_mask.bool()
        rows: Tensor = mask
        where: Any = mask
    else:
        rows, where = rows_of(batch, positions), positions
    truth = case.oracle.run(
        batch.tokens,
        batch.attention_mask,
        change_z=setter(HEADS, rows),
        change_post=setter(NEURONS, rows),
    )
    found = logits_under(case, AblateHeads(HEADS, positions=where), AblateNeurons(NEURONS, positions=where))
    same(case, found, truth.logits)
    differs(case, found)


def test_the_last_row_needs_no_batch(case_gqa: Case) -> None:
    batch, editor = case_gqa.batch, AblateHeads(HEADS, positions="prompt_last")
    with editor.on(case_gqa.model):
        found = all_logits(case_gqa.model, batch.tokens, batch.attention_mask)
    same(case_gqa, found, logits_under(case_gqa, AblateHeads(HEADS, positions="prompt_last")))
    rows = rows_of(batch, "prompt_last")
    truth = case_gqa.oracle.run(batch.tokens, batch.attention_mask, change_z=setter(HEADS, rows))
    same(case_gqa, found, truth.logits)


def test_rows_the_model_wrote_in_one_pass(case_gqa: Case) -> None:
    batch = random_batch(seed=3, n_generated=3)
    real = batch.attention_mask.bool()
    for positions, span in (("generated", slice(-3, None)), ("prompt_last", slice(-4, -3))):
        rows = torch.zeros_like(real)
        rows[:, span] = True
        truth = case_gqa.oracle.run(batch.tokens, batch.attention_mask, change_z=setter(HEADS, rows))
        editor = AblateHeads(HEADS, positions=positions)
        with bound([editor], batch), editor.on(case_gqa.model):
            found = all_logits(case_gqa.model, batch.tokens, batch.attention_mask)
        close(found[real], truth.logits[real])


@pytest.mark.oracle(
    "AblateHeads, AblateNeurons zero, chosen rows", "inputs of the projections zeroed there, with loops"
)
@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("positions", ["all", "prompt_last", "generated", "cot", "mask"])
def test_edits_under_a_cache_equal_edits_without(case: Case, positions: str, kind: str) -> None:
    """Step by step under a key-value cache, against one uncached pass of the plain model per length."""
    batch, n_new = case.batch, 3
    width = batch.tokens.shape[1]
    new = torch.randint(2, 71, (len(batch), n_new), generator=torch.Generator().manual_seed(5))
    tokens = torch.cat([batch.tokens, new], dim=1)
    mask = torch.cat([batch.attention_mask, torch.ones_like(new)], dim=1)
    rows = rows_of(batch, "cot" if positions == "mask" else positions, extra=n_new)
    where: Any = batch.spans["cot"] if positions == "mask" else positions
    truth = case.oracle.run(
        tokens,
        mask,
        change_z=setter(HEADS, rows) if kind == "heads" else None,
        change_post=setter(NEURONS, rows) if kind == "neurons" else None,
    ).logits
    editor = (
        AblateHeads(HEADS, positions=where) if kind == "heads" else AblateNeurons(NEURONS, positions=where)
    )
    with bound([editor], batch), editor.on(case.model):
        decoder = Decoder(case.model)
        found = [decoder.prefill(batch.tokens, batch.attention_mask)]
        found += [decoder.step(new[:, step]) for step in range(n_new)]
    close(torch.stack(found, dim=1), truth[:, width - 1 :], how="cache")


@pytest.mark.parametrize("positions", ["prompt_last", "generated"])
def test_a_cache_needs_no_batch_for_these(case_gqa: Case, positions: str) -> None:
    batch = case_gqa.batch
    new = torch.tensor([[5, 6]] * len(batch))
    rows = rows_of(batch, positions, extra=2)
    truth = case_gqa.oracle.run(
        torch.cat([batch.tokens, new], dim=1),
        torch.cat([batch.attention_mask, torch.ones_like(new)], dim=1),
        change_z=setter(HEADS, rows),
    ).logits
    with AblateHeads(HEADS, positions=positions).on(case_gqa.model):
        decoder = Decoder(case_gqa.model)
        found = [decoder.prefill(batch.tokens, batch.attention_mask)]
        found += [decoder.step(new[:, step]) for step in range(2)]
    close(torch.stack(found, dim=1), truth[:, batch.tokens.shape[1] - 1 :])


@pytest.mark.parametrize("positions", ["all", "prompt_last", "generated"])
def test_edits_while_transformer_lens_generates(case: Case, positions: str) -> None:
    """`model.generate` with its own cache, against greedy decoding of the plain model without one."""
    if version("transformer-lens").startswith("2.") and case.architecture.startswith("gpt2"):
        pytest.skip(
            "generate of TransformerLens 2 masks as if every token were token 0, which is the pad here"
        )
    prompt = case.batch.select([0]).tokens
    width, n_new = prompt.shape[1], 4
    expected = prompt
    for _ in range(n_new):
        rows = torch.zeros(1, expected.shape[1], dtype=torch.bool)
        rows[
            :, {"all": slice(None), "prompt_last": slice(width - 1, width)}.get(positions, slice(width, None))
        ] = True
        logits = case.oracle.run(expected, torch.ones_like(expected), change_z=setter(HEADS, rows)).logits
        expected = torch.cat([expected, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    with AblateHeads(HEADS, positions=positions).on(case.model), torch.no_grad():
        found = case.model.generate(
            prompt,
            max_new_tokens=n_new,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            use_past_kv_cache=True,
            return_type="tokens",
        )
    assert found.tolist() == expected.tolist()


# --- means ---------------------------------------------------------------------------------------------


def means_by_hand(layers: list[Tensor], rows: Tensor) -> dict[int, Tensor]:
    return {
        layer: torch.stack([activation[p, s] for p, s in rows.nonzero().tolist()]).mean(dim=0)
        for layer, activation in enumerate(layers)
    }


@pytest.mark.oracle(
    "AblateHeads, AblateNeurons mean", "the plain model's mean over the reference, with loops"
)
@pytest.mark.parametrize("positions", ["all", "prompt_last", "cot"])
def test_the_mean_is_over_data(case: Case, positions: str) -> None:
    """Over prompts and rows of the reference set, padding left out; one mean for each head and each unit of it."""
    reference = random_batch(seed=21, n_prompts=5, shortest=8, longest=12)
    shown = case.oracle.run(reference.tokens, reference.attention_mask)
    taken = rows_of(reference, positions) & reference.attention_mask.bool()
    rows = rows_of(case.batch, positions, extra=N_NEW)
    z, post = means_by_hand(shown.z, taken), means_by_hand(shown.post, taken)
    assert not torch.allclose(z[0][1], z[0].mean(dim=0), atol=1e-2)  # a mean over heads would be seen

    def oracle(tokens: Tensor, mask: Tensor) -> Tensor:
        changes = setter(HEADS, rows, z), setter(NEURONS, rows, post)
        return case.oracle.run(tokens, mask, change_z=changes[0], change_post=changes[1]).logits

    heads = AblateHeads(HEADS, "mean", reference, positions=positions)
    neurons = AblateNeurons(NEURONS, "mean", reference, positions=positions)
    agrees(case, [heads, neurons], oracle)
    found = logits_under(case, heads, neurons)
    assert not torch.allclose(found, logits_under(case, AblateHeads(HEADS, positions=positions)), atol=1e-3)


def test_the_mean_is_of_the_model_without_components(case_gqa: Case) -> None:
    """Attached inside another edit, the reference pass must not read that edit's consequences."""
    reference = random_batch(seed=21, n_prompts=5)
    shown = case_gqa.oracle.run(reference.tokens, reference.attention_mask)
    z = means_by_hand(shown.z, reference.attention_mask.bool())
    everywhere = torch.ones_like(case_gqa.batch.attention_mask, dtype=torch.bool)
    truth = case_gqa.oracle.run(
        case_gqa.batch.tokens,
        case_gqa.batch.attention_mask,
        change_z=setter([(1, 2)], everywhere, z),
        change_post=setter([(0, n) for n in range(52)], everywhere),
    )
    outer = AblateNeurons([(0, n) for n in range(52)])
    same(case_gqa, logits_under(case_gqa, outer, AblateHeads([(1, 2)], "mean", reference)), truth.logits)


def test_means_over_many_passes_weigh_each_row_the_same(
    case_gqa: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = random_batch(seed=22, n_prompts=7, shortest=7, longest=13)
    whole = logits_under(case_gqa, AblateHeads(HEADS, "mean", reference))
    monkeypatch.setattr(
        "rim_lens.hooks.reference.row_groups", lambda lengths: [[row] for row in range(len(lengths))]
    )
    close(logits_under(case_gqa, AblateHeads(HEADS, "mean", reference)), whole)


def test_a_mask_picks_rows_of_the_reference_set(case_gqa: Case) -> None:
    """With a mask the reference set must have the shape of the batch; each prompt keeps its own rows."""
    batch = case_gqa.batch
    mask = batch.spans["cot"] | batch.spans["answer"]
    shown = case_gqa.oracle.run(batch.tokens, batch.attention_mask)
    truth = case_gqa.oracle.run(
        batch.tokens, batch.attention_mask, change_z=setter(HEADS, mask, means_by_hand(shown.z, mask))
    )
    same(case_gqa, logits_under(case_gqa, AblateHeads(HEADS, "mean", batch, positions=mask)), truth.logits)


def test_a_mean_belongs_to_the_model_at_hand(case_gqa: Case) -> None:
    """The same component on other weights takes its mean there, not from the first model."""
    from tests.families import Oracle, hf_model, wrapped

    editor = AblateHeads(HEADS, "mean", case_gqa.batch)
    first = logits_under(case_gqa, editor)
    other = Oracle(hf_model("qwen3", seed=5))
    model = wrapped("qwen3", "bridge" if case_gqa.family != "hooked" else "hooked", seed=5)
    rows = case_gqa.batch.attention_mask.bool()
    shown = other.run(case_gqa.batch.tokens, case_gqa.batch.attention_mask)
    truth = other.run(
        case_gqa.batch.tokens,
        case_gqa.batch.attention_mask,
        change_z=setter(HEADS, torch.ones_like(rows), means_by_hand(shown.z, rows)),
    )
    with editor.on(model):
        found = all_logits(model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)
    same(case_gqa, found, truth.logits)
    assert torch.equal(logits_under(case_gqa, editor), first)


def spans_of(batch: Any, row: int) -> dict[int, tuple[str, int]]:
    """Position → its atom and its rank from the atom's end, for one prompt."""
    found = {}
    for atom in ATOMS:
        inside = [place for place, here in enumerate(batch.spans[atom][row].tolist()) if here]
        found.update({place: (atom, rank) for rank, place in enumerate(reversed(inside))})
    return found


@pytest.mark.oracle(
    "AblateHeads, AblateNeurons mean per span, per position", "the plain model's means, with loops"
)
@pytest.mark.parametrize("positions", ["all", "cot"])
@pytest.mark.parametrize("per", ["span", "position"])
def test_means_per_span_and_per_position(case: Case, per: str, positions: str) -> None:
    """Each row gets the mean of its own span, or of its own place counted from the span's end; generated rows stay."""
    reference = random_batch(seed=21, n_prompts=5, shortest=8, longest=12)
    shown = case.oracle.run(reference.tokens, reference.attention_mask)
    taken = rows_of(case.batch, positions)

    def key(place: tuple[str, int]) -> Any:
        return place[0] if per == "span" else place

    def change(values: list[Tensor], pairs: list[tuple[int, int]], layer: int, value: Tensor) -> Tensor:
        pools: dict[Any, list[Tensor]] = {}
        for prompt in range(len(reference)):
            for pos, place in spans_of(reference, prompt).items():
                pools.setdefault(key(place), []).append(values[layer][prompt, pos])
        means = {place: torch.stack(pool).mean(dim=0) for place, pool in pools.items()}
        for prompt in range(len(case.batch)):
            for pos, place in spans_of(case.batch, prompt).items():
                if taken[prompt, pos] and key(place) in means:
                    for its_layer, column in pairs:
                        if its_layer == layer:
                            value[prompt, pos, column] = means[key(place)][column]
        return value

    def oracle(tokens: Tensor, mask: Tensor) -> Tensor:
        return case.oracle.run(
            tokens,
            mask,
            change_z=lambda layer, value: change(shown.z, HEADS, layer, value),
            change_post=lambda layer, value: change(shown.post, NEURONS, layer, value),
        ).logits

    editors = [
        AblateHeads(HEADS, "mean", reference, positions, per=per),  # type: ignore[arg-type]
        AblateNeurons(NEURONS, "mean", reference, positions, per=per),  # type: ignore[arg-type]
    ]
    agrees(case, editors, oracle)


def test_places_may_count_from_the_start(case_gqa: Case) -> None:
    """A reference of one prompt: the mean of each place is that prompt's."""
    reference, batch = random_batch(seed=24, n_prompts=1, longest=16), case_gqa.batch
    shown = case_gqa.oracle.run(reference.tokens, reference.attention_mask)
    pairs = [pairs_by_hand(batch, row, reference, 0, "start") for row in range(len(batch))]
    everywhere = torch.ones_like(batch.tokens).bool()
    change = copying(HEADS, shown.z, pairs, [0] * len(batch), everywhere)
    truth = case_gqa.oracle.run(batch.tokens, batch.attention_mask, change_z=change)
    editor = AblateHeads(HEADS, "mean", reference, per="position", align="start")
    same(case_gqa, logits_under(case_gqa, editor), truth.logits)
    other = logits_under(case_gqa, AblateHeads(HEADS, "mean", reference, per="position"))
    assert not torch.allclose(other, truth.logits, atol=1e-2)


# --- resampling ----------------------------------------------------------------------------------------


def donors_by_hand(batch: Any, reference: Any, seed: int) -> list[int]:
    drawn = []
    for row in range(len(batch)):
        own = batch.tokens[row][batch.attention_mask[row].bool()].tolist()
        others = []
        for other in range(len(reference)):
            if reference.tokens[other][reference.attention_mask[other].bool()].tolist() != own:
                others.append(other)
        drawn.append(others[np.random.default_rng([seed, row]).integers(len(others))])
    return drawn


@pytest.mark.oracle("AblateHeads, AblateNeurons resample", "the donor's values put in, with loops")
@pytest.mark.parametrize(("positions", "align"), [("all", "end"), ("cot", "stretch")])
def test_resampling_takes_a_donor_for_each_prompt(case: Case, positions: str, align: str) -> None:
    reference = random_batch(seed=21, n_prompts=5, shortest=8, longest=12)
    shown = case.oracle.run(reference.tokens, reference.attention_mask)
    donors = donors_by_hand(case.batch, reference, seed=3)
    assert len(set(donors)) > 1
    pairs = [pairs_by_hand(case.batch, row, reference, donor, align) for row, donor in enumerate(donors)]
    rows = rows_of(case.batch, positions)

    def oracle(tokens: Tensor, mask: Tensor) -> Tensor:
        return case.oracle.run(
            tokens,
            mask,
            change_z=copying(HEADS, shown.z, pairs, donors, rows),
            change_post=copying(NEURONS, shown.post, pairs, donors, rows),
        ).logits

    settings: Any = {"align": align, "seed": 3, "positions": positions}
    agrees(
        case,
        [
            AblateHeads(HEADS, "resample", reference, **settings),
            AblateNeurons(NEURONS, "resample", reference, **settings),
        ],
        oracle,
    )


def test_a_donor_does_not_depend_on_the_pass(case_gqa: Case) -> None:
    """Prompts read one by one, without padding and out of order, are edited as in one batch."""
    batch, reference = case_gqa.batch, random_batch(seed=21, n_prompts=6)
    for editor in (
        AblateHeads(HEADS, "resample", reference, seed=1),
        AblateHeads(HEADS, "mean", reference, per="span"),
        AblateHeads(HEADS, "mean", reference, per="position"),
    ):
        whole = logits_under(case_gqa, editor)
        for rows in ([3], [2, 0], [1]):
            with editor.on(case_gqa.model), bound([editor], batch, rows) as part:
                found = all_logits(case_gqa.model, part.tokens, part.attention_mask)
            real = part.attention_mask.bool()
            close(found[real], whole[rows][:, -part.tokens.shape[1] :][real])


def test_nobody_is_their_own_donor(case_gqa: Case) -> None:
    from rim_lens.hooks.pairing import donors

    batch = case_gqa.batch
    draws = torch.tensor([donors(batch, range(4), batch, seed) for seed in range(200)])
    assert not (draws == torch.arange(4)).any()
    assert draws.unique().tolist() == [0, 1, 2, 3]
    counts = torch.bincount(draws[:, 0], minlength=4)[1:]
    assert int(counts.min()) > 40  # of 200 / 3
    assert donors(batch.select([2, 0]), [2, 0], batch, 7) == [
        donors(batch, range(4), batch, 7)[i] for i in (2, 0)
    ]
    alone = AblateHeads(HEADS, "resample", batch.select([1]))
    with pytest.raises(ReferenceMismatch, match="nobody to resample"), bound([alone], batch):
        pass


def test_seeds_and_means_tell_captures_apart(case_gqa: Case) -> None:
    reference = case_gqa.batch
    told = [
        repr(AblateHeads(HEADS, "resample", reference, seed=1)),
        repr(AblateHeads(HEADS, "resample", reference, seed=2)),
        repr(AblateHeads(HEADS, "resample", reference, seed=2, align="start")),
        repr(AblateHeads(HEADS, "mean", reference)),
        repr(AblateHeads(HEADS, "mean", reference, per="span")),
        repr(AblateHeads(HEADS, "mean", reference, per="position")),
        repr(AblateHeads(HEADS, "mean", reference, per="position", align="start")),
    ]
    assert len(set(told)) == len(told)
    assert repr(AblateHeads([(0, 1)])) == "AblateHeads([(0, 1)], 'zero', positions='all')"


# --- what is refused -----------------------------------------------------------------------------------


def test_unknown_heads_and_neurons_are_refused_and_leave_nothing(case_gqa: Case) -> None:
    for editor, error in (
        (AblateHeads([(0, 0), (2, 0)]), UnknownHead),
        (AblateNeurons([(0, 52)]), UnknownNeuron),
    ):
        with pytest.raises(error), editor.on(case_gqa.model):
            pass
    assert not any(point.fwd_hooks for point in case_gqa.model.hook_dict.values())


def test_method_and_reference_go_together(case_gqa: Case) -> None:
    with pytest.raises(ReferenceMismatch, match="reference=batch"):
        AblateHeads(HEADS, "mean")
    with pytest.raises(ReferenceMismatch):
        AblateNeurons(NEURONS, "zero", reference=case_gqa.batch)
    with pytest.raises(ValueError, match="'mean' and 'resample'"):
        AblateHeads(HEADS, "median")  # type: ignore[arg-type]


def test_a_reference_of_another_vocabulary_is_refused(case_gqa: Case) -> None:
    reference = random_batch(seed=21, vocabulary=500)
    with (
        pytest.raises(ReferenceMismatch, match="70"),
        AblateHeads(HEADS, "mean", reference).on(case_gqa.model),
    ):
        pass


def test_a_reference_without_rows_is_refused(case_gqa: Case) -> None:
    reference = random_batch(seed=21)
    with (
        pytest.raises(ReferenceMismatch, match=r"reference=rl\.generate"),
        AblateHeads(HEADS, "mean", reference, positions="generated").on(case_gqa.model),
    ):
        pass
    with (
        pytest.raises(EmptySpan),
        AblateHeads(HEADS, "mean", reference, positions="gap").on(case_gqa.model),
    ):
        pass
    with (
        pytest.raises(ReferenceMismatch, match="shape"),
        AblateHeads(HEADS, "mean", reference, positions=torch.ones(2, 3, dtype=torch.bool)).on(
            case_gqa.model
        ),
    ):
        pass


def test_what_says_nothing_is_refused(case_gqa: Case) -> None:
    batch: Any = case_gqa.batch
    for settings in (
        {"per": "span"},
        {"method": "resample", "reference": batch, "per": "position"},
        {"method": "mean", "reference": batch, "per": "head"},
        {"method": "mean", "reference": batch, "per": "position", "align": "stretch"},
        {"method": "resample", "reference": batch, "align": "middle"},
    ):
        with pytest.raises(ValueError, match=r"per=|align="):
            AblateHeads(HEADS, **settings)
    with pytest.raises(ReferenceMismatch, match="reference=batch"):
        AblateHeads(HEADS, "resample")


def test_spans_the_reference_lacks_are_refused_before_any_pass(
    case_gqa: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("reference", "recording"):
        monkeypatch.setattr(f"rim_lens.hooks.{room}.last_logits", lambda *_: pytest.fail("a pass was run"))
    without = random_batch(seed=21, names=("system", "request", "assistant", "think_open", "answer"))
    for editor, match in (
        (AblateHeads(HEADS, "mean", without, per="span"), "span 'cot' of prompt '0'"),
        (AblateHeads(HEADS, "mean", without, positions="cot", per="position"), "no row with a mean"),
        (AblateHeads(HEADS, "mean", without, positions="generated", per="position"), "no row with a mean"),
        (AblateHeads(HEADS, "resample", without, positions="cot"), "spans cot of prompt '0'"),
        (AblateHeads(HEADS, "resample", without, positions="generated"), r"reference=rl\.generate"),
    ):
        with (
            pytest.raises(EmptySpan, match=match),
            bound([editor], case_gqa.batch),
            editor.on(case_gqa.model),
        ):
            pass
    assert not any(point.fwd_hooks for point in case_gqa.model.hook_dict.values())


def test_spans_are_needed_where_they_say_what_is_put_in(case_gqa: Case) -> None:
    for settings in ({"method": "resample"}, {"method": "mean", "per": "span"}):
        editor = AblateHeads(HEADS, reference=random_batch(seed=21), **settings)  # type: ignore[arg-type]
        with editor.on(case_gqa.model), pytest.raises(SpanError, match=r"rl\.capture"):
            last_logits(case_gqa.model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)


def test_a_pass_of_other_prompts_than_bound_is_refused(case_gqa: Case) -> None:
    batch, order = case_gqa.batch, [3, 2, 1, 0]
    for settings in ({"method": "resample"}, {"method": "mean", "per": "span"}):
        editor = AblateHeads(HEADS, reference=random_batch(seed=21), **settings)  # type: ignore[arg-type]
        with bound([editor], batch), editor.on(case_gqa.model):
            with pytest.raises(WrongHookShape, match="in another order"):
                last_logits(case_gqa.model, batch.tokens[order], batch.attention_mask[order])
            other = batch.tokens.clone()
            other[2, -1] += 1
            with pytest.raises(WrongHookShape, match="row 2 of this pass holds another token"):
                last_logits(case_gqa.model, other, batch.attention_mask)
            with pytest.raises(WrongHookShape, match="4 prompts of 14"):
                last_logits(case_gqa.model, batch.tokens.repeat(2, 1), batch.attention_mask.repeat(2, 1))


def test_a_reference_run_that_is_not_a_number_is_refused(case_gqa: Case) -> None:
    from tests.families import wrapped

    model = wrapped("qwen3", "bridge" if case_gqa.family != "hooked" else "hooked", seed=3)
    editors = [
        AblateHeads(HEADS, "mean", case_gqa.batch),
        AblateHeads(HEADS, "mean", case_gqa.batch, per="span"),
        AblateHeads(HEADS, "resample", case_gqa.batch),
    ]
    for editor in editors:
        with editor.on(model):
            pass
    with torch.no_grad():
        for parameter in model.blocks[0].mlp.parameters():
            parameter.fill_(1e30)
    for editor in editors:
        with pytest.raises(NotFinite, match="'z' in layer 1"), editor.on(model):
            pass
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_span_without_a_batch_is_refused(case_gqa: Case) -> None:
    with (
        AblateHeads(HEADS, positions="cot").on(case_gqa.model),
        pytest.raises(SpanError, match=r"batch\.spans"),
    ):
        last_logits(case_gqa.model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)


def test_rows_of_other_prompts_are_refused(case_gqa: Case) -> None:
    other = random_batch(seed=1, longest=16)
    for where in (other.spans["cot"], case_gqa.batch.select([0, 1]).spans["cot"]):
        with AblateHeads(HEADS, positions=where).on(case_gqa.model), pytest.raises(WrongHookShape):
            last_logits(case_gqa.model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)
    editor = AblateHeads(HEADS, positions="prompt_last")
    with bound([editor], other), editor.on(case_gqa.model), pytest.raises(WrongHookShape, match="16"):
        last_logits(case_gqa.model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)


@pytest.mark.skipif("bridge" not in FAMILIES, reason="mixtures of experts are wrapped by the bridge alone")
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts(architecture: str) -> None:
    """No neurons to ablate; heads as ever."""
    from tests.families import Oracle

    model, hf = tiny_moe(architecture)
    batch = random_batch(seed=4)
    with pytest.raises(UnsupportedModel, match="mixture of experts"), AblateNeurons([(0, 0)]).on(model):
        pass
    oracle = Oracle(hf)
    oracle.zero_rows(oracle.out_projection(1), 2 * 8, 3 * 8)
    positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        truth = hf(batch.tokens, attention_mask=batch.attention_mask, position_ids=positions).logits
    with AblateHeads([(1, 2)]).on(model):
        found = all_logits(model, batch.tokens, batch.attention_mask)
    real = batch.attention_mask.bool()
    close(found[real], truth[real])


def test_readers_see_what_editors_leave(case_gqa: Case) -> None:
    reader = NeuronActivations("max")
    editor = AblateNeurons([(0, n) for n in range(52)])
    with bound([reader, editor], case_gqa.batch), editor.on(case_gqa.model), reader.on(case_gqa.model):
        last_logits(case_gqa.model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)
    found = reader.collect()["neuron_activation"]
    assert not found[:, 0].any()
    assert found[:, 1].any()


def test_rows_left_as_they_are_are_counted(case_gqa: Case) -> None:
    batch = case_gqa.batch
    without = random_batch(seed=21, names=("system", "request", "assistant", "think_open", "answer"))
    lost = (batch.attention_mask.bool() & batch.spans["cot"]).sum(dim=1)
    resampled = AblateHeads(HEADS, "resample", without, align="stretch")
    with pytest.raises(SpanError, match="not been bound"):
        _ = resampled.unaligned
    averaged = AblateNeurons(NEURONS, "mean", without, per="position", align="start")
    zeroed = AblateHeads(HEADS)
    with bound([resampled, averaged, zeroed], batch):
        pass
    known = {atom: int(without.spans[atom].sum(dim=1).max()) for atom in ATOMS}
    beyond = [
        sum(max(0, int(batch.spans[atom][row].sum()) - known[atom]) for atom in ATOMS)
        for row in range(len(batch))
    ]
    assert bool((lost > 0).any())
    assert bool((resampled.unaligned >= lost).all())
    assert averaged.unaligned.tolist() == beyond
    assert zeroed.unaligned.tolist() == [0] * len(batch)
