"""Patches against the plain model fed with values from its own source run, and against identities."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

import rim_lens as rl
from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import (
    EmptySpan,
    NotFinite,
    ReferenceMismatch,
    SpanError,
    UnknownHead,
    UnknownLayer,
    UnknownNeuron,
    UnsupportedModel,
    WrongHookShape,
)
from rim_lens.hooks import (
    AttentionRows,
    HeadOutputs,
    PatchAttention,
    PatchHeads,
    PatchNeurons,
    PatchResidual,
    ResidualStream,
    ScaleHeads,
    SpanAttention,
    bound,
    record,
)
from rim_lens.hooks.alignment import align
from rim_lens.hooks.patching import same_keys
from rim_lens.lens import Decoder, all_logits
from tests.editing import agrees, copying, labelled, logits_under, pairs_by_hand, same
from tests.families import FAMILIES, Case, Oracle, close, hf_model, random_batch, rows_of, tiny_moe, wrapped

pytestmark = pytest.mark.family_contract

HEADS = [(0, 1), (1, 3), (1, 0)]
NEURONS = [(0, 7), (1, 2), (1, 39)]
# As many prompts as the case's batch, of other tokens, lengths and spans
SOURCE = random_batch(seed=31, n_prompts=4, shortest=8, longest=17)
ROWS = list(range(4))


def twin_of(batch: SpanBatch, seed: int = 8) -> SpanBatch:
    """Other tokens in the same spans."""
    tokens = torch.randint(2, 71, batch.tokens.shape, generator=torch.Generator().manual_seed(seed))
    return replace(batch, tokens=tokens * batch.attention_mask)


def family_of(case: Case) -> str:
    return "hooked" if case.family == "hooked" else "bridge"


def paired(case: Case, source: SpanBatch = SOURCE, rule: str = "end") -> list[dict[int, int]]:
    return [pairs_by_hand(case.batch, row, source, row, rule) for row in ROWS]


def residual_run(
    oracle: Oracle, tokens: Tensor, mask: Tensor, change: Callable | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits and what each block received and the last one left, with the former changed."""
    seen: list[Tensor] = []

    def before(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            value = args[0].clone() if change is None else change(layer, args[0].clone())
            seen.append(value)
            return (value, *args[1:])

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(oracle.blocks):
            stack.callback(block.register_forward_pre_hook(before(layer)).remove)
        result = oracle.run(tokens, mask)
    return result.logits, [*seen, result.resid_post[-1]]


# --- against the plain model ---------------------------------------------------------------------------


@pytest.mark.oracle("PatchHeads, PatchNeurons", "the plain source run's values put in, with loops")
@pytest.mark.parametrize(
    ("positions", "rule"), [("all", "stretch"), ("cot", "start"), ("prompt_last", "end")]
)
def test_heads_and_neurons(case: Case, positions: str, rule: str) -> None:
    shown = case.oracle.run(SOURCE.tokens, SOURCE.attention_mask)
    pairs, rows = paired(case, rule=rule), rows_of(case.batch, positions)
    last = case.batch.tokens.shape[1] - 1
    if positions == "prompt_last":
        assert all(last in found for found in pairs)

    def oracle(tokens: Tensor, mask: Tensor) -> Tensor:
        return case.oracle.run(
            tokens,
            mask,
            change_z=copying(HEADS, shown.z, pairs, ROWS, rows),
            change_post=copying(NEURONS, shown.post, pairs, ROWS, rows),
        ).logits

    heads: Any = PatchHeads(HEADS, SOURCE, positions, align=rule)  # type: ignore[arg-type]
    neurons: Any = PatchNeurons(NEURONS, SOURCE, positions, align=rule)  # type: ignore[arg-type]
    agrees(case, [heads, neurons], oracle)
    expected = [sum(bool(rows[p, t]) and t not in pairs[p] for t in range(last + 1)) for p in ROWS]
    pads = [int((rows[p] & ~case.batch.attention_mask[p].bool()).sum()) for p in ROWS]
    assert heads.unaligned.tolist() == [a - b for a, b in zip(expected, pads, strict=True)]


@pytest.mark.oracle("PatchResidual", "the plain source run's residual stream put in, with loops")
@pytest.mark.parametrize(("layers", "positions"), [([0], "cot"), ([1], "all"), ([1, 0], "prompt_last")])
def test_the_residual_stream(case: Case, layers: list[int], positions: str) -> None:
    """Also before layer 0, where a pass under a cache has not yet shown where it begins."""
    source = random_batch(seed=31, n_prompts=4, shortest=8, longest=17)
    _, received = residual_run(case.oracle, source.tokens, source.attention_mask)
    pairs, rows = paired(case, source, "stretch"), rows_of(case.batch, positions)

    def change(its_layers: list[int], layer: int, value: Tensor) -> Tensor:
        if layer in its_layers:
            for prompt in ROWS:
                for here, there in pairs[prompt].items():
                    if rows[prompt, here]:
                        value[prompt, here] = received[layer][prompt, there]
        return value

    def oracle(tokens: Tensor, mask: Tensor) -> Tensor:
        return residual_run(case.oracle, tokens, mask, lambda i, value: change(layers, i, value))[0]

    agrees(case, [PatchResidual(layers, source, positions, align="stretch")], oracle)
    # What a layer leaves is what the next one reads.
    if layers == [1]:
        after = PatchResidual([0], source, positions, site="resid_post", align="stretch")
        agrees(case, [after], oracle)


def attention_truth(
    case: Case, rows: Tensor, source: SpanBatch, pairs: list[dict[int, int]], shared: bool
) -> Callable:
    """Logits of the plain model whose z is (patched pattern) @ values, all of it by loops over rows."""
    oracle, facts = case.oracle, case.facts
    shown = oracle.run(source.tokens, source.attention_mask)
    share = facts.n_heads // facts.n_key_value_heads

    def run(tokens: Tensor, mask: Tensor) -> Tensor:
        values: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Tensor) -> None:
                last = output.chunk(3, dim=-1)[2] if oracle.is_gpt2 else output
                values[layer] = last.view(*output.shape[:2], facts.n_key_value_heads, facts.d_head)

            return hook

        def change(layer: int, value: Tensor) -> Tensor:
            for its_layer, head in HEADS:
                if its_layer != layer:
                    continue
                for prompt, found in enumerate(pairs):
                    for here, there in found.items():
                        if not rows[prompt, here]:
                            continue
                        row = {
                            key: shown.patterns[layer][prompt, head, there, other]
                            for key, other in found.items()
                            if key <= here
                        }
                        total = sum(row.values()) if shared else 1.0
                        value[prompt, here, head] = sum(
                            weight / total * values[layer][prompt, key, head // share]
                            for key, weight in row.items()
                        )
            return value

        with ExitStack() as stack:
            for layer, block in enumerate(oracle.blocks):
                module = block.attn.c_attn if oracle.is_gpt2 else block.self_attn.v_proj
                stack.callback(module.register_forward_hook(keep(layer)).remove)
            return oracle.run(tokens, mask, change_z=change).logits

    return run


@pytest.mark.oracle("PatchAttention", "z made anew from the source's attention, with loops")
@pytest.mark.parametrize("positions", ["all", "cot"])
def test_attention_of_a_twin(case: Case, positions: str) -> None:
    """Equal spans: every row has a counterpart that sees the same keys."""
    twin = twin_of(case.batch)
    truth = attention_truth(case, rows_of(case.batch, positions), twin, paired(case, twin), shared=False)
    agrees(case, [PatchAttention(HEADS, twin, positions)], truth)


@pytest.mark.oracle("PatchAttention, shared keys", "z made anew from the source's attention, with loops")
def test_attention_on_shared_keys(case: Case) -> None:
    truth = attention_truth(case, rows_of(case.batch, "all"), SOURCE, paired(case), shared=True)
    editor = PatchAttention(HEADS, SOURCE, keys="shared")
    agrees(case, [editor], truth)
    assert editor.unaligned.tolist() == align(case.batch, SOURCE).missing().tolist()


@pytest.mark.oracle("PatchHeads", "TransformerLens's own patching sweep")
def test_transformer_lens_patches_the_same(case: Case) -> None:
    """Its own sweep over heads, on prompts of one length, where it can be asked."""
    if version("transformer-lens").startswith("2.") and case.family != "hooked":
        pytest.skip("no bridge")
    from transformer_lens import patching

    clean, corrupted = (random_batch(seed=seed, n_prompts=3, shortest=11, longest=11) for seed in (51, 52))
    with torch.no_grad():
        _, cache = case.model.run_with_cache(clean.tokens)
        swept = patching.get_act_patch_attn_head_out_all_pos(
            case.model, corrupted.tokens, cache, lambda logits: logits[:, -1, 5].sum()
        )
    recording = record(case.model, clean, ["z"])
    for layer, head in ((0, 0), (0, 2), (1, 3)):
        with PatchHeads([(layer, head)], recording).on(case.model):
            found = all_logits(case.model, corrupted.tokens, corrupted.attention_mask)
        close(found[:, -1, 5].sum(), swept[layer, head], 1e-4)


# --- identities ----------------------------------------------------------------------------------------


def test_a_run_patched_with_itself_is_itself(case: Case) -> None:
    plain, batch = logits_under(case), case.batch
    for editor in (
        PatchHeads(case.facts.heads(), batch),
        PatchNeurons(NEURONS, batch),
        PatchResidual(range(case.facts.n_layers), batch),
        PatchResidual([1], batch, site="resid_post"),
        PatchAttention(case.facts.heads(), batch),
    ):
        assert torch.equal(logits_under(case, editor), plain)
        assert not editor.unaligned.any()
    renormalised = PatchAttention(case.facts.heads(), batch, keys="shared")
    close(logits_under(case, renormalised), plain)


def test_the_stream_before_the_first_layer_carries_the_whole_source(case: Case) -> None:
    twin = twin_of(case.batch)
    with bound([], twin):
        expected = all_logits(case.model, twin.tokens, twin.attention_mask)
    same(case, logits_under(case, PatchResidual([0], twin)), expected)
    heads, neurons = (
        case.facts.heads(),
        [(i, n) for i in range(case.facts.n_layers) for n in range(case.facts.d_mlp)],
    )
    # All that is written after the embeddings, with the embeddings' difference left: the last stream differs by that.
    reader = ResidualStream()
    editors = [PatchHeads(heads, twin), PatchNeurons(neurons, twin), reader]
    logits_under(case, *editors)
    patched = reader.collect()["residual"][:, -1]
    _, there = residual_run(case.oracle, twin.tokens, twin.attention_mask)
    _, here = residual_run(case.oracle, case.batch.tokens, case.batch.attention_mask)
    close(patched, (there[-1] - there[0] + here[0])[:, -1])


def test_a_tuned_model_through_the_unembedding_of_its_base(case: Case) -> None:
    """The last stream of the tuned model, and the base model's final norm and unembedding."""
    tuned, batch = wrapped(case.architecture, family_of(case), seed=9), case.batch
    other = Oracle(hf_model(case.architecture, seed=9))
    _, received = residual_run(other, batch.tokens, batch.attention_mask)
    hf = case.oracle.hf
    norm = hf.transformer.ln_f if case.oracle.is_gpt2 else hf.model.norm
    with torch.no_grad():
        truth = hf.lm_head(norm(received[-1]))
    last = case.facts.n_layers - 1
    editor = PatchResidual([last], batch, site="resid_post", source_model=tuned)
    same(case, logits_under(case, editor), truth)
    shown = other.run(SOURCE.tokens, SOURCE.attention_mask)
    change = copying(HEADS, shown.z, paired(case), ROWS, rows_of(case.batch, "all", extra=2))
    heads = PatchHeads(HEADS, SOURCE, source_model=tuned)
    agrees(case, [heads], lambda tokens, mask: case.oracle.run(tokens, mask, change_z=change).logits)
    assert repr(heads) != repr(PatchHeads(HEADS, SOURCE))


# --- recordings, passes, stacking ----------------------------------------------------------------------


def test_a_recording_stands_for_its_prompts(case_gqa: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    own = record(case_gqa.model, case_gqa.batch, ["z"])
    assert repr(PatchHeads(HEADS, own)) != repr(PatchHeads(HEADS, record(case_gqa.model, SOURCE, ["z"])))
    recording = record(
        case_gqa.model, SOURCE, ["z", "post", "resid_pre", "pattern"], heads=[(1, 5), (0, 1), (1, 3)]
    )
    editors: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (PatchHeads, (HEADS,), {"positions": "cot"}),
        (PatchNeurons, (NEURONS,), {}),
        (PatchResidual, ([1],), {"align": "start"}),
        (PatchAttention, ([(1, 3), (0, 1)],), {"keys": "shared"}),
    ]
    expected = [logits_under(case_gqa, kind(*what, SOURCE, **how)) for kind, what, how in editors]
    monkeypatch.setattr("rim_lens.hooks.recording.last_logits", lambda *_: pytest.fail("a pass was run"))
    for (kind, what, how), truth in zip(editors, expected, strict=True):
        assert torch.equal(logits_under(case_gqa, kind(*what, recording, **how)), truth)
    with (
        pytest.raises(ReferenceMismatch, match="not recorded"),
        PatchAttention([(0, 0)], recording, keys="shared").on(case_gqa.model),
    ):
        pass
    with pytest.raises(ReferenceMismatch, match="Give one of them"):
        PatchHeads(HEADS, recording, source_model=case_gqa.model)


def test_prompts_read_apart_are_patched_from_their_own_source(case_gqa: Case) -> None:
    for editor in (
        PatchHeads(HEADS, SOURCE),
        PatchResidual([0], SOURCE, "cot"),
        PatchAttention(HEADS, SOURCE, keys="shared"),
        PatchAttention(HEADS, twin_of(case_gqa.batch), case_gqa.batch.spans["cot"]),
    ):
        whole = logits_under(case_gqa, editor)
        for rows in ([3], [2, 0], [1]):
            with editor.on(case_gqa.model), bound([editor], case_gqa.batch, rows) as part:
                found = all_logits(case_gqa.model, part.tokens, part.attention_mask)
            real = part.attention_mask.bool()
            close(found[real], whole[rows][:, -part.tokens.shape[1] :][real])


def test_what_is_patched_is_the_source_without_components(case_gqa: Case) -> None:
    shown = case_gqa.oracle.run(SOURCE.tokens, SOURCE.attention_mask)
    pairs, everywhere = paired(case_gqa), rows_of(case_gqa.batch, "all")
    outer = ScaleHeads([(0, 0), (0, 4)], 3.0)

    def change(layer: int, value: Tensor) -> Tensor:
        if layer == 0:
            value[:, :, [0, 4]] *= 3.0
        return copying(HEADS, shown.z, pairs, ROWS, everywhere)(layer, value)

    batch = case_gqa.batch
    truth = case_gqa.oracle.run(batch.tokens, batch.attention_mask, change_z=change).logits
    with outer.on(case_gqa.model):
        same(case_gqa, logits_under(case_gqa, PatchHeads(HEADS, SOURCE)), truth)
    two = [PatchHeads(HEADS[:1], SOURCE), PatchHeads(HEADS[1:], SOURCE)]
    close(logits_under(case_gqa, *two), logits_under(case_gqa, PatchHeads(HEADS, SOURCE)), 1e-6)


def test_readers_see_what_patches_leave(case_gqa: Case) -> None:
    twin, batch = twin_of(case_gqa.batch), case_gqa.batch
    shown = case_gqa.oracle.run(twin.tokens, twin.attention_mask)
    heads, rows = HeadOutputs(), AttentionRows([(1, 3)])
    rows.layout(case_gqa.facts, batch)
    editors = [PatchHeads([(1, 3)], twin), PatchAttention([(1, 3)], twin), heads, rows]
    logits_under(case_gqa, *editors)
    close(heads.collect()["head_output"][:, 1, 3], shown.z[1][:, -1, 3])
    close(rows.collect()["attention_rows"][:, 0], shown.patterns[1][:, 3, -1])


def test_one_editor_over_several_generations(case_gqa: Case) -> None:
    """What one generation left behind does not move the rows of the next, before layer 0 either."""
    model, batch = case_gqa.model, case_gqa.batch
    editor, reader = PatchResidual([0], SOURCE, "all"), ResidualStream(site="resid_pre")
    found = []
    with bound([editor, reader], batch), editor.on(model), reader.on(model):
        for _ in range(2):
            decoder = Decoder(model)
            decoder.prefill(batch.tokens, batch.attention_mask)
            found += [
                decoder.step(torch.full((4,), 7)),
                decoder.step(torch.full((4,), 9)),
                reader.collect()["residual"],
            ]
    assert all(torch.equal(first, again) for first, again in zip(found[:3], found[3:], strict=True))
    one = labelled([["sink"]])
    step = torch.full((1,), 7)
    with bound([reader], one), reader.on(model):
        decoder = Decoder(model)
        decoder.prefill(one.tokens, one.attention_mask)
        with pytest.raises(WrongHookShape, match="one token"):
            decoder.step(step)


def test_rows_that_go_on_without_the_others(case_gqa: Case) -> None:
    """A cache that lost some prompts and the padding they needed: the rest is patched as ever, before layer 0 too."""
    model, batch = case_gqa.model, case_gqa.batch
    rows, drop = [1, 3], int(batch.lengths.max() - batch.lengths[[1, 3]].max())
    assert drop > 0
    found = []
    for editors in ([], [PatchResidual([0], batch)]):
        with ExitStack() as stack:
            for editor in editors:
                stack.enter_context(editor.on(model))
            decoder, other = Decoder(model), Decoder(model)
            with bound(editors, batch):
                decoder.prefill(batch.tokens, batch.attention_mask)
            with bound(editors, batch, [0]) as part:
                other.prefill(part.tokens, part.attention_mask)
                other.step(torch.tensor([5]))
            with bound(editors, batch, rows):
                found.append(decoder.chosen(torch.tensor(rows), drop).step(torch.tensor([7, 8])))
    assert torch.equal(*found)


# --- without a bound batch -----------------------------------------------------------------------------


def test_a_batch_may_be_given_instead_of_bound(case_gqa: Case) -> None:
    batch, model = case_gqa.batch, case_gqa.model
    for kind, what, how in (
        (PatchHeads, HEADS, {"positions": "cot"}),
        (PatchResidual, [0], {}),
        (PatchAttention, HEADS, {"keys": "shared"}),
    ):
        editor: Any = kind(what, SOURCE, batch=batch, **how)  # type: ignore[arg-type]
        assert editor.unaligned.shape == (4,)
        with editor.on(model):
            found = all_logits(model, batch.tokens, batch.attention_mask)
        assert torch.equal(found, logits_under(case_gqa, kind(what, SOURCE, **how)))  # type: ignore[arg-type]
        # Prompts in another order, as generation sorts them, are noticed by their padding.
        order = [3, 2, 1, 0]
        with editor.on(model), pytest.raises(WrongHookShape, match="padding in the prompts given"):
            all_logits(model, batch.tokens[order], batch.attention_mask[order])
        # So is one other token at the same place, and nothing but padding may differ.
        other = batch.tokens.clone()
        other[1, -2] += 1
        with editor.on(model), pytest.raises(WrongHookShape, match="row 1 of this pass holds another token"):
            all_logits(model, other, batch.attention_mask)
        padded = torch.where(batch.attention_mask.bool(), batch.tokens, 3)
        with editor.on(model):
            again = all_logits(model, padded, batch.attention_mask)
        assert torch.equal(found[:, -1], again[:, -1])
        with editor.on(model), pytest.raises(WrongHookShape):
            all_logits(model, batch.tokens[:2], batch.attention_mask[:2])
        with editor.on(model), pytest.raises(WrongHookShape):
            all_logits(model, batch.tokens.repeat(2, 1), batch.attention_mask.repeat(2, 1))


def test_without_any_batch_only_whole_runs_of_one_shape(case_gqa: Case) -> None:
    batch, model, twin = case_gqa.batch, case_gqa.model, twin_of(case_gqa.batch)
    for kind, what in ((PatchHeads, HEADS), (PatchResidual, [1]), (PatchAttention, HEADS)):
        with kind(what, twin).on(model):  # type: ignore[arg-type]
            found = all_logits(model, batch.tokens, batch.attention_mask)
        assert torch.equal(found, logits_under(case_gqa, kind(what, twin)))  # type: ignore[arg-type]
        for positions in ("cot", "prompt_last", batch.spans["cot"]):
            editor: Any = kind(what, twin, positions)  # type: ignore[arg-type]
            with editor.on(model), pytest.raises(SpanError, match=r"batch=|no prompts are bound"):
                all_logits(model, batch.tokens, batch.attention_mask)
            with pytest.raises(SpanError, match="not been bound"):
                _ = editor.unaligned
        with kind(what, SOURCE).on(model), pytest.raises(WrongHookShape, match="17"):  # type: ignore[arg-type]
            all_logits(model, batch.tokens, batch.attention_mask)


# --- what is refused -----------------------------------------------------------------------------------


def test_what_the_model_lacks(case_gqa: Case) -> None:
    for editor, error in (
        (PatchHeads([(0, 6)], SOURCE), UnknownHead),
        (PatchAttention([(2, 0)], SOURCE), UnknownHead),
        (PatchNeurons([(0, 52)], SOURCE), UnknownNeuron),
        (PatchResidual([2], SOURCE), UnknownLayer),
        (PatchResidual([-1], SOURCE), UnknownLayer),
    ):
        with pytest.raises(error), editor.on(case_gqa.model):
            pass
    for make, error in (
        (lambda: PatchHeads([], SOURCE), UnknownHead),
        (lambda: PatchAttention([], SOURCE), UnknownHead),
        (lambda: PatchNeurons([], SOURCE), UnknownNeuron),
        (lambda: PatchResidual([], SOURCE), UnknownLayer),
    ):
        with pytest.raises(error, match="nothing would be edited"):
            make()
    assert not any(point.fwd_hooks for point in case_gqa.model.hook_dict.values())


def test_words_that_mean_nothing() -> None:
    for make in (
        lambda: PatchHeads(HEADS, SOURCE, align="middle"),  # type: ignore[arg-type]
        lambda: PatchResidual([0], SOURCE, site="mlp_out"),  # type: ignore[arg-type]
        lambda: PatchAttention(HEADS, SOURCE, keys="some"),  # type: ignore[arg-type]
        lambda: PatchAttention(HEADS, SOURCE, align="stretch"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match="was asked for"):
            make()


def test_a_source_that_does_not_fit_is_refused_before_any_pass(
    case_gqa: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = case_gqa.batch
    small = wrapped("llama", family_of(case_gqa))
    monkeypatch.setattr("rim_lens.hooks.recording.last_logits", lambda *_: pytest.fail("a pass was run"))
    without = random_batch(seed=31, names=("system", "request", "assistant", "think_open", "answer"))
    for editor, error, match in (
        (PatchHeads(HEADS, SOURCE.select([0, 1])), ReferenceMismatch, "2 prompts and 4 are read"),
        (PatchHeads(HEADS, random_batch(seed=31, vocabulary=500)), ReferenceMismatch, "vocabulary"),
        (PatchHeads(HEADS, SOURCE, source_model=small), ReferenceMismatch, "'n_layers': 3.*'n_layers': 2"),
        (PatchHeads(HEADS, without, "cot"), EmptySpan, "spans cot of prompt '0'"),
        (PatchHeads(HEADS, SOURCE, "generated"), EmptySpan, "no token of the prompt"),
        (PatchAttention(HEADS, SOURCE), SpanError, "keys='shared'"),
    ):
        with pytest.raises(error, match=match), bound([editor], batch), editor.on(case_gqa.model):
            pass
        # Also where attaching, which runs the source, comes before binding.
        if error is not ReferenceMismatch:
            with pytest.raises(error, match=match):
                rl.capture(case_gqa.model, batch, SpanAttention(), editor)
    with pytest.raises(EmptySpan):
        PatchHeads(HEADS, without, "cot", batch=batch)
    assert not any(point.fwd_hooks for point in case_gqa.model.hook_dict.values())


def test_a_source_run_that_is_not_a_number(case_gqa: Case) -> None:
    tuned = wrapped("qwen3", family_of(case_gqa), seed=3)
    editor = PatchResidual([1], case_gqa.batch, source_model=tuned)
    logits_under(case_gqa, editor)
    with torch.no_grad():
        for parameter in tuned.blocks[0].mlp.parameters():
            parameter.fill_(1e30)
    with pytest.raises(NotFinite, match="'resid_pre' in layer 1"):
        logits_under(case_gqa, editor)
    assert not any(point.fwd_hooks for point in case_gqa.model.hook_dict.values())


def test_rows_that_see_the_same_keys() -> None:
    target = labelled([["sink", "request", "request", "cot", "answer"]])
    source = labelled([["sink", "request", "request", "gap", "answer"]])
    alignment = align(target, source)
    assert alignment.source.tolist() == [[0, 1, 2, -1, 4]]
    assert same_keys(alignment, source).tolist() == [[True, True, True, False, False]]
    swapped = labelled([["sink", "cot", "request", "request", "answer"]])
    assert same_keys(align(target, swapped), swapped).tolist() == [[True, False, False, False, True]]
    here, there = (
        labelled([["sink", "request", "cot", "answer"]]),
        labelled([["sink", "answer", "cot", "request"]]),
    )
    assert same_keys(align(here, there), there).tolist() == [
        [True, False, False, False]
    ]  # as many, but others
    shorter = labelled([["sink", "request", "cot", "answer"]])
    assert same_keys(align(target, shorter), shorter).tolist() == [[True, False, False, False, False]]
    assert same_keys(align(target, shorter, "start"), shorter).tolist() == [[True, True, False, False, False]]


def test_a_source_row_without_attention_on_shared_keys(case_gqa: Case) -> None:
    """All of it on keys that the target lacks: there is nothing to renormalise."""
    recording = record(case_gqa.model, SOURCE, ["pattern"], heads=[(0, 1)])
    pattern = torch.zeros_like(recording.activations["pattern", 0])
    found = align(case_gqa.batch, SOURCE)
    lost = [
        next(k for k in range(17) if SOURCE.attention_mask[row, k] and k not in found.source[row].tolist())
        for row in ROWS
    ]
    for row, key in enumerate(lost):
        pattern[row, :, :, key] = 1.0
    editor = PatchAttention(
        [(0, 1)], replace(recording, activations={("pattern", 0): pattern}), keys="shared"
    )
    with pytest.raises(EmptySpan, match="nothing to renormalise"):
        logits_under(case_gqa, editor)


@pytest.mark.skipif("bridge" not in FAMILIES, reason="mixtures of experts are wrapped by the bridge alone")
def test_a_mixture_of_experts() -> None:
    model, _ = tiny_moe("mixtral")
    with (
        pytest.raises(UnsupportedModel, match="mixture of experts"),
        PatchNeurons([(0, 0)], SOURCE).on(model),
    ):
        pass
    batch = random_batch(seed=4)
    editor = PatchHeads([(1, 2)], batch)
    with bound([editor], batch), editor.on(model):
        found = all_logits(model, batch.tokens, batch.attention_mask)
    close(found, all_logits(model, batch.tokens, batch.attention_mask), 1e-6)
