"""Plain text: read from files, tokenized whole, and cut into parts that do not overlap."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from osscar.core.errors import TextError
from osscar.core.files import digest
from osscar.core.inputs import TEXT_LIMIT, file_name, panics_are_errors, read_bytes
from osscar.shrinking.lineage import Calibration


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
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    with panics_are_errors("this text"):
        ids = tokenizer(text, **options)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


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
