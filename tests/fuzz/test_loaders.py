"""Hostile and broken files: a loader returns what the file says, or refuses with a short message.

``FUZZ_CASES`` says how many cases each loader meets; ``make test-full`` takes 2000.
"""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .loaders import LOADERS, REFUSALS, Loader, same
from .mutations import spoiled

CASES = int(os.environ.get("FUZZ_CASES", "200"))
LINES = 5
ROOM = 100 << 20  # bytes that a loader may take beside what it returns and twice the file

fuzzing = settings(
    max_examples=CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", LOADERS)
def test_valid_files_are_read(name: str, tmp_path: Path) -> None:
    loader = LOADERS[name]
    path = loader.make(tmp_path)
    assert agrees(loader, path)


def agrees(loader: Loader, path: Path) -> bool:
    """Whether a loader returns what another reader finds in the file."""
    found = loader.load(path)
    expected = loader.expected(path)
    return expected is None or same(found, expected)


@pytest.mark.timeout(max(600, CASES))
@pytest.mark.parametrize("name", LOADERS)
def test_spoiled_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = LOADERS[name]
    valid = tmp_path / "valid"
    valid.mkdir()
    relative = loader.make(valid).relative_to(valid)
    monkeypatch.chdir(tmp_path)
    agrees(loader, loader.make(valid))  # what is loaded once and for all
    outcomes = {"read": 0, "refused": 0}

    @fuzzing
    @given(st.data())
    def meet(data: st.DataObject) -> None:
        mutate = data.draw(spoiled(valid / relative, *loader.formats))
        case = tmp_path / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(valid, case)
        mutate(case / relative)
        size = (case / relative).stat().st_size
        before = peak()
        try:
            found = loader.load(case / relative)
        except REFUSALS as error:
            assert 1 <= len(str(error).strip().splitlines()) <= LINES, f"a message of another length: {error}"  # noqa: PT017
            outcomes["refused"] += 1
            assert peak() - before < ROOM + 2 * size
        else:
            assert peak() - before < ROOM + 3 * size  # what it returns is once the file, or a widened half of it
            expected = loader.expected(case / relative)
            assert expected is None or same(found, expected), "other values than those of the file"
            outcomes["refused" if found is None else "read"] += 1

    with torch.random.fork_rng():
        meet()
    assert outcomes["refused"] > CASES // 20, outcomes
    assert not (tmp_path / "fuzz-was-here").exists()
