"""The first ranges of activation quantizers, from what reaches them in the network as quantized so far."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from qdiff.config import CalibrationConfig
from qdiff.graphs import recorded
from qdiff.quant_block import BaseQuantBlock
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizers import RangeObserver, TimedQuantizer, UniformAffineQuantizer

RANGE_CHUNK = 256  # samples that pass through the network at once
_WORTH_RECORDING = 8  # batches

log = logging.getLogger(__name__)

Hook = Callable[[UniformAffineQuantizer, tuple[Tensor, ...]], None]


def range_rows(samples: int, config: CalibrationConfig) -> Tensor:
    """Which samples set the first activation ranges."""
    if config.range_samples is None:
        return torch.arange(samples)
    count = min(config.range_samples, samples)
    if config.range_order == "first":
        return torch.arange(count)
    return torch.randperm(samples, generator=torch.Generator().manual_seed(config.seed))[:count]


@torch.no_grad()
def find_act_ranges(
    qnn: QuantModel, inputs: tuple[Tensor, ...], rows: Tensor | None = None, *, chunk: int = RANGE_CHUNK
) -> None:
    """Set every activation range from what reaches its quantizer, all earlier quantizers already at work.

    Grids of their own for each timestep come first, each from all samples of its timestep; then the others.

    Args:
        inputs: the network's, of the whole set.
        rows: which samples set ranges that do not depend on the timestep; None takes all.
        chunk: samples that pass through the network at once. Where there are more, their features wait on the device
            of ``inputs`` between one stage of the network and the next. Ranges from minimum and maximum are the same
            for every ``chunk``.

    Raises:
        ValueError: a timestep that has grids of its own has no sample.
        RuntimeError: a quantizer is never reached.
    """
    quantizers = qnn.act_quantizers()
    for quantizer in quantizers.values():
        quantizer.ready = False
    timed = set(qnn.timed_quantizers().values())
    if timed:
        groups = qnn.clock.group_of(inputs[1])
        for group, timestep in enumerate(qnn.config.timesteps):
            own = (groups == group).nonzero().flatten().to(inputs[0].device)
            if not len(own):
                raise ValueError(f"no calibration sample is near timestep {timestep:g}, which has ranges of its own")
            _RangeSearch(qnn, timed, group).run(tuple(x[own] for x in inputs), chunk)
    if untimed := set(quantizers.values()) - timed:
        _RangeSearch(qnn, untimed).run(inputs if rows is None else tuple(x[rows] for x in inputs), chunk)
    unseen = [path for path, quantizer in quantizers.items() if not quantizer.ready]
    if unseen:
        raise RuntimeError(f"no activation reached the quantizer {unseen[0]} ({len(unseen)} in all)")


class _Stop(Exception):  # noqa: N818 - a way out of a forward pass, not an error
    """The pass has reached what it was for."""


class _RangeSearch:
    """Sets the grids of some activation quantizers. Layers and blocks with others that have none yet stay in full.

    Args:
        chosen: which quantizers.
        group: of timesteps, the one of all samples; where the chosen quantizers are timed ones.
    """

    def __init__(self, qnn: QuantModel, chosen: Iterable[UniformAffineQuantizer], group: int | None = None):
        self.qnn, self.chosen, self.group = qnn, set(chosen), group
        self.device = next(qnn.parameters()).device
        self.missing = set(self.chosen)

    def run(self, inputs: tuple[Tensor, ...], chunk: int) -> None:
        """Args:
        inputs: the network's, of all samples that set the ranges.
        """
        with self.qnn.quant_state(True, True):
            self._leave_others_in_full()
            try:
                if len(inputs[0]) <= chunk:
                    self._at_once(inputs)
                else:
                    self._stage_by_stage([*zip(*(x.split(chunk) for x in inputs), strict=True)])
            finally:
                self.qnn.clock.clear()

    def _leave_others_in_full(self) -> None:
        for module in self.qnn.modules():
            if isinstance(module, QuantModule | BaseQuantBlock):
                own = module.act_quantizers() if isinstance(module, QuantModule) else module.block_act_quantizers()
                module.use_act_quant = all(quantizer in self.chosen or quantizer.ready for quantizer in own)

    def _at_once(self, inputs: tuple[Tensor, ...]) -> None:
        """One forward pass; each quantizer takes its grid from the first tensor that reaches it."""

        def find(quantizer: UniformAffineQuantizer, args: tuple[Tensor, ...]) -> None:
            if quantizer not in self.missing:
                return
            if self.group is None:
                quantizer.find_grid(args[0])
                self.missing.remove(quantizer)
            else:
                observer = RangeObserver(quantizer.config, len(inputs[0]))
                observer.add(args[0], len(inputs[0]))
                self._set(quantizer, observer)
            if not self.missing:
                raise _Stop

        with self._hooked(find), contextlib.suppress(_Stop):
            self.qnn(*(x.to(self.device) for x in inputs))

    def _stage_by_stage(self, parts: list[tuple[Tensor, ...]]) -> None:
        """All parts through one stage, again and again, each time as far as the first quantizer without a grid."""
        unet, storage = self.qnn.model, parts[0][0].device
        flows = [unet.begin(*part) for part in parts]
        for stage in unet.stages():
            while True:
                observers: dict[UniformAffineQuantizer, RangeObserver] = {}
                moved = []
                with self._hooked(self._observing(observers, samples=sum(len(part[0]) for part in parts))):
                    for flow, part in zip(flows, parts, strict=True):
                        self.qnn.clock.set(part[1])
                        self.part_size = len(part[0])
                        with contextlib.suppress(_Stop):
                            moving = flow.map(lambda x: x.to(self.device))
                            unet.advance(stage, moving)
                            moved.append(moving.map(lambda x: x.to(storage)))
                if not observers:
                    break
                for quantizer, observer in observers.items():
                    self._set(quantizer, observer)
            if not self.missing:
                return
            flows = moved

    def _observing(self, observers: dict[UniformAffineQuantizer, RangeObserver], samples: int) -> Hook:
        def observe(quantizer: UniformAffineQuantizer, args: tuple[Tensor, ...]) -> None:
            if quantizer in self.missing:
                observers.setdefault(quantizer, RangeObserver(quantizer.config, samples)).add(args[0], self.part_size)
                raise _Stop

        return observe

    def _set(self, quantizer: UniformAffineQuantizer, observer: RangeObserver) -> None:
        if isinstance(quantizer, TimedQuantizer):
            assert self.group is not None
            quantizer.set_group(self.group, *observer.grid())
        else:
            quantizer.set_grid(*observer.grid())
        self.missing.remove(quantizer)

    @contextlib.contextmanager
    def _hooked(self, hook: Hook) -> Iterator[None]:
        """Let ``hook`` see what reaches the chosen quantizers, before they quantize it."""
        handles = [quantizer.register_forward_pre_hook(hook) for quantizer in self.chosen]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def update_running_ranges(qnn: QuantModel, inputs: tuple[Tensor, ...], config: CalibrationConfig) -> None:
    """Average ranges over the whole set, batch by batch, every activation quantizer or those after softmax only.

    Quantizers with a grid for each timestep have seen the whole set already and are left as they are.
    """
    chosen = [
        quantizer
        for path, quantizer in qnn.act_quantizers().items()
        if not isinstance(quantizer, TimedQuantizer) and (not config.rs_sm_only or path.endswith("act_quantizer_w"))
    ]
    for quantizer in chosen:
        quantizer.averages = True
    batches = [*zip(*(x.split(config.batch_size) for x in inputs), strict=True)]
    try:
        with qnn.quant_state(True, True):
            _run_all(qnn, batches, next(qnn.parameters()).device, graphs=config.engine != "eager")
    finally:
        for quantizer in chosen:
            quantizer.averages = False
    for quantizer in chosen:
        quantizer.settle()


def _run_all(qnn: QuantModel, batches: list[tuple[Tensor, ...]], device: torch.device, *, graphs: bool) -> None:
    """Take the batches through the network, one after the other: on a GPU as replays of one CUDA graph.

    With a range to be averaged before each rounding, a pass consists of many small kernels, which take longer to launch
    than to run.
    """
    graphs = graphs and device.type == "cuda" and len(batches) >= _WORTH_RECORDING
    moved = (tuple(x.to(device) for x in batch) for batch in batches)
    qnn(*next(moved))  # here averages start
    graph = None
    if graphs:
        buffers = next(moved)
        qnn(*buffers)
        try:
            graph = recorded(lambda: qnn(*buffers), device)
        except torch.OutOfMemoryError:  # a recording cannot free what is held for others; what follows can
            log.debug("no memory to record a pass that averages ranges; each is launched anew")
    for batch in moved:
        if graph is not None and len(batch[0]) == len(buffers[0]):
            for buffer, x in zip(buffers, batch, strict=True):
                buffer.copy_(x)
            graph.replay()
        else:
            qnn(*batch)
