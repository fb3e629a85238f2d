"""The curve along a chain of thought, against every token read apart."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from rim_lens.errors import ConditionError, NotEnoughData, StatisticsError
from rim_lens.generation import generate
from rim_lens.hooks import AblateHeads
from rim_lens.measures.probes.cliff import refusal_cliff
from rim_lens.measures.probes.fitting import Probe
from rim_lens.measures.stats import bootstrap_interval
from tests.families import Case
from tests.measures.probes.plainly import stream_without
from tests.measures.refusal.test_direction import both, toy

HARMFUL = both(8)[0]


def a_probe(width: int = 64, layer: int = 1, seed: int = 0) -> Probe:
    rng = np.random.default_rng(seed)
    return Probe(rng.normal(size=width), 0.7, layer, "think_close", "resid_post", "off")


@pytest.mark.family_contract
def test_the_curve_is_that_of_every_token_read_apart(case_gqa: Case) -> None:
    """Chains of unequal length, tokens scattered: each on its own scale from 0 to 1."""
    batch, one = case_gqa.batch, a_probe(32)
    found = refusal_cliff(case_gqa.model, batch, one, n_points=6, end="think_open")
    curves, plateaus, ends = [], [], []
    for row in range(len(batch)):
        margins = (case_gqa.truth.resid_post[1][row].double().numpy() @ one.direction - 0.7) / (
            one.direction @ one.direction / 2
        )
        inside = margins[batch.spans["cot"][row].numpy()]
        curves.append(
            np.interp(np.linspace(0, 1, 6), np.linspace(0, 1, len(inside)), inside)
            if len(inside) > 1
            else np.full(6, inside[0])
        )
        plateaus.append(inside.mean())
        ends.append(margins[batch.spans["think_open"][row].numpy()].mean())
    expected = np.stack(curves)
    np.testing.assert_allclose(found.curve["margin"], expected.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(found.curve["share_above"], (expected > 0).mean(axis=0))
    np.testing.assert_allclose(found.per_request["plateau"], plateaus, atol=1e-4)
    np.testing.assert_allclose(found.per_request["end"], ends, atol=1e-4)
    assert found.curve["share"].tolist() == pytest.approx(np.linspace(0, 1, 6).tolist())
    assert found.per_request["n_tokens"].tolist() == batch.spans["cot"].sum(dim=1).tolist()


def test_the_drop_is_end_minus_plateau_with_its_interval_by_family() -> None:
    model, chat = toy()
    batch = chat.render(HARMFUL, think=chat.cots(HARMFUL, "careful"), label="careful")
    one = a_probe()
    found = refusal_cliff(model, batch, one, AblateHeads([(0, 1)]))
    margins = one.margin(stream_without(model, batch, 1, [(0, 1)]).numpy() @ one.direction)
    cot, close = batch.spans["cot"].numpy(), batch.spans["think_close"].numpy()
    drops = np.array(
        [
            line[end].mean() - line[inside].mean()
            for line, inside, end in zip(margins, cot, close, strict=True)
        ]
    )
    np.testing.assert_allclose(found.per_request["drop"], drops, atol=1e-4)
    interval = bootstrap_interval(drops, families=[prompt.family for prompt in HARMFUL])
    row = found.drop.iloc[0]
    assert (row["drop"], row["drop_low"], row["drop_high"]) == pytest.approx(
        (float(interval.estimate), float(interval.low), float(interval.high)), abs=1e-4
    )
    assert row["p_fall"] == (drops < 0).mean()
    assert "careful" in repr(found)


def test_a_self_written_chain_is_read_like_a_given_one() -> None:
    """The toy writes the careful steps itself."""
    model, chat = toy()
    given = chat.render(HARMFUL, think=chat.cots(HARMFUL, "careful"))
    own = generate(model, chat.render(HARMFUL, think="open"), max_new_tokens=12).batch
    assert list(own.cots) == list(given.cots)
    curves = [refusal_cliff(model, batch, a_probe()).curve for batch in (given, own)]
    pd.testing.assert_frame_equal(*curves, atol=1e-4)


def test_prompts_without_a_chain_or_a_closing_tag_are_named() -> None:
    model, chat = toy()
    own = generate(model, chat.render(HARMFUL, think="open"), max_new_tokens=3).batch
    with pytest.raises(ConditionError, match="close_unfinished"):
        refusal_cliff(model, own, a_probe())
    with pytest.raises(ConditionError, match="has both"):
        refusal_cliff(model, chat.render(HARMFUL, think="off"), a_probe())
    begun = refusal_cliff(model, own, a_probe(), end="cot:last")
    assert len(begun.per_request) == len(HARMFUL)
    assert begun.left_out == ()


def test_probes_of_another_model_are_refused() -> None:
    model, chat = toy()
    batch = chat.render(HARMFUL, think=chat.cots(HARMFUL, "careful"))
    for wrong in (a_probe(32), a_probe(layer=2)):
        with pytest.raises(StatisticsError, match="another model"):
            refusal_cliff(model, batch, wrong)
    with pytest.raises(StatisticsError, match="at least 2"):
        refusal_cliff(model, batch, a_probe(), n_points=1)
    with pytest.raises(NotEnoughData, match="direction is zero"):
        refusal_cliff(model, batch, Probe(np.zeros(64), 0.0, 1, "cot"))
