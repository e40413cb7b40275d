"""Cases that always run meet every value, where there are as many of them as that takes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sampling import sample


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(0, 12))
def test_values_of_all_parameters_are_met(sizes, count):
    matrix = [set(enumerate(case)) for case in itertools.product(*map(range, sizes))]
    chosen = sample(matrix, count)
    assert len(set(chosen)) == len(chosen) == min(count, len(matrix))
    met = set().union(*(matrix[place] for place in chosen))
    for parameter, size in enumerate(sizes):
        assert len({value for at, value in met if at == parameter}) >= min(count, size)


def test_one_list_is_met_at_its_ends_and_in_between():
    assert sample([{("x", i)} for i in range(9)], 3) == [0, 8, 4]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("first", "ab")
@pytest.mark.parametrize("second", "[]")
def test_cases_of_this_test_are_sampled(first, second, request):
    always = {("a", "["), ("b", "]")}
    slow = request.node.get_closest_marker("slow") is not None
    named = any(argument.endswith(request.node.name) for argument in request.config.args)
    assert slow == ((first, second) not in always) or named
