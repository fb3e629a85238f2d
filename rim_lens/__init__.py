"""rim_lens: why a model that reasons refuses less, where in the network, and with what proof.

A plugin for TransformerLens. Names are imported when first used, so that ``import rim_lens`` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME: dict[str, str] = {
    "Prompt": "prompts",
    "load_prompts": "prompts",
    "load_file": "prompts",
    "load_benchmark": "prompts",
    "with_intent": "prompts",
    "assign_splits": "prompts",
    "cot_texts": "prompts",
    "ChatFormat": "chat",
    "SpanBatch": "chat",
    "Spans": "chat",
    "register_format": "chat",
    "cot_sentences": "chat",
    "render_conditions": "chat",
    "ModelFacts": "lens",
    "model_facts": "lens",
    "load_model": "organisms",
    "fine_tune": "organisms",
    "FineTuned": "organisms",
    "wrap_hf": "lens",
    "weights_digest": "lens",
    "SpanAttention": "hooks",
    "AttentionRows": "hooks",
    "NeuronActivations": "hooks",
    "HeadOutputs": "hooks",
    "ResidualStream": "hooks",
    "AblateHeads": "hooks",
    "AblateNeurons": "hooks",
    "ScaleHeads": "hooks",
    "ScaleNeurons": "hooks",
    "PatchHeads": "hooks",
    "PatchNeurons": "hooks",
    "PatchResidual": "hooks",
    "PatchAttention": "hooks",
    "Recording": "hooks",
    "record": "hooks",
    "BlockAttention": "hooks",
    "MoveAttention": "hooks",
    "AblateDirection": "hooks",
    "AddDirection": "hooks",
    "ClampDirection": "hooks",
    "capture": "capturing",
    "open_capture": "capturing",
    "generate": "generation",
    "Generation": "generation",
    "refusal_score": "measures",
    "first_tokens": "measures",
    "refusal_prefix_score": "measures",
    "refusal_rate": "measures",
    "sentence_effects": "measures",
    "RefusalDirection": "measures",
    "refusal_heads": "measures",
    "RefusalHeads": "measures",
    "removal_effects": "measures",
    "RemovalEffects": "measures",
    "restoring": "measures",
    "neuron_effects": "measures",
    "NeuronEffects": "measures",
    "direct_to_logits": "measures",
    "dose_curve": "measures",
    "restore_by_neurons": "measures",
    "compare_heads": "measures",
    "HeadComparison": "measures",
    "Contrast": "measures",
    "HeadRule": "measures",
    "HeadSearch": "measures",
    "refusal_direction": "measures",
    "refusal_rates": "measures",
    "probe": "measures",
    "ProbeResult": "measures",
    "probe_after_ablation": "measures",
    "refusal_cliff": "measures",
    "fit_probes": "measures",
    "reasoning_accuracy": "measures",
    "compare_conditions": "measures",
    "PrefixJudge": "measures",
    "EndpointJudge": "measures",
    "judge_all": "measures",
    "agreement": "measures",
    "Reading": "measures",
    "refusal_reading": "measures",
    "prefix_reading": "measures",
    "refused_reading": "measures",
    "accuracy_reading": "measures",
    "head_effects": "measures",
    "direct_effects": "measures",
    "gradient_scores": "measures",
    "prefiltered": "measures",
    "pair_interactions": "measures",
    "redundant_pairs": "measures",
    "head_patching": "measures",
    "span_patching": "measures",
    "patching_table": "measures",
    "reciprocal_activation_shift": "measures",
    "compare": "measures",
    "Comparison": "measures",
    "gradient_forecast": "measures",
    "freezing": "measures",
    "Freezing": "measures",
    "NeuronSet": "measures",
    "pooled_activations": "measures",
    "counterfactual_pairs": "measures",
    "safety_neurons": "measures",
    "answer_row": "measures",
    "empty_block_span": "measures",
    "argmax_in": "measures",
    "argmax_shift": "measures",
    "mass_shift": "measures",
    "entropy_share": "measures",
    "head_statistics": "measures",
    "split_half": "measures",
    "receiver_kurtosis": "measures",
    "entanglement": "measures.entanglement.entangling",  # the room bears the same name
    "Entanglement": "measures.entanglement.result",
    "multiverse": "measures.entanglement.multiverse",
    "Study": "study",
    "StudyResult": "study",
    "Settings": "study",
    "load_study": "study",
    "study_html": "views",
    "write_report": "views",
}

__all__ = ["__version__", *sorted(_HOME)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "views":  # a room by its own name: rl.views.circuitsvis_heads(...)
        return importlib.import_module("rim_lens.views")
    if name not in _HOME:
        raise AttributeError(f"module 'rim_lens' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rim_lens.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
