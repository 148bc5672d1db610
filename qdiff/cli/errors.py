"""From exceptions to what a user reads: one line that says what is wrong and what to do, and an exit status."""

from __future__ import annotations

import errno
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from ddim.config import ConfigError
from ddim.pretrained import CheckpointUnavailable
from qdiff.calibration_data import CalibrationSetError
from qdiff.checkpoint import CheckpointError
from qdiff.evaluation.errors import EvaluationError
from qdiff.inference import InferenceError
from qdiff.memory import BudgetError
from qdiff.progress import ProgressError

STATUS_WRONG_INPUT = 2


class UserError(ValueError):
    """Something the user can put right; the message says how."""


class OutOfMemoryError(UserError):
    """The device's memory is too small for the settings."""


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end.

    Attributes:
        status: what a shell reports for a process that the signal ended.
    """

    def __init__(self, number: int = signal.SIGINT):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


EXPLAINED = (
    UserError,
    BudgetError,
    InferenceError,
    ConfigError,
    CalibrationSetError,
    CheckpointError,
    CheckpointUnavailable,
    EvaluationError,
    ProgressError,
)


@contextmanager
def exit_on_error(program: str, *, verbose: bool = False) -> Iterator[None]:
    """End the process with one line on standard error for each kind of failure that users meet, and for SIGINT and
    SIGTERM.

    Anything else is a mistake of ours and keeps its traceback.

    Args:
        program: what the message starts with.
        verbose: print the traceback too.
    """
    with _signals_as_exceptions():
        try:
            yield
        except KeyboardInterrupt as stop:
            print(f"\n{program}: stopped; finished files are whole{_how_to_go_on(stop)}", file=sys.stderr)
            raise SystemExit(getattr(stop, "status", Stopped().status)) from None
        except (*EXPLAINED, OSError) as error:
            if verbose:
                traceback.print_exc()
            message = explain_os_error(error) if isinstance(error, OSError) else str(error)
            print(f"{program}: error: {message}{_how_to_go_on(error)}", file=sys.stderr)
            raise SystemExit(STATUS_WRONG_INPUT) from None
        except RuntimeError as error:
            full = _memory_that_ran_out(error)
            if full is None:
                raise
            if verbose:
                traceback.print_exc()
            remedy = "end what else runs there, or use another --device"
            print(f"{program}: error: out of {full}; {remedy}{_how_to_go_on(error)}", file=sys.stderr)
            raise SystemExit(STATUS_WRONG_INPUT) from None


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """SIGINT and SIGTERM raise :class:`Stopped`, so that files are closed and the user is told how to go on.

    A second signal ends the process at once. Signals that are ignored, or somebody else's already, are left alone.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    changed = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                changed[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)


def _how_to_go_on(error: BaseException) -> str:
    """What was noted on an exception where the run's folder and command are known."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def explain_os_error(error: OSError) -> str:
    """What the operating system refused, where, and what helps."""
    remedies = {
        errno.ENOSPC: "make room, then go on in the same folder; finished files are whole",
        errno.EDQUOT: "make room, then go on in the same folder; finished files are whole",
        errno.EFBIG: "files may not grow this large here (see ulimit -f)",
        errno.EACCES: "choose another place, or change its permissions",
        errno.EPERM: "choose another place, or change its permissions",
        errno.EROFS: "the file system is read-only; choose another place",
        errno.ENOTDIR: "a part of this path is a file; choose another place",
        errno.EEXIST: "a file of this name is in the way; choose another place",
    }
    place = f"{error.filename}: " if error.filename else ""
    remedy = remedies.get(error.errno or 0)
    return f"{place}{error.strerror or error}" + (f"; {remedy}" if remedy else "")


@contextmanager
def lower_on_out_of_memory(flag: str, value: int) -> Iterator[None]:
    """Name the setting to lower when the device's memory runs out inside the block."""
    try:
        yield
    except RuntimeError as error:
        full = _memory_that_ran_out(error)
        if full is None:
            raise
        raise OutOfMemoryError(f"out of {full}; lower {flag} (now {value}) or use another --device") from error


def _memory_that_ran_out(error: RuntimeError) -> str | None:
    """Which memory an error is about: of the allocators of PyTorch, or of the driver and its libraries."""
    others = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in others):
        return "GPU memory"
    return "memory" if "can't allocate memory" in str(error) else None
