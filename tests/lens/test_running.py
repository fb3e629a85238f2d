"""Logits with and without a cache, under left padding: the plain Hugging Face model is the oracle."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch

from rim_lens.errors import ModelError, NotFinite
from rim_lens.lens import Decoder, all_logits, hook_name, hooked, last_logits, require_finite
from tests.families import Case, close, random_batch

pytestmark = pytest.mark.family_contract


def test_all_logits(case: Case) -> None:
    real = case.batch.attention_mask.bool()
    logits = all_logits(case.model, case.batch.tokens, case.batch.attention_mask)
    assert not logits.requires_grad
    close(logits[real], case.truth.logits[real])


def test_processed_weights_give_the_same_distribution(case_processed: Case) -> None:
    real = case_processed.batch.attention_mask.bool()
    logits = all_logits(
        case_processed.model, case_processed.batch.tokens, case_processed.batch.attention_mask
    )
    close(logits[real].log_softmax(-1), case_processed.truth.logits[real].log_softmax(-1), 5e-5)


def test_last_logits(case: Case) -> None:
    close(last_logits(case.model, case.batch.tokens, case.batch.attention_mask), case.truth.logits[:, -1])


def test_last_logits_still_fires_every_hook_on_every_row(case: Case) -> None:
    seen: dict[str, torch.Size] = {}

    def note(tensor: torch.Tensor, hook: object, name: str) -> None:
        seen[name] = tensor.shape

    names = [
        hook_name(site, layer)
        for site in ("pattern", "z", "post", "mlp_out", "attn_out", "resid_pre", "resid_post")
        for layer in range(case.facts.n_layers)
    ]
    with hooked(case.model, [(name, partial(note, name=name)) for name in names]):
        last_logits(case.model, case.batch.tokens, case.batch.attention_mask)
    assert set(seen) == set(names)
    assert all(case.batch.tokens.shape[1] in shape for shape in seen.values())


@pytest.mark.parametrize("run", [last_logits, all_logits])
def test_no_pattern_outlives_the_pass(case: Case, run: Callable[..., torch.Tensor]) -> None:
    patterns: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def note(pattern: torch.Tensor, hook: object) -> None:
        alive.append(sum(one() is not None for one in patterns))
        patterns.append(weakref.ref(pattern))

    names = [hook_name("pattern", layer) for layer in range(case.facts.n_layers)]
    with hooked(case.model, [(name, note) for name in names]):
        run(case.model, case.batch.tokens, case.batch.attention_mask)
    assert len(patterns) == case.facts.n_layers
    assert alive == [0] * case.facts.n_layers  # nor the next layer
    assert [one for one in patterns if one() is not None] == []


def test_padding_does_not_change_a_row(case: Case) -> None:
    batched = last_logits(case.model, case.batch.tokens, case.batch.attention_mask)
    for row in range(len(case.batch)):
        alone = case.batch.select([row])
        assert alone.attention_mask.all()
        close(last_logits(case.model, alone.tokens, alone.attention_mask)[0], batched[row])


def test_decoder_equals_the_uncached_model(case: Case) -> None:
    batch = case.batch
    new = torch.randint(2, 71, (len(batch), 4), generator=torch.Generator().manual_seed(5))
    tokens = torch.cat([batch.tokens, new], dim=1)
    mask = torch.cat([batch.attention_mask, torch.ones_like(new)], dim=1)
    truth = case.oracle.run(tokens, mask).logits
    decoder = Decoder(case.model)
    width = batch.tokens.shape[1]
    close(decoder.prefill(batch.tokens, batch.attention_mask), truth[:, width - 1])
    for step in range(4):
        close(decoder.step(new[:, step]), truth[:, width + step])


def test_decoder_can_be_used_again(case_gqa: Case) -> None:
    decoder = Decoder(case_gqa.model)
    first = decoder.prefill(case_gqa.batch.tokens, case_gqa.batch.attention_mask)
    decoder.step(torch.full((len(case_gqa.batch),), 3))
    again = decoder.prefill(case_gqa.batch.tokens, case_gqa.batch.attention_mask)
    assert torch.equal(first, again)


def test_step_before_prefill_is_refused(case_gqa: Case) -> None:
    with pytest.raises(ModelError, match="prefill"):
        Decoder(case_gqa.model).step(torch.tensor([1]))


def test_a_soft_cap_on_the_logits_is_kept() -> None:
    """Gemma 2 caps its logits; skipping the unembedding of earlier rows must not skip the cap."""
    from tests.families import FAMILIES, wrapped

    if "hooked" not in FAMILIES:
        pytest.skip("only HookedTransformer unembeds the last row by hand")
    model = wrapped("llama", "hooked")
    model.cfg.output_logits_soft_cap = 0.7
    batch = random_batch(seed=2)
    full = all_logits(model, batch.tokens, batch.attention_mask)
    assert float(full.abs().max()) <= 0.7
    close(last_logits(model, batch.tokens, batch.attention_mask), full[:, -1])


def test_require_finite_names_the_first_bad_prompt() -> None:
    logits = torch.zeros(4, 7)
    assert require_finite(logits, "test") is logits
    logits[2, 3] = float("nan")
    logits[3, 0] = float("inf")
    with pytest.raises(NotFinite, match=r"2 of 4 prompts \(first: 2\)"):
        require_finite(logits, "test")


def test_a_decoder_goes_on_with_some_rows_repeated_and_without_their_padding(case: Case) -> None:
    """Against whole sequences computed anew; the decoder it came from is as it was."""
    batch = case.batch
    decoder = Decoder(case.model)
    decoder.prefill(batch.tokens, batch.attention_mask)
    first = torch.arange(2, 2 + len(batch))
    decoder.step(first)
    rows = torch.tensor([len(batch) - 1, 1, 1])  # the first row, which has no padding, is left out
    drop = int((batch.attention_mask[rows] == 0).all(dim=0).sum())
    assert drop > 0 or int(batch.lengths[1]) == batch.tokens.shape[1]
    branch = decoder.chosen(rows, drop)
    second = torch.tensor([9, 10, 11])
    found = branch.step(second)
    for place, row in enumerate(rows.tolist()):
        ids = [
            *batch.tokens[row][batch.attention_mask[row].bool()].tolist(),
            int(first[row]),
            int(second[place]),
        ]
        whole = torch.tensor([ids])
        expected = case.oracle.run(whole, torch.ones_like(whole)).logits[0, -1]
        close(found[place].log_softmax(-1), expected.log_softmax(-1), 5e-5)
    again = decoder.step(torch.full((len(batch),), 9))
    ids = [*batch.tokens[1][batch.attention_mask[1].bool()].tolist(), int(first[1]), 9]
    expected = case.oracle.run(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)).logits[0, -1]
    close(again[1].log_softmax(-1), expected.log_softmax(-1), 5e-5)
    with pytest.raises(ModelError, match="hold tokens"):
        decoder.chosen(torch.tensor([0]), 1)
    with pytest.raises(ModelError, match="prefill"):
        Decoder(case.model).chosen(torch.tensor([0]))
