"""Measure what is hard about quantizing a model, and write it down as one HTML page."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ddim.models import load_pixel_config
from qdiff.act_ranges import find_act_ranges
from qdiff.adapters import find_adapter
from qdiff.calibration_data import CalibrationSet, get_train_samples, load_calibration_set, make_calibration_set
from qdiff.checkpoint import load_quantized
from qdiff.cli import latent, pixel
from qdiff.cli.errors import UserError, exit_on_error, lower_on_out_of_memory
from qdiff.cli.flags import (
    NEEDS_QUANT_ACT,
    Parser,
    add_common_flags,
    add_quantizer_flags,
    add_selection_flags,
    at_least,
    check_file,
    check_out,
    resolve_device,
)
from qdiff.cli.make_calibration_data import add_kinds_of_model, check_kind_of_model
from qdiff.cli.pipeline import duration, settled_quant
from qdiff.cli.run_folder import LOG_NAME
from qdiff.cli.samplers import Sampler
from qdiff.config import QuantConfig
from qdiff.evaluation import pages
from qdiff.evaluation.inspection import (
    Activations,
    Errors,
    Inputs,
    Sensitivity,
    UnitLoss,
    estimate_errors,
    layer_sensitivities,
    observe_activations,
    quantized_one_at_a_time,
    read_unit_losses,
    trajectory_errors,
)
from qdiff.files import write_atomically
from qdiff.inference import tf32
from qdiff.quant_model import QuantModel, evaluating

PROGRAM = "inspect_model.py"
DESCRIPTION = (
    "Measure what is hard about quantizing a model, with a calibration set (made on the spot where none is given), and "
    "write one HTML page that needs no other file: ranges of activations by timestep, both sides of shortcuts, how "
    "much each layer costs when it alone is quantized, the error along the trajectory by bias and variance, and the "
    "loss of each unit where a run recorded it. Without --cali_ckpt the network is rounded to nearest."
)
EXAMPLES = """\
examples:
  the bundled model, rounded to nearest, then from its calibrated checkpoint
    python scripts/inspect_model.py --config configs/fashion_mnist.yml --use_pretrained \\
        --weight_bit 4 --quant_act --split --out nearest.html
    python scripts/inspect_model.py --config configs/fashion_mnist.yml --use_pretrained \\
        --cali_ckpt models/pixel/fashion_mnist/w4a8.safetensors --out calibrated.html
  a latent model
    python scripts/inspect_model.py -r models/ldm/lsun_beds256/model.ckpt -c 50 --weight_bit 4 --quant_act \\
        --cali_data_path cali.pt --cali_st 20 --cali_n 16 --out bedrooms.html
"""


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        overrides=True,
        usage="%(prog)s (--config FILE | -r PATH) --out FILE [flags] [key=value ...]",
    )
    add_kinds_of_model(parser)
    group = parser.add_argument_group("quantization", "of a checkpoint that does not say it itself, or without one")
    group.add_argument(
        "--cali_ckpt",
        metavar="FILE",
        help="calibrated checkpoint: ckpt.pth or a packed ckpt.safetensors, which says its bits itself, and whose "
        "activations are quantized where it has their grids",
    )
    add_quantizer_flags(group)
    group = parser.add_argument_group("inputs")
    add_selection_flags(group)
    group.add_argument(
        "--trajectories", type=at_least(2), default=8, metavar="N", help="images whose trajectories are compared"
    )
    group.add_argument(
        "--sensitivity_n",
        type=at_least(1),
        default=2,
        metavar="N",
        help="samples of each timestep for quantizing one layer at a time, most of the work",
    )
    group = parser.add_argument_group("the page")
    group.add_argument("--out", required=True, metavar="FILE", help="where to write it, such as page.html")
    group.add_argument("--force", action="store_true", help="replace --out where it exists")
    group.add_argument(
        "--run_log",
        metavar="FILE",
        help="run.log of a calibration, for the units' losses [the one beside --cali_ckpt, where there is one]",
    )
    add_common_flags(parser, seed=0)
    # A page wants an overview in minutes: few samples of several steps.
    parser.set_defaults(timesteps=50, skip_type="quad", cali_st=10, cali_n=8)
    return parser


def check_args(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is read."""
    check_kind_of_model(parser, args)
    check_file(parser, args, "cali_ckpt", "a calibration writes ckpt.pth and ckpt.safetensors into its run folder")
    check_file(parser, args, "cali_data_path", "scripts/make_calibration_data.py makes one; or leave it out")
    check_file(parser, args, "run_log", "a calibration writes run.log into its run folder")
    if args.cali_n < 2:
        parser.error(f"--cali_n {args.cali_n}: telling bias and variance apart takes 2 samples of each timestep")
    if not args.quant_act and args.cali_ckpt is None:
        for name in NEEDS_QUANT_ACT:
            if name in args.given:
                parser.error(f"{parser.flag(name)} needs --quant_act, without which activations are in full")
    check_out(parser, args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exits with status 2 and one line where its input is wrong."""
    parser = build_parser()
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    check_args(parser, args)
    with exit_on_error(PROGRAM, verbose=args.verbose):
        subject = (pixel_subject if args.resume_base is None else latent_subject)(parser, args)
        with lower_on_out_of_memory("--batch_size", subject.batch_size), tf32(False):
            found = inspect(args, subject)
        content = pages.page(f"Quantizing {subject.name}", facts(args, subject, found), sections(found))
        write_atomically(args.out, content.encode())
        print(f"{args.out}: {Path(args.out).stat().st_size / 2**20:.1f} MiB, in {duration(found.seconds)}")
    return 0


# The model and its inputs.


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model of either kind.

    Attributes:
        unet: full precision, on the CPU.
        load: reads ``cali_st`` steps of ``cali_n`` samples from a calibration set's file.
        context: embeddings of the first images' conditions and of none, where the network takes them.
    """

    name: str
    unet: nn.Module
    quant: QuantConfig
    sampler: Sampler
    batch_size: int
    load: Callable[..., CalibrationSet]
    context: tuple[Tensor, Tensor] | None = None


def pixel_subject(parser: Parser, args: argparse.Namespace) -> Subject:
    """The model of ``--config``."""
    config = load_pixel_config(args.config)
    pixel.check_sampler_flags(parser, args, config)
    sampler = pixel.PixelSampler(config, pixel.SamplerOptions.from_args(args), resolve_device(args.device))
    _check_steps(parser, args, sampler)
    quant = settled_quant(parser, args, _checkpoint(args), pixel.architecture(config))

    def load(path: str, *, cali_st: int, cali_n: int) -> CalibrationSet:
        return load_calibration_set(path, cali_st=cali_st, cali_n=cali_n, image_shape=sampler.image_shape)

    unet = pixel.load_full_precision(args, config)
    return Subject(Path(args.config).stem, unet, quant, sampler, args.batch_size or config.sampling.batch_size, load)


def latent_subject(parser: Parser, args: argparse.Namespace) -> Subject:
    """The model of ``-r``."""
    model = latent.LatentModel(args.resume_base, args.overrides)
    sampler = latent.LatentSampler(model, latent.sampler_options(parser, args, model), resolve_device(args.device))
    _check_steps(parser, args, sampler)
    # First ranges are found as these families' sampling command finds them.
    quant = settled_quant(
        parser,
        args,
        _checkpoint(args),
        model.architecture(),
        source=str(model.config_path),
        weight_range="mse",
        act_range="mse",
    )
    model.load()
    unet = model.unet
    model.diffusion.model.diffusion_model = nn.Identity()  # wrapped on its own; the rest moves with the sampler
    context = sampler.conditions(range(args.cali_n)) if sampler.context_shape else None

    def load(path: str, *, cali_st: int, cali_n: int) -> CalibrationSet:
        return load_calibration_set(
            path,
            cali_st=cali_st,
            cali_n=cali_n,
            image_shape=sampler.image_shape,
            conditional=sampler.context_shape is not None,
            context_width=sampler.context_shape[1] if sampler.context_shape else None,
        )

    return Subject(model.name, unet, quant, sampler, args.batch_size or latent.BATCH_SIZE, load, context)


def _checkpoint(args: argparse.Namespace) -> Path | None:
    return Path(args.cali_ckpt) if args.cali_ckpt else None


def _check_steps(parser: Parser, args: argparse.Namespace, sampler: Sampler) -> None:
    if args.cali_data_path is None and args.cali_st > sampler.n_steps:
        parser.error(
            f"--cali_st {args.cali_st}: the sampler makes {sampler.n_steps} steps; take 1 to {sampler.n_steps}"
        )


def samples(args: argparse.Namespace, subject: Subject, unet: nn.Module) -> CalibrationSet:
    """Those of ``--cali_data_path``, or recorded now along trajectories of the full-precision network."""
    if args.cali_data_path is not None:
        return subject.load(args.cali_data_path, cali_st=args.cali_st, cali_n=args.cali_n)
    sampler = subject.sampler
    with evaluating(unet):
        content = make_calibration_set(
            lambda indices, on_step: sampler(unet, indices, on_step),
            n_samples=args.cali_n,
            n_steps=sampler.n_steps,
            batch_size=subject.batch_size,
            cali_st=args.cali_st,
            context=subject.context,
        )
    steps = len(content["xs"])
    selection = SimpleNamespace(cali_n=args.cali_n, cali_st=steps, custom_steps=steps, cond=subject.context is not None)
    return CalibrationSet(*get_train_samples(selection, content))


# What is measured.


@dataclasses.dataclass(frozen=True)
class Found:
    """All that goes onto the page."""

    activations: Activations
    sensitivities: list[Sensitivity]
    estimates: dict[str, Errors]
    trajectories: dict[str, Errors]
    losses: list[UnitLoss]
    inputs: int
    timesteps: int
    corrected: bool
    seconds: float


def inspect(args: argparse.Namespace, subject: Subject) -> Found:
    """Measure everything, with a line on what is being done."""
    started = time.perf_counter()
    losses = recorded_losses(args)
    device, batch = subject.sampler.device, subject.batch_size
    cuts = dict(find_adapter(subject.unet).shortcuts(subject.unet))
    unet = subject.unet.to(device).requires_grad_(False)
    with _doing("recording inputs" if args.cali_data_path is None else "reading inputs"):
        data = samples(args, subject, unet)
    inputs = Inputs.of(data, device)
    model = QuantModel.from_config(unet, subject.quant).eval()
    with _doing("quantizing"):
        quantize(args, model, data, device)
    with _doing("ranges by timestep"):
        activations = observe_activations(model, inputs, cuts, batch_size=batch)
    with tqdm(desc="one layer at a time", unit=" layers", total=len(quantized_one_at_a_time(model))) as bar:
        few = inputs.first(args.sensitivity_n)
        sensitivities = layer_sensitivities(model, few, batch_size=batch, on_layer=lambda _: bar.update())
    with _doing("errors of the estimate"):
        estimates = estimate_errors(model, inputs, batch_size=batch)
    with _doing("errors along the trajectory"):
        trajectories = trajectory_errors(model, subject.sampler, range(args.trajectories))
    return Found(
        activations,
        sensitivities,
        estimates,
        trajectories,
        losses,
        len(inputs.x),
        len(inputs.timesteps),
        model.output_scale is not None,
        time.perf_counter() - started,
    )


def recorded_losses(args: argparse.Namespace) -> list[UnitLoss]:
    """Of ``--run_log``, or of a log beside the checkpoint, where there is one.

    Raises:
        UserError: the log that was named tells of none.
    """
    if args.run_log is None:
        beside = None if args.cali_ckpt is None else Path(args.cali_ckpt).with_name(LOG_NAME)
        return read_unit_losses(beside) if beside is not None and beside.is_file() else []
    losses = read_unit_losses(Path(args.run_log))
    if not losses:
        raise UserError(f"--run_log {args.run_log}: tells of no unit's loss; a calibration's run.log does")
    return losses


def quantize(args: argparse.Namespace, model: QuantModel, data: CalibrationSet, device: Any) -> None:
    """Load the checkpoint, or round to nearest and find ranges. Full-precision weights stay."""
    if args.cali_ckpt is not None:
        load_quantized(args.cali_ckpt, model, quant_act=model.config.quant_act, keep_full_precision=True)
        model.to(device)
        return
    model.to(device)
    model.find_weight_grids()
    model.bake()
    if model.config.quant_act:
        with evaluating(model):
            find_act_ranges(model, tuple(x.to(device) for x in data.inputs()))


@contextmanager
def _doing(what: str) -> Iterator[None]:
    """Say so, and how long it took."""
    started = time.perf_counter()
    print(f"{what} ...", end=" ", flush=True)
    try:
        yield
    except BaseException:
        print()
        raise
    print(duration(time.perf_counter() - started))


# What is told.


def facts(args: argparse.Namespace, subject: Subject, found: Found) -> dict[str, str]:
    """The table at the top of the page."""
    quant = subject.quant
    acts = f", activations {quant.act_bit}, softmax maps {quant.sm_abit}" if quant.quant_act else ", activations full"
    source = args.cali_ckpt or "rounded to nearest" + (", ranges of these inputs" if quant.quant_act else "")
    last = list(found.trajectories.values())[-1]
    mean = list(found.estimates.values())[-1].total.mean().item()
    return {
        "model": args.config or args.resume_base,
        "bits": f"weights {quant.weight_bit}{acts}; shortcuts {'split' if quant.split else 'whole'}",
        "quantized weights": source + (", with its correction of the output" if found.corrected else ""),
        "inputs": f"{found.inputs} of {found.timesteps} timesteps, "
        + (args.cali_data_path or f"recorded now (seed {args.seed})"),
        "trajectories": f"{args.trajectories} images of {subject.sampler.n_steps} steps",
        "error of the estimate": f"{mean:.4g} of its square, mean of the timesteps",
        "error of the result": f"{last.total[-1].item():.4g} of its square",
    }


def sections(found: Found) -> list[pages.Section]:
    """The page's parts, in order."""
    parts = [range_section(found.activations)]
    if found.activations.shortcuts:
        parts.append(shortcut_section(found.activations))
    parts += [sensitivity_section(found.sensitivities), error_section(found)]
    if found.losses:
        parts.append(
            pages.Section(
                "What learning made of each unit",
                "The loss of each unit before and after its reconstruction, as its run recorded it.",
                [(pages.unit_losses(found.losses), "Loss before and after; the scale differs from unit to unit.")],
            )
        )
    return [*parts, layer_section(found)]


def range_section(acts: Activations) -> pages.Section:
    """Activation ranges against the timestep."""
    bands = pages.widest_swings(acts)
    return pages.Section(
        "Ranges of activations by timestep",
        "What reaches the layers of the full-precision network on its way from noise to image. One range for all "
        "timesteps wastes steps of the grid where a layer's values shrink, and clips where they grow; calibration "
        "data from one timestep show only one column of this.",
        [
            (pages.range_bands(acts, bands), f"The {len(bands)} layers whose range changes most."),
            (pages.range_map(acts), "All layers: the width of the range at each timestep."),
        ],
    )


def shortcut_section(acts: Activations) -> pages.Section:
    """The two halves of each shortcut."""
    unlike = sorted(acts.shortcuts, key=lambda s: s.unlikeness, reverse=True)
    return pages.Section(
        "Shortcuts over two features",
        "On the way up, shortcuts see the decoder's feature and the encoder's glued together. Where the two "
        "spread differently, one grid serves neither; --split gives each a grid of its own.",
        [(pages.shortcut_modes(unlike[: pages.SHORTCUTS]), "The most unlike ones: inputs above, weights below.")],
        ("shortcut", "decoder std", "encoder std", "wider by", "weight: decoder", "encoder"),
        [
            (
                s.path,
                *(f"{float(v):.4g}" for v in (s.decoder.std(), s.encoder.std(), s.unlikeness)),
                *(f"{float(v):.4g}" for v in (s.decoder_weight.std(), s.encoder_weight.std())),
            )
            for s in unlike
        ],
    )


def sensitivity_section(sensitivities: Sequence[Sensitivity]) -> pages.Section:
    """What each layer costs by itself."""
    return pages.Section(
        "One layer quantized at a time",
        "The squared error of the network's output as a share of its square, mean of the timesteps, when the "
        "weight or the input of a single layer is quantized and everything else is in full precision. Layers of "
        "a calibrated network learned to make up for those before them, so one alone can cost more than all "
        "together. The table at the end of the page has all layers.",
        [
            (pages.sensitivity_bars(sensitivities), "The layers that cost most."),
            (pages.sensitivity_order(sensitivities), "All of them."),
        ],
    )


def error_section(found: Found) -> pages.Section:
    """Bias and variance of the estimate and of the trajectory."""
    return pages.Section(
        "Errors along the trajectory",
        "Each error is split into its mean over the samples (bias) and what differs from sample to sample "
        "(variance). A bias can be measured and taken off the output, as --correct_mean does; variance cannot. "
        "What so few samples would show as bias by chance is subtracted; a missing point is a bias too small to "
        "see.",
        [
            (
                pages.error_curves(found.estimates, "estimate"),
                "The noise estimate, on inputs of full-precision trajectories.",
            ),
            (
                pages.error_curves(found.trajectories, "trajectory"),
                "The trajectory: its distance from the full-precision one of the same noise. 0 is the result.",
            ),
        ],
        ("state", "timestep", "error", "bias", "variance", "output too large by"),
        [
            (name, f"{t:g}", *(f"{v:.3g}" for v in (bias + variance, bias, variance)), f"{scale - 1:+.2%}")
            for name, errors in found.estimates.items()
            for t, bias, variance, scale in zip(
                *(x.tolist() for x in (errors.timesteps, errors.bias, errors.variance, errors.scale)), strict=True
            )
        ],
    )


def layer_section(found: Found) -> pages.Section:
    """The table of all layers."""
    rows = []
    for s in found.sensitivities:
        told = ["", "", ""]
        if s.kind == "layer":
            ranges = found.activations.ranges[s.path]
            told = [f"{ranges[:, 0].min():.3g}", f"{ranges[:, 4].max():.3g}", f"{found.activations.swing(s.path):.1f}"]
        errors = ("" if value is None else f"{value:.3g}" for value in (s.weight, s.activation))
        rows.append((s.path + (" (products)" if s.kind == "products" else ""), *told, *errors))
    return pages.Section(
        "All layers",
        "Smallest and largest input of all timesteps, by which factor the widest range is wider than the narrowest, "
        "and the relative output error with only this layer's weight, or only its input, quantized.",
        (),
        ("layer", "minimum", "maximum", "range changes by", "weight quantized", "input quantized"),
        rows,
    )
