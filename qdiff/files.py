"""Files that are either whole or not there."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: str | Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; it takes that name only when the block ends without an exception.

    An earlier file of that name stays whole until then, and for good if writing fails.

    Args:
        path: where the file shall stand; its folder exists.
        durable: have the content on the disk before it gets its name, so that not even a power cut leaves half a
            file. Not worth its milliseconds for an image that can be sampled again.

    Raises:
        OSError: naming ``path`` and not the temporary file, which is removed.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise _about(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are private; this one is a result
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        refused = _os_error_behind(error)
        if refused is not None:
            raise _about(path, refused) from error
        raise


def write_atomically(path: str | Path, content: bytes, *, durable: bool = True) -> None:
    """Write a whole file at once, as :func:`atomic_file` does."""
    with atomic_file(path, durable=durable) as file:
        file.write(content)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Errors of the operating system say which file they are about; those of open files do not."""
    try:
        yield
    except OSError as error:
        raise _about(Path(path), error) from error


def locked(path: str | Path) -> int | None:
    """A descriptor that holds a lock on a file until it is closed, or the process ends, however it ends.

    Returns:
        None on a file system without locks.

    Raises:
        BlockingIOError: another process holds it, or another descriptor of this one.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """The operating system's error; ``torch.save`` raises one of its own after it, which only speaks of positions."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _about(path: Path, error: OSError) -> OSError:
    return OSError(error.errno, error.strerror or str(error), str(path))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
