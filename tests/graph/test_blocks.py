"""Coupling groups of the blocks that public models are made of."""

from __future__ import annotations

import pytest

import graph

from .blocks import BLOCKS
from .masking import assert_sound
from .topologies import randomized


@pytest.mark.parametrize("name", BLOCKS)
def test_groups_are_found_and_sound(name: str) -> None:
    network, example, expected = BLOCKS[name]
    model = randomized(network())
    groups = graph.trace(model, (example,)).prunable
    assert {group.name: group.units for group in groups} == expected
    for group in groups:
        assert_sound(model, group, (example,))
