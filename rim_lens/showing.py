"""How a result is shown in a notebook: by a view, named here and not imported.

Results stand below the views and may not import them. They name the function instead, and it is looked up when a
notebook asks.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T", bound=type)


def shown_by(module: str, function: str) -> Callable[[T], T]:
    """Class decorator: ``_repr_html_`` calls that function with the object.

    >>> @shown_by("html", "escape")
    ... class Tag(str):
    ...     pass
    >>> Tag("<b>")._repr_html_()
    '&lt;b&gt;'
    """

    def decorate(cls: T) -> T:
        def _repr_html_(self: Any) -> str:
            html: str = getattr(import_module(module), function)(self)
            return html

        cls._repr_html_ = _repr_html_  # type: ignore[attr-defined]
        return cls

    return decorate
