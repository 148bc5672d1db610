"""Which cases of a test a quick run takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thorough_but(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """For ``parametrize``: all cases, those that are not ``quick`` marked ``thorough``."""
    chosen = tuple(quick)
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.thorough) for case in cases]
