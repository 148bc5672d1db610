"""How a quantized network's output is systematically off, timestep by timestep, as state.

PTQD (He et al. 2023, arXiv 2305.10657, section 4.1) splits the quantization error of a noise estimate into a part
that is a multiple k of the full-precision estimate and a rest uncorrelated with it. The rest has a mean, which differs
from pixel to pixel:

    quantized = s · full + m + rest,    s = 1 + k

Multiple and mean are the same at step after step, so they add up over a trajectory while the rest averages out.
Subtracting m and dividing by s removes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class OutputScale(nn.Module):
    """s(t) and m(t), for quantized weights alone and with quantized activations.

    Linear in between, constant beyond the ends.

    Not part of ``state_dict``: the published checkpoint format has no place for it.

    Args:
        timesteps: K, ascending.
        weights: s at each of them with quantized weights only.
        activations: with quantized activations too, where they are calibrated.
        weights_mean, activations_mean: m at each of them, K x C x H x W, where it was fitted.
    """

    timesteps: Tensor
    weights: Tensor
    activations: Tensor | None
    weights_mean: Tensor | None
    activations_mean: Tensor | None

    def __init__(
        self,
        timesteps: Sequence[float] | Tensor,
        weights: Sequence[float] | Tensor,
        activations: Sequence[float] | Tensor | None = None,
        weights_mean: Tensor | None = None,
        activations_mean: Tensor | None = None,
    ):
        super().__init__()
        tables = {"timesteps": timesteps, "weights": weights, "activations": activations}
        means = {"weights_mean": weights_mean, "activations_mean": activations_mean}
        for name, values in (tables | means).items():
            table = None if values is None else torch.as_tensor(values, dtype=torch.float32).detach().clone()
            self.register_buffer(name, table, persistent=False)
        if self.timesteps.dim() != 1 or not len(self.timesteps) or not bool((self.timesteps.diff() > 0).all()):
            raise ValueError("timesteps must ascend, without repetition, and be at least one")
        for name in ("weights", "activations"):
            table = getattr(self, name)
            if table is not None and (table.shape != self.timesteps.shape or not bool((table > 0).all())):
                raise ValueError(f"{name}: needs one positive scale for each of the {len(self.timesteps)} timesteps")
            mean = getattr(self, f"{name}_mean")
            if mean is not None and (table is None or mean.dim() != 4 or len(mean) != len(self.timesteps)):
                raise ValueError(f"{name}_mean: needs one map for each of the {len(self.timesteps)} timesteps")
        if not all(bool(table.isfinite().all()) for table in self.tables.values()):
            raise ValueError("holds NaN or infinite values")

    @property
    def tables(self) -> dict[str, Tensor]:
        """All that is there, by the names of the arguments."""
        return dict(self.named_buffers())

    def without_means(self) -> OutputScale:
        """The same with the scale alone."""
        return OutputScale(self.timesteps, self.weights, self.activations)

    def at(self, t: Tensor, *, act_quant: bool) -> Tensor:
        """s of each timestep, N -> N. Nothing is read back from the device.

        Raises:
            ValueError: no scales were fitted with quantized activations.
        """
        table = self.activations if act_quant else self.weights
        if table is None:
            raise ValueError("no output scale was fitted with quantized activations; fit it again, or remove it")
        return self._between(table, t)

    def mean_at(self, t: Tensor, *, act_quant: bool) -> Tensor | None:
        """m of each timestep, N -> N x C x H x W, where it was fitted."""
        table = self.activations_mean if act_quant else self.weights_mean
        return None if table is None else self._between(table, t)

    def _between(self, table: Tensor, t: Tensor) -> Tensor:
        if len(table) == 1:
            return table.expand(len(t), *table.shape[1:])
        t = t.to(self.timesteps)
        right = torch.bucketize(t, self.timesteps).clamp(1, len(table) - 1)
        left = right - 1
        start, end = self.timesteps[left], self.timesteps[right]
        share = ((t - start) / (end - start)).clamp(0, 1)
        return torch.lerp(table[left], table[right], share.view(-1, *(1,) * (table.dim() - 1)))

    def correct(self, output: Tensor, t: Tensor, *, act_quant: bool) -> Tensor:
        """The output, N x ..., less m of its timesteps, N, divided by their s.

        Raises:
            ValueError: m was fitted for outputs of another size.
        """
        factor = 1 / self.at(t, act_quant=act_quant)
        mean = self.mean_at(t, act_quant=act_quant)
        if mean is not None:
            if mean.shape[1:] != output.shape[1:]:
                fitted, asked = ("x".join(map(str, x.shape[1:])) for x in (mean, output))
                raise ValueError(f"the checkpoint's mean error was measured for outputs of {fitted}, not {asked}")
            output = output - mean.to(output.dtype)
        return output * factor.to(output.dtype).view(-1, *(1,) * (output.dim() - 1))

    def extra_repr(self) -> str:
        return f"{len(self.timesteps)} timesteps, {', '.join(name for name in self.tables if name != 'timesteps')}"
