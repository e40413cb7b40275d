"""What a sweep is asked for: its points, each a method at a budget.  Nothing here loads torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from osscar.base.errors import OptionError
from osscar.base.inputs import checked
from osscar.request import (
    BASELINES,
    METHODS,
    BudgetKind,
    Keep,
    PruningRequest,
    TargetKind,
    parse_size_kept,
)


@dataclass(frozen=True)
class SweepJob:
    """One point of a sweep: one of `METHODS`, or a baseline's backend, at some budget."""

    method: str
    budget: BudgetKind
    value: float

    def request(self, base: PruningRequest) -> PruningRequest:
        """Return the request of this point."""
        asked: dict[str, Any] = {self.budget: self.value}
        if self.method in METHODS:
            return dataclasses.replace(base, **asked | {"allocation": self.method})
        asked |= {"allocation": "uniform", "backend": self.method, "backend_options": {}}
        return dataclasses.replace(base, **asked, target="weights", correction_weight=None)

    def __str__(self) -> str:
        return f"{self.method} at {self.budget} {self.value:g}"


def jobs(
    budget: BudgetKind,
    values: Sequence[Keep],
    *,
    baselines: bool = False,
    allocation: str = "measured",
) -> tuple[SweepJob, ...]:
    """Return the points of a sweep, the method itself first, the largest model first."""
    read = [_number(budget, value) for value in values]
    if not read or any(isinstance(value, int) for value in read):
        raise OptionError(
            f"{budget} is {', '.join(map(str, values)) or 'empty'}, and a sweep takes a list of it "
            f"relative to the dense model's; give one such as {budget.examples}"
        )
    methods = (allocation, *(BASELINES if baselines else ()))
    removes = budget in (BudgetKind.SPARSITY, BudgetKind.SPEEDUP)
    ordered = sorted(set(read), reverse=not removes)
    return tuple(SweepJob(method, budget, value) for method in methods for value in ordered)


def refuse_targets(asked: Mapping[str, Any]) -> None:
    """Refuse a quality target among the fields of a sweep's request (OptionError)."""
    for target in (one for one in TargetKind if asked.get(one) is not None):
        raise OptionError(f"a sweep has budgets, and no target; omit {target}")


def _number(budget: BudgetKind, value: Any) -> float | int:
    """Return a fraction as a plain number, which names its point, and a count as it is."""
    value = checked(budget, PruningRequest.__annotations__[budget], value)
    if budget in (BudgetKind.PARAMS, BudgetKind.SIZE, BudgetKind.MEMORY):
        value = parse_size_kept(value)
    return value if isinstance(value, int) else float(value)
