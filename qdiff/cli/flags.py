"""The flags that the sampling commands share, each defined once, and the checks that need no file to be read.

A command makes a :class:`Parser`, adds the groups it has, and calls the ``check_*`` functions. They exit with status 2
through ``parser.error``, naming flag, value and remedy, before a model is built.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from qdiff.config import ACT_BITS, CALI_PRECISIONS, RANGE_METHODS, TIMED_RANGES, WEIGHT_BITS, CalibrationConfig
from qdiff.inference import PRECISIONS, InferenceConfig, Precision, why_not_compiled
from qdiff.workers import local_device

# What has a meaning only together with another flag.
NEEDS_PTQ = (
    *("quant_mode", "weight_bit", "act_bit", "quant_act", "a_sym", "a_min_max", "split", "sm_abit"),
    *("timed_ranges", "split_input", "act_range", "range_samples", "running_stat", "rs_sm_only"),
    *("resume", "resume_w", "cali_ckpt", "correct_scale", "correct_mean", "no_correct_scale", "tensorboard"),
    "unrounded_maps",
)
NEEDS_QUANT_ACT = (
    *("act_bit", "a_sym", "a_min_max", "sm_abit", "timed_ranges", "split_input", "act_range", "range_samples"),
    *("running_stat", "rs_sm_only", "resume_w", "unrounded_maps"),
)


class Help(argparse.HelpFormatter):
    """Shows defaults in brackets, where there are any."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=110)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        hidden = action.default is None or isinstance(action.default, bool) or action.default is argparse.SUPPRESS
        return text if hidden or "[" in text else f"{text} [%(default)s]"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)  # examples keep their lines


OVERRIDE = re.compile(r"[A-Za-z_][\w.\[\]-]*=.*", re.DOTALL)
"""A word such as ``model.params.image_size=32``."""


class _NotGiven:
    """Stands for a flag the command line is silent about, until its default takes the place."""


INSTALLED = "qdiff-"
"""How the names begin of the commands that an installation has."""
SHELLS = "bash", "zsh", "tcsh"


def typed_command(program: str) -> list[str]:
    """What was typed before the flags: an installed command, or a script with its interpreter.

    Args:
        program: name of the script.
    """
    name = Path(sys.argv[0]).name
    return [name] if name.startswith(INSTALLED) else ["python", f"scripts/{program}"]


class _PrintCompletion(argparse.Action):
    """Prints what makes a shell complete the command's flags, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, option: str | None = None) -> None:
        import shtab  # wanted once in an installation's life

        kinds = {"FILE": shtab.FILE, "PATH": shtab.FILE, "FOLDER": shtab.DIRECTORY, "DIR": shtab.DIRECTORY}
        for action in parser._actions:
            metavar = str(action.metavar)
            if metavar in kinds:
                action.complete = kinds[metavar]  # type: ignore[attr-defined]  # shtab looks for it there
        print(shtab.complete(parser, shell))
        parser.exit()


class Parser(argparse.ArgumentParser):
    """Knows afterwards which flags were given (``args.given``), and takes no abbreviations.

    A packed checkpoint describes itself, so a flag that was given must agree with it, and one that was not follows it:
    the two have to be told apart even when the value is the default.

    Args:
        overrides: take bare ``key=value`` words, in any place, as ``args.overrides``; they change the model's config.
    """

    def __init__(self, *, overrides: bool = False, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=Help, **options)
        self._overrides = overrides
        if Path(sys.argv[0]).name.startswith(INSTALLED):
            self.prog = Path(sys.argv[0]).name
            self.add_argument(
                "--print-completion",
                action=_PrintCompletion,
                choices=SHELLS,
                default=argparse.SUPPRESS,
                help="print a script that makes this shell complete the command's flags",
            )

    def parse_args(  # type: ignore[override]  # a namespace of its own, where argparse fills any object
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        defaults = {a.dest: a.default for a in self._actions if a.default is not argparse.SUPPRESS}
        silent = argparse.Namespace(**dict.fromkeys(defaults, _NotGiven))
        with self._nothing_required():  # a misspelt flag is the slip, not the flag that is missing for it
            _, unknown = self.parse_known_args(args)
        overrides = [word for word in unknown if self._overrides and OVERRIDE.fullmatch(word)]
        unknown = [word for word in unknown if word not in overrides]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._suggestion(unknown)}")
        parsed, _ = self.parse_known_args(args, silent)
        given = {name for name, value in vars(parsed).items() if value is not _NotGiven}
        values = {name: value if name in given else defaults[name] for name, value in vars(parsed).items()}
        if self._overrides:
            values["overrides"] = overrides
        return argparse.Namespace(**values, given=frozenset(given))

    @contextlib.contextmanager
    def _nothing_required(self) -> Iterator[None]:
        everything: list[Any] = [*self._actions, *self._mutually_exclusive_groups]
        required = [x for x in everything if x.required]
        for x in required:
            x.required = False
        try:
            yield
        finally:
            for x in required:
                x.required = True

    def _suggestion(self, unknown: Sequence[str]) -> str:
        names = [name for action in self._actions for name in action.option_strings]
        close = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1)
        return f" (did you mean {close[0]}?)" if close else " (--help lists the flags)"

    def flag(self, dest: str) -> str:
        """The long form of a flag, as the user types it; what help calls it where it is typed without a name."""
        action = next(a for a in self._actions if a.dest == dest)
        return max(action.option_strings, key=len, default=str(action.metavar))


def choice_of(numbers: Sequence[int]) -> Callable[[str], int]:
    """Converter of a whole number that is one of ``numbers``."""

    def convert(text: str) -> int:
        if text.strip() not in map(str, numbers):
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(map(str, numbers))}")
        return int(text)

    return convert


def at_least(minimum: int) -> Callable[[str], int]:
    """Converter of a whole number with a lower bound."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = minimum - 1
        if number < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return number

    return convert


def at_least_or_all(minimum: int) -> Callable[[str], int | None]:
    """Converter of a whole number with a lower bound, or of ``all``, which becomes None."""

    def convert(text: str) -> int | None:
        if text.strip() == "all":
            return None
        try:
            return at_least(minimum)(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, nor 'all'") from None

    return convert


def real(*, zero: bool) -> Callable[[str], float]:
    """Converter of a finite number above 0, or from 0 on."""

    def convert(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not (0 < number < float("inf") or (zero and number == 0)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {'of at least' if zero else 'above'} 0")
        return number

    return convert


def device_name(text: str) -> str:
    """Converter of ``cpu``, ``cuda`` or ``cuda:N``; the device must be there."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of cpu, cuda, cuda:0, cuda:1, ...")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= there:
        found = f"this machine has {there}" if there else "no CUDA device was found"
        raise argparse.ArgumentTypeError(f"{text!r}: {found}; use --device cpu")
    return text


def whole_numbers(text: str) -> tuple[int, ...]:
    """Converter of whole numbers with commas between them, none negative."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,5,207")
    return tuple(map(int, words))


def add_common_flags(parser: Parser, *, seed: int | None) -> None:
    """``--seed`` (required where ``seed`` is None), ``--device``, ``--verbose``."""
    group = parser.add_argument_group("general")
    group.add_argument(
        "--seed",
        type=at_least(0),
        default=seed,
        required=seed is None,
        help="of all noise; image i of a seed is the same whatever the batch size",
    )
    add_machine_flags(group)


def add_machine_flags(group: argparse._ArgumentGroup) -> None:
    """``--device``, ``--verbose``."""
    group.add_argument(
        "--device", type=device_name, metavar="DEVICE", help="cpu or cuda [cuda where there is one, else cpu]"
    )
    group.add_argument("--verbose", action="store_true", help="more detail in the log, and tracebacks with errors")


def add_inference_flags(parser: Parser, *, precision: Precision = "full", maps: bool = False) -> None:
    """``--precision`` and ``--compile``: how the network runs while sampling.

    Args:
        maps: whether the command has ``--unrounded_maps``.
    """
    group = parser.add_argument_group("inference", "these change the last digits of images, and speed")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=precision,
        help="full: float32; autocast: float16 where torch finds it safe (on a CPU: full); fp16, bf16: weights held in "
        "that type, on a GPU much faster. Activations are rounded to their grids in float32 all the same",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the network first, on a GPU into one CUDA graph; pays off over many images",
    )
    if maps:
        group.add_argument(
            "--unrounded_maps",
            action="store_true",
            help="leave softmax maps of 16 bits, which stand for no quantization, unrounded while sampling: attention "
            "is fused then, and no map is in memory",
        )


def check_inference(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse what would gain nothing on the device, and compiling without a compiler."""
    device = resolve_device(args.device)
    if device.type == "cpu" and args.precision == "fp16":
        parser.error("--precision fp16 needs a GPU: on a CPU it is many times slower than full; use bf16 or full")
    if args.compile and (lack := why_not_compiled(device)):
        parser.error(f"--compile {lack}; or leave it out")


def inference_config(args: argparse.Namespace) -> InferenceConfig:
    """What the flags mean on the device they name."""
    maps = getattr(args, "unrounded_maps", False)
    return InferenceConfig(args.precision, args.compile, unrounded_maps=maps).on(resolve_device(args.device))


def add_quantization_flags(
    parser: Parser, *, a_sym: bool = True, a_min_max: bool = False, default_quant_mode: str = "qdiff"
) -> None:
    """What is quantized and to how many bits.

    Args:
        a_sym, a_min_max: whether the command has these flags.
    """
    group = parser.add_argument_group("quantization")
    group.add_argument("--ptq", action="store_true", help="quantize the network; without it, full precision")
    group.add_argument(
        "--quant_mode",
        choices=("qdiff", "linear"),
        default=default_quant_mode,
        help="qdiff reconstructs the network unit by unit; linear only rounds to nearest (the baseline)",
    )
    add_quantizer_flags(group, a_sym=a_sym, a_min_max=a_min_max)
    add_input_flags(group)


def add_input_flags(group: argparse._ArgumentGroup) -> None:
    """What the published checkpoint format has no place for."""
    group.add_argument(
        "--timed_ranges",
        choices=TIMED_RANGES,
        default="none",
        help="activation ranges of their own for each calibrated timestep: of no layer, of those that see the noisy "
        "image (input), or of all; still static integers, looked up by the timestep",
    )
    group.add_argument(
        "--split_input",
        action="store_true",
        help="quantize the noisy image as two tensors, its negative and its positive values, each with all its bits",
    )


def add_quantizer_flags(group: argparse._ArgumentGroup, *, a_sym: bool = True, a_min_max: bool = False) -> None:
    """The grids: what a checkpoint in the published format leaves to the flags, and a packed one says itself."""
    group.add_argument(
        "--weight_bit", type=choice_of(WEIGHT_BITS), default=8, metavar="BITS", help="bits of the weights, 2 to 8"
    )
    group.add_argument("--quant_act", action="store_true", help="quantize activations as well as weights")
    group.add_argument(
        "--act_bit", type=choice_of(ACT_BITS), default=8, metavar="BITS", help="bits of the activations, 2 to 8 or 16"
    )
    if a_sym:
        group.add_argument("--a_sym", action="store_true", help="symmetric activation quantizers")
    if a_min_max:
        group.add_argument(
            "--a_min_max", action="store_true", help="first activation ranges from minimum and maximum, no search"
        )
    group.add_argument(
        "--sm_abit",
        type=choice_of(ACT_BITS),
        default=8,
        metavar="BITS",
        help="bits of attention maps after softmax, 2 to 8 or 16",
    )
    group.add_argument(
        "--split", action="store_true", help="quantize the two halves of each decoder shortcut separately"
    )


def add_calibration_flags(parser: Parser, *, act_range: bool = False, range_samples: int = 64) -> None:
    """The calibration set and the reconstruction.

    Args:
        act_range: whether the command leaves the method of the first activation ranges to the user.
        range_samples: how many set them, unless the user says otherwise.
    """
    group = parser.add_argument_group("calibration", "not used when sampling from a calibrated checkpoint (--resume)")
    add_selection_flags(group, auto=True)
    _add_learning_flags(group)
    _add_range_flags(group, act_range=act_range, range_samples=range_samples)
    _add_resource_flags(group)
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="write the loss and the rounding of every unit as curves to the run's folder tensorboard/",
    )
    group.add_argument(
        "--correct_scale",
        action="store_true",
        help="measure at the end by which factor the quantized network's output is too large at each calibrated "
        "timestep; the packed checkpoint records it, and sampling divides by it",
    )
    group.add_argument(
        "--correct_mean",
        action="store_true",
        help="with --correct_scale: measure the mean error of every pixel too, which sampling subtracts",
    )


def _add_learning_flags(group: argparse._ArgumentGroup) -> None:
    """The optimisation of a unit."""
    group.add_argument(
        "--cali_batch_size", type=at_least(1), default=32, metavar="N", help="samples in an optimisation step"
    )
    group.add_argument(
        "--cali_iters", type=at_least(0), default=20000, metavar="N", help="steps spent on the weights of a unit"
    )
    group.add_argument(
        "--cali_iters_a", type=at_least(0), default=5000, metavar="N", help="steps spent on the activations of a unit"
    )
    group.add_argument(
        "--cali_weight_lr", type=real(zero=False), default=1e-3, metavar="X", help="learning rate of AdaRound"
    )
    group.add_argument(
        "--cali_lr", type=real(zero=False), default=4e-4, metavar="X", help="learning rate of activation step sizes"
    )
    group.add_argument(
        "--cali_p", type=real(zero=False), default=2.4, metavar="X", help="exponent of the loss for activations"
    )
    group.add_argument(
        "--cali_noisy_weight",
        type=real(zero=False),
        default=1.0,
        metavar="X",
        help="how many times as often samples of the noisiest timestep are learned from as those of the cleanest",
    )


def _add_range_flags(group: argparse._ArgumentGroup, *, act_range: bool, range_samples: int) -> None:
    """The first activation ranges; arguments as of :func:`add_calibration_flags`."""
    if act_range:
        group.add_argument(
            "--act_range",
            choices=RANGE_METHODS,
            default="max",
            help="first activation ranges: minimum and maximum, or what of that range gives the least error (mse)",
        )
    group.add_argument(
        "--range_samples",
        type=at_least_or_all(1),
        default=range_samples,
        metavar="N|all",
        help="samples that set the first activation ranges; timed ranges always use all of their timestep",
    )
    group.add_argument(
        "--running_stat",
        action="store_true",
        help="activation ranges as a moving average over the calibration set (momentum 0.95)",
    )
    group.add_argument(
        "--rs_sm_only", action="store_true", help="with --running_stat: only for attention maps after softmax"
    )


def _add_resource_flags(group: argparse._ArgumentGroup) -> None:
    """With which arithmetic, and in how much memory."""
    group.add_argument(
        "--cali_precision",
        choices=CALI_PRECISIONS,
        default=CalibrationConfig.precision,
        help="arithmetic of the reconstruction on a GPU; a CPU computes in fp32",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU: the same command gives the same checkpoint, byte for byte; slower",
    )
    group.add_argument(
        "--cali_gpu_gb",
        type=real(zero=False),
        metavar="GB",
        help="GPU memory that PyTorch may take during the calibration, beside the driver's own [most of what is free]",
    )
    group.add_argument(
        "--cali_host_gb",
        type=real(zero=False),
        metavar="GB",
        help="host memory that the process may take; captured data for which there is no room are computed anew or lie "
        "in files; on a CPU what computing takes comes on top [most of what is free]",
    )


AUTO = "auto"
"""As ``--cali_data_path``: the set is made by the command itself."""


def add_selection_flags(group: argparse._ArgumentGroup, *, required: bool = False, auto: bool = False) -> None:
    """The calibration set, and what to take from it.

    Args:
        auto: the command can make one itself.
    """
    text = "calibration set; scripts/make_calibration_data.py makes one"
    if auto:
        text += f"; {AUTO} makes it first, with the sampler of this command, and keeps it in the run folder"
    group.add_argument("--cali_data_path", metavar=f"FILE|{AUTO}" if auto else "FILE", required=required, help=text)
    group.add_argument(
        "--cali_st", type=at_least(1), default=1, metavar="N", help="steps of the trajectory to take from the set"
    )
    group.add_argument(
        "--cali_n", type=at_least(1), default=1024, metavar="N", help="samples to take from each of these steps"
    )


def add_resume_flags(parser: Parser) -> None:
    """Going on from a calibrated checkpoint."""
    group = parser.add_argument_group("calibrated checkpoints")
    group.add_argument("--resume", action="store_true", help="sample from --cali_ckpt without calibrating")
    group.add_argument(
        "--resume_w", action="store_true", help="take the weights of --cali_ckpt and calibrate activations only"
    )
    group.add_argument(
        "--cali_ckpt",
        metavar="FILE",
        help="ckpt.pth in the published format, or a packed ckpt.safetensors, which knows its own bits and flags",
    )
    group.add_argument(
        "--no_correct_scale",
        action="store_true",
        help="with --resume: sample without what --correct_scale and --correct_mean recorded in the checkpoint",
    )


def check_quantization(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse flags that contradict or need one another, and files that are not there."""
    if not args.ptq:
        for name in NEEDS_PTQ:
            if name in args.given:
                parser.error(f"{_said(parser, args, name)} needs --ptq, without which nothing is quantized")
        return
    if args.resume and args.resume_w:
        parser.error(
            "--resume and --resume_w exclude each other: --resume samples from a checkpoint as it is, "
            "--resume_w takes its weights and calibrates activations"
        )
    if not args.quant_act:
        for name in NEEDS_QUANT_ACT:
            if name in args.given:
                parser.error(f"{_said(parser, args, name)} needs --quant_act, without which activations are in full")
    if args.rs_sm_only and not args.running_stat:
        parser.error("--rs_sm_only needs --running_stat")
    if args.running_stat and args.timed_ranges == "all":
        parser.error(
            "--running_stat and --timed_ranges all exclude each other: there every range is of one timestep's samples, "
            "and none is an average over the trajectory; leave --running_stat out"
        )
    _check_scale_flags(parser, args)
    _check_checkpoint_flags(parser, args)
    if needs_calibration_set(args) and args.cali_data_path is None:
        parser.error(
            "calibrating needs --cali_data_path FILE (scripts/make_calibration_data.py makes one), or "
            f"--cali_data_path {AUTO}, which makes one now; to sample from a calibrated checkpoint use --resume "
            "--cali_ckpt FILE"
        )
    if needs_calibration_set(args) and args.cali_data_path != AUTO:
        check_file(parser, args, "cali_data_path", "scripts/make_calibration_data.py makes one")


def _check_scale_flags(parser: Parser, args: argparse.Namespace) -> None:
    if args.correct_scale and args.resume:
        parser.error(
            "--correct_scale is for calibrating; with --resume a recorded scale is applied anyway, and "
            f"scripts/correct_scale.py {args.cali_ckpt or 'CKPT'} adds one to a calibrated checkpoint of a pixel-space "
            "model"
        )
    if args.correct_mean and not args.correct_scale:
        parser.error("--correct_mean needs --correct_scale: it adds the mean error to the scale")
    if args.no_correct_scale and not args.resume:
        parser.error("--no_correct_scale needs --resume: a calibration measures the scale only with --correct_scale")


def _check_checkpoint_flags(parser: Parser, args: argparse.Namespace) -> None:
    for name in ("resume", "resume_w"):
        if getattr(args, name) and args.cali_ckpt is None:
            parser.error(f"--{name} needs --cali_ckpt FILE, the calibrated checkpoint")
    if args.cali_ckpt is not None and not (args.resume or args.resume_w):
        parser.error(
            f"--cali_ckpt {args.cali_ckpt} needs --resume (sample from it) or --resume_w (calibrate its activations)"
        )
    check_file(parser, args, "cali_ckpt", "a calibration writes ckpt.pth and ckpt.safetensors into its run folder")


def needs_calibration_set(args: argparse.Namespace) -> bool:
    """Whether the command calibrates with samples. Rounding weights to nearest alone needs none."""
    return args.ptq and not args.resume and (args.quant_mode == "qdiff" or args.quant_act or args.correct_scale)


def check_file(parser: Parser, args: argparse.Namespace, dest: str, remedy: str) -> None:
    """A path that was given must be a file."""
    path = getattr(args, dest)
    if path is not None and not Path(path).is_file():
        what = "is a folder, not a file" if Path(path).is_dir() else "no such file"
        parser.error(f"{parser.flag(dest)} {path}: {what}; {remedy}")


def check_out(parser: Parser, args: argparse.Namespace, dest: str = "out") -> None:
    """``--out``, or another flag, must be a file that can be written, and a new one without ``--force``."""
    out = Path(getattr(args, dest))
    said = f"{parser.flag(dest)} {out}"
    if out.is_dir():
        parser.error(f"{said}: is a folder; name a file")
    if out.exists() and not args.force:
        parser.error(f"{said}: exists already; --force replaces it")
    if not out.absolute().parent.is_dir():
        parser.error(f"{said}: there is no folder {out.absolute().parent}; make it first")
    if not os.access(out.absolute().parent, os.W_OK):
        parser.error(f"{said}: the folder cannot be written to; choose another place")


def _said(parser: Parser, args: argparse.Namespace, dest: str) -> str:
    """A flag as it stood on the command line."""
    value = getattr(args, dest)
    return parser.flag(dest) if value is True else f"{parser.flag(dest)} {value}"


def resolve_device(name: str | None) -> torch.device:
    """CUDA where there is one, unless the command line says otherwise; of several processes each has its own GPU."""
    return local_device(torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu")))
