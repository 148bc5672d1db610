"""Scores of finished images: against a reference set, against another run's images, and against their prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.pretrained import REPOSITORY
from qdiff.cli import evaluation_report
from qdiff.cli.bundles import NAMES, SCORING
from qdiff.cli.errors import UserError, exit_on_error, lower_on_out_of_memory
from qdiff.cli.flags import Parser, add_machine_flags, at_least, check_file, check_out, resolve_device
from qdiff.cli.run_folder import CONFIG_NAME, images_of_run, read_options, run_of_images
from qdiff.evaluation.clip_score import MODEL, ClipJudge, clip_score
from qdiff.evaluation.features import load_classifier
from qdiff.evaluation.fidelity import (
    INCEPTION,
    LPIPS,
    VGG16,
    FidelityNetwork,
    WeightFile,
    find_weights,
    import_torch_fidelity,
    lpips_network,
)
from qdiff.evaluation.frechet import FeatureStatistics, frechet_distance, holds_statistics
from qdiff.evaluation.image_sets import CIFAR10_NAMES, ImageSet, Reading, open_image_set
from qdiff.evaluation.paired import check_pairs, check_same_noise, compare
from qdiff.evaluation.scores import (
    BundledNetwork,
    FeatureNetwork,
    ScoreOptions,
    SeenImages,
    inception_score,
    kernel_distance,
    precision_recall,
    see,
)
from qdiff.evaluation.text_agreement import KnownImages, agreement_of
from qdiff.workers import WORKERS, joined_processes

PROGRAM = "evaluate.py"
DESCRIPTION = (
    "Score images: FID, Inception Score, KID, precision and recall against a reference; PSNR and LPIPS against the "
    "same images of another run; CLIP score and agreement against prompts. docs/evaluation.md says how reference sets "
    "are made and what spoils them."
)
EXAMPLES = """\
examples:
  against prepared images of LSUN, with Inception's features
    python scripts/evaluate.py --images runs/samples/<date> --reference data/bedroom256 --metrics fid,is,kid
  against CIFAR-10, and against statistics that others stored
    python scripts/evaluate.py --images runs/samples/<date> --reference cifar10-train --data_root data
    python scripts/evaluate.py --images runs/samples/<date> --reference fid_stats.npz --append results.jsonl
  the bundled models, by the small networks beside them; no download
    python scripts/evaluate.py --images runs/samples/<date> --features bundled
  a quantized run against the full-precision run of the same seed
    python scripts/evaluate.py --images runs/samples/<quantized> --paired runs/samples/<full> --metrics psnr,lpips
  two GPUs
    torchrun --nproc_per_node=2 scripts/evaluate.py --images runs/samples/<date> --reference data/bedroom256
"""
BUNDLES = {1: REPOSITORY / "models" / "pixel" / "fashion_mnist", 3: REPOSITORY / "models" / "ldm" / "emoji64"}
"""Channels of the images -> the bundle whose model makes such images."""
KNOWN_NAMES = REPOSITORY / "models" / "ldm" / "emoji-text" / NAMES

NAMES_OF_INCEPTION = ("fid", "inception_score", "kid")
NAMES_OF_BUNDLED = ("frechet_distance", "class_score", "kernel_distance")  # others than those that papers report

METRICS = ("fid", "is", "kid", "prc", "psnr", "lpips", "clip", "agreement")
OF_FEATURES = ("fid", "is", "kid", "prc", "agreement")
OF_TWO_SETS = ("kid", "prc")
OF_PAIRS = ("psnr", "lpips")
OF_TEXTS = ("clip", "agreement")


def metric_list(text: str) -> tuple[str, ...]:
    """Converter of names with commas between them."""
    names = tuple(word.strip() for word in text.split(","))
    if unknown := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(METRICS)}")
    return names


def build_parser() -> Parser:
    usage = "%(prog)s --images PATH (--reference SET | --paired RUN | --clip | --metrics LIST) [flags]"
    parser = Parser(prog=PROGRAM, usage=usage, description=DESCRIPTION, epilog=EXAMPLES)
    _add_set_flags(parser.add_argument_group("images"))
    _add_network_flags(parser.add_argument_group("feature networks"))
    _add_score_flags(parser.add_argument_group("scores"))
    group = parser.add_argument_group("output", "A table is printed.")
    group.add_argument("--label", default="", metavar="TEXT", help="what the images are, for the record [their path]")
    group.add_argument(
        "--json", type=Path, metavar="FILE", help="write scores, settings, the run's options and versions"
    )
    group.add_argument("--append", type=Path, metavar="FILE", help="add the same as a line to this file of JSON lines")
    group.add_argument(
        "--save_statistics",
        type=Path,
        metavar="FILE",
        help="keep mean and covariance of the images' features, to be a --reference: .safetensors or .npz",
    )
    group.add_argument("--force", action="store_true", help="replace files of --json and --save_statistics")
    add_machine_flags(parser.add_argument_group("general"))
    return parser


def _add_set_flags(group: argparse._ArgumentGroup) -> None:
    kinds = f"folder of images, .npz, .pt, .safetensors, LMDB, or a name: {', '.join(CIFAR10_NAMES)}"
    group.add_argument("--images", required=True, metavar="PATH", help=f"what is scored: a run's folder, {kinds}")
    group.add_argument("--reference", metavar="PATH", help=f"compare with these: {kinds}; or stored statistics")
    group.add_argument("--paired", metavar="PATH", help="compare with these image by image: the same seeds' images")
    group.add_argument("--data_root", default="data", metavar="DIR", help="where CIFAR-10 lies")
    group.add_argument(
        "--crop_size",
        type=at_least(1),
        metavar="N",
        help="cut images that are not N x N to the central square and resize them, as prepare_lsun.py does",
    )
    group.add_argument("--batch_size", type=at_least(1), default=50, metavar="N", help="images at once")


def _add_network_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--features",
        choices=("inception", "bundled"),
        help="whose features are compared: Inception v3, or the small network of a bundled model, whose figures are no "
        "FID [inception, with --bundle or --captions bundled]",
    )
    group.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="folder of classifier and statistics [models/ldm/emoji64 for colour, models/pixel/fashion_mnist for grey]",
    )
    for file in (INCEPTION, VGG16, LPIPS):
        group.add_argument(file.flag, metavar="FILE", help=f"weights of {file.what} [torch's cache: {file.name}]")
    group.add_argument(
        "--prc_network",
        choices=("vgg16", "same"),
        help="whose features precision and recall are made of: VGG16's, as torch-fidelity has it, or the same as the "
        "others [vgg16, with --features bundled same]",
    )


def _add_score_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--metrics",
        type=metric_list,
        metavar="LIST",
        help=f"of {', '.join(METRICS)}, with commas between [fid and is with a --reference; fid with bundled features; "
        "psnr and lpips with --paired; agreement with --captions; clip with --clip]",
    )
    options = ScoreOptions()
    group.add_argument(
        "--isc_splits", type=at_least(1), default=options.splits, metavar="N", help="parts that IS takes"
    )
    group.add_argument("--kid_subsets", type=at_least(1), default=options.subsets, metavar="N", help="that KID draws")
    group.add_argument("--kid_subset_size", type=at_least(2), default=options.subset_size, metavar="N", help="of KID")
    group.add_argument("--prc_neighbours", type=at_least(1), default=options.neighbours, metavar="N", help="of prc")
    group.add_argument("--seed", type=at_least(0), default=options.seed, help="of IS's parts and KID's subsets")
    group.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="what was drawn, a prompt a line, in turn one for each image [the prompts in the images' own files]",
    )
    group.add_argument(
        "--names", type=Path, default=KNOWN_NAMES, metavar="FILE", help="captions that are known [bundled]"
    )
    group.add_argument(
        "--clip", nargs="?", const=MODEL, metavar="PATH", help=f"CLIP score by the model of a folder or name [{MODEL}]"
    )


def resolve_args(parser: Parser, args: argparse.Namespace) -> None:
    """Fill in what depends on other flags, and refuse what contradicts them, before anything is read."""
    bundled = args.bundle is not None or (args.captions is not None and args.clip is None)
    args.features = args.features or ("bundled" if bundled else "inception")
    if args.features == "inception" and args.bundle is not None:
        parser.error("--bundle belongs to --features bundled")
    args.prc_network = args.prc_network or ("same" if args.features == "bundled" else "vgg16")
    args.metrics = args.metrics if args.metrics is not None else default_metrics(args)
    if "clip" in args.metrics and args.clip is None:
        args.clip = MODEL
    if not args.metrics and args.save_statistics is None:
        parser.error("nothing to score by: name a --reference, --paired, --clip, or --metrics is")
    _check_needs(parser, args)
    for name in ("captions", "names", *(file.flag.strip("-") for file in (INCEPTION, VGG16, LPIPS))):
        check_file(parser, args, name, "name one that is there")
    for name in ("json", "save_statistics"):
        if getattr(args, name) is not None:
            check_out(parser, args, name)
    if args.append is not None and not args.append.absolute().parent.is_dir():
        parser.error(f"--append {args.append}: there is no folder {args.append.absolute().parent}; make it first")


def default_metrics(args: argparse.Namespace) -> tuple[str, ...]:
    """What is scored when nobody says."""
    chosen: list[str] = list(OF_PAIRS) if args.paired is not None else []
    if args.features == "bundled":
        chosen += ["fid"] if args.paired is None or args.reference is not None else []
        chosen += ["agreement"] if args.captions is not None else []
    elif args.reference is not None:
        chosen += ["fid", "is"]
    return tuple(chosen + (["clip"] if args.clip is not None else []))


def _check_needs(parser: Parser, args: argparse.Namespace) -> None:
    bundled = args.features == "bundled"
    for name in args.metrics:
        if name in OF_PAIRS and args.paired is None:
            parser.error(f"--metrics {name} needs --paired PATH, the same images of another run")
        if name in OF_TWO_SETS and args.reference is None:
            parser.error(f"--metrics {name} needs --reference PATH, a set of images")
        if name == "fid" and args.reference is None and not bundled:
            parser.error("--metrics fid needs --reference PATH: images, or stored statistics of their features")
        if name == "agreement" and not bundled:
            parser.error("--metrics agreement needs --features bundled, whose classifier knows the captions")
    if args.paired is not None and not set(args.metrics) & set(OF_PAIRS):
        parser.error("--paired is for --metrics psnr and lpips")
    if args.save_statistics is not None and args.save_statistics.suffix not in (".npz", ".safetensors"):
        parser.error(f"--save_statistics {args.save_statistics}: name it .safetensors or .npz")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exits with status 2 and a few lines where its input is wrong."""
    parser = build_parser()
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    resolve_args(parser, args)
    with exit_on_error(PROGRAM, verbose=args.verbose), joined_processes(resolve_device(args.device)):
        with lower_on_out_of_memory("--batch_size", args.batch_size):
            record = Evaluation(args).run()
        if WORKERS.rank == 0:
            print(evaluation_report.table(record))
            evaluation_report.write(record, args.json, args.append)
    return 0


class Evaluation:
    """One command's images, networks and scores. Nothing is read before it is needed."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, resolve_device(args.device)
        self.options = ScoreOptions(
            args.isc_splits, args.kid_subsets, args.kid_subset_size, args.prc_neighbours, args.seed
        )
        self.bundled = args.features == "bundled"

    def run(self) -> dict[str, Any]:
        """All scores, with what they were made of. Of several processes only the first one's are complete."""
        args = self.args
        wanted = set(args.metrics)
        self._check_first(wanted)
        record: dict[str, Any] = {"label": args.label, "images": args.images, "count": len(self.images(None))}
        metrics: dict[str, Any] = {}
        if wanted & set(OF_FEATURES) or args.save_statistics is not None:
            metrics |= self.of_features(wanted, record)
        if "clip" in wanted:
            images = self.images(3)
            found = clip_score(self.judge, images, self.captions(len(images)), batch_size=args.batch_size)
            metrics["clip_score"] = found
            record["clip_model"] = self.judge.name
        if wanted & set(OF_PAIRS):
            record["paired"] = args.paired
            metrics |= self.of_pairs("lpips" in wanted) or {}
        record["metrics"] = metrics
        record["settings"] = asdict(self.options) | {"crop_size": args.crop_size, "prc_network": args.prc_network}
        record["run"] = run_options(args.images)
        record["environment"] = evaluation_report.surroundings(self.device)
        return record

    def _check_first(self, wanted: set[str]) -> None:
        """What would otherwise be found wrong after the work of an hour."""
        if wanted & set(OF_TEXTS):
            captions = self.captions(len(self.images(None)))
            if self.known is not None:
                with _as_user_errors():
                    self.known.rows(captions)
        if wanted & set(OF_TWO_SETS) and holds_statistics(self.args.reference):
            raise UserError(
                f"--reference {self.args.reference}: stored statistics serve the Fréchet distance alone; "
                f"{' and '.join(sorted(wanted & set(OF_TWO_SETS)))} need a set of images"
            )
        if wanted & {"is", "kid", "prc"}:
            import_torch_fidelity()
        if wanted & set(OF_PAIRS):
            check_pairs(self.images(None), self.others)
            ours, theirs = (run_options(path) for path in (self.args.images, self.args.paired))
            if ours is not None and theirs is not None:
                check_same_noise(ours, theirs)

    # ---- what is read ----------------------------------------------------------------------------------------------

    def images(self, channels: int | None) -> ImageSet:
        return self._open(self.args.images, channels)

    @cached_property
    def others(self) -> ImageSet:
        return self._open(self.args.paired, None)

    def _open(self, path: str, channels: int | None) -> ImageSet:
        place = path if path in CIFAR10_NAMES else images_of_run(Path(path))
        images = open_image_set(place, Reading(channels, self.args.crop_size), self.args.data_root)
        if len(images) == 0:
            raise UserError(f"{path}: holds no image")
        return images

    @cached_property
    def bundle(self) -> Path:
        """The folder that was named, or that of the bundled model which makes such images."""
        return self.args.bundle or BUNDLES[self.images(None).read(0, 1).shape[1]]

    @cached_property
    def network(self) -> FeatureNetwork:
        if not self.bundled:
            path = self.weights(INCEPTION, self.args.inception_weights)
            return FidelityNetwork(INCEPTION, path, self.device, logits="is" in self.args.metrics)
        with _as_user_errors():
            return BundledNetwork(load_classifier(self.bundle / SCORING[0], self.device), self.bundle / SCORING[0])

    def weights(self, file: WeightFile, own: str | None) -> Path:
        """A file of weights, which the first process fetches where it must be."""
        import_torch_fidelity()
        if WORKERS.rank == 0:
            find_weights(file, own)
        WORKERS.wait()
        return find_weights(file, own)

    @cached_property
    def reference(self) -> FeatureStatistics | ImageSet | None:
        """Stored statistics, or images in the channels that the network takes."""
        path = self.args.reference
        if path is None and not self.bundled:
            return None
        stored = self.bundle / SCORING[1] if path is None else Path(path)
        if path is None or holds_statistics(stored):
            with _as_user_errors():
                return FeatureStatistics.load(stored)
        return self._open(path, self._channels(self._open(path, None)))

    def _channels(self, images: ImageSet) -> int:
        """Those of the network. Inception takes grey images as colours; no colour image becomes grey unasked."""
        channels = images.read(0, 1).shape[1]
        if self.network.channels == 1 and channels == 3:
            raise UserError(f"{images.path}: colour images, while the network of {self.bundle} takes grey ones")
        return self.network.channels

    @cached_property
    def judge(self) -> ClipJudge:
        if WORKERS.rank == 0:
            ClipJudge(self.args.clip, self.device)
        WORKERS.wait()
        return ClipJudge(self.args.clip, self.device)

    @cached_property
    def known(self) -> KnownImages | None:
        if "agreement" not in self.args.metrics:
            return None
        with _as_user_errors():
            return KnownImages.load(self.args.names, self.bundle / SCORING[0])

    def captions(self, count: int) -> list[str]:
        """The prompt of each image, from a file or from the images' own."""
        if self.args.captions is None:
            return self.images(None).texts()
        return read_captions(self.args.captions, count)

    # ---- what is found ---------------------------------------------------------------------------------------------

    def of_features(self, wanted: set[str], record: dict[str, Any]) -> dict[str, Any]:
        """Scores by the features of :attr:`network`, and of VGG16 where precision and recall are its own."""
        args = self.args
        vgg16 = "prc" in wanted and args.prc_network == "vgg16"
        of_network = wanted & set(OF_FEATURES) - ({"prc"} if vgg16 else set())
        found: dict[str, Any] = {}
        if of_network or args.save_statistics is not None:
            found |= self._of_network(of_network, record)
        if vgg16:
            found |= self._precision_recall_of_vgg16(record)
        return found

    def _of_network(self, wanted: set[str], record: dict[str, Any]) -> dict[str, Any]:
        args, reference = self.args, self.reference if wanted & {"fid", "kid", "prc"} else None
        record["features"] = self.network.name
        both = ["features"] if wanted & set(OF_TWO_SETS) else []
        keep = (both or (["features"] if "agreement" in wanted else [])) + (
            ["logits"] if wanted & {"is", "agreement"} else []
        )
        images = self.images(self._channels(self.images(None)))
        seen = see(self.network, images, batch_size=args.batch_size, keep=keep, name=args.label)
        other = SeenImages(reference) if isinstance(reference, FeatureStatistics) else None
        if isinstance(reference, ImageSet):
            other = see(self.network, reference, batch_size=args.batch_size, keep=both)
        if seen is None:
            return {}
        if args.save_statistics is not None:
            seen.statistics.save(args.save_statistics)
        if other is not None:
            record["reference"] = args.reference or other.statistics.name
            record["reference_count"] = other.statistics.count
        return self._scores(wanted, seen, other)

    def _scores(self, wanted: set[str], seen: SeenImages, other: SeenImages | None) -> dict[str, Any]:
        names = NAMES_OF_BUNDLED if self.bundled else NAMES_OF_INCEPTION
        found: dict[str, Any] = {}
        if "fid" in wanted:
            assert other is not None
            with _as_user_errors():
                found[names[0]] = frechet_distance(seen.statistics, other.statistics)
        if "is" in wanted:
            found[names[1]] = inception_score(_kept(seen.logits), self.options)
        if "kid" in wanted:
            assert other is not None
            found[names[2]] = kernel_distance(_kept(seen.features), _kept(other.features), self.options)
        if "prc" in wanted:
            assert other is not None
            found |= precision_recall(_kept(seen.features), _kept(other.features), self.options)
        if "agreement" in wanted:
            assert self.known is not None
            guessed = _kept(seen.logits).argmax(1)
            shares = agreement_of(self.known, _kept(seen.features), guessed, self.captions(len(guessed))).to_dict()
            found |= {name: shares[name] for name in ("group", "named", "base")}
        return found

    def _precision_recall_of_vgg16(self, record: dict[str, Any]) -> dict[str, Any]:
        network = FidelityNetwork(VGG16, self.weights(VGG16, self.args.vgg16_weights), self.device)
        record["precision_recall_features"] = network.name
        record["reference"] = self.args.reference
        sets = (self.images(3), self._open(self.args.reference, 3))
        ours, theirs = (see(network, images, batch_size=self.args.batch_size, keep=["features"]) for images in sets)
        if ours is None or theirs is None:  # another process has them
            return {}
        return precision_recall(_kept(ours.features), _kept(theirs.features), self.options)

    def of_pairs(self, with_lpips: bool) -> dict[str, Any] | None:
        lpips = None
        if with_lpips:
            files = self.weights(LPIPS, self.args.lpips_weights), self.weights(VGG16, self.args.vgg16_weights)
            lpips = lpips_network(*files, self.device)
        return compare(self.images(None), self.others, lpips, batch_size=self.args.batch_size)


@contextmanager
def _as_user_errors() -> Iterator[None]:
    """Around what reads a file or compares what files hold: its refusals are about the user's choice of them."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def run_options(path: str) -> dict[str, Any] | None:
    """What the run of some images recorded, where they are a run's."""
    folder = None if path in CIFAR10_NAMES else run_of_images(Path(path))
    return None if folder is None else read_options(folder / CONFIG_NAME)


def read_captions(path: Path, count: int) -> list[str]:
    """The captions of ``count`` images, which are those of a file's lines in turn, empty ones left out.

    Raises:
        UserError: the file is no text or holds no caption.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--captions {path}: cannot be read ({error})") from None
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise UserError(f"--captions {path}: holds no caption")
    return [captions[number % len(captions)] for number in range(count)]


def _kept(x: Tensor | None) -> Tensor:
    """What :func:`see` was asked to keep."""
    assert x is not None
    return x
