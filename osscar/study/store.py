"""What a study knows: a table of JSON in one SQLite file, written by one process at a time."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from osscar.base.errors import OutputError
from osscar.base.json_files import parse_json

T = TypeVar("T")

_TABLE = "entries (kind TEXT, key TEXT, json TEXT, PRIMARY KEY (kind, key))"


class Store:
    """Dataclasses by kind and key, in a file that need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, kind: str, schema: type[T]) -> dict[str, T]:
        """Return what is there of a kind by key, in the order in which it was written."""
        if not self._path.exists():
            return {}
        with self._opened() as database:
            asked = "SELECT key, json FROM entries WHERE kind = ? ORDER BY rowid"
            rows = database.execute(asked, (kind,)).fetchall()
        return {key: parse_json(text, schema, self._path) for key, text in rows}

    def write(self, kind: str, entries: Mapping[str, Any]) -> None:
        """Write dataclasses by key; once this returns, all of them are on the disk."""
        texts = {key: json.dumps(dataclasses.asdict(one)) for key, one in entries.items()}
        with self._opened() as database:
            rows = [(kind, key, text) for key, text in texts.items()]
            database.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """Give a connection, whose changes become one transaction."""
        try:
            with closing(sqlite3.connect(self._path)) as database, database:
                database.execute(f"CREATE TABLE IF NOT EXISTS {_TABLE}")
                yield database
        except sqlite3.DatabaseError as error:
            raise OutputError(
                f"cannot use {self._path}: {error}; make room there, or give another directory "
                "(`--out`)"
            ) from error
