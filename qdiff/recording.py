"""Recording a calibration set into its file: in little memory, by several processes, and not lost when one dies.

Until a set is whole it lies in a folder beside its place, ``<name>.part``, which knows which set it is;
``docs/formats.md`` has its files. The set's own file is there from the start, at its full size: every batch writes its
rows at each step where they belong, then marks its samples as done. The rest is arithmetic: of several processes each
takes the batches that are its own, a process that is started again takes those that nobody has marked.

Batches are cut from all samples alike, whoever works on them, so a set does not depend on the number of processes: on a
CPU not in its last digit.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ddim.untrusted import UntrustedFileError, read_json
from qdiff.calibration_data import CalibrationSetError, SampleBatch, batches, kept_steps, record_batch
from qdiff.files import locked, write_atomically
from qdiff.progress import ProgressError, flat
from qdiff.tensor_file import RowWriter, StoredTensor, TensorFile
from qdiff.version import __version__
from qdiff.workers import WORKERS

FORMAT_VERSION = 1
MANIFEST, CONTENT, DONE = "recording.json", "set.pt", "done"
POLL_SECONDS = 0.1

log = logging.getLogger(__name__)


class Conditions(Protocol):
    """Embeddings of some samples with and without their condition: each N x L x D."""

    def __call__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class SetLayout:
    """What a set holds.

    Attributes:
        n_samples, n_steps: trajectories, and model calls of each.
        image_shape: C x H x W of the network's input.
        context_shape: L x D of the embeddings, where the network takes some.
        cali_st: only the steps that a calibration with this ``--cali_st`` takes; None for all.
        half: inputs in float16.
    """

    n_samples: int
    n_steps: int
    image_shape: tuple[int, int, int]
    context_shape: tuple[int, int] | None = None
    cali_st: int | None = None
    half: bool = False

    @property
    def kept(self) -> range:
        return kept_steps(self.n_steps, self.cali_st)

    def file(self, path: Path) -> TensorFile:
        """Its file. The embeddings of a sample are the same at every step, and those without a condition those of all
        samples: the file holds each once.
        """
        n, dtype = self.n_samples, torch.float16 if self.half else torch.float32
        places = range(len(self.kept))
        structure = {
            "xs": [StoredTensor(f"x{place}", (n, *self.image_shape), dtype) for place in places],
            "ts": [StoredTensor(f"t{place}", (n,)) for place in places],
        }
        if self.context_shape is not None:
            shape = (n, *self.context_shape)
            structure["cs"] = [StoredTensor("c", shape)] * len(places)
            structure["ucs"] = [StoredTensor("uc", shape, repeated=True)] * len(places)
        return TensorFile(path, structure)

    def facts(self) -> dict[str, Any]:
        """As plain values."""
        shapes = {"image_shape": self.image_shape, "context_shape": self.context_shape}
        counts = {"n_samples": self.n_samples, "n_steps": self.n_steps, "cali_st": self.cali_st, "half": self.half}
        return {**counts, **{name: shape and list(shape) for name, shape in shapes.items()}}


def record_calibration_set(
    path: str | Path,
    sample: SampleBatch,
    layout: SetLayout,
    *,
    batch_size: int,
    decided_by: Mapping[str, Any],
    rounded_by: Mapping[str, Any] | None = None,
    conditions: Conditions | None = None,
    anew: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Record what the full-precision model sees while it samples, and go on where an earlier process stopped.

    All :data:`WORKERS` call it; it returns when the file stands at ``path``. Memory holds one batch at one step.

    Args:
        sample: runs the sampler for some images; see :data:`SampleBatch`.
        batch_size: images at once.
        decided_by: plain values, beside the layout all that decides the set.
        rounded_by: plain values that decide its last digits only, as the batch size does: when one of them is another
            than before, this is worth a warning.
        conditions: of a layout with a context.
        anew: forget what is there.
        progress: called with the number of samples that all processes have done, first before the first batch.

    Raises:
        ProgressError: what is there belongs to another set, or another process is at work on it.
        CalibrationSetError: the disk has no room for the set.
        OSError: naming a file that cannot be written; what was finished stays.
    """
    recording, first = Recording(Path(path), layout), WORKERS.rank == 0
    try:
        if first:
            recording.open(decided_by, {**(rounded_by or {}), "batch_size": batch_size}, anew=anew)
        todo = WORKERS.same(list(_missing(recording.done(), batch_size)) if first else None)
        told = progress if first and progress is not None else lambda _: None
        told(layout.n_samples - sum(map(len, todo)))
        for indices in todo[WORKERS.rank :: WORKERS.count]:
            with recording.file.rows() as rows:
                _record_rows(rows, sample, indices, layout, conditions)
            recording.mark(indices)
            if first:
                told(recording.done().count(1))
        if first:
            _wait(lambda: all(recording.done()))
            recording.finish()
        else:
            _wait(lambda: not recording.file.path.exists())
    finally:
        recording.close()


def _record_rows(
    rows: RowWriter, sample: SampleBatch, indices: range, layout: SetLayout, conditions: Conditions | None
) -> None:
    """Write one batch where it belongs, and wait until it is on the disk: ``indices`` are consecutive."""
    first = indices[0]

    def keep(place: int, t: float, x: Tensor) -> None:
        rows.write(f"x{place}", first, x)
        rows.write(f"t{place}", first, torch.full((len(x),), t))

    record_batch(sample, indices, layout.n_steps, layout.kept, keep)
    if conditions is not None:
        with_condition, without = conditions(indices)
        rows.write("c", first, with_condition)
        rows.write("uc", first, without)
    rows.sync()


def _missing(done: bytes, batch_size: int) -> Iterator[range]:
    """Batches of all samples, less those that are done: runs of consecutive numbers."""
    for cell in batches(range(len(done)), batch_size):
        for is_done, run in itertools.groupby(cell, key=done.__getitem__):
            if not is_done:
                numbers = list(run)
                yield range(numbers[0], numbers[-1] + 1)


def _wait(happened: Callable[[], bool]) -> None:
    """Look until it has: a collective call would give up on a slower process after half an hour."""
    while not happened():
        time.sleep(POLL_SECONDS)


class Recording:
    """The folder of an unfinished set.

    Attributes:
        folder: beside the place of the set.
        file: the set's, being filled.
    """

    def __init__(self, path: Path, layout: SetLayout):
        self.path, self.layout = path, layout
        self.folder = path.with_name(f"{path.name}.part")
        self.file = layout.file(self.folder / CONTENT)
        self._lock: int | None = None

    def open(self, decided_by: Mapping[str, Any], rounded_by: Mapping[str, Any], *, anew: bool) -> None:
        """Find or make the folder of this set; the first process only."""
        identity = {**decided_by, "layout": self.layout.facts()}
        versions = {"qdiff": __version__, "torch": torch.__version__, "format": FORMAT_VERSION}
        identity["software"] = {**versions, "bytes": self.file.size}  # where what lies
        identity = json.loads(json.dumps(identity))  # as it is read back: lists for tuples
        self._lock_out_others()
        before = None if anew else self._manifest()
        if before is not None:
            _check_same(self.folder, before["identity"], identity)
            for name, value in rounded_by.items():
                now, was = _short(value), _short(before["rounded_by"].get(name))
                if was != now:
                    log.warning("%s: %s is %s, was %s: the rest has other last digits", self.folder, name, now, was)
            self._check_whole()
            self._check_room()
            return
        self._remove()
        self._check_room()
        self.folder.mkdir()
        self.file.create()
        (self.folder / DONE).write_bytes(bytes(self.layout.n_samples))
        content = json.dumps({"identity": identity, "rounded_by": dict(rounded_by)}, indent=1, sort_keys=True)
        write_atomically(self.folder / MANIFEST, content.encode() + b"\n")  # last: with it the folder is complete
        self._lock_out_others()

    def done(self) -> bytes:
        """A byte for each sample: 1 where it is done."""
        return (self.folder / DONE).read_bytes()

    def mark(self, indices: range) -> None:
        """Note that samples are done, whose rows are on the disk."""
        descriptor = os.open(self.folder / DONE, os.O_WRONLY)
        try:
            os.pwrite(descriptor, b"\1" * len(indices), indices[0])
        finally:
            os.close(descriptor)

    def finish(self) -> None:
        """Give the set its name, and remove the folder."""
        self.file.seal()
        os.replace(self.file.path, self.path)
        self._remove()

    def close(self) -> None:
        """Let other processes work on the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _manifest(self) -> dict[str, Any] | None:
        """None where there is none, the folder is not complete, or no sample is done: nothing is lost then.

        Raises:
            ProgressError: samples are done, but of which set cannot be read.
        """
        there = all(path.is_file() for path in (self.folder / MANIFEST, self.file.path, self.folder / DONE))
        if not there or not any(self.done()):
            return None
        trouble = "it is no manifest"
        try:
            content = read_json(self.folder / MANIFEST)
        except UntrustedFileError as error:
            content, trouble = None, str(error)
        facts: dict[str, Any] = content if isinstance(content, dict) else {}
        if not all(isinstance(facts.get(key), dict) for key in ("identity", "rounded_by")):
            raise self._damaged(self.folder / MANIFEST, trouble)
        return facts

    def _check_whole(self) -> None:
        """What an interrupted command left has the lengths that it was made with, and marks that are marks."""
        for path, length in ((self.folder / DONE, self.layout.n_samples), (self.file.path, self.file.size)):
            found = path.stat().st_size
            if found != length:
                raise self._damaged(path, f"it has {found} bytes instead of {length}")
        if self.done().translate(None, b"\0\1"):
            raise self._damaged(self.folder / DONE, "it has other bytes than 0 and 1")

    def _damaged(self, path: Path, trouble: str) -> ProgressError:
        return ProgressError(
            f"{path}: damaged: {trouble}; start anew: remove {self.folder}, which make_calibration_data.py --force does"
        )

    def _remove(self) -> None:
        """Delete the folder if it is one of ours, and nothing else that may have its name."""
        if not self.folder.exists():
            return
        names = {name for name in os.listdir(self.folder) if not name.startswith(f".{MANIFEST}.")}
        if strangers := names - {MANIFEST, CONTENT, DONE}:
            raise ProgressError(f"{self.folder}: is in the way, with files such as {min(strangers)}; move it elsewhere")
        shutil.rmtree(self.folder)
        self.close()

    def _lock_out_others(self) -> None:
        """Let no second command write into the folder; the system ends the lock with the process."""
        try:
            self._lock = locked(self.folder / DONE)
        except (FileNotFoundError, NotADirectoryError):
            return
        except BlockingIOError:
            raise ProgressError(f"{self.folder}: another process is making this set; wait for it, or end it") from None

    def _check_room(self) -> None:
        taken = 0
        with suppress(FileNotFoundError):
            taken = self.file.path.stat().st_blocks * 512
        needed, free = self.file.size - taken, shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise CalibrationSetError(
                f"{self.path}: the set needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free; make room, "
                "keep fewer steps (--steps) or samples (--per_step), or store inputs in --half"
            )


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = flat(before), flat(now)
    said = [
        f"{name.rpartition('.')[2]} is {_short(new.get(name))}, was {_short(old.get(name))}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if said:
        shown = "; ".join(said[:5]) + (f"; and {len(said) - 5} more" if len(said) > 5 else "")
        raise ProgressError(
            f"{folder}: the samples in it are those of another set: {shown}. Go on with what it was started with; or "
            "start anew: remove the folder, which make_calibration_data.py --force does"
        )


def _short(value: Any) -> str:
    """A value, or as much of it as tells two apart."""
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
