"""English prose: the language reference that every Python carries in ``pydoc_data``.

Text that a model was trained or calibrated on must never score it, so the topics fall into three
parts by a hash of their *name*.  Topics quote one another (``specialnames`` repeats
``numeric-types``), hence a second rule: prose that occurs in an earlier part of ``HELD_OUT,
CALIBRATION, TRAINING`` is cut from the later ones.  The first two parts of Python 3.11 are the
demo's own texts, which ship with it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from enum import Enum
from functools import cache

from osscar.base.files import short_hash

_SHINGLE_WORDS = 8
"""Two paragraphs are taken to share prose when they share this many words in a row."""


class Split(Enum):
    """A split of the topics; the value is the upper end of its interval of name hashes."""

    HELD_OUT = 0.18
    CALIBRATION = 0.40
    TRAINING = 1.0


def builtin_text(split: Split) -> str:
    """Give one split of the text: paragraphs, topics in the order of their names."""
    return "\n\n".join(_split_topics()[split])


def topic_split(name: str) -> Split:
    """Tell which split a topic belongs to, from its name alone."""
    position = short_hash(f"osscar/topics/1/{name}") / 2**64
    return next(split for split in Split if position < split.value)


def split_paragraphs(text: str) -> list[str]:
    """Split text at blank lines; indentation is kept, blank paragraphs are not."""
    return [p.strip("\n") for p in re.split(r"\n[ \t]*\n", text) if p.strip()]


def shingles(paragraph: str) -> set[str]:
    """List the runs of ``_SHINGLE_WORDS`` words, ignoring case and markup.

    A shorter paragraph ("For example:") has none: it is boilerplate, shared by all parts.
    """
    words = re.findall(r"[^\W_]+", paragraph.lower())
    starts = range(len(words) - _SHINGLE_WORDS + 1)
    return {" ".join(words[start : start + _SHINGLE_WORDS]) for start in starts}


def without_shared_prose(paragraphs: Iterable[str], claimed: set[str]) -> list[str]:
    """Keep the paragraphs that have no shingle among the claimed ones."""
    return [p for p in paragraphs if claimed.isdisjoint(shingles(p))]


@cache
def _split_topics() -> dict[Split, list[str]]:
    """Apply both rules; ``Split`` lists them in the order in which they claim prose."""
    topics = importlib.import_module("pydoc_data.topics").topics
    claimed: set[str] = set()
    splits: dict[Split, list[str]] = {}
    for split in Split:
        mine = [
            paragraph
            for name in sorted(topics)
            if topic_split(name) is split
            for paragraph in split_paragraphs(topics[name])
        ]
        splits[split] = without_shared_prose(mine, claimed)
        claimed.update(*map(shingles, splits[split]))
    return splits
