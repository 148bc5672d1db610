"""The course of a sampling command, the same for every family of models; a :class:`SamplingTask` says what differs."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from qdiff.calibration_data import CalibrationSet, batches
from qdiff.cli.errors import lower_on_out_of_memory
from qdiff.cli.flags import AUTO, Parser, inference_config, needs_calibration_set, resolve_device
from qdiff.cli.pipeline import (
    QuantPlan,
    calibrate_and_save,
    memory_budget,
    quantized_model,
    remove_progress,
    room_needed,
)
from qdiff.cli.recording import check_steps, layout_of, record_set, seed_beside
from qdiff.cli.run_folder import Layout, RunFolder, check_room
from qdiff.cli.samplers import Sampler, image_bar, with_bar
from qdiff.inference import NoiseModel, prepare
from qdiff.quant_model import QuantModel
from qdiff.workers import WORKERS

SET_NAME = "calibration_set.pt"

logger = logging.getLogger(__name__)


class SamplingTask(Protocol):
    """What a family of models brings to :func:`run`.

    Attributes:
        sampler: of images, or of their latents.
        images, batch_size: how many to make, and how many at once.
        model_config: the facts of the model that checkpoints and ``sampling_config.yaml`` record.
        architecture: ``section.key`` of these that decides the network's layers -> value.
        model_name: the folder below ``--logdir`` in which runs are made; empty for none.
        paths: flags that name files; they are recorded as absolute paths.
        layout: where in the run folder what lies.
        batch_flag: what the user lowers where memory is too small for a batch.
    """

    images: int
    batch_size: int
    model_config: dict[str, Any]
    architecture: dict[str, Any]
    model_name: str
    layout: Layout
    batch_flag: str

    @property
    def sampler(self) -> Sampler: ...

    @property
    def paths(self) -> tuple[str, ...]: ...

    def plan(self, parser: Parser) -> QuantPlan:
        """How the network is to be quantized."""
        ...

    def calibration_samples(self, path: Path) -> CalibrationSet:
        """What a calibration takes of a set."""
        ...

    def network(self, *, weights: bool) -> nn.Module:
        """The UNet in evaluation mode: with its full-precision weights on the CPU where they are wanted.

        Otherwise it has memory for them, which may be on the sampler's device already.

        Called once, before anything else of the model is used.
        """
        ...

    def to_images(self, samples: Tensor) -> Tensor:
        """What the sampler made -> N x C x H x W in [0, 1]."""
        ...

    def image_text(self, index: int) -> Mapping[str, str]:
        """What the file of an image says of it."""
        ...

    def finish(self, folder: RunFolder, *, changed: bool) -> None:
        """After the last image: what is made of all of them. ``changed``: some of them are new."""
        ...


def run(parser: Parser, args: argparse.Namespace, task: SamplingTask, command: Sequence[str]) -> None:
    """Everything that can be wrong is looked at first; then the run folder is made and the work starts.

    Args:
        command: the words that were typed, for the note on how to continue.
    """
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    plan = task.plan(parser) if args.ptq else None
    options = run_options(args, task, plan)
    folder = RunFolder.find(args.logdir, options, task.layout)
    if plan is not None and folder is not None:
        plan = plan.continued_in(folder.path)
    calibrates = plan is not None and plan.calibrates
    wants_set = calibrates and needs_calibration_set(args)
    makes_set = wants_set and args.cali_data_path == AUTO
    if makes_set:
        check_steps(parser, args.cali_st, task.sampler)
    data = task.calibration_samples(Path(args.cali_data_path)) if wants_set and not makes_set else None

    model = task.network(weights=plan is None or not plan.standalone)
    if plan is not None and not makes_set:
        plan = plan.for_samples(data)
        model = quantized_model(model, plan)
    if calibrates:
        check_room(args.logdir, room_needed(model), task.layout.flag)
    if WORKERS.rank == 0:
        folder = folder or RunFolder.create(args.logdir, options, model_name=task.model_name, layout=task.layout)
    path = WORKERS.same(folder and folder.path)
    folder = folder or RunFolder(path, continued=False, layout=task.layout)
    with ExitStack() as writing:
        if WORKERS.rank == 0:
            writing.enter_context(folder.alone())
            folder.tidy()
            writing.enter_context(folder.logging(command, verbose=args.verbose))
        if makes_set:
            assert plan is not None
            data = task.calibration_samples(made_on_the_spot(path / SET_NAME, model, task, args))
            plan = plan.for_samples(data)
            model = quantized_model(model.cpu(), plan)
        model = model.to(task.sampler.device)
        if calibrates:
            assert plan is not None
            assert isinstance(model, QuantModel)
            with lower_on_out_of_memory("--cali_batch_size", args.cali_batch_size):
                facts, budget = task.model_config, memory_budget(args, path)
                calibrate_and_save(model, plan, data, path, facts, tensorboard=args.tensorboard, budget=budget)
        if not calibrates and WORKERS.rank == 0:
            remove_progress(path)  # of a process that was killed between its checkpoints and their tidying up
        sample_images(model, task, folder, args)


def made_on_the_spot(path: Path, model: nn.Module, task: SamplingTask, args: argparse.Namespace) -> Path:
    """The calibration set of ``--cali_data_path auto``, or what is missing of it, by all processes.

    Args:
        path: where in the run folder it lies.
        model: with its full-precision weights.
    """
    if not WORKERS.same(path.is_file()):
        sampler = task.sampler.reseeded(seed_beside(args.seed))
        if WORKERS.rank == 0:
            logger.info("first the calibration set: %d samples of the full-precision model", args.cali_n)
        record_set(
            path,
            model,
            sampler,
            layout_of(sampler, args.cali_n, cali_st=args.cali_st),
            batch_size=task.batch_size,
            batch_flag=task.batch_flag,
            model_config=task.model_config,
            tell=logger.info,
        )
    if WORKERS.rank == 0:
        logger.info(
            "calibration set %s (%.1f MiB), made with this sampler and seed %d; other calibrations of this model take "
            "it with --cali_data_path %s --cali_st %d --cali_n %d",
            path,
            path.stat().st_size / 2**20,
            seed_beside(args.seed),
            shlex.quote(str(path)),
            args.cali_st,
            args.cali_n,
        )
    return path


def run_options(args: argparse.Namespace, task: SamplingTask, plan: QuantPlan | None) -> dict[str, Any]:
    """What ``sampling_config.yaml`` records: every flag as it was resolved, and the model."""
    flags: dict[str, Any] = {name: value for name, value in vars(args).items() if name not in ("given", "help")}
    for name in (*task.paths, "cali_ckpt", "cali_data_path"):
        if flags[name] is not None and flags[name] != AUTO:
            flags[name] = str(Path(flags[name]).absolute())  # the same file from wherever the run is continued
    flags["device"] = str(resolve_device(args.device))
    flags["batch_size"] = task.batch_size
    flags["precision"] = inference_config(args).precision  # decides images, while the device may change
    if plan is not None:
        flags |= plan.resolved_flags()
    return flags | {"model_config": task.model_config}


def ready_to_sample(model: nn.Module, sampler: Sampler, args: argparse.Namespace, batch_size: int) -> NoiseModel:
    """The network in the precision of the flags, compiled if they say so, for batches of so many images."""
    if batch_size == 0:
        return model
    started = time.perf_counter()
    predict = prepare(
        model,
        inference_config(args),
        shape=(batch_size * sampler.rows_per_image, *sampler.image_shape),
        device=sampler.device,
        context_shape=sampler.context_shape,
        cuda_graph=args.compile and sampler.device.type == "cuda",
    )
    if args.compile:
        logger.info("compiled for batches of %d in %.0f s", batch_size, time.perf_counter() - started)
    return predict


def sample_images(model: nn.Module, task: SamplingTask, folder: RunFolder, args: argparse.Namespace) -> None:
    """Make the images that are missing, and what is made of all of them.

    Several processes take batches in turn, the same ones that one process would make; the first one does the rest.
    """
    missing, total = WORKERS.same(folder.missing_images(task.images)), task.images
    done = total - len(missing)
    if folder.continued and missing and WORKERS.rank == 0:
        logger.info("%d of %d images are there; going on at %s", done, total, folder.number(missing[0]))
    mine = list(batches(missing, task.batch_size))[WORKERS.rank :: WORKERS.count]
    share = done + sum(map(len, mine))
    with (
        lower_on_out_of_memory(task.batch_flag, task.batch_size),
        image_bar(share, done, hidden=WORKERS.rank > 0) as bar,
    ):
        predict = ready_to_sample(model, task.sampler, args, min(task.batch_size, len(missing)) if mine else 0)
        sample = with_bar(task.sampler, predict, bar)
        for indices in mine:
            folder.save_images(indices, task.to_images(sample(indices)), task.image_text)
            done += len(indices)
            bar.update(done - bar.n)  # the exact number, after fractions of it
    WORKERS.wait()
    if WORKERS.rank > 0:
        return
    grid = folder.save_grid(total)
    task.finish(folder, changed=bool(missing))
    folder.drop_images()
    if grid is not None:
        first, last = folder.number(0), folder.number(total - 1)
        place = folder.images if task.layout.keep_images else f"{folder.path}, but not kept"
        logger.info("images %s to %s in %s; %s shows the first", first, last, place, grid.name)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as YAML and JSON give it back: lists for tuples."""

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): convert(inner) for key, inner in value.items()}
        return [convert(inner) for inner in value] if isinstance(value, list | tuple) else value

    return convert(config)
