"""The figures of a study, as plotly figures: one colour per span, condition and outcome everywhere, light or dark.

Every function takes a finished `StudyResult`, and draws only what the folder holds. `.to_html(include_plotlyjs=True)`
makes a page of one that works offline.
"""

from rim_lens.views.plots.attention import attention_by_head, attention_map
from rim_lens.views.plots.heads import head_effects, head_scan, head_set
from rim_lens.views.plots.refusal import outcomes, scores
from rim_lens.views.plots.shift import activation_shift, tuned_outcomes

__all__ = [
    "activation_shift",
    "attention_by_head",
    "attention_map",
    "head_effects",
    "head_scan",
    "head_set",
    "outcomes",
    "scores",
    "tuned_outcomes",
]
