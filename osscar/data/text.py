"""Plain text: read from files, tokenized whole, and cut into parts that do not overlap."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from osscar.core.errors import TextError
from osscar.core.inputs import TEXT_LIMIT, file_name, read_bytes


def read_text(path: str | Path) -> str:
    """Read a plain text file.

    Parameters
    ----------
    path
        A UTF-8 file, with or without a byte order mark.

    Returns
    -------
    str
        Its content, which holds more than white space.

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
    return text


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text, by which the one that calibrated a model is recognized."""
    return hashlib.sha256(text.encode()).hexdigest()


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
    # verbose=False: a text longer than the model's context is the normal case here
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return torch.tensor(ids, dtype=torch.int64)


def refuse_overlap(text: str, calibration: Mapping[str, Any]) -> None:
    """Refuse to score the text that a model was calibrated on.

    Parameters
    ----------
    text
        What is to be scored.
    calibration
        What the report beside the model says about its calibration data; empty where there is none.

    Raises
    ------
    TextError
        If it names this text.
    """
    if calibration.get("sha256") == text_digest(text):
        raise TextError(
            f"this model was calibrated on this very text ({calibration.get('source')}); score "
            "another one"
        )
