"""Built-in English prose: the language reference that every Python carries in ``pydoc_data``.

Text that a model was trained or calibrated on must never score it, so the topics fall into three
parts by a hash of their *name*, the same in every Python version. Topics quote one another
(``specialnames`` repeats ``numeric-types``), hence a second rule: prose that occurs in an earlier
part of ``HELD_OUT, CALIBRATION, TRAINING`` is cut from the later ones. And since Python's text
moves between topics from version to version, a third: a paragraph that the shipped model was
trained on is cut from the held-out part, whichever version is running.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from enum import Enum
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from osscar.base.errors import DataError
from osscar.base.files import short_hash

_SHINGLE_WORDS = 8
"""Two paragraphs are taken to share prose when they share this many words in a row."""

TRAINED_PARAGRAPHS = Path(__file__).parent / "demo" / "trained_paragraphs.npy"
"""Sorted fingerprints (uint64) of every paragraph that the shipped model was trained on."""


class Split(Enum):
    """A split of the topics; the value is the upper end of its interval of name hashes."""

    HELD_OUT = 0.18
    CALIBRATION = 0.40
    TRAINING = 1.0


def builtin_text(split: Split) -> str:
    """Give one split of the built-in text: paragraphs, topics in the order of their names.

    A Python that was stripped of ``pydoc_data`` is a DataError.
    """
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


def fingerprint(paragraph: str) -> int | None:
    """Hash a paragraph's words to 64 bits; None for one too short to have a shingle."""
    if not shingles(paragraph):
        return None
    words = " ".join(re.findall(r"[^\W_]+", paragraph.lower()))
    return short_hash(words)


@cache
def _split_topics() -> dict[Split, list[str]]:
    """Apply the three rules; ``Split`` lists them in the order in which they claim prose."""
    topics = _read_topics()
    trained = _trained_fingerprints()
    claimed: set[str] = set()
    splits: dict[Split, list[str]] = {}
    for split in Split:
        mine = [
            paragraph
            for name in sorted(topics)
            if topic_split(name) is split
            for paragraph in split_paragraphs(topics[name])
        ]
        if split is Split.HELD_OUT:
            mine = [p for p in mine if fingerprint(p) not in trained]
        splits[split] = without_shared_prose(mine, claimed)
        claimed.update(*map(shingles, splits[split]))
    return splits


def _read_topics() -> dict[str, str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            "the built-in text is missing: this Python was installed without pydoc_data.topics. "
            "Give a plain text file of your own, or install the full standard library."
        ) from error
    return topics


def _trained_fingerprints() -> frozenset[int]:
    if not TRAINED_PARAGRAPHS.exists():
        return frozenset()
    hashes: npt.NDArray[np.uint64] = np.load(TRAINED_PARAGRAPHS, allow_pickle=False)
    return frozenset(hashes.tolist())
