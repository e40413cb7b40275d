"""Plain text: read from files, tokenized whole, and cut into parts that do not overlap."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from osscar.base.errors import ModelError, TextError
from osscar.base.files import digest
from osscar.base.inputs import TEXT_LIMIT, file_name, panics_are_errors, read_bytes
from osscar.base.printable import counted
from osscar.shrinking.lineage import Calibration

_UNKNOWN = 0.01
"""The share of unknown tokens up to which a text is one that the tokenizer knows."""


def read_text(path: str | Path) -> str:
    """Read a plain text file.

    Parameters
    ----------
    path
        A UTF-8 file, with or without a byte order mark.

    Returns
    -------
    str
        Its content, which holds more than white space; lines end as Python ends them, with a
        newline alone.

    Raises
    ------
    TextError
        If the file is missing, unreadable, binary or empty.
    """
    name = file_name(path, "the text", "a file of plain text")
    try:
        data = read_bytes(Path(name).expanduser(), TEXT_LIMIT)
    except FileNotFoundError:
        raise TextError(f"no text file at {str(path)!r}; check the path") from None
    except (OSError, RuntimeError, ValueError) as error:  # no home directory of that user; a NUL
        reason = getattr(error, "strerror", None) or error
        raise TextError(f"cannot read {str(path)!r}: {reason}; give a text file") from error
    if b"\0" in data:
        raise TextError(f"{str(path)!r} is binary (it holds NUL bytes); give plain UTF-8 text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{str(path)!r} is not UTF-8 (byte {error.start}: {data[error.start]:#04x}); "
            "give plain UTF-8 text"
        ) from error
    if not text.strip():
        raise TextError(f"{str(path)!r} is empty; give a file with text in it")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text, by which the one that calibrated a model is recognized."""
    return digest(text)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Tokenize a whole text, adding no special tokens.

    Returns
    -------
    Tensor
        Token ids, (tokens,) int64, however many the model could take at once.

    Raises
    ------
    TextError
        If it is no text that could be written as UTF-8.

    Warns
    -----
    UserWarning
        If the tokenizer does not know some of its characters.
    """
    if not isinstance(text, str):
        raise TextError(
            f"the text is a {type(text).__name__}; give a str, such as a file's content"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"the text holds half a surrogate pair at {error.start} ({text[error.start]!r}); "
            "decode the file it comes from as UTF-8"
        ) from error
    ids = _ids(tokenizer, text, special=False)
    unknown = ids.count(tokenizer.unk_token_id)
    if unknown > _UNKNOWN * len(ids):
        warnings.warn(
            f"{unknown:,} of the text's {len(ids):,} tokens are {tokenizer.unk_token}: its "
            "tokenizer does not know what stands there; give text of the model's own kind",
            stacklevel=2,
        )
    return torch.tensor(ids, dtype=torch.int64)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return the tokens that a tokenizer puts before a text and after it, as its files say.

    Returns
    -------
    tuple of Tensor
        Token ids, (tokens,) int64 each; most tokenizers put none there, or one.
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


def check_same_tokens(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, text: str
) -> None:
    """Refuse to compare two models that read other tokens.

    Raises
    ------
    ModelError
        If the tokenizers make other tokens of the text, or put others around it.
    """
    mine, theirs = (
        torch.cat([encode(one, text), *special_tokens(one)]) for one in (tokenizer, other)
    )
    if not torch.equal(mine, theirs):
        raise ModelError(
            f"the two models have other tokenizers ({counted(len(mine), 'token')} and "
            f"{counted(len(theirs), 'token')} of this text), so that their perplexities are not "
            "comparable; give the dense model that the first one was pruned from"
        )


def refuse_overlap(text: str, calibration: Iterable[Calibration]) -> None:
    """Refuse to score the text that a model was calibrated on.

    Parameters
    ----------
    text
        What is to be scored.
    calibration
        From the lineage of the model.

    Raises
    ------
    TextError
        If it is one that calibrated the model.
    """
    scored = text_digest(text)
    for known in calibration:
        if known.sha256 == scored:
            raise TextError(
                f"this model was calibrated on this very text ({known.source}); score another one"
            )
