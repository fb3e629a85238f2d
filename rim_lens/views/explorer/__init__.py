"""The head explorer: one page, or one widget, in which every head can be looked at."""

from rim_lens.views.explorer.building import HeadView, head_view
from rim_lens.views.explorer.page import explorer_html, write_explorer
from rim_lens.views.explorer.reading import GroupMasses, HeadPatterns, head_patterns
from rim_lens.views.explorer.widget import HeadExplorer

__all__ = [
    "GroupMasses",
    "HeadExplorer",
    "HeadPatterns",
    "HeadView",
    "explorer_html",
    "head_patterns",
    "head_view",
    "write_explorer",
]
