"""Whole experts as a kind of group: what `osscar.kinds.Room` asks of one."""

from osscar.experts.declared import traced_around as traced_around
from osscar.experts.find import groups_in as groups_in
from osscar.experts.routers import without_experts as masked
from osscar.experts.walk import ExpertWalk as steps
from osscar.experts.walk import linear_maps as linear_maps
from osscar.experts.walk import without as without

__all__ = ["groups_in", "linear_maps", "masked", "steps", "traced_around", "without"]
