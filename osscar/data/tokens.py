"""Where calibration data come from: built-in prose, a text file, or a Hugging Face dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from osscar.base.errors import (
    DataError,
    OptionError,
    first_line,
)
from osscar.base.inputs import file_name, safe_repr
from osscar.base.optional import optional
from osscar.base.printable import pluralize
from osscar.data.prose import Split, builtin_text
from osscar.data.samples import has_columns, named_generator
from osscar.data.text import as_words, check_tokenizer, encode, read_text, special_tokens
from osscar.proof.seen import Fingerprints, Seen, fingerprints_of_runs

_BUILTIN = "builtin"


_CHARACTERS_PER_TOKEN = 16
"""Characters read from a dataset for every token wanted: about four times what windows need."""

_TOKENS_LIMIT = 2**31

_TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst", ".raw"}


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Windows of tokens that a model is calibrated on.

    Attributes
    ----------
    tokens
        Token ids, (samples, seqlen) int64.
    source
        Where they come from, in words.
    seed
        The seed that chose the windows; None where none did.
    seen
        What recognizes the text that they are from, none of which is ever to be scored; by default
        what recognizes the windows.
    begins_with, ends_with
        Special tokens of each window, as they are written, such as ``<s>``.
    """

    tokens: Tensor
    source: str
    seed: int | None
    seen: Seen | None = None
    begins_with: str = ""
    ends_with: str = ""

    @property
    def samples(self) -> int:
        """Number of windows."""
        return self.tokens.shape[0]

    @property
    def seqlen(self) -> int:
        """Tokens per window."""
        return self.tokens.shape[1]

    def describe(self) -> dict[str, Any]:
        """Return what reports say: the source, by what it is recognized, and what was drawn."""
        return {
            "source": self.source,
            "seen": dataclasses.asdict(self.seen or Seen.of(self.fingerprints())),
            "samples": self.samples,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "begins_with": self.begins_with,
            "ends_with": self.ends_with,
        }

    def fingerprints(self) -> Fingerprints:
        """Return a hash of each run of 32 tokens in a window."""
        return fingerprints_of_runs(self.tokens)

    def sentence(self) -> str:
        """Say what there is."""
        ends = [("begins with", self.begins_with), ("ends with", self.ends_with)]
        special = " and ".join(f"{where} {tokens}" for where, tokens in ends if tokens)
        return (
            f"{pluralize(self.samples, 'window')} of {pluralize(self.seqlen, 'token')} of "
            f"{self.source}, {'' if self.seed is None else f'seed {self.seed}, '}"
            + (f"each {special}" if special else "without special tokens")
        )


def load_calibration(
    spec: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 32,
    seqlen: int = 512,
    seed: int = 0,
    overlapping: bool = True,
) -> CalibrationSet:
    """Find calibration text by name and cut windows from it.

    Parameters
    ----------
    spec
        None or ``"builtin"``: the calibration part of the text that ships with Python, which
        neither trains the demo model nor scores anything. A path: a plain text file. Otherwise the
        name of a Hugging Face dataset with a ``text`` column, as ``NAME`` or ``NAME:CONFIG``; the
        first rows of its training split are streamed. Or such a dataset itself, of whose rows the
        first are read.
    tokenizer
        The tokenizer of the model to calibrate.
    samples
        Windows wanted.
    seqlen
        Tokens per window, those included that the tokenizer puts before and after a text.
    seed
        The same seed gives the same windows.
    overlapping
        As for `text_windows`.

    Raises
    ------
    DataError
        If the text is missing, unreadable, or shorter than one window, or a number is out of range;
        or if this Python lacks the built-in text.
    OptionError
        If something is of a wrong type.
    MissingDependency
        If a dataset is asked for and ``datasets`` is not installed.
    """
    check_windows(tokenizer, samples, seqlen, seed)
    is_path, rows = isinstance(spec, Path), has_columns(spec)
    if spec is not None and not rows:
        spec = file_name(spec, "the calibration text", "a file, a dataset, or None")
    characters = samples * seqlen * _CHARACTERS_PER_TOKEN
    if rows:
        source = f"a {type(spec).__name__}"
        text = _join_rows(spec, source, characters)
    elif spec is None or spec == _BUILTIN:
        text, source = builtin_text(Split.CALIBRATION), "built-in text (pydoc topics)"
    elif is_path or _is_file_name(spec):
        text, source = _file_text(spec), spec
    else:
        text, source = _dataset_text(spec, characters), f"dataset {spec}"
    return text_windows(
        tokenizer, text, samples=samples, seqlen=seqlen, seed=seed, source=source,
        overlapping=overlapping,
    )  # fmt: skip


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    source: str = "text",
    overlapping: bool = True,
) -> CalibrationSet:
    """Cut random windows from a text.

    Windows are in the order of the text and share no token, at uniformly random places. Where the
    text is shorter than all of them together they must overlap: its possible starts are divided
    into as many stretches as windows, one start is drawn from each, and the source says so. Each
    begins and ends with the special tokens that the tokenizer puts before and after a text.

    Parameters
    ----------
    tokenizer
        The tokenizer of the model to calibrate.
    text
        Plain text.
    samples
        Windows wanted.
    seqlen
        Tokens per window, with its special tokens.
    seed
        The same seed gives the same windows.
    source
        Where the text comes from, in words.
    overlapping
        Whether they may overlap where they must.  Otherwise there are as many as the text has room
        for, and the source says so.

    Raises
    ------
    DataError
        If the text is shorter than one window, or a number is out of range.
    """
    check_windows(tokenizer, samples, seqlen, seed)
    tokens, (before, after) = encode(tokenizer, text), special_tokens(tokenizer)
    length = seqlen - len(before) - len(after)
    if length < 1:
        raise DataError(
            f"a window of {pluralize(seqlen, 'token')} has room for none of the text, since the "
            f"tokenizer puts {len(before) + len(after)} around it; give longer ones (--seqlen)"
        )
    if len(tokens) < length:
        raise DataError(
            f"calibration text ({source}) has {pluralize(len(tokens), 'token')}, fewer than one "
            f"window of {length}; give a longer text or a smaller window length (--seqlen)"
        )
    if len(tokens) < samples * length and not overlapping:
        samples = len(tokens) // length
        source += f", as many as its {pluralize(len(tokens), 'token')} have room for"
    elif len(tokens) < samples * length:
        windows_of = "overlapping window" if samples > 1 else "window"
        source += f", {pluralize(samples, windows_of)} from {pluralize(len(tokens), 'token')}"
    starts = _window_starts(len(tokens), samples, length, seed)
    cut = tokens[starts[:, None] + torch.arange(length)]
    windows = torch.cat([before.expand(samples, -1), cut, after.expand(samples, -1)], dim=1)
    written = (as_words(tokenizer, before), as_words(tokenizer, after))
    seen = Seen.of(fingerprints_of_runs(tokens))
    return CalibrationSet(windows, source, seed, seen, *written)


def check_windows(tokenizer: Any, samples: Any, seqlen: Any, seed: Any) -> None:
    """Refuse numbers of windows and of their tokens that make no sense."""
    check_tokenizer(tokenizer)
    if not all(isinstance(number, int) for number in (samples, seqlen, seed)):
        raise OptionError(
            f"samples is {safe_repr(samples)}, seqlen {safe_repr(seqlen)} and seed "
            f"{safe_repr(seed)}; give whole numbers"
        )
    if samples < 1 or seqlen < 1:
        raise DataError(
            f"calibration needs at least 1 window of at least 1 token, not {samples} of {seqlen}"
        )
    if samples * seqlen > _TOKENS_LIMIT:
        raise DataError(
            f"{pluralize(samples, 'window')} of {pluralize(seqlen, 'token')} come to more than "
            f"the {_TOKENS_LIMIT:,} tokens that can be held; give fewer (--samples), or shorter "
            "ones (--seqlen)"
        )


def _window_starts(tokens: int, samples: int, seqlen: int, seed: int) -> Tensor:
    random = torch.rand(
        samples, generator=named_generator("calibration windows", seed), dtype=torch.float64
    )
    slack = tokens - samples * seqlen
    if slack >= 0:  # spread what no window covers over the gaps before, between and after them
        return torch.arange(samples) * seqlen + (random.sort().values * (slack + 1)).long()
    positions = tokens - seqlen + 1
    starts = (torch.arange(samples) + random) * (positions / samples)
    return starts.long().clamp_(max=positions - 1)


def _is_file_name(spec: str) -> bool:
    """Tell paths from dataset names, which may hold slashes and dots, where no file exists."""
    if not spec:
        raise DataError("the calibration text has no name; give a file or a dataset")
    try:
        if Path(spec).exists():
            return True
    except OSError as error:
        raise DataError(f"cannot look for {spec!r}: {error.strerror}") from error
    if "\0" in spec:
        raise DataError(f"{spec!r} is no name of a file or dataset; take the NUL out")
    return spec.startswith((".", "/", "~")) or Path(spec).suffix in _TEXT_SUFFIXES


def _file_text(path: str) -> str:
    try:
        return read_text(path)
    except DataError as error:
        raise DataError(f"calibration text: {error}") from error


def _dataset_text(spec: str, characters: int) -> str:
    work = f"calibrating on the dataset {spec!r}"
    datasets = optional("datasets", "data", work, ", or give a text file")
    name, _, config = spec.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        text = _join_rows(rows, spec, characters)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"cannot load the dataset {spec!r}, nor is there a file of that name: "
            f"{first_line(error)}. Check the name (NAME or NAME:CONFIG) and the connection, or "
            "give a text file"
        ) from error
    if not text.strip():
        raise DataError(f"the dataset {spec!r} has no text in its training split")
    return text


def _join_rows(rows: Iterable[Mapping[str, Any]], spec: str, characters: int) -> str:
    """Join rows until there are enough characters."""
    parts: list[str] = []
    length = 0
    for row in rows:
        if "text" not in row:
            raise DataError(
                f"the dataset {spec!r} has no column 'text', only {', '.join(sorted(row))}; "
                "choose another, or save its text to a file"
            )
        if not isinstance(row["text"], str):
            raise DataError(
                f"the column 'text' of the dataset {spec!r} holds a {type(row['text']).__name__}; "
                "choose another, or save its text to a file"
            )
        parts.append(row["text"])
        length += len(row["text"])
        if length >= characters:
            break
    return "\n\n".join(parts)
