"""Groups of timesteps, and how a network and what runs parts of it share them."""

from __future__ import annotations

import copy

import pytest
import torch

from qdiff.clock import Clock


def test_a_timestep_belongs_to_the_nearest_group() -> None:
    clock = Clock((1, 29, 94, 800))
    t = torch.tensor([0, 1, 2, 14.9, 15.1, 29, 61, 62, 94, 446, 448, 800, 999])
    assert clock.group_of(t).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_midpoint_belongs_to_the_lower_timestep() -> None:
    clock = Clock((10, 20, 40))
    assert clock.group_of(torch.tensor([15.0, 15.001, 30.0, 30.001])).tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_timesteps_of_any_type(dtype: torch.dtype) -> None:
    assert Clock((10, 20)).group_of(torch.tensor([3, 18], dtype=dtype)).tolist() == [0, 1]


def test_one_group_is_for_all_timesteps() -> None:
    assert Clock((500,)).group_of(torch.tensor([0.0, 999.0])).tolist() == [0, 0]


def test_rows_follow_their_samples() -> None:
    clock = Clock((10, 20, 30))
    clock.set(torch.tensor([30.0, 10.0]))
    assert clock.rows(2).tolist() == [2, 0]
    assert clock.rows(6).tolist() == [2, 2, 2, 0, 0, 0]  # three heads a sample


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_of_another_size_is_refused(rows: int) -> None:
    clock = Clock((10, 20))
    clock.set(torch.tensor([10.0, 20.0]))
    with pytest.raises(RuntimeError, match=r"clock\.set\(t\)"):
        clock.rows(rows)


def test_a_clock_that_is_not_set_says_how_to() -> None:
    clock = Clock((10, 20))
    with pytest.raises(RuntimeError, match=r"clock\.set\(t\)"):
        clock.rows(1)
    clock.set(torch.tensor([10.0]))
    clock.clear()
    with pytest.raises(RuntimeError, match=r"clock\.set\(t\)"):
        clock.rows(1)


def test_a_clock_without_groups_can_be_set_all_the_same() -> None:
    clock = Clock()
    clock.set(torch.tensor([10.0]))
    assert clock.groups == 0


@pytest.mark.parametrize("timesteps", [(2, 1), (1, 1)])
def test_groups_must_ascend(timesteps: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must ascend"):
        Clock(timesteps)


def test_nothing_is_saved_and_copies_are_independent() -> None:
    clock = Clock((10, 20))
    assert clock.state_dict() == {}
    other = copy.deepcopy(clock)
    other.set(torch.tensor([20.0]))
    with pytest.raises(RuntimeError):
        clock.rows(1)
