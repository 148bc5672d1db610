"""The factor by which a quantized network's output is too large or small, timestep by timestep, as state.

PTQD (He et al. 2023, arXiv 2305.10657, section 4.1) splits the quantization error of a noise estimate into a part
that is a multiple k of the full-precision estimate and a rest uncorrelated with it:

    quantized = (1 + k) · full + rest,    1 + k = s

The multiple is the same at step after step, so it adds up over a trajectory while the rest averages out. Dividing the
output by s removes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class OutputScale(nn.Module):
    """s(t), for quantized weights alone and with quantized activations. Linear in between, constant beyond the ends.

    Not part of ``state_dict``: the published checkpoint format has no place for it.

    Args:
        timesteps: K, ascending.
        weights: s at each of them with quantized weights only.
        activations: with quantized activations too, where they are calibrated.
    """

    def __init__(
        self, timesteps: Sequence[float], weights: Sequence[float], activations: Sequence[float] | None = None
    ):
        super().__init__()
        tables = {"timesteps": timesteps, "weights": weights, "activations": activations}
        for name, values in tables.items():
            table = None if values is None else torch.as_tensor(values, dtype=torch.float32).detach().clone()
            self.register_buffer(name, table, persistent=False)
        if not len(self.timesteps) or not bool((self.timesteps.diff() > 0).all()):
            raise ValueError("timesteps must ascend, without repetition, and be at least one")
        for name in ("weights", "activations"):
            table = getattr(self, name)
            if table is not None and (table.shape != self.timesteps.shape or not bool((table > 0).all())):
                raise ValueError(f"{name}: needs one positive scale for each of the {len(self.timesteps)} timesteps")

    def at(self, t: Tensor, *, act_quant: bool) -> Tensor:
        """s of each timestep, N -> N. Nothing is read back from the device.

        Raises:
            ValueError: no scales were fitted with quantized activations.
        """
        table = self.activations if act_quant else self.weights
        if table is None:
            raise ValueError("no output scale was fitted with quantized activations; fit it again, or remove it")
        if len(table) == 1:
            return table.expand(len(t))
        t = t.to(self.timesteps)
        right = torch.bucketize(t, self.timesteps).clamp(1, len(table) - 1)
        left = right - 1
        start, end = self.timesteps[left], self.timesteps[right]
        return torch.lerp(table[left], table[right], ((t - start) / (end - start)).clamp(0, 1))

    def correct(self, output: Tensor, t: Tensor, *, act_quant: bool) -> Tensor:
        """The output, N x ..., divided by s of its timesteps, N."""
        factor = 1 / self.at(t, act_quant=act_quant)
        return output * factor.to(output.dtype).view(-1, *(1,) * (output.dim() - 1))

    def extra_repr(self) -> str:
        return (
            f"{len(self.timesteps)} timesteps, {'weights' if self.activations is None else 'weights and activations'}"
        )
