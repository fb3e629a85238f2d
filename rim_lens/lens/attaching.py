"""Putting hooks on a model, and the proof that they work on this very model.

Hook points that silently do nothing are a known fault of both families. So on first contact a component
proves, by small forward passes, that each hook it needs fires, has the right shape (and rows that sum to
1), and, if it edits there, that overwriting the whole layer moves the logits. The proof is kept per model
object and redone when the model's wiring changes (modules replaced, attention implementation or
compatibility mode switched), not when its weights do.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.modules import module as every

from rim_lens.errors import EditHadNoEffect, HookDidNotFire, NotFinite, UnsupportedModel, WrongHookShape
from rim_lens.lens.facts import Hook, Model, ModelFacts, model_facts, require_eval
from rim_lens.lens.sites import Site, hook_name

_Claim = tuple[Site, Literal["read", "edit"]]
_PROBE_ROWS, _PROBE_LENGTH = 2, 6
_proofs: WeakKeyDictionary[Any, tuple[tuple[Any, ...], set[_Claim]]] = WeakKeyDictionary()
_quiet = threading.local()
_added: WeakKeyDictionary[Any, Hook] = WeakKeyDictionary()  # by torch's handle
# Hooks of these modules listen and change nothing: the bridge's on its norms, and those that transformers leaves for good on a
# model that was asked once for hidden states or attentions, as `run_with_cache` does.
_LISTENING = ("transformer_lens.model_bridge.", "transformers.utils.output_capturing")
SWITCHED = (
    "rim_lens_switched"  # marks a forward pass that stands in for a module's own for a while: same wiring
)


@contextmanager
def quiet() -> Iterator[None]:
    """Within this context rim_lens components already on a model do nothing.

    Used by reference passes, which must see the model itself and not a component's edits.
    """
    before = getattr(_quiet, "on", False)
    _quiet.on = True
    try:
        yield
    finally:
        _quiet.on = before


def is_quiet() -> bool:
    """Whether components are to do nothing just now."""
    return bool(getattr(_quiet, "on", False))


@dataclass(frozen=True, eq=False, repr=False)
class ComponentHook:
    """What a component does at a hook point, unless all are to be quiet.

    Attributes:
        edit: Gets the activation, returns its replacement or None.
        by: The component's kind, for messages.
        what: The component with its settings, for records.
    """

    edit: Callable[[Any], Tensor | None]
    by: str
    what: str = ""

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG002
        """Act as a hook of TransformerLens."""
        return None if is_quiet() else self.edit(tensor)


def hooks_at(point: Any) -> list[Hook | None]:
    """Forward hooks on a hook point, in order; None for each that was not added by `add_hooks`."""
    ours = _ours(point)
    return [ours.get(number) for number in point._forward_hooks]


def _ours(module: Any) -> dict[int, Hook | None]:
    """Hooks that `add_hooks` put on a module, by PyTorch's number; only hook points can have some."""
    return {handle.hook.id: _added.get(handle.hook) for handle in getattr(module, "fwd_hooks", ())}


def acting(*tables: Mapping[int, Any]) -> list[int]:
    """Of PyTorch's tables of hooks, the numbers of those that may change something."""
    return [
        number
        for table in tables
        for number, hook in table.items()
        if not str(getattr(hook, "__module__", "")).startswith(_LISTENING)
    ]


def standing(model: Model) -> list[str]:
    """What hooks a forward pass of a model now: the name of each place, and what is there, as far as that can be told.

    PyTorch's own ways to put a hook on a module, or on all modules, count as well.
    """
    places = {id(module): (name, module) for name, module in model.named_modules()}
    places |= {id(point): (name, point) for name, point in model.hook_dict.items()}
    found = []
    for name, module in places.values():
        ours = _ours(module)
        for number in acting(module._forward_pre_hooks, module._forward_hooks):
            hook = ours.get(number)
            what = (hook.what or hook.by) if isinstance(hook, ComponentHook) else "a hook"
            found.append(f"{name}: {what}")
    everywhere = acting(every._global_forward_pre_hooks, every._global_forward_hooks)
    return found + ["every module: a hook"] * len(everywhere)


def add_hooks(model: Model, hooks: Sequence[tuple[str, Hook]]) -> Callable[[], None]:
    """Add forward hooks that stay until the returned function is called; nobody else's hooks are touched.

    Raises:
        UnsupportedModel: A hook point does not exist; nothing stays attached then.
    """
    points = model.hook_dict  # rebuilt at each access on the bridge: read once
    added: list[tuple[Any, Any]] = []

    def remove() -> None:
        while added:
            point, handle = added.pop()
            handle.hook.remove()
            point.fwd_hooks = [kept for kept in point.fwd_hooks if kept is not handle]

    try:
        for name, hook in hooks:
            if name not in points:
                raise UnsupportedModel(
                    f"hook point {name!r} was asked for; this {type(model).__name__} has none of that name."
                )
            points[name].add_hook(hook)
            added.append((points[name], points[name].fwd_hooks[-1]))
            _added[added[-1][1].hook] = hook
    except BaseException:
        remove()
        raise
    return remove


@contextmanager
def hooked(model: Model, hooks: Sequence[tuple[str, Hook]]) -> Iterator[None]:
    """Add forward hooks for the length of a `with`, gone also after an exception."""
    remove = add_hooks(model, hooks)
    try:
        yield
    finally:
        remove()


def verify(model: Model, reads: Sequence[Site] = (), edits: Sequence[Site] = ()) -> ModelFacts:
    """Prove that the hook points of these sites work on this model, or refuse.

    Args:
        model: Any supported model, in eval mode.
        reads: Sites to be read: each must fire in every layer with the right shape.
        edits: Sites to be edited: besides, overwriting the whole layer there must change the logits.

    Returns:
        The model's facts.

    Raises:
        TrainingMode: The model is not in eval mode.
        UnsupportedModel: A hook point is missing, or the MLP is a mixture of experts where neurons are asked for.
        HookDidNotFire: A hook point never fires.
        WrongHookShape: It fires with another shape, or attention rows do not sum to 1.
        EditHadNoEffect: Overwriting it leaves the logits as they were.
        NotFinite: The model gives NaN or infinity on a plain forward pass.
    """
    facts = model_facts(model)
    require_eval(model)
    if "post" in (*reads, *edits):
        facts.refuse_moe("per-neuron work")
    now = wiring(model)
    known, proven = _proofs.get(model, (now, set()))
    if known != now:
        proven = set()
    wanted: set[_Claim] = {(site, "read") for site in (*reads, *edits)} | {(site, "edit") for site in edits}
    missing = wanted - proven
    if missing:
        with alone(model), torch.no_grad():
            _prove(model, facts, missing)
        _proofs[model] = (now, proven | missing)
    return facts


@contextmanager
def alone(model: Model) -> Iterator[None]:
    """Within this context nobody's hooks act on hook points: a proof is about the model itself, and its probes are nobody's data.

    PyTorch's own on other modules stay, as they may be part of the model (`weight_norm` is one).
    """
    points = {id(point): point for point in model.hook_dict.values()}.values()
    put = [
        (hooks, dict(hooks), numbers)
        for point in points
        for hooks in (
            point._forward_hooks,
            point._forward_pre_hooks,
            point._backward_hooks,
            point._backward_pre_hooks,
        )
        if (numbers := acting(hooks))
    ]
    was_quiet, _quiet.on = is_quiet(), False  # a proof's own components look, also within a reference pass
    try:
        for hooks, _, numbers in put:
            for number in numbers:
                hooks.pop(number, None)
        yield
    finally:
        _quiet.on = was_quiet
        for hooks, before, _ in put:
            hooks.clear()
            hooks.update(before)


def wiring(model: Model) -> tuple[Any, ...]:
    """What the forward pass runs through, to be compared with ==; keeps nothing alive."""
    inner = getattr(model, "original_model", None)
    modules = list(model.modules())
    return (
        # Weak references, not ids: a new module may lie where a dead one lay.
        tuple(weakref.ref(module) for module in modules),
        tuple("forward" in vars(module) and not _switched(module) for module in modules),
        implementation(getattr(inner, "config", None)),
        getattr(model, "compatibility_mode", None),
        getattr(model.cfg, "use_attn_result", None),
        getattr(model.cfg, "use_split_qkv_input", None),
        getattr(model.cfg, "use_attn_in", None),
    )


def implementation(config: Any) -> Any:
    """Which attention a Hugging Face model computes, also while another stands in for it."""
    return getattr(config, SWITCHED, None) or getattr(config, "_attn_implementation", None)


def _switched(module: Any) -> bool:
    return bool(getattr(vars(module)["forward"], SWITCHED, False))


def _prove(model: Model, facts: ModelFacts, wanted: set[_Claim]) -> None:
    generator = torch.Generator().manual_seed(0)
    length = min(_PROBE_LENGTH, facts.n_ctx)
    tokens = torch.randint(0, facts.d_vocab, (_PROBE_ROWS, length), generator=generator).to(facts.device)
    mask = torch.ones_like(tokens)
    run = partial(model, tokens, attention_mask=mask, return_type="logits")

    sites = sorted({site for site, _ in wanted})
    seen: dict[str, Tensor] = {}
    names = [hook_name(site, layer) for site in sites for layer in range(facts.n_layers)]
    with hooked(model, [(name, partial(_keep, seen=seen, name=name)) for name in names]):
        baseline = run()
    if not torch.isfinite(baseline).all():
        raise NotFinite(
            "a plain forward pass on six random tokens gives NaN or infinity. Check the weights, or load in float32."
        )
    for site in sites:
        for layer in range(facts.n_layers):
            _check_fired(facts, site, layer, seen, length)

    for site in sorted({site for site, how in wanted if how == "edit"}):
        for layer in range(facts.n_layers):
            name = hook_name(site, layer)
            noise = torch.randn(seen[name].shape, generator=generator).to(seen[name])
            with hooked(model, [(name, partial(_overwrite, value=noise))]):
                edited = run()
            if torch.equal(edited, baseline):
                raise EditHadNoEffect(
                    f"overwriting all of {name} left every logit as it was: edits there are dead on this"
                    f" {facts.family}. Switch the attention implementation to 'eager', or use another site."
                )


def _keep(tensor: Tensor, hook: Any, seen: dict[str, Tensor], name: str) -> None:  # noqa: ARG001
    seen[name] = tensor


def _overwrite(tensor: Tensor, hook: Any, value: Tensor) -> Tensor:  # noqa: ARG001
    return value


def _check_fired(facts: ModelFacts, site: Site, layer: int, seen: dict[str, Tensor], length: int) -> None:
    name = hook_name(site, layer)
    if name not in seen:
        advice = (
            "attention patterns exist only under attn_implementation='eager'"
            if site == "pattern"
            else "this architecture does not route through it"
        )
        raise HookDidNotFire(
            f"{name} exists on this {facts.family} but never fired in a forward pass: {advice}."
        )
    expected = {
        "pattern": (_PROBE_ROWS, facts.n_heads, length, length),
        "q": (_PROBE_ROWS, length, facts.n_heads, facts.d_head),
        "k": (_PROBE_ROWS, length, facts.n_key_value_heads, facts.d_head),
        "v": (_PROBE_ROWS, length, facts.n_key_value_heads, facts.d_head),
        "z": (_PROBE_ROWS, length, facts.n_heads, facts.d_head),
        "post": (_PROBE_ROWS, length, facts.d_mlp),
    }.get(site, (_PROBE_ROWS, length, facts.d_model))
    found = tuple(seen[name].shape)
    if found != expected:
        raise WrongHookShape(
            f"{name} was expected to have shape {expected} and has {found}. On a mixture of experts hook_post is the"
            " block's output; on other models report this with the output of rl.model_facts(model)."
        )
    if site == "pattern":
        error = float((seen[name].float().sum(dim=-1) - 1).abs().max())
        if not error < 1e-2:
            raise WrongHookShape(
                f"rows of {name} should sum to 1 and miss it by up to {error:.3g}: this is not a plain softmax"
                " (an attention sink logit, for instance), and masses on spans would not add up."
            )
