"""Code of a user's own, which is run: ``module:name`` and ``file.py:name``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from solvers.errors import is_shortage

_INSTALLED = (
    *(Path(__file__).resolve().parents[1] / name for name in ("solvers", "graph", "osscar")),
    Path(sysconfig.get_path("stdlib")).resolve(),
)
"""Directories of code that is no user's own."""


def imported(name: str, error: type[Exception]) -> Any:
    """Import what ``package.module:name`` or ``path/file.py:name`` stands for, inside `importable`.

    A file is run once, and again only if it has changed.  Raises `error` if there is no such file,
    module or name, or the code of the file fails.
    """
    place, _, own = name.rpartition(":")
    if not place:
        raise error(f"{name!r} names no code; give module:name or path/file.py:name")
    if not place.endswith(".py"):
        return _named(own, _installed(place, own, error), place, error)
    path = Path(place).expanduser()
    if not path.is_file():
        raise error(f"there is no file {place!r}")
    return _named(own, _run(path.resolve(), place, error), place, error)


def _run(path: Path, place: str, error: type[Exception]) -> ModuleType:
    """Return the module that a file is, whose classes are the same whoever asks for them."""
    name = f"osscar_user_{path.stem}_{_sha256(os.fsencode(path))[:12]}"
    with blamed(place, error):
        content = path.read_bytes()
    known = sys.modules.get(name)
    if known is not None and getattr(known, _DIGEST) == _sha256(content):
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    setattr(module, _DIGEST, _sha256(content))
    sys.modules[name] = module
    try:
        with blamed(place, error):
            # Not by its loader, which tells what has changed by the size and the second.
            exec(compile(content, path, "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


_DIGEST = "__osscar_digest__"
"""What a module that was run from a file keeps of the content of that."""


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _named(own: str, module: ModuleType, place: str, error: type[Exception]) -> Any:
    if own and not hasattr(module, own):
        raise error(f"{place!r} has no {own!r}")
    return getattr(module, own, None)


def source_digests(code: Any) -> dict[str, str]:
    """Return the SHA-256 of each file that code of a user's own was loaded from, by its name.

    Beside the file of the code, what `imported` took or an object that it defines, these are files
    that were loaded from its directory or below.  Installed packages have none.
    """
    own = code.rpartition(":")[0] if isinstance(code, str) else getattr(code, "__module__", None)
    place = own if isinstance(own, str) else ""
    there = place if place.endswith(".py") and Path(place).is_file() else None
    file = _own_file(there or getattr(sys.modules.get(place), "__file__", None))
    if file is None:
        return {}
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    loaded = {file, *map(_own_file, files)}
    found = sorted(one for one in loaded if one is not None and file.parent in one.parents)
    return {one.relative_to(file.parent).as_posix(): _sha256(one.read_bytes()) for one in found}


def _own_file(file: object) -> Path | None:
    """Return where the source file of a module lies, if it is a user's own."""
    if not isinstance(file, str) or not file.endswith(".py"):
        return None
    path = Path(file).resolve()
    installed = any(root in path.parents for root in _INSTALLED) or "site-packages" in path.parts
    return path if path.is_file() and not installed else None


def _installed(place: str, own: str, error: type[Exception]) -> ModuleType:
    """Import a module by name."""
    if not all(part.isidentifier() for part in place.split(".")):
        file = f"{place}.py" if "/" in place else f"{place.lstrip('.')}.py"
        raise error(f"{place!r} is not the name of a module; for a file give {file}:{own}")
    try:
        with blamed(place, error):
            return importlib.import_module(place)
    except error as failure:
        cause = failure.__cause__
        # What its own code fails to import is another matter than the module itself.
        if isinstance(cause, ModuleNotFoundError) and f"{place}.".startswith(f"{cause.name}."):
            raise error(
                f"cannot import {place!r}: {cause}; give module:name or path/file.py:name"
            ) from cause
        raise


@contextmanager
def importable(name: str) -> Iterator[None]:
    """Let code find what lies in the current directory and beside its file, as Python would."""
    place, added = name.rpartition(":")[0], [str(Path.cwd())]
    if place.endswith(".py"):
        added.insert(0, str(Path(place).expanduser().absolute().parent))
    before = list(sys.path)
    sys.path[:0] = added
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


@contextmanager
def blamed(name: str, error: type[Exception]) -> Iterator[None]:
    """Turn whatever the user's code raises into an error that says where; a shortage passes."""
    try:
        yield
    except (Exception, SystemExit) as failure:  # it may raise anything, and scripts like to exit
        if is_shortage(failure):
            raise
        reason = f"{type(failure).__name__}: {failure}"
        raise error(f"{name} failed: {reason}{_where(failure)}") from failure


def _where(error: BaseException) -> str:
    """Return the line of the user's own code that an error comes from."""
    if isinstance(error, SyntaxError):
        return ""  # its message has the line
    libraries = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), "<")
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith(libraries) and "site-packages" not in frame.filename
    ]
    return f" (line {own[-1].lineno} of {own[-1].filename}: {own[-1].line})" if own else ""
