"""Which timesteps the samples on their way through a network belong to, for what depends on time.

A noise-estimation network sees almost pure noise at one end of the trajectory and almost an image at the other, so one
static grid for all of it is too coarse somewhere (Q-Diffusion, Li et al. 2023, section 3.2). Timesteps are divided
into groups, one around each calibrated timestep; whoever feeds a network, or a part of it, sets the clock first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Clock(nn.Module):
    """The timestep groups of a network, and the group of each sample of the current batch.

    Shared by a network and its time-dependent quantizers. Nothing in it is saved: the timesteps are part of the
    network's configuration.

    Args:
        timesteps: one a group, ascending. A timestep belongs to the nearest, midpoints to the lower one. Without any,
            setting the clock does nothing.
    """

    timesteps: Tensor
    boundaries: Tensor

    def __init__(self, timesteps: Sequence[float] = ()):
        super().__init__()
        groups = torch.tensor(tuple(timesteps), dtype=torch.float32)
        if not bool((groups.diff() > 0).all()):
            raise ValueError(f"timesteps {tuple(timesteps)}: must ascend, without repetition")
        self.groups = len(groups)
        self.register_buffer("timesteps", groups, persistent=False)
        self.register_buffer("boundaries", (groups[:-1] + groups[1:]) / 2, persistent=False)
        self._index: Tensor | None = None

    def group_of(self, t: Tensor) -> Tensor:
        """The group of each timestep, N -> N (int64), on the clock's device."""
        return torch.bucketize(t.to(self.boundaries), self.boundaries)

    def set(self, t: Tensor) -> None:
        """From now on the batch's samples are at the timesteps ``t`` (N). Nothing is read back from the device."""
        if self.groups:
            self._index = self.group_of(t)

    def clear(self) -> None:
        """Forget the batch, so that the next one cannot take its timesteps by mistake."""
        self._index = None

    def rows(self, count: int) -> Tensor:
        """The group of each row of a tensor (int64).

        Args:
            count: rows; a multiple of the batch where each sample has several in succession, as attention heads.

        Raises:
            RuntimeError: the clock is not set, or to a batch of another size.
        """
        index = self._index
        if index is None:
            raise RuntimeError("a time-dependent quantizer needs the batch's timesteps: call clock.set(t) before")
        if count % len(index):
            raise RuntimeError(f"{count} rows for {len(index)} timesteps: call clock.set(t) with this batch's t")
        return index if count == len(index) else index[:, None].expand(-1, count // len(index)).flatten()

    def extra_repr(self) -> str:
        return f"{self.groups} groups"
