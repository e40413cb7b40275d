"""List the benchmarks: what each tells, and how long it takes.

python -m benchmarks
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """Return the docstring of each benchmark, by its name."""
    modules = {path.stem: path for path in HERE.glob("*.py") if path != Path(__file__)}
    modules |= {path.parent.name: path for path in HERE.glob("*/__main__.py")}
    sources = {name: path.read_text(encoding="utf-8") for name, path in sorted(modules.items())}
    return {
        name: ast.get_docstring(ast.parse(source)) or ""
        for name, source in sources.items()
        if '__name__ == "__main__"' in source  # others are parts of these
    }


def main() -> None:
    """Print a row for each."""
    table = Table("python -m benchmarks.", "what it tells", "takes about", box=None, pad_edge=False)
    for name, told in benchmarks().items():
        takes = re.search(r"^Takes (.*?)\.$", told, re.MULTILINE)
        table.add_row(name, told.splitlines()[0], takes[1] if takes else "")
    Console().print(table)


if __name__ == "__main__":
    main()
