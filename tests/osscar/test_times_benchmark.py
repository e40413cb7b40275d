"""The benchmark of predicted times, on a model and a device that are pretended."""

import pytest
from torch import nn

from benchmarks import times as benchmark
from osscar.allocation import speedup
from tests.osscar.families import tokens
from tests.osscar.pretended_clock import PretendedClock, seconds_alone


def test_what_the_table_does_not_see_is_the_error(monkeypatch):
    """Layers take their weights, in the table and whole; whole smaller models a quarter more."""
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 3))

    def of_model(one):
        weights = sum(layer.weight.numel() for layer in one.modules() if hasattr(layer, "weight"))
        return 1e-9 * weights * (1.25 if weights < 27 * 40 else 1.0)

    def clock_of(task):
        prepared = task.prepared
        return PretendedClock(prepared.model, prepared.traced, of_model, seconds_alone)

    monkeypatch.setattr(benchmark, "clock_of", clock_of)
    monkeypatch.setattr(speedup, "clock_of", clock_of)
    found = list(benchmark.compared(model, tokens(64, 24).float()))
    assert [one.share for one in found] == [*benchmark.SHARES]
    for one in found:
        assert one.predicted == pytest.approx(1 / one.share, rel=0.05)
        assert one.measured / one.predicted == pytest.approx(0.8, abs=0.01)
    name, *cells, error = benchmark.row("a model", found)
    assert (name, len(cells)) == ("a model", 5)
    assert cells[0] == f"{found[0].predicted:.2f}x, {found[0].measured:.2f}x"
    assert float(error.rstrip("%")) == pytest.approx(20, abs=1)
