"""How far a model is from the dense one, against sums written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from osscar.base.errors import NonFiniteError, OptionError
from osscar.base.inputs import read_distance
from osscar.data.batches import as_inputs
from osscar.distance.distance import Distance, Reference, summed_divergence
from osscar.recovery.samples import in_batches
from tests.osscar.families import tiny, tokens
from tests.osscar.recovery.perturbed import perturbed


class Table(nn.Module):
    """Puts out the row of a table that each sample names; it may be one of probabilities."""

    def __init__(self, rows, probabilities=False):
        super().__init__()
        self.rows, self.probabilities = nn.Parameter(torch.tensor(rows)), probabilities

    def forward(self, which):
        found = self.rows[which]
        return {"logits": found.softmax(-1) if self.probabilities else found}


def held_out(dense, data, distance=None, at_once=1):
    inputs = as_inputs(dense, data)
    batches = in_batches(inputs.batches(1), at_once)
    return Reference.from_run(
        Distance.from_outputs(
            dense, inputs, batches[0], read_distance(distance) if distance else None
        ),
        dense,
        batches,
    )


def divergence(dense, found):
    """Of two rows of logits, from the definition; what is impossible counts nothing."""
    p, q = ([math.exp(x) for x in row] for row in (dense, found))
    pairs = [(a / sum(p), b / sum(q)) for a, b in zip(p, q, strict=True)]
    return sum(a * (math.log(a) - math.log(b)) for a, b in pairs if a > 0)


rows = st.lists(
    st.lists(st.floats(-8, 8, width=32), min_size=3, max_size=3), min_size=2, max_size=5
)


@settings(max_examples=30)
@given(dense=rows, found=rows, probabilities=st.booleans())
def test_the_divergence_is_that_of_its_definition(dense, found, probabilities):
    count = min(len(dense), len(found))
    dense, found = dense[:count], found[:count]
    held = held_out(Table(dense, probabilities), {"which": torch.arange(count)}, at_once=2)
    assert held.distance.measure == "nats"
    assert held.distance.probabilities == probabilities
    expected = sum(map(divergence, dense, found)) / count
    distance = held.divergence(Table(found, probabilities))
    assert distance == pytest.approx(expected, rel=1e-4, abs=2e-6)


@given(rows, st.sampled_from([0.0, 1e-6, 1e-4, 1e-2]), st.integers(0, 99))
def test_a_small_divergence_is_told_from_none(dense, noise, seed):
    """It is never negative, and none of the models themselves."""
    generator = torch.Generator().manual_seed(seed)
    log_p = torch.tensor(dense).log_softmax(-1)
    log_q = (log_p + noise * torch.randn(log_p.shape, generator=generator)).log_softmax(-1)
    p, q = (one.double().log_softmax(-1) for one in (log_p, log_q))
    expected = float((p.exp() * (p - q)).sum())
    found = float(summed_divergence(log_p, log_q))
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-12)
    assert found >= 0.0
    assert float(summed_divergence(log_p, log_p)) == 0.0


def test_agreement_is_the_share_of_predictions_with_the_same_likeliest_class():
    dense, found = Table([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]]), Table([[0.0, 2.0], [0.0, 1.0]] * 2)
    held = held_out(dense, {"which": torch.arange(3)}, at_once=2)
    assert held.likeness(dense).agreement == 1.0
    assert held.likeness(found).agreement == pytest.approx(2 / 3)


@pytest.mark.parametrize("picks", [True, False])
def test_windows_that_run_at_once_are_compared_at_the_positions_of_each(picks):
    model, batch = tiny("opt", layers=1), {"input_ids": tokens(3, 7)}
    if not picks:
        whole = model.forward
        model.forward = lambda input_ids, **options: whole(input_ids, **options)
    inputs = as_inputs(model, batch["input_ids"])
    distance = Distance.from_outputs(model, inputs, batch)
    each = [distance.outputs(model, one, step=3) for one in inputs.batches(1)]
    torch.testing.assert_close(distance.outputs(model, batch, step=3), torch.cat(each))
    assert [len(one) for one in each] == [3, 3, 3]


def test_what_is_impossible_counts_nothing_and_has_no_gradient():
    held = held_out(Table([[0.0, 1.0, -math.inf]]), {"which": torch.zeros(1, dtype=torch.int64)})
    smaller = Table([[1.0, 0.5, 3.0]])
    assert held.divergence(smaller) == pytest.approx(
        divergence([0.0, 1.0, -math.inf], [1.0, 0.5, 3.0]), rel=1e-5
    )
    found = held.distance.outputs(smaller, held.batches[0])
    held.distance.summed(found, held.expected[0], held.batches[0])[0].backward()
    p = torch.tensor([0.0, 1.0, -math.inf]).softmax(0)
    torch.testing.assert_close(smaller.rows.grad[0], smaller.rows[0].detach().softmax(0) - p)
    with pytest.raises(NonFiniteError):  # where the dense one says 73 %
        held.divergence(Table([[1.0, -math.inf, 3.0]]))


class Several(nn.Module):
    """Puts out tensors of several shapes and kinds, in a tuple and a dict."""

    def __init__(self, kind=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 2)
        self.to(kind)

    def forward(self, x):
        one, two = self.one(x), self.two(x)
        wave = torch.view_as_complex(two.float())
        return one, {"two": 300 * two, "wave": wave, "which": one.argmax(-1), "nothing": 0 * two}


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_the_relative_error_is_that_of_its_definition(kind):
    dense, smaller = Several(kind), perturbed(Several(kind))
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)).to(kind)

    def outputs(model):
        one, rest = model(x)
        return [y.detach().to(torch.complex128) for y in (one, *rest.values()) if not is_whole(y)]

    def is_whole(y):
        return not (y.is_floating_point() or y.is_complex())

    errors = [
        float((b - a).abs().square().sum()) / (float(a.abs().square().sum()) or len(x))
        for a, b in zip(outputs(dense), outputs(smaller), strict=True)
    ]
    assert len(errors) == 4
    rel = 1e-5 if kind is torch.float64 else 1e-2
    found = [held_out(dense, x, at_once=size).divergence(smaller) for size in (1, 5, 12)]
    assert found == [pytest.approx(sum(errors) / 4, rel=rel)] * 3  # however they run together
    assert held_out(dense, x).divergence(dense) == 0.0


# ---- a distance of the caller's own ----------------------------------------------------------


def apart(outputs, dense, batch):
    """Weight the first output by what is read; in place, which must not stay."""
    return dense[0].sub_(outputs[0]).abs().mean(1) * batch["x"][:, 0].abs()


def test_a_distance_of_the_callers_own_takes_what_the_models_put_out_and_read():
    dense, smaller = Several(), perturbed(Several())
    x = torch.randn(6, 4)
    held = held_out(dense, x, apart, at_once=4)
    with torch.no_grad():
        expected = float(((smaller(x)[0] - dense(x)[0]).abs().mean(1) * x[:, 0].abs()).mean())
    for _ in range(2):
        assert held.divergence(smaller) == pytest.approx(expected, rel=1e-5)
    assert held.distance.measure == "own"
    with pytest.raises(OptionError, match="return 0 or more"):
        held_out(dense, x, lambda *read: -apart(*read)).divergence(smaller)


@pytest.mark.parametrize("data", ["logits", "numbers"])
def test_the_gradient_is_that_of_finite_differences(data):
    if data == "logits":
        dense = tiny("opt", layers=1).double()
        given = tokens(2, 8).clamp(min=2)  # no padding, whose embedding has no gradient
    else:
        dense, given = Several(torch.float64), torch.randn(3, 4, dtype=torch.float64)
    model = perturbed(dense)
    inputs = as_inputs(dense, given)
    (batch,) = in_batches(inputs.batches(1), 3)
    held = Reference.from_run(Distance.from_outputs(dense, inputs, batch), dense, [batch])
    assert held.divergence(dense) == pytest.approx(0.0, abs=1e-9)
    distance, (due,) = held.distance, held.expected

    def loss():
        total, count = distance.summed(distance.outputs(model, batch), due, batch)
        return total / count

    loss().backward()
    weights, generator = list(model.parameters()), torch.Generator().manual_seed(0)
    steps = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
    pairs = list(zip(weights, steps, strict=True))
    slope = sum(float((w.grad * step).sum()) for w, step in pairs if w.grad is not None)
    values = []
    h = 3e-4 if data == "logits" else 1e-6  # log-probabilities are float32
    with torch.no_grad():
        for shift in (h, -2 * h):
            for weight, step in pairs:
                weight.add_(shift * step)
            values.append(float(loss()))
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(slope, rel=1e-2)
