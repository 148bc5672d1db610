"""Several processes at one work (``torchrun``).

In a calibration each takes a part of every batch, and gradients are added up: every process holds the same network,
draws the same batches and ends with the same result. Images are shared out by the batch. With one process all of this
is nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Workers:
    """The processes that work together, as torch.distributed knows them."""

    @property
    def count(self) -> int:
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank() if self.count > 1 else 0

    def share(self, draws: Tensor) -> Tensor:
        """This process's columns of iterations x batch; the batch must have at least one for every process.

        Raises:
            ValueError: more processes than samples in a batch.
        """
        if draws.shape[1] < self.count:
            raise ValueError(f"a batch of {draws.shape[1]} samples cannot be shared by {self.count} processes")
        return draws.tensor_split(self.count, dim=1)[self.rank]

    def same(self, value: Any) -> Any:
        """What the first process has, in all of them: a path, a decision. Waits for it."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def collected(self, value: Any) -> list[Any] | None:
        """What each process has, in order of rank, at the first one; None at the others."""
        if self.count == 1:
            return [value]
        boxes = [None] * self.count if self.rank == 0 else None
        dist.gather_object(value, boxes, dst=0)
        return boxes

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.count > 1:
            dist.barrier()

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def summed(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients added up over all processes, in one message."""
        if self.count == 1:
            return gradients
        flat = self.total(torch.cat([g.reshape(-1).float() for g in gradients]))
        pieces = flat.split([g.numel() for g in gradients])
        return tuple(piece.view(g.shape) for piece, g in zip(pieces, gradients, strict=True))


WORKERS = Workers()


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process, where ``torchrun`` started several and none is named."""
    if str(device) == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


@contextlib.contextmanager
def joined_processes(device: torch.device) -> Iterator[None]:
    """Inside the ``with`` block the processes that ``torchrun`` started know one another; one process does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
