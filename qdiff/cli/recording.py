"""Calibration sets as the commands record them: from any kind of model, into a file of their own or a run's.

What is recorded depends on the sampler's settings alone, so the set that a run makes on the spot is the one that
``scripts/make_calibration_data.py`` makes with the same flags, but for rounding where the number of threads is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdiff.cli.errors import lower_on_out_of_memory
from qdiff.cli.flags import Parser
from qdiff.cli.samplers import Sampler, image_bar, with_bar
from qdiff.progress import tensor_hash
from qdiff.recording import SetLayout, record_calibration_set
from qdiff.workers import WORKERS

SEED, OTHER_SEED = 0, 1
"""Of a set, and of one for images that have the first."""


def seed_beside(images: int) -> int:
    """The seed of a set for images of a seed: they shall not be those that calibration has seen."""
    return SEED if images != SEED else OTHER_SEED


def check_steps(parser: Parser, cali_st: int | None, sampler: Sampler) -> None:
    """``--cali_st`` asks for no more steps than the sampler makes."""
    if cali_st is not None and cali_st > sampler.n_steps:
        parser.error(f"--cali_st {cali_st}: the sampler makes {sampler.n_steps} steps; keep 1 to {sampler.n_steps}")


def layout_of(sampler: Sampler, n_samples: int, *, cali_st: int | None = None, half: bool = False) -> SetLayout:
    """What a set of so many samples holds."""
    return SetLayout(n_samples, sampler.n_steps, sampler.image_shape, sampler.context_shape, cali_st, half)


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Inside the ``with`` block PyTorch works on so many threads; None changes nothing.

    Convolutions on a CPU add up in an order that depends on it.
    """
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def record_set(
    path: Path,
    model: nn.Module,
    sampler: Sampler,
    layout: SetLayout,
    *,
    batch_size: int,
    batch_flag: str,
    model_config: dict[str, Any],
    tell: Callable[[str], None],
    anew: bool = False,
    threads: int | None = None,
) -> None:
    """Record the set at ``path``, or the rest of it.

    Args:
        model: with its full-precision weights; moves to the sampler's device.
        batch_flag: what the user lowers where memory is too small.
        model_config: facts of the model, as checkpoints record them.
        tell: called by the first process with a line about what is there.
        anew: forget what an earlier process left.
        threads: of this process on a CPU; None for as many as PyTorch has.

    Raises: as :func:`qdiff.recording.record_calibration_set`.
    """
    decided_by = {
        "sampler": sampler.facts(),
        "model_config": model_config,
        "full_precision_weights": tensor_hash(model.state_dict()),
    }
    model = model.to(sampler.device)
    on_cpu = sampler.device.type == "cpu"
    with (
        lower_on_out_of_memory(batch_flag, batch_size),
        on_threads(threads if on_cpu else None),
        image_bar(layout.n_samples, hidden=WORKERS.rank > 0) as bar,
    ):
        told = False

        def progress(done: int) -> None:
            nonlocal told
            if not told and done:
                tell(f"{done} of {layout.n_samples} samples are there; going on with the others")
                bar.initial = bar.n = done
            told = True
            bar.update(done - bar.n)  # the exact number, after fractions of it

        record_calibration_set(
            path,
            with_bar(sampler, model, bar),
            layout,
            batch_size=batch_size,
            decided_by=decided_by,
            rounded_by={"device": sampler.device.type, "threads": torch.get_num_threads() if on_cpu else None},
            conditions=sampler.conditions if layout.context_shape is not None else None,
            anew=anew,
            progress=progress,
        )
