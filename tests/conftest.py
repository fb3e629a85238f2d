"""Shared by all tests: one thread, no network, and the models every family is built from."""

from __future__ import annotations

import os

import torch

from tests.families import case, case_gqa, case_processed  # noqa: F401 - fixtures
from tests.speaking import spoken, spoken_gqa  # noqa: F401 - fixtures

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)
