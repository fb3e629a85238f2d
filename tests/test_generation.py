"""Generation against the plain model, one prompt at a time, the whole sequence computed anew at each step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import rim_lens as rl
from rim_lens import generation
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.errors import (
    CaptureError,
    ConditionError,
    EmptySpan,
    NotFinite,
    SpanError,
    TrainingMode,
    UnknownHead,
)
from rim_lens.generation import HARMFUL_ANSWER_CAP, Generation
from rim_lens.hooks import AblateHeads, AblateNeurons, NeuronActivations, SpanAttention
from rim_lens.organisms.toy.host import TOKEN, toy_tokenizer
from rim_lens.prompts.records import Prompt
from tests.families import FAMILIES, close
from tests.speaking import (
    REQUESTS,
    Spoken,
    continued_alone,
    fresh,
    ids_of,
    speaker,
    writer,
    written,
)
from tests.true_tokenizers import true_chat

COT = "3 4 > 0 6 > 6"
HEADS = [(0, 1), (0, 3), (1, 0), (1, 2)]
STEPS = 8


def rendered(spoken: Spoken, think: str = "off") -> SpanBatch:
    return spoken.chat.render(REQUESTS, think=COT if think == "cot" else think)


def hooks_on(model: Any) -> int:
    return sum(len(point.fwd_hooks) for point in model.hook_dict.values())


# --- what is written -------------------------------------------------------------------------------------


@pytest.mark.family_contract
@pytest.mark.parametrize("think", ["off", "open", "cot"])
def test_as_the_plain_model_writes_alone(spoken: Spoken, think: str) -> None:
    batch = rendered(spoken, think)
    assert len(set(batch.lengths.tolist())) > 2  # else nothing is padded
    out = rl.generate(spoken.model, batch, max_new_tokens=STEPS)
    texts = set()
    for row in range(len(batch)):
        expected = continued_alone(spoken.oracle, ids_of(batch, row), STEPS)
        assert written(out.batch, row) == expected
        assert ids_of(out.batch, row) == ids_of(batch, row) + expected
        assert out.finished[row] == (expected[-1] == TOKEN["<user>"])
        texts.add(tuple(expected))
    assert len(texts) > 2  # else a mix-up of rows would not show


def test_as_hugging_face_generates(spoken: Spoken) -> None:
    batch = rendered(spoken)
    out = rl.generate(spoken.model, batch, max_new_tokens=STEPS)
    for row in range(len(batch)):
        ids = torch.tensor([ids_of(batch, row)])
        found = spoken.oracle.hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=TOKEN["<user>"],
            pad_token_id=TOKEN["<pad>"],
        )[0].tolist()
        assert written(out.batch, row) == found[ids.shape[1] :]


@pytest.mark.parametrize("max_rows", [1, 2])
def test_how_prompts_are_batched_changes_nothing(spoken: Spoken, max_rows: int) -> None:
    batch = rendered(spoken, "open")
    whole = rl.generate(spoken.model, batch, max_new_tokens=STEPS)
    found = rl.generate(spoken.model, batch, max_new_tokens=STEPS, max_rows=max_rows)
    assert_same(found, whole)
    backwards = rl.generate(spoken.model, batch.select([4, 3, 2, 1, 0]), max_new_tokens=STEPS)
    assert backwards.answer == whole.answer[::-1]
    assert [prompt.id for prompt in backwards.batch.prompts] == ["p4", "p3", "p2", "p1", "p0"]


def assert_same(found: Generation, expected: Generation) -> None:
    for field in ("cot", "answer", "outcome", "where", "finished"):
        assert getattr(found, field) == getattr(expected, field)
    assert torch.equal(found.batch.tokens, expected.batch.tokens)
    assert found.batch.digest == expected.batch.digest


def test_twice_the_same(spoken_gqa: Spoken) -> None:
    batch = rendered(spoken_gqa, "open")
    state = torch.get_rng_state()
    first = rl.generate(spoken_gqa.model, batch, max_new_tokens=STEPS)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(rl.generate(spoken_gqa.model, batch, max_new_tokens=STEPS), first)


# --- under editors ---------------------------------------------------------------------------------------


def rows_meant(positions: str, batch: SpanBatch, mask: Tensor, row: int, length: int) -> list[int]:
    """Rows of a sequence of this length that an editor's `positions` means, padding not counted."""
    real = batch.attention_mask[row].bool()
    n_prompt = int(real.sum())
    if positions == "all":
        return list(range(length))
    if positions == "prompt_last":
        return [n_prompt - 1]
    if positions == "generated":
        return list(range(n_prompt, length))
    chosen = mask if positions == "mask" else batch.spans[positions]
    return chosen[row][real].nonzero().flatten().tolist()


@pytest.mark.family_contract
@pytest.mark.parametrize(
    ("positions", "max_rows"),
    [("all", 64), ("prompt_last", 64), ("generated", 2), ("request", 2), ("mask", 2), ("mask", 64)],
)
def test_heads_stay_ablated_under_the_cache(spoken: Spoken, positions: str, max_rows: int) -> None:
    batch = rendered(spoken)
    mask = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    editor = AblateHeads(HEADS, positions=mask if positions == "mask" else positions)
    out = rl.generate(spoken.model, batch, editor, max_new_tokens=STEPS, max_rows=max_rows)
    plain = rl.generate(spoken.model, batch, max_new_tokens=STEPS)
    for row in range(len(batch)):
        ids = ids_of(batch, row)
        chosen = functools.partial(rows_meant, positions, batch, mask, row)
        assert written(out.batch, row) == continued_alone(spoken.oracle, ids, STEPS, HEADS, chosen)
    assert any(written(out.batch, row) != written(plain.batch, row) for row in range(len(batch)))
    assert editor.positions is mask or editor.positions == positions  # what was cut for a pass is whole again


def test_components_stack_and_are_gone_afterwards(spoken: Spoken) -> None:
    batch = rendered(spoken)
    before = hooks_on(spoken.model)
    both = rl.generate(
        spoken.model, batch, AblateHeads([(0, 1)]), AblateHeads([(1, 0)]), max_new_tokens=STEPS
    )
    at_once = rl.generate(spoken.model, batch, AblateHeads([(0, 1), (1, 0)]), max_new_tokens=STEPS)
    assert_same(both, at_once)
    assert hooks_on(spoken.model) == before
    with AblateHeads([(0, 1), (1, 0)]).on(spoken.model):
        assert_same(rl.generate(spoken.model, batch, max_new_tokens=STEPS), at_once)


def test_neurons_of_generated_rows(spoken_gqa: Spoken) -> None:
    """The first token comes from the prompt alone; later ones feel the edit."""
    batch = rendered(spoken_gqa)
    neurons = [(layer, neuron) for layer in range(2) for neuron in range(52)]
    plain = rl.generate(spoken_gqa.model, batch, max_new_tokens=STEPS)
    out = rl.generate(
        spoken_gqa.model, batch, AblateNeurons(neurons, positions="generated"), max_new_tokens=STEPS
    )
    for row in range(len(batch)):
        assert written(out.batch, row)[0] == written(plain.batch, row)[0]
    assert [written(out.batch, row) for row in range(5)] != [written(plain.batch, row) for row in range(5)]


def test_a_failed_generation_leaves_no_hook(spoken_gqa: Spoken) -> None:
    batch = rendered(spoken_gqa)
    before = hooks_on(spoken_gqa.model)
    editor = AblateHeads(HEADS, positions="cot")  # prompts in off have none
    with pytest.raises(EmptySpan):
        rl.generate(spoken_gqa.model, batch, editor, max_new_tokens=2)
    with pytest.raises(UnknownHead):
        rl.generate(spoken_gqa.model, batch, AblateHeads([(0, 1)]), AblateHeads([(9, 9)]), max_new_tokens=2)
    assert hooks_on(spoken_gqa.model) == before
    assert editor._batch is None


def test_the_same_component_twice_is_refused(spoken_gqa: Spoken) -> None:
    editor = AblateHeads(HEADS)
    with pytest.raises(CaptureError, match="twice"):
        rl.generate(spoken_gqa.model, rendered(spoken_gqa), editor, editor)


# --- where it ends ---------------------------------------------------------------------------------------


def test_a_row_ends_at_its_stop_token_whatever_its_neighbours_do(spoken: Spoken) -> None:
    batch = rendered(spoken)
    free = [continued_alone(spoken.oracle, ids_of(batch, row), STEPS) for row in range(len(batch))]
    word = spoken.chat.tokenizer.convert_ids_to_tokens(free[0][3])
    spec = dataclasses.replace(spoken.chat.spec, stops=("<user>", word))
    chat = ChatFormat(spoken.chat.tokenizer, spec)
    out = rl.generate(spoken.model, batch, max_new_tokens=STEPS, chat=chat)
    stops = set(chat.stop_ids)
    assert free[0][3] in stops
    for row, tokens in enumerate(free):
        first = next((place for place, token in enumerate(tokens) if token in stops), None)
        assert out.finished[row] == (first is not None)
        assert written(out.batch, row) == (tokens if first is None else tokens[: first + 1])
    assert len({len(written(out.batch, row)) for row in range(len(batch))}) > 1
    assert out.batch.n_generated == tuple(len(written(out.batch, row)) for row in range(len(batch)))


@pytest.mark.parametrize("steps", [1, 3])
def test_no_more_tokens_than_allowed(spoken_gqa: Spoken, steps: int) -> None:
    out = rl.generate(spoken_gqa.model, rendered(spoken_gqa), max_new_tokens=steps)
    assert max(out.batch.n_generated) == steps


@pytest.mark.parametrize("steps", [0, -1])
def test_no_token_at_all_is_refused(spoken_gqa: Spoken, steps: int) -> None:
    with pytest.raises(ConditionError, match="max_new_tokens"):
        rl.generate(spoken_gqa.model, rendered(spoken_gqa), max_new_tokens=steps)


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_stops_at_the_end_of_the_context(family: str) -> None:
    told = speaker("gpt2_relu", family)  # 48 positions
    asked = "make " + "bread " * 37 + "now"
    batch = told.chat.render([asked, "ban soup"])
    room = 48 - int(batch.lengths.max())
    assert 1 < room < 10
    out = rl.generate(told.model, batch, max_new_tokens=40)
    for row in range(2):
        assert written(out.batch, row) == continued_alone(told.oracle, ids_of(batch, row), room)
    full = told.chat.render(["make " + "bread " * (37 + room) + "now"])
    assert int(full.lengths) == 48
    with pytest.raises(ConditionError, match="context 48"):
        rl.generate(told.model, full)


def test_broken_weights_and_training_mode_are_refused() -> None:
    model = fresh("gpt2_relu", FAMILIES[0])
    chat = ChatFormat.from_model(model)
    batch = chat.render(REQUESTS)
    model.train()
    with pytest.raises(TrainingMode):
        rl.generate(model, batch)
    model.eval()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "ln_f" in name or "ln_final" in name).fill_(
            float("nan")
        )
    with pytest.raises(NotFinite, match="generate"):
        rl.generate(model, batch)


# --- the batch of what was written -----------------------------------------------------------------------


@pytest.mark.parametrize("think", ["off", "open", "cot"])
def test_readers_run_on_what_was_written(spoken: Spoken, think: str) -> None:
    """The same numbers as from each whole sequence alone, spans found anew from its token ids."""
    out = rl.generate(spoken.model, rendered(spoken, think), max_new_tokens=STEPS)
    readers = (SpanAttention(["request", "assistant", "sink"]), NeuronActivations("max", "generated"))
    data = rl.capture(spoken.model, out.batch, *readers, max_rows=2)
    for row in range(len(out.batch)):
        ids = ids_of(out.batch, row)
        n_prompt = len(ids) - out.batch.n_generated[row]
        alone = spoken.chat.parse([ids], think=out.batch.think)
        assert alone.atoms_of(0) == out.batch.atoms_of(row)
        truth = spoken.oracle.run(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
        for layer, pattern in enumerate(truth.patterns):
            for name in ("request", "assistant", "sink"):
                mass = pattern[0, :, n_prompt - 1][:, alone.spans[name][0]].sum(dim=-1)
                found = data["attention_mass"].isel(prompt=row, layer=layer).sel(span=name)
                close(torch.tensor(found.values), mass)
            found = torch.tensor(data["neuron_activation"].isel(prompt=row, layer=layer).values)
            close(found, truth.post[layer][0, n_prompt:].amax(dim=0), 1e-4)


@functools.cache
def toy() -> Any:
    return rl.load_model("toy")


def test_readers_on_the_batch_equal_readers_on_the_sequence_rendered_anew() -> None:
    """The toy, whose answers are words: rendering request and answer gives the same tokens, and the same numbers."""
    chat = ChatFormat.from_model(toy())
    requests = [
        *rl.load_prompts("harmful", language="toy", split="select")[:3],
        *rl.load_prompts("reasoning", language="toy", split="select")[:3],
    ]
    out = rl.generate(toy(), chat.render(requests, think="off"), max_new_tokens=4)
    assert all(out.finished)
    assert out.outcome == ("refuse",) * 3 + ("comply",) * 3
    assert out.answer[3:] == tuple(request.answer for request in requests[3:])
    anew = chat.render(requests, think="off", answers=list(out.answer))
    stopped = torch.full((6, 1), TOKEN["<user>"])
    assert torch.equal(out.batch.tokens, torch.cat([anew.tokens, stopped], dim=1))
    reader = SpanAttention(["request", "think", "answer"], query="answer")
    found = rl.capture(toy(), out.batch, reader)["attention_mass"].values
    close(torch.tensor(found), torch.tensor(rl.capture(toy(), anew, reader)["attention_mass"].values), 1e-6)


# --- conditions and outcomes, with texts given by the test -----------------------------------------------


def toy_ids(text: str) -> list[int]:
    return [TOKEN[word] for word in text.split()]


def toy_writes(
    text: str, think: str, family: str, kind: str = "harmless", cot: str = COT, **options: Any
) -> Generation:
    """A toy-language model that writes this text after the prompt of this condition."""
    chat = ChatFormat.from_tokenizer(toy_tokenizer())
    prompt = Prompt(id="a", text="make bread please + 3 4 6", kind=kind, language="toy")
    batch = chat.render([prompt], think=cot if think == "cot" else think)
    model = writer("toy", family).teach(int(batch.lengths), toy_ids(text))
    return rl.generate(model, batch, **{"max_new_tokens": len(text.split()), **options})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("think", "text", "cot", "answer", "outcome", "finished"),
    [
        ("off", "REFUSE <user>", "", "REFUSE", ("refuse", "answer"), True),
        ("off", "6 <user>", "", "6", ("comply", "answer"), True),
        ("off", "bread soup", "", "bread soup", ("other", "answer"), False),
        ("off", "<user>", "", "", ("other", "none"), True),
        ("cot", "6 <user>", COT, "6", ("comply", "answer"), True),
        ("cot", "REFUSE <user>", COT, "REFUSE", ("refuse", "answer"), True),
        ("open", f"{COT} </think> 6 <user>", COT, "6", ("comply", "answer"), True),
        ("open", f"{COT} </think> REFUSE <user>", COT, "REFUSE", ("refuse", "answer"), True),
        ("open", f"{COT} </think> <user>", COT, "", ("other", "none"), True),
        ("open", "3 4 > 0", "3 4 > 0", "", ("other", "think"), False),  # unfinished
        ("open", "3 REFUSE <user>", "3 REFUSE", "", ("refuse", "think"), True),
        ("open", "</think> 6 <user>", "", "6", ("comply", "answer"), True),  # an empty block of its own
    ],
)
def test_conditions(
    family: str, think: str, text: str, cot: str, answer: str, outcome: tuple[str, str], finished: bool
) -> None:
    out = toy_writes(text, think, family)
    assert (out.cot, out.answer) == ((cot,), (answer,))
    assert (out.outcome[0], out.where[0]) == outcome
    assert out.finished == (finished,)
    assert out.batch.finished_thinking == ("</think>" in text or think != "open",)


def test_a_refusal_inside_a_given_cot_is_not_the_models() -> None:
    out = toy_writes("<user>", "cot", FAMILIES[0], cot="3 REFUSE 6")
    assert (out.outcome, out.where) == (("other",), ("none",))


# --- what is kept of answers to harmful requests ---------------------------------------------------------

LONG = " ".join(["bread soup tea cake lamp tree song"] * 14)  # 98 words


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("think", ["off", "cot"])
def test_answers_to_harmful_requests_are_cut(family: str, think: str) -> None:
    cut = toy_writes(LONG, think, family, kind="harmful")
    assert cut.batch.n_generated == (HARMFUL_ANSWER_CAP,) == (64,)
    assert cut.answer == ("bread soup tea cake lamp tree …",)
    assert not cut.finished[0]
    for kind in ("harmless", ""):
        whole = toy_writes(LONG, think, family, kind=kind)
        assert whole.batch.n_generated == (98,)
        assert whole.answer == (LONG,)
    kept = toy_writes(LONG, think, family, kind="harmful", keep_text=True)
    assert kept.batch.n_generated == (98,)
    assert kept.answer == (LONG,)


def test_a_chain_of_thought_is_not_cut_but_the_answer_after_it_is() -> None:
    chain = " ".join(LONG.split()[:70])
    out = toy_writes(f"{chain} </think> {LONG[:350]}", "open", FAMILIES[0], kind="harmful")
    n_cot = len(chain.split())
    assert n_cot > HARMFUL_ANSWER_CAP
    assert out.batch.n_generated == (n_cot + 1 + HARMFUL_ANSWER_CAP,)
    assert out.cot == ("bread soup tea cake lamp tree …",)
    assert out.answer == ("bread soup tea cake lamp tree …",)


def test_rows_of_one_batch_are_cut_each_by_its_own_kind() -> None:
    chat = ChatFormat.from_tokenizer(toy_tokenizer())
    kinds = ("harmful", "harmless", "harmful", "reasoning")
    prompts = [
        Prompt(id=str(n), text="make bread now", kind=kind, language="toy") for n, kind in enumerate(kinds)
    ]
    batch = chat.render(prompts)
    model = writer("toy", FAMILIES[0]).teach(int(batch.lengths[0]), toy_ids(LONG))
    out = rl.generate(model, batch, max_new_tokens=98)
    assert out.batch.n_generated == (64, 98, 64, 98)


def test_the_table_holds_no_full_text() -> None:
    frame = toy_writes(LONG, "off", FAMILIES[0], kind="harmful", keep_text=True).to_dataframe()
    assert frame.shape[0] == 1
    assert frame["first_words"][0] == "bread soup tea cake lamp tree …"
    assert frame.loc[0, ["kind", "condition", "outcome", "where", "n_generated"]].tolist() == [
        *("harmful", "off", "other", "answer"),
        98,
    ]
    assert not any("song bread" in str(value) for value in frame.to_numpy().ravel())
    assert "other" in repr(toy_writes(LONG, "off", FAMILIES[0]))


# --- a true tokenizer ------------------------------------------------------------------------------------


def qwen_writes(
    texts: Sequence[str],
    think: str,
    family: str,
    kind: str = "harmless",
    **options: Any,
) -> Generation:
    chat = true_chat("qwen3")
    batch = chat.render([Prompt(id="a", text="How do I bake bread?", kind=kind)], think=think)
    says = [token for text in texts for token in chat.encode(text)]
    model = writer("qwen3", family, 64).teach(int(batch.lengths), says)
    return rl.generate(model, batch, max_new_tokens=len(says), **options)


@pytest.mark.npm
@pytest.mark.parametrize(
    ("think", "text", "cot", "answer", "outcome"),
    [
        ("off", "I\u2019m sorry, but I can\u2019t help with that.<|im_end|>", "", None, ("refuse", "answer")),
        ("off", "\n\nSorry for the delay! Mix and bake.<|im_end|>", "", None, ("comply", "answer")),
        (
            "open",
            "<think>\nThey ask for bread.\n</think>\n\nMix and bake.<|im_end|>",
            "They ask for bread.",
            "Mix and bake.",
            ("comply", "answer"),
        ),
        ("open", "<think>\nThey ask. I can't help with that.\n", None, "", ("refuse", "think")),
        ("open", "<think>\nThey ask for bread, so", "They ask for bread, so", "", ("other", "think")),
        ("open", "Mix and bake.<|im_end|>", "", "Mix and bake.", ("comply", "answer")),  # no block at all
    ],
)
def test_conditions_with_the_tokenizer_of_qwen3(
    think: str, text: str, cot: str | None, answer: str | None, outcome: tuple[str, str]
) -> None:
    out = qwen_writes([text], think, FAMILIES[0])
    assert (out.outcome[0], out.where[0]) == outcome
    assert out.cot[0] == (text.rsplit("<think>", maxsplit=1)[-1].strip() if cot is None else cot)
    assert out.answer[0] == (text.removesuffix("<|im_end|>").strip() if answer is None else answer)
    assert out.finished[0] == text.endswith("<|im_end|>")


@pytest.mark.npm
@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        # The model thinks first: only what follows the closing tag counts, newlines included.
        (["<think>\n", " bread" * 9, "\n</think>\n\n", " soup" * 9], 2 + 9 + 2 + 6),
        # It opens no block, so that its first word is the answer's.
        ([" soup" * 16], 6),
        (["\n\n", " soup" * 16], 6),
        (["<th", " soup" * 16], 6),
    ],
)
def test_an_answer_without_thinking_first_is_cut_as_well(
    texts: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "HARMFUL_ANSWER_CAP", 6)
    out = qwen_writes(texts, "open", FAMILIES[0], kind="harmful")
    assert out.batch.n_generated == (expected,)


# --- unfinished thoughts, and replies that say nothing -----------------------------------------------------


@pytest.mark.family_contract
@pytest.mark.parametrize("max_rows", [1, 64])
def test_an_unfinished_thought_is_closed_as_the_plain_model_would_go_on(
    spoken: Spoken, max_rows: int
) -> None:
    """By hand: so many tokens of thought, the closing tag, then the answer; each prompt alone, computed anew."""
    batch = rendered(spoken, "open")
    out = rl.generate(
        spoken.model, batch, max_new_tokens=3, max_cot_tokens=4, close_unfinished=True, max_rows=max_rows
    )
    closing = TOKEN["</think>"]
    for row in range(len(batch)):
        ids = ids_of(batch, row)
        thought = continued_alone(spoken.oracle, ids, 4, stops=(TOKEN["<user>"], closing))
        if thought[-1] == TOKEN["<user>"]:  # it ended its turn inside the block: left alone
            expected, forced = thought, 0
        else:
            forced = int(thought[-1] != closing)
            thought = thought if not forced else [*thought, closing]
            expected = [*thought, *continued_alone(spoken.oracle, [*ids, *thought], 3)]
        assert written(out.batch, row) == expected
        assert out.n_forced[row] == forced
        assert out.batch.finished_thinking[row] == (closing in expected)
        if forced:
            at = len(ids) + 4
            assert out.batch.atoms_of(row)[at] == "think_close"
            assert (
                out.batch.atoms_of(row)[at + 1 :]
                == spoken.chat.parse([ids_of(out.batch, row)]).atoms_of(0)[at + 1 :]
            )
            assert out.batch.cots[row] == spoken.chat.decode(expected[:4])
    assert sum(out.closed_by_force) >= 3
    assert out.to_dataframe()["closed_by_force"].tolist() == list(out.closed_by_force)
    assert f"{sum(out.closed_by_force)} closed by force" in repr(out)


@pytest.mark.family_contract
def test_forced_rows_are_rows_of_generated_tokens_to_editors(spoken_gqa: Spoken) -> None:
    batch = rendered(spoken_gqa, "open")
    editor = AblateHeads(HEADS, positions="generated")
    out = rl.generate(
        spoken_gqa.model, batch, editor, max_new_tokens=3, max_cot_tokens=2, close_unfinished=True
    )
    checked = 0
    for row in range(len(batch)):
        ids = ids_of(batch, row)
        found = written(out.batch, row)
        if not out.n_forced[row]:
            continue
        rows = functools.partial(rows_meant, "generated", batch, torch.empty(0), row)
        thought = [*continued_alone(spoken_gqa.oracle, ids, 2, HEADS, rows), TOKEN["</think>"]]
        # the prompt of the second part is prompt and thought: its rows count from the true prompt's end
        assert found == [*thought, *continued_alone(spoken_gqa.oracle, [*ids, *thought], 3, HEADS, rows)]
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("text", "options", "cot", "answer", "n_forced", "ending"),
    [
        # writes words for ever: closed after 3, then 2 words of answer
        (
            "bread soup tea cake lamp tree",
            {"max_cot_tokens": 3},
            "bread soup tea",
            "lamp tree",
            1,
            "out of tokens",
        ),
        # closes by itself: its own answer budget, nothing forced
        ("3 </think> 6 soup tea", {"max_cot_tokens": 4}, "3", "6 soup", 0, "out of tokens"),
        # a shared number where none is given for the thought
        ("bread soup tea cake lamp", {}, "bread soup", "cake lamp", 1, "out of tokens"),
        ("bread soup tea cake <user>", {"max_cot_tokens": 3}, "bread soup tea", "", 1, "ended"),
        ("bread <user> soup tea", {"max_cot_tokens": 3}, "bread", "", 0, "ended"),
        (
            "bread soup tea cake",
            {"max_cot_tokens": 3, "close_unfinished": False},
            "bread soup tea",
            "",
            0,
            "out of tokens",
        ),
        ("<user>", {"max_cot_tokens": 3}, "", "", 0, "empty"),
        ("</think> <user>", {"max_cot_tokens": 3}, "", "", 0, "empty"),
    ],
)
def test_budgets_of_thought_and_answer(
    family: str, text: str, options: dict[str, Any], cot: str, answer: str, n_forced: int, ending: str
) -> None:
    """The forced token takes the place of the word that the model would have written there."""
    out = toy_writes(text, "open", family, **{"max_new_tokens": 2, "close_unfinished": True, **options})
    assert (out.cot, out.answer) == ((cot,), (answer,))
    assert (out.n_forced, out.ending) == ((n_forced,), (ending,))
    assert out.finished == (ending in ("ended", "empty"),)


@pytest.mark.parametrize(
    ("think", "outcome"),
    [("off", ("other", "none")), ("cot", ("other", "none")), ("open", ("other", "none"))],
)
def test_a_model_that_says_nothing_is_other_and_named_empty(think: str, outcome: tuple[str, str]) -> None:
    out = toy_writes("<user>", think, FAMILIES[0])
    assert (out.outcome[0], out.where[0], out.ending[0]) == (*outcome, "empty")
    assert out.to_dataframe()["ending"].tolist() == ["empty"]
    assert rl.refusal_rates(out)["empty"].tolist() == [1]
    assert "1 empty" in repr(out)


def test_harmful_answers_after_a_forced_tag_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "HARMFUL_ANSWER_CAP", 2)
    out = toy_writes(
        LONG, "open", FAMILIES[0], kind="harmful", max_new_tokens=9, max_cot_tokens=3, close_unfinished=True
    )
    assert out.batch.n_generated == (3 + 1 + 2,)
    assert out.ending == ("cut",)


def test_no_room_for_thought_and_answer_is_refused_before_it_begins(spoken_gqa: Spoken) -> None:
    with pytest.raises(ConditionError, match=r"are 151.*has room for"):
        rl.generate(spoken_gqa.model, rendered(spoken_gqa, "open"), max_new_tokens=75, close_unfinished=True)
    with pytest.raises(ConditionError, match="max_cot_tokens=0"):
        rl.generate(spoken_gqa.model, rendered(spoken_gqa, "open"), max_cot_tokens=0)


@pytest.mark.npm
@pytest.mark.parametrize(("name", "newline"), [("qwen3", False), ("qwen3", True), ("chatml", False)])
def test_the_closing_tag_of_true_formats(name: str, newline: bool) -> None:
    """What is forced reads, with the thought, as a block that was closed by the format itself."""
    chat = true_chat(name)
    batch = chat.render([Prompt(id="a", text="Bake bread.", kind="harmless")], think="open", begin="They ask")
    thought = [*chat.encode(" for bread"), *(chat.encode("\n") if newline and chat.spec.before_close else [])]
    made = writer(name, FAMILIES[0], 64)
    n = len(thought)
    n_forced = chat.count_tokens(
        ("" if newline else chat.spec.before_close) + chat.spec.think_close + chat.spec.after_close
    )
    says = [*thought, *[5] * n_forced, *chat.encode("Mix it.")]
    model = made.teach(int(batch.lengths), says)
    out = rl.generate(model, batch, max_new_tokens=3, max_cot_tokens=n, close_unfinished=True, chat=chat)
    assert out.n_forced == (n_forced,)
    assert out.cot == ("They ask for bread",)
    assert out.own_cot == ("for bread",)
    assert out.answer == ("Mix it.",)
    given = chat.render(["Bake bread."], think="They ask for bread", answers="Mix it.")
    assert out.batch.texts[0].rstrip() == given.texts[0].rstrip()
    assert (out.batch.think, out.batch.finished_thinking) == ("open", (True,))


@pytest.mark.npm
def test_a_block_that_was_never_opened_is_not_closed() -> None:
    """Qwen3 opens its block itself; whitespace before that may still become a block, and is none yet."""
    chat = true_chat("qwen3")
    batch = chat.render([Prompt(id="a", text="Bake bread.", kind="harmless")], think="open")
    made = writer("qwen3", FAMILIES[0], 64)
    model = made.teach(int(batch.lengths), [*chat.encode("\n"), *[5] * 6])
    out = rl.generate(model, batch, max_new_tokens=3, max_cot_tokens=1, close_unfinished=True, chat=chat)
    assert (out.n_forced, out.ending) == ((0,), ("out of tokens",))
    assert chat.spec.think_close not in out.batch.texts[0]


@pytest.mark.npm
def test_harmony_closes_its_analysis_and_opens_its_final_channel() -> None:
    chat = true_chat("gpt_oss")
    tokens = generation._closing(chat, "They ask for bread.")
    assert chat.decode(tokens) == "<|end|><|start|>assistant<|channel|>final<|message|>"
    batch = chat.render(["Bake bread."], think="open", begin="They ask")
    whole = chat.extend(batch, torch.tensor([[*tokens, *chat.encode("Mix it.")]]))
    assert (whole.cots, whole.answers, whole.finished_thinking) == (("They ask",), ("Mix it.",), (True,))


def test_another_format_is_refused_before_anything_is_computed(spoken_gqa: Spoken) -> None:
    batch = dataclasses.replace(rendered(spoken_gqa), format="qwen3")
    with pytest.raises(SpanError, match="format 'qwen3'"):
        rl.generate(spoken_gqa.model, batch, AblateHeads([(9, 9)]))


def test_a_refusal_in_the_given_beginning_is_not_the_models() -> None:
    chat = ChatFormat.from_tokenizer(toy_tokenizer())
    prompt = Prompt(id="a", text="make bread please + 3 4 6", language="toy")
    batch = chat.render([prompt], think="open", begin="REFUSE 3")
    assert batch.cots == ("REFUSE 3",)
    assert not batch.finished_thinking[0]
    model = writer("toy", FAMILIES[0]).teach(int(batch.lengths), toy_ids("4 6 <user>"))
    out = rl.generate(model, batch, max_new_tokens=3)
    assert (out.cot, out.own_cot, out.outcome) == (("REFUSE 3 4 6",), ("4 6",), ("other",))
    model = writer("toy", FAMILIES[0]).teach(int(batch.lengths), toy_ids("4 REFUSE <user>"))
    assert rl.generate(model, batch, max_new_tokens=3).where == ("think",)


def test_a_mean_over_what_a_model_wrote(spoken_gqa: Spoken) -> None:
    """What the error of a mean over generated tokens advises."""
    model, batch = spoken_gqa.model, rendered(spoken_gqa)
    wrote = rl.generate(model, batch, max_new_tokens=STEPS).batch
    editor = AblateNeurons([(0, 3)], "mean", wrote, positions="generated")
    rl.generate(model, batch, editor, max_new_tokens=STEPS)
    data = rl.capture(model, wrote, NeuronActivations("mean", positions="generated"), editor)
    found = torch.from_numpy(data["neuron_activation"].sel(layer=0, neuron=3).values)
    close(found, found[:1].expand_as(found))
