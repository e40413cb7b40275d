"""Whole experts as a kind of group: what `osscar.kinds.Room` asks of one."""

from osscar.routing.declared import traced_around as traced_around
from osscar.routing.find import groups_in as groups_in
from osscar.routing.routers import without_experts as masked
from osscar.walk.expert_walk import ExpertWalk as steps
from osscar.walk.expert_walk import linear_maps as linear_maps
from osscar.walk.expert_walk import without as without

__all__ = ["groups_in", "linear_maps", "masked", "steps", "traced_around", "without"]
