"""The optimisation of every unit as curves for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from qdiff.calibrate import UnitProgress

FOLDER = "tensorboard"


class Curves:
    """Writes the trace of each finished unit; on the disk when :meth:`add` returns."""

    def __init__(self, writer: SummaryWriter):
        self._writer = writer

    def add(self, progress: UnitProgress) -> None:
        """Five curves of a unit's weights, or the loss and the step sizes of its activations."""
        report = progress.report
        unit = f"{report.phase}-{progress.index:03d}-{report.name}"
        for point in report.trace:
            values = {"loss": point.loss}
            if report.phase == "weights":
                values |= {
                    "rounding_loss": point.rounding_loss,
                    "temperature": point.temperature,
                    "settled": point.settled,
                }
            values |= {f"step_size_{i:02d}": step for i, step in enumerate(point.steps)}
            for name, value in values.items():
                self._writer.add_scalar(f"{unit}/{name}", value, point.iteration)
        self._writer.flush()


@contextmanager
def curves(folder: Path) -> Iterator[Curves]:
    """Start the curves of a run anew: units of earlier processes are in its progress and will be added again.

    Args:
        folder: of the run.

    Raises:
        OSError: the files cannot be written.
    """
    for earlier in (folder / FOLDER).glob("events.out.tfevents.*"):
        earlier.unlink()
    writer = SummaryWriter(str(folder / FOLDER))
    try:
        yield Curves(writer)
    except BaseException:
        with suppress(OSError):  # of the same full disk, perhaps
            writer.close()
        raise
    writer.close()
