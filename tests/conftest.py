"""What all tests have in common: which of them a quick run leaves out."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases marked ``thorough`` are further ones of what others test too; they take time, and CI leaves them out."""
    if os.environ.get("THOROUGH") == "1":
        return
    for item in items:
        if item.get_closest_marker("thorough"):
            item.add_marker(pytest.mark.skip(reason="a further case, for make test-full (THOROUGH=1)"))
