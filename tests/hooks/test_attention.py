"""Attention readers against the plain model's own attention, summed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rim_lens.capturing import capture
from rim_lens.chat.spans import ATOMS, COMPOSITES, SpanBatch, Spans
from rim_lens.errors import EmptySpan, SpanError, UnknownHead, UnknownSpan, WrongHookShape
from rim_lens.hooks import AttentionRows, SpanAttention, bound
from rim_lens.lens import Decoder, all_logits, last_logits
from tests.families import FAMILIES, Case, close, random_batch, wrapped

pytestmark = pytest.mark.family_contract


def read(
    case: Case, reader: SpanAttention | AttentionRows, batch: SpanBatch | None = None
) -> dict[str, Tensor]:
    batch = batch or case.batch
    with bound([reader], batch), reader.on(case.model):
        reader.layout(case.facts, batch)
        last_logits(case.model, batch.tokens, batch.attention_mask)
    return reader.collect()


def mass_by_hand(patterns: list[Tensor], batch: SpanBatch, name: str, query: int) -> Tensor:
    """[prompt, layer, head], one number at a time."""
    n_prompts, n_heads = patterns[0].shape[:2]
    out = torch.zeros(n_prompts, len(patterns), n_heads)
    for prompt in range(n_prompts):
        keys = batch.spans[name][prompt].nonzero().flatten()
        for layer, pattern in enumerate(patterns):
            for head in range(n_heads):
                out[prompt, layer, head] = pattern[prompt, head, query, keys].sum()
    return out


def test_patterns_are_those_of_the_plain_model(case: Case) -> None:
    real = case.batch.attention_mask.bool()
    _, cache = case.model.run_with_cache(case.batch.tokens, attention_mask=case.batch.attention_mask)
    for layer, truth in enumerate(case.truth.patterns):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        for prompt in range(len(case.batch)):
            close(pattern[prompt][:, real[prompt]], truth[prompt][:, real[prompt]])


def test_processed_weights_leave_the_masses_alone(case_processed: Case) -> None:
    reader = SpanAttention(["request", "think"])
    masses = read(case_processed, reader)["attention_mass"]
    for place, name in enumerate(["request", "think"]):
        close(
            masses[..., place],
            mass_by_hand(case_processed.truth.patterns, case_processed.batch, name, -1),
            5e-5,
        )


def test_masses_are_sums_over_the_span(case: Case) -> None:
    names = ["request", "cot", "sink", "think"]
    masses = read(case, SpanAttention(names))["attention_mass"]
    assert masses.dtype == torch.float32
    for place, name in enumerate(names):
        close(masses[..., place], mass_by_hand(case.truth.patterns, case.batch, name, -1))


def test_masses_are_sums_over_the_cached_pattern(case: Case) -> None:
    """The same against TransformerLens's own cache, from one and the same pass."""
    reader = SpanAttention(["request", "answer"])
    with bound([reader], case.batch), reader.on(case.model), torch.no_grad():
        _, cache = case.model.run_with_cache(case.batch.tokens, attention_mask=case.batch.attention_mask)
    masses = reader.collect()["attention_mass"]
    patterns = [cache[f"blocks.{layer}.attn.hook_pattern"] for layer in range(case.facts.n_layers)]
    for place, name in enumerate(["request", "answer"]):
        close(masses[..., place], mass_by_hand(patterns, case.batch, name, -1), 1e-6)


def test_the_atoms_sum_to_one(case: Case) -> None:
    present = [name for name in ATOMS if case.batch.spans[name].any()]
    masses = read(case, SpanAttention(present))["attention_mass"]
    close(masses.sum(dim=-1), torch.ones(masses.shape[:-1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_summed_in_full(family: str) -> None:
    """The entries are bf16; their sum need not be."""
    model = wrapped("llama", family).to(torch.bfloat16)
    model.cfg.dtype = torch.bfloat16
    batch = random_batch(seed=9, longest=40, shortest=30)
    reader = SpanAttention(["request", "cot"])
    with bound([reader], batch), reader.on(model), torch.no_grad():
        _, cache = model.run_with_cache(batch.tokens, attention_mask=batch.attention_mask)
    masses = reader.collect()["attention_mass"]
    patterns = [cache[f"blocks.{layer}.attn.hook_pattern"].float() for layer in range(3)]
    for place, name in enumerate(["request", "cot"]):
        close(masses[..., place], mass_by_hand(patterns, batch, name, -1), 1e-6)


def test_without_names_every_span_present_is_read(case_gqa: Case) -> None:
    reader = SpanAttention()
    variables = reader.layout(case_gqa.facts, case_gqa.batch)
    names = list(variables[0].coords["span"])
    assert names == [name for name in (*ATOMS, *COMPOSITES) if case_gqa.batch.spans[name].any(dim=1).all()]
    assert read(case_gqa, SpanAttention())["attention_mass"].shape[-1] == len(names)


def test_uniform_normalisation(case: Case) -> None:
    names = ["request", "answer"]
    plain = read(case, SpanAttention(names))["attention_mass"]
    found = read(case, SpanAttention(names, normalise="uniform"))["attention_mass"]
    for prompt in range(len(case.batch)):
        visible = int(case.batch.attention_mask[prompt].sum())
        for place, name in enumerate(names):
            share = int(case.batch.spans[name][prompt].sum()) / visible
            close(found[prompt, ..., place], plain[prompt, ..., place] / share)


def test_argmax_names_the_atom_of_the_largest_entry(case: Case) -> None:
    found = read(case, SpanAttention(["request"]))["attention_argmax"]
    assert found.dtype == torch.int8
    for prompt in range(len(case.batch)):
        for layer, pattern in enumerate(case.truth.patterns):
            for head in range(case.facts.n_heads):
                key = int(pattern[prompt, head, -1].argmax())
                holder = next(name for name in ATOMS if case.batch.spans[name][prompt, key])
                assert ATOMS[found[prompt, layer, head]] == holder


def one_row_by_hand(case: Case, query: Tensor) -> dict[str, Tensor]:
    """Argmax position, entropy and visible keys of one row per prompt, one number at a time."""
    batch, patterns = case.batch, case.truth.patterns
    shape = len(batch), case.facts.n_layers, case.facts.n_heads
    found = {"attention_argmax_pos": torch.zeros(shape), "attention_entropy": torch.zeros(shape)}
    found["visible_keys"] = torch.zeros(shape[:2])
    for prompt, row in enumerate(query.tolist()):
        atoms = batch.atoms_of(prompt)
        start = batch.tokens.shape[1] - len(atoms)
        for layer, pattern in enumerate(patterns):
            found["visible_keys"][prompt, layer] = row + 1 - start
            for head in range(shape[2]):
                entries = pattern[prompt, head, row, start : row + 1].double().tolist()
                place = entries.index(max(entries))
                found["attention_argmax_pos"][prompt, layer, head] = place - atoms.index("assistant")
                found["attention_entropy"][prompt, layer, head] = -sum(p * math.log(p) for p in entries if p)
    return found


@pytest.mark.parametrize("as_mask", [False, True])
def test_where_and_how_widely_one_row_looks(case: Case, as_mask: bool) -> None:
    batch = case.batch
    row = batch.prompt_last - (3 if as_mask else 0)
    mask = torch.zeros_like(batch.tokens, dtype=torch.bool)
    mask[torch.arange(len(batch)), row] = True
    found = read(case, SpanAttention(["request"], query=mask if as_mask else "prompt_last"))
    expected = one_row_by_hand(case, row)
    assert torch.equal(found["attention_argmax_pos"], expected["attention_argmax_pos"].int())
    assert torch.equal(found["visible_keys"], expected["visible_keys"].int())
    close(found["attention_entropy"], expected["attention_entropy"], 1e-4)
    most = found["visible_keys"].log()[..., None]
    assert ((found["attention_entropy"] >= 0) & (found["attention_entropy"] <= most + 1e-5)).all()
    for prompt in range(len(batch)):  # position and atom are those of one and the same key
        atoms = batch.atoms_of(prompt)
        places = found["attention_argmax_pos"][prompt] + atoms.index("assistant")
        holders = [ATOMS.index(atoms[place]) for place in places.flatten().tolist()]
        assert holders == found["attention_argmax"][prompt].flatten().tolist()


def test_without_an_assistant_span_positions_have_no_origin(case_gqa: Case) -> None:
    bare = random_batch(seed=5, names=("request", "cot"))
    reader = SpanAttention(["request"])
    names = [variable.name for variable in reader.layout(case_gqa.facts, bare)]
    assert set(read(case_gqa, reader, bare)) == set(names)
    assert "attention_argmax_pos" not in names
    assert "attention_entropy" in names
    # One prompt without it is enough, also for those read together with none such.
    parts = case_gqa.batch.spans.atoms()
    first = torch.arange(len(case_gqa.batch))[:, None] == 0
    lost = first & parts["assistant"]
    atoms = {
        **parts,
        "assistant": parts["assistant"] & ~lost,
        "template": parts["template"] | lost,
    }
    batch = replace(case_gqa.batch, spans=Spans(atoms))
    assert "attention_argmax_pos" not in capture(case_gqa.model, batch, reader, max_rows=1)
    assert "attention_argmax_pos" in capture(case_gqa.model, case_gqa.batch, reader, max_rows=1)


def test_the_reading_names_the_spans_there_are(case_gqa: Case) -> None:
    variables = SpanAttention(["request"]).layout(case_gqa.facts, case_gqa.batch)
    argmax = next(variable for variable in variables if variable.name == "attention_argmax")
    assert argmax.attrs["spans_present"].split() == case_gqa.batch.spans.present()
    assert "gap" not in argmax.attrs["spans_present"].split()


@pytest.mark.parametrize("normalise", [None, "uniform"])
def test_a_span_as_query_is_the_mean_over_its_rows(case_gqa: Case, normalise: str | None) -> None:
    batch = case_gqa.batch
    reader = SpanAttention(["sink", "request"], query="cot", normalise=normalise)  # type: ignore[arg-type]
    found = read(case_gqa, reader)
    assert set(found) == {"attention_mass"}  # the rest is of one row
    masses = found["attention_mass"]
    for prompt in range(len(batch)):
        queries = batch.spans["cot"][prompt].nonzero().flatten().tolist()
        start = int((1 - batch.attention_mask[prompt]).sum())
        for place, name in enumerate(["sink", "request"]):
            keys = batch.spans[name][prompt].nonzero().flatten()
            uniform = sum(float((keys <= q).sum()) / (q + 1 - start) for q in queries) / len(queries)
            for layer, pattern in enumerate(case_gqa.truth.patterns):
                mean = pattern[prompt][:, queries][:, :, keys].sum(dim=-1).mean(dim=-1)
                close(masses[prompt, layer, :, place], mean / uniform if normalise else mean)


@pytest.mark.parametrize("as_mask", [True, False])
def test_all_rows_as_query_leave_padding_out(case_gqa: Case, as_mask: bool) -> None:
    batch = case_gqa.batch
    query = torch.ones_like(batch.attention_mask, dtype=torch.bool) if as_mask else "all"
    masses = read(case_gqa, SpanAttention(["sink"], query=query))["attention_mass"]
    for prompt in range(len(batch)):
        rows = batch.attention_mask[prompt].nonzero().flatten()
        for layer, pattern in enumerate(case_gqa.truth.patterns):
            mean = pattern[prompt][:, rows][:, :, batch.spans["sink"][prompt]].sum(dim=-1).mean(dim=-1)
            close(masses[prompt, layer, :, 0], mean)


def test_what_the_model_wrote_as_query(case_gqa: Case) -> None:
    batch = random_batch(seed=3, n_generated=3)
    truth = case_gqa.oracle.run(batch.tokens, batch.attention_mask)
    masses = read(case_gqa, SpanAttention(["sink"], query="generated"), batch)["attention_mass"]
    for layer, pattern in enumerate(truth.patterns):
        for prompt in range(len(batch)):
            keys = batch.spans["sink"][prompt]
            close(masses[prompt, layer, :, 0], pattern[prompt][:, -3:][:, :, keys].sum(dim=-1).mean(dim=-1))
    last = read(case_gqa, SpanAttention(["sink"]), batch)["attention_mass"][..., 0]
    close(last, mass_by_hand(truth.patterns, batch, "sink", batch.tokens.shape[1] - 1 - 3))


def test_batched_equals_one_by_one(case: Case) -> None:
    reader = SpanAttention(["request", "cot"])
    together = read(case, reader)
    for prompt in range(len(case.batch)):
        alone = read(case, reader, case.batch.select([prompt]))
        close(alone["attention_mass"][0], together["attention_mass"][prompt])
        for name in ("attention_argmax", "attention_argmax_pos", "visible_keys"):
            assert torch.equal(alone[name][0], together[name][prompt])
        close(alone["attention_entropy"][0], together["attention_entropy"][prompt])


def test_the_prompt_row_under_a_cache(case_gqa: Case) -> None:
    """Read at the prefill and not overwritten by the steps that follow."""
    reader = SpanAttention(["request", "sink"])
    expected = read(case_gqa, reader)["attention_mass"]
    with bound([reader], case_gqa.batch), reader.on(case_gqa.model):
        decoder = Decoder(case_gqa.model)
        decoder.prefill(case_gqa.batch.tokens, case_gqa.batch.attention_mask)
        for token in (3, 4):
            decoder.step(torch.full((len(case_gqa.batch),), token))
    close(reader.collect()["attention_mass"], expected, 1e-6)


def test_a_generated_row_under_a_cache(case_gqa: Case) -> None:
    batch = case_gqa.batch
    new = torch.tensor([[5, 6]] * len(batch))
    truth = case_gqa.oracle.run(
        torch.cat([batch.tokens, new], dim=1), torch.cat([batch.attention_mask, torch.ones_like(new)], dim=1)
    )
    reader = SpanAttention(["request"], query="generated")
    width = batch.tokens.shape[1]
    with bound([reader], batch), reader.on(case_gqa.model):
        decoder = Decoder(case_gqa.model)
        decoder.prefill(batch.tokens, batch.attention_mask)
        for step in range(2):
            decoder.step(new[:, step])
            masses = reader.collect()["attention_mass"][..., 0]
            close(masses, mass_by_hand(truth.patterns, batch, "request", width + step))


def test_registered_with_masks(case: Case) -> None:
    reader = SpanAttention(spans=case.batch.spans).register(case.model)
    try:
        all_logits(case.model, case.batch.tokens, case.batch.attention_mask)
        result = reader.result
        assert result["attention_mass"].dims == ("prompt", "layer", "head", "span")
        for name in result["span"].values.tolist():
            found = torch.from_numpy(result["attention_mass"].sel(span=name).values)
            close(found, mass_by_hand(case.truth.patterns, case.batch, name, -1))
        again = reader.result
        assert again.identical(result)
    finally:
        reader.remove()


def test_rows_of_named_heads(case: Case) -> None:
    heads = [(1, 3), (0, 0), (1, 1)]
    found = read(case, AttentionRows(heads))["attention_rows"]
    for place, (layer, head) in enumerate(heads):
        close(found[:, place], case.truth.patterns[layer][:, head, -1])


def test_rows_of_a_span(case_gqa: Case) -> None:
    found = read(case_gqa, AttentionRows([(0, 2)], query="answer"))["attention_rows"][:, 0]
    for prompt in range(len(case_gqa.batch)):
        rows = case_gqa.batch.spans["answer"][prompt]
        close(found[prompt], case_gqa.truth.patterns[0][prompt, 2][rows].mean(dim=0))


def test_rows_of_a_shorter_pass_are_padded_at_the_left(case_gqa: Case) -> None:
    """`capture` runs short prompts apart; their rows must line up with those of the whole batch."""
    reader = AttentionRows([(1, 4)])
    whole = read(case_gqa, reader)["attention_rows"]
    short = case_gqa.batch.select([len(case_gqa.batch) - 1])
    assert short.tokens.shape[1] < case_gqa.batch.tokens.shape[1]
    reader.layout(case_gqa.facts, case_gqa.batch)
    with bound([reader], short), reader.on(case_gqa.model):
        last_logits(case_gqa.model, short.tokens, short.attention_mask)
    close(reader.collect()["attention_rows"][0], whole[-1])


# --- what is refused -----------------------------------------------------------------------------------


def test_an_empty_span_is_refused_before_any_compute(case_gqa: Case) -> None:
    with pytest.raises(EmptySpan, match=r"'gap'.*'think'"):
        SpanAttention(["gap"]).layout(case_gqa.facts, case_gqa.batch)
    with pytest.raises(EmptySpan, match="'turn_end'"):
        SpanAttention(["request"], query="turn_end").layout(case_gqa.facts, case_gqa.batch)


def test_an_unknown_span_is_refused(case_gqa: Case) -> None:
    with pytest.raises(UnknownSpan, match="reasoning"):
        SpanAttention(["reasoning"]).layout(case_gqa.facts, case_gqa.batch)


def test_an_unknown_head_is_refused(case_gqa: Case) -> None:
    with pytest.raises(UnknownHead), AttentionRows([(0, 6)]).on(case_gqa.model):
        pass


def test_one_name_is_not_a_list_of_names() -> None:
    with pytest.raises(SpanError, match=r"\['request'\]"):
        SpanAttention("request")
    with pytest.raises(ValueError, match="uniform"):
        SpanAttention(normalise="mean")  # type: ignore[arg-type]


def test_spans_of_other_prompts_are_refused(case_gqa: Case) -> None:
    other = random_batch(seed=1, longest=16)
    reader = SpanAttention(spans=other.spans)
    with reader.on(case_gqa.model), pytest.raises(WrongHookShape, match="14"):
        all_logits(case_gqa.model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)
    fewer = SpanAttention(spans=case_gqa.batch.select([0, 1]).spans)
    with fewer.on(case_gqa.model), pytest.raises(WrongHookShape, match="2 prompts"):
        all_logits(case_gqa.model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)


def test_no_spans_at_all_are_refused(case_gqa: Case) -> None:
    reader = SpanAttention(["request"])
    with reader.on(case_gqa.model), pytest.raises(SpanError, match=r"spans=batch\.spans"):
        all_logits(case_gqa.model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)


def test_a_query_missing_in_some_prompts_is_refused(case_gqa: Case) -> None:
    """A mean over no row would come out as a mass of 0."""
    query = case_gqa.batch.spans["cot"].clone()
    query[2] = False
    reader = SpanAttention(spans=case_gqa.batch.spans, query=query)
    with reader.on(case_gqa.model), pytest.raises(EmptySpan, match="prompt 2"):
        all_logits(case_gqa.model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)


def test_uniform_attention_to_the_future_is_refused(case_gqa: Case) -> None:
    batch = case_gqa.batch
    query = batch.spans["sink"]
    reader = SpanAttention(["answer"], query=query, normalise="uniform")
    with pytest.raises(EmptySpan, match="after the query"):
        read(case_gqa, reader)
