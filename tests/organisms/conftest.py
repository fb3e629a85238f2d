from __future__ import annotations

import os

import pytest

from rim_lens.errors import MissingExtra, UnknownModel
from rim_lens.organisms.smollm2 import smollm2_folder


@pytest.fixture(scope="session")
def smollm2_cached():
    """The converted SmolLM2; skips where it cannot be had, but never in CI."""
    try:
        return smollm2_folder()
    except (UnknownModel, MissingExtra) as error:
        if os.environ.get("CI", "").lower() == "true":
            raise
        pytest.skip(f"SmolLM2 cannot be had here: {error}")
