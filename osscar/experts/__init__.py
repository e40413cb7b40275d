"""Whole experts as a kind of group: what `osscar.kinds.Room` asks of one."""

from osscar.experts.declared import traced_around as traced_around
from osscar.experts.find import mixtures_in as find
from osscar.experts.routers import without_experts as masked

__all__ = ["find", "masked", "traced_around"]
