"""From flags to a quantized network: what the sampling commands of all families have in common."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn
from tqdm import tqdm

from qdiff.calibrate import UnitProgress, calibrate, learning_phases
from qdiff.calibration_data import CalibrationSet
from qdiff.checkpoint import (
    UNPUBLISHABLE,
    CheckpointInfo,
    fits_published,
    load_quantized,
    read_info,
    read_packed_info,
    save_packed,
    save_published,
    size_report,
)
from qdiff.cli.flags import Parser
from qdiff.cli.run_folder import LOG_ONLY
from qdiff.config import CalibrationConfig, QuantConfig, RangeMethod
from qdiff.memory import MemoryBudget
from qdiff.progress import CalibrationProgress, identity
from qdiff.quant_model import QuantModel
from qdiff.reconstruction import UnitReport
from qdiff.workers import WORKERS

PUBLISHED_NAME = "ckpt.pth"
PACKED_NAME = "ckpt.safetensors"
PROGRESS_FOLDER = "calibration"
KEPT = "kept"  # the outcome of a unit that learning did not improve
NAMED_UNITS = 5  # of each list in the summary

# Flags that a checkpoint answers by itself: those of its weights, and those of its activations.
WEIGHT_FACTS = ("weight_bit", "split")
ACTIVATION_FACTS = ("act_bit", "a_sym", "sm_abit", "timed_ranges", "split_input")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantPlan:
    """How the network of one run is quantized.

    Attributes:
        quant: its quantizers. Those of activations are there when the checkpoint has them, used or not.
        quant_act: whether activations are quantized while sampling.
        calibration: how it is calibrated, where it is.
        mode: ``qdiff``, or ``linear``: round to nearest.
        checkpoint: where calibrated weights come from; None calibrates everything.
        weights_only: take the weights of ``checkpoint`` and calibrate activations.
        correct_scale: correct the output as the checkpoint says, where it does.
        grad_ckpt: whether transformer blocks save memory while they are reconstructed; changes no result.
    """

    quant: QuantConfig
    quant_act: bool
    calibration: CalibrationConfig
    mode: Literal["qdiff", "linear"]
    checkpoint: Path | None = None
    weights_only: bool = False
    correct_scale: bool = True
    grad_ckpt: bool = False

    @property
    def calibrates(self) -> bool:
        return self.checkpoint is None or self.weights_only

    @property
    def standalone(self) -> bool:
        """Whether a checkpoint brings all weights; calibrating needs the full-precision ones as well."""
        return not self.calibrates

    def continued_in(self, folder: Path) -> QuantPlan:
        """The plan for going on in a run folder, where calibration may be over already."""
        finished = folder / PACKED_NAME
        if not self.calibrates or not finished.is_file():
            return self
        quant = read_packed_info(finished).quant
        return dataclasses.replace(self, checkpoint=finished, weights_only=False, quant=quant)

    def for_samples(self, data: CalibrationSet | None) -> QuantPlan:
        """The plan with the timesteps of a calibration set, where activation ranges depend on them."""
        return self if data is None else dataclasses.replace(self, quant=self.quant.at_timesteps(data.t.tolist()))

    def resolved_flags(self) -> dict[str, Any]:
        """The quantization flags as the checkpoint answered them."""
        flags = {name: getattr(self.quant, name) for name in (*WEIGHT_FACTS, *ACTIVATION_FACTS)}
        return flags | {"quant_act": self.quant_act}


def make_plan(
    parser: Parser,
    args: argparse.Namespace,
    architecture: dict[str, Any],
    *,
    source: str | None = None,
    range_order: Literal["random", "first"] = "random",
    weight_range: RangeMethod = "max",
    act_range: RangeMethod = "max",
) -> QuantPlan:
    """Settle what the flags leave open with what the checkpoint says of itself; only its header is read.

    Args:
        architecture: ``section.key`` of the config -> value, what decides the network's layers; a checkpoint made for
            others is refused.
        source: what the config is called in messages; by default its flag.
        range_order: which samples set the first activation ranges.
        weight_range, act_range: how the family finds its first ranges, where no flag says it.
    """
    path = Path(args.cali_ckpt) if args.cali_ckpt else None
    quant = settled_quant(
        parser, args, path, architecture, source=source, weight_range=weight_range, act_range=act_range
    )
    return QuantPlan(
        quant=quant,
        quant_act=args.quant_act,
        calibration=calibration_config(args, range_order=range_order),
        mode=args.quant_mode,
        checkpoint=path,
        weights_only=args.resume_w,
        correct_scale=not args.no_correct_scale,
        grad_ckpt=not getattr(args, "no_grad_ckpt", True),
    )


def settled_quant(
    parser: Parser,
    args: argparse.Namespace,
    path: Path | None,
    architecture: dict[str, Any],
    *,
    source: str | None = None,
    weight_range: RangeMethod = "max",
    act_range: RangeMethod = "max",
) -> QuantConfig:
    """The flags' quantizers, or those that the checkpoint ``path`` says it was calibrated with.

    Arguments as in :func:`make_plan`.
    """
    quant = QuantConfig(
        weight_bit=args.weight_bit,
        act_bit=args.act_bit,
        quant_act=args.quant_act,
        a_sym=getattr(args, "a_sym", False),
        split=args.split,
        sm_abit=args.sm_abit,
        timed_ranges=getattr(args, "timed_ranges", "none"),
        split_input=getattr(args, "split_input", False),
        weight_range=weight_range,
        act_range=getattr(args, "act_range", act_range),
    )
    info = read_info(path) if path is not None else None
    if path is not None and info is not None:
        _check_architecture(parser, source or f"--config {args.config}", path, info, architecture)
        quant = _agreed(parser, args, path, info, quant)
    elif not quant.published and args.resume:
        flag = f"--timed_ranges {quant.timed_ranges}" if quant.timed else "--split_input"
        parser.error(
            f"{flag}: {path}, in the published format, cannot have that; leave the flag out, or calibrate activations "
            "anew with --resume_w in place of --resume"
        )
    return quant


def calibration_config(
    args: argparse.Namespace, *, range_order: Literal["random", "first"] = "random"
) -> CalibrationConfig:
    return CalibrationConfig(
        iters=args.cali_iters,
        iters_a=args.cali_iters_a,
        batch_size=args.cali_batch_size,
        weight_lr=args.cali_weight_lr,
        lr=args.cali_lr,
        p=args.cali_p,
        range_samples=args.range_samples,
        range_order=range_order,
        noisy_weight=args.cali_noisy_weight,
        running_stat=args.running_stat,
        rs_sm_only=args.rs_sm_only,
        seed=args.seed,
        precision=args.cali_precision,
        deterministic=args.deterministic,
        correct_scale=args.correct_scale,
        correct_mean=args.correct_mean,
    )


def memory_budget(args: argparse.Namespace, folder: Path) -> MemoryBudget:
    """What captured data may take; files of them lie in the run's folder."""
    gpu, host = (None if gb is None else int(gb * 10**9) for gb in (args.cali_gpu_gb, args.cali_host_gb))
    return MemoryBudget(gpu, host, folder)


def _agreed(
    parser: Parser, args: argparse.Namespace, path: Path, info: CheckpointInfo, flags: QuantConfig
) -> QuantConfig:
    """The checkpoint's own facts, after making sure that no flag contradicts them."""
    resume_w = getattr(args, "resume_w", False)
    binding = WEIGHT_FACTS if resume_w else (*WEIGHT_FACTS, *ACTIVATION_FACTS)
    for name in binding:
        said, fact = getattr(flags, name), getattr(info.quant, name)
        if name not in args.given or said == fact:
            continue
        flag = parser.flag(name)
        if isinstance(fact, bool):
            parser.error(f"{flag}: {path} was calibrated without {flag}; leave it out")
        parser.error(f"{flag} {said}: {path} was calibrated with {flag} {fact}; use that, or leave the flag out")
    if resume_w:
        return dataclasses.replace(flags, **{name: getattr(info.quant, name) for name in WEIGHT_FACTS})
    if args.quant_act and not info.quant.quant_act:
        parser.error(
            f"--quant_act: {path} was calibrated without activations; leave the flag out, or calibrate them with "
            "--resume_w in place of --resume"
        )
    return info.quant


def _check_architecture(parser: Parser, source: str, path: Path, info: CheckpointInfo, ours: dict[str, Any]) -> None:
    """The checkpoint was made of the network that the config describes."""
    for name, value in ours.items():
        section, _, key = name.partition(".")
        theirs = info.model_config.get(section, {}).get(key, value)
        if theirs != value:
            parser.error(
                f"{source}: {name} is {value}, but {path} was calibrated for {theirs}; use the config it was "
                "calibrated with"
            )


def quantized_model(model: nn.Module, plan: QuantPlan) -> QuantModel:
    """Wrap a network and, where the plan names a checkpoint, load it.

    Args:
        model: with its full-precision weights, where the plan is not :attr:`~QuantPlan.standalone`.

    Raises:
        CheckpointError: the checkpoint does not fit the network or the flags.
    """
    quantized = QuantModel.from_config(model, plan.quant).eval()
    quantized.set_grad_ckpt(plan.grad_ckpt)
    if plan.checkpoint is not None:
        load_quantized(
            plan.checkpoint,
            quantized,
            quant_act=plan.quant_act,
            weights_only=plan.weights_only,
            keep_full_precision=plan.calibrates,
            correct_scale=plan.correct_scale,
        )
    return quantized


def calibrate_and_save(
    model: QuantModel,
    plan: QuantPlan,
    data: CalibrationSet | None,
    folder: Path,
    model_config: dict[str, Any],
    *,
    tensorboard: bool = False,
    budget: MemoryBudget | None = None,
) -> None:
    """Calibrate in place, on the device the network is on, and write the result in both forms.

    Every finished unit lies in the folder until the result does; units that are there are not learned again. Of several
    processes all calibrate, and the first one writes.

    Args:
        data: None where nothing needs samples (weights rounded to nearest).
        folder: of the run.
        model_config: recorded in the checkpoints.
        tensorboard: write the curves of every unit.
        budget: memory that captured data may take.

    Raises:
        ProgressError: the folder holds units of another calibration.
        OSError: a file could not be written; what was finished is whole.
    """
    mode, weights_done = plan.mode, plan.weights_only
    progress = None
    if learning_phases(model, mode=mode, weights_done=weights_done):
        device = next(model.parameters()).device
        calibration = identity(model, data, plan.calibration, mode=mode, weights_done=weights_done)
        if WORKERS.rank == 0:
            progress = CalibrationProgress.open(folder / PROGRESS_FOLDER, calibration, device=device)
        progress = WORKERS.same(progress)
        if there := what_is_there(model, plan, progress):
            logger.info("%s", there)
    learn = partial(
        calibrate, model, data, plan.calibration, mode=mode, weights_done=weights_done, progress=progress, budget=budget
    )
    if WORKERS.rank > 0:
        learn()
        return
    finished: list[UnitProgress] = []
    with ExitStack() as stack:
        listeners: list[Callable[[UnitProgress], None]] = [finished.append, stack.enter_context(UnitBar()).show]
        if tensorboard:
            from qdiff.cli.curves import curves  # slow to import

            listeners.append(stack.enter_context(curves(folder)).add)

        def announce(unit: UnitProgress) -> None:
            for listen in listeners:
                listen(unit)

        learn(on_unit=announce)
    if finished:
        logger.info("all units:\n%s", unit_table([unit.report for unit in finished]), extra=LOG_ONLY)
        logger.info("%s", summary(finished))
    info = {"model_config": model_config, "calibration": calibration_facts(plan, data)}
    publishable = fits_published(model)
    if publishable:
        save_published(folder / PUBLISHED_NAME, model, info=info)
    size = save_packed(folder / PACKED_NAME, model, info=info)
    remove_progress(folder)
    logger.info("%s: %s", folder / PACKED_NAME, size_report(model, size))
    if not publishable:
        logger.info("no %s: the published format has no place for %s", PUBLISHED_NAME, UNPUBLISHABLE)
        return
    lost = " but for the correction of the output, for which it has no place" if model.output_scale is not None else ""
    logger.info("%s: the same in the published format%s", folder / PUBLISHED_NAME, lost)


def what_is_there(model: QuantModel, plan: QuantPlan, progress: CalibrationProgress) -> str:
    """What an earlier process left, in a line; nothing where it left nothing."""
    phases = learning_phases(model, mode=plan.mode, weights_done=plan.weights_only)
    steps = [(unit, phase, number) for phase in phases for number, unit in enumerate(model.units())]
    missing = [step for step in steps if not progress.has(*step)]
    if len(missing) == len(steps):
        return ""
    there = f"{len(steps) - len(missing)} of {len(steps)} units are there; going on with "
    return there + (f"{missing[0][0].path}, {missing[0][1]}" if missing else "the checkpoints")


def remove_progress(folder: Path) -> None:
    """Delete the finished units of a run whose checkpoints are written."""
    shutil.rmtree(folder / PROGRESS_FOLDER, ignore_errors=True)


def room_needed(model: nn.Module) -> int:
    """About what a calibration takes on the disk: both checkpoints (weights and rounding variables in fp32, and at most
    a byte a weight packed), and until they are written the finished units (rounding variables once more).
    """
    return 13 * sum(parameter.numel() for parameter in model.parameters())


def calibration_facts(plan: QuantPlan, data: CalibrationSet | None) -> dict[str, Any]:
    """What a checkpoint records of its calibration: what was done, not when or where, so that equal runs are equal."""
    facts: dict[str, Any] = {"quant_mode": plan.mode, "weights_from_checkpoint": plan.weights_only}
    if data is None:
        return facts
    return facts | dataclasses.asdict(plan.calibration) | {"samples": len(data), "steps": list(data.steps)}


def unit_table(reports: Sequence[UnitReport]) -> str:
    """All units of a calibration, a line each."""
    names, kinds = (max(len(getattr(r, field)) for r in reports) for field in ("name", "kind"))
    layout = f"{{:{names}}}  {{:{kinds}}}  {{:11}}  {{:>10}}  {{:>10}}  {{:>11}}  {{:>10}}  {{:>7}}  {{}}"
    header = ("unit", "kind", "phase", "parameters", "iterations", "loss before", "loss after", "seconds", "outcome")
    lines = [layout.format(*header)]
    for r in reports:
        losses = (f"{loss:.4g}" for loss in (r.loss_before, r.loss_after))
        facts = (r.name, r.kind, r.phase, r.parameters, r.iterations, *losses, f"{r.seconds:.1f}", r.outcome)
        lines.append(layout.format(*facts))
    return "\n".join(lines)


def summary(finished: Sequence[UnitProgress]) -> str:
    """What a calibration took and where it did not do well, in a few lines.

    Units are compared by what remains of their loss in the last phase, as a share of what an output of zeros would
    lose: losses themselves grow with the size of the features and differ by orders of magnitude between units. It holds
    the error of the unit's weights, of its activations where they are quantized, and of the inputs that quantized units
    before it hand on.
    """
    phases = list(dict.fromkeys(unit.report.phase for unit in finished))
    times = {phase: sum(unit.elapsed for unit in finished if unit.report.phase == phase) for phase in phases}
    lines = [f"calibrated in {duration(sum(times.values()))}: " + ", ".join(f"{p} {duration(times[p])}" for p in times)]
    reports = [unit.report for unit in finished]
    slow = [r for r in reports if r.outcome not in ("learned", KEPT)]
    kept = [r for r in reports if r.outcome == KEPT]
    if slow:
        lines.append(f"{_count(slow)} learned at a tenth of the rate: {_named(slow)}")
    if kept:
        lines.append(f"{_count(kept)} kept what they started from (round to nearest, first ranges): {_named(kept)}")
    last = [unit for unit in finished if unit.report.phase == phases[-1]]
    worst = sorted(last, key=lambda unit: unit.relative_loss, reverse=True)[:NAMED_UNITS]
    shown = ", ".join(f"{unit.report.name} {100 * unit.relative_loss:.3g} %" for unit in worst)
    lines.append(f"lost most ({phases[-1]}; remaining loss as a share of what an output of zeros would lose): {shown}")
    return "\n".join(lines)


def _count(reports: Sequence[UnitReport]) -> str:
    return f"{len(reports)} unit" + "s" * (len(reports) > 1)


def _named(reports: Sequence[UnitReport]) -> str:
    shown = [f"{r.name}, {r.phase}" + (f" ({r.note})" if r.note else "") for r in reports[:NAMED_UNITS]]
    more = len(reports) - len(shown)
    return "; ".join(shown) + (f"; and {more} more, which the table in run.log has" if more else "")


def duration(seconds: float) -> str:
    """Like ``3 h 05 min``, ``12 min 03 s`` or ``4.2 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class UnitBar:
    """Progress over units, with the loss of the latest; appears with the first that is not restored."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> UnitBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: UnitProgress) -> None:
        report = progress.report
        if self._bar is None:
            if progress.restored:
                return
            self._bar = tqdm(total=progress.total, initial=progress.index, unit="unit", desc="calibrating")
        self._bar.set_postfix_str(f"{report.name} {report.loss_before:.3g} → {report.loss_after:.3g}", refresh=False)
        self._bar.update(progress.index + 1 - self._bar.n)
