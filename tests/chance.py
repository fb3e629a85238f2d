"""What tests of statistics share: numbers whose sums are exact, and a check that a test holds its level."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# A shared machine may be slow for a moment; that is no failure.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

ALTERNATIVES = ["two-sided", "less", "greater"]
ALPHAS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
# Multiples of 1/8: sums are exact, so that ties are ties also in the brute force below.
EIGHTHS = st.integers(-40, 40).map(lambda number: number / 8)


def assert_level_held(p, slack=3.5, fewest=2000):
    """P(p ≤ α) ≤ α on the grid, within Monte Carlo error."""
    p = np.asarray(p)
    assert len(p) >= fewest
    for alpha in ALPHAS:
        allowed = alpha + slack * math.sqrt(alpha * (1 - alpha) / len(p))
        assert np.mean(p <= alpha + 1e-12) <= allowed, (alpha, np.mean(p <= alpha))
