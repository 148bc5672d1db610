"""CUDA graphs: work that is recorded once and launched as a whole."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator

import torch


@functools.cache
def side_stream(device: torch.device, purpose: str, *, first: bool = False) -> torch.cuda.Stream:
    """The one stream beside the current one for a purpose.

    cuBLAS takes a workspace of tens of megabytes for each stream that it is called on and keeps it: a new stream for
    each of many graphs would use up a gigabyte.

    Args:
        first: what runs there is given a place before what runs elsewhere: little work that waits for long.
    """
    return torch.cuda.Stream(device, priority=-1 if first else 0)


def recorded(work: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph of some work that was done before: all that it needs is loaded by then.

    Args:
        work: free of traffic between device and host. Tensors that it makes and leaves lie in the graph's memory.

    Raises:
        torch.OutOfMemoryError: there is no room for what it takes, beside what is in use.
    """
    stream, graph = side_stream(device, "recording"), torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    stream.wait_stream(torch.cuda.current_stream(device))
    with recording(graph, stream):
        work()
    return graph


@contextlib.contextmanager
def recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """Record the ``with`` block's work into a graph, as :class:`torch.cuda.graph`, with garbage left alone meanwhile.

    Whatever the garbage collector happens to free may call into CUDA (pinned memory is unregistered), and such a call
    ends a recording with an error.
    """
    with holding_garbage(), torch.cuda.graph(graph, stream=stream):
        yield


@contextlib.contextmanager
def holding_garbage() -> Iterator[None]:
    """No garbage is collected inside the ``with`` block."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
