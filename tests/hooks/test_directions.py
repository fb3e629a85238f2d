"""Edits of directions against the plain model with its weights made orthogonal, or biases put into it."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rim_lens.chat.spans import SpanBatch
from rim_lens.errors import ImpossibleEdit, UnknownLayer
from rim_lens.hooks import (
    AblateDirection,
    AblateHeads,
    AddDirection,
    ClampDirection,
    bound,
)
from rim_lens.lens import Decoder, all_logits, hooked, wrap_hf
from tests.editing import differs, logits_under, same
from tests.families import (
    FAMILIES,
    VOCABULARY,
    Case,
    Oracle,
    close,
    fill,
    random_batch,
    rows_of,
    tokenizer,
    wrapped,
)

pytestmark = pytest.mark.family_contract

WIDTH = 32
DIRECTION = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)) * 7


def orthogonalised(plain: Oracle, direction: Tensor) -> Oracle:
    """A plain model none of whose weights writes along the direction: embeddings, W_O, W_out and their biases."""
    oracle, unit = Oracle(copy.deepcopy(plain.hf)), direction / direction.norm()
    hf = oracle.hf
    embeddings = [hf.transformer.wte, hf.transformer.wpe] if oracle.is_gpt2 else [hf.model.embed_tokens]
    with torch.no_grad():
        for embedding in embeddings:
            embedding.weight -= (embedding.weight @ unit)[:, None] * unit
        for layer in range(len(oracle.blocks)):
            for projection in (oracle.out_projection(layer), oracle.down_projection(layer)):
                if oracle.is_gpt2:
                    projection.weight -= (projection.weight @ unit)[:, None] * unit
                    projection.bias -= (projection.bias @ unit) * unit
                else:
                    projection.weight -= unit[:, None] * (unit @ projection.weight)
    return oracle


def biased_at(plain: Oracle, layer: int, bias: Tensor) -> Oracle:
    """A plain model with a bias in what reaches a layer: on the embeddings, or on the layer before."""
    oracle = Oracle(copy.deepcopy(plain.hf))
    with torch.no_grad():
        if layer == 0:
            embedding = oracle.hf.transformer.wte if oracle.is_gpt2 else oracle.hf.model.embed_tokens
            embedding.weight += bias
        elif oracle.is_gpt2:
            oracle.down_projection(layer - 1).bias += bias
        else:
            oracle.down_projection(layer - 1).bias = nn.Parameter(bias.clone())
    return oracle


def run_with_input(oracle: Oracle, layer: int, change: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits of the plain model, what a block reads changed by hand."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0].clone()), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"].clone())}

    handle = oracle.blocks[layer].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        return oracle.run(tokens, mask).logits
    finally:
        handle.remove()


# --- ablate --------------------------------------------------------------------------------------------


@pytest.mark.oracle("AblateDirection, every write", "all writing weights and biases orthogonalised")
def test_ablating_every_write_equals_orthogonal_weights(case: Case) -> None:
    truth = orthogonalised(case.oracle, DIRECTION).run(case.batch.tokens, case.batch.attention_mask)
    found = logits_under(case, AblateDirection(DIRECTION))
    same(case, found, truth.logits, 2e-5)
    differs(case, found)


def test_nothing_is_left_along_the_direction_anywhere(case: Case) -> None:
    unit, seen = DIRECTION / DIRECTION.norm(), dict[str, Tensor]()
    names = [
        f"blocks.{layer}.hook_{point}"
        for layer in range(case.facts.n_layers)
        for point in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    ]
    # resid_mid may be read, but lives on no editor's list
    names += [f"blocks.{layer}.hook_resid_mid" for layer in range(case.facts.n_layers)]

    def keep(name: str) -> Any:
        def hook(tensor: Tensor, hook: Any) -> None:
            seen[name] = tensor

        return hook

    editor = AblateDirection(DIRECTION)
    with ExitStack() as stack:
        stack.enter_context(editor.on(case.model))
        stack.enter_context(hooked(case.model, [(name, keep(name)) for name in names]))
        all_logits(case.model, case.batch.tokens, case.batch.attention_mask)
    assert len(seen) >= 4 * case.facts.n_layers
    for tensor in seen.values():
        assert float((tensor @ unit).abs().max()) < 1e-5
        assert float(tensor.abs().max()) > 0.1


@pytest.mark.oracle("AblateDirection, chosen layers", "the plain model's residual stream projected there")
@pytest.mark.parametrize("per_layer", [False, True], ids=["one direction", "one per layer"])
def test_ablating_before_chosen_layers(case: Case, per_layer: bool) -> None:
    batch = case.batch
    n_layers = case.facts.n_layers
    direction = (
        torch.randn(n_layers, WIDTH, generator=torch.Generator().manual_seed(8)) if per_layer else DIRECTION
    )
    own = direction[1] if per_layer else direction
    unit = own / own.norm()

    def change(stream: Tensor) -> Tensor:
        for prompt, row in rows_of(batch, "cot").nonzero().tolist():
            stream[prompt, row] -= (stream[prompt, row] @ unit) * unit
        return stream

    truth = run_with_input(case.oracle, 1, change, batch.tokens, batch.attention_mask)
    found = logits_under(case, AblateDirection(direction, layers=[1], positions="cot"))
    same(case, found, truth)
    differs(case, found)


def under_cache(case: Case, editor: Any, new: Tensor) -> Tensor:
    """Logits of the last prompt row and of each further token, step by step."""
    with bound([editor], case.batch), editor.on(case.model):
        decoder = Decoder(case.model)
        found = [decoder.prefill(case.batch.tokens, case.batch.attention_mask)]
        found += [decoder.step(new[:, step]) for step in range(new.shape[1])]
    return torch.stack(found, dim=1)


def longer(batch: SpanBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Three more tokens; all tokens, and their mask."""
    new = torch.randint(2, 71, (len(batch), 3), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([batch.attention_mask, torch.ones_like(new)], dim=1)
    return new, torch.cat([batch.tokens, new], dim=1), mask


@pytest.mark.oracle("AblateDirection, every write", "all writing weights and biases orthogonalised")
def test_ablating_every_write_under_a_cache(case: Case) -> None:
    new, tokens, mask = longer(case.batch)
    truth = orthogonalised(case.oracle, DIRECTION).run(tokens, mask).logits
    found = under_cache(case, AblateDirection(DIRECTION), new)
    close(found, truth[:, case.batch.tokens.shape[1] - 1 :], 2e-5, how="cache")


@pytest.mark.oracle("AblateDirection, chosen layers", "the plain model's residual stream projected there")
def test_ablating_before_chosen_layers_under_a_cache(case: Case) -> None:
    new, tokens, mask = longer(case.batch)
    width, unit = case.batch.tokens.shape[1], DIRECTION / DIRECTION.norm()

    def change(stream: Tensor) -> Tensor:
        rows = stream[:, width:]
        stream[:, width:] = rows - (rows @ unit)[..., None] * unit
        return stream

    truth = run_with_input(case.oracle, 1, change, tokens, mask)
    found = under_cache(case, AblateDirection(DIRECTION, layers=[1], positions="generated"), new)
    close(found, truth[:, width - 1 :], 2e-5, how="cache")


def test_directions_and_heads_stack(case_gqa: Case) -> None:
    """Two directions at right angles, one after the other, are the plane they span; a head goes as well."""
    other = torch.randn(WIDTH, generator=torch.Generator().manual_seed(4))
    other = other - (other @ DIRECTION) / (DIRECTION @ DIRECTION) * DIRECTION
    both = orthogonalised(orthogonalised(case_gqa.oracle, DIRECTION), other)
    both.zero_rows(both.out_projection(1), 2 * 12, 3 * 12)
    truth = both.run(case_gqa.batch.tokens, case_gqa.batch.attention_mask)
    found = logits_under(case_gqa, AblateDirection(DIRECTION), AblateHeads([(1, 2)]), AblateDirection(other))
    same(case_gqa, found, truth.logits, 2e-5)


def test_length_and_sign_do_not_matter(case_gqa: Case) -> None:
    found = logits_under(case_gqa, AblateDirection(DIRECTION))
    same(case_gqa, logits_under(case_gqa, AblateDirection(-1e-3 * DIRECTION)), found)
    same(case_gqa, logits_under(case_gqa, AblateDirection(DIRECTION.double() * 1e4)), found)


@pytest.mark.skipif("bridge" not in FAMILIES, reason="Gemma 3 is wrapped by the bridge alone")
def test_nothing_is_left_where_sublayers_are_normalised_after() -> None:
    """Gemma 3 normalises what a sublayer gives before adding it: no weights equal this, and the stream is clean all the same."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 48, "sliding_window": 8}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    hf = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **more, **tokens, attn_implementation="eager"))
    fill(hf)
    model = wrap_hf(hf.eval().requires_grad_(False), tokenizer(), family="bridge")
    seen = list[Tensor]()
    names = [f"blocks.{layer}.hook_resid_{at}" for layer in (0, 1) for at in ("pre", "post")]
    batch = random_batch(seed=6)
    plain = all_logits(model, batch.tokens, batch.attention_mask)
    with (
        AblateDirection(DIRECTION).on(model),
        hooked(model, [(name, lambda stream, hook: seen.append(stream)) for name in names]),
    ):
        edited = all_logits(model, batch.tokens, batch.attention_mask)
    assert len(seen) == 4
    for stream in seen:
        assert float((stream @ DIRECTION).abs().max() / DIRECTION.norm()) < 1e-5
    assert float((edited - plain).abs().max()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_keeps_its_dtype(family: str) -> None:
    """The projection is computed in full; what is left is the rounding of bf16, 2⁻⁸ of each entry."""
    model = wrapped("llama", family).to(torch.bfloat16)
    model.cfg.dtype = torch.bfloat16
    batch, seen = random_batch(seed=9), list[Tensor]()
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]
    with (
        AblateDirection(DIRECTION, layers=range(3)).on(model),
        hooked(model, [(name, lambda stream, hook: seen.append(stream)) for name in names]),
    ):
        all_logits(model, batch.tokens, batch.attention_mask)
    assert len(seen) == 3
    for stream in seen:
        assert stream.dtype == torch.bfloat16
        left = (stream.float() @ DIRECTION) / DIRECTION.norm()
        assert float((left.abs() / stream.float().norm(dim=-1)).max()) < 2**-8


# --- add -----------------------------------------------------------------------------------------------


@pytest.mark.oracle("AddDirection", "a bias added to the plain model")
@pytest.mark.parametrize("layer", [0, 1])
def test_adding_equals_a_bias(case: Case, layer: int) -> None:
    bias = -2.5 * DIRECTION / DIRECTION.norm()
    truth = biased_at(case.oracle, layer, bias).run(case.batch.tokens, case.batch.attention_mask)
    found = logits_under(case, AddDirection(DIRECTION, layer, -2.5))
    same(case, found, truth.logits)
    differs(case, found)


@pytest.mark.oracle("AddDirection, chosen rows", "the plain model's residual stream changed there")
@pytest.mark.parametrize("positions", ["prompt_last", "generated", "cot"])
def test_adding_at_chosen_rows_under_a_cache(case: Case, positions: str) -> None:
    batch = case.batch
    new = torch.randint(2, 71, (len(batch), 2), generator=torch.Generator().manual_seed(6))
    tokens = torch.cat([batch.tokens, new], dim=1)
    mask = torch.cat([batch.attention_mask, torch.ones_like(new)], dim=1)
    rows = rows_of(batch, positions, extra=2)

    def change(stream: Tensor) -> Tensor:
        for prompt, row in rows.nonzero().tolist():
            stream[prompt, row] += 3 * DIRECTION / DIRECTION.norm()
        return stream

    truth = run_with_input(case.oracle, 1, change, tokens, mask)
    editor = AddDirection(DIRECTION, 1, 3.0, positions=positions)
    with bound([editor], batch), editor.on(case.model):
        decoder = Decoder(case.model)
        found = [decoder.prefill(batch.tokens, batch.attention_mask)]
        found += [decoder.step(new[:, step]) for step in range(2)]
    close(torch.stack(found, dim=1), truth[:, batch.tokens.shape[1] - 1 :], how="cache")


# --- clamp ---------------------------------------------------------------------------------------------


@pytest.mark.oracle("ClampDirection", "the plain model's projection clamped")
@pytest.mark.parametrize(("low", "high"), [(0.3, 0.3), (None, 0.1), (-0.2, None), (-0.2, 0.1)])
def test_clamping_holds_the_projection(case: Case, low: float | None, high: float | None) -> None:
    batch, unit = case.batch, DIRECTION / DIRECTION.norm()

    def change(stream: Tensor) -> Tensor:
        for prompt, row in batch.attention_mask.nonzero().tolist():
            found = float(stream[prompt, row] @ unit)
            wanted = max(found, low) if low is not None else found
            wanted = min(wanted, high) if high is not None else wanted
            stream[prompt, row] += (wanted - found) * unit
        return stream

    truth = run_with_input(case.oracle, 1, change, batch.tokens, batch.attention_mask)
    found = logits_under(case, ClampDirection(DIRECTION, low, high, layers=[1]))
    same(case, found, truth)
    differs(case, found)


@pytest.mark.oracle("ClampDirection", "the plain model's projection clamped")
def test_clamping_under_a_cache(case: Case) -> None:
    batch, unit = case.batch, DIRECTION / DIRECTION.norm()
    new = torch.randint(2, 71, (len(batch), 2), generator=torch.Generator().manual_seed(6))
    tokens = torch.cat([batch.tokens, new], dim=1)
    mask = torch.cat([batch.attention_mask, torch.ones_like(new)], dim=1)

    def change(stream: Tensor) -> Tensor:
        found = stream @ unit
        return stream + (found.clamp(0.1, 0.2) - found)[..., None] * unit

    truth = run_with_input(case.oracle, 1, change, tokens, mask)
    editor = ClampDirection(DIRECTION, 0.1, 0.2, layers=[1])
    with bound([editor], batch), editor.on(case.model):
        decoder = Decoder(case.model)
        found = [decoder.prefill(batch.tokens, batch.attention_mask)]
        found += [decoder.step(new[:, step]) for step in range(2)]
    close(torch.stack(found, dim=1), truth[:, batch.tokens.shape[1] - 1 :], how="cache")


def test_setting_the_projection_before_every_layer(case_gqa: Case) -> None:
    editor = ClampDirection(DIRECTION, 0.5, 0.5)
    seen = dict[int, Tensor]()
    names = [
        (f"blocks.{layer}.hook_resid_pre", lambda x, hook, at=layer: seen.update({at: x})) for layer in (0, 1)
    ]
    with bound([editor], case_gqa.batch), editor.on(case_gqa.model), hooked(case_gqa.model, names):
        all_logits(case_gqa.model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)
    for stream in seen.values():
        close(stream @ (DIRECTION / DIRECTION.norm()), torch.full(stream.shape[:2], 0.5))


# --- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AblateDirection(torch.zeros(WIDTH)), "points nowhere"),
        (lambda: AblateDirection(torch.full((WIDTH,), torch.nan)), "NaN"),
        (lambda: AblateDirection(torch.ones(WIDTH, dtype=torch.long)), "floating-point"),
        (lambda: AblateDirection(torch.ones(1, 2, WIDTH)), "shape"),
        (lambda: AblateDirection(torch.ones(2, WIDTH)), "layers=range"),
        (lambda: AddDirection(DIRECTION, 1, float("nan")), "finite"),
        (lambda: ClampDirection(DIRECTION), "at least one"),
        (lambda: ClampDirection(DIRECTION, 2.0, 1.0), "low ≤ high"),
    ],
)
def test_bad_directions_are_refused_when_made(make: Any, message: str) -> None:
    with pytest.raises(ImpossibleEdit, match=message):
        make()


def test_bad_directions_are_refused_on_attaching(case_gqa: Case) -> None:
    hollow = torch.stack([DIRECTION, torch.zeros(WIDTH)])
    for editor, error, message in (
        (AblateDirection(torch.ones(WIDTH + 1)), ImpossibleEdit, "another model"),
        (AblateDirection(torch.ones(5, WIDTH), layers=[0]), ImpossibleEdit, "another model"),
        (AblateDirection(hollow, layers=[0, 1]), ImpossibleEdit, "layer 1 is the zero vector"),
        (AblateDirection(DIRECTION, layers=[2]), UnknownLayer, "layer 2"),
        (AddDirection(DIRECTION, -1, 1.0), UnknownLayer, "layer -1"),
    ):
        with pytest.raises(error, match=message), editor.on(case_gqa.model):
            pass
    assert not any(point.fwd_hooks for point in case_gqa.model.hook_dict.values())
    with AblateDirection(hollow, layers=[0]).on(case_gqa.model):
        pass


def test_a_direction_is_never_taken_for_a_mask(case_gqa: Case) -> None:
    """[layer, d_model] may happen to have the shape of the batch."""
    batch = random_batch(seed=2, n_prompts=2, shortest=WIDTH - 1, longest=WIDTH)
    direction = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    assert direction.shape == batch.tokens.shape
    editor = AblateDirection(direction, layers=[0, 1])
    whole = logits_under(case_gqa, editor, batch=batch)
    with bound([editor], batch, [1]) as part, editor.on(case_gqa.model):
        alone = all_logits(case_gqa.model, part.tokens, part.attention_mask)
    close(alone[0], whole[1, -alone.shape[1] :])


def test_what_a_direction_is_shows_in_its_name() -> None:
    names = {repr(AblateDirection(vector, layers=[0])) for vector in (DIRECTION, -DIRECTION)}
    assert len(names) == 2
    assert all("layers=[0]" in name and "tensor(32,)" in name for name in names)
