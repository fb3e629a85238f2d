"""Edits of attention against the plain model with its scores masked or shifted before the softmax."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import EmptySpan, ImpossibleEdit, SpanError, UnknownHead, WrongHookShape
from rim_lens.hooks import AblateHeads, BlockAttention, MoveAttention, SpanAttention, bound
from rim_lens.hooks.attention_editing import move_mass
from rim_lens.lens import Decoder, all_logits, hooked, last_logits
from tests.editing import differs, logits_under, same
from tests.families import FAMILIES, Case, Oracle, close, random_batch, rows_of, wrapped

HEADS = [(0, 1), (1, 3), (1, 0)]
NEVER = torch.finfo(torch.float32).min


def with_scores(
    oracle: Oracle, tokens: Tensor, mask: Tensor, shifts: dict[int, Tensor], change_z: Any = None
) -> Any:
    """The plain model with numbers [prompt, head, query, key] added to the scores of some layers."""
    width = tokens.shape[1]
    allowed = torch.ones(width, width).tril().bool()[None, None] & mask.bool()[:, None, None]
    causal = torch.zeros(allowed.shape).masked_fill(~allowed, NEVER)

    def before(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if not kwargs["attention_mask"].ndim == 4:
                raise AssertionError("the plain model was expected to hand its attention a mask of scores")
            return args, {**kwargs, "attention_mask": (causal + shifts[layer]).clamp(min=NEVER)}

        return hook

    with ExitStack() as stack:
        for layer in shifts:
            block = oracle.blocks[layer]
            attention = block.attn if oracle.is_gpt2 else block.self_attn
            handle = attention.register_forward_pre_hook(before(layer), with_kwargs=True)
            stack.callback(handle.remove)
        return oracle.run(tokens, mask, change_z=change_z)


def blocked(case: Case, heads: list[tuple[int, int]], rows: Tensor, keys: Tensor) -> dict[int, Tensor]:
    """−∞ for each (head, row, key) that is to go, one at a time."""
    n_prompts, width = rows.shape
    shifts = {
        layer: torch.zeros(n_prompts, case.facts.n_heads, width, width)
        for layer in range(case.facts.n_layers)
    }
    for layer, head in heads:
        for prompt, row in rows.nonzero().tolist():
            shifts[layer][prompt, head, row, keys[prompt].nonzero().flatten()] = NEVER
    return shifts


def longer(batch: SpanBatch, new: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.cat([batch.tokens, new], dim=1),
        torch.cat([batch.attention_mask, torch.ones_like(new)], dim=1),
    )


def patterns_seen(case: Case, layer: int, seen: list[Tensor]) -> Any:
    return hooked(
        case.model,
        [(f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook: seen.append(pattern.clone()))],
    )


# --- block ---------------------------------------------------------------------------------------------


@pytest.mark.oracle("BlockAttention", "−∞ added to the plain model's scores")
@pytest.mark.family_contract
@pytest.mark.parametrize("heads", [None, HEADS], ids=["all heads", "some heads"])
@pytest.mark.parametrize("query", ["all", "prompt_last", "answer", "mask"])
def test_blocking_equals_minus_infinity_before_the_softmax(case: Case, query: str, heads: Any) -> None:
    batch = case.batch
    rows = rows_of(batch, "answer" if query == "mask" else query) & batch.attention_mask.bool()
    where: Any = rows if query == "mask" else query
    keys = batch.spans["request"]
    shifts = blocked(case, heads or case.facts.heads(), rows, keys)
    truth = with_scores(case.oracle, batch.tokens, batch.attention_mask, shifts)
    found = logits_under(case, BlockAttention(where, "request", heads))
    same(case, found, truth.logits)
    if query in ("all", "prompt_last"):
        differs(case, found)


@pytest.mark.oracle("BlockAttention", "hook_attn_scores masked, where such hooks live")
@pytest.mark.family_contract
def test_blocking_equals_masking_the_scores_where_score_hooks_live(case: Case) -> None:
    batch = case.batch
    keys = batch.spans["cot"][:, None, None]
    edits = [
        (f"blocks.{layer}.attn.hook_attn_scores", lambda scores, hook: scores.masked_fill(keys, NEVER))
        for layer in range(case.facts.n_layers)
    ]
    with hooked(case.model, edits):
        masked = all_logits(case.model, batch.tokens, batch.attention_mask)
    real = batch.attention_mask.bool()
    plain = all_logits(case.model, batch.tokens, batch.attention_mask)
    if torch.equal(masked[real], plain[real]):
        pytest.skip(f"hooks on the scores are dead on {case.family} {case.architecture}")
    close(logits_under(case, BlockAttention("all", "cot"))[real], masked[real])


@pytest.mark.oracle("BlockAttention, mute", "z times the mass that was not blocked")
@pytest.mark.family_contract
def test_mute_loses_what_was_read_and_gives_it_to_nobody(case: Case) -> None:
    """In one layer: the blocked row's output times the mass that was not blocked."""
    batch, (layer, head) = case.batch, (1, 3)
    keys, rows = batch.spans["request"], batch.attention_mask.bool()
    left = torch.ones(rows.shape)
    for prompt, row in rows.nonzero().tolist():
        left[prompt, row] -= case.truth.patterns[layer][prompt, head, row, keys[prompt]].sum()

    def change(its_layer: int, z: Tensor) -> Tensor:
        if its_layer == layer:
            z[:, :, head] *= left[..., None]
        return z

    shifts = blocked(case, [(layer, head)], rows, keys)
    truth = with_scores(case.oracle, batch.tokens, batch.attention_mask, shifts, change_z=change)
    found = logits_under(case, BlockAttention("all", "request", [(layer, head)], mute=True))
    same(case, found, truth.logits)
    differs(case, found)


@pytest.mark.oracle("BlockAttention, mute", "all keys muted: AblateHeads")
@pytest.mark.family_contract
def test_muting_all_keys_equals_ablating_the_heads(case: Case) -> None:
    found = logits_under(case, BlockAttention("all", "all", HEADS, mute=True))
    same(case, found, logits_under(case, AblateHeads(HEADS)))


@pytest.mark.oracle("BlockAttention", "−∞ added to the plain model's scores")
@pytest.mark.family_contract
@pytest.mark.parametrize(
    ("query", "key"),
    [("all", "generated"), ("all", "prompt_last"), ("generated", "request"), ("later", "mask")],
)
def test_blocking_under_a_cache_equals_blocking_without(case: Case, query: str, key: str) -> None:
    batch, n_new = case.batch, 3
    width = batch.tokens.shape[1]
    new = torch.randint(2, 71, (len(batch), n_new), generator=torch.Generator().manual_seed(5))
    tokens, mask = longer(batch, new)
    keys = rows_of(batch, "request" if key == "mask" else key, extra=n_new)
    rows = rows_of(batch, "all" if query == "later" else query, extra=n_new) & mask.bool()
    if query == "later":
        for prompt in range(len(batch)):
            rows[prompt, : int(keys[prompt].nonzero().max()) + 1] = False
    where: Any = batch.spans["request"] if key == "mask" else key
    truth = with_scores(case.oracle, tokens, mask, blocked(case, case.facts.heads(), rows, keys)).logits
    editor = BlockAttention(query, where)
    with bound([editor], batch), editor.on(case.model):
        decoder = Decoder(case.model)
        found = [decoder.prefill(batch.tokens, batch.attention_mask)]
        found += [decoder.step(new[:, step]) for step in range(n_new)]
    close(torch.stack(found, dim=1), truth[:, width - 1 :], how="cache")


def under_cache(case: Case, editor: Any, new: Tensor) -> Tensor:
    """Logits of the last prompt row and of each further token, step by step."""
    with bound([editor], case.batch), editor.on(case.model):
        decoder = Decoder(case.model)
        found = [decoder.prefill(case.batch.tokens, case.batch.attention_mask)]
        found += [decoder.step(new[:, step]) for step in range(new.shape[1])]
    return torch.stack(found, dim=1)


@pytest.mark.oracle("BlockAttention, mute", "z times the mass that was not blocked")
@pytest.mark.family_contract
def test_mute_under_a_cache(case: Case) -> None:
    batch, (layer, head) = case.batch, (1, 3)
    new = torch.randint(2, 71, (len(batch), 3), generator=torch.Generator().manual_seed(6))
    tokens, mask = longer(batch, new)
    keys = rows_of(batch, "request", extra=3)
    rows = rows_of(batch, "generated", extra=3)
    pattern = case.oracle.run(tokens, mask).patterns[layer][:, head]
    left = torch.ones(rows.shape)
    for prompt, row in rows.nonzero().tolist():
        left[prompt, row] -= pattern[prompt, row, keys[prompt]].sum()

    def change(its_layer: int, z: Tensor) -> Tensor:
        if its_layer == layer:
            z[:, :, head] *= left[..., None]
        return z

    shifts = blocked(case, [(layer, head)], rows, keys)
    truth = with_scores(case.oracle, tokens, mask, shifts, change_z=change).logits
    found = under_cache(case, BlockAttention("generated", "request", [(layer, head)], mute=True), new)
    close(found, truth[:, batch.tokens.shape[1] - 1 :], how="cache")
    assert (
        float((found - case.oracle.run(tokens, mask).logits[:, batch.tokens.shape[1] - 1 :]).abs().max())
        > 1e-4
    )


@pytest.mark.parametrize("key", ["generated", "prompt_last", "mask"])
def test_a_cache_needs_no_batch_for_these_keys(case_gqa: Case, key: str) -> None:
    batch = case_gqa.batch
    new = torch.tensor([[5, 6]] * len(batch))
    keys = rows_of(batch, "request" if key == "mask" else key, extra=2)
    rows = rows_of(batch, "generated", extra=2)
    tokens, mask = longer(batch, new)
    truth = with_scores(case_gqa.oracle, tokens, mask, blocked(case_gqa, case_gqa.facts.heads(), rows, keys))
    with BlockAttention("generated", batch.spans["request"] if key == "mask" else key).on(case_gqa.model):
        decoder = Decoder(case_gqa.model)
        found = [decoder.prefill(batch.tokens, batch.attention_mask)]
        found += [decoder.step(new[:, step]) for step in range(2)]
    close(torch.stack(found, dim=1), truth.logits[:, batch.tokens.shape[1] - 1 :])


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_renormalised_in_full(family: str) -> None:
    model = wrapped("llama", family).to(torch.bfloat16)
    model.cfg.dtype = torch.bfloat16
    batch, seen = random_batch(seed=9), list[Tensor]()
    editors = [BlockAttention("prompt_last", "cot", [(0, 0)]), MoveAttention([(0, 1)], "cot", to=0.5)]
    with ExitStack() as stack:
        stack.enter_context(bound(editors, batch))
        for editor in editors:
            stack.enter_context(editor.on(model))
        hook = ("blocks.0.attn.hook_pattern", lambda pattern, hook: seen.append(pattern.clone()))
        stack.enter_context(hooked(model, [hook]))
        last_logits(model, batch.tokens, batch.attention_mask)
    assert seen[0].dtype == torch.bfloat16
    rows, keys = seen[0][:, :2, -1].float(), batch.spans["cot"]
    close(rows.sum(dim=-1), torch.ones(rows.shape[:2]), 1e-2)
    close((rows * keys[:, None]).sum(dim=-1), torch.tensor([[0.0, 0.5]] * len(batch)), 5e-3)


def test_what_the_model_wrote_in_one_pass(case_gqa: Case) -> None:
    batch = random_batch(seed=3, n_generated=3)
    keys = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    keys[:, -3:-1] = True  # of the three, the last is its own row's last resort no more than any
    rows = torch.zeros_like(keys)
    rows[:, -1] = True
    truth = with_scores(
        case_gqa.oracle,
        batch.tokens,
        batch.attention_mask,
        blocked(case_gqa, case_gqa.facts.heads(), rows, keys | rows),
    )
    found = logits_under(case_gqa, BlockAttention(rows, "generated"), batch=batch)
    real = batch.attention_mask.bool()
    close(found[real], truth.logits[real])


def test_blocks_stack_with_each_other_and_with_ablation(case_gqa: Case) -> None:
    batch = case_gqa.batch
    rows = rows_of(batch, "prompt_last")
    both = batch.spans["request"] | batch.spans["cot"]
    expected = logits_under(case_gqa, AblateHeads([(0, 2)]), BlockAttention(rows, both))
    found = logits_under(
        case_gqa,
        BlockAttention("prompt_last", "request"),
        AblateHeads([(0, 2)]),
        BlockAttention("prompt_last", "cot"),
    )
    same(case_gqa, found, expected)
    differs(case_gqa, found)


def test_rows_before_the_span_are_left_to_the_bit(case_gqa: Case) -> None:
    batch = case_gqa.batch
    keys = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    keys[:, -2] = True
    before, after = list[Tensor](), list[Tensor]()
    editor = BlockAttention("all", keys, [(0, 0)])
    with ExitStack() as stack:
        for context in (
            bound([editor], batch),
            patterns_seen(case_gqa, 0, before),
            editor.on(case_gqa.model),
            patterns_seen(case_gqa, 0, after),
        ):
            stack.enter_context(context)
        last_logits(case_gqa.model, batch.tokens, batch.attention_mask)
    assert torch.equal(after[0][:, :, :-2], before[0][:, :, :-2])
    assert torch.equal(after[0][:, 1:], before[0][:, 1:])
    assert not torch.equal(after[0][:, 0, -1], before[0][:, 0, -1])


def test_batched_equals_one_by_one(case_gqa: Case) -> None:
    batch = case_gqa.batch
    editors = [
        BlockAttention(batch.spans["answer"], batch.spans["cot"]),
        MoveAttention(HEADS, "request", to=0.3),
    ]
    together = logits_under(case_gqa, *editors)
    for prompt in range(len(batch)):
        with ExitStack() as stack:
            part = stack.enter_context(bound(editors, batch, [prompt]))
            for editor in editors:
                stack.enter_context(editor.on(case_gqa.model))
            alone = all_logits(case_gqa.model, part.tokens, part.attention_mask)
        close(alone[0], together[prompt, -alone.shape[1] :])


def test_a_row_that_sees_no_other_key_is_named_before_anything_is_run(case_gqa: Case) -> None:
    batch = case_gqa.batch
    for editor, message in (
        (BlockAttention("all", "sink"), r"position 0 of prompt '0' sees no key but .*\(4 such rows\)"),
        (BlockAttention("prompt_last", "all"), "position 13 of prompt '0'"),
        (MoveAttention([(1, 2)], "cot", to=0.9, query="all"), "comes before the whole span"),
    ):
        with pytest.raises(ImpossibleEdit, match=message), bound([editor], batch):
            raise AssertionError("the prompts were not looked at")
    with pytest.raises(EmptySpan), bound([BlockAttention("prompt_last", "gap")], batch):
        pass
    with pytest.raises(EmptySpan), bound([MoveAttention(None, "cot", to=0.1, from_="gap")], batch):
        pass


@pytest.mark.parametrize("mute", [False, True])
def test_keys_that_all_come_after_their_rows_are_refused(case_gqa: Case, mute: bool) -> None:
    """Query and key the other way round would block nothing, and an effect of 0 would be read."""
    batch = case_gqa.batch
    swapped = BlockAttention(batch.spans["sink"], "prompt_last", mute=mute)
    with (
        pytest.raises(ImpossibleEdit, match=r"every key .* comes after .*BlockAttention\(query, key\)"),
        bound([swapped], batch),
    ):
        raise AssertionError("the prompts were not looked at")
    with bound([BlockAttention("prompt_last", "sink", mute=mute)], batch):
        pass


def test_a_row_that_sees_no_other_key_is_named_where_no_batch_is_bound(case_gqa: Case) -> None:
    batch = case_gqa.batch.select([0])
    with (
        pytest.raises(ImpossibleEdit, match=r"layer 0, head 0 at position 0 of prompt 0 .*sees no other key"),
        BlockAttention("all", batch.spans["sink"]).on(case_gqa.model),
    ):
        last_logits(case_gqa.model, batch.tokens, batch.attention_mask)
    assert not any(point.fwd_hooks for point in case_gqa.model.hook_dict.values())


def test_a_row_wholly_on_the_blocked_keys_is_named(case_gqa: Case) -> None:
    everything = MoveAttention([(1, 2)], "cot", to=1.0)
    with pytest.raises(ImpossibleEdit, match=r"layer 1, head 2 at position 13 of prompt '0'.*last bit"):
        logits_under(case_gqa, everything, BlockAttention("prompt_last", "cot", [(1, 2)]))


def test_what_cannot_be_blocked_is_refused(case_gqa: Case) -> None:
    for key in ("generated", "all"):
        with pytest.raises(ImpossibleEdit, match="no row comes after"):
            BlockAttention("later", key)
    with pytest.raises(UnknownHead), BlockAttention("all", "cot", [(2, 0)]).on(case_gqa.model):
        pass
    batch = case_gqa.batch
    with pytest.raises(SpanError, match=r"batch\.spans"), BlockAttention("all", "cot").on(case_gqa.model):
        last_logits(case_gqa.model, batch.tokens, batch.attention_mask)
    for keys in (batch.select([0, 1]).spans["cot"], random_batch(longest=20).spans["cot"]):
        with pytest.raises(WrongHookShape), BlockAttention("prompt_last", keys).on(case_gqa.model):
            last_logits(case_gqa.model, batch.tokens, batch.attention_mask)


# --- move ----------------------------------------------------------------------------------------------


def log_odds(share: Tensor) -> Tensor:
    return torch.log(share) - torch.log1p(-share)


@pytest.mark.oracle("MoveAttention", "the plain model's scores shifted by a constant on the span")
@pytest.mark.family_contract
@pytest.mark.parametrize("how", ["to", "by", "factor"])
@pytest.mark.parametrize("query", ["prompt_last", "answer"])
def test_moving_mass_equals_shifting_the_scores(case: Case, query: str, how: str) -> None:
    """More mass on a span, all else in proportion, is a constant added to the span's scores."""
    batch, (layer, head) = case.batch, (1, 3)
    keys = batch.spans["sink"] | batch.spans["request"]
    rows = rows_of(batch, query)
    masses = {
        (prompt, row): case.truth.patterns[layer][prompt, head, row, keys[prompt]].double().sum()
        for prompt, row in rows.nonzero().tolist()
    }
    up, down = min(1 - float(mass) for mass in masses.values()), min(map(float, masses.values()))
    amount = {"to": 0.4, "by": up / 2 if up > down else -down / 2, "factor": 1 / 3}[how]
    shifts = torch.zeros(len(batch), case.facts.n_heads, *[rows.shape[1]] * 2)
    for (prompt, row), mass in masses.items():
        target = {"to": torch.tensor(amount).double(), "by": mass + amount, "factor": mass * amount}[how]
        shift = log_odds(target) - log_odds(mass)
        shifts[prompt, head, row, keys[prompt].nonzero().flatten()] = float(shift)
    truth = with_scores(case.oracle, batch.tokens, batch.attention_mask, {layer: shifts})
    found = logits_under(case, MoveAttention([(layer, head)], keys, query=query, **{how: amount}))
    same(case, found, truth.logits)
    assert float((found - case.truth.logits)[batch.attention_mask.bool()].abs().max()) > 1e-4


@pytest.mark.oracle("MoveAttention, from a named span", "the plain model's scores shifted on both spans")
@pytest.mark.family_contract
def test_mass_from_a_named_span(case: Case) -> None:
    """Scores of span and source shift apart, so that every other key keeps what it had."""
    batch, (layer, head) = case.batch, (1, 1)
    rows, keys, source = rows_of(batch, "prompt_last"), batch.spans["cot"], batch.spans["request"]
    shifts = torch.zeros(len(batch), case.facts.n_heads, *[rows.shape[1]] * 2)
    for prompt, row in rows.nonzero().tolist():
        pattern = case.truth.patterns[layer][prompt, head, row].double()
        mass, given_up = pattern[keys[prompt]].sum(), pattern[source[prompt]].sum()
        shifts[prompt, head, row, keys[prompt].nonzero().flatten()] = float(math.log(0.5))
        shifts[prompt, head, row, source[prompt].nonzero().flatten()] = float(
            torch.log((given_up + mass / 2) / given_up)
        )
    truth = with_scores(case.oracle, batch.tokens, batch.attention_mask, {layer: shifts})
    found = logits_under(case, MoveAttention([(layer, head)], "cot", factor=0.5, from_="request"))
    same(case, found, truth.logits)
    differs_a_little = (found - case.truth.logits)[batch.attention_mask.bool()].abs().max()
    assert float(differs_a_little) > 1e-4


@pytest.mark.oracle("MoveAttention, from a named span", "the plain model's scores shifted on both spans")
@pytest.mark.family_contract
def test_mass_from_a_named_span_under_a_cache(case: Case) -> None:
    batch, (layer, head) = case.batch, (1, 1)
    new = torch.randint(2, 71, (len(batch), 2), generator=torch.Generator().manual_seed(8))
    tokens, mask = longer(batch, new)
    rows = rows_of(batch, "generated", extra=2)
    keys, source = (rows_of(batch, span, extra=2) for span in ("cot", "request"))
    patterns = case.oracle.run(tokens, mask).patterns[layer][:, head].double()
    shifts = torch.zeros(len(batch), case.facts.n_heads, *[rows.shape[1]] * 2)
    for prompt, row in rows.nonzero().tolist():
        mass, given_up = (patterns[prompt, row][span[prompt]].sum() for span in (keys, source))
        shifts[prompt, head, row, keys[prompt].nonzero().flatten()] = math.log(0.5)
        shifts[prompt, head, row, source[prompt].nonzero().flatten()] = float(
            torch.log((given_up + mass / 2) / given_up)
        )
    truth = with_scores(case.oracle, tokens, mask, {layer: shifts}).logits
    editor = MoveAttention([(layer, head)], "cot", factor=0.5, from_="request", query="generated")
    close(under_cache(case, editor, new), truth[:, batch.tokens.shape[1] - 1 :], how="cache")


@pytest.mark.family_contract
@pytest.mark.parametrize("query", ["prompt_last", "generated"])
def test_readers_see_the_mass_asked_for_also_under_a_cache(case: Case, query: str) -> None:
    batch = case.batch
    editor = MoveAttention([(0, 1), (1, 2)], "request", to=0.25, query=query)
    reader = SpanAttention(["request", "sink"], query=query)
    with bound([editor, reader], batch), editor.on(case.model), reader.on(case.model):
        decoder = Decoder(case.model)
        decoder.prefill(batch.tokens, batch.attention_mask)
        if query == "generated":
            decoder.step(torch.tensor([4, 5, 6, 7]))
    mass = reader.collect()["attention_mass"][..., 0]
    for layer, head in ((0, 1), (1, 2)):
        close(mass[:, layer, head], torch.full((len(batch),), 0.25), 1e-6)
    assert not torch.allclose(mass[:, 0, 0], torch.full((len(batch),), 0.25), atol=1e-3)


@pytest.mark.family_contract
@pytest.mark.oracle("MoveAttention", "the plain model's scores shifted by a constant on the span")
@pytest.mark.parametrize("query", ["prompt_last", "generated"])
def test_moving_mass_under_a_cache_equals_shifting_the_scores(case: Case, query: str) -> None:
    batch, (layer, head), n_new = case.batch, (1, 2), 2
    width = batch.tokens.shape[1]
    new = torch.randint(2, 71, (len(batch), n_new), generator=torch.Generator().manual_seed(7))
    tokens, mask = longer(batch, new)
    pattern = case.oracle.run(tokens, mask).patterns[layer][:, head].double()
    shifts = torch.zeros(len(batch), case.facts.n_heads, *[width + n_new] * 2)
    for prompt, row in rows_of(batch, query, extra=n_new).nonzero().tolist():
        keys = batch.spans["request"][prompt].nonzero().flatten()
        shift = log_odds(torch.tensor(0.6).double()) - log_odds(pattern[prompt, row, keys].sum())
        shifts[prompt, head, row, keys] = float(shift)
    truth = with_scores(case.oracle, tokens, mask, {layer: shifts}).logits
    editor = MoveAttention([(layer, head)], "request", to=0.6, query=query)
    with bound([editor], batch), editor.on(case.model):
        decoder = Decoder(case.model)
        found = [decoder.prefill(batch.tokens, batch.attention_mask)]
        found += [decoder.step(new[:, step]) for step in range(n_new)]
    close(torch.stack(found, dim=1), truth[:, width - 1 :], how="cache")


def test_the_key_just_written_can_be_given_mass(case_gqa: Case) -> None:
    batch, seen = case_gqa.batch, list[Tensor]()
    editor = MoveAttention([(1, 1)], "generated", factor=0.0, query="generated", from_="prompt_last")
    with bound([editor], batch), editor.on(case_gqa.model), patterns_seen(case_gqa, 1, seen):
        decoder = Decoder(case_gqa.model)
        decoder.prefill(batch.tokens, batch.attention_mask)
        decoder.step(torch.tensor([4, 5, 6, 7]))
    tokens, mask = longer(batch, torch.tensor([[4], [5], [6], [7]]))
    truth = case_gqa.oracle.run(tokens, mask).patterns[1][:, 1, -1]
    expected = torch.cat([truth[:, :-2], truth[:, -2:].sum(dim=1, keepdim=True), 0 * truth[:, :1]], dim=1)
    close(seen[1][:, 1, 0], expected)


def test_a_span_without_mass_is_filled_evenly(case_gqa: Case) -> None:
    batch = case_gqa.batch
    cleared = BlockAttention("prompt_last", "request", [(0, 0)])
    filled = MoveAttention([(0, 0)], "request", to=0.5)
    seen = list[Tensor]()
    with ExitStack() as stack:
        for context in (
            bound([cleared, filled], batch),
            cleared.on(case_gqa.model),
            filled.on(case_gqa.model),
            patterns_seen(case_gqa, 0, seen),
        ):
            stack.enter_context(context)
        last_logits(case_gqa.model, batch.tokens, batch.attention_mask)
    for prompt in range(len(batch)):
        keys = batch.spans["request"][prompt]
        row = seen[0][prompt, 0, -1]
        close(row[keys], torch.full((int(keys.sum()),), 0.5 / int(keys.sum())), 1e-6)
        before = case_gqa.truth.patterns[0][prompt, 0, -1].masked_fill(keys, 0)
        close(row[~keys], (before / before.sum() * 0.5)[~keys])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "none of to, by and factor"),
        ({"to": 0.1, "by": 0.1}, "to, by"),
        ({"to": 1.2}, "0.0 to 1.0"),
        ({"by": -1.5}, "-1.0 to 1.0"),
        ({"factor": -1.0}, "0.0 to inf"),
        ({"factor": math.nan}, "nan"),
    ],
)
def test_no_mass_can_meet_these(asked: dict[str, float], message: str) -> None:
    with pytest.raises(ImpossibleEdit, match=message):
        MoveAttention(HEADS, "cot", **asked)


@pytest.mark.family_contract
def test_moving_all_mass_away_in_later_rows_equals_blocking_there(case_gqa: Case) -> None:
    """Given to all other keys in proportion, under a cache as well; earlier rows stay as they are."""
    keys = case_gqa.batch.spans["request"]
    new = torch.randint(2, 71, (len(case_gqa.batch), 2), generator=torch.Generator().manual_seed(5))
    blocked_there = under_cache(case_gqa, BlockAttention("later", keys, HEADS), new)
    moved_there = under_cache(case_gqa, MoveAttention(HEADS, keys, to=0.0, query="later"), new)
    close(moved_there, blocked_there, how="cache")
    everywhere = under_cache(case_gqa, MoveAttention(HEADS, keys, to=0.0, query="prompt_last"), new)
    assert float((moved_there - everywhere).abs().max()) > 1e-3
    with pytest.raises(ImpossibleEdit, match="no row comes after"):
        MoveAttention(HEADS, "generated", to=0.0, query="later")


def test_what_cannot_be_moved_is_named(case_gqa: Case) -> None:
    for editor, message in (
        (MoveAttention([(1, 2)], "cot", by=0.9999), "layer 1, head 2 at position 13 of prompt '0'"),
        (MoveAttention([(1, 2)], "cot", by=-0.9999), "cannot bring the mass"),
        (MoveAttention([(1, 2)], "cot", to=0.9, from_="sink"), "leave from_=None"),
    ):
        with pytest.raises(ImpossibleEdit, match=message):
            logits_under(case_gqa, editor)
    batch = case_gqa.batch
    mask = batch.spans["cot"]
    with (
        pytest.raises(SpanError, match="padding"),
        BlockAttention("prompt_last", mask).on(case_gqa.model),
        MoveAttention(None, mask, to=0.5).on(case_gqa.model),
    ):
        last_logits(case_gqa.model, batch.tokens, batch.attention_mask)


@st.composite
def moves(draw: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_keys = draw(st.integers(2, 9))
    weights = draw(
        st.lists(st.sampled_from([0.0, 1e-30, 1e-6, 0.1, 0.5, 1.0, 3.0]), min_size=n_keys, max_size=n_keys)
    )
    if not any(weight >= 0.1 for weight in weights):
        weights[0] = 1.0
    parts = draw(st.lists(st.integers(0, 2), min_size=n_keys, max_size=n_keys))
    parts[0], parts[-1] = 0, 1
    row = torch.tensor(weights, dtype=torch.float64)
    row = row / row.sum()
    part = torch.tensor(parts)
    span, source = part == 0, part == 1
    share = draw(st.floats(0, 1))
    return row, span, source, share * row[span | source].sum()


@settings(deadline=None, max_examples=300)
@given(moves())
def test_properties_of_a_move(move: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    row, span, source, target = move
    moved = move_mass(row, span, source, target)
    assert float(moved.sum()) == pytest.approx(1, abs=1e-12)
    assert float(moved.min()) >= 0
    assert float(moved[span].sum()) == pytest.approx(float(target), abs=1e-12)
    other = ~span & ~source
    assert torch.equal(moved[other], row[other])
    for part in (span, source):
        before, after = row[part], moved[part]
        if float(before.sum()) > 0:
            expected = before / before.sum() * after.sum()
            assert torch.allclose(after, expected, atol=1e-12, rtol=1e-9)
        else:
            assert float(after.max() - after.min()) <= 1e-15


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    amount=st.one_of(
        st.tuples(st.just("to"), st.floats(0, 1)), st.tuples(st.just("factor"), st.floats(0, 1.0))
    ),
)
@example(seed=0, amount=("to", 1 - 1e-5))
def test_moved_rows_stay_causal_and_sum_to_one(seed: int, amount: tuple[str, float]) -> None:
    """The hook alone on random patterns: nothing lands on a key after its query, or on padding."""
    generator = torch.Generator().manual_seed(seed)
    batch = random_batch(seed=seed)
    width = batch.tokens.shape[1]
    allowed = (
        torch.ones(width, width).tril().bool()[None, None] & batch.attention_mask.bool()[:, None, None]
    ).expand(-1, 2, -1, -1)
    scores = 4 * torch.randn(allowed.shape, generator=generator)
    pattern = scores.masked_fill(~allowed, NEVER).softmax(dim=-1)
    editor = MoveAttention(None, "sink", query="all", **{amount[0]: amount[1]})
    with bound([editor], batch):
        if amount[1] < 1 - 1e-4:
            with pytest.raises(ImpossibleEdit):  # the first token sees nothing but itself
                editor._edit(0, [0, 1], pattern)
            editor.query = ~batch.spans["sink"]
        moved = editor._edit(0, [0, 1], pattern)
    assert moved is not None
    real = batch.attention_mask.bool()
    for prompt in range(len(batch)):
        rows = moved[prompt][:, real[prompt]]
        assert not rows[~allowed[prompt][:, real[prompt]]].any()
        assert float((rows.sum(dim=-1) - 1).abs().max()) < 1e-6
        assert float(rows.min()) >= 0


def test_moving_keeps_what_was_muted_away(case_gqa: Case) -> None:
    """A row that lost attention keeps its sum, and one that lost all of it stays zero."""
    seen: list[Tensor] = []
    batch = case_gqa.batch
    muted = BlockAttention("prompt_last", "request", heads=[(1, 1)], mute=True)
    gone = BlockAttention("prompt_last", "all", heads=[(1, 2)], mute=True)
    moved = MoveAttention([(1, 1), (1, 2)], "cot", to=0.25)
    with (
        bound([muted, gone, moved], batch),
        muted.on(case_gqa.model),
        gone.on(case_gqa.model),
        patterns_seen(case_gqa, 1, seen),
        moved.on(case_gqa.model),
        patterns_seen(case_gqa, 1, seen),
    ):
        all_logits(case_gqa.model, batch.tokens, batch.attention_mask)
    before, after = (pattern[:, :, -1] for pattern in seen)
    cot = batch.spans["cot"]
    sums = before[:, 1].sum(dim=-1)
    assert bool((sums < 1 - 1e-4).all())
    close(after[:, 1].sum(dim=-1), sums)
    close((after[:, 1] * cot).sum(dim=-1), sums / 4)
    assert not after[:, 2].any()
