"""What a shared fixture has to make: that of the cases that will run."""

from __future__ import annotations

from typing import Any

import pytest


def values(request: pytest.FixtureRequest, parameter: str) -> list[Any]:
    """Return the values, each once, that a parameter takes in the tests to run of this module."""
    found: dict[Any, None] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.module is request.module:
            call = getattr(item, "callspec", None)
            if call is not None and parameter in call.params:
                found[call.params[parameter]] = None
    return list(found)
