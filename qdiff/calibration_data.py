"""Calibration sets: noisy inputs and their timesteps, recorded along the sampling trajectory.

Q-Diffusion, section 3.2: what a noise-estimation network sees changes from step to step, so the set holds samples of
every step and calibration takes some of each of some of them.

The file is a dictionary saved by ``torch.save``: ``xs`` a list over the sampler's steps, noisiest first, of
N x C x H x W inputs; ``ts`` a list of N timesteps each; for conditional models ``cs`` and ``ucs``, lists of N x L x D
embeddings with and without the condition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ddim.tensor_archive import CodeInFileError, load_archive
from ddim.untrusted import FileError, UntrustedFileError
from qdiff.files import atomic_file

PLAIN_TENSOR_TIMESTEP = 800  # of a set that is one tensor of inputs without timesteps


class CalibrationSetError(FileError):
    """A calibration set that cannot be used; the message names the file, what is wrong and the remedy."""


@dataclass(frozen=True)
class CalibrationSet:
    """The samples a calibration works on, those of one step after those of another.

    Attributes:
        x: noisy inputs, M x C x H x W float32.
        t: their timesteps, M float32.
        context: M x L x D embeddings of a conditional model.
        steps: which steps of the file's trajectory they come from.
        trajectory: how many steps the file holds.
    """

    x: Tensor
    t: Tensor
    context: Tensor | None = None
    steps: tuple[int, ...] = (0,)
    trajectory: int = 1

    def __len__(self) -> int:
        return len(self.x)

    def inputs(self) -> tuple[Tensor, ...]:
        """A network's positional arguments: images, timesteps and, where there is one, context."""
        return (self.x, self.t) if self.context is None else (self.x, self.t, self.context)


@dataclass(frozen=True)
class SetStep:
    """One step of a file.

    Attributes:
        number, of: which of how many.
        x, t: N x C x H x W inputs of the file's type, mapped into memory where the file allows it, and N timesteps.
        context_shape: N x L x D of the embeddings, where there are some.
    """

    number: int
    of: int
    x: Tensor
    t: Tensor
    context_shape: tuple[int, ...] | None


class SelectionArgs(Protocol):
    """What :func:`get_train_samples` reads of its first argument."""

    cali_n: int
    cali_st: int
    custom_steps: int
    cond: bool


def selected_steps(trajectory: int, cali_st: int) -> range:
    """Every ``trajectory // cali_st``-th step from the first. Where that does not divide evenly there are more than
    ``cali_st``, never fewer.
    """
    return range(0, trajectory, trajectory // cali_st)


def get_train_samples(
    args: SelectionArgs, sample_data: dict[str, Any] | Tensor, custom_steps: int | None = None
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Take from a calibration set what a calibration uses: the published interface.

    Args:
        args: any object with ``cali_n`` samples a step, ``cali_st`` steps, ``custom_steps`` and ``cond``.
        sample_data: the content of the file.
        custom_steps: steps of the sampler, at most as many as the set has; ``args.custom_steps`` where it is None.

    Returns:
        Inputs, timesteps and, with ``cond``, embeddings: the whole selection with the condition, then without.
    """
    wanted = args.custom_steps if custom_steps is None else custom_steps
    _check_structure(sample_data, args.cali_st, args.cond)
    if isinstance(sample_data, dict) and len(sample_data["ts"]) < wanted:
        raise CalibrationSetError(
            f"the set holds {len(sample_data['ts'])} steps, fewer than the {wanted} of the sampler"
        )
    chosen = _select(sample_data, args.cali_st, args.cali_n, conditional=args.cond)
    return (chosen.x, chosen.t) if chosen.context is None else (chosen.x, chosen.t, chosen.context)


def load_calibration_set(
    path: str | Path,
    *,
    cali_st: int,
    cali_n: int,
    image_shape: Sequence[int],
    conditional: bool = False,
    context_width: int | None = None,
) -> CalibrationSet:
    """Read and check the part of a file that ``cali_st`` steps of ``cali_n`` samples select.

    Only that part is read from the disk, so the full-size published sets need no more memory than their selection.

    Args:
        image_shape: C x H x W of the model's input.
        conditional: the selection is taken twice, with ``cs`` and with ``ucs``.
        context_width: D that the model's embeddings have, where it shall be checked.

    Raises:
        CalibrationSetError: the file is missing or damaged, or does not fit the model or the selection.
    """
    path = Path(path)
    try:
        content = _read(path)
        _check_structure(content, cali_st, conditional)
        _check_selection(content, cali_st, cali_n, tuple(image_shape), conditional, context_width)
    except CalibrationSetError as error:
        raise CalibrationSetError(f"calibration set {path}: {error}") from None
    chosen = _select(content, cali_st, cali_n, conditional)
    context = None if chosen.context is None else chosen.context.float()
    # copies: nothing may keep the file mapped, which could be replaced while the calibration runs
    return CalibrationSet(
        chosen.x.to(torch.float32, copy=True), chosen.t.float(), context, chosen.steps, chosen.trajectory
    )


def steps_of(path: str | Path) -> Iterator[SetStep]:
    """The steps of a file, one after another; nothing of a step stays in memory, or mapped, when the next one is read.

    Raises:
        CalibrationSetError: the file is missing or damaged, or holds something else.
    """
    path, step, steps = Path(path), 0, 1
    while step < steps:
        try:
            content = _read(path)
            _check_structure(content, 1, isinstance(content, dict) and "cs" in content)
            if isinstance(content, Tensor):
                content = {"xs": [content], "ts": [torch.full((len(content),), float(PLAIN_TENSOR_TIMESTEP))]}
            steps = len(content["xs"])
            x, t = content["xs"][step], _as_tensor(content["ts"][step], "ts", f"step {step}: ")
            if not isinstance(x, Tensor) or x.ndim != 4 or len(x) == 0 or t.shape != x.shape[:1]:
                raise CalibrationSetError(f"step {step}: expected N x C x H x W inputs and N timesteps")
        except CalibrationSetError as error:
            raise CalibrationSetError(f"calibration set {path}: {error}") from None
        context = content["cs"][step] if "cs" in content else None
        yield SetStep(step, steps, x, t, None if context is None else tuple(context.shape))
        del content, x, t, context
        step += 1


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CalibrationSetError("no such file; scripts/make_calibration_data.py makes one")
    try:
        return load_archive(path, repeated_rows=True)
    except CodeInFileError:
        raise CalibrationSetError(
            "refused: it holds something other than tensors and plain containers (nothing in it was run)"
        ) from None
    except UntrustedFileError as error:
        raise CalibrationSetError(f"{error}; make or fetch it again") from None
    except OSError as error:
        raise CalibrationSetError(f"cannot be read: {error.strerror}") from None


def _check_structure(content: Any, cali_st: int, conditional: bool) -> None:
    """The content is a dictionary of lists of one length, or a tensor where that is enough."""
    if cali_st < 1:
        raise CalibrationSetError(f"--cali_st {cali_st}: take at least 1 step")
    if isinstance(content, Tensor):
        if cali_st != 1:
            raise CalibrationSetError(
                f"is one tensor without timesteps, which is enough for --cali_st 1 only, not --cali_st {cali_st}"
            )
        if conditional:
            raise CalibrationSetError("is one tensor; a conditional model needs a dict of xs, ts, cs and ucs")
        return
    names = ("xs", "ts", "cs", "ucs") if conditional else ("xs", "ts")
    wanted = f"expected a dict of {', '.join(names)}" + ("" if conditional else ", or with --cali_st 1 a tensor")
    if not isinstance(content, dict):
        raise CalibrationSetError(f"holds a {type(content).__name__}; {wanted}")
    for name in names:
        if name not in content:
            raise CalibrationSetError(f"has no '{name}'; {wanted}")
        if not isinstance(content[name], (list, tuple, Tensor)) or getattr(content[name], "ndim", 1) == 0:
            raise CalibrationSetError(f"'{name}' is a {type(content[name]).__name__}; expected a list over steps")
        if len(content[name]) != len(content["xs"]):
            raise CalibrationSetError(
                f"'xs' has {len(content['xs'])} steps and '{name}' has {len(content[name])}; expected as many"
            )
    steps = len(content["xs"])
    if not 1 <= cali_st <= steps:
        raise CalibrationSetError(f"--cali_st {cali_st}: the set has {steps} steps; take 1 to {steps}")


def _check_selection(
    content: dict[str, Any] | Tensor,
    cali_st: int,
    cali_n: int,
    image_shape: tuple[int, ...],
    conditional: bool,
    context_width: int | None,
) -> None:
    """What is taken has the model's shape, is as much as asked for, and is finite."""
    if isinstance(content, Tensor):
        _check_inputs(content, cali_n, image_shape, where="")
        return
    for step in selected_steps(len(content["xs"]), cali_st):
        where = f"step {step}: "
        _check_inputs(content["xs"][step], cali_n, image_shape, where)
        _check_rows("ts", content["ts"][step], cali_n, 1, where)
        for name in ("cs", "ucs") if conditional else ():
            _check_rows(name, content[name][step], cali_n, 3, where)
            width = _as_tensor(content[name][step], name, where).shape[2]
            if context_width is not None and width != context_width:
                raise CalibrationSetError(
                    f"{where}'{name}' is {width} wide; the model's embeddings are {context_width} wide"
                )


def _check_inputs(x: Any, cali_n: int, image_shape: tuple[int, ...], where: str) -> None:
    if not isinstance(x, Tensor) or x.ndim != 4 or tuple(x.shape[1:]) != image_shape:
        found = "x".join(map(str, x.shape)) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        expected = "x".join(map(str, image_shape))
        raise CalibrationSetError(f"{where}its inputs are {found}; the model takes Nx{expected} (see --config)")
    _check_rows("xs", x, cali_n, 4, where)


def _check_rows(name: str, rows: Any, cali_n: int, axes: int, where: str) -> None:
    rows = _as_tensor(rows, name, where)
    if rows.ndim != axes:
        raise CalibrationSetError(f"{where}'{name}' has {rows.ndim} axes; expected {axes}")
    if len(rows) < cali_n:
        raise CalibrationSetError(
            f"{where}'{name}' holds {len(rows)} samples, fewer than --cali_n {cali_n}; lower --cali_n to {len(rows)}"
        )
    if not torch.isfinite(rows[:cali_n]).all():
        raise CalibrationSetError(f"{where}'{name}' holds NaN or infinite values; make the set again")


def _as_tensor(rows: Any, name: str, where: str) -> Tensor:
    try:
        return torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):
        raise CalibrationSetError(f"{where}'{name}' is a {type(rows).__name__}; expected a tensor") from None


def _select(content: dict[str, Any] | Tensor, cali_st: int, cali_n: int, conditional: bool) -> CalibrationSet:
    if isinstance(content, Tensor):
        x = content[:cali_n]
        return CalibrationSet(x, torch.full((len(x),), float(PLAIN_TENSOR_TIMESTEP)))
    steps = selected_steps(len(content["xs"]), cali_st)

    def taken(name: str) -> Tensor:
        return torch.cat([torch.as_tensor(content[name][step])[:cali_n] for step in steps])

    x, t, context = taken("xs"), taken("ts"), None
    if conditional:
        x, t = torch.cat([x, x]), torch.cat([t, t])
        context = torch.cat([taken("cs"), taken("ucs")])
    return CalibrationSet(x, t, context, tuple(steps), len(content["xs"]))


OnStep = Callable[[int, float, Tensor], None]
SampleBatch = Callable[[Sequence[int], OnStep], object]
"""(which samples, on_step) -> anything: runs the sampler, which calls on_step(k, t, x) before each model call."""


def make_calibration_set(
    sample: SampleBatch,
    *,
    n_samples: int,
    n_steps: int,
    batch_size: int,
    cali_st: int | None = None,
    half: bool = False,
    context: tuple[Tensor, Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[Tensor]]:
    """Record what the full-precision model sees while it samples.

    Args:
        sample: runs the sampler for some images; see :data:`SampleBatch`.
        n_samples: images to sample.
        n_steps: model calls of one trajectory.
        batch_size: images at once.
        cali_st: keep only the steps that a calibration with this ``--cali_st`` takes.
        half: keep the inputs in float16.
        context: of a conditional model, the embeddings of all samples with and without the condition, each
            N x L x D. They do not change along the trajectory, and the file holds them once.
        progress: called with the number of images of each batch that is done.

    Returns:
        ``xs`` and ``ts``, and with ``context`` ``cs`` and ``ucs``, as described above, noisiest step first.

    Raises:
        ValueError: a count below 1, ``cali_st`` above ``n_steps``, or a sampler that makes another number of calls.
    """
    if n_samples < 1 or batch_size < 1:
        raise ValueError(f"n_samples={n_samples}, batch_size={batch_size}: must be at least 1")
    dtype = torch.float16 if half else torch.float32
    kept = kept_steps(n_steps, cali_st)
    xs: list[list[Tensor]] = [[] for _ in kept]
    ts: list[list[Tensor]] = [[] for _ in kept]

    def keep(position: int, t: float, x: Tensor) -> None:
        xs[position].append(x.detach().to("cpu", dtype, copy=True))
        ts[position].append(torch.full((len(x),), t))

    for indices in batches(range(n_samples), batch_size):
        record_batch(sample, indices, n_steps, kept, keep)
        if progress is not None:
            progress(len(indices))
    content = {"xs": [torch.cat(parts) for parts in xs], "ts": [torch.cat(parts) for parts in ts]}
    if context is not None:
        with_condition, without = (embeddings.detach().cpu() for embeddings in context)
        content |= {"cs": [with_condition] * len(kept), "ucs": [without] * len(kept)}
    return content


def batches(indices: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    """Consecutive slices of at most ``size``."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def kept_steps(n_steps: int, cali_st: int | None) -> range:
    """The steps of a trajectory that a set holds: all, or those that a calibration with this ``--cali_st`` takes.

    Raises:
        ValueError: no step, or ``cali_st`` above ``n_steps``.
    """
    if n_steps < 1:
        raise ValueError(f"n_steps={n_steps}: must be at least 1")
    if cali_st is not None and not 1 <= cali_st <= n_steps:
        raise ValueError(f"cali_st={cali_st}: the sampler makes {n_steps} steps; keep 1 to {n_steps}")
    return range(n_steps) if cali_st is None else selected_steps(n_steps, cali_st)


def record_batch(sample: SampleBatch, indices: Sequence[int], n_steps: int, kept: range, keep: OnStep) -> None:
    """Sample one batch and hand over what the network sees at the steps that are kept.

    Args:
        keep: called with the place of the step among ``kept``, its timestep and the inputs, which may change later.

    Raises:
        ValueError: the sampler makes another number of calls than ``n_steps``.
    """
    calls = 0

    def on_step(k: int, t: float, x: Tensor) -> None:
        nonlocal calls
        calls += 1
        if k in kept:
            keep(kept.index(k), float(t), x)

    sample(indices, on_step)
    if calls != n_steps:
        raise ValueError(f"the sampler made {calls} model calls, {n_steps} were announced")


def save_calibration_set(path: str | Path, content: dict[str, list[Tensor]]) -> None:
    """Write a set; the file is whole or not there.

    Raises:
        OSError: the folder cannot be written to or is full; names the path.
    """
    with atomic_file(path) as file:
        torch.save(content, file)
