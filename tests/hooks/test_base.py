"""How components come and go: contexts, registration, plain TransformerLens style, and a user's own hooks beside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from rim_lens.errors import CaptureError, UnknownHead
from rim_lens.hooks import (
    AblateDirection,
    AblateHeads,
    AblateNeurons,
    Component,
    NeuronActivations,
    SpanAttention,
    bound,
)
from rim_lens.hooks.base import Edit
from rim_lens.lens import Model, ModelFacts, Site, all_logits, hook_name, quiet
from tests.families import Case, close

pytestmark = pytest.mark.family_contract

HEADS = [(0, 1), (1, 3)]


class Counting(Component):
    """Doubles what it touches, so that being called twice shows, and counts."""

    edits: ClassVar[tuple[Site, ...]] = ()

    def __init__(self, site: Site, layer: int = 0) -> None:
        super().__init__()
        self.site, self.layer, self.calls = site, layer, 0

    def sites(self) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
        return (), (self.site,)

    def hooks(self, model: Model, facts: ModelFacts) -> list[tuple[str, Edit]]:
        return [(hook_name(self.site, self.layer), self._double)]

    def _double(self, tensor: Tensor) -> Tensor:
        self.calls += 1
        return tensor * 2


def run(case: Case) -> Tensor:
    return all_logits(case.model, case.batch.tokens, case.batch.attention_mask)


def plain_style(case: Case, hooks: list[tuple[str, Any]]) -> Tensor:
    with torch.no_grad():
        return case.model.run_with_hooks(
            case.batch.tokens, attention_mask=case.batch.attention_mask, return_type="logits", fwd_hooks=hooks
        )


def attached(model: Model) -> int:
    points = {id(point): point for point in model.hook_dict.values()}.values()
    listed = sum(len(point.fwd_hooks) for point in points)
    assert listed == sum(len(point._forward_hooks) for point in points)  # ours and torch's books agree
    return listed


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    case = request.getfixturevalue("case" if "case" in request.fixturenames else "case_gqa")
    before = attached(case.model)
    yield
    assert attached(case.model) == before == 0


def test_three_ways_to_attach_give_one_number(case: Case) -> None:
    editor = AblateHeads(HEADS)
    plain = run(case)
    with editor.on(case.model) as inside:
        assert inside is editor
        expected = run(case)
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert torch.equal(run(case), plain)
    assert torch.equal(plain_style(case, editor.fwd_hooks(case.model)), expected)
    assert torch.equal(run(case), plain)
    assert editor.register(case.model) is editor
    assert torch.equal(run(case), expected)
    assert torch.equal(run(case), expected)
    editor.remove()
    editor.remove()
    assert torch.equal(run(case), plain)


@pytest.mark.parametrize("site", ["pattern", "z", "post", "mlp_out", "attn_out", "resid_pre", "resid_post"])
def test_a_hook_fires_once_in_a_pass(case: Case, site: Site) -> None:
    """In compatibility mode TransformerLens calls a hook once for each name its point has."""
    component = Counting(site)
    plain = run(case)
    with component.on(case.model):
        expected = run(case)
    assert component.calls == 1
    assert not torch.allclose(expected, plain, atol=1e-3)
    found = plain_style(case, component.fwd_hooks(case.model))
    assert component.calls == 2
    close(found, expected, 1e-6)
    with case.model.hooks(fwd_hooks=component.fwd_hooks(case.model)):
        found = run(case)
    assert component.calls == 3
    close(found, expected, 1e-6)


@pytest.mark.parametrize("way", ["on", "register", "fwd_hooks"])
def test_hooks_are_gone_after_an_exception(case: Case, way: str) -> None:
    def explode(tensor: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    editor = AblateHeads(HEADS)
    bomb = [(hook_name("post", 1), explode)]
    plain = run(case)
    if way == "on":
        with pytest.raises(ZeroDivisionError), editor.on(case.model):
            plain_style(case, bomb)
    elif way == "register":
        editor.register(case.model)
        with pytest.raises(ZeroDivisionError):
            plain_style(case, bomb)
        editor.remove()
    else:
        with pytest.raises(ZeroDivisionError):
            plain_style(case, [*editor.fwd_hooks(case.model), *bomb])
    assert attached(case.model) == 0
    assert torch.equal(run(case), plain)


def test_a_component_that_fails_to_attach_leaves_nothing(case_gqa: Case) -> None:
    with (
        pytest.raises(UnknownHead),
        AblateHeads(HEADS).on(case_gqa.model),
        AblateNeurons([(0, 1)]).on(case_gqa.model),
        AblateHeads([(9, 9)]).on(case_gqa.model),
    ):
        pass


class Mine:
    """A user's own hook: counts, and halves."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor:
        self.calls += 1
        return tensor * 0.5


def test_a_users_own_hook_stays(case: Case) -> None:
    mine = Mine()
    name = hook_name("post", 0)
    case.model.add_hook(name, mine)
    try:
        halved = run(case)
        assert mine.calls == 1
        with AblateHeads(HEADS).on(case.model):
            both = run(case)
        assert not torch.allclose(both, halved, atol=1e-3)
        editor = AblateNeurons([(0, 1)]).register(case.model)  # at the very same point
        run(case)
        editor.remove()
        assert attached(case.model) == 1
        plain_style(case, AblateHeads(HEADS).fwd_hooks(case.model))
        with pytest.raises(UnknownHead):
            AblateHeads([(9, 9)]).fwd_hooks(case.model)
        before = mine.calls
        assert torch.equal(run(case), halved)
        assert mine.calls == before + 1
    finally:
        case.model.reset_hooks()


@pytest.mark.parametrize("site", ["z", "post"])
def test_what_a_user_kept_before_an_edit_stays_as_it_was(case: Case, site: Site) -> None:
    """Editors replace the tensor; one that wrote into it would change the past."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        kept.append(tensor)

    case.model.add_hook(hook_name(site, 0), keep)
    editor = AblateHeads([(0, 1)]) if site == "z" else AblateNeurons([(0, 5)])
    try:
        with editor.on(case.model):
            run(case)
    finally:
        case.model.reset_hooks()
    real = case.batch.attention_mask.bool()
    truth = case.truth.z if site == "z" else case.truth.post
    close(kept[0][real], truth[0][real])


def test_a_users_own_hook_sees_no_proof(case_gqa: Case) -> None:
    """A hook that collects activations must not find those of the probe among them."""
    model = case_gqa.fresh()
    mine = Mine()
    model.add_hook(hook_name("resid_post", 0), mine)
    with AblateHeads(HEADS, positions="prompt_last").on(model), AblateNeurons([(0, 1)]).on(model):
        assert mine.calls == 0
        all_logits(model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)
    assert mine.calls == 1


def test_a_users_own_edit_does_not_spoil_the_proof(case_gqa: Case) -> None:
    """Someone who mutes attention by hand may still read it: the proof is about the model."""
    model = case_gqa.fresh()
    model.add_hook(hook_name("pattern", 0), lambda tensor, hook: tensor * 0)
    reader = SpanAttention(spans=case_gqa.batch.spans)
    with reader.on(model):
        all_logits(model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)
        assert not reader.collect()["attention_mass"][:, 0].any()


@pytest.mark.parametrize("way", ["on", "register"])
def test_the_users_own_runs_leave_ours_attached(case: Case, way: str) -> None:
    """TransformerLens resets hooks at the end of its own runs: its own ones, not those of others."""
    mine = Mine()
    hooks = [(hook_name("post", 1), mine)]
    plain = run(case)
    editor = AblateHeads(HEADS)
    context = editor.on(case.model)
    if way == "on":
        context.__enter__()
    else:
        editor.register(case.model)
    try:
        ours = run(case)
        both = plain_style(case, hooks)
        assert not torch.allclose(both, ours, atol=1e-3)
        assert torch.equal(run(case), ours)
        with case.model.hooks(fwd_hooks=hooks):
            assert torch.equal(run(case), both)
        assert torch.equal(run(case), ours)
        with torch.no_grad():
            cached, _ = case.model.run_with_cache(case.batch.tokens, attention_mask=case.batch.attention_mask)
        assert torch.equal(cached, ours)
        assert torch.equal(run(case), ours)
    finally:
        if way == "on":
            context.__exit__(None, None, None)
        else:
            editor.remove()
    assert torch.equal(run(case), plain)
    assert not torch.allclose(plain_style(case, hooks), both, atol=1e-3)


def test_ours_inside_a_users_context_and_the_other_way_round(case: Case) -> None:
    mine = Mine()
    hooks = [(hook_name("post", 1), mine)]
    editor = AblateHeads(HEADS)
    with case.model.hooks(fwd_hooks=hooks):
        halved = run(case)
        with editor.on(case.model):
            both = run(case)
        assert torch.equal(run(case), halved)
        editor.register(case.model)
    with_ours = run(case)
    close(plain_style(case, hooks), both, 1e-6)
    editor.remove()
    with editor.on(case.model):
        assert torch.equal(run(case), with_ours)


def test_a_users_reset_inside_ours_is_harmless(case_gqa: Case) -> None:
    plain = run(case_gqa)
    with AblateHeads(HEADS).on(case_gqa.model):
        case_gqa.model.reset_hooks()
        assert torch.equal(run(case_gqa), plain)


def test_one_component_on_two_models(case_gqa: Case) -> None:
    other = case_gqa.fresh()
    editor = AblateHeads(HEADS)
    plain = run(case_gqa)
    editor.register(case_gqa.model).register(other)
    edited = run(case_gqa)
    assert not torch.equal(edited, plain)
    close(all_logits(other, case_gqa.batch.tokens, case_gqa.batch.attention_mask), edited)
    editor.remove()
    assert torch.equal(run(case_gqa), plain)
    close(all_logits(other, case_gqa.batch.tokens, case_gqa.batch.attention_mask), plain)


def test_quiet_silences_and_gives_back(case_gqa: Case) -> None:
    plain = run(case_gqa)
    component = Counting("z")
    with component.on(case_gqa.model):
        with quiet():
            assert torch.equal(run(case_gqa), plain)
            with pytest.raises(ZeroDivisionError), quiet():
                raise ZeroDivisionError
            assert torch.equal(run(case_gqa), plain)
        assert component.calls == 0
        assert not torch.equal(run(case_gqa), plain)


def test_a_proof_does_not_disturb_what_is_attached(case_gqa: Case) -> None:
    model = case_gqa.fresh()
    reader = NeuronActivations("max", positions=case_gqa.batch.spans["cot"]).register(model)
    component = Counting("mlp_out").register(model)
    all_logits(model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)
    assert component.calls == 1
    before = reader.collect()["neuron_activation"]
    all_logits(model, case_gqa.batch.tokens, case_gqa.batch.attention_mask)
    with AblateHeads(HEADS).on(model):  # its proof runs several passes
        pass
    assert component.calls == 2
    assert torch.equal(reader.collect()["neuron_activation"], before)


def test_bound_is_undone_after_an_exception(case_gqa: Case) -> None:
    reader = SpanAttention(["request"])
    with bound([reader], case_gqa.batch):
        with pytest.raises(ZeroDivisionError), bound([reader], case_gqa.batch.select([0])):
            raise ZeroDivisionError
        assert reader._batch is case_gqa.batch
    assert reader._batch is None


def test_a_reader_that_read_nothing_says_so(case_gqa: Case) -> None:
    reader = SpanAttention(spans=case_gqa.batch.spans)
    with pytest.raises(CaptureError, match="read nothing"):
        _ = reader.result
    with reader.on(case_gqa.model), pytest.raises(CaptureError, match="read nothing"):
        reader.collect()


def test_settings_of_every_dtype_have_a_digest(case_gqa: Case) -> None:
    """bfloat16 has no numpy dtype."""
    ones = torch.ones(32, dtype=torch.bfloat16)
    assert repr(AblateDirection(ones)) == repr(AblateDirection(ones.clone()))
    assert repr(AblateDirection(ones)) != repr(AblateDirection(-ones))
