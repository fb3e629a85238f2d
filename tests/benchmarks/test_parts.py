"""Every part of `make bench` that needs no weights runs, on next to nothing, and gives figures the page can show."""

from __future__ import annotations

import sys

import pytest
import torch

from rim_lens.lens.loading import bridge_class
from tests.benchmarks import capture, streaming, writing
from tests.benchmarks.page import _amount, _ratio
from tests.benchmarks.profiles import ALL_KINDS, spent
from tests.benchmarks.timing import interleaved
from tests.peaks import peak_of

pytestmark = pytest.mark.skipif(
    bridge_class() is None or sys.platform != "linux", reason="benchmarks need a TransformerBridge and /proc"
)


@pytest.mark.long
def test_parts_give_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "TOKENS", 128)
    monkeypatch.setattr(capture, "PADDED", 32)
    monkeypatch.setattr(capture, "_PAIRS", tuple((*pair[:3], (32,)) for pair in capture._PAIRS))
    monkeypatch.setattr(streaming, "COUNTS", (3, 12))
    monkeypatch.setattr(writing, "STEPS", 9)
    figures = [*capture.at(32, 0), *streaming.streaming(0), *writing.writing(0)]
    # Five pairs in time and memory, two of them on padded prompts as well.
    assert [figure["unit"] for figure in figures] == [
        *["s"] * 5,
        *["MB"] * 5,
        *["s"] * 2,
        *["MB"] * 2,
        "MB",
        "s",
    ]
    for figure in figures:
        assert figure["value"] > 0
        assert figure["rival_value"] > 0
        assert (figure["met"] is None) == (figure["goal"] is None)
        assert _ratio(figure).split()[1] == "×"
        assert _amount(figure["value"], figure["unit"])


def test_the_peak_is_what_was_held_and_not_what_was_given_back() -> None:
    """Blocks of 40 MB, one after the other, two at a time, and all at once after much was held and let go."""

    def held(count: int) -> None:
        blocks = [bytearray(b"x") * (40 * 2**20) for _ in range(count)]
        del blocks

    much = bytearray(b"x") * (200 * 2**20)
    del much
    for count in (1, 2, 4):
        peak = peak_of(lambda: held(count), lambda: held(5))  # noqa: B023 - called at once
        assert 40 * count - 1 <= peak.above <= 40 * count + 12
    one_by_one = peak_of(lambda: [held(1) for _ in range(4)], lambda: held(1))
    assert one_by_one.above <= 52


def test_a_run_that_dies_is_told() -> None:
    with pytest.raises(RuntimeError, match="died"):
        peak_of(lambda: sys.exit(3), lambda: None)


def test_runs_take_turns() -> None:
    turns: list[str] = []
    found = interleaved({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 3)
    assert turns == ["a", "b"] * 4  # the first is not counted
    assert set(found) == {"a", "b"}


def test_a_profile_tells_products_from_copies_and_leaves_nothing_out() -> None:
    square = torch.ones(400, 400)
    products, copies = (
        spent(lambda: [square @ square for _ in range(40)]),
        spent(lambda: [torch.cat([square] * 9) for _ in range(40)]),
    )
    assert tuple(products) == tuple(copies) == ALL_KINDS
    assert max(products, key=products.__getitem__) == "products of matrices"
    assert copies["products of matrices"] == 0
    assert copies["copies"] > 0.2 * sum(copies.values())
