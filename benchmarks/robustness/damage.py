"""Damage at random: to bytes, to JSON at any depth, to whole files."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    97,
    10**3,
    10**6,
    10**9,
    2**31,
    2**40,
    2**63 - 1,
    2**64,
    10**30,
    10**400,
]
FLOATS = [0.5, -1.5, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")]
TEXTS = [
    "",
    "x",
    "../foreign",
    "/etc/passwd",
    "\0",
    "\ud800",
    "é" * 40,
    "a" * 5000,
    "\x1b[2J",
    "=1+1",
]
OTHERS = [None, True, False, [], {}, [{}], [[]], [1, -1], ["x"], {"type": "x"}, {"a": {"b": {}}}]
VALUES: list[Any] = [*NUMBERS, *FLOATS, *TEXTS, *OTHERS]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container with every key in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def change(value: Any, choice: random.Random, values: list[Any] = VALUES) -> Any:
    """Give a good value of JSON with one to three places damaged."""
    value = copy.deepcopy(value)
    for _ in range(choice.randint(1, 3)):
        found = list(places(value))
        if not found:
            break
        container, key = choice.choice(found[:400] if choice.random() < 0.7 else found)
        what = choice.random()
        if isinstance(container, dict) and what < 0.12:
            del container[key]
        elif isinstance(container, dict) and what < 0.2:
            container[choice.choice(["x", "", "__class__", "weight", "auto_map"])] = container[key]
        elif isinstance(container, list) and what < 0.2:
            container.append(copy.deepcopy(container[key]))
        else:
            container[key] = copy.deepcopy(choice.choice(values))
    return value


def damage(data: bytes, choice: random.Random) -> bytes:
    """Give good bytes with some changed, cut off, inserted or doubled."""
    found = bytearray(data)
    first = choice.choice([64, 400, len(data)])
    for _ in range(choice.randint(0, 4)):
        if found:
            found[choice.randrange(min(len(found), first))] = choice.randrange(256)
    match choice.randrange(5):
        case 0:
            found = found[: choice.randrange(len(found) + 1)]
        case 1:
            place = choice.randrange(len(found) + 1)
            found[place:place] = choice.randbytes(choice.randint(1, 9))
        case 2:
            found += found[: choice.randrange(200)]
        case 3:
            number = choice.choice([0, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
            found[:8] = struct.pack("<Q", number)
    return bytes(found)


def odd_json(text: str, choice: random.Random) -> bytes:
    """Give JSON whose text is odd: a key twice, deep nesting, another encoding, NaN, a megabyte."""
    odd: list[Callable[[], bytes]] = [
        lambda: text.replace("{", '{"a": 1, "a": 2, ', 1).encode(),
        lambda: b"[" * choice.choice([10, 10**5, 10**6]),
        lambda: b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
        lambda: text.encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + text.encode(),
        lambda: text.replace(": ", ": NaN, ", 1).encode(),
        lambda: b'{"a": ' + b"1" * choice.choice([30, 5000, 10**6]) + b"}",
        lambda: b'{"a": 1e999, ' + text.encode()[1:],
        lambda: choice.choice(
            [b"", b"[]", b"3", b"null", b'"x"', b"{}", b"\xff", b"{", b"\0" * 99]
        ),
        lambda: text.encode() + b" " * 10**7,
        lambda: text.encode() + b"{}",
        lambda: damage(text.encode(), choice),
    ]
    return choice.choice(odd)()


def wreck(file: Path, choice: random.Random, values: list[Any] = VALUES) -> None:
    """Damage a file of JSON, or put something else into its place."""
    text = file.read_text()
    what = choice.random()
    if what < 0.75:
        file.write_text(json.dumps(change(json.loads(text), choice, values)))
    elif what < 0.93:
        file.write_bytes(odd_json(text, choice))
    else:
        replace(file, choice)


def replace(file: Path, choice: random.Random) -> None:
    """Put something that is no file into the place of one."""
    file.unlink()
    match choice.randrange(6):
        case 0:
            file.mkdir()
        case 1:
            os.mkfifo(file)
        case 2:
            file.symlink_to("/dev/zero")
        case 3:
            file.symlink_to(file.name)
        case 4:
            file.symlink_to("../../foreign/a file")
        case 5:
            with file.open("wb") as huge:
                huge.truncate(2**33)  # a hole: it takes no room
