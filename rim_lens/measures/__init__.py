"""Measures: refusal, heads, the shift between a base and a tuned model, and the statistics under them."""

from rim_lens.measures.controls import (
    control_p,
    percentile_among,
    random_heads_per_layer,
    random_neurons_per_layer,
)
from rim_lens.measures.heads import find_heads, head_table, scorer
from rim_lens.measures.refusal import Rate, opener_ids, refusal_rate, refusal_score
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
    "Interval",
    "PairedTest",
    "Rate",
    "ReciprocalShift",
    "benjamini_hochberg",
    "bootstrap_interval",
    "control_p",
    "find_heads",
    "head_table",
    "opener_ids",
    "percentile_among",
    "proportion_interval",
    "random_heads_per_layer",
    "random_neurons_per_layer",
    "reciprocal_activation_shift",
    "refusal_rate",
    "refusal_score",
    "resampled_requests",
    "scorer",
    "sign_flip_test",
    "specificity",
]
