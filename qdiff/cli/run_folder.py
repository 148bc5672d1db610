"""Run folders: where images, checkpoints, log and options of one run lie, and how a stopped run goes on.

``-l DIR`` makes ``DIR/samples/<date>/``, or ``DIR/<model>/samples/<date>/`` where runs are kept by model; other
commands have another :class:`Layout`. Where ``DIR``
itself is such a folder (it holds a ``sampling_config.yaml``), that run is continued: its options must be those of the
command, and only the images that are missing are made.
"""

from __future__ import annotations

import io
import logging
import os
import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from ddim.untrusted import UntrustedFileError, read_image, read_yaml_text
from qdiff.cli.errors import UserError
from qdiff.files import atomic_file, locked, write_atomically

CONFIG_NAME = "sampling_config.yaml"
LOG_NAME = "run.log"
GRID_NAME = "grid.png"
RUN_IMAGES = ("img", "samples")  # what the layouts call the folder of images
ARRAY_NAME = "arr_0"  # numpy's own name for the first array of a file

# Options that say where or how fast, not what: a run may be continued with others.
FREE_OPTIONS = ("logdir", "device", "batch_size", "verbose", "cali_gpu_gb", "cali_host_gb", "tensorboard")
GRID_IMAGES = 64

LOG_ONLY = {"log_only": True}
"""As ``extra=`` of a log message: too long for the terminal."""
FILE_ONLY = {"file_only": True}
"""The same, also with ``--verbose``: the terminal is told otherwise."""

logger = logging.getLogger("qdiff")  # all below it are heard


@dataclass(frozen=True)
class Layout:
    """How a command lays its runs out.

    Attributes:
        flags: those that name the folder, the one for messages last.
        runs: the folder in between in which runs are made; empty for none.
        images: the folder of images in a run's.
        digits: of an image's number.
        grid, columns: whether there is a picture of the first images, and how many of them stand in a row.
        keep_images: whether images stay once the grid is made.
        free_options: that may differ when a run is continued, beside :data:`FREE_OPTIONS`.
    """

    flags: tuple[str, ...] = ("--logdir", "-l")
    runs: str = "samples"
    images: str = "img"
    digits: int = 6
    grid: bool = True
    columns: int = 8
    keep_images: bool = True
    free_options: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        return self.flags[-1]


LAYOUT = Layout()


class RunFolder:
    """One run's folder, found by :meth:`find` or made by :meth:`create`.

    Attributes:
        path: the folder, absolute.
        continued: it was there before.
    """

    def __init__(self, path: Path, continued: bool, layout: Layout = LAYOUT):
        self.path, self.continued, self.layout = path, continued, layout
        self.images, self.arrays = path / layout.images, path / "numpy"

    @classmethod
    def find(cls, logdir: str | Path, options: dict[str, Any], layout: Layout = LAYOUT) -> RunFolder | None:
        """The run that ``logdir`` itself is, if it is one. Changes nothing.

        Args:
            options: everything that decides the result, as plain values.

        Raises:
            UserError: an option differs from the recorded one.
        """
        record = Path(logdir).absolute() / CONFIG_NAME
        if not record.is_file():
            return None
        _check_same(read_options(record, layout), _plain(options), record, layout)
        return cls(record.parent, continued=True, layout=layout)

    @classmethod
    def create(
        cls, logdir: str | Path, options: dict[str, Any], *, model_name: str = "", layout: Layout = LAYOUT
    ) -> RunFolder:
        """A new folder below ``logdir``, with the options in it.

        Args:
            model_name: of a folder in between, which keeps the runs of one model together; empty for none.

        Raises:
            OSError: the folder cannot be made or written to.
        """
        parent = Path(logdir).absolute() / model_name / layout.runs
        folder = cls(_new_dated_folder(parent), continued=False, layout=layout)
        folder.images.mkdir()
        text = yaml.safe_dump(_plain(options), sort_keys=False, allow_unicode=True)
        write_atomically(folder.path / CONFIG_NAME, text.encode())
        return folder

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no second command write into the folder inside the ``with`` block.

        Raises:
            UserError: another one does.
        """
        try:
            lock = locked(self.path / CONFIG_NAME)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: another command is writing this run; wait for it or end it, or name another folder with "
                f"{self.layout.flag}"
            ) from None
        try:
            yield
        finally:
            if lock is not None:
                os.close(lock)

    def tidy(self) -> None:
        """Remove what a killed run left unfinished."""
        self.images.mkdir(exist_ok=True)
        for place in (self.path, self.images, self.arrays):
            for leftover in place.glob(".*.part"):
                leftover.unlink(missing_ok=True)

    def image_path(self, index: int) -> Path:
        return self.images / f"{self.number(index)}.png"

    def number(self, index: int) -> str:
        return f"{index:0{self.layout.digits}d}"

    def missing_images(self, total: int) -> list[int]:
        """Numbers below ``total`` whose image is not there yet, ascending; none where only the grid stays, and does."""
        if not self.layout.keep_images and (self.path / GRID_NAME).is_file():
            return []
        there = {name.name for name in os.scandir(self.images)}
        return [i for i in range(total) if self.image_path(i).name not in there]

    def save_images(
        self, indices: Sequence[int], images: Tensor, text: Callable[[int], Mapping[str, str]] | None = None
    ) -> None:
        """Write images in [0, 1], N x C x H x W with 1 or 3 channels; each file is whole or not there.

        Args:
            text: what an image's file says of it, by its number.
        """
        for index, image in zip(indices, images, strict=True):
            content = _png(image, text(index) if text is not None else {})
            write_atomically(self.image_path(index), content, durable=False)

    def save_grid(self, total: int) -> Path | None:
        """One picture of the first images, read back from their files; None when there are none or it is not wanted."""
        if not self.layout.grid:
            return None
        paths = [self.image_path(i) for i in range(min(total, GRID_IMAGES))]
        images = [read_png(path) for path in paths if path.is_file()]
        if not images:
            return None
        from torchvision.utils import make_grid  # here, since importing it takes as long as importing torch

        path = self.path / GRID_NAME
        write_atomically(path, _png(make_grid(images, nrow=min(self.layout.columns, len(images)), padding=1)))
        return path

    def drop_images(self) -> None:
        """Remove the images, where only the grid is to stay."""
        if not self.layout.keep_images:
            shutil.rmtree(self.images, ignore_errors=True)

    def save_array(self, total: int) -> Path | None:
        """All images in one ``.npz``, as the evaluation suites of others read them; None when there are none.

        The array ``arr_0`` is uint8, N x H x W x 3, in the order of the numbers. It is put together from the images'
        files, one by one, so memory holds one image whatever their number.

        Raises:
            OSError: the file cannot be written.
            UserError: an image cannot be read, or is of another size than the first.
        """
        if total == 0:
            return None
        shape = (total, *_pixels(self.image_path(0)).shape)
        self.arrays.mkdir(exist_ok=True)
        path = self.array_path(shape)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with (
            atomic_file(path) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            archive.open(f"{ARRAY_NAME}.npy", "w", force_zip64=True) as array,  # many images take more than 2 GiB
        ):
            np.lib.format.write_array_header_2_0(array, header)
            for index in range(total):
                pixels = _pixels(self.image_path(index))
                if pixels.shape != shape[1:]:
                    raise UserError(
                        f"{self.image_path(index)}: of another size than the first image; delete it and continue"
                    )
                array.write(pixels.tobytes())
        return path

    def array_path(self, shape: Sequence[int]) -> Path:
        """Named after the array's shape, as the published files are."""
        return self.arrays / f"{'x'.join(map(str, shape))}-samples.npz"

    def has_array(self, total: int) -> bool:
        """Whether a file of so many images is there."""
        return any(self.arrays.glob(f"{total}x*-samples.npz"))

    def _continue(self, argv: Sequence[str]) -> str:
        return continue_command(argv, self.path, self.layout.flags)

    @contextmanager
    def logging(self, argv: Sequence[str], *, verbose: bool = False) -> Iterator[None]:
        """Copy what is logged under ``qdiff`` to ``run.log`` and the terminal. A new log starts with how to go on.

        An exception that leaves the run to be continued carries a note of how.
        """
        file = _LogFile(self.path / LOG_NAME)
        terminal = _Terminal(verbose)
        before = logger.level, logger.propagate
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
        logger.propagate = False  # printed here, not once more by a root handler
        logger.addHandler(file)
        logger.addHandler(terminal)
        try:
            if not self.continued:
                logger.info("run folder %s; continue this run with: %s", self.path, self._continue(argv))
            else:
                logger.info("continuing the run in %s", self.path)
            yield
        except (KeyboardInterrupt, OSError) as error:
            how = f"continue this run with: {self._continue(argv)}"
            error.add_note(how)
            with suppress(OSError):  # the disk may be full
                logger.info("stopped (%s); %s", str(error) or type(error).__name__, how, extra=FILE_ONLY)
            raise
        finally:
            for handler in (file, terminal):
                logger.removeHandler(handler)
                handler.close()
            logger.setLevel(before[0])
            logger.propagate = before[1]


def check_room(logdir: str | Path, needed: int, flag: str = LAYOUT.flag) -> None:
    """Refuse to start long work whose result would not fit on the disk.

    Args:
        needed: bytes, roughly.
    """
    place = next(p for p in (Path(logdir).absolute(), *Path(logdir).absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{place}: {free / 2**20:.0f} MiB are free, and the checkpoints need about {needed / 2**20:.0f} MiB; "
            f"make room, or give {flag} another place"
        )


def continue_command(argv: Sequence[str], folder: Path, flags: Sequence[str] = LAYOUT.flags) -> str:
    """The command line that was typed, its ``-l`` (or what the command calls it) pointing at the run's own folder."""
    joined = tuple(f"{flag}=" if flag.startswith("--") else flag for flag in flags)  # --logdir=DIR and -lDIR
    words, rest = [], iter(argv)
    for word in rest:
        if word in flags:
            next(rest, None)
        elif not word.startswith(joined):
            words.append(word)
    return shlex.join([*words, flags[-1], str(folder)])


def read_png(path: Path) -> Tensor:
    """C x H x W in [0, 1].

    Raises:
        UserError: the file cannot be read.
    """
    from torchvision.transforms.functional import to_tensor

    return to_tensor(_opened(path))


def _pixels(path: Path) -> np.ndarray:
    """H x W x 3, uint8."""
    return np.asarray(_opened(path, "RGB"))


def _opened(path: Path, mode: str | None = None) -> Image.Image:
    try:
        return read_image(path, mode)
    except UntrustedFileError as error:
        trouble = str(error)
    # Not from within the handler: an operating system's error in the chain is taken for one of the file being written.
    raise UserError(f"{path}: {trouble}; delete it and continue the run, which makes it again")


def _png(image: Tensor, text: Mapping[str, str] | None = None) -> bytes:
    pixels = image.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()  # H, W, C
    buffer = io.BytesIO()
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_itxt(key, value)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def _new_dated_folder(parent: Path) -> Path:
    """A folder named after this second, with a number behind it where the name is taken."""
    parent.mkdir(parents=True, exist_ok=True)
    date = datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    for number in count():
        folder = parent / (f"{date}-{number}" if number else date)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


def images_of_run(path: Path) -> Path:
    """Where the images of a run lie, in their own files or, where these were not kept, in an array; any other path is
    returned as it is.

    Raises:
        UserError: a run that has neither.
    """
    if not (path / CONFIG_NAME).is_file():
        return path
    folders = [path / name for name in RUN_IMAGES if (path / name).is_dir() and any((path / name).iterdir())]
    found = folders or sorted((path / "numpy").glob("*.npz"))
    if not found:
        raise UserError(f"{path}: a run without images (looked for {', '.join(RUN_IMAGES)} and numpy/*.npz)")
    return found[0]


def run_of_images(path: Path) -> Path | None:
    """The run that images belong to: the folder itself, or the one around the folder or array of the images."""
    here = path.absolute()
    around = here.parent.parent if here.suffix == ".npz" else here.parent
    return next((place for place in (here, around) if (place / CONFIG_NAME).is_file()), None)


def read_options(path: Path, layout: Layout = LAYOUT) -> dict[str, Any]:
    """The options that a run recorded.

    Raises:
        UserError: the file is something else.
    """
    try:
        content = yaml.safe_load(read_yaml_text(path))
    except UntrustedFileError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not the options of a run; give {layout.flag} another folder to start a new run")
    return content


def _check_same(recorded: dict[str, Any], now: dict[str, Any], path: Path, layout: Layout) -> None:
    before, after = _flat(recorded), _flat(now)
    names = [name for name in {**before, **after} if name not in (*FREE_OPTIONS, *layout.free_options)]
    differing = [name for name in names if before.get(name) != after.get(name)]
    if differing:
        shown = "; ".join(f"{name} is {after.get(name)!r}, was {before.get(name)!r}" for name in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(
            f"{path}: this run was started with other options: {shown}{more}. Continue with the recorded ones, or give "
            f"{layout.flag} another folder to start a new run"
        )


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in options.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _plain(options: Any) -> Any:
    """As YAML gives it back: lists for tuples, text for paths."""
    if isinstance(options, dict):
        return {str(key): _plain(value) for key, value in options.items()}
    if isinstance(options, (list, tuple)):
        return [_plain(value) for value in options]
    return options if isinstance(options, (bool, int, float, str, type(None))) else str(options)


class _LogFile(logging.FileHandler):
    """Fails like any other file of the run when the disk is full, rather than printing a traceback and going on."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8")
        self.path = path
        self.setFormatter(_FirstLinePlain("%(asctime)s %(message)s", "%H:%M:%S"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exception()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        raise

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # what could not be flushed was reported when it was written
            self.stream = None


class _FirstLinePlain(logging.Formatter):
    """Times stand before each line but the first, which is there to be copied."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.getMessage().startswith("run folder ") else super().format(record)


class _Terminal(logging.Handler):
    """Prints without tearing a progress bar apart: what the command itself says, and warnings from anywhere.

    What a bar shows already, as the loss of each unit, goes to the file alone unless everything is wanted.
    """

    def __init__(self, everything: bool):
        super().__init__()
        self._everything = everything

    def emit(self, record: logging.LogRecord) -> None:
        own = record.name.startswith("qdiff.cli") or record.name == "qdiff"
        brief = own and not getattr(record, "log_only", False)
        told = getattr(record, "file_only", False)
        if not told and (self._everything or brief or record.levelno >= logging.WARNING):
            tqdm.write(self.format(record))
