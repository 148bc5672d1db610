"""How long things take, and which part of them takes it.

    python scripts/benchmark.py calibration     a whole calibration, from the start of the process to its checkpoint
    python scripts/benchmark.py step            one call of the network, in every precision, compiled and not
    python scripts/benchmark.py range-search    the search for the range of one large weight
    python scripts/benchmark.py scaling         calibration time against units, samples and iterations
    python scripts/benchmark.py cpu             ratios on a CPU: steps, and iterations of every unit

``calibration`` and ``step`` take the configs of latent models too, as ``--config models/ldm/lsun_beds256/config.yaml``:
their UNet, with random weights, at full size. Each prints a table, and writes it as JSON with the device, the versions
and the commit.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import difflib
import importlib
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, get_args
from unittest import mock

import torch
import torch._dynamo.utils
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from ddim.config import ConfigError, PixelConfig, load_config
from ddim.models import build
from ddim.schedule import alphas_cumprod, make_betas, sampling_timesteps
from ddim.unet import UNet
from ddim.untrusted import read_yaml_text
from ldm.models.diffusion.ddim import latent_timesteps
from ldm.modules.ema import MODEL
from ldm.modules.encoders.modules import TextEncoder
from ldm.pretrained import build_latent_diffusion
from ldm.random_weights import random_checkpoint
from ldm.util import load_model_config
from qdiff.attention import UNQUANTIZED_MAP
from qdiff.calibrate import UnitProgress, calibrate
from qdiff.calibration_data import CalibrationSet, load_calibration_set, selected_steps
from qdiff.capture import UnitData
from qdiff.checkpoint import load_quantized, read_packed_info, save_packed
from qdiff.cli.errors import UserError, exit_on_error
from qdiff.cli.flags import (
    Help,
    add_inference_flags,
    at_least,
    device_name,
    inference_config,
    real,
    resolve_device,
)
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.evaluation.image_metrics import psnr
from qdiff.evaluation.record import environment, write_json
from qdiff.evaluation.sampling import sample_images
from qdiff.evaluation.timing import (
    in_turn,
    linear_fit,
    median_seconds,
    ratio,
    seconds,
    seconds_of_process,
    wait_for,
)
from qdiff.evaluation.variants import from_packed, full_precision, markdown_table
from qdiff.inference import InferenceConfig, prepare, tf32, why_not_compiled
from qdiff.memory import MemoryBudget, host_peak_bytes
from qdiff.primitives import reconstruction_loss, search_grid
from qdiff.quant_model import QuantModel, Unit, evaluating
from qdiff.reconstruction import (
    Phase,
    UnitReport,
    looks,
    reconstruct_activations,
    reconstruct_weights,
    standing_for_many,
)

PROGRAM = "benchmark.py"
CALIBRATION = importlib.import_module("qdiff.calibrate")  # the module; the package has a function of that name
RECONSTRUCTION = importlib.import_module("qdiff.reconstruction")
ROOT = Path(__file__).resolve().parents[1]
CIFAR = ROOT / "configs" / "cifar10.yml"
FASHION = ROOT / "configs" / "fashion_mnist.yml"
BUNDLED = ROOT / "models" / "pixel" / "fashion_mnist" / "w4a8-published.safetensors"  # flags as W4A8 below
W4A8 = QuantConfig(4, 8, quant_act=True, a_sym=True, split=True)
SAMPLER_STEPS, LATENT_STEPS = 100, 200
# The published flags of latent models: fields of QuantConfig, and of CalibrationConfig.
FLAGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bedroom": ({"a_sym": True, "act_range": "max"}, {"range_order": "first", "running_stat": True}),
    "church": ({"a_sym": False, "act_range": "mse"}, {"range_order": "first"}),
    "text": ({"split": True, "sm_abit": 16, "act_range": "mse"}, {"range_samples": 16, "running_stat": True}),
}
KEEP_EVERY = 10.0  # seconds between two writings of what a long benchmark knows so far
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the largest calibration, for the lines of `scaling`


@dataclass
class Result:
    """What a subcommand found.

    Attributes:
        table: header and lines, as printed.
        facts: everything, as plain values.
    """

    header: list[str]
    lines: list[list[str]]
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        return "\n\n".join([markdown_table(self.header, self.lines), *self.notes])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__.strip(), formatter_class=Help, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[Any], Result], config: Path | None, summary: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=summary, description=summary, formatter_class=Help, allow_abbrev=False)
        own.set_defaults(run=run)
        if config is not None:
            own.add_argument("--config", type=Path, default=config, help="the model")
        own.add_argument("--device", type=device_name, help="cpu or cuda [cuda where there is one]")
        own.add_argument("--json", type=Path, help=f"where the figures go [benchmark-{name}.json]")
        own.add_argument("--threads", type=at_least(1), help="of a CPU [torch's choice]")
        own.add_argument("--verbose", action="store_true", help="tracebacks with errors")
        return own

    own = add("calibration", benchmark_calibration, CIFAR, "A whole calibration, split into its parts.")
    add_calibration_arguments(own)
    some = own.add_mutually_exclusive_group()
    some.add_argument(
        "--units", type=at_least(1), metavar="K", help="learn K evenly spaced units, extrapolate the rest"
    )
    some.add_argument("--only_units", nargs="+", metavar="NAME", help="learn these units, as the table names them")
    own.add_argument(
        "--phase", choices=get_args(Phase), help="only this one; activations then on weights rounded to nearest [both]"
    )
    own.add_argument(
        "--profile", action="store_true", help="what iterations consist of, unit by unit with --only_units; use few"
    )
    own.add_argument(
        "--full_iters",
        type=at_least(1),
        metavar="N",
        help="extrapolate to so many iterations, weights; needs --iters N",
    )
    own.add_argument("--full_iters_a", type=at_least(1), metavar="N", help="the same, activations")
    add_published_flags(own)

    own = add("step", benchmark_step, CIFAR, "One call of the network: precisions, quantized or not, compiled or not.")
    own.add_argument(
        "--batch_sizes", type=at_least(1), nargs="+", default=[64, 256], metavar="N", help="images at once [64 256]"
    )
    own.add_argument("--repeats", type=at_least(1), default=30, metavar="N", help="calls of which the median is taken")
    add_published_flags(own)
    own.add_argument("--variants", nargs="+", metavar="NAME", help="only these [all that the device can run]")
    own.add_argument("--profile", action="store_true", help="what each step consists of")
    own.add_argument("--psnr", type=at_least(1), metavar="N", help="also compare N images of the bundled model")
    own.add_argument("--timesteps", type=at_least(1), default=SAMPLER_STEPS, metavar="N", help="of these images")

    own = add("loading", benchmark_loading, CIFAR, "From a packed checkpoint on the disk to a network that has run.")
    own.add_argument("--cali_ckpt", type=Path, required=True, metavar="FILE", help="the packed checkpoint")
    own.add_argument("--batch_size", type=at_least(1), default=2, metavar="N", help="of its first call [2]")
    add_inference_flags(own)

    own = add("range-search", benchmark_range_search, None, "The error search for the range of one 320x320x3x3 weight.")
    own.add_argument("--repeats", type=at_least(1), default=5, metavar="N", help="calls of which the median is taken")

    own = add("scaling", benchmark_scaling, FASHION, "Calibration time against units, samples and iterations.")
    add_calibration_arguments(own, iters=400, iters_a=100)
    own.add_argument("--plot", type=Path, help="where the picture goes [benchmark-scaling.png]")

    own = add(
        "cpu", benchmark_cpu, None, "Ratios within one run, on the bundled model: a step, iterations of each unit."
    )
    own.add_argument("--batch_size", type=at_least(1), default=32, metavar="N", help="images or samples at once")
    own.add_argument("--rounds", type=at_least(1), default=5, metavar="N", help="in each of which everything runs once")
    own.add_argument("--iterations", type=at_least(1), default=10, metavar="N", help="of a unit in a round")
    own.add_argument("--units", type=at_least(1), metavar="K", help="only K evenly spaced units [all]")
    return parser


def add_published_flags(parser: argparse.ArgumentParser) -> None:
    which = "of a latent model: as published for this one [bedroom; text where it takes texts]"
    parser.add_argument("--flags", choices=FLAGS, help=which)


def add_calibration_arguments(parser: argparse.ArgumentParser, *, iters: int = 20_000, iters_a: int = 5_000) -> None:
    parser.add_argument("--random_weights", action="store_true", help="do not look for the model's weights")
    parser.add_argument("--iters", type=at_least(0), default=iters, metavar="N", help="iterations a unit, weights")
    parser.add_argument("--iters_a", type=at_least(0), default=iters_a, metavar="N", help="the same, activations")
    parser.add_argument("--batch_size", type=at_least(1), default=32, metavar="N", help="samples an iteration")
    parser.add_argument("--cali_st", type=at_least(1), default=20, metavar="N", help="timesteps of the set")
    parser.add_argument("--cali_n", type=at_least(1), default=256, metavar="N", help="samples of each")
    parser.add_argument("--cali_data_path", type=Path, metavar="FILE", help="a set [noised random images]")
    parser.add_argument("--cali_precision", metavar="NAME", help="of the reconstruction [the calibration's default]")
    parser.add_argument(
        "--cali_gpu_gb", type=real(zero=False), metavar="GB", help="GPU memory for PyTorch [what is free]"
    )
    parser.add_argument(
        "--cali_host_gb", type=real(zero=False), metavar="GB", help="host memory of the process [what is free]"
    )
    parser.add_argument("--deterministic", action="store_true", help="on a GPU: the same bits every time")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = resolve_device("cpu" if args.command == "cpu" else args.device)
    with exit_on_error(PROGRAM, verbose=args.verbose):
        result = args.run(args)
        path, surroundings = keep_facts(args, result.facts)
        print(f"\n{result.text()}\n\n{', '.join(f'{k} {v}' for k, v in surroundings.items())}; {path}")
    return 0


def keep_facts(args: Any, facts: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Write what was found, with the settings and the environment. Returns where, and the environment."""
    settings = {
        k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("run", "device", "verbose")
    }
    surroundings = environment(args.device)
    path = args.json or Path(f"benchmark-{args.command}.json")
    write_json(path, {"benchmark": args.command, "environment": surroundings, "settings": settings} | facts)
    return path, surroundings


# What is measured.


class Network(Protocol):
    """A UNet, of whatever family.

    Attributes:
        shape: C x H x W of its input; context_shape: L x D of its context, where it takes one.
        quant: W4A8 as the family's published commands have it, and ``options``, fields of their CalibrationConfig.
        alpha_bar: of its noise schedule; visited: timesteps of a sampler, ascending.
    """

    shape: tuple[int, int, int]
    context_shape: tuple[int, int] | None
    quant: QuantConfig
    options: dict[str, Any]
    alpha_bar: Tensor
    visited: Sequence[int]

    def make(self, *, random: bool) -> nn.Module:
        """With its weights, or with random ones; a new one each time, on the CPU, in evaluation mode."""

    def forget(self) -> None:
        """Let go of the weights that it keeps for the next one, as a command has them once."""

    def empty(self, device: torch.device) -> nn.Module:
        """For weights to come, on the device; a new one each time."""


class PixelNetwork:
    """Of a pixel-space model, with split shortcuts and symmetric activations."""

    context_shape, quant = None, W4A8

    def __init__(self, path: Path):
        self.config: PixelConfig = load_config(path)
        data, diffusion = self.config.data, self.config.diffusion
        self.shape = (data.channels, data.image_size, data.image_size)
        self.options: dict[str, Any] = {}
        self.alpha_bar = alphas_cumprod(make_betas(diffusion))
        self.visited = sampling_timesteps(diffusion.num_diffusion_timesteps, SAMPLER_STEPS, "quad")

    def make(self, *, random: bool) -> nn.Module:
        if not random:
            return full_precision(self.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return UNet.from_config(self.config).eval()

    def forget(self) -> None:
        pass

    def empty(self, device: torch.device) -> nn.Module:
        return build(self.config).to(device)


class LatentNetwork:
    """Of a latent model; its first stage and its encoder of conditions have no values.

    Args:
        flags: a key of :data:`FLAGS`; None for those that suit the model.
    """

    def __init__(self, path: Path, flags: str | None):
        self.path = path
        self.config = load_model_config(path)
        self.draws = random_checkpoint(self.config)
        with torch.device("meta"):
            self.diffusion = build_latent_diffusion(self.config)
        self.shape = self.diffusion.latent_shape
        self.context_shape = None
        if self.diffusion.conditional:
            width = self.config["params"]["unet_config"]["params"].get("context_dim")
            if width is None:
                raise ConfigError(f"{path}: its condition does not reach the UNet as a context")
            encoder = self.diffusion.cond_stage_model
            texts = isinstance(encoder, TextEncoder)
            self.context_shape = (encoder.max_length if texts else 1, width)
            flags = flags or ("text" if texts else None)
        quant, self.options = FLAGS[flags or "bedroom"]
        self.quant = QuantConfig(4, 8, quant_act=True, weight_range="mse", **quant)
        self.alpha_bar = self.draws["alphas_cumprod"].values
        train = self.diffusion.num_timesteps
        self.visited = latent_timesteps(train, min(LATENT_STEPS, max(1, train // 2)))

    def make(self, *, random: bool) -> nn.Module:
        if not random:
            raise UserError(f"{self.path}: of latent models only random weights are measured; say --random_weights")
        return copy.deepcopy(self._unet)

    def forget(self) -> None:
        if vars(self).pop("_unet", None) is not None:
            self.diffusion.model.diffusion_model.to("meta")

    def empty(self, device: torch.device) -> nn.Module:
        return copy.deepcopy(self.diffusion.model.diffusion_model).to_empty(device=device).eval().requires_grad_(False)

    @cached_property
    def _unet(self) -> nn.Module:
        unet, prefix = self.diffusion.model.diffusion_model, f"{MODEL}diffusion_model."
        state = {}
        for name, draw in self.draws.items():
            if name.startswith(prefix):
                state[name.removeprefix(prefix)] = tensor = torch.empty(draw.shape, dtype=draw.dtype)
                draw.fill(tensor, name, seed=0)
        unet.load_state_dict(state, assign=True)
        return unet.eval().requires_grad_(False)


def network_of(args: Any) -> Network:
    """The network that ``--config`` describes; a latent model's file says so by a target."""
    try:
        content = yaml.safe_load(read_yaml_text(args.config))
    except (OSError, ValueError, yaml.YAMLError):
        content = None  # whoever reads a config says what is wrong with it
    section = content.get("model") if isinstance(content, dict) else None
    if isinstance(section, dict) and "target" in section:
        return LatentNetwork(args.config, getattr(args, "flags", None))
    return PixelNetwork(args.config)


# A calibration.


@dataclass
class Breakdown:
    """Where the time of one calibration went, in seconds.

    Attributes:
        plans: where captured data wait, a line a phase.
        setup: from the start of the process: imports, weights, wrapping, the set.
        capture: collecting inputs and targets of units.
        ranges: of weights and activations.
        weights, activations: reconstruction.
        saving: the checkpoint.
        reports: of the units, those that were skipped included.
        waits: for each of them, how much of ``capture`` came between the one before and it.
        skipped: paths of units that were only passed through.
        peak_gpu_bytes: most that tensors took at a time while no unit learned, as units' reports know their own peaks;
            peak_host_bytes: the same of the process; reserved_gpu_bytes: most that the allocator held for tensors.
        kernels: where profiled, what one iteration consisted of, for each unit and phase; see :func:`kernels_of`.
    """

    setup: float = 0.0
    capture: float = 0.0
    ranges: float = 0.0
    weights: float = 0.0
    activations: float = 0.0
    saving: float = 0.0
    reports: list[UnitReport] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    skipped: frozenset[str] = frozenset()
    peak_gpu_bytes: int = 0
    peak_host_bytes: int = 0
    reserved_gpu_bytes: int = 0
    plans: list[str] = field(default_factory=list)
    kernels: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)

    PARTS = ("setup", "capture", "ranges", "weights", "activations", "saving")

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in self.PARTS)

    def extrapolated(self, iterations: Mapping[str, int | None] = MappingProxyType({})) -> Breakdown:
        """As if every unit had been learned: those that were stand for all.

        Args:
            iterations: phase -> how many it would have had, where not those that it had, and with them the looks at
                them. What is done once a unit is counted once.
        """
        learned = [r for r in self.reports if r.name not in self.skipped]
        share = len(self.reports) / max(1, len(learned))
        more = dict.fromkeys(("weights", "activations"), 0.0)
        for r in learned:
            if (wanted := iterations.get(r.phase)) and r.iterations:
                more[r.phase] += r.iteration_seconds * (wanted - r.iterations)
                more[r.phase] += r.look_seconds * (len(looks(wanted)) - len(r.trace))
        return dataclasses.replace(
            self,
            weights=(self.weights + more["weights"]) * share,
            activations=(self.activations + more["activations"]) * share,
        )


def benchmark_calibration(args: Any) -> Result:
    started = time.perf_counter() - seconds_of_process()
    kept_at = time.perf_counter()

    def keep(parts: Breakdown) -> None:
        """A long one that is stopped leaves what it has measured."""
        nonlocal kept_at
        if time.perf_counter() - kept_at > KEEP_EVERY:
            keep_facts(args, calibration_facts(parts, args) | {"finished": False})
            kept_at = time.perf_counter()

    parts = run_calibration(
        args,
        started=started,
        units=args.only_units or args.units,
        long_ones=bool(args.full_iters or args.full_iters_a),
        only_phase=args.phase,
        profile=args.profile,
        on_unit=keep,
    )
    wanted = {"weights": args.full_iters, "activations": args.full_iters_a}
    whole, facts = parts.extrapolated(wanted), calibration_facts(parts, args) | {"finished": True}
    lines = [[name, f"{getattr(whole, name):.1f}", f"{getattr(whole, name) / whole.total:.0%}"] for name in whole.PARTS]
    lines.append(["whole", f"{whole.total:.1f}", ""])
    rows = unit_rows(parts)
    notes = [
        markdown_table(["unit", "kind", "phase", "iterations", "ms an iteration", "peak GPU MiB"], [*map(list, rows)])
    ]
    if args.phase:
        notes.append(f"Only {args.phase} were learned.")
    if args.units or args.only_units:
        learned = len({r.name for r in parts.reports}) - len(parts.skipped)
        notes.append(
            f"Extrapolated: {learned} of {len({r.name for r in parts.reports})} units were learned, in "
            f"{parts.weights + parts.activations:.1f} s."
        )
    if any(wanted.values()):
        notes.append(extrapolation_note(parts, args))
    notes.append(f"Of this, compiling with torch.compile: {facts['compiling']:.1f} s.")
    notes += parts.plans
    gpu, held, host, on_gpu, on_host = (
        facts[name] / 2**30
        for name in (
            "peak_gpu_bytes",
            "reserved_gpu_bytes",
            "peak_host_bytes",
            "learning_gpu_bytes",
            "learning_host_bytes",
        )
    )
    notes.append(
        f"At most {gpu:.2f} GiB of GPU memory in tensors, {held:.2f} GiB held for them; {host:.2f} GiB of host memory, "
        f"libraries included. While units learned, {on_gpu:.2f} GiB in tensors and {on_host:.2f} GiB of the host."
    )
    if args.profile:
        notes.append(profile_table(parts))
        if args.only_units:
            notes += [unit_profile(report, parts.kernels[report.name, report.phase]) for report in learned_units(parts)]
        facts["kernels"] = all_kernels(parts)
        facts["unit_kernels"] = [
            {"name": name, "phase": phase, "kernels": found} for (name, phase), found in parts.kernels.items()
        ]
    return Result(["part", "seconds", "share"], lines, facts, notes)


def calibration_facts(parts: Breakdown, args: Any) -> dict[str, Any]:
    """Everything that is known of a calibration, as plain values; in the middle of it, of its units so far."""
    whole = parts.extrapolated({"weights": args.full_iters, "activations": args.full_iters_a})
    units = zip(parts.reports, parts.waits, strict=True)
    learning_gpu = max((r.peak_gpu_bytes for r in parts.reports), default=0)
    learning_host = max((r.peak_host_bytes for r in parts.reports), default=0)
    return {
        **{name: getattr(whole, name) for name in whole.PARTS},
        "whole": whole.total,
        "extrapolated": bool(args.units or args.only_units or args.full_iters or args.full_iters_a),
        "measured_s": parts.total,
        "compiling": compile_seconds(),
        "peak_gpu_bytes": max(parts.peak_gpu_bytes, learning_gpu),
        "learning_gpu_bytes": learning_gpu,
        "reserved_gpu_bytes": parts.reserved_gpu_bytes,
        "peak_host_bytes": max(parts.peak_host_bytes, learning_host),
        "learning_host_bytes": learning_host,
        "units": [report_facts(r) | {"capture_seconds": wait} for r, wait in units],
        "plans": parts.plans,
    }


def extrapolation_note(parts: Breakdown, args: Any) -> str:
    """What the table's figures are where iterations were extrapolated."""
    failed = sorted(
        {r.name for r in parts.reports if r.iterations and not r.loop_seconds and r.name not in parts.skipped}
    )
    note = (
        f"An extrapolation, not a measurement: {args.iters} + {args.iters_a} iterations a unit ran, in "
        f"{parts.total:.1f} s altogether; the table has the time of {args.full_iters or args.iters} + "
        f"{args.full_iters_a or args.iters_a}, the further ones as long as those that ran, without a unit's "
        "first quarter, which takes longer, and looks at them as many as there would be. Convolutions were chosen by "
        "trying all, as in an optimisation of that length."
    )
    if failed:
        note += f" Not counted are {len(failed)} units that stopped before the end: {', '.join(failed)}."
    return note


def compile_seconds() -> float:
    """What torch.compile took in this process."""
    return sum(torch._dynamo.utils.compilation_time_metrics.get("_compile.compile_inner", [0.0]))


def run_calibration(
    args: Any,
    *,
    started: float,
    units: int | Sequence[str] | None = None,
    samples: int | None = None,
    long_ones: bool = False,
    only_phase: Phase | None = None,
    profile: bool = False,
    on_unit: Callable[[Breakdown], None] = lambda parts: None,
    **changes: Any,
) -> Breakdown:
    """One calibration as the sampling command does it, to a checkpoint in a temporary folder.

    Args:
        started: when the clock of the set-up began, on ``time.perf_counter``.
        units: learn only so many, or those of these names.
        samples: of each timestep, in place of ``args.cali_n``.
        long_ones: its few iterations stand for many: convolutions are chosen as for many.
        only_phase: the one to go through; None: both. Activations then are learned on weights rounded to nearest.
        profile: note what iterations consist of.
        on_unit: hears after each unit what is known so far.
        changes: fields of :class:`CalibrationConfig`.
    """
    device, network = args.device, network_of(args)
    quant = dataclasses.replace(network.quant, quant_act=only_phase != "weights")
    qnn = QuantModel.from_config(network.make(random=args.random_weights).to(device), quant)
    network.forget()
    data = calibration_set(args, network, samples or args.cali_n)
    options = calibration_config(args, **network.options, **changes)
    chosen = chosen_units([unit.path for unit in qnn.units()], units)
    parts = Breakdown(skipped=frozenset(unit.path for unit in qnn.units() if unit.path not in chosen))
    wait_for(device)
    budget = MemoryBudget(*(None if gb is None else int(gb * 10**9) for gb in (args.cali_gpu_gb, args.cali_host_gb)))
    parts.setup = time.perf_counter() - started

    clock = _Clock(parts, device)
    with tqdm(unit="unit", dynamic_ncols=True, leave=False) as bar:

        def done(progress: UnitProgress) -> None:
            clock.unit_done(progress)
            bar.total = progress.total
            bar.set_description(progress.report.name, refresh=False)
            bar.update(progress.index + 1 - bar.n)
            on_unit(parts)

        as_many = standing_for_many() if long_ones else contextlib.nullcontext()
        skipping = only(chosen, parts.kernels if profile else None)
        with clock.timing_ranges(qnn), clock.noting_peaks(), skipping, heard(parts.plans), as_many:
            weights_done = only_phase == "activations"
            if weights_done:
                qnn.find_weight_grids()
            calibrate(qnn, data, options, on_unit=done, budget=budget, weights_done=weights_done)
    clock.finish()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ckpt.safetensors"
        parts.saving = seconds(lambda: save_packed(path, qnn), device)
    clock.note_peaks()
    return parts


@contextmanager
def heard(lines: list[str]) -> Iterator[None]:
    """Collect what a calibration says before its phases."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name == logger.name:
                lines.append(record.getMessage())

    logger, handler = logging.getLogger("qdiff"), Handler(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Clock:
    """Divides the time of a calibration as it runs: what is neither a range nor a unit's optimisation is capture."""

    def __init__(self, parts: Breakdown, device: torch.device):
        self.parts, self.device = parts, device
        self.last = time.perf_counter()

    def unit_done(self, progress: UnitProgress) -> None:
        report = progress.report
        self.parts.reports.append(report)
        self._note_what_is_held()
        setattr(self.parts, report.phase, getattr(self.parts, report.phase) + report.seconds)
        self.parts.waits.append(self._rest(report.seconds))

    def finish(self) -> None:
        wait_for(self.device)
        self._rest(0.0)

    @contextmanager
    def noting_peaks(self) -> Iterator[None]:
        """What was most in memory between units too, where a unit's report begins to count anew."""
        start = RECONSTRUCTION._start

        def noted(unit: Unit) -> float:
            self.note_peaks()
            return start(unit)

        with mock.patch.object(RECONSTRUCTION, "_start", noted):
            yield

    def note_peaks(self) -> None:
        """What was most in memory since the last unit began or ended."""
        parts = self.parts
        parts.peak_host_bytes = max(parts.peak_host_bytes, host_peak_bytes())
        if self.device.type == "cuda":
            parts.peak_gpu_bytes = max(parts.peak_gpu_bytes, torch.cuda.max_memory_allocated(self.device))
        self._note_what_is_held()

    def _note_what_is_held(self) -> None:
        if self.device.type == "cuda":
            held = torch.cuda.max_memory_reserved(self.device)
            self.parts.reserved_gpu_bytes = max(self.parts.reserved_gpu_bytes, held)

    def _rest(self, known: float) -> float:
        now = time.perf_counter()
        rest = now - self.last - known
        self.parts.capture += rest
        self.last = now
        return rest

    @contextmanager
    def timing_ranges(self, qnn: QuantModel) -> Iterator[None]:
        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*words: Any, **options: Any) -> Any:
                found: list[Any] = []
                taken = seconds(lambda: found.append(function(*words, **options)), self.device)
                self.parts.ranges += taken
                self.last += taken
                return found[0]

            return run

        weights = mock.patch.object(qnn, "find_weight_grids", timed(qnn.find_weight_grids))
        names = [name for name in ("find_act_ranges", "update_running_ranges") if hasattr(CALIBRATION, name)]
        acts = mock.patch.multiple(CALIBRATION, **{name: timed(getattr(CALIBRATION, name)) for name in names})
        with weights, acts:
            yield


@contextmanager
def only(chosen: Sequence[str], kernels: dict[tuple[str, str], list[dict[str, Any]]] | None = None) -> Iterator[None]:
    """Units that are not chosen are passed through with no iteration.

    Args:
        kernels: where to note what an iteration of the others consisted of.
    """

    def skipping(function: Callable[..., UnitReport]) -> Callable[..., UnitReport]:
        def run(unit: Unit, data: UnitData, config: CalibrationConfig, **options: Any) -> UnitReport:
            if unit.path not in chosen:
                return function(unit, data, dataclasses.replace(config, iters=0, iters_a=0), **options)
            if kernels is None:
                return function(unit, data, config, **options)
            device = next(unit.module.parameters()).device
            with profiling(device) as profile:
                report = function(unit, data, config, **options)
            kernels[report.name, report.phase] = kernels_of(profile, device, calls=report.iterations)
            return report

        return run

    names = ("reconstruct_weights", "reconstruct_activations")
    with mock.patch.multiple(CALIBRATION, **{name: skipping(getattr(CALIBRATION, name)) for name in names}):
        yield


def calibration_set(args: Any, network: Network, samples: int) -> CalibrationSet:
    """The set of the flags, or random images noised as the forward process does, at the steps a sampler would visit.

    A conditional network sees each of them twice, with a condition of its own and with that which all have in common.
    """
    conditional = network.context_shape is not None
    if args.cali_data_path is not None:
        return load_calibration_set(
            args.cali_data_path,
            cali_st=args.cali_st,
            cali_n=samples,
            image_shape=network.shape,
            conditional=conditional,
        )
    visited = network.visited[::-1]
    times = [visited[step] for step in selected_steps(len(visited), args.cali_st)]
    draws = torch.Generator().manual_seed(0)
    t = torch.tensor(times).repeat_interleave(samples)
    images = torch.rand(len(t), *network.shape, generator=draws) * 2 - 1
    a = network.alpha_bar[t].float().view(-1, 1, 1, 1)
    x = a.sqrt() * images + (1 - a).sqrt() * torch.randn(images.shape, generator=draws)
    if not conditional:
        return CalibrationSet(x, t.float())
    own = torch.randn(len(t), *network.context_shape, generator=draws)
    none = torch.randn(1, *network.context_shape, generator=draws).expand_as(own)
    return CalibrationSet(torch.cat([x, x]), torch.cat([t, t]).float(), torch.cat([own, none]))


def calibration_config(args: Any, **changes: Any) -> CalibrationConfig:
    options = {"iters": args.iters, "iters_a": args.iters_a, "batch_size": args.batch_size}
    options["deterministic"] = args.deterministic
    if args.cali_precision is not None:
        if "precision" not in {f.name for f in dataclasses.fields(CalibrationConfig)}:
            raise UserError(f"--cali_precision {args.cali_precision}: this version reconstructs in one precision only")
        options["precision"] = args.cali_precision
    try:
        return CalibrationConfig(**options | changes)
    except ValueError as error:
        raise UserError(str(error)) from None


def chosen_units(names: Sequence[str], wanted: int | Sequence[str] | None) -> list[str]:
    """So many of the names, evenly spaced, or those that are wanted by name.

    Raises:
        UserError: one of these is not there.
    """
    if wanted is None or isinstance(wanted, int):
        return evenly(names, wanted)
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
            raise UserError(f"--only_units: no unit is called {name}; the nearest are {', '.join(near)}")
    return list(wanted)


def evenly(names: Sequence[str], count: int | None) -> list[str]:
    """``count`` of the names, evenly spaced from the first to the last; all where it is None or too large."""
    if count is None or count >= len(names):
        return list(names)
    return [names[round(i * (len(names) - 1) / max(1, count - 1))] for i in range(count)]


def unit_rows(parts: Breakdown) -> Iterator[list[str]]:
    for r in parts.reports:
        if r.name not in parts.skipped:
            each = f"{1e3 * r.seconds / r.iterations:.3f}" if r.iterations else ""
            peak = getattr(r, "peak_gpu_bytes", 0)
            yield [r.name, r.kind, r.phase, str(r.iterations), each, f"{peak / 2**20:.0f}" if peak else ""]


def report_facts(report: UnitReport) -> dict[str, Any]:
    """Plain values of a report, whatever fields it has."""
    return {k: v for k, v in dataclasses.asdict(report).items() if isinstance(v, (str, int, float, bool, type(None)))}


def kernels_of(profile: torch.profiler.profile, device: torch.device, *, calls: int = 1) -> list[dict[str, Any]]:
    """The kernels (operations, on a CPU) that ran, those that took longest first; of so many calls, each one's part."""
    on_gpu = device.type == "cuda"
    time_of = (lambda e: e.self_device_time_total) if on_gpu else (lambda e: e.self_cpu_time_total)
    events = sorted(profile.key_averages(), key=time_of, reverse=True)
    return [
        {"name": e.key, "calls": e.count / calls, "seconds": time_of(e) / 1e6 / calls} for e in events if time_of(e) > 0
    ]


def profiling(device: torch.device) -> torch.profiler.profile:
    """Of what runs on the device, not of who sends it there."""
    kind = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    return torch.profiler.profile(activities=[kind])


def kind_of_kernel(name: str) -> str:
    """By what its name says; names are those of cuBLAS, cuDNN, PyTorch and the kernels that torch.compile makes."""
    name = name.lower()
    for kind, words in KERNEL_KINDS.items():
        if any(word in name for word in words):
            return kind
    return "other"


def learned_units(parts: Breakdown) -> list[UnitReport]:
    """Those that were not only passed through."""
    return [report for report in parts.reports if report.name not in parts.skipped]


def all_kernels(parts: Breakdown) -> list[dict[str, Any]]:
    """What all iterations of all units consisted of, see :func:`kernels_of`."""
    iterations = {(report.name, report.phase): report.iterations for report in parts.reports}
    return added_up(
        (k["name"], k["calls"] * iterations[unit], k["seconds"] * iterations[unit])
        for unit, kernels in parts.kernels.items()
        for k in kernels
    )


def added_up(kernels: Iterable[tuple[str, float, float]]) -> list[dict[str, Any]]:
    """Names, calls and seconds, as in :func:`kernels_of`: one for each name, those that took longest first."""
    found: dict[str, dict[str, Any]] = {}
    for name, calls, took in kernels:
        one = found.setdefault(name, {"name": name, "calls": 0.0, "seconds": 0.0})
        one["calls"] += calls
        one["seconds"] += took
    return sorted(found.values(), key=lambda kernel: -kernel["seconds"])


def kernel_table(kernels: Sequence[dict[str, Any]], total: float) -> str:
    """Kernels with their shares of so many seconds."""
    lines = [
        [k["name"][:70], f"{k['calls']:.0f}", f"{1e3 * k['seconds']:.3f}", f"{k['seconds'] / total:.0%}"]
        for k in kernels
    ]
    return markdown_table(["kernel", "calls", "ms", "share"], lines)


def profile_table(parts: Breakdown) -> str:
    """The kernels that take most, and how much of the reconstruction's time all of them fill."""
    kernels, learned = all_kernels(parts), learned_units(parts)
    iterations, wall = sum(r.iterations for r in learned), sum(r.seconds for r in learned)
    busy, calls = sum(k["seconds"] for k in kernels), round(sum(k["calls"] for k in kernels))
    lines = [[k["name"][:70], f"{k['calls']:.0f}", f"{1e3 * k['seconds']:.1f}"] for k in kernels[:SHOWN_KERNELS]]
    return (
        markdown_table(["kernel", "calls", "ms"], lines)
        + f"\n\nAll kernels: {busy:.2f} s of {wall:.2f} s ({busy / wall:.0%}); the rest is launching and the host. "
        f"{calls} calls for {iterations} iterations."
    )


def unit_profile(report: UnitReport, kernels: list[dict[str, Any]]) -> str:
    """What an iteration of a unit consists of; what ran less than once in one is for looks at it and the like."""
    each = [k for k in kernels if k["calls"] >= 1]
    total = sum(k["seconds"] for k in each)
    title = f"{report.name}, {report.phase}: kernels take {1e3 * total:.2f} ms an iteration"
    if report.iteration_seconds:
        title += f", which takes {1e3 * report.iteration_seconds:.2f}"
    return f"{title}.\n\n{kernel_table(each[: 2 * SHOWN_KERNELS], total)}"


# A step.


@dataclass(frozen=True)
class Variant:
    """One way of running the network.

    Attributes:
        quant: ``full``, ``w4a8`` or ``w4a32``, the last two with the published flags of the network.
    """

    name: str
    quant: str
    inference: InferenceConfig
    allow_tf32: bool = False


COMPILED = ("full fp16 compiled", "full bf16 compiled")
PROFILED_CALLS, SHOWN_KERNELS = 3, 12
KERNEL_KINDS = {  # words of which a kernel's name has one; the first kind that fits
    "attention without a map": ("flash", "fmha", "sdpa", "attention"),
    "softmax, with what is rounded there": ("softmax",),
    "made by torch.compile: norms, rounding, sums": ("triton_",),
    "convolution or matrix product": ("gemm", "nvjet", "cutlass", "conv", "xmma", "addmm", "bmm", "::mm"),
}


def variants(device: torch.device, sm_abit: int = 8) -> list[Variant]:
    """All that the device can run. On a CPU bf16 stands for fp16, which it computes many times slower.

    Args:
        sm_abit: of the quantized network.
    """
    on_gpu = device.type == "cuda"
    half = "fp16" if on_gpu else "bf16"
    compiles = why_not_compiled(device) is None
    found = [Variant("full fp32", "full", InferenceConfig())]
    if on_gpu:
        found.append(Variant("full tf32", "full", InferenceConfig(), allow_tf32=True))
        found.append(Variant("full fp16 autocast", "full", InferenceConfig("autocast")))
    for quant in ("full", "w4a8", "w4a32"):
        found += [] if quant == "full" else [Variant(f"{quant} fp32", quant, InferenceConfig())]
        found.append(Variant(f"{quant} {half}", quant, InferenceConfig(half)))
        found += [Variant(f"{quant} {half} compiled", quant, InferenceConfig(half, compile=True))] if compiles else []
    if compiles and sm_abit >= UNQUANTIZED_MAP:
        config = InferenceConfig(half, compile=True, unrounded_maps=True)
        found.append(Variant(f"w4a8 {half} compiled, maps unrounded", "w4a8", config))
    return found


def benchmark_step(args: Any) -> Result:
    network = network_of(args)
    chosen = variants(args.device, network.quant.sm_abit)
    if args.variants:
        known = [v.name for v in chosen]
        if unknown := [name for name in args.variants if name not in known]:
            raise UserError(f"--variants {unknown[0]!r}: choose from {', '.join(map(repr, known))}")
        chosen = [v for v in chosen if v.name in args.variants]
    rows = [row for size in args.batch_sizes for row in step_rows(chosen, network, size, args)]
    add_ratios(rows)
    lines = [
        [
            row["variant"],
            str(row["batch_size"]),
            *(number(row[key]) for key in ("ms", "graph_ms", "ratio", "prepare_s")),
        ]
        for row in rows
    ]
    header = ["variant", "batch", "ms a step", "ms as one graph", "times compiled half precision", "s to make ready"]
    notes = ["The second minus the third column is launching; a compiled network is always one graph on a GPU."]
    facts: dict[str, Any] = {"rows": rows}
    notes += [step_profile(row) for row in rows if "kernels" in row]
    if args.psnr:
        facts["psnr"] = compare_images(args)
        notes.append(
            markdown_table(
                ["network", "PSNR to eager fp32, dB", "worst image", "eager fp32 to full precision"],
                [[name, *(number(v) for v in row.values())] for name, row in facts["psnr"].items()],
            )
        )
    return Result(header, lines, facts, notes)


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Each step against that of the full-precision network compiled in half precision, at the same batch size."""
    for row in rows:
        base = [r for r in rows if r["variant"] in COMPILED and r["batch_size"] == row["batch_size"]]
        row["ratio"] = row["best_ms"] / base[0]["best_ms"] if base else None


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


@torch.no_grad()
def step_rows(chosen: Sequence[Variant], network: Network, batch_size: int, args: Any) -> Iterator[dict[str, Any]]:
    shape = (batch_size, *network.shape)
    inputs = [x.to(args.device) for x in random_inputs(network, batch_size)]
    on_gpu = args.device.type == "cuda"
    for variant in chosen:
        row: dict[str, Any] = {"variant": variant.name, "batch_size": batch_size, "ms": None, "graph_ms": None}
        # Nothing to capture on a CPU; what is compiled for a GPU is always captured.
        for graph in (False, True) if on_gpu and not variant.inference.compile else (on_gpu,):
            model = step_model(variant.quant, network, args.device)
            started = time.perf_counter()
            run = prepare(
                model,
                variant.inference,
                shape=shape,
                device=args.device,
                context_shape=network.context_shape,
                cuda_graph=graph,
                allow_tf32=variant.allow_tf32,
            )
            wait_for(args.device)
            row["prepare_s"] = time.perf_counter() - started
            with tf32(variant.allow_tf32):
                taken = median_seconds(lambda run=run: run(*inputs), args.device, repeats=args.repeats, warmup=3)
            row["graph_ms" if graph else "ms"] = 1e3 * taken
        if args.profile:
            with tf32(variant.allow_tf32), profiling(args.device) as profile:
                for _ in range(PROFILED_CALLS):
                    run(*inputs)
                wait_for(args.device)
            row["kernels"] = kernels_of(profile, args.device, calls=PROFILED_CALLS)
        row["best_ms"] = min(ms for ms in (row["ms"], row["graph_ms"]) if ms is not None)
        print({k: v for k, v in row.items() if k != "kernels"}, file=sys.stderr, flush=True)
        yield row


def step_profile(row: dict[str, Any]) -> str:
    """What a step consists of: kinds of kernels, and the longest ones."""
    total = sum(k["seconds"] for k in row["kernels"])
    kinds = added_up((f"all: {kind_of_kernel(k['name'])}", k["calls"], k["seconds"]) for k in row["kernels"])
    title = f"{row['variant']}, batch {row['batch_size']}: kernels take {1e3 * total:.2f} ms a step."
    return f"{title}\n\n{kernel_table([*kinds, *row['kernels'][:SHOWN_KERNELS]], total)}"


def random_inputs(network: Network, count: int) -> tuple[Tensor, ...]:
    """So many rows of what the network is called with."""
    x, t = torch.randn(count, *network.shape), torch.full((count,), min(400.0, len(network.alpha_bar) / 2))
    return (x, t) if network.context_shape is None else (x, t, torch.randn(count, *network.context_shape))


def step_model(quant: str, network: Network, device: torch.device) -> nn.Module:
    """With random weights: a step takes the same time with any. Ranges are the smallest and largest values, those of
    activations of a few random inputs: what they are changes no time either.
    """
    unet = network.make(random=True).to(device)
    if quant == "full":
        return unet
    qnn = QuantModel.from_config(unet, dataclasses.replace(network.quant, weight_range="max", act_range="max"))
    data = CalibrationSet(*random_inputs(network, 2))
    calibrate(qnn, data, CalibrationConfig(), mode="linear")
    qnn.set_quant_state(True, quant == "w4a8")
    return qnn


def compare_images(args: Any) -> dict[str, dict[str, float | None]]:
    """Images of the bundled model, made ready for speed against eager fp32, from the same noise."""
    config, device = load_config(FASHION), args.device
    fast = InferenceConfig("fp16" if device.type == "cuda" else "bf16", compile=why_not_compiled(device) is None)

    def sample(model: nn.Module, inference: InferenceConfig) -> Tensor:
        return sample_images(
            model.to(device),
            config,
            count=args.psnr,
            batch_size=min(args.psnr, 256),
            timesteps=args.timesteps,
            device=device,
            inference=inference,
            cuda_graph=inference.compile and device.type == "cuda",
        )

    makes: dict[str, Callable[[], nn.Module]] = {
        "full": lambda: full_precision(config),
        "W4A32": lambda: from_packed(BUNDLED, config, quant_act=False),
        "W4A8": lambda: from_packed(BUNDLED, config),
    }
    exact = {name: sample(make(), InferenceConfig()) for name, make in makes.items()}
    found: dict[str, dict[str, float | None]] = {}
    for name, make in makes.items():
        near = psnr(sample(make(), fast), exact[name])
        to_full = None if name == "full" else psnr(exact[name], exact["full"]).mean().item()
        found[name] = {"mean": near.mean().item(), "worst": near.min().item(), "to_full": to_full}
    return found


# Loading.


def benchmark_loading(args: Any) -> Result:
    """As sampling with ``--resume`` loads the UNet: the file is read once before, for the disk's cache to be warm."""
    network = network_of(args)
    for _ in args.cali_ckpt.open("rb"):
        pass
    torch.zeros(1, device=args.device)  # the device's own start is not the checkpoint's
    parts: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        result = []
        parts[name] = seconds(lambda: result.append(function()), args.device)
        return result[0]

    info = timed("header", lambda: read_packed_info(args.cali_ckpt))
    model = timed(
        "network without weights", lambda: QuantModel.from_config(network.empty(args.device), info.quant).eval()
    )
    timed("weights", lambda: load_quantized(args.cali_ckpt, model, quant_act=info.quant.act_bit is not None))
    timed("onto the device", lambda: model.to(args.device))
    inference = inference_config(args)
    shape = (args.batch_size, *network.shape)
    context = network.context_shape
    run = timed("ready", lambda: prepare(model, inference, shape=shape, device=args.device, context_shape=context))
    inputs = [x.to(args.device) for x in random_inputs(network, args.batch_size)]
    timed("first call", lambda: run(*inputs))
    parts["whole"] = sum(parts.values())
    lines = [[name, f"{taken:.2f}"] for name, taken in parts.items()]
    size = args.cali_ckpt.stat().st_size
    notes = [f"{size / 1e6:.1f} MB; precision {inference.precision}" + (", compiled" if inference.compile else "")]
    return Result(["part", "seconds"], lines, {"seconds": parts, "bytes": size}, notes)


# The range search.


def benchmark_range_search(args: Any) -> Result:
    weight = torch.randn(320, 320, 3, 3, generator=torch.Generator().manual_seed(0)).to(args.device)
    search = lambda: search_grid(weight, 4, symmetric=False, channel_wise=True)  # noqa: E731
    first = seconds(search, args.device)
    taken = median_seconds(search, args.device, repeats=args.repeats)
    lines = [["320x320x3x3, 4 bits", f"{1e3 * first:.1f}", f"{1e3 * taken:.1f}"]]
    return Result(["weight", "first call, ms", "ms"], lines, {"first_ms": 1e3 * first, "ms": 1e3 * taken})


# Scaling.


def benchmark_scaling(args: Any) -> Result:
    """Calibrations that differ from the largest in one thing: a quarter, a half, three quarters of it."""
    network = network_of(args)
    units = len(QuantModel.from_config(network.make(random=True), network.quant).units())
    axes: dict[str, list[tuple[float, dict[str, Any]]]] = {
        "iterations": [
            (
                round(s * args.iters) + round(s * args.iters_a),
                {"iters": round(s * args.iters), "iters_a": round(s * args.iters_a)},
            )
            for s in SHARES
        ],
        "samples": [(args.cali_st * n, {"samples": n}) for n in (max(1, round(s * args.cali_n)) for s in SHARES)],
        "units": [(n, {"units": n}) for n in (max(1, round(s * units)) for s in SHARES)],
    }
    few = {"iters": min(args.iters, 20), "iters_a": min(args.iters_a, 20)}
    run_calibration(args, started=time.perf_counter(), **few)  # not counted: loads libraries, compiles kernels
    facts: dict[str, Any] = {}
    lines = []
    for axis, points in axes.items():
        xs, ys = [], []
        for at, changes in points:
            parts = run_calibration(args, started=time.perf_counter(), **changes)
            xs.append(float(at))
            ys.append(parts.total - parts.setup)
            print(axis, at, f"{ys[-1]:.2f} s", file=sys.stderr, flush=True)
        start, slope, explained = linear_fit(xs, ys)
        facts[axis] = {"x": xs, "seconds": ys, "intercept": start, "slope": slope, "r2": explained}
        shown = ", ".join(f"{x:g}: {y:.1f}" for x, y in zip(xs, ys, strict=True))
        lines.append([axis, shown, f"{start:.2f}", f"{1e3 * slope:.3f}", f"{explained:.4f}"])
    picture = args.plot or Path("benchmark-scaling.png")
    plot_scaling(facts, picture)
    header = ["against", "seconds at", "start, s", "ms for each", "R² of the line"]
    return Result(header, lines, facts, [f"Set-up is not counted. Picture: {picture}"])


def plot_scaling(facts: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(facts), figsize=(3.4 * len(facts), 3), layout="constrained", sharey=True)
    for (axis, fit), panel in zip(facts.items(), panels, strict=True):
        panel.plot(fit["x"], fit["seconds"], "o")
        ends = [0.0, max(fit["x"])]
        panel.plot(ends, [fit["intercept"] + fit["slope"] * x for x in ends], "-", linewidth=1)
        panel.set_xlabel(axis)
    panels[0].set_ylabel("calibration, s")
    panels[0].set_ylim(bottom=0)  # of all panels, once everything is drawn
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# Ratios on a CPU.


def benchmark_cpu(args: Any) -> Result:
    config = load_config(FASHION)
    full, qnn = full_precision(config), from_packed(BUNDLED, config)
    shape = (args.batch_size, config.data.channels, config.data.image_size, config.data.image_size)
    x, t = torch.randn(shape), torch.full((args.batch_size,), 400.0)
    steps = {
        "full": full,
        "W4A32": from_packed(BUNDLED, config, quant_act=False),
        "W4A8": qnn,
    }
    with torch.no_grad():
        calls = {name: (lambda model=model: model(x, t)) for name, model in steps.items()}
        times = in_turn(calls, "cpu", rounds=args.rounds)
    step = {name: ratio(times, name, "full") for name in ("W4A32", "W4A8")}
    load = seconds(lambda: from_packed(BUNDLED, config), "cpu")

    rows = list(unit_ratios(full, qnn, x, t, args))
    lines = [
        [r["unit"], f"{1e3 * r['full']:.1f}", f"{r['weights_ratio']:.2f}", f"{r['activations_ratio']:.2f}"]
        for r in rows
    ]
    base = sum(r["full"] for r in rows)
    whole = {phase: sum(r[phase] for r in rows) / base for phase in ("weights", "activations")}
    lines.append(["all", f"{1e3 * base:.1f}", f"{whole['weights']:.2f}", f"{whole['activations']:.2f}"])
    header = ["unit", "full precision, forward and backward, ms", "weights", "activations"]
    notes = [
        "The last two columns: an iteration, as a multiple of the first.",
        f"A step of {args.batch_size} images: {1e3 * statistics.median(times['full']):.1f} ms in full precision; "
        f"W4A32 {step['W4A32']:.3f}, W4A8 {step['W4A8']:.3f} times that. "
        f"Loading and resuming the bundled checkpoint: {load:.2f} s.",
    ]
    return Result(header, lines, {"units": rows, "all": whole, "step": step, "load_s": load}, notes)


def unit_ratios(full: UNet, qnn: QuantModel, x: Tensor, t: Tensor, args: Any) -> Iterator[dict[str, Any]]:
    """Each unit's iterations against forward and backward of the same unit in full precision, in turn."""
    units = {unit.path: unit for unit in qnn.units()}
    recorded = record_units(full, list(units), x, t)
    for path in evenly(list(units), args.units):
        inputs, target = recorded[path]
        times = in_turn(
            unit_works(units[path], full.get_submodule(path), inputs, target, args), "cpu", rounds=args.rounds
        )
        row: dict[str, Any] = {"unit": path, "full": statistics.median(times["full"]) / args.iterations}
        for phase in ("weights", "activations"):
            each = [
                (more - few) / args.iterations
                for more, few in zip(times[phase], times[f"{phase}, set-up"], strict=True)
            ]
            row[phase] = statistics.median(each)
            row[f"{phase}_ratio"] = statistics.median(
                a / (b / args.iterations) for a, b in zip(each, times["full"], strict=True)
            )
        print(path, {k: f"{v:.3g}" for k, v in row.items() if k != "unit"}, file=sys.stderr, flush=True)
        yield row


def unit_works(
    unit: Unit, module: nn.Module, inputs: tuple[Tensor, ...], target: Tensor, args: Any
) -> dict[str, Callable[[], object]]:
    """What is timed of one unit. An iteration is what remains of many after a few, set-up included, are taken away."""
    data = UnitData(inputs, target)
    few = 2
    parameters = [p.requires_grad_(True) for p in module.parameters()]

    def forward_and_backward() -> None:
        for _ in range(args.iterations):
            torch.autograd.grad(reconstruction_loss(module(*inputs), target), parameters, allow_unused=True)

    def reconstruct(function: Callable[..., UnitReport], count: int) -> Callable[[], object]:
        config = CalibrationConfig(iters=count, iters_a=count, batch_size=args.batch_size)
        return lambda: function(unit, data, config, seed=0)

    return {
        "full": forward_and_backward,
        "weights, set-up": reconstruct(reconstruct_weights, few),
        "weights": reconstruct(reconstruct_weights, few + args.iterations),
        "activations, set-up": reconstruct(reconstruct_activations, few),
        "activations": reconstruct(reconstruct_activations, few + args.iterations),
    }


@torch.no_grad()
def record_units(
    full: UNet, paths: Sequence[str], x: Tensor, t: Tensor
) -> dict[str, tuple[tuple[Tensor, ...], Tensor]]:
    """Inputs and output of the modules at ``paths`` in one forward pass."""
    found: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
    handles = [
        full.get_submodule(path).register_forward_hook(
            lambda m, args, out, path=path: found.update({path: (args, out)})
        )
        for path in paths
    ]
    with evaluating(full):
        full(x, t)
    for handle in handles:
        handle.remove()
    return found


if __name__ == "__main__":
    sys.exit(main())
