"""What decides a study's numbers, as its folder records it."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from rim_lens.lens import Model, model_facts

HOW_RUN = ("max_rows", "progress")  # settings that are no part of what is asked


def versions() -> dict[str, str]:
    """Of rim_lens, of what it measures by, and of Python."""
    from rim_lens import __version__

    packages = ("transformer-lens", "torch", "transformers")
    return {
        "rim_lens": __version__,
        **{name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
    }


def source_name(source: str | Path | Model, model: Model) -> str:
    """What a study calls its model: the name it was asked for by, or that of a given one's own."""
    return str(source) if isinstance(source, str | Path) else model_facts(model).name


def settings_asked(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without how it is run."""
    return {key: value for key, value in settings.items() if key not in HOW_RUN}
