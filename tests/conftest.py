"""What all tests have in common: which of them a quick run leaves out, and which files come first."""

from __future__ import annotations

import os

import pytest

# Files that take longest, so that with several processes none of them waits for the last one's tests.
FIRST = (
    *("test_sample_ldm", "test_txt2img", "test_scores", "test_reproduce_tables", "test_loaders", "test_survival"),
    *("test_inspect_model", "test_benchmark", "test_train_latent", "test_torchrun", "test_fused"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases marked ``thorough`` are further ones of what others test too; they take time, and CI leaves them out."""
    items.sort(key=lambda item: item.path.stem not in FIRST)
    if os.environ.get("THOROUGH") == "1":
        return
    for item in items:
        if item.get_closest_marker("thorough"):
            item.add_marker(pytest.mark.skip(reason="a further case, for make test-full (THOROUGH=1)"))
