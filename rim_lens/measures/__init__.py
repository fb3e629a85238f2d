"""Measures: refusal, heads, the shift between a base and a tuned model, and the statistics under them."""

from rim_lens.measures.checkpoints.comparing import compare
from rim_lens.measures.checkpoints.foreseeing import gradient_forecast
from rim_lens.measures.checkpoints.freezing import Freezing, freezing
from rim_lens.measures.checkpoints.result import Comparison
from rim_lens.measures.circuits.asking import CircuitPlan, CircuitSearch
from rim_lens.measures.circuits.composing import composition
from rim_lens.measures.circuits.directions import direction_node
from rim_lens.measures.circuits.finding import circuit, plan_circuit
from rim_lens.measures.circuits.instead import ablated, patched
from rim_lens.measures.circuits.linking import compare_circuits, neurons_in_thought
from rim_lens.measures.circuits.moving import halves_at_checkpoints, halves_together
from rim_lens.measures.circuits.nodes import end_node, head_node, neuron_nodes, span_node
from rim_lens.measures.circuits.paths import path_effects
from rim_lens.measures.circuits.proposing import ProposedNodes, propose_nodes
from rim_lens.measures.circuits.result import Circuit
from rim_lens.measures.circuits.switching import CircuitSwitches
from rim_lens.measures.circuits.table import EdgeRule
from rim_lens.measures.conditions import compare_conditions
from rim_lens.measures.controls import (
    control_p,
    percentile_among,
    random_heads_per_layer,
    random_neurons_per_layer,
)
from rim_lens.measures.heads.comparing import HeadComparison, compare_heads
from rim_lens.measures.heads.contrasts import Contrast
from rim_lens.measures.heads.direct import direct_effects
from rim_lens.measures.heads.effects import head_effects
from rim_lens.measures.heads.finding import find_heads, scorer
from rim_lens.measures.heads.looking import (
    answer_row,
    argmax_in,
    argmax_shift,
    empty_block_span,
    entropy_share,
    mass_shift,
)
from rim_lens.measures.heads.pairs import pair_interactions, redundant_pairs
from rim_lens.measures.heads.prefilter import gradient_scores, prefiltered
from rim_lens.measures.heads.receiving import receiver_kurtosis
from rim_lens.measures.heads.refusing import HeadSearch, refusal_heads
from rim_lens.measures.heads.reliability import SplitHalf, split_half
from rim_lens.measures.heads.removal import RemovalEffects
from rim_lens.measures.heads.removing import removal_effects
from rim_lens.measures.heads.restoring import restoring
from rim_lens.measures.heads.result import RefusalHeads
from rim_lens.measures.heads.summary import head_statistics
from rim_lens.measures.heads.table import HeadRule, head_table
from rim_lens.measures.neurons.dose import dose_curve
from rim_lens.measures.neurons.effects import NeuronEffects, neuron_effects
from rim_lens.measures.neurons.pairs import counterfactual_pairs
from rim_lens.measures.neurons.reading import pooled_activations
from rim_lens.measures.neurons.restoring import restore_by_neurons
from rim_lens.measures.neurons.safety import safety_neurons
from rim_lens.measures.neurons.sets import NeuronSet
from rim_lens.measures.neurons.writers import direct_to_logits
from rim_lens.measures.patching import head_patching, patching_table, span_patching
from rim_lens.measures.probes.after_ablation import ProbesAfterAblation, probe_after_ablation
from rim_lens.measures.probes.cliff import Cliff, refusal_cliff
from rim_lens.measures.probes.fitting import fit_probes
from rim_lens.measures.probes.probing import probe
from rim_lens.measures.probes.result import ProbeResult
from rim_lens.measures.readings import (
    Reading,
    accuracy_reading,
    prefix_reading,
    refusal_reading,
    refused_reading,
)
from rim_lens.measures.reasoning import Accuracy, reasoning_accuracy
from rim_lens.measures.refusal.agreeing import Agreement, agreement
from rim_lens.measures.refusal.direction import RefusalDirection, refusal_direction
from rim_lens.measures.refusal.judges import EndpointJudge, Judge, Judgement, PrefixJudge, Reply, judge_all
from rim_lens.measures.refusal.openers import opener_ids
from rim_lens.measures.refusal.prefixes import refusal_prefix_score
from rim_lens.measures.refusal.rates import Rate, refusal_rate, refusal_rates, share_interval
from rim_lens.measures.refusal.score import first_tokens, refusal_score
from rim_lens.measures.restored import load_restored, save_restored
from rim_lens.measures.sentences import sentence_effects
from rim_lens.measures.shift import ReciprocalShift, reciprocal_activation_shift
from rim_lens.measures.stats import (
    Interval,
    PairedTest,
    benjamini_hochberg,
    bootstrap_interval,
    proportion_interval,
    resampled_requests,
    sign_flip_test,
    specificity,
)

__all__ = [
    "Accuracy",
    "Agreement",
    "Circuit",
    "CircuitPlan",
    "CircuitSearch",
    "CircuitSwitches",
    "Cliff",
    "Comparison",
    "Contrast",
    "EdgeRule",
    "EndpointJudge",
    "Freezing",
    "HeadComparison",
    "HeadRule",
    "HeadSearch",
    "Interval",
    "Judge",
    "Judgement",
    "NeuronEffects",
    "NeuronSet",
    "PairedTest",
    "PrefixJudge",
    "ProbeResult",
    "ProbesAfterAblation",
    "ProposedNodes",
    "Rate",
    "Reading",
    "ReciprocalShift",
    "RefusalDirection",
    "RefusalHeads",
    "RemovalEffects",
    "Reply",
    "SplitHalf",
    "ablated",
    "accuracy_reading",
    "agreement",
    "answer_row",
    "argmax_in",
    "argmax_shift",
    "benjamini_hochberg",
    "bootstrap_interval",
    "circuit",
    "compare",
    "compare_circuits",
    "compare_conditions",
    "compare_heads",
    "composition",
    "control_p",
    "counterfactual_pairs",
    "direct_effects",
    "direct_to_logits",
    "direction_node",
    "dose_curve",
    "empty_block_span",
    "end_node",
    "entropy_share",
    "find_heads",
    "first_tokens",
    "fit_probes",
    "freezing",
    "gradient_forecast",
    "gradient_scores",
    "halves_at_checkpoints",
    "halves_together",
    "head_effects",
    "head_node",
    "head_patching",
    "head_statistics",
    "head_table",
    "judge_all",
    "load_restored",
    "mass_shift",
    "neuron_effects",
    "neuron_nodes",
    "neurons_in_thought",
    "opener_ids",
    "pair_interactions",
    "patched",
    "patching_table",
    "path_effects",
    "percentile_among",
    "plan_circuit",
    "pooled_activations",
    "prefiltered",
    "prefix_reading",
    "probe",
    "probe_after_ablation",
    "proportion_interval",
    "propose_nodes",
    "random_heads_per_layer",
    "random_neurons_per_layer",
    "reasoning_accuracy",
    "receiver_kurtosis",
    "reciprocal_activation_shift",
    "redundant_pairs",
    "refusal_cliff",
    "refusal_direction",
    "refusal_heads",
    "refusal_prefix_score",
    "refusal_rate",
    "refusal_rates",
    "refusal_reading",
    "refusal_score",
    "refused_reading",
    "removal_effects",
    "resampled_requests",
    "restore_by_neurons",
    "restoring",
    "safety_neurons",
    "save_restored",
    "scorer",
    "sentence_effects",
    "share_interval",
    "sign_flip_test",
    "span_node",
    "span_patching",
    "specificity",
    "split_half",
]
