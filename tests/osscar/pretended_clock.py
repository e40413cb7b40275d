"""A clock on which operators and models take as long as functions say."""

import math
from functools import partial
from timeit import Timer


def seconds(model):
    """As long as parameters say, those of attention three times as long, and some for all else."""
    prices = ((name, p.numel()) for name, p in model.named_parameters())
    return 1e-9 * (5_000 + sum(3 * size if "attn" in name else size for name, size in prices))


def seconds_alone(operator, size, attention=2e-9):
    """Of an operator: not quite what `seconds` has of it."""
    shapes = operator.arguments_at(size, lambda shape, dtype: shape)
    price = attention if "attn" in operator.module else 1e-9
    return price * math.prod(shapes.get("weight", (1,)))


class PretendedClock:
    """`of_model` returns the seconds of a model, `of_operator` of an operator at its sizes."""

    described = "pretended"

    def __init__(self, model, traced, of_model, of_operator):
        self.model, self.traced = model, traced
        self.of_model, self.of_operator = of_model, of_operator
        self.now, self.timed = 0.0, []

    @property
    def dense(self):
        return self._timer(self.model)

    def timer(self, model):
        self.timed.append(model)
        return self._timer(model)

    def ready(self, calls):
        return [partial(self.of_operator, *call) for call in calls]

    def _timer(self, model):
        return Timer(partial(self._run, model), timer=lambda: self.now)

    def _run(self, model):
        self.now += self.of_model(model)
