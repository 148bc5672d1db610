"""Measuring how long something takes, on a GPU and on a CPU."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Work = Callable[[], object]


def wait_for(device: torch.device | str) -> None:
    """Until a GPU has done all it was told to."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Work, device: torch.device | str) -> float:
    """Wall time of one call, all that it starts on the device included."""
    wait_for(device)
    started = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started


def median_seconds(work: Work, device: torch.device | str, *, repeats: int, warmup: int = 1) -> float:
    """Median of single calls: between two events on a GPU, by the clock on a CPU."""
    device = torch.device(device)
    for _ in range(warmup):  # allocations, choice of kernels
        work()
    if device.type != "cuda":
        return statistics.median(seconds(work, device) for _ in range(repeats))
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    with torch.cuda.device(device):
        for start, end in pairs:
            start.record()
            work()
            end.record()
    wait_for(device)
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in pairs)


def in_turn(works: Mapping[str, Work], device: torch.device | str, *, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, each of which runs everything once: a machine that slows down slows all of them.

    One round more is made at first, which warms up and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            taken = seconds(work, device)
            if number:
                times[name].append(taken)
    return times


def ratio(times: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of :func:`in_turn` of how many times longer ``name`` took than ``base``."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def seconds_of_process() -> float:
    """How long this process has run, imports included; only on Linux, elsewhere 0."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5): when it was started


def linear_fit(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Least squares y = a + b x: a, b and the share of the variance that it explains (R²)."""
    slope, intercept = statistics.linear_regression(x, y)
    mean = statistics.fmean(y)
    total = sum((value - mean) ** 2 for value in y)
    rest = sum((value - intercept - slope * at) ** 2 for at, value in zip(x, y, strict=True))
    return intercept, slope, 1 - rest / total if total else 1.0
