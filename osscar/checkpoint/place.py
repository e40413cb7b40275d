"""Where a checkpoint goes: what may be replaced there, and how a directory takes its place."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from osscar.base.errors import CheckpointError, OutputError
from osscar.base.files import reason_of, remedy, resolved
from osscar.base.printable import listed
from osscar.base.signals import ends_tidily, uninterrupted
from osscar.checkpoint.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    REPORT_FILE,
    read_manifest,
)
from osscar.checkpoint.runs import cannot_move, entries, prefix, recover, run_for

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_CHECKPOINT_FILES = (
    *_WEIGHTS,
    *("*.safetensors.index.json", "pytorch_model.bin.index.json"),
    *(CONFIG_FILE, "generation_config.json", MANIFEST_FILE, REPORT_FILE),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json"),
)
"""All that a directory may hold in order to be replaced, beside what its own manifest lists."""

_NAMED = 5
"""Foreign files that a message names."""


# ---- what may be written -----------------------------------------------------------------


def check_output(
    directory: str | os.PathLike[str],
    *,
    overwrite: bool,
    inputs: Sequence[str | os.PathLike[str] | None] = (),
    needed_bytes: int = 0,
) -> Path:
    """Return the output directory as a path, if it may and can be written.

    What killed runs have left beside it is put in order first. `inputs` are files and directories
    that the run needs (names that are no paths do no harm), and `needed_bytes` is how much is going
    to be written, at most.
    """
    path = resolved(directory)
    try:
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; give a directory")
        for need in _existing((os.curdir, *inputs)):
            if path == need or path in need.parents:
                raise OutputError(f"{path} would replace {need}, which is in use; give another")
        recover(path)
        _check_replaceable(path, overwrite)
        _check_writable(path, needed_bytes)
    except OSError as error:
        raise OutputError(f"cannot write to {str(directory)!r}: {reason_of(error)}") from error
    return path


def _existing(inputs: Sequence[str | os.PathLike[str] | None]) -> Iterator[Path]:
    """Yield those names that can be paths; whoever reads the others will say what is wrong."""
    for name in inputs:
        with suppress(OutputError):
            if name is not None:
                yield resolved(name)


def _check_replaceable(path: Path, overwrite: bool) -> None:
    """Refuse a directory that holds anything, or anything that must not go."""
    there = entries(path) if path.is_dir() else []
    if not there:
        return
    known = _known_names(path)
    foreign = sorted(entry.name for entry in there if not _is_known(entry, known))
    if foreign:
        raise OutputError(
            f"{path} is not empty: it holds something other than a checkpoint, which would be "
            f"lost: {listed(foreign, _NAMED)}; give another directory, or move that away"
        )
    ours = (path / MANIFEST_FILE).is_file()
    weights = any(fnmatchcase(entry.name, kind) for entry in there for kind in _WEIGHTS)
    if not ours and not (weights and (path / CONFIG_FILE).is_file()):
        raise OutputError(
            f"{path} is not empty: it holds something other than a checkpoint; "
            "give another directory"
        )
    if not overwrite:
        raise OutputError(
            f"{path} is not empty: a checkpoint is there; give another directory, or --overwrite "
            "(overwrite=True in Python) to replace it"
        )


def _known_names(path: Path) -> frozenset[str]:
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return frozenset()
    return frozenset(() if manifest is None else manifest.files)


def _is_known(entry: Path, known: frozenset[str]) -> bool:
    if entry.is_dir():  # tokenizers write no other
        return entry.name in known and entry.name == "additional_chat_templates"
    return entry.name in known or any(fnmatchcase(entry.name, kind) for kind in _CHECKPOINT_FILES)


def _check_writable(path: Path, needed_bytes: int) -> None:
    """Make a directory where the run will make its own, and compare room with need."""
    place = path if cannot_move(path) else path.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise OutputError(f"cannot write {path}: {place} is a file; give another directory")
    try:
        with uninterrupted():
            os.rmdir(tempfile.mkdtemp(prefix=prefix(path), dir=place))
    except OSError as error:
        reason = f"{reason_of(error)}{remedy(error)}"
        raise OutputError(f"cannot write to {place}: {reason}") from error
    free = shutil.disk_usage(place).free
    if needed_bytes > free:
        raise OutputError(
            f"cannot write {path}: it may take {needed_bytes / 1e6:,.0f} MB, and {place} has "
            f"{free / 1e6:,.0f} MB left; make room, or give another directory"
        )


# ---- writing -----------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give an empty directory, which takes the place of `path` once the block has succeeded.

    What was at `path` stays whole until then; if the block fails, nothing is left behind.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(ends_tidily())
            place = path if cannot_move(path) else path.parent
            place.mkdir(parents=True, exist_ok=True)
            with uninterrupted():
                run = stack.enter_context(run_for(path, place))
            recover(path)
            yield run.new
            _check_replaceable(path, overwrite)
            with uninterrupted():
                run.swap()
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {reason_of(error)}; it was left as it was{remedy(error)}"
            ) from error
