"""How far two sets of images, or of network outputs, lie apart."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of images, in dB: two N x C x H x W in [0, 1] -> N, float64.

    Equal images give infinity.

    Raises:
        ValueError: shapes that differ.
    """
    _check_shapes(a, b)
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(error)


def output_error(quantized: Tensor, full: Tensor, rows_per_group: int | None = None) -> Tensor:
    """Error energy of a network's output relative to the output's own: |q - f|^2 / |f|^2, for each group of rows.

    Args:
        quantized, full: N x ..., outputs for the same inputs.
        rows_per_group: consecutive rows that form a group, for example the inputs of one timestep; None for all.

    Returns:
        One float64 value a group. Their mean weighs the groups equally, however large their outputs are.

    Raises:
        ValueError: shapes that differ, or rows that do not fill whole groups.
    """
    _check_shapes(quantized, full)
    rows = len(full) if rows_per_group is None else rows_per_group
    if rows < 1 or len(full) == 0 or len(full) % rows:
        raise ValueError(f"{len(full)} rows cannot be cut into groups of {rows}")
    q, f = (x.double().reshape(len(full) // rows, -1) for x in (quantized, full))
    return (q - f).square().sum(1) / f.square().sum(1)


def _check_shapes(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
