"""How numbers are written in sentences and tables."""

from __future__ import annotations

import math


def share(value: float) -> str:
    """A share, between 0 and 1 mostly.

    >>> share(0.956), share(-0.001), share(-0.2)
    ('0.96', '0.00', '−0.20')
    """
    return signed(value).removeprefix("+")


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, and a true minus.

    >>> signed(-1.234), signed(0.001)
    ('−1.23', '0.00')
    """
    if _missing(value):
        return "–"
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def plain(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits.

    >>> plain(0.0735979), plain(None), plain(-1234.5)
    ('0.0736', '–', '−1.23e+03')
    """
    return "–" if value is None or _missing(value) else f"{value:.{digits}g}".replace("-", "−", 1)


def between(low: float, high: float, digits: int = 2) -> str:
    """An interval of signed numbers.

    >>> between(-1.5, 0.25)
    '[−1.50, +0.25]'
    """
    return f"[{signed(low, digits)}, {signed(high, digits)}]"


def p_value(p: float) -> str:
    """A p-value, never rounded to 0.

    >>> p_value(0.2), p_value(0.0012), p_value(1e-6)
    ('p = 0.20', 'p = 0.0012', 'p < 0.0001')
    """
    if _missing(p):
        return "not tested"
    if p < 0.0001:
        return "p < 0.0001"
    return f"p = {p:.4f}" if p < 0.01 else f"p = {p:.2f}"


def per_cent(value: float) -> str:
    """A percentile; 100 only where it is exactly that.

    >>> per_cent(99.96), per_cent(100.0), per_cent(75.0)
    ('99.9 %', '100 %', '75 %')
    """
    if value < 100 and round(value, 1) == 100:
        return "99.9 %"
    return f"{value:.1f} %".replace(".0 %", " %")


def duration(seconds: float) -> str:
    """A time.

    >>> duration(0.42), duration(75), duration(4000)
    ('0.4 s', '75 s', '67 min')
    """
    return (
        f"{seconds:.1f} s"
        if seconds < 10
        else f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
    )


def size(n_bytes: int) -> str:
    """A file size.

    >>> size(900), size(12_345), size(3_500_000)
    ('900 B', '12.3 kB', '3.5 MB')
    """
    return (
        f"{n_bytes} B"
        if n_bytes < 1000
        else f"{n_bytes / 1e3:.1f} kB"
        if n_bytes < 1e6
        else f"{n_bytes / 1e6:.1f} MB"
    )


def listed(items: list[str]) -> str:
    """Items in a sentence.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _missing(value: float) -> bool:
    return value is None or math.isnan(value)
