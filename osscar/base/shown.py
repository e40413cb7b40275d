"""Results that show themselves: in words at a terminal, and in a notebook as their pages do."""

from __future__ import annotations

import importlib
from typing import Any


class Shown:
    """A result that shows itself, by the sections that `osscar.report` has for it.

    That lies above the rooms whose results are shown, and is loaded once one of them is.
    """

    def summary(self) -> str:
        """Return what came of it, in words and tables."""
        text: str = _report().summary(self)
        return text

    def _repr_html_(self) -> str:
        html: str = _report().fragment(self)
        return html


def _report() -> Any:
    return importlib.import_module("osscar.report.shown")
