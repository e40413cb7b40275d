"""Names, numbers and messages as people read them, and a terminal may show them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def pluralize(count: int, noun: str, several: str = "") -> str:
    """Return how many there are of something, such as ``"2,000 samples"``."""
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"


def are(count: int) -> str:
    """Return the verb that goes with so many things."""
    return "is" if count == 1 else "are"


def capitalized(text: str) -> str:
    """Return a text as a sentence begins."""
    return text[:1].upper() + text[1:]


def published(source: str) -> str:
    """Return a source as files name it that are handed on: without the folders of this machine."""
    name = source.removeprefix("directory ")
    if not (Path(name).is_absolute() or name.startswith("~")):
        return source
    return f"{source.removesuffix(name)}{Path(name).name}"


def printable(text: str, keep: str = "") -> str:
    """Return a text in which nothing can move a cursor, change a colour or fail to be encoded.

    Control characters, marks that reverse the direction of writing, and halves of surrogate pairs
    are written as escapes, except for characters of `keep`, such as line feeds.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def listed(names: Sequence[str], most: int = 4, between: str = ", ") -> str:
    """Return the first of some names, and how many more there are: ``"a, b, c and 2 more"``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def command_line(*words: object, options: Mapping[str, Any] | None = None) -> str:
    """Return a command as one pastes it into a shell, whatever is in the names.

    Options go by the names of a command's parameters: None and False leave one away, True makes a
    flag, and a list repeats it.
    """
    given = list(map(str, words))
    for name, value in (options or {}).items():
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list | tuple) else (value,):
            if one is True:
                given.append(flag)
            elif one is not None and one is not False:
                given += [flag, str(one)]
    return shlex.join(given)


_PREFIXES = ("", "k", "M", "G", "T")


def share(value: float, digits: int = 3) -> str:
    """Return a share in per cent, with so many digits and no more than it has: ``"2.5%"``."""
    return f"{float(f'{100 * value:.{digits}g}'):g}%"


def percent(value: float | None, digits: int = 2) -> str:
    """Return a share in per cent with so many decimals; nothing for one that is not known."""
    return "" if value is None else f"{value:.{digits}%}"


def decimals(value: float | None, digits: int = 4) -> str:
    """Return a number with so many decimals, or as ``"2.0e-07"`` where those would be zeros."""
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
