"""What the tests of the product share."""

from collections.abc import Iterator

import pytest

from tests.traced import once

_OF_STRUCTURE = frozenset(
    f"test_{what}"
    for what in (
        *("alibi", "changed_code", "equivalence", "experts", "forms", "left_alone", "programs"),
        *("shrinking", "unread", "user_code"),
    )
)
"""Files about how structure is found, and what can follow: nothing is remembered there."""


@pytest.fixture(autouse=True)
def structure_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Find the structure of each architecture once in a session, but in tests of structure."""
    if request.path.stem in _OF_STRUCTURE:
        yield
        return
    with once():
        yield
