"""Where figures under docs/ come from: the command, the day, and the versions that made them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from rim_lens import __version__


def provenance(command: str, packages: Sequence[str] = ("torch", "transformers")) -> dict[str, Any]:
    """The head of a file of evidence.

    Args:
        command: What was typed, so that it can be typed again.
        packages: Distributions whose versions the figures may hang on.

    >>> sorted(provenance("rim-lens organism toy --seeds 0"))
    ['command', 'date', 'format_version', 'versions']
    """
    return {
        "format_version": 1,
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages}
        # The code that ran, which need not be what is installed.
        | {"rim-lens": __version__},
    }
