"""The former names of `osscar.preparation.prepare`, until every room uses the new ones."""

from __future__ import annotations

from osscar.preparation.prepare import Prepared as Opened
from osscar.preparation.prepare import prepare as opened

__all__ = ["Opened", "opened"]
