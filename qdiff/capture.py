"""A calibration set on its way through the network: what reaches each unit, and what should leave it.

The set moves through the forward pass stage by stage. What has reached the next stage is kept, so that a whole
calibration costs a few forward passes instead of one for every unit. A unit's input is taken from the network as
quantized so far, its target from full precision (Q-Diffusion, section 3.2; BRECQ, Li et al. 2021). In a chained stage
the rows of a unit become those of the next one where they lie: its inputs what the unit, now learned, gives for them,
its targets what the next unit makes of the targets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.attention import as_if_learning
from qdiff.block_io import block_io
from qdiff.memory import (
    Kept,
    MemoryBudget,
    MemoryPlan,
    Storage,
    bytes_set_aside,
    connection_origins,
    learning_bytes,
    measure,
    sets_rounding_aside,
)
from qdiff.places import Collector, Filed, Shelf, fetched, is_filed, on_host, read_filed, unpacked
from qdiff.quant_model import QuantModel, Unit
from qdiff.transfers import transfers

log = logging.getLogger("qdiff")  # heard on the terminal too: the plan is there before the work starts


class UnitData:
    """One unit's calibration set. Where it does not fit, the last rows wait in a second one, on the host.

    Attributes:
        inputs: each positional argument of the unit's module, N x ...; half precision where it is only stored.
        target: its full-precision output, N x ...
        tail: the rows that follow these.
        pinned: they lie in host memory that a GPU can read by itself.
        room: where the tail lies in a file, of every tensor the memory of these rows with a ring behind, to which the
            tail's are read.
        t: the timestep of every row, for quantizers that depend on it.
    """

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        target: Tensor,
        tail: UnitData | None = None,
        *,
        pinned: bool = False,
        room: tuple[Tensor, ...] = (),
        t: Tensor | None = None,
    ):
        self.inputs, self.target, self.tail, self.pinned = tuple(inputs), target, tail, pinned
        self.room, self.t = room, t

    def __len__(self) -> int:
        return len(self.target) + (0 if self.tail is None else len(self.tail))

    def rows(self, index: Tensor, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
        """A batch, the given rows of inputs and target, in float32 on ``device``."""
        index, parts = index.cpu(), list(self.parts())
        direct = [device.type == "cuda" and part.pinned for part in parts]
        tensors = zip(*((*part.inputs, part.target) for part in parts), strict=True)
        *inputs, target = (_pick(pieces, index, device, direct) for pieces in tensors)
        return tuple(inputs), target

    def parts(self) -> Iterator[UnitData]:
        """This one, its tail, the tail of that, ..."""
        part: UnitData | None = self
        while part is not None:
            yield part
            part = part.tail

    def near(self, device: torch.device) -> UnitData:
        """The same on a GPU."""
        t = None if self.t is None else self.t.to(device)
        return UnitData(tuple(x.to(device) for x in self.inputs), self.target.to(device), self.tail, t=t)


def _pick(parts: Sequence[Tensor], index: Tensor, device: torch.device, direct: Sequence[bool]) -> Tensor:
    """Rows of all parts together, on ``device``, in float32; ``direct``: a part's one by one, not copied before."""
    head = parts[0]
    if bool((index < len(head)).all()):
        rows = head.index_select(0, index.to(head.device)).to(device)
    else:
        shape = (len(index), *head.shape[1:])
        form = torch.channels_last if head.dim() == 4 and head.stride(1) == 1 else torch.contiguous_format
        rows = torch.empty(shape, dtype=head.dtype, device=device, memory_format=form)
        offset = 0
        for part, one_by_one in zip(parts, direct, strict=True):
            where = ((index >= offset) & (index < offset + len(part))).nonzero().squeeze(1)
            own = index[where] - offset
            if one_by_one:
                for place, row in zip(where.tolist(), own.tolist(), strict=True):
                    rows[place].copy_(part[row], non_blocking=True)  # in order with what reads it
            elif is_filed(part):  # by calls: memory through which a file is read counts as this process's
                for place, row in zip(where.tolist(), own.tolist(), strict=True):
                    there = torch.empty_like(part[row])
                    read_filed(part[row], there)
                    rows[place] = there
            else:
                rows[where.to(device)] = part.index_select(0, own.to(part.device)).to(device)
            offset += len(part)
    return rows.float() if rows.is_floating_point() else rows


@contextlib.contextmanager
def _leaving(units: list[Unit], collectors: dict[str, Collector]) -> Iterator[None]:
    """Inside the ``with`` block whatever leaves a unit is collected."""
    handles = [
        unit.entry.register_forward_hook(lambda m, args, out, path=unit.path: collectors[path].add((out,)))
        for unit in units
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Frontier:
    """The calibration set as it stands before one stage of one network, in chunks.

    What is not kept is computed anew from the set whenever a stage takes it, through the stages that lead there, and
    rounded between them as it would be where it waits: it comes to the same numbers.

    Args:
        qnn: the network; its quantization state while a stage runs is the caller's choice.
        inputs: the network's inputs, each N x ... (noisy images, timesteps, context).
        chunk: samples run at once.
        device: where the network is; shelf: where features wait.
        kept: what waits before each stage; None: everything.
        files: where those wait that are kept in files.
        starts: of a frontier of the same set, which share them.

    Attributes:
        starts: what enters the network, chunk by chunk. Timesteps and context stay there: no stage changes them.
    """

    def __init__(
        self,
        qnn: QuantModel,
        inputs: tuple[Tensor, ...],
        *,
        chunk: int,
        device: torch.device,
        shelf: Shelf,
        kept: Sequence[Kept] | None = None,
        files: Shelf | None = None,
        starts: Sequence[Any] | None = None,
    ):
        self.unet, self.clock, self.device, self.shelf, self.kept = qnn.model, qnn.clock, device, shelf, kept
        self._files = files or shelf
        self._stages, self._origins = self.unet.stages(), connection_origins(self.unet.stages())
        self._number = 0  # of the next stage
        self._disk_was_full = False
        self._chunk = chunk
        self._size: Sequence[int] = ()  # height and width of the feature map that entered a stage last
        self._chained_units = {stage.path: qnn.units_of(stage) for stage in self._stages if stage.chained}
        if starts is None:
            # What is computed anew begins there too, and must not end with the features.
            place = shelf.keep if kept is None else lambda x: on_host(shelf.rounded(x))
            parts = zip(*(x.split(chunk) for x in inputs), strict=True)
            starts = [_once_each(self.unet.begin(*(x.to(device) for x in part)), place) for part in parts]
        self.starts = list(starts)
        self._flows: list[Any] = list(starts)

    def waiting(self) -> Iterator[Tensor | Filed]:
        """Everything that waits, as often as it is waited for."""
        seen: list[Any] = []

        def note(x: Any) -> Any:
            seen.append(x)
            return x

        for flow in (*self.starts, *self._flows):
            if flow is not None:
                flow.map(note)
        return iter(seen)

    def replace(self, others: dict[int, Tensor]) -> None:
        """Let other tensors wait in the place of some, by ``id``."""
        self.starts, self._flows = (
            [flow if flow is None else flow.map(lambda x: others.get(id(x), x)) for flow in flows]
            for flows in (self.starts, self._flows)
        )

    @property
    def flows(self) -> Iterator[Any]:
        """What waits before the next stage, with all that the stage takes, chunk by chunk."""
        self._read_ahead()
        for index in range(len(self._flows)):
            self._expect(index + 1)
            yield self._complete(index)

    def _read_ahead(self) -> None:
        """Have read what waits in files before the next stage, in the order in which the chunks take it."""
        if self.device.type != "cuda":
            return
        stage = self._stages[self._number]
        taken = itertools.chain.from_iterable(_taken(flow, stage) for flow in filter(None, self._flows))
        block_io().expect(x.piece for x in taken if isinstance(x, Filed))

    def _expect(self, index: int, *, behind: bool = False) -> None:
        """Have a chunk brought to the GPU while the one before is computed, if it waits on the host.

        Args:
            behind: with what the stage after the next one takes beside what that one does.
        """
        flow = self._flows[index] if index < len(self._flows) else None
        if flow is None:
            return
        stage, *after_it = self._stages[self._number : self._number + 2]
        taken = _taken(flow, stage)
        for after in after_it if behind else []:  # what both take is expected once
            skips = [*(flow.skips[:-1] if stage.joins else flow.skips), *([None] if stage.leaves else [])]
            taken += _taken(dataclasses.replace(flow, skips=skips), after)
        for x in taken:
            if isinstance(x, Tensor):
                transfers().expect(x)

    def _complete(self, index: int) -> Any:
        """A chunk before the next stage; of what was not kept, all that the stage takes was computed anew."""
        flow = self._flows[index]
        return self._anew(index, self._number) if flow is None else self._joined(flow, index, self._number)

    def _joined(self, flow: Any, index: int, number: int) -> Any:
        """A chunk before a stage, with the U connection that the stage joins."""
        if not self._stages[number].joins or flow.skips[-1] is not None:
            return flow
        origin = self._origins[number]
        assert origin is not None  # the stage joins a connection, which one before it left
        skip = self._anew(index, origin).skips[-1]
        return dataclasses.replace(flow, skips=[*flow.skips[:-1], skip])

    def _anew(self, index: int, number: int) -> Any:
        """A chunk before a stage, from the set."""
        flow = self.starts[index]
        for stage in self._stages[:number]:
            flow = _once_each(self._moved(flow, stage), self.shelf.rounded)
        return flow

    @torch.no_grad()
    def outputs(self, stage: Any, units: list[Unit], place: Callable[[Unit], Collector]) -> dict[str, Collector]:
        """Move the whole set through a stage, and return what leaves each unit, by path."""
        collectors = {unit.path: place(unit) for unit in units}
        with _leaving(units, collectors):
            self.advance(stage)
        return collectors

    @torch.no_grad()
    def inputs(self, unit: Unit, collector: Collector) -> Collector:
        """Collect what reaches a unit; its stage is run no further than that."""
        for flow in self.flows:
            self._reach(unit, flow, collector)
        return collector

    @torch.no_grad()
    def output(self, unit: Unit, collector: Collector) -> Collector:
        """Collect what leaves a unit; its stage is run no further than that."""
        for flow in self.flows:
            self._reach(unit, flow, collector, behind=True)
        return collector

    @torch.no_grad()
    def advance(self, stage: Any, reached: tuple[Unit, Collector] | None = None) -> None:
        """Move the whole set through one stage.

        Args:
            reached: a unit of the stage after it, and where to collect what reaches that one: on the way, each chunk
                still where it was computed.
        """
        if stage != self._stages[self._number]:
            raise RuntimeError(f"{stage.path} is not the next stage, which is {self._stages[self._number].path}")
        self._read_ahead()
        for index in range(len(self._flows)):
            self._expect(index + 1, behind=reached is not None)
            moved = _once_each(self._moved(self._complete(index), stage), self.shelf.rounded)
            self._flows[index] = self._stored(moved, index)
            if reached is not None:
                unit, collector = reached
                self._reach(unit, self._joined(moved, index, self._number + 1), collector)
        self._number += 1

    def _reach(self, unit: Unit, flow: Any, collector: Collector, *, behind: bool = False) -> None:
        """Run a chunk before the unit's stage up to the unit, and collect what comes there; or what leaves it."""

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            collector.add(args)
            raise _Reached

        def stop_behind(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            stop(module, (out,))

        entry = unit.entry
        handle = entry.register_forward_hook(stop_behind) if behind else entry.register_forward_pre_hook(stop)
        try:
            self._moved(flow, unit.stage)
        except _Reached:
            return
        finally:
            handle.remove()
        raise RuntimeError(f"{unit.path} is not reached in its stage")

    def handed_on(self, unit: Unit, start: int, out: Tensor) -> tuple[Tensor, ...]:
        """What reaches the unit behind one of a chained stage, given a chunk of what that one gives.

        Args:
            start: number of the chunk's first sample.
        """
        context = self._fetched(self._waiting_or_first(start).context)
        arguments = self.unet.handed_on(unit.stage, unit.path, out, context, self._size)
        return tuple(map(self._as_in_rows, arguments))

    def _as_in_rows(self, x: Tensor) -> Tensor:
        """``x`` as it comes back from where a unit's rows wait: its last bits, and the layout in memory."""
        last = x.dim() == 4 and x.device.type == "cuda"
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        return unpacked(self.shelf.rounded(x))

    def set_clock(self, start: int) -> None:
        """Tell the network the timesteps of the chunk that begins with a sample."""
        self.clock.set(self._fetched(self._waiting_or_first(start).t))

    def _waiting_or_first(self, start: int) -> Any:
        """The chunk that begins with a sample, wherever it is: for what no stage changes."""
        number = start // self._chunk
        return self._flows[number] or self.starts[number]

    def _moved(self, flow: Any, stage: Any) -> Any:
        """A chunk behind the stage, what it took and gives where it was computed."""
        moved = flow.for_stage(stage, self._fetched)
        self.clock.set(moved.t)
        self._size = moved.h.shape[2:]
        with as_if_learning(), self._as_rows_between_units(stage):
            self.unet.advance(stage, moved)
        return moved

    def _fetched(self, x: Tensor) -> Tensor:
        return unpacked(fetched(x, self.device))

    @contextlib.contextmanager
    def _as_rows_between_units(self, stage: Any) -> Iterator[None]:
        """What reaches units of a chained stage is as it would come out of their rows: both ways there agree."""

        def replaced(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(map(self._as_in_rows, args))

        units = self._chained_units.get(stage.path, [])
        handles = [unit.entry.register_forward_pre_hook(replaced) for unit in units]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _stored(self, flow: Any, index: int) -> Any:
        """What shall wait of a chunk behind the next stage; None: nothing."""
        start = self.starts[index]
        flow = dataclasses.replace(flow, t=start.t, context=start.context)
        there = {id(flow.t), id(flow.context)}
        if self.kept is None or self._number + 1 >= len(self.kept):
            return _once_each(flow, lambda x: x if id(x) in there else self.shelf.keep(x))
        kept = self.kept[self._number + 1]
        if not kept.trunk:
            return None
        skips = [skip if keep else None for skip, keep in zip(flow.skips, kept.skips, strict=True)]
        shelves = {
            id(skip): self._files if filed else self.shelf
            for skip, filed in zip(skips, kept.filed_skips or [False] * len(skips), strict=True)
            if skip is not None
        }
        trunk = self._files if kept.filed else self.shelf
        shelves[id(flow.h)] = trunk  # the newest connection may be the feature map itself
        flow = dataclasses.replace(flow, skips=skips)
        try:
            return _once_each(flow, lambda x: x if id(x) in there else shelves.get(id(x), trunk).keep(x))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            if not self._disk_was_full:
                log.warning("%s: what has no room there is computed anew from now on", error)
            self._disk_was_full = True
            return None


def _taken(flow: Any, stage: Any) -> list[Any]:
    """What a stage takes of a chunk, in the order in which it is fetched; None for what is not there yet."""
    return [
        *(flow.skips[-1:] if stage.joins else []),
        *([flow.context] if stage.attends else []),
        *([flow.temb] if stage.timed else []),
        flow.h,
        flow.t,
    ]


def _once_each(flow: Any, place: Callable[[Tensor], Tensor]) -> Any:
    """A flow whose tensors went through ``place``; a feature that leads on and waits for the way up too did so once."""
    placed: dict[int, Tensor] = {}
    return flow.map(lambda x: placed[id(x)] if id(x) in placed else placed.setdefault(id(x), place(x)))


class _Reached(Exception):  # noqa: N818 - nothing went wrong
    """The unit in question is about to run."""


class PairedCapture:
    """Both networks' frontiers, quantized and full-precision, moving together.

    Args:
        act_quant: activations of the quantized network are quantized too (second phase).
        chunk: samples that pass through a network at once, where memory allows.
        compact: features wait in half precision.
        budget: what they may take; None takes what is free.
        wanted: paths of the units whose inputs will be asked for; None: of all.
        batch: samples that units will learn from at once, for which memory is left.
        deterministic: attention is not fused.

    Attributes:
        memory: the plan of where everything waits.
    """

    def __init__(
        self,
        qnn: QuantModel,
        inputs: tuple[Tensor, ...],
        *,
        act_quant: bool,
        chunk: int,
        compact: bool = False,
        budget: MemoryBudget | None = None,
        wanted: Collection[str] | None = None,
        batch: int = 0,
        deterministic: bool = False,
    ):
        self.qnn, self.act_quant, self.wanted = qnn, act_quant, wanted
        self.device = next(qnn.parameters()).device
        self.t = inputs[1].to(self.device)
        if self.device.type == "cuda":  # the layout that tensor cores read; every layer keeps it
            inputs = tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
        sizes = measure(qnn, tuple(x[:1].to(self.device) for x in inputs), compact=compact)
        self.memory = MemoryPlan.make(
            sizes,
            len(inputs[0]),
            budget,
            self.device,
            chunk=chunk,
            compact=compact,
            batch=batch,
            maps=act_quant or deterministic,
            passing_maps=deterministic,
            learning_bytes=learning_bytes(qnn, weights=not act_quant, variables_stay=not sets_rounding_aside(budget)),
            aside_bytes=0 if act_quant else bytes_set_aside(qnn, budget),  # they are there in the second phase
            stage_seconds=lambda count: self._stage_seconds(tuple(x[:count] for x in inputs)),
        )
        log.info("%s: %s", "activations" if act_quant else "weights", self.memory)
        self._storage = Storage(self.memory)
        frontier = functools.partial(
            Frontier,
            qnn,
            inputs,
            chunk=self.memory.chunk,
            device=self.device,
            shelf=self._storage.shelf(),
            files=self._storage.files(),
        )
        kept = zip(*self.memory.kept(), strict=True) if self.memory.features == "partly" else (None, None)
        of_quantized, of_full = kept
        self._quantized = frontier(kept=of_quantized)
        self._full = frontier(kept=of_full, starts=self._quantized.starts)
        self._full_is_ahead = False
        self._reached: dict[str, Collector] = {}  # inputs that were collected on the way
        self._last: tuple[Unit, Collector, Collector] | None = None  # a unit's inputs and targets that can be handed on

    @torch.no_grad()
    def _stage_seconds(self, inputs: tuple[Tensor, ...]) -> list[float]:
        """How long these samples take through each stage of the network as it is quantized in this phase."""
        inputs = tuple(x.to(self.device) for x in inputs)
        self.qnn.clock.set(inputs[1])
        unet, taken = self.qnn.model, []
        for _ in range(2):  # the first time loads what is needed
            flow = unet.begin(*inputs)
            times = [self._now()]
            with self.qnn.quant_state(True, self.act_quant), as_if_learning():
                for stage in unet.stages():
                    unet.advance(stage, flow)
                    times.append(self._now())
            taken.append([after - before for before, after in itertools.pairwise(times)])
        self.qnn.clock.clear()
        return list(map(min, zip(*taken, strict=True)))

    def _now(self) -> float:
        """In seconds; all that was given to the GPU is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def stages(self) -> Iterator[Any]:
        """Every stage with units in it, in order; the capture moves on when the next one is asked for."""
        stages = self.qnn.model.stages()
        for stage, after in zip(stages, [*stages[1:], None], strict=True):
            if units := self.qnn.units_of(stage):
                self._make_room(max(self.memory.unit_on_host(unit.path) for unit in units))
                yield stage
            self._reached.clear()
            self._last = None
            unit = None if after is None else next(filter(self._wants, self.qnn.units_of(after)), None)
            with self.qnn.quant_state(True, self.act_quant):
                self._quantized.advance(stage, None if unit is None else (unit, self._on_the_way(unit)))
            if not self._full_is_ahead:
                with self.qnn.quant_state(False, False):
                    self._full.advance(stage)
            self._full_is_ahead = False
        block_io().expect(())  # what was announced last holds a file
        transfers().wait()

    def _make_room(self, size: int) -> None:
        """See to it that a unit's rows find a stretch of pinned memory where there is room but in pieces."""
        arena = self._storage.arena
        if arena is None or arena.longest >= size or arena.free_bytes < size:
            return
        transfers().wait()
        frontiers = (self._quantized, self._full)
        waiting = itertools.chain.from_iterable(frontier.waiting() for frontier in frontiers)
        moved = arena.moved_together([x for x in waiting if isinstance(x, Tensor) and arena.holds(x)])
        for frontier in frontiers:
            frontier.replace(moved)

    def _wants(self, unit: Unit) -> bool:
        return self.wanted is None or unit.path in self.wanted

    def _on_the_way(self, unit: Unit) -> Collector:
        """Where the inputs of the next stage's first unit go while the stage before is passed."""
        self._make_room(self.memory.unit_on_host(unit.path))
        self._reached[unit.path] = self._storage.collector(unit)
        return self._reached[unit.path]

    def targets_from(self, unit: Unit) -> dict[str, Collector]:
        """A unit's full-precision outputs, and those of all others of its stage where there is room for them.

        To be asked for in the network's order, each unit's once; not for those whose rows are handed on to them.
        """
        units = [other for other in self.qnn.units_of(unit.stage) if self._wants(other)]
        if self.memory.together([other.path for other in units]):
            return self.targets(unit.stage)
        with self.qnn.quant_state(False, False):
            if unit != units[-1] and not self._hands_on_from(unit):
                return {unit.path: self._full.output(unit, self._storage.collector(unit))}
            self._full_is_ahead = True
            return self._full.outputs(unit.stage, [unit], self._storage.collector)

    def targets(self, stage: Any) -> dict[str, Collector]:
        """Full-precision outputs of all units of a stage, in one sweep. Can be asked for once."""
        if self._full_is_ahead:
            raise RuntimeError(f"the targets of {stage.path} were handed out already")
        self._full_is_ahead = True
        with self.qnn.quant_state(False, False):
            return self._full.outputs(stage, self.qnn.units_of(stage), self._storage.collector)

    def inputs(self, unit: Unit) -> Collector:
        """What reaches a unit from the network as quantized so far, the units before it in its stage included."""
        if unit.path in self._reached:
            return self._reached.pop(unit.path)
        with self.qnn.quant_state(True, self.act_quant):
            return self._quantized.inputs(unit, self._storage.collector(unit))

    def data(self, unit: Unit, targets: dict[str, Collector]) -> UnitData:
        """A unit's inputs and its target, which is taken out of ``targets`` (of its stage, see :meth:`targets`)."""
        return self._lent(unit, self.inputs(unit), targets.pop(unit.path))

    def handed_on(self, unit: Unit, targets: dict[str, Collector]) -> UnitData | None:
        """A unit's inputs and target out of those of the one before it in its stage, which are no more then.

        None where that one's were not asked for last, or the stage is not chained: see :meth:`data`.

        Args:
            targets: of its stage, from which its own is taken where it is there.
        """
        last, self._last = self._last, None
        if last is None:
            return None
        before, inputs, target = last
        if before != self._before(unit):
            return None

        def given(start: int, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            self._quantized.set_clock(start)
            return self._quantized.handed_on(before, start, before.entry(*arguments))

        def wanted(start: int, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (out,) = outputs
            return (unit.entry(*self._full.handed_on(before, start, out)),)

        with as_if_learning():
            with self.qnn.quant_state(True, self.act_quant):
                inputs.become(given, self.memory.chunk)
            if unit.path in targets:
                return self._lent(unit, inputs, targets.pop(unit.path))
            with self.qnn.quant_state(False, False):
                target.become(wanted, self.memory.chunk)
        return self._lent(unit, inputs, target)

    def _lent(self, unit: Unit, inputs: Collector, target: Collector) -> UnitData:
        units = self.qnn.units_of(unit.stage)
        self._last = (unit, inputs, target) if unit.stage.chained and unit != units[-1] else None
        return unit_data(inputs, target, self.t)

    def _before(self, unit: Unit) -> Unit | None:
        """The unit before one in its stage."""
        units = self.qnn.units_of(unit.stage)
        number = units.index(unit)
        return units[number - 1] if number else None

    def _hands_on_from(self, unit: Unit) -> bool:
        """Whether all that is wanted of a stage behind a unit comes out of that unit's rows."""
        if not unit.stage.chained:
            return False
        units = self.qnn.units_of(unit.stage)
        behind = [self._wants(other) for other in units[units.index(unit) + 1 :]]
        return behind == sorted(behind, reverse=True)  # no gap


def unit_data(inputs: Collector, target: Collector, t: Tensor | None = None) -> UnitData:
    """What two collectors hold, as one set, with the timesteps of its rows."""
    x, y = inputs.parts(), target.parts()
    filed = UnitData(x.filed, y.filed[0]) if len(y.filed[0]) else None
    room = (*x.room, *y.room) if filed is not None else ()
    far = UnitData(x.far, y.far[0], filed, pinned=True, room=room) if len(y.far[0]) or filed is not None else None
    return UnitData(x.near, y.near[0], far, t=t)


def observe_unit(
    qnn: QuantModel, unit: Unit, inputs: tuple[Tensor, ...], batch_size: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    """One unit's inputs and output over a whole set, with the network in the quantization state it is in."""
    device = next(qnn.parameters()).device
    frontier = Frontier(qnn, inputs, chunk=batch_size, device=device, shelf=Shelf("gpu", compact=False))
    rows = len(inputs[0])
    for stage in qnn.model.stages():
        if stage == unit.stage:
            reached = frontier.inputs(unit, Collector(rows, rows, compact=False)).parts().near
            left = frontier.outputs(stage, [unit], lambda _: Collector(rows, rows, compact=False))[unit.path]
            return reached, left.parts().near[0]
        frontier.advance(stage)
    raise ValueError(f"{unit.path}: its stage is not one of this network's")
