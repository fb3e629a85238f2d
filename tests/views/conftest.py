"""Studies to show: planted ones, and a small real one on the toy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rim_lens.study import Settings, Study, StudyResult
from tests.views.browser import offline_chromium, require_chromium
from tests.views.planted import Planted, write


@pytest.fixture
def planted(tmp_path: Path) -> Callable[..., StudyResult]:
    """Write a planted study; keywords are those of `Planted`."""

    def make(**wanted: Any) -> StudyResult:
        return write(tmp_path / "study", Planted(**wanted))

    return make


@pytest.fixture(scope="session")
def toy_study(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    """A small real study: the toy beside a tuned variant."""
    folder = tmp_path_factory.mktemp("toy") / "study"
    parts = ("heads", "removing", "comparing", "probes", "neurons")
    settings = Settings(max_new_tokens=16, n_random_sets=6)
    return Study("toy", tuned=["toy:deviate"], n_requests=8, parts=parts, settings=settings).run(folder)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, offline."""
    require_chromium()
    with offline_chromium() as driver:
        yield driver
