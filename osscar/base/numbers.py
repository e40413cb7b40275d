"""Numbers as people read them."""

from __future__ import annotations

import math

_PREFIXES = ("", "k", "M", "G", "T")


def share(value: float, digits: int = 3) -> str:
    """Return a share in per cent, with so many digits and no more than it has.

    Examples
    --------
    >>> share(0.025), share(0.5), share(1 / 3)
    ('2.5%', '50%', '33.3%')
    """
    return f"{float(f'{100 * value:.{digits}g}'):g}%"


def percent(value: float | None, digits: int = 2) -> str:
    """Return a share in per cent with so many decimals; nothing for one that is not known."""
    return "" if value is None else f"{value:.{digits}%}"


def decimals(value: float | None, digits: int = 4) -> str:
    """Return a number with so many decimals, or in powers of ten where those would be zeros.

    Examples
    --------
    >>> decimals(0.25), decimals(2e-7), decimals(None)
    ('0.2500', '2.0e-07', '')
    """
    if value is None:
        return ""
    if value and math.isfinite(value) and abs(value) < 10.0**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def in_bytes(count: int | None) -> str:
    """Return a size in MB or GB; nothing for one that is not known."""
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def engineering(value: float) -> str:
    """Return a large number with a prefix, such as ``"3.77 M"``."""
    if value <= 0:
        return "0"
    power = max(0, min(int(math.log10(value)) // 3, len(_PREFIXES) - 1))
    return f"{value / 1000**power:.2f} {_PREFIXES[power]}"
