"""The head explorer: one page, or one widget, in which every head can be looked at."""

from rim_lens.views.explorer.reading import GroupMasses, HeadPatterns, head_patterns

__all__ = ["GroupMasses", "HeadPatterns", "head_patterns"]
