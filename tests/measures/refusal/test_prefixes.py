"""Prefix scores against a plain loop: one prompt, one spelling, one token at a time, the whole sequence computed anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import rim_lens as rl
from rim_lens.chat import ChatFormat, SpanBatch
from rim_lens.errors import ConditionError, NotEnoughData, TrainingMode
from rim_lens.hooks import AblateHeads
from rim_lens.measures.refusal import first_word
from rim_lens.measures.refusal.prefixes import COMPLIANCE_PREFIXES, REFUSAL_PREFIXES, refusal_prefix_score
from rim_lens.organisms.toy.host import TOKEN
from tests.families import FAMILIES
from tests.speaking import REQUESTS, Spoken, fresh, ids_of, logits_alone, writer
from tests.true_tokenizers import true_chat

REFUSALS = ["REFUSE now", "REFUSE SKIP bread", "ban", "GUESS 3"]
COMPLIANCES = ["3", "YES 4 6", "YES 5", "REFUSE 1"]
HEADS = [(0, 1), (1, 2)]


def rendered(spoken: Spoken, think: str = "off") -> SpanBatch:
    return spoken.chat.render(REQUESTS, think=think)


def log_chance(
    spoken: Spoken, ids: list[int], text: str, heads: Any = (), generated_only: bool = False
) -> float:
    """log p of a text after some ids, each token from a pass of its own."""
    total = 0.0
    n_prompt = len(ids)
    for token in [TOKEN[word] for word in text.split()]:
        rows = (lambda n: range(n_prompt, n)) if generated_only else range
        chances = logits_alone(spoken.oracle, ids, heads, rows).double().log_softmax(dim=-1)
        total += float(chances[token])
        ids = [*ids, token]
    return total


def expected_side(logs: list[float], texts: list[str], normalise: str) -> float:
    if normalise == "per_token":
        logs = [value / len(text.split()) for value, text in zip(logs, texts, strict=True)]
    whole = np.logaddexp.reduce(logs)
    return float(whole if normalise == "sum" else whole - np.log(len(logs)))


@pytest.mark.family_contract
@pytest.mark.parametrize(("normalise", "max_rows"), [("sum", 64), ("mean", 3), ("per_token", 1)])
def test_as_a_plain_loop(spoken: Spoken, normalise: str, max_rows: int) -> None:
    batch = rendered(spoken, "3 4 > 0")
    assert len(set(batch.lengths.tolist())) > 2  # else nothing is padded
    found = refusal_prefix_score(
        spoken.model,
        batch,
        refusals=REFUSALS,
        compliances=COMPLIANCES,
        normalise=normalise,
        max_rows=max_rows,
    )
    for row in range(len(batch)):
        ids = ids_of(batch, row)
        refuse = [log_chance(spoken, ids, text) for text in REFUSALS]
        comply = [log_chance(spoken, ids, text) for text in COMPLIANCES]
        sides = [expected_side(refuse, REFUSALS, normalise), expected_side(comply, COMPLIANCES, normalise)]
        assert float(found["refusal"][row]) == pytest.approx(sides[0], abs=5e-5)
        assert float(found["compliance"][row]) == pytest.approx(sides[1], abs=5e-5)
        assert float(found[row]) == pytest.approx(sides[0] - sides[1], abs=1e-4)
        assert float(found["covered"][row]) == pytest.approx(
            np.exp(refuse).sum() + np.exp(comply).sum(), abs=1e-5
        )
        if normalise != "per_token":
            assert str(found["likeliest_refusal"].values[row]) == REFUSALS[int(np.argmax(refuse))]
            assert str(found["likeliest_compliance"].values[row]) == COMPLIANCES[int(np.argmax(comply))]
    assert found.attrs["normalise"] == normalise


@pytest.mark.family_contract
@pytest.mark.parametrize(("positions", "max_rows"), [("all", 64), ("generated", 4)])
def test_under_editors(spoken: Spoken, positions: str, max_rows: int) -> None:
    batch = rendered(spoken)
    editor = AblateHeads(HEADS, positions=positions)
    found = refusal_prefix_score(
        spoken.model, batch, editor, refusals=REFUSALS, compliances=COMPLIANCES, max_rows=max_rows
    )
    for row in range(len(batch)):
        ids = ids_of(batch, row)
        logs = [
            [log_chance(spoken, ids, text, HEADS, positions == "generated") for text in texts]
            for texts in (REFUSALS, COMPLIANCES)
        ]
        expected = np.logaddexp.reduce(logs[0]) - np.logaddexp.reduce(logs[1])
        assert float(found[row]) == pytest.approx(float(expected), abs=1e-4)
    plain = refusal_prefix_score(spoken.model, batch, refusals=REFUSALS, compliances=COMPLIANCES)
    assert not np.allclose(found, plain, atol=1e-3)
    assert not any(point.fwd_hooks for point in spoken.model.hook_dict.values())


def test_one_token_prefixes_are_the_first_token_score(spoken_gqa: Spoken) -> None:
    """All other words as compliance: the ratio is the log-odds of the opener."""
    batch = rendered(spoken_gqa)
    others = [word for word in TOKEN if word not in ("REFUSE", "<pad>")]
    found = refusal_prefix_score(spoken_gqa.model, batch, refusals=["REFUSE"], compliances=others)
    score = rl.refusal_score(spoken_gqa.model, batch, openers=["REFUSE", "<pad>"])
    assert score.shape == found.shape
    chances = torch.stack([logits_alone(spoken_gqa.oracle, ids_of(batch, row)) for row in range(len(batch))])
    chances = chances.double().softmax(dim=-1)
    refuse, pad = chances[:, TOKEN["REFUSE"]], chances[:, TOKEN["<pad>"]]
    np.testing.assert_allclose(found, (refuse / (1 - refuse - pad)).log(), atol=1e-4)
    np.testing.assert_allclose(found["covered"], 1 - pad, atol=1e-5)


def test_what_continues_another_prefix_adds_nothing(spoken_gqa: Spoken) -> None:
    batch = rendered(spoken_gqa)
    one = refusal_prefix_score(spoken_gqa.model, batch, refusals=["REFUSE"], compliances=["3"])
    two = refusal_prefix_score(
        spoken_gqa.model,
        batch,
        refusals=["REFUSE", "REFUSE now", "REFUSE  now bread"],
        compliances=["3", "3 4"],
    )
    np.testing.assert_allclose(one, two, atol=1e-9)
    mean = refusal_prefix_score(
        spoken_gqa.model, batch, refusals=["REFUSE", "REFUSE now"], compliances=["3"], normalise="mean"
    )
    np.testing.assert_allclose(mean, one, atol=1e-9)


@pytest.mark.npm
@pytest.mark.parametrize("skip", ["greedy", "none", "forced"])
def test_after_whitespace_with_a_true_tokenizer(skip: str) -> None:
    """Two prompts that skip differently, spellings with a space and a curly apostrophe; the plain model as oracle."""
    chat = true_chat("qwen3")
    batch = chat.render(["Bake bread.", "Bake some good bread."], think="off")
    wrote = writer("qwen3", FAMILIES[0], 64)
    says = [
        *chat.encode("\n\n"),
        *chat.encode(" "),
        *chat.encode("I"),
        *chat.encode(" can"),
        *chat.encode("'t"),
    ]
    model = wrote.teach(int(batch.lengths[0]), [*says, *chat.encode(" bread") * 6])
    noise = torch.randn(wrote.table.shape, generator=torch.Generator().manual_seed(1)) * 0.05
    wrote.table.add_(noise)
    refusals, compliances = ["I can't", "I\u2019m sorry"], ["Sure", "Here is"]
    found = refusal_prefix_score(model, batch, refusals=refusals, compliances=compliances, skip=skip)
    spelled = [
        [
            "I can't",
            " I can't",
            "I can\u2019t",
            " I can\u2019t",
            "I'm sorry",
            " I'm sorry",
            "I\u2019m sorry",
            " I\u2019m sorry",
        ],
        ["Sure", " Sure", "Here is", " Here is"],
    ]
    blank = {chat.encode(text)[0] for text in ("\n\n", "\n", " ")}
    for row in range(2):
        ids = ids_of(batch, row)
        if skip == "forced":
            ids = [*ids, *chat.encode("\n\n")]
        skipped = int(skip == "forced")
        while skip == "greedy" and skipped < 4:
            with torch.no_grad():
                token = int(wrote.hf(torch.tensor([ids])).logits[0, -1].argmax())
            if token not in blank:
                break
            ids, skipped = [*ids, token], skipped + 1
        sides = []
        for texts in spelled:
            logs = []
            for text in texts:
                tokens = chat.encode(text)
                with torch.no_grad():
                    logits = wrote.hf(torch.tensor([[*ids, *tokens]])).logits[0].double().log_softmax(-1)
                logs.append(sum(float(logits[len(ids) - 1 + k, token]) for k, token in enumerate(tokens)))
            sides.append(float(np.logaddexp.reduce(logs)))
        assert float(found["refusal"][row]) == pytest.approx(sides[0], abs=2e-4)
        assert float(found["compliance"][row]) == pytest.approx(sides[1], abs=2e-4)
        assert int(found["skipped"][row]) == skipped
    if skip == "greedy":
        assert len(set(found["skipped"].values.tolist())) == 2
        assert str(found["likeliest_refusal"].values[0]) == "I can't"  # what it says after its whitespace


@pytest.mark.npm
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt_oss", "llama3_1", "chatml"])
def test_the_prefixes_of_the_package_fit_true_tokenizers(name: str) -> None:
    """No prefix of one side begins with one of the other, and every one can be spelled."""
    from rim_lens.measures.refusal.prefixes import _spelled

    spelled = _spelled(true_chat(name).tokenizer, (REFUSAL_PREFIXES, COMPLIANCE_PREFIXES))
    assert {(one.side, one.prefix) for one in spelled} == {
        (side, number)
        for side, texts in enumerate((REFUSAL_PREFIXES, COMPLIANCE_PREFIXES))
        for number in range(len(texts))
    }


def test_what_is_refused(spoken_gqa: Spoken) -> None:
    model, batch = spoken_gqa.model, rendered(spoken_gqa)
    with pytest.raises(ConditionError, match="open think block"):
        refusal_prefix_score(model, rendered(spoken_gqa, "open"))
    with pytest.raises(ValueError, match=r"'REFUSE now' begins with 'REFUSE'"):
        refusal_prefix_score(model, batch, refusals=["REFUSE now"], compliances=["REFUSE"])
    with pytest.raises(NotEnoughData, match=r"compliances=\[\.\.\.\]"):
        refusal_prefix_score(model, batch, compliances=["blorp"])
    with pytest.raises(ValueError, match="'per_token'"):
        refusal_prefix_score(model, batch, normalise="length")  # type: ignore[arg-type]
    with pytest.raises(ConditionError, match="no tokens for the whitespace"):
        refusal_prefix_score(model, batch, skip="forced")  # the toy's words have no whitespace tokens
    training = fresh("gpt2_relu", FAMILIES[0]).train()
    with pytest.raises(TrainingMode):
        refusal_prefix_score(training, ChatFormat.from_model(training).render(REQUESTS))


@pytest.fixture
def skipping(spoken: Spoken, monkeypatch: pytest.MonkeyPatch) -> tuple[SpanBatch, set[int]]:
    """Words that this random model would write first, declared whitespace: rows skip none, one and more of them."""
    batch = rendered(spoken)
    firsts = [int(logits_alone(spoken.oracle, ids_of(batch, row)).argmax()) for row in range(len(batch))]
    blank = set(firsts[1:4])
    monkeypatch.setattr(first_word, "whitespace_ids", lambda *_: torch.tensor(sorted(blank)))
    return batch, blank


@pytest.mark.family_contract
@pytest.mark.parametrize("positions", ["all", "generated", "request", "mask"])
def test_rows_that_skip_differently_under_editors(
    spoken: Spoken, skipping: tuple[SpanBatch, set[int]], positions: str
) -> None:
    """Each row is alone in the oracle; here rows part ways, lose the padding none of them needs, and masks with it."""
    batch, blank = skipping
    mask = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    editor = AblateHeads(HEADS, positions=mask if positions == "mask" else positions)
    options: dict[str, Any] = {"refusals": REFUSALS, "compliances": COMPLIANCES}
    found = refusal_prefix_score(spoken.model, batch, editor, **options, max_rows=8)
    if positions == "generated":  # what the first word is read after is whitespace, in some prompts none
        with pytest.raises(ConditionError, match="the effect would be 0"):
            rl.refusal_score(spoken.model, batch, editor)
        scores = None
    else:
        scores = rl.refusal_score(spoken.model, batch, editor)
    for row in range(len(batch)):
        ids, real = ids_of(batch, row), batch.attention_mask[row].bool()
        n_prompt = len(ids)
        inside = {"request": batch.spans["request"], "mask": mask}.get(positions)

        def rows(
            n: int, n_prompt: int = n_prompt, inside: Any = inside, row: int = row, real: Any = real
        ) -> Any:
            if inside is not None:
                return inside[row][real].nonzero().flatten().tolist()
            return range(n_prompt, n) if positions == "generated" else range(n)

        skipped = 0
        while skipped < 4:
            token = int(logits_alone(spoken.oracle, ids, HEADS, rows).argmax())
            if token not in blank:
                break
            ids, skipped = [*ids, token], skipped + 1
        assert int(found["skipped"][row]) == skipped
        sides = []
        for texts in (REFUSALS, COMPLIANCES):
            logs = []
            for text in texts:
                sequence, total = list(ids), 0.0
                for word in text.split():
                    logits = logits_alone(spoken.oracle, sequence, HEADS, rows).double().log_softmax(dim=-1)
                    total += float(logits[TOKEN[word]])
                    sequence.append(TOKEN[word])
                logs.append(total)
            sides.append(float(np.logaddexp.reduce(logs)))
        assert float(found[row]) == pytest.approx(sides[0] - sides[1], abs=1e-4)
        if scores is None:
            continue
        assert int(scores["skipped"][row]) == skipped
        logits = logits_alone(spoken.oracle, ids, HEADS, rows).double().log_softmax(dim=-1)
        chance = float(logits[TOKEN["REFUSE"]].exp())
        assert float(scores[row]) == pytest.approx(np.log(chance) - np.log1p(-chance), abs=1e-4)
    assert len(set(found["skipped"].values.tolist())) > 1


@pytest.mark.family_contract
def test_blocked_keys_stay_where_they_are_when_padding_goes(
    spoken: Spoken, skipping: tuple[SpanBatch, set[int]]
) -> None:
    """Keys are named by their place in the prompt: batched, with rows parting ways, equals one by one."""
    batch, _ = skipping
    options: dict[str, Any] = {"refusals": REFUSALS, "compliances": COMPLIANCES}
    editor = rl.BlockAttention("generated", "request")
    together = refusal_prefix_score(spoken.model, batch, editor, **options, max_rows=8)
    alone = [
        float(refusal_prefix_score(spoken.model, batch.select([row]), editor, **options)[0])
        for row in range(len(batch))
    ]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert not np.allclose(together, refusal_prefix_score(spoken.model, batch, **options), atol=1e-3)
