"""Packages that only some installations have."""

from __future__ import annotations

import pytest

from osscar.recovery.weights import has_peft

needs_peft = pytest.mark.skipif(not has_peft(), reason="adapters need the extra osscar[recover]")
