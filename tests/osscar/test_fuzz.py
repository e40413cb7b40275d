"""Random programs of all operators that have rules: what is proved is right."""

import pytest

from benchmarks.fuzz import OTHERS, operators, run

pytestmark = pytest.mark.usefixtures("open_sizes")

EACH, PROVED = 12, 2


@pytest.mark.sampled(1)
@pytest.mark.parametrize("seed", range(10_000, 10_000 + 5 * EACH, EACH))
def test_what_is_proved_of_a_random_program_is_right(seed):
    found = list(run(EACH, seed))
    assert not [(one.seed, one.said, one.wrong) for one in found if one.wrong]
    proved = [one for one in found if one.ended == "proved"]
    assert len(proved) >= PROVED
    assert max(one.sizes for one in proved) == len(OTHERS)


def test_programs_call_every_operator_that_has_a_rule():
    names = {str(one).split(".")[1].removesuffix("_") for one in operators()}
    assert {"sum", "batch_norm", "reshape", "index_add", "scaled_dot_product_attention"} <= names
    assert len(names) > 200
