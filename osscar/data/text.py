"""Text from files, data sets and lists, as windows of tokens to calibrate on or to score."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from osscar.base.errors import DataError, ModelError, OptionError, first_line, optional, warn
from osscar.base.files import reason_of
from osscar.base.inputs import whole_number
from osscar.base.printable import pluralize
from osscar.data.samples import columns_of, named_generator
from osscar.network.modules import context_length
from osscar.proof.seen import Fingerprints, Seen, fingerprints_of_runs

DEFAULT_SEQLEN = 512

_UNKNOWN = 0.01
"""The share of unknown tokens up to which a text is one that the tokenizer knows."""

_CHARACTERS_PER_TOKEN = 16
"""Characters read from a data set for every token wanted: about four times what windows need."""

_TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst", ".raw"}


# ---- sources -----------------------------------------------------------------------------


def read_text(path: str | Path) -> str:
    """Read a file of UTF-8 text, with newlines alone (DataError)."""
    name = os.fspath(path)
    try:
        text = Path(name).expanduser().read_bytes().decode("utf-8-sig")
    except (OSError, RuntimeError, ValueError) as error:  # or no such user, or a NUL
        raise DataError(
            f"cannot read {name[:300]!r}: {reason_of(error)}; give plain UTF-8 text, or a "
            "list of texts"
        ) from error
    if "\0" in text or not text.strip():
        what = "is binary (it holds NUL bytes)" if "\0" in text else "is empty"
        raise DataError(f"{name!r} {what}; give a file of plain UTF-8 text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_text(data: Any) -> bool:
    """Tell whether data are texts: a sequence of them, or a data set with a column `text`."""
    several = isinstance(data, Sequence) and not isinstance(data, str) and len(data) > 0
    return (several and isinstance(data[0], str)) or "text" in columns_of(data)


def _text_of(spec: Any, characters: int | None) -> tuple[str, str]:
    """Return a text and its name: of a file, of texts at hand, or so many characters of the hub."""
    if is_text(spec):
        name = f"a {type(spec).__name__}"
        return _joined(spec, name, characters), name
    name = os.fspath(spec)
    is_file = os.path.exists(os.path.expanduser(name)) or Path(name).suffix in _TEXT_SUFFIXES
    if characters is None or is_file or not name or name.startswith((".", "/", "~")):
        return read_text(name), name
    datasets = optional("datasets", "data", f"reading the data set {name!r}", ", or a text file")
    place, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(place, config or None, split="train", streaming=True)
        return _joined(rows, name, characters), f"dataset {name}"
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"cannot load the data set {name!r}, nor is there a file of that name: "
            f"{first_line(error)}; give NAME or NAME:CONFIG of the Hugging Face hub, or a text file"
        ) from error


def _joined(rows: Iterable[Any], name: str, characters: int | None) -> str:
    """Join texts, or the column `text` of rows, until there are enough characters."""
    parts, length = [], 0
    for row in rows:
        text = row if isinstance(row, str) else row.get("text")
        if not isinstance(text, str):
            raise DataError(
                f"{name} has no column 'text' of strings, only {', '.join(sorted(row))}; choose "
                "another, or save its text to a file"
            )
        parts.append(text)
        length += len(text)
        if characters is not None and length >= characters:
            break
    return "\n\n".join(parts)


# ---- tokens ------------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Tokenize a whole text without special tokens, (tokens,) int64; warn if many are unknown."""
    ids = _ids(tokenizer, text, special=False)
    unknown = ids.count(tokenizer.unk_token_id)
    if unknown > _UNKNOWN * len(ids):
        warn(
            f"{unknown:,} of the text's {len(ids):,} tokens are unknown ({tokenizer.unk_token}); "
            "check that language and tokenizer are the model's"
        )
    return torch.tensor(ids, dtype=torch.int64)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return the ids that a tokenizer puts before a text and after it, (tokens,) int64 each."""
    bare, whole = (_ids(tokenizer, "text", special=special) for special in (False, True))
    starts = range(len(whole) - len(bare) + 1)
    start = next((i for i in starts if whole[i : i + len(bare)] == bare), None)
    if start is None:  # the first word is cut in another way, and nothing stands out
        start, bare = 0, whole
    before, after = whole[:start], whole[start + len(bare) :]
    return torch.tensor(before, dtype=torch.int64), torch.tensor(after, dtype=torch.int64)


def _as_words(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> str:
    """Return special tokens as they are written, such as ``<s>``."""
    return "".join(tokenizer.convert_ids_to_tokens(tokens.tolist()))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    # verbose=False: a text longer than the model's context is the normal case here
    options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
    ids: list[int] = tokenizer(text, **options)["input_ids"]
    return ids


# ---- calibration -------------------------------------------------------------------------


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
    seqlen: int = DEFAULT_SEQLEN,
    seed: int = 0,
    overlapping: bool = True,
) -> CalibrationSet:
    """Cut random windows from a text.

    Windows are in the order of the text and share no token, at uniformly random places.  If the
    text is shorter than all of them together, they overlap: one is drawn from each of as many
    stretches of the text, and the source says so.  Each begins and ends with the special tokens
    that the tokenizer puts before and after a text.

    Parameters
    ----------
    spec
        A plain text file; a list of texts; a ``datasets.Dataset`` with a column `text`; or the name
        of such a data set of the Hugging Face hub, as ``NAME`` or ``NAME:CONFIG``, of whose
        training split the first rows are streamed.
    tokenizer
        The tokenizer of the model to calibrate.
    samples
        Windows wanted.
    seqlen
        Tokens in a window, special tokens included.
    seed
        The same seed gives the same windows.
    overlapping
        Whether windows may overlap.  Otherwise there are as many as the text has room for, and the
        source says so.

    Raises
    ------
    DataError
        If the text is missing, unreadable, or shorter than one window.
    """
    whole_number(samples, "the number of windows (samples, `--samples`)", 1)
    whole_number(seqlen, "the number of tokens in a window (seqlen, `--seqlen`)", 1)
    whole_number(seed, "the seed (seed, `--seed`)", 0)
    text, source = _text_of(spec, samples * seqlen * _CHARACTERS_PER_TOKEN)
    tokens, (before, after) = encode(tokenizer, text), special_tokens(tokenizer)
    length = seqlen - len(before) - len(after)
    if not 1 <= length <= len(tokens):
        special = f", of which the tokenizer adds {seqlen - length}," if length < seqlen else ""
        raise DataError(
            f"a window of {pluralize(seqlen, 'token')}{special} cannot be cut from the "
            f"{pluralize(len(tokens), 'token')} of {source}; give a longer text, or windows of "
            "another length (seqlen, `--seqlen`)"
        )
    room = len(tokens) // length
    if samples > room and not overlapping:
        samples = room
        source += f", as many as its {pluralize(len(tokens), 'token')} have room for"
    elif samples > room:
        windows_of = "overlapping window" if samples > 1 else "window"
        source += f", {pluralize(samples, windows_of)} from {pluralize(len(tokens), 'token')}"
    starts = _window_starts(len(tokens), samples, length, seed)
    cut = tokens[starts[:, None] + torch.arange(length)]
    windows = torch.cat([before.expand(samples, -1), cut, after.expand(samples, -1)], dim=1)
    written = (_as_words(tokenizer, before), _as_words(tokenizer, after))
    seen = Seen.of(fingerprints_of_runs(tokens))
    return CalibrationSet(windows, source, seed, seen, *written)


def _window_starts(tokens: int, samples: int, seqlen: int, seed: int) -> Tensor:
    generator = named_generator("calibration windows", seed)
    random = torch.rand(samples, generator=generator, dtype=torch.float64)
    slack = tokens - samples * seqlen
    if slack >= 0:  # spread what no window covers over the gaps before, between and after them
        return torch.arange(samples) * seqlen + (random.sort().values * (slack + 1)).long()
    positions = tokens - seqlen + 1
    starts = (torch.arange(samples) + random) * (positions / samples)
    return starts.long().clamp_(max=positions - 1)


# ---- what is scored ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TextSet:
    """A text that is scored in windows which do not overlap; `osscar.load_text` makes one.

    Each window begins with the special tokens that the tokenizer puts before a text, if it does.
    These, or else its first token, are context only; every other token is scored once.  What is
    left at the end is a shorter window, scored too if it has a token to score.

    Attributes
    ----------
    source
        Where it comes from, in words.
    text
        The text itself.
    tokens
        Token ids of all of it, (tokens,) int64.
    before, after
        Token ids that the tokenizer puts before and after a text.
    begins_with
        Those before it as they are written, such as ``<s>``.
    windows
        Score only so many windows from the start; None scores the text in full.
    seqlen
        Tokens per window; None is 512, or as many as the model can take if those are fewer.
    """

    source: str
    text: str = field(repr=False)
    tokens: Tensor = field(repr=False)
    before: Tensor = field(repr=False)
    after: Tensor = field(repr=False)
    begins_with: str
    windows: int | None = None
    seqlen: int | None = None

    def fingerprints(self) -> Fingerprints:
        """Return a hash of each run of 32 tokens, by which text that a model saw is recognized."""
        return fingerprints_of_runs(self.tokens)

    def cut(self, models: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Return the windows, (at most seqlen,) int64 each, that fit all models (OptionError)."""
        limit = min(context_length(model) or DEFAULT_SEQLEN for model in models)
        length = min(limit, DEFAULT_SEQLEN) if self.seqlen is None else self.seqlen
        room, least = length - len(self.before), max(2, len(self.before) + 1)
        if not least <= length <= limit:
            raise OptionError(
                f"a window of {pluralize(length, 'token')} does not fit this model: give from "
                f"{least}, which has room for the text, to {limit}, which is its context "
                f"(seqlen, `--seqlen`)"
            )
        pieces = [torch.cat([self.before, piece]) for piece in torch.split(self.tokens, room)]
        return tuple(piece for piece in pieces[: self.windows] if len(piece) > 1)

    def check_same_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse to compare with a model whose tokenizer makes other tokens of the text."""
        mine = torch.cat([self.tokens, self.before, self.after])
        theirs = torch.cat([encode(tokenizer, self.text), *special_tokens(tokenizer)])
        if not torch.equal(mine, theirs):
            raise ModelError(
                f"the tokenizers of the two models differ ({pluralize(len(mine), 'token')} and "
                f"{pluralize(len(theirs), 'token')} of this text), so their perplexities cannot "
                "be compared; give the dense model that the first one was pruned from"
            )


def load_text(
    spec: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int | None = None,
    seqlen: int | None = None,
) -> TextSet:
    """Read a text to be scored.

    Parameters
    ----------
    spec
        A file of plain text; a list of texts; or a ``datasets.Dataset`` with a column `text`.
    tokenizer
        That of the models that are scored.
    windows
        Score only so many windows from the start; None scores the text in full.
    seqlen
        Tokens per window; by default 512, or as many as the model can take if those are fewer.

    Raises
    ------
    DataError
        If the text is missing, unreadable, or has fewer than two tokens.
    """
    if windows is not None:
        whole_number(windows, "the number of windows to score (windows, `--windows`)", 1)
    text, source = _text_of(spec, None)
    tokens, (before, after) = encode(tokenizer, text), special_tokens(tokenizer)
    if len(tokens) < 2:
        raise DataError(f"the text has {pluralize(len(tokens), 'token')}; scoring needs at least 2")
    written = _as_words(tokenizer, before)
    return TextSet(source, text, tokens, before, after, written, windows, seqlen)
