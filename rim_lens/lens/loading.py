"""From a name, a folder or a Hugging Face model to a model with hooks, in either TransformerLens family."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from rim_lens.errors import MissingTokenizer, ModelError, UnknownModel, UnsupportedModel
from rim_lens.lens.adapters import adapter_base, is_adapter, merge_adapter, require_adapter
from rim_lens.lens.facts import Model

Family = Literal["auto", "bridge", "hooked"]
# Where the weights go: one device, or a device map of Transformers over several, by a word or module → device
Device = str | torch.device | Mapping[str, str | int]
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
# variant (the part of the name after the colon, or "") → Hugging Face model and tokenizer
Source = Callable[[str], tuple[Any, Any]]

_SOURCES: dict[str, Source] = {}
_VARIANTS: dict[str, tuple[str, ...] | None] = {}


def register_source(name: str, source: Source, variants: Sequence[str] | None = None) -> None:
    """Let `load_model(name)` and `load_model("name:variant")` call a function.

    Args:
        name: Without a colon or slash, so that it cannot be mistaken for a variant or a hub name.
        source: variant → (Hugging Face causal language model, tokenizer).
        variants: Those there are beside "", so that others are refused before anything is loaded; None: only the source knows.

    Raises:
        ValueError: The name is taken, or holds a colon or slash.
    """
    if name in _SOURCES or ":" in name or "/" in name:
        raise ValueError(f"a source called {name!r} was offered; names are unique, without ':' and '/'.")
    _SOURCES[name] = source
    _VARIANTS[name] = None if variants is None else tuple(variants)


def known_sources() -> list[str]:
    """Names that `load_model` knows without a hub or a folder."""
    return sorted(_SOURCES)


def variants_of(name: str) -> tuple[str, ...] | None:
    """What may follow the colon after a known name; None where only loading tells."""
    return _VARIANTS[name]


def load_model(
    name: str | Path,
    *,
    family: Family = "auto",
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
) -> Model:
    """Load a model with TransformerLens hooks, in eval mode, weights unprocessed, without gradients.

    Args:
        name: "toy", "toy:C", "toy:careful", "toy:confirm", "toy:deviate", "planted", "smollm2",
            "smollm2-refusal", a local directory with a Hugging Face model, one with a PEFT adapter (its product is
            folded into the weights of the model that its configuration names: any of these), or a hub name.
        family: "bridge" (TransformerLens 3, 4), "hooked" (2, 3), or "auto": the bridge where there is one.
        dtype: dtype of the weights. It is never chosen for you: fp32 unless said otherwise.
        device: Where the weights go. A model that is larger than one accelerator is laid over all that are to be seen by
            "balanced" (or "auto", "sequential", or a dict from modules to devices), which is Transformers' ``device_map``, as
            TransformerLens takes it; the bridge alone can, and only folders and hub names without an adapter. Readers and
            editors work on each layer's own device. ``CUDA_VISIBLE_DEVICES`` says which there are.

    Returns:
        A TransformerBridge or HookedTransformer. LayerNorm is not folded and nothing is centred, so that
        activations are those of the original model.

    Raises:
        UnknownModel: Neither a known name, nor a folder, nor reachable at a hub; or the model of an adapter is not.
        AdapterMismatch: An adapter does not fit the model it names.
        MissingExtra: An adapter, and peft is not installed.
        ModelError: A dtype or device that torch does not have here.
        CorruptWeights: An adapter whose weights are missing or damaged.
        UnsupportedModel: The family does not exist in the installed TransformerLens, or cannot hold this architecture; or
            an adapter that cannot be folded in, such as prompt tuning; or a device map where it cannot be used.
    """
    _check_dtype(dtype)
    if isinstance(device, Mapping) or str(device) in SPREAD:
        return _spread(str(name), dtype, device, family)
    _check_device(device)
    hf_model, tokenizer = _fetch(str(name), dtype)
    return wrap_hf(hf_model.to(device=device, dtype=dtype), tokenizer, family=family)


def _check_dtype(dtype: object) -> None:
    if not isinstance(dtype, torch.dtype):
        meant = getattr(torch, str(dtype), None)
        name = meant if isinstance(meant, torch.dtype) else "torch.float32 or torch.bfloat16"
        raise ModelError(f"dtype={dtype!r} was asked for, which is no dtype of torch; give {name}.")


def _check_device(device: str | torch.device) -> None:
    """Try a device before any weights are read onto it."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"device={str(device)!r} was asked for and cannot be used here ({str(error).splitlines()[0]}). Give 'cpu', 'cuda',"
            " 'cuda:1', 'mps', or what else torch has on this machine."
        ) from error


def _spread(name: str, dtype: torch.dtype, device: Any, family: Family) -> Model:
    """Load a model over several devices."""
    if family == "hooked" or bridge_class() is None:
        raise UnsupportedModel(
            f"device={device!r} was asked for, and HookedTransformer takes no device map. Use the bridge (TransformerLens 3, 4)."
        )
    if name.partition(":")[0] in _SOURCES or is_adapter(name):
        raise UnsupportedModel(
            f"device={device!r} was asked for, and {name!r} is one of our own models, or an adapter, which is folded in on one device."
            " Name a device, or save the folded model and load its folder."
        )
    placed = device if isinstance(device, str) else dict(device)
    if not isinstance(placed, str) and {"disk", "meta"} & {str(where) for where in placed.values()}:
        raise UnsupportedModel(
            f"device={device!r} was asked for; weights on a disk are read by no part of rim_lens. Map modules to accelerators, or all"
            " to the CPU."
        )
    hf_model, tokenizer = _fetch(name, dtype, device_map=placed)
    return wrap_hf(hf_model, tokenizer, family="bridge")


def load_plain(name: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load the Hugging Face model and tokenizer behind a name that `load_model` knows, without hooks: to train it.

    Args:
        name: As for `load_model`.
        dtype: dtype of the weights.

    Raises:
        UnknownModel: As `load_model` does, and so for adapters.
    """
    hf_model, tokenizer = _fetch(str(name), dtype)
    return hf_model.to(dtype=dtype), tokenizer


def _fetch(name: str, dtype: torch.dtype, **placing: Any) -> tuple[Any, Any]:
    base, _, variant = name.partition(":")
    if base in _SOURCES:
        return _SOURCES[base](variant)
    if is_adapter(name):
        return _fetch_adapted(name, dtype)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        hf_model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **placing),
            AutoTokenizer.from_pretrained(name),
        )
    except (OSError, ValueError) as error:
        where = (
            "is a folder, but not one with a Hugging Face model"
            if Path(name).is_dir()
            else "could not be fetched"
        )
        raise UnknownModel(
            f"model {name!r} {where} ({type(error).__name__}: {str(error).splitlines()[0]}). Known without a hub:"
            f" {', '.join(known_sources())}; else give a folder with config.json, weights and tokenizer, or a hub name"
            " while online."
        ) from error
    if getattr(hf_model, "_hf_peft_config_loaded", False):
        raise UnsupportedModel(
            f"model {name!r} is an adapter at a hub, which transformers puts beside the weights and not into them. Download it"
            f" (hf download {name} --local-dir FOLDER) and give load_model the folder: its product is then folded in."
        )
    return hf_model, tokenizer


def _fetch_adapted(folder: str, dtype: torch.dtype) -> tuple[Any, Any]:
    require_adapter(folder)
    base = adapter_base(folder)
    try:
        hf_model, tokenizer = _fetch(base, dtype)
    except UnknownModel as error:
        raise UnknownModel(
            f"the adapter in {folder} was trained on {base!r}, which cannot be loaded: {error} Or write where it is into"
            " base_model_name_or_path in adapter_config.json."
        ) from error
    if (Path(folder) / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)  # what was trained with, its chat template too
    return merge_adapter(hf_model, folder), tokenizer


def wrap_hf(hf_model: Any, tokenizer: Any, *, family: Family = "auto") -> Model:
    """Put TransformerLens hooks on a Hugging Face causal language model.

    Args:
        hf_model: The model; the bridge wraps it in place, HookedTransformer copies its weights.
        tokenizer: Its tokenizer.
        family: "bridge", "hooked", or "auto" (the bridge where the installed TransformerLens has it).

    Raises:
        ModelError: It is no model of transformers.
        MissingTokenizer: There is no tokenizer.
        UnsupportedModel: The installed TransformerLens lacks that family, or HookedTransformer has no weight
            conversion for this architecture, or one that gives other logits than the model itself; or weights are on no
            device, as where they are offloaded.
    """
    if family not in get_args(Family):
        raise ValueError(f"family={family!r} was asked for; there are 'auto', 'bridge', 'hooked'.")
    if not isinstance(hf_model, torch.nn.Module) or not hasattr(hf_model, "config"):
        raise ModelError(
            f"wrap_hf(hf_model, tokenizer) was given a {type(hf_model).__name__} for the model; a causal language model of"
            " transformers is needed first, then its tokenizer."
        )
    if tokenizer is None:
        raise MissingTokenizer(
            "wrap_hf was given no tokenizer; spans and refusal openers are found by it. Pass the model's own:"
            " transformers.AutoTokenizer.from_pretrained(name)."
        )
    _require_weights(hf_model)
    hf_model = hf_model.eval().requires_grad_(False)
    hf_model.config.architectures = [type(hf_model).__name__]
    has_bridge = bridge_class() is not None
    chosen = ("bridge" if has_bridge else "hooked") if family == "auto" else family
    own = _own_tokenizer(tokenizer)
    model = _to_bridge(hf_model, own) if chosen == "bridge" else _to_hooked(hf_model, own)
    return model.eval().requires_grad_(False)


def _require_weights(hf_model: torch.nn.Module) -> None:
    """Weights that are fetched for each pass are nowhere in between, when proofs, digests and measures read them."""
    absent = next((name for name, weight in hf_model.named_parameters() if weight.is_meta), None)
    if absent is not None:
        raise UnsupportedModel(
            f"a model with weights on each device was needed; {absent} is on none (meta): it was offloaded for want of memory, or never"
            " loaded. Lay the model over more accelerators (device='balanced'), choose a smaller dtype, or load it on the CPU."
        )


def _own_tokenizer(tokenizer: Any) -> Any:
    """A copy for TransformerLens to change: it fills in missing special tokens of the one it is given.

    It also reloads a tokenizer from where it came, to switch BOS on. One that was made in memory came from nowhere, and
    is told to be switched on already; rim_lens passes token ids, so that nothing is prepended either way.
    """
    own = copy.deepcopy(tokenizer)
    if not own.init_kwargs.get("name_or_path"):
        own.init_kwargs |= {"name_or_path": "", "add_bos_token": True}
    return own


def bridge_class() -> Any | None:
    """The TransformerBridge class, or None on TransformerLens 2."""
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        return None
    return TransformerBridge


def hooked_class() -> Any | None:
    """The HookedTransformer class, or None on TransformerLens 4."""
    try:
        from transformer_lens import HookedTransformer  # noqa: TID251
    except ImportError:
        return None
    return HookedTransformer


def _to_bridge(hf_model: Any, tokenizer: Any) -> Model:
    bridge = bridge_class()
    if bridge is None:
        raise UnsupportedModel(
            "family='bridge' was asked for, but TransformerLens 2 has no TransformerBridge. Use family='hooked', or"
            " install transformer-lens 3 or 4."
        )
    device = next(hf_model.parameters()).device
    name = hf_model.config.name_or_path or type(hf_model).__name__
    return bridge.boot_transformers(
        name, hf_model=hf_model, tokenizer=tokenizer, device=str(device), dtype=hf_model.dtype
    )


def _to_hooked(hf_model: Any, tokenizer: Any) -> Model:
    hooked = hooked_class()
    if hooked is None:
        raise UnsupportedModel(
            "family='hooked' was asked for, but TransformerLens 4 removed HookedTransformer. Use family='bridge', or"
            " install transformer-lens<4."
        )
    import transformer_lens.pretrained.weight_conversions as conversions
    from transformer_lens import HookedTransformerConfig

    architecture = type(hf_model).__name__
    converters = {
        "GPT2LMHeadModel": conversions.convert_gpt2_weights,
        "LlamaForCausalLM": conversions.convert_llama_weights,
        "Qwen2ForCausalLM": conversions.convert_qwen2_weights,
        "Qwen3ForCausalLM": getattr(conversions, "convert_qwen3_weights", None),
        "MistralForCausalLM": conversions.convert_mistral_weights,
    }
    convert = converters.get(architecture)
    if convert is None:
        raise UnsupportedModel(
            f"HookedTransformer was asked for a {architecture}; rim_lens converts {', '.join(converters)}."
            " Load it yourself with HookedTransformer.from_pretrained_no_processing(...) and pass that, or use the bridge."
        )
    config = HookedTransformerConfig(
        **_hooked_config(hf_model.config, architecture),
        d_vocab=hf_model.get_input_embeddings().num_embeddings,
        device=str(next(hf_model.parameters()).device),
        dtype=hf_model.dtype,
        default_prepend_bos=False,
        tokenizer_prepends_bos=False,
        original_architecture=architecture,
        model_name=Path(hf_model.config.name_or_path or architecture).name,
    )
    model = hooked(config, tokenizer=tokenizer, move_to_device=True)
    model.load_and_process_state_dict(
        convert(hf_model, config),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    _require_same_logits(model.eval(), hf_model, architecture)
    return model


def _require_same_logits(model: Model, hf_model: Any, architecture: str) -> None:
    """Conversions drop settings they do not know (biases in attention, odd scalings) without a word."""
    length = min(8, hf_model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.cfg.d_vocab, (1, length), generator=generator).to(model.cfg.device)
    with torch.no_grad():
        expected = hf_model(tokens).logits.float()
        if not torch.isfinite(expected).all():
            return  # `verify` tells broken weights from a broken conversion
        error = (model(tokens, return_type="logits").float() - expected).abs().max() / expected.abs().max()
    if not error < (1e-3 if hf_model.dtype in (torch.float32, torch.float64) else 0.1):
        raise UnsupportedModel(
            f"HookedTransformer was built from this {architecture}, but gives other logits (off by {float(error):.2g} of the"
            " largest): its conversion drops some setting of the config (biases, scalings). Use the bridge, or load it"
            " yourself with HookedTransformer.from_pretrained_no_processing."
        )


def _hooked_config(config: Any, architecture: str) -> dict[str, Any]:
    if architecture == "GPT2LMHeadModel":
        return {
            "n_layers": config.n_layer,
            "d_model": config.n_embd,
            "n_heads": config.n_head,
            "d_head": config.n_embd // config.n_head,
            "d_mlp": config.n_inner or 4 * config.n_embd,
            "n_ctx": config.n_positions,
            "act_fn": config.activation_function,
            "normalization_type": "LN",
            "eps": config.layer_norm_epsilon,
            "positional_embedding_type": "standard",
        }
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # transformers 5 calls it rope_parameters, 4 rope_scaling, and its type was once just "type".
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise UnsupportedModel(
            f"HookedTransformer was asked for a {architecture} with {rope_type!r} rotary scaling, which rim_lens"
            " does not convert. Use the bridge, or load it yourself with HookedTransformer.from_pretrained_no_processing."
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        raise UnsupportedModel(
            f"HookedTransformer was asked for a {architecture} with a sliding window of {window} tokens, which rim_lens does"
            " not convert. Use the bridge, or load it yourself with HookedTransformer.from_pretrained_no_processing."
        )
    facts: dict[str, Any] = {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_head": d_head,
        "d_mlp": config.intermediate_size,
        "n_ctx": config.max_position_embeddings,
        "act_fn": config.hidden_act,
        "normalization_type": "RMS",
        "eps": config.rms_norm_eps,
        "positional_embedding_type": "rotary",
        "rotary_dim": d_head,
        "rotary_base": int(rope.get("rope_theta", getattr(config, "rope_theta", 10000))),
        "rotary_adjacent_pairs": False,
        "final_rms": True,
        "gated_mlp": True,
    }
    if architecture == "Qwen3ForCausalLM":
        facts["use_qk_norm"] = True
    return facts
