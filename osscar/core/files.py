"""Files: written whole, locked, recognized by what they hold, and read without being believed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import filelock
from pydantic import ConfigDict, TypeAdapter, ValidationError

from osscar.core.errors import BusyError, FileError, OutputError
from osscar.core.inputs import check_regular, file_name, read_bytes

T = TypeVar("T")

LOCK_FILE = ".osscar.lock"
"""In a directory in which one process at a time is at work."""

PARTIAL = ".partial"
"""How the names of files end that are being written."""

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""For the ``__pydantic_config__`` of a dataclass that `read_json` reads; what it contains follows.

Of the types that JSON has, none is taken for another; no field is missing or left over.
"""

MEGABYTE = 2**20

_LONGEST_PATH = 4096
"""Bytes, as Linux has it; other systems refuse earlier."""

_DEEPEST = 256
"""Directories in one another; Python makes each in the call that makes the next."""

_LARGEST = 2**63
"""Whole numbers lie below it and above its negative: tensors hold no others."""

_MOST_DIGITS = 40
"""Of a whole number in a file that is not ours."""

_SHOWN = 60
"""Characters of an offending value that a message shows."""


def cache_directory() -> Path:
    """Give the place of what is kept between runs: ``$OSSCAR_CACHE``, else ``~/.cache/osscar``."""
    configured = os.environ.get("OSSCAR_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "osscar"


# ---- writing -----------------------------------------------------------------------------


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a place beside `path` to write to; once the block has ended, it becomes `path`.

    The place bears the number of the process, so that two never write to the same.  It is on the
    disk before it becomes `path`: what survives a loss of power is either whole or not there.  A
    pipe or a device is written to itself, since it cannot be replaced.

    Raises
    ------
    OutputError
        If it cannot be written; what was there is left as it was.
    """
    target = resolved(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}{PARTIAL}")
    try:
        if target.exists() and not target.is_file():
            yield target
            return
        with system_errors():
            yield partial
        settle(partial)
        partial.replace(target)
        with suppress(OSError):  # it is there, whatever a loss of power may undo
            settle(target.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {reason_of(error)}{remedy(error)}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def resolved(path: str | os.PathLike[str]) -> Path:
    """Return a path that is to be written without links in it.

    Raises
    ------
    OutputError
        If it cannot be a path: links that lead in a circle, a user without a home, NUL, more than
        a system takes.
    OptionError
        If it is neither text nor a path.
    """
    name = file_name(path, "the output", "the name of a file or directory")
    try:
        found = Path(name).expanduser().resolve()
        if len(os.fsencode(found)) >= _LONGEST_PATH or len(found.parts) > _DEEPEST:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"cannot write {name[:300]!r}: {reason_of(error)}") from error
    return found


def write_text(path: Path, text: str) -> None:
    """Write a text; the file appears whole or not at all.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, *, indent: int | None = 2) -> None:
    """Write JSON; the file appears whole or not at all.

    Raises
    ------
    OutputError
        If it cannot be written.
    ValueError
        If a number in it is not finite, which JSON cannot say.
    """
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


@contextmanager
def stored(path: Path) -> Iterator[None]:
    """Let the block write a file by means that make it whole, and wait until it is on the disk.

    Raises
    ------
    OutputError
        If the system refuses.
    """
    try:
        with system_errors():
            yield
        settle(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {reason_of(error)}{remedy(error)}") from error


def settle(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk.

    Raises
    ------
    OSError
        If they cannot get there.
    """
    if os.name != "posix" and path.is_dir():
        return  # directories cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What file systems answer that know no such thing, as some networks do not of directories."""


def reason_of(error: BaseException) -> str:
    """Return what the system says of an error, without number and path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def remedy(error: OSError) -> str:
    """Return what to do about an error, as the end of a message; empty where that is not known."""
    return _REMEDIES.get(error.errno or 0, "")


_REMEDIES = {
    errno.ENOSPC: "; make room there",
    errno.EDQUOT: "; make room there",
    errno.EFBIG: "; allow larger files (ulimit -f)",
}


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise what the system refuses as an OSError, also where a library says so in its own way.

    safetensors, tokenizers and `solvers` raise other exceptions, with the number in the text.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        number = re.search(r"\b(?:os error|Errno) (\d+)\b", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


# ---- signals -----------------------------------------------------------------------------


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let interrupts and requests to end wait until the block is done; keep it short."""
    waiting: list[int] = []
    try:
        with _handled(lambda number, _: waiting.append(number)):
            yield
    finally:
        for number in dict.fromkeys(waiting):
            signal.raise_signal(number)


@contextmanager
def ends_tidily() -> Iterator[None]:
    """Let a request to end unwind the block, where it would end the process on the spot.

    The process ends by that signal all the same, once everything in the block is cleaned up.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield  # someone else, such as the command line, knows what to do
        return
    ended = False

    def unwind(number: int, _: FrameType | None) -> None:
        nonlocal ended
        ended = True
        raise SystemExit(128 + number)

    try:
        with _handled(unwind, (signal.SIGTERM,)):
            yield
    finally:
        if ended:
            signal.raise_signal(signal.SIGTERM)


@contextmanager
def _handled(
    handler: Callable[[int, FrameType | None], object],
    numbers: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM),
) -> Iterator[None]:
    """Handle signals in this way, which only the main thread can say."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


# ---- locks -------------------------------------------------------------------------------


@contextmanager
def hold(place: Path, work: Path) -> Iterator[bool]:
    """Hold a lock file; the system releases it when the process ends, however.

    It says who holds it, for those who find it held.

    Parameters
    ----------
    place
        The file, which stays where it is.
    work
        What it guards.

    Yields
    ------
    bool
        Whether it is held: on a file system without locks, unguarded is better than not at all.

    Raises
    ------
    BusyError
        If another process holds it, by its number.
    OutputError
        If it cannot be written.
    """
    holder = _holder(place)  # now: some versions of filelock empty the file when they try it
    lock = filelock.FileLock(place, timeout=0)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock)
        except filelock.Timeout:
            raise BusyError(
                f"another process is at work in {work}{_holder(place) or holder}; wait for it, or "
                "give another --out"
            ) from None
        except (NotImplementedError, OSError) as error:
            if not _can_write(place):
                more = remedy(error) if isinstance(error, OSError) else ""
                raise OutputError(f"cannot write {place}: {reason_of(error)}{more}") from error
        if lock.is_locked:
            with suppress(OSError):  # who holds it is good to know, and no more
                place.write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
        yield lock.is_locked


def _holder(place: Path) -> str:
    """Return who wrote that it holds a lock, as part of a message; empty where nobody did."""
    with suppress(OSError, ValueError):
        found = re.fullmatch(r"(\d{1,10}) ([\w.-]{1,255})\n", read_bytes(place, 300).decode())
        return f" (process {found[1]} on {found[2]})" if found else ""
    return ""


def _can_write(place: Path) -> bool:
    try:
        with place.open("a"):
            return True
    except OSError:
        return False


# ---- digests -----------------------------------------------------------------------------


def digest(data: bytes | str) -> str:
    """Return the SHA-256 of some bytes, or of a text in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, read piece by piece.

    Raises
    ------
    FileError
        If it cannot be read.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileError(path, f"cannot be read: {reason_of(error)}") from error


# ---- reading -----------------------------------------------------------------------------


def read_json(path: Path, schema: type[T], *, limit: int = 16 * MEGABYTE) -> T:
    """Read a JSON file that anyone may have written.

    Parameters
    ----------
    path
        The file.
    schema
        What it has to hold: a dataclass whose ``__pydantic_config__`` is `STRICT`.
    limit
        Bytes that it may have at most.

    Raises
    ------
    FileError
        If it is missing, too large, no JSON (as RFC 8259 has it: no NaN; no key twice), nested too
        deeply, or does not hold what the schema says; the message names the field.
    """
    return parse_json(_read_text(path, limit), schema, path)


def validated(content: Any, schema: type[T], name: str) -> T:
    """Check JSON-able data that came some other way, as `read_json` does.

    Raises
    ------
    FileError
        If it is not JSON-able, or does not hold what the schema says.
    """
    try:
        text = json.dumps(content)
    except RecursionError as error:
        raise FileError(name, "it is nested too deeply") from error
    except (TypeError, ValueError) as error:
        raise FileError(name, str(error)) from error
    return parse_json(text, schema, name)


def read_object(path: Path, *, limit: int = 64 * MEGABYTE) -> dict[str, Any]:
    """Read a JSON object of another project's, whose fields nobody here can list.

    It comes in on the same way as with `read_json`, less the schema.  Infinity is let through,
    since some families write it (``time_step_limit`` of Mamba), and so are large numbers
    (``model_max_length`` of tokenizers is 1e30).

    Parameters
    ----------
    path
        The file.
    limit
        Bytes that it may have at most.

    Raises
    ------
    FileError
        If it is missing, too large, no JSON object, holds NaN or one key twice, or is nested too
        deeply.
    """
    text = _read_text(path, limit)
    try:
        found = json.loads(
            text, parse_constant=_infinite, parse_int=_short, object_pairs_hook=_distinct
        )
    except RecursionError as error:
        raise FileError(path, "it is nested too deeply") from error
    except ValueError as error:
        raise FileError(path, str(error)) from error
    if not isinstance(found, dict):
        raise FileError(path, f"it holds a {type(found).__name__}, not an object")
    return found


def parse_json(text: str, schema: type[T], path: str | os.PathLike[str]) -> T:
    """Check and parse the text of a JSON file, as `read_json` does.

    Raises
    ------
    FileError
        As there.
    """
    try:
        _refuse_oddities(text)
        return cast(T, _adapter(cast(Any, schema)).validate_json(text))
    except ValidationError as error:
        raise FileError(path, _first(error)) from error
    except RecursionError as error:
        raise FileError(path, "it is nested too deeply") from error
    except ValueError as error:
        raise FileError(path, str(error)) from error


def _read_text(path: Path, limit: int) -> str:
    try:
        return read_bytes(path, limit).decode("utf-8")
    except OSError as error:
        raise FileError(path, f"it cannot be read: {reason_of(error)}") from error
    except UnicodeDecodeError as error:
        raise FileError(path, f"it is not UTF-8 (byte {error.start})") from error


@cache
def _adapter(schema: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _refuse_oddities(text: str) -> None:
    """Refuse what parsers of JSON differ about: they would not all read the same."""
    json.loads(
        text,
        parse_constant=_refused,
        parse_float=_finite,
        parse_int=_moderate,
        object_pairs_hook=_distinct,
    )


def _refused(text: str) -> float:
    raise ValueError(f"{text} is not JSON; give a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.{_SHOWN}} is not a finite number")
    return value


def _infinite(text: str) -> float:
    return float(text) if text != "NaN" else _refused(text)


def _short(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"{text:.{_SHOWN}} has {len(text)} digits")
    return int(text)


def _moderate(text: str) -> int:
    if len(text) > 20 or not -_LARGEST < int(text) < _LARGEST:
        raise ValueError(f"{text:.{_SHOWN}} is not a number below 2^63")
    return int(text)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.{_SHOWN}} stands there twice")
    return found


def _first(error: ValidationError) -> str:
    """Say the first thing that is wrong: where, what, and the value."""
    found = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    complete = found["type"] in ("json_invalid", "missing", "value_error")
    shown = "" if complete else f", not {found['input']!r}"
    if len(shown) > _SHOWN:
        shown = shown[:_SHOWN] + "..."
    message = found["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{place or 'it'}: {message}{shown}"
