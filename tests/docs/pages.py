"""What README, its like, and the site show: their blocks, and the commands in them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "docs/*.ipynb")
    for path in ROOT.glob(pattern)
)

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PROGRAMS = (
    "osscar",
    "python",
    "python3",
    "bash",
    "ruff",
    "mypy",
    "lint-imports",
    "mkdocs",
    "torchrun",
)


@dataclass(frozen=True)
class Command:
    """A command that a page shows, as words."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(self.words)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page that are written in a language; the cells of a notebook."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        return ["".join(cell["source"]) for cell in cells] if language == "python" else []
    return [block for name, block in _BLOCK.findall(text) if name == language]


def commands(page: str) -> Iterator[Command]:
    """The commands in the fenced blocks of a page, in order; what they print is left out."""
    for block in blocks(page, ""):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                if part.split()[:1] and part.split()[0] in _PROGRAMS:
                    yield Command(page, tuple(shlex.split(part, comments=True)))
