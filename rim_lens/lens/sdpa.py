"""Forward passes of a bridge that keep PyTorch's fused attention (sdpa), with only the query rows computed that are read.

A bridge computes attention step by step, so that patterns can be hooked: twice the time of sdpa at 1 024 tokens, and heads × pos²
numbers at a time. Who looks at chosen rows alone (`RowHook`) needs none of that. Within `sdpa_kept` each layer's attention is the
model's own, of Hugging Face: its projections and norms, with all their hook points, its cache and its masks; what it calls last is
`_attend`, which gives queries and keys to the row hooks and leaves the rest to sdpa. Afterwards everything is as it was.

On first contact it is proven on this very model that both ways give the same logits, rows and gradients, with padding and
without, and noted which hook points fire in one way and not in the other: a pass with a hook on any of those keeps the
step-by-step way. The proof is redone when the wiring changes.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rim_lens.errors import UnsupportedModel
from rim_lens.lens.attaching import SWITCHED, ComponentHook, acting, alone, hooked, hooks_at, is_quiet, wiring
from rim_lens.lens.attention import Attention, QueriesAndKeys, RowHook
from rim_lens.lens.facts import Model, ModelFacts, model_facts
from rim_lens.lens.sites import hook_name

_NAME = "rim_lens_rows"
_INTERNAL = "_attn_implementation_internal"  # set directly: the public setter goes on to other configs
# Which else enters scores in some architectures, and what it is
_ADDED = {
    "softcap": "scores are capped",
    "s_aux": "it has attention sinks",
    "position_bias": "its scores have a bias",
    "head_mask": "heads are masked",
    "alibi": "its scores have a bias",
}
_PROBE_LENGTH, _PROBE_PADS = 7, 3
_points: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # Hugging Face attention → the bridge's hook point
_proofs: WeakKeyDictionary[Any, tuple[tuple[Any, ...], _Proof]] = WeakKeyDictionary()
_wanted: Counter[int] = Counter()  # by a config's id: how many have switched it
_lock = threading.Lock()


@dataclass(frozen=True)
class _Proof:
    """What was found on first contact.

    Attributes:
        refusal: Why the model cannot be run so; "" where it can.
        dead: Hook points that do not fire then, or with other values.
        no_gradients: Why gradients cannot be taken so; "" where they can.
    """

    refusal: str
    dead: tuple[tuple[str, weakref.ref[Any]], ...] = ()
    no_gradients: str = ""


class _Through:
    """Stands in for a bridge attention's forward pass: the Hugging Face attention it wraps, between the same hooks."""

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge
        setattr(self, SWITCHED, True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bridge = self._bridge
        if "hidden_states" in kwargs:
            kwargs["hidden_states"] = bridge.hook_in(kwargs["hidden_states"])
        else:
            args = (bridge.hook_in(args[0]), *args[1:])
        if kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = bridge._apply_position_embedding_hooks(
                kwargs["position_embeddings"]
            )
        attended, *more = bridge.original_component(*args, **kwargs)
        return (bridge.hook_out(attended), *more)


class _Unhooked:
    """Stands in for a bridge norm's forward pass: the model's own norm as long as no hook is on the bridge's.

    A bridge norm takes twice as long, as it keeps its scale apart for hooks.
    """

    def __init__(self, bridge: Any) -> None:
        self._bridge = bridge
        self._points = [child for child in bridge.children() if hasattr(child, "fwd_hooks")]
        setattr(self, SWITCHED, True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(point._forward_hooks or _other_hooks(point) for point in self._points):
            return type(self._bridge).forward(self._bridge, *args, **kwargs)
        return self._bridge.original_component(*args, **kwargs)


def why_not_sdpa(model: Model, gradients: bool = False) -> str:
    """Why a pass over this model, with the hooks that are on it now, needs whole patterns; "" where sdpa can be kept.

    Args:
        model: Any.
        gradients: Whether the pass keeps a graph.
    """
    facts = model_facts(model)
    if facts.family != "TransformerBridge":
        return f"a {facts.family} computes whole patterns"
    now = wiring(model)
    before, proof = _proofs.get(model, (None, None))
    if proof is None or before != now:
        proof = _proven(model, facts)
        _proofs[model] = now, proof
    if proof.refusal or (gradients and proof.no_gradients):
        return proof.refusal or proof.no_gradients
    for name, reference in proof.dead:
        point = reference()
        if point is None:
            continue
        for hook in [*hooks_at(point), *_other_hooks(point)]:
            if isinstance(hook, ComponentHook) and isinstance(hook.edit, RowHook):
                continue
            if isinstance(hook, ComponentHook):
                return (
                    f"{hook.by} works on whole patterns" if "pattern" in name else f"{hook.by} hooks {name}"
                )
            return f"there is a hook on {name}"
    for layer, block in enumerate(model.blocks):
        inner = block.attn.original_component
        if acting(inner._forward_hooks, inner._forward_pre_hooks):  # step by step it never fires
            return f"there is a hook on the attention that the bridge wraps in layer {layer}"
    return ""


def _other_hooks(point: Any) -> list[Any]:
    """All that is on a hook point but forward hooks; PyTorch's own ways to add one count, too."""
    return [
        *point._backward_hooks.values(),
        *point._forward_pre_hooks.values(),
        *point._backward_pre_hooks.values(),
    ]


@contextmanager
def sdpa_kept(model: Model) -> Iterator[None]:
    """Within this context attention is computed by sdpa, and row hooks on the pattern get their rows all the same.

    Ask `why_not_sdpa` first, with all hooks on: hooks on whole patterns do not fire here. On leaving, also by an exception,
    and within another such context, the model is as it was before.
    """
    from transformer_lens.model_bridge.generalized_components import NormalizationBridge

    _register()
    attention = [block.attn for block in model.blocks]
    points = model.hook_dict
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, NormalizationBridge) and "forward" not in vars(module):
                _put(stack, vars(module), "forward", _Unhooked(module))
        for layer, bridge in enumerate(attention):
            inner = bridge.original_component
            _put(stack, vars(bridge), "forward", _Through(bridge))
            _put(stack, _points, inner, points[hook_name("pattern", layer)])
            stack.enter_context(_switched(inner.config))
        yield


@contextmanager
def _switched(config: Any) -> Iterator[None]:
    """Let a config name our attention until the last who wants it leaves: models may share one, and threads end in any order."""
    settings, key = vars(config), id(config)
    with _lock:
        _wanted[key] += 1
        if _wanted[key] == 1:
            settings[SWITCHED] = settings[_INTERNAL]
            settings[_INTERNAL] = _NAME
    try:
        yield
    finally:
        with _lock:
            _wanted[key] -= 1
            if not _wanted[key]:
                del _wanted[key]
                settings[_INTERNAL] = settings.pop(SWITCHED)


def _put(stack: ExitStack, where: Any, key: Any, value: Any) -> None:
    """Set an entry until the stack closes; then it is what it was, or gone."""
    if key in where:
        stack.callback(where.__setitem__, key, where[key])
    else:
        stack.callback(where.pop, key, None)
    where[key] = value


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    added = [told for name, told in _ADDED.items() if more.get(name) is not None]
    if added:
        raise UnsupportedModel(f"{added[0]}, which sdpa does not do")
    point = _points.get(module)
    looking = [] if point is None or is_quiet() else hooks_at(point)
    if looking:
        seen_keys, n_queries = key, query.shape[2]
        if attention_mask is None:
            if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
                raise UnsupportedModel("a query sees keys after it")
            if n_queries > 1:  # places of a static cache that hold nothing yet
                seen_keys = key[:, :, :n_queries]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        seen = QueriesAndKeys(query, seen_keys, attention_mask, scale)
        for hook in looking:
            if isinstance(hook, ComponentHook) and isinstance(hook.edit, RowHook):
                hook.edit.look(seen)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **more
    )


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


# --- the proof ---------------------------------------------------------------------------------------


def _proven(model: Model, facts: ModelFacts) -> _Proof:
    try:
        _require_parts(model)
        with alone(model), torch.no_grad():
            return _compared(model, facts)
    except UnsupportedModel as problem:
        return _Proof(str(problem))
    except Exception as problem:  # whatever goes wrong within a model's own code, the other way is there
        return _Proof(
            f"attention of this {facts.architecture} runs in no other way ({type(problem).__name__}: {problem})"
        )


def _require_parts(model: Model) -> None:
    """Refuse attention that is not the Hugging Face model's own, of the very modules the bridge's hooks are on."""
    for flag in ("use_attn_result", "use_split_qkv_input", "use_attn_in"):
        if getattr(model.cfg, flag, False):
            raise UnsupportedModel(f"{flag} is on")
    for layer, block in enumerate(model.blocks):
        bridge = getattr(block, "attn", None)
        inner = getattr(bridge, "original_component", None)
        if bridge is None or inner is None or _INTERNAL not in vars(getattr(inner, "config", object)):
            raise UnsupportedModel(f"layer {layer} has no attention of the usual kind")
        if "forward" in vars(bridge) and not getattr(vars(bridge)["forward"], SWITCHED, False):
            raise UnsupportedModel(f"the attention of layer {layer} was replaced by another")
        own = {id(module) for module in inner.modules()}
        if any(id(getattr(bridge, name, None)) not in own for name in ("q", "k", "v", "o")):
            raise UnsupportedModel("the bridge keeps projections of its own for this architecture")


@dataclass
class _Seen:
    logits: Tensor
    rows: list[Tensor]  # by layer: [prompt, head, query, key]
    values: dict[str, Tensor]  # what hook points showed; those that fired twice are left out


def _compared(model: Model, facts: ModelFacts) -> _Proof:
    length = min(_PROBE_LENGTH, facts.n_ctx)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, facts.d_vocab, (2, length), generator=generator).to(facts.device)
    whole = torch.ones_like(tokens)
    padded = whole.clone()
    padded[1, : min(_PROBE_PADS, length - 1)] = 0
    points = dict(model.hook_dict)
    unique = {id(point): name for name, point in reversed(points.items())}
    # The pattern goes by its own name: it is one of the dead.
    unique |= {
        id(points[hook_name("pattern", layer)]): hook_name("pattern", layer)
        for layer in range(facts.n_layers)
    }
    tolerance = 1e-4 if facts.dtype in (torch.float32, torch.float64) else 0.05
    dead: set[str] = set()
    no_gradients = ""
    for mask in (whole, padded):
        eager = _seen(model, facts, tokens, mask, list(unique.values()))
        with sdpa_kept(model):
            fused = _seen(model, facts, tokens, mask, list(unique.values()))
            unhooked = model(tokens, attention_mask=mask, return_type="logits")
        real = mask.bool()
        if len(fused.rows) != len(eager.rows):
            raise UnsupportedModel("attention of this model is called in another way")
        off = max(_off(eager.logits[real], logits[real]) for logits in (fused.logits, unhooked))
        rows = max(
            float((one - other).transpose(1, 2)[real].abs().max())
            for one, other in zip(eager.rows, fused.rows, strict=True)
        )
        if not (off < tolerance and rows < tolerance):
            told = (
                f"sdpa gives other numbers than the bridge on this {facts.architecture} (logits off by {off:.2g} of the largest,"
                f" attention by {rows:.2g})"
            )
            warnings.warn(f"{told}; whole patterns are computed instead.", RuntimeWarning, stacklevel=5)
            return _Proof(told)
        no_gradients = no_gradients or _why_no_gradients(model, tokens, mask, 10 * tolerance)
        dead |= {name for name in eager.values if name not in fused.values}
        if mask is whole:  # what stands at padding differs, and means nothing
            dead |= {
                name
                for name, value in eager.values.items()
                if name in fused.values and not _off(value, fused.values[name]) < 10 * tolerance
            }
    lost = tuple((name, weakref.ref(points[name])) for name in unique.values() if name in dead)
    return _Proof("", lost, no_gradients)


def _why_no_gradients(model: Model, tokens: Tensor, mask: Tensor, tolerance: float) -> str:
    real = mask.bool()
    try:
        slopes = _slopes(model, tokens, mask)
        with sdpa_kept(model):
            off = _off(slopes[real], _slopes(model, tokens, mask)[real])
    except Exception as problem:  # passes without a graph may be kept all the same
        return f"gradients cannot be taken by sdpa ({type(problem).__name__}: {problem})"
    return "" if off < tolerance else f"gradients by sdpa are other ones (off by {off:.2g} of the largest)"


def _slopes(model: Model, tokens: Tensor, mask: Tensor) -> Tensor:
    """Of the size of the last row's logits, with respect to the embedding: [prompt, pos, d_model]."""
    embedded: list[Tensor] = []

    def begin(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        embedded.append(value.detach().requires_grad_())
        return embedded[0]

    with torch.inference_mode(False), torch.enable_grad(), hooked(model, [("hook_embed", begin)]):
        logits = model(tokens.clone(), attention_mask=mask.clone(), return_type="logits")
        return torch.autograd.grad(logits[:, -1].float().square().sum(), embedded)[0]


def _off(one: Tensor, other: Tensor) -> float:
    """Largest difference as a share of the largest number; infinite where shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    one, other = one.float(), other.float()
    return float((one - other).abs().max() / one.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def _seen(model: Model, facts: ModelFacts, tokens: Tensor, mask: Tensor, names: list[str]) -> _Seen:
    values: dict[str, list[Any]] = {}
    rows: dict[int, Tensor] = {}

    def keep(value: Any, hook: Any, name: str) -> None:  # noqa: ARG001
        values.setdefault(name, []).append(value)

    def look(layer: int, seen: Attention) -> None:
        each = torch.eye(seen.n_queries, dtype=torch.bool)[:, None].expand(-1, seen.n_prompts, -1)
        rows[layer] = torch.stack([seen.mean(queries) for queries in each], dim=2)

    reading = [
        (hook_name("pattern", layer), ComponentHook(RowHook(partial(look, layer)), "proof"))
        for layer in range(facts.n_layers)
    ]
    with hooked(model, [*reading, *((name, partial(keep, name=name)) for name in names)]):
        logits = model(tokens, attention_mask=mask, return_type="logits")
    once = {
        name: found[0]
        for name, found in values.items()
        if len(found) == 1 and isinstance(found[0], Tensor) and found[0].is_floating_point()
    }
    return _Seen(logits, [rows[layer] for layer in sorted(rows)], once)
