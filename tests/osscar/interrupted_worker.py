"""What the workers of an interrupted command run first: events are counted in them as well."""

from tests.osscar.interruptions import arm

arm()
