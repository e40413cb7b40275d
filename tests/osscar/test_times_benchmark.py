"""The benchmark of predicted times, on a model and a device that are pretended."""

import math

import pytest
from torch import nn

from benchmarks import times as benchmark
from osscar.allocation import speedup
from osscar.base import timing
from tests.osscar.families import tokens
from tests.osscar.pretended_clock import PretendedClock


def linear(model):
    return [one for one in model.modules() if isinstance(one, nn.Linear)]


@pytest.mark.parametrize("overlooked", [1.0, 1.25])
def test_what_the_table_does_not_see_is_the_error(overlooked, monkeypatch):
    """Layers take their weights, in the table and whole; whole smaller models some times more."""
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 3))
    inputs = tokens(64, 24).float()

    def of_operator(operator, size):
        shapes = operator.arguments_at(size, lambda shape, dtype: shape)
        return 1e-3 * math.prod(shapes.get("weight", (1,)))

    def of_model(one):
        weights = sum(layer.weight.numel() for layer in linear(one))
        return 1e-3 * weights * (overlooked if weights < dense else 1.0)

    def clock_of(task):
        return PretendedClock(task.prepared.model, task.prepared.traced, of_model, of_operator)

    dense = sum(one.weight.numel() for one in linear(model))
    monkeypatch.setattr(benchmark, "clock_of", clock_of)
    monkeypatch.setattr(speedup, "clock_of", clock_of)
    monkeypatch.setattr(timing, "WORTHWHILE_SECONDS", 0.0)
    found = list(benchmark.compared(model, inputs))
    assert [one.share for one in found] == [*benchmark.SHARES]
    for one in found:
        assert one.predicted == pytest.approx(1 / one.share, rel=0.05)
    plain, corrected = benchmark.errors(found)
    assert plain == pytest.approx([1 - 1 / overlooked] * 5, abs=0.01)
    assert len(corrected) == 4
    name, *cells, error, _ = benchmark.row("a model", found)
    assert (name, len(cells)) == ("a model", 5)
    assert cells[0] == f"{found[0].predicted:.2f}x, {found[0].measured:.2f}x"
    assert float(error.rstrip("%")) == pytest.approx(100 * (1 - 1 / overlooked), abs=1)
