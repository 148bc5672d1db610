"""Copies between a GPU and pinned memory, beside what the GPU computes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class _Coming(NamedTuple):
    source: Tensor  # held, so that its ``id`` stays its own
    copy: Tensor
    end: torch.cuda.Event


class Transfers:
    """Copies of one thread, one after the other on a stream of their own.

    What was stored may be read on the host after :meth:`wait`, and copied back by :meth:`fetched` at any time. Between
    other places than a GPU and pinned memory all this is plain copying.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None  # none as long as there was nothing to do
        self._coming: dict[int, _Coming] = {}

    def expect(self, x: Tensor) -> None:
        """Begin to copy to the GPU what :meth:`fetched` will be asked for soon."""
        if not _is_pinned(x) or id(x) in self._coming:
            return
        copy, end = torch.empty_like(x, device="cuda"), torch.cuda.Event()
        stream = self._after_the_current_one()  # where the copy's memory may still be in use
        with torch.cuda.stream(stream):
            copy.copy_(x, non_blocking=True)
            end.record()
        self._coming[id(x)] = _Coming(x, copy, end)

    def fetched(self, x: Tensor, device: torch.device) -> Tensor:
        """``x`` on a device, ready for what the current stream is given next."""
        if x.device.type == device.type:
            return x.to(device)
        coming = self._coming.pop(id(x), None)
        if coming is not None:
            torch.cuda.current_stream().wait_event(coming.end)
            return coming.copy
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)  # it may be on its way from there
        return x.to(device)

    def store(self, x: Tensor, place: Tensor) -> None:
        """Copy a tensor, which nobody changes any more, to its place on the host."""
        if x.device.type != "cuda" or not _is_pinned(place):
            place.copy_(x)
            return
        stream = self._after_the_current_one()
        with torch.cuda.stream(stream):
            place.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is not given to others before

    def wait(self) -> None:
        """Wait on the host until all is done; what was expected and not fetched is not expected any more."""
        if self._stream is not None:
            self._stream.synchronize()
        self._coming.clear()

    def _after_the_current_one(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        return self._stream


def _is_pinned(x: Tensor) -> bool:
    return x.device.type == "cpu" and torch.cuda.is_available() and x.is_pinned()


@functools.cache
def transfers() -> Transfers:
    """The ones of this process."""
    return Transfers()
