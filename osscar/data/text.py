"""Plain text: read from files, tokenized whole, and cut into parts that do not overlap."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from osscar.core.errors import TextError
from osscar.core.files import digest


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
    try:
        data = Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise TextError(f"no text file at {str(path)!r}; check the path") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory of that user
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
    """
    # verbose=False: a text longer than the model's context is the normal case here
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    return torch.tensor(ids, dtype=torch.int64)


def split_text(text: str, fraction: float) -> tuple[str, str]:
    """Cut a text in two at the end of a line, say to calibrate on one part and score the other.

    Parameters
    ----------
    text
        Any text of at least two lines.
    fraction
        Share of the characters, in (0, 1), that goes to the first part, up to whole lines.

    Returns
    -------
    tuple of str
        First and second part; joined they are the text.

    Raises
    ------
    TextError
        If the fraction is out of range, or a part would be blank.
    """
    if not 0 < fraction < 1:
        raise TextError(f"cannot split text at fraction {fraction}; it must lie between 0 and 1")
    cut = text.find("\n", int(len(text) * fraction)) + 1
    first, second = text[:cut], text[cut:]
    if not first.strip() or not second.strip():
        raise TextError(
            f"a text of {len(text)} characters cannot be split at {fraction}: no line ends there; "
            "give a longer text or another fraction"
        )
    return first, second
