"""Make a calibration set: run the full-precision sampler and keep what the network sees at every step."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ddim.config import load_config
from qdiff.calibration_data import make_calibration_set, save_calibration_set
from qdiff.cli import latent, pixel, text
from qdiff.cli.errors import exit_on_error, lower_on_out_of_memory
from qdiff.cli.flags import Parser, add_common_flags, at_least, check_out, real, resolve_device
from qdiff.cli.sampling import Sampler, image_bar, with_bar

PROGRAM = "make_calibration_data.py"
EXAMPLES = """\
examples, the sets that the calibrating commands in the README take:
  python scripts/make_calibration_data.py --config configs/cifar10.yml --use_pretrained --timesteps 100 --eta 0 \\
      --skip_type quad -n 256 --cali_st 20 --out cali.pt
  python scripts/make_calibration_data.py -r models/ldm/lsun_beds256/model.ckpt -c 200 -e 1.0 \\
      -n 256 --cali_st 20 --out cali.pt
  python scripts/make_calibration_data.py --from-file prompts.txt --plms --ckpt sd-v1-4.ckpt \\
      -n 128 --cali_st 25 --out cali.pt
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
        "sample with.",
        epilog=EXAMPLES,
        overrides=True,
        usage="%(prog)s (--config FILE | -r PATH | --prompt TEXT | --from-file FILE) --out FILE [flags] "
        "[key=value ...]",
    )
    add_kinds_of_model(parser, texts=True)
    group = parser.add_argument_group("the set")
    group.add_argument("--out", required=True, metavar="FILE", help="where to write it")
    group.add_argument("--force", action="store_true", help="replace --out where it exists")
    group.add_argument("-n", "--n_samples", type=at_least(1), default=256, metavar="N", help="images to sample")
    group.add_argument(
        "--cali_st",
        type=at_least(1),
        metavar="N",
        help="keep only the steps that a calibration with this --cali_st takes [all steps]",
    )
    group.add_argument(
        "--cali_n",
        type=at_least(1),
        metavar="N",
        help="sample only what a calibration with this --cali_n takes; the same as -n",
    )
    group.add_argument("--half", action="store_true", help="store the inputs in float16, half the size")
    # Not the default of the sampling command: its images shall not be those that calibration has seen.
    add_common_flags(parser, seed=0)
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
    check_kind_of_model(parser, args)
    if args.cali_n is not None and "n_samples" in args.given and args.cali_n > args.n_samples:
        parser.error(f"--cali_n {args.cali_n}: more than the --n_samples {args.n_samples} that are made")
    check_out(parser, args)


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
        if "scale" not in args.given:
            args.scale = text.SCALE
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
        content = {"pixel": record_pixels, "latent": record_latents, "text": record_texts}[kind_of(args)](parser, args)
        save_calibration_set(args.out, content)
        print(summary(Path(args.out), content))
    return 0


def record_pixels(parser: Parser, args: argparse.Namespace) -> dict[str, list[Tensor]]:
    config = load_config(args.config)
    pixel.check_sampler_flags(parser, args, config)
    sampler = pixel.PixelSampler(config, pixel.SamplerOptions.from_args(args), resolve_device(args.device))
    _check_steps(parser, args, sampler)
    model = pixel.load_full_precision(args, config)
    return record(args, model, sampler, args.batch_size or config.sampling.batch_size)


def record_latents(parser: Parser, args: argparse.Namespace) -> dict[str, list[Tensor]]:
    model = latent.LatentModel(args.resume_base, args.overrides)
    sampler = latent.LatentSampler(model, latent.sampler_options(parser, args, model), resolve_device(args.device))
    _check_steps(parser, args, sampler)
    model.load()
    context = sampler.conditions(range(args.cali_n or args.n_samples)) if sampler.context_shape else None
    return record(args, model.unet, sampler, args.batch_size or latent.BATCH_SIZE, context)


def record_texts(parser: Parser, args: argparse.Namespace) -> dict[str, list[Tensor]]:
    prompts, model = text.read_prompts(args), text.text_model(args)
    options = text.text_options(parser, args, model, eta=args.eta)
    device, size = resolve_device(args.device), (args.H, args.W)
    sampler = text.TextSampler(model, options, device, prompts, size=size)
    _check_steps(parser, args, sampler)
    model.load()
    unet = model.unet
    context = sampler.conditions(range(args.cali_n or args.n_samples))
    return record(args, unet, sampler, args.batch_size or latent.BATCH_SIZE, context)


def _check_steps(parser: Parser, args: argparse.Namespace, sampler: Sampler) -> None:
    if args.cali_st is not None and args.cali_st > sampler.n_steps:
        parser.error(
            f"--cali_st {args.cali_st}: the sampler makes {sampler.n_steps} steps; keep 1 to {sampler.n_steps}"
        )


def record(
    args: argparse.Namespace,
    model: nn.Module,
    sampler: Sampler,
    batch_size: int,
    context: tuple[Tensor, Tensor] | None = None,
) -> dict[str, list[Tensor]]:
    """Sample and record, with a progress bar."""
    count = args.cali_n or args.n_samples
    with lower_on_out_of_memory("--batch_size", batch_size), image_bar(count) as bar:
        return make_calibration_set(
            with_bar(sampler, model.to(sampler.device), bar),
            n_samples=count,
            n_steps=sampler.n_steps,
            batch_size=batch_size,
            cali_st=args.cali_st,
            half=args.half,
            context=context,
        )


def summary(path: Path, content: dict[str, list[Tensor]]) -> str:
    """What the file holds, in a few lines."""
    xs, ts = content["xs"], content["ts"]
    low, high = min(float(x.min()) for x in xs), max(float(x.max()) for x in xs)
    dtype = str(xs[0].dtype).removeprefix("torch.")
    context = f"  with and without the condition: embeddings of {_shape(content['cs'][0])}\n" if "cs" in content else ""
    return (
        f"{path}: {path.stat().st_size / 2**20:.1f} MiB\n"
        f"  {len(xs)} steps of {_shape(xs[0])} inputs ({dtype}), values {low:.2f} to {high:.2f}\n"
        f"  timesteps {float(ts[0][0]):g} down to {float(ts[-1][0]):g}\n"
        f"{context}"
        f"  calibrate with --cali_data_path {path} --cali_st {len(xs)} --cali_n {len(xs[0])} or fewer"
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
