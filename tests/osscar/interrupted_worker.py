"""What the workers of an interrupted command run first: events are counted in them as well."""

import os

from tests.osscar.interruptions import PLAN, arm

if PLAN in os.environ:  # not where modules are only collected
    arm()
