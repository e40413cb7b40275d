"""Plain text: read from files, tokenized whole, and cut into windows that do not overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from osscar.base.errors import DataError, ModelError, OptionError
from osscar.base.inputs import (
    TEXT_LIMIT,
    file_name,
    panics_are_errors,
    read_bytes,
    safe_repr,
    whole_number,
)
from osscar.base.messages import warn
from osscar.base.printable import pluralize
from osscar.data.prose import Split, builtin_text
from osscar.network.modules import context_length
from osscar.proof.seen import Fingerprints, fingerprints_of_runs

DEFAULT_SEQLEN = 512

_UNKNOWN = 0.01
"""The share of unknown tokens up to which a text is one that the tokenizer knows."""


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file of plain text, with or without a byte order mark.

    Lines end as Python ends them, with a newline alone. A file that is missing, unreadable, binary
    or empty is a DataError.
    """
    name = file_name(path, "the text", "a file of plain text")
    try:
        data = read_bytes(Path(name).expanduser(), TEXT_LIMIT)
    except FileNotFoundError:
        raise DataError(f"no text file at {str(path)!r}; check the path") from None
    except (OSError, RuntimeError, ValueError) as error:  # no home directory of that user; a NUL
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {str(path)!r}: {reason}; give a text file") from error
    if b"\0" in data:
        raise DataError(f"{str(path)!r} is binary (it holds NUL bytes); give plain UTF-8 text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(path)!r} is not UTF-8 (byte {error.start}: {data[error.start]:#04x}); "
            "give plain UTF-8 text"
        ) from error
    if not text.strip():
        raise DataError(f"{str(path)!r} is empty; give a file with text in it")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Tokenize a whole text, adding no special tokens; return ids, (tokens,) int64.

    There are as many as there are, however few the model could take at once. What could not be
    written as UTF-8 is a DataError; of characters that the tokenizer does not know it is warned.
    """
    if not isinstance(text, str):
        raise DataError(
            f"the text is a {type(text).__name__}; give a str, such as a file's content"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds half a surrogate pair at {error.start} ({text[error.start]!r}); "
            "decode the file it comes from as UTF-8"
        ) from error
    ids = _ids(tokenizer, text, special=False)
    unknown = ids.count(tokenizer.unk_token_id)
    if unknown > _UNKNOWN * len(ids):
        warn(
            f"{unknown:,} of the text's {len(ids):,} tokens are {tokenizer.unk_token}: its "
            "tokenizer does not know what stands there; give text of the model's own kind"
        )
    return torch.tensor(ids, dtype=torch.int64)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return the ids that a tokenizer puts before a text and after it, (tokens,) int64 each.

    Most tokenizers put none there, or one.
    """
    bare, whole = (_ids(tokenizer, "text", special=special) for special in (False, True))
    starts = range(len(whole) - len(bare) + 1)
    start = next((i for i in starts if whole[i : i + len(bare)] == bare), None)
    if start is None:  # the first word is cut in another way, and nothing stands out
        start, bare = 0, whole
    before, after = whole[:start], whole[start + len(bare) :]
    return torch.tensor(before, dtype=torch.int64), torch.tensor(after, dtype=torch.int64)


def as_words(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> str:
    """Return special tokens as they are written, such as ``<s>``."""
    return "".join(tokenizer.convert_ids_to_tokens(tokens.tolist()))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    # verbose=False: a text longer than the model's context is the normal case here
    options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
    with panics_are_errors("this text"):
        ids: list[int] = tokenizer(text, **options)["input_ids"]
    return ids


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

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        *,
        windows: int | None = None,
        seqlen: int | None = None,
        source: str = "text",
    ) -> TextSet:
        """Return a text in tokens.

        Parameters
        ----------
        tokenizer
            That of the models that are scored.
        text
            Text that they were neither trained nor calibrated on.
        windows, seqlen, source
            As of the attributes.

        Raises
        ------
        OptionError
            If the tokenizer is none of transformers, or a number is out of range.
        DataError
            If the text has fewer than two tokens.
        """
        check_tokenizer(tokenizer)
        if windows is not None:
            whole_number(windows, "the number of windows to score (--windows)", 1)
        tokens, (before, after) = encode(tokenizer, text), special_tokens(tokenizer)
        if len(tokens) < 2:
            raise DataError(
                f"the text has {pluralize(len(tokens), 'token')}; scoring needs at least 2"
            )
        written = as_words(tokenizer, before)
        return cls(source, text, tokens, before, after, written, windows, seqlen)

    def fingerprints(self) -> Fingerprints:
        """Return a hash of each run of 32 tokens, by which text that a model saw is recognized."""
        return fingerprints_of_runs(self.tokens)

    def cut(self, models: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        """Return the windows, (at most seqlen,) int64 each, that fit all of the models.

        Raises
        ------
        OptionError
            If a window of the length asked for is too long, or has no room for the text.
        """
        limit = min(context_length(model) or DEFAULT_SEQLEN for model in models)
        length = min(limit, DEFAULT_SEQLEN) if self.seqlen is None else self.seqlen
        if not isinstance(length, int) or not 2 <= length <= limit:
            raise OptionError(
                f"a window of {safe_repr(length)} tokens does not fit this model; give from 2 to "
                f"{limit}, which is its context (--seqlen)"
            )
        room = length - len(self.before)
        if room < 1:
            raise OptionError(
                f"a window of {length} tokens has room for none of the text, since the tokenizer "
                f"puts {len(self.before)} before it; give longer ones (--seqlen)"
            )
        pieces = [torch.cat([self.before, piece]) for piece in torch.split(self.tokens, room)]
        return tuple(piece for piece in pieces[: self.windows] if len(piece) > 1)

    def check_same_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse to compare with a model that reads other tokens.

        Parameters
        ----------
        tokenizer
            The other model's.

        Raises
        ------
        ModelError
            If it makes other tokens of the text, or puts others around it.
        """
        mine = torch.cat([self.tokens, self.before, self.after])
        theirs = torch.cat([encode(tokenizer, self.text), *special_tokens(tokenizer)])
        if not torch.equal(mine, theirs):
            raise ModelError(
                f"the two models have other tokenizers ({pluralize(len(mine), 'token')} and "
                f"{pluralize(len(theirs), 'token')} of this text), so that their perplexities are "
                "not comparable; give the dense model that the first one was pruned from"
            )


def load_text(
    spec: str | Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    windows: int | None = None,
    seqlen: int | None = None,
) -> TextSet:
    """Read a text to be scored.

    Parameters
    ----------
    spec
        A file of plain text; None is the held-out part of the text that ships with Python, which
        neither trained the demo model nor calibrates anything.
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
    OptionError
        If the tokenizer is none of transformers, or a number is out of range.
    """
    text = builtin_text(Split.HELD_OUT) if spec is None else read_text(spec)
    source = "built-in held-out text" if spec is None else str(spec)
    return TextSet.of(tokenizer, text, windows=windows, seqlen=seqlen, source=source)


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is no tokenizer of transformers (OptionError)."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise OptionError(
            f"the tokenizer is a {type(tokenizer).__name__}; give that of transformers which "
            "belongs to the model"
        )
