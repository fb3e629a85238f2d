from __future__ import annotations

import os
from dataclasses import replace

import pytest

from rim_lens.errors import MissingExtra, UnknownModel
from rim_lens.organisms.smollm2 import smollm2_folder
from rim_lens.organisms.toy import recipe


@pytest.fixture(scope="session")
def smollm2_cached():
    """The converted SmolLM2; skips where it cannot be had, but never in CI."""
    try:
        return smollm2_folder()
    except (UnknownModel, MissingExtra) as error:
        if os.environ.get("CI", "").lower() == "true":
            raise
        pytest.skip(f"SmolLM2 cannot be had here: {error}")


@pytest.fixture
def short(monkeypatch):
    """Recipes of the toy of a few steps: enough to see what is drawn and what depends on what."""
    for name in ("HELPFUL", "SAFE", "FINE_TUNE"):
        monkeypatch.setattr(recipe, name, replace(getattr(recipe, name), steps=3))
