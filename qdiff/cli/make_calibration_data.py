"""Make a calibration set: run the full-precision sampler and keep what the network sees at every step."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ddim.models import load_pixel_config
from qdiff.cli import latent, pixel, text
from qdiff.cli.errors import exit_on_error
from qdiff.cli.flags import Parser, add_common_flags, at_least, check_file, check_out, real, resolve_device
from qdiff.cli.recording import SEED, check_steps, layout_of, record_set
from qdiff.cli.samplers import Sampler
from qdiff.cli.set_summary import describe
from qdiff.workers import WORKERS, joined_processes

PROGRAM = "make_calibration_data.py"
EXAMPLES = """\
examples, the sets that the calibrating commands in the README take:
  python scripts/make_calibration_data.py --config configs/cifar10.yml --use_pretrained --timesteps 100 --eta 0 \\
      --skip_type quad -n 256 --cali_st 20 --out cali.pt
  python scripts/make_calibration_data.py -r models/ldm/lsun_beds256/model.ckpt -c 200 -e 1.0 \\
      -n 256 --cali_st 20 --out cali.pt
  python scripts/make_calibration_data.py --from-file captions_val2014.json --plms --ckpt sd-v1-4.ckpt \\
      -n 128 --cali_st 25 --out cali.pt
a large one, by four processes
  torchrun --nproc_per_node=4 scripts/make_calibration_data.py -r models/ldm/lsun_beds256/model.ckpt -c 200 -e 1.0 \\
      --per_step 50000 --batch_size 64 --half --out cali.pt
what a set holds, in words and as cali.png
  python scripts/make_calibration_data.py --summary cali.pt
"""
# Flags that only one kind of model has, and those that are not said twice.
PIXEL_ONLY = ("use_pretrained", "sample_type", "skip_type", "timesteps")
LATENT_ONLY = ("resume_base", "custom_steps", "vanilla_sample", "class_labels")
TEXT_ONLY = ("laion400m", "tokenizer", "H", "W", "ddim_steps", "plms")
NOT_OF = {
    "pixel": (*LATENT_ONLY, *TEXT_ONLY, "dpm", "scale"),
    "latent": (*PIXEL_ONLY, *TEXT_ONLY, "ckpt", "config"),
    "text": (*PIXEL_ONLY, *LATENT_ONLY),
}
NAMES = {
    "pixel": "--config (a pixel-space model)",
    "latent": "-r (a latent model)",
    "text": "--prompt or --from-file (a text-to-image model)",
}


def build_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Record noisy inputs and timesteps (and embeddings, where the model is conditional) along the "
        "sampling trajectory of a full-precision model, as calibration needs them. Use the sampler settings you will "
        "sample with. A set may be larger than memory; a command that was stopped goes on when it is given again; "
        "torchrun shares the samples between processes.",
        epilog=EXAMPLES,
        overrides=True,
        usage="%(prog)s (--config FILE | -r PATH | --prompt TEXT | --from-file FILE) --out FILE [flags] "
        "[key=value ...]\n       %(prog)s --summary FILE [--picture FILE]",
    )
    add_kinds_of_model(parser, texts=True)
    group = parser.add_argument_group("the set")
    group.add_argument("--out", metavar="FILE", help="where to write it; until it is whole its parts lie in FILE.part")
    group.add_argument(
        "--force", action="store_true", help="replace --out where it exists, and start anew where a set is half made"
    )
    group.add_argument("-n", "--n_samples", type=at_least(1), default=256, metavar="N", help="images to sample")
    group.add_argument(
        "--cali_st",
        "--steps",
        type=at_least(1),
        metavar="N",
        help="keep only the steps that a calibration with this --cali_st takes [all steps]",
    )
    group.add_argument(
        "--cali_n",
        "--per_step",
        type=at_least(1),
        metavar="N",
        help="sample only what a calibration with this --cali_n takes; the same as -n",
    )
    group.add_argument("--half", action="store_true", help="store the inputs in float16, half the size")
    group.add_argument(
        "--threads",
        type=at_least(1),
        default=1,
        metavar="N",
        help="threads of each process on a CPU; another number is another rounding, in the last digits",
    )
    group = parser.add_argument_group("a look at it")
    group.add_argument(
        "--summary",
        metavar="FILE",
        help="only say what this set holds, and show it; besides --picture and --force no flag goes with it",
    )
    group.add_argument(
        "--picture",
        metavar="FILE",
        help="a PNG of it, a row for each of some steps, a column for each of some samples; latents of more than three "
        "channels in false colours [with --summary, beside the set: cali.png for cali.pt]",
    )
    # Not the default of the sampling command: its images shall not be those that calibration has seen.
    add_common_flags(parser, seed=SEED)
    return parser


def add_kinds_of_model(parser: Parser, *, texts: bool = False) -> None:
    """Model and sampler of a command that takes several kinds, told apart by ``--config`` and ``-r``.

    Args:
        texts: text-to-image models too, told by ``--prompt`` and ``--from-file``.
    """
    pixel.add_model_flags(parser, title="pixel-space model", required=False)
    pixel.add_trajectory_flags(parser.add_argument_group("its sampler"))
    latent.add_model_flags(parser, title="or: latent model", required=False)
    latent.add_trajectory_flags(parser.add_argument_group("its sampler"))
    if texts:
        group = parser.add_argument_group(
            "or: text-to-image model",
            "with --config and --ckpt, by default those of Stable Diffusion v1, and --dpm, --scale",
        )
        text.add_prompt_flags(group)
        text.add_text_model_flags(group)
        text.add_text_sampler_flags(group)
    shared = parser.add_argument_group("sampler of all")
    shared.add_argument(
        "-e",
        "--eta",
        type=real(zero=True),
        metavar="X",
        help="noise in DDIM steps: 0 none, 1 as in DDPM [0; 1 for models named by -r]",
    )
    shared.add_argument(
        "--batch_size",
        type=at_least(1),
        metavar="N",
        help="images at once; changes speed and memory, not the images [sampling.batch_size of a pixel-space model's "
        "config, 10 for others]",
    )


def check_args(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse what can be refused before the config is read."""
    if args.summary is not None:
        check_summary(parser, args)
        return
    if args.out is None:
        parser.error("say where to write the set: --out FILE (or --summary FILE, to look at one that is there)")
    check_kind_of_model(parser, args)
    if args.cali_n is not None and "n_samples" in args.given and args.cali_n > args.n_samples:
        parser.error(f"--cali_n {args.cali_n}: more than the --n_samples {args.n_samples} that are made")
    check_out(parser, args)
    check_picture(parser, args)


def check_summary(parser: Parser, args: argparse.Namespace) -> None:
    """A set that is there, and nothing that would make another."""
    others = sorted(args.given - {"summary", "picture", "force", "verbose"}) + args.overrides
    if others:
        said = others[0] if others[0] in args.overrides else parser.flag(others[0])
        parser.error(f"{said} has no effect with --summary, which makes no set; leave one of them out")
    check_file(parser, args, "summary", "name a calibration set")
    if args.picture is None:
        args.picture = str(Path(args.summary).with_suffix(".png"))
    check_picture(parser, args)


def check_picture(parser: Parser, args: argparse.Namespace) -> None:
    """``--picture`` is a new PNG, or one that ``--force`` replaces."""
    if args.picture is None:
        return
    if Path(args.picture).suffix.lower() != ".png":
        parser.error(f"--picture {args.picture}: is written as a PNG; name a file that ends in .png")
    check_out(parser, args, "picture")


def kind_of(args: argparse.Namespace) -> str | None:
    """``pixel``, ``latent`` or ``text``; None where the flags do not say."""
    if getattr(args, "prompt", None) is not None or getattr(args, "from_file", None) is not None:
        return "text"
    if (args.config is None) == (args.resume_base is None):
        return None
    return "pixel" if args.resume_base is None else "latent"


def check_kind_of_model(parser: Parser, args: argparse.Namespace) -> None:
    """One model, and no flags that are those of another kind; what is left open becomes its kind's default."""
    kind = kind_of(args)
    if kind is None:
        kinds = ["--config FILE for a pixel-space one", "-r PATH for a latent one"]
        if hasattr(args, "prompt"):
            kinds.append("--prompt TEXT or --from-file FILE for a text-to-image one")
        parser.error(f"say which model: {', '.join(kinds[:-1])}, or {kinds[-1]}")
    for name in NOT_OF[kind]:
        if name in args.given:
            other = next(k for k, names in NOT_OF.items() if k != kind and name not in names)
            parser.error(f"{parser.flag(name)} goes with {NAMES[other]}, not with {NAMES[kind]}; leave one of them out")
    if args.eta is None:
        args.eta = 1.0 if kind == "latent" else 0.0
    if kind == "text":
        text.check_text_flags(parser, args, eta="eta")
    elif kind == "latent":
        latent.check_sampler_flags(parser, args)
    else:
        if args.overrides:
            parser.error(f"{args.overrides[0]}: the config of a pixel-space model cannot be changed by such words")
        pixel.check_model_flags(parser, args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exits with status 2 and one line where its input is wrong."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_args(parser, args)
    with exit_on_error(PROGRAM, verbose=args.verbose):
        if args.summary is not None:
            print(describe(Path(args.summary), picture=Path(args.picture)))
            return 0
        with joined_processes(resolve_device(args.device)):
            make(parser, args)
            if WORKERS.rank == 0:
                print(describe(Path(args.out), picture=args.picture and Path(args.picture)))
    return 0


@dataclass(frozen=True)
class Source:
    """What a set is made of.

    Attributes:
        model: the network, with its full-precision weights.
        config: facts of the model.
    """

    model: nn.Module
    sampler: Sampler
    batch_size: int
    config: dict[str, Any]


def make(parser: Parser, args: argparse.Namespace) -> None:
    """Record the set, or the rest of it."""
    kind = kind_of(args)
    assert kind is not None  # check_kind_of_model() has passed
    source = {"pixel": of_pixels, "latent": of_latents, "text": of_texts}[kind](parser, args)
    layout = layout_of(source.sampler, args.cali_n or args.n_samples, cali_st=args.cali_st, half=args.half)
    try:
        record_set(
            Path(args.out),
            source.model,
            source.sampler,
            layout,
            batch_size=source.batch_size,
            batch_flag="--batch_size",
            model_config=source.config,
            anew=args.force,
            threads=args.threads,
            tell=print,
        )
    except (KeyboardInterrupt, OSError) as error:
        in_the_way = f" and {args.out} moved away" if Path(args.out).exists() else ""
        error.add_note("the same command goes on" + (f", with --force left out{in_the_way}" if args.force else ""))
        raise


def of_pixels(parser: Parser, args: argparse.Namespace) -> Source:
    config = load_pixel_config(args.config)
    pixel.check_sampler_flags(parser, args, config)
    sampler = pixel.PixelSampler(config, pixel.SamplerOptions.from_args(args), resolve_device(args.device))
    check_steps(parser, args.cali_st, sampler)
    model = pixel.load_full_precision(args, config)
    return Source(model, sampler, args.batch_size or config.sampling.batch_size, config.to_dict())


def of_latents(parser: Parser, args: argparse.Namespace) -> Source:
    model = latent.LatentModel(args.resume_base, args.overrides)
    sampler = latent.LatentSampler(model, latent.sampler_options(parser, args, model), resolve_device(args.device))
    check_steps(parser, args.cali_st, sampler)
    model.load()
    return Source(model.unet, sampler, args.batch_size or latent.BATCH_SIZE, model.facts())


def of_texts(parser: Parser, args: argparse.Namespace) -> Source:
    prompts, model = text.read_prompts(args), text.text_model(args)
    options = text.text_options(parser, args, model, eta=args.eta)
    sampler = text.TextSampler(model, options, resolve_device(args.device), prompts, size=(args.H, args.W))
    check_steps(parser, args.cali_st, sampler)
    model.load()
    return Source(model.unet, sampler, args.batch_size or latent.BATCH_SIZE, model.facts())
