"""Shared by all tests: one thread, no network, and the models every family is built from."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import oracles
from tests.families import case, case_gqa, case_processed  # noqa: F401 - fixtures
from tests.speaking import spoken, spoken_gqa  # noqa: F401 - fixtures

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)

# What a model's family cannot change is tested once, on TransformerLens 4: prompts, training, studies, pages, notebooks, evidence.
collect_ignore_glob = (
    [
        *("prompts/*", "training/*", "study/*", "views/*", "benchmarks/*", "measures/checkpoints/*"),
        *("test_cli.py", "test_recipes.py", "organisms/test_toy_recipe.py", "organisms/test_toy_evidence.py"),
        *("test_calibration.py", "test_demos.py", "test_docs.py", "test_view_sizes.py", "test_*_verdicts.py"),
    ]
    if int(importlib.metadata.version("transformer-lens").split(".")[0]) < 4
    else []
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--oracles", type=Path, help="write the largest differences of the oracles to this file")


@pytest.fixture(autouse=True)
def _oracle(request: pytest.FixtureRequest) -> Iterator[None]:
    marker = request.node.get_closest_marker("oracle")
    if marker is None or request.config.getoption("--oracles") is None:
        yield
        return
    given = request.node.callspec.params
    architecture, family = given["case"] if "case" in given else ("qwen3", given["case_gqa"])
    with oracles.watching(*marker.args, family, architecture):
        yield


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--oracles")
    if path is not None:
        oracles.write(path)
