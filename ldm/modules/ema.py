"""Exponential moving averages of parameters, under the names that published checkpoints give them.

Beside ``model.diffusion_model.out.2.weight`` such a file has ``model_ema.diffusion_modelout2weight``: without
``model.`` and without dots, which a buffer's name may not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MODEL, EMA_COPY = "model.", "model_ema."
COUNTERS = ("decay", "num_updates")


def buffer_names(parameters: Iterable[str]) -> dict[str, str]:
    """Each parameter's name and its average's, dots left out.

    Raises:
        ValueError: two of them would be the same.
    """
    names = {name: name.replace(".", "") for name in parameters}
    owners: dict[str, str] = dict.fromkeys(COUNTERS, "a counter")
    for name, short in names.items():
        if short in owners:
            raise ValueError(f"the averages of {name} and {owners[short]} would both be called {short}")
        owners[short] = name
    return names


def has_ema(state: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint's state dict carries averages."""
    return any(name.startswith(EMA_COPY) for name in state)


def with_ema_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which each parameter of ``model.`` is its average, and the averages' own names are gone.

    Names under ``model_ema.`` that belong to no parameter stay, for a strict load to report.

    Raises:
        ValueError: a parameter has no average; names it.
    """
    names = buffer_names(name.removeprefix(MODEL) for name in state if name.startswith(MODEL))
    sources = {MODEL + name: EMA_COPY + short for name, short in names.items()}
    missing = [name for name, source in sources.items() if source not in state]
    if missing:
        raise ValueError(f"{len(missing)} parameters have no moving average, as {missing[0]}: no {sources[missing[0]]}")
    used = {*sources.values(), *(EMA_COPY + counter for counter in COUNTERS)}
    return {name: state[sources.get(name, name)] for name in state if name not in used}


class EMA(nn.Module):
    """Moving averages of a module's trainable parameters, kept beside it while it is trained.

    Each update moves an average by 1 - d towards its parameter, where d is ``decay`` in the long run and
    (1 + n) / (10 + n) for the first updates n, so that the random start is soon forgotten.

    Args:
        model: its parameters are copied now.
        decay: between 0 and 1.
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"decay {decay} must lie between 0 and 1")
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names = buffer_names(trainable)
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int32))
        for name, parameter in trainable.items():
            self.register_buffer(self._names[name], parameter.detach().clone())

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the parameters as they are now into the averages."""
        self.num_updates += 1
        keep = torch.minimum(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for parameter, average in self._pairs(model):
            average.lerp_(parameter.to(average.dtype), (1 - keep).to(average))

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """The averages in the place of the parameters, which come back at the end of the block."""
        own = [(parameter, parameter.data) for parameter, _ in self._pairs(model)]
        try:
            for parameter, average in self._pairs(model):
                parameter.data = average.clone()
            yield
        finally:
            for parameter, data in own:
                parameter.data = data

    def _pairs(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
        parameters = dict(model.named_parameters())
        for name, short in self._names.items():
            yield parameters[name], self.get_buffer(short)
