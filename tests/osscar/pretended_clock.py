"""A clock on which operators and models take as long as functions say."""

from functools import partial
from timeit import Timer


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
