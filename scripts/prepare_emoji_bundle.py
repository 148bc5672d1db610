"""Make the files of models/ldm/emoji64 and models/ldm/emoji-text: what scores emoji samples, and the trained models.

    python scripts/prepare_emoji_bundle.py classifier --data data/emoji64
    python scripts/prepare_emoji_bundle.py model --run RUN --data data/emoji64
    python scripts/prepare_emoji_bundle.py checkpoints --tables TABLES

The first trains a small classifier of the nine groups of emoji (minutes on a CPU) and writes it with the statistics of
its features over the training images, every group weighing equally, and what was measured about both:
``classifier.safetensors``, ``reference_statistics.safetensors``, ``classifier.json``. The second takes the folder that
train_ldm.py wrote: ``model.safetensors`` in fp16, ``config.yaml``, ``train.json``, and in ``first_stage.json`` how far
images lie from the training images that only went through the first stage: what that alone costs. The third
takes two calibrated checkpoints out of the folder that reproduce_tables.py wrote: ``w4a8.safetensors`` with the better
options, ``w4a8-published.safetensors`` with the published flags.

    python scripts/prepare_emoji_bundle.py tokenizer --data data/emoji64
    python scripts/prepare_emoji_bundle.py names --data data/emoji64
    python scripts/prepare_emoji_bundle.py text-model --run RUN --data data/emoji64
    python scripts/prepare_emoji_bundle.py text-checkpoint --tables TABLES

do the same for the model of captions, whose samples the classifier of models/ldm/emoji64 scores. The first learns a
tokenizer of CLIP's kind from the training captions, which train_ldm.py needs: ``tokenizer/``. The second writes the
training images' features with their names, by which images are recognised, and the captions to draw for that:
``names.safetensors``, ``captions.txt``, ``names.json``. The last takes one checkpoint, ``w4a8.safetensors``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from ddim.config import ConfigError
from ddim.datasets import DatasetUnavailable
from ddim.pretrained import weights_facts
from ldm.data.emoji import CLASSES, SPLITS, EmojiImages, Split
from ldm.data.emoji_list import base_of
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import TextEncoder
from ldm.modules.encoders.tokenizers import (
    CLIP,
    clip_vocabulary,
    learn_merges,
    load_tokenizer,
    tokenizer_files,
    write_clip_tokenizer,
)
from ldm.pretrained import find_checkpoint, load_latent_diffusion
from ldm.training import encode_weights, to_model, to_pixels, weights_for_file
from ldm.util import load_model_config
from qdiff.checkpoint import read_info, save_packed
from qdiff.cli.bundles import (
    BUNDLES,
    CAPTIONS_JUDGED,
    CAPTIONS_SEED,
    NAMES,
    SCORING,
    TOKENIZER,
    LatentBundle,
)
from qdiff.cli.errors import UserError, exit_on_error
from qdiff.cli.flags import Help, at_least
from qdiff.evaluation.features import (
    EmojiClassifier,
    balanced_statistics,
    guesses,
    image_statistics,
    save_classifier,
)
from qdiff.evaluation.frechet import FeatureStatistics, frechet_distance
from qdiff.evaluation.record import environment, read_json, write_json
from qdiff.evaluation.text_agreement import KnownImages, agreement
from qdiff.files import write_atomically

PROGRAM = "prepare_emoji_bundle.py"
MODELS = Path(__file__).resolve().parents[1] / "models" / "ldm"
BUNDLE, TEXT_BUNDLE = MODELS / "emoji64", MODELS / "emoji-text"
LIMIT = 16 * 10**6  # bytes of the whole folder
RATE, WEIGHT_DECAY, SMOOTHING = 2e-3, 0.05, 0.1
SHIFT, ZOOM, TURN = 0.15, 0.2, 0.3  # of the augmentation, at most: of half the width, of the size, in radians
# Of the bundle -> of the tables, and whether the correction of the output, which they fit to all, belongs to it.
CHECKPOINTS = {
    "w4a8.safetensors": ("qdiff-w4a8-asym-split_input=True-timed_ranges=all-weight_lr=0.03", True),
    "w4a8-published.safetensors": ("qdiff-w4a8", False),
}
TEXT_CHECKPOINTS = {"w4a8.safetensors": ("qdiff-w4a8-asym-split_input=True-timed_ranges=all-weight_lr=0.03", False)}
OF_CALIBRATION = ("iters", "iters_a", "cali_samples", "cali_seed", "cali_precision")  # settings of the tables
BLURS = (0.5, 1.0, 2.0)  # pixels
NOISES = (8.0, 16.0, 32.0)  # of 255
VOCABULARY, MAX_TOKENS = 1500, 24  # as configs/latent-diffusion/emoji-text.yaml has them
IMAGES_AT_ONCE = 64
WHITE = 1.0  # behind the emoji


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=Help, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, summary: str, out: Path = BUNDLE) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=summary, description=summary, formatter_class=Help, allow_abbrev=False)
        own.set_defaults(run=run)
        own.add_argument("--out", type=Path, default=out, help="default: the bundle in this repository")
        return own

    def add_data(own: argparse.ArgumentParser) -> None:
        own.add_argument("--data", type=Path, required=True, help="folder that prepare_emoji.py wrote")

    def add_run(own: argparse.ArgumentParser) -> None:
        own.add_argument("--run", dest="folder", type=Path, required=True, help="folder that train_ldm.py wrote")

    def add_device(own: argparse.ArgumentParser) -> None:
        own.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    def add_judges(own: argparse.ArgumentParser) -> None:
        own.add_argument("--judges", type=Path, default=BUNDLE, help="folder of the classifier [models/ldm/emoji64]")

    own = add("classifier", make_classifier, "Train the classifier and measure what it is good for.")
    add_data(own)
    own.add_argument("--epochs", type=at_least(1), default=30, help="times that every image is seen, on average")
    own.add_argument("--batch_size", type=at_least(2), default=64)
    own.add_argument("--seed", type=at_least(0), default=0)
    add_device(own)

    own = add("model", make_model, "Turn a trained run into the bundled model.")
    add_run(own)
    add_data(own)
    add_device(own)

    own = add("checkpoints", take_checkpoints, "Take the bundled checkpoints out of a folder of tables.")
    own.add_argument("--tables", type=Path, required=True, help="folder that reproduce_tables.py wrote")

    own = add("tokenizer", make_tokenizer, "Learn the tokenizer of the model of captions.", TEXT_BUNDLE)
    add_data(own)
    own.add_argument("--vocabulary", type=at_least(515), default=VOCABULARY, help="how many tokens there are")
    own.add_argument("--max_length", type=at_least(3), default=MAX_TOKENS, help="of a caption, in tokens")

    own = add("names", make_names, "Write by what images are recognised, and the captions to draw.", TEXT_BUNDLE)
    add_data(own)
    add_judges(own)
    add_device(own)

    own = add("text-model", make_text_model, "Turn a trained run into the bundled model of captions.", TEXT_BUNDLE)
    add_run(own)
    add_data(own)
    add_judges(own)
    add_device(own)

    own = add("text-checkpoint", take_text_checkpoint, "Take its checkpoint out of a folder of tables.", TEXT_BUNDLE)
    own.add_argument("--tables", type=Path, required=True, help="folder that reproduce_tables.py wrote")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    with exit_on_error(PROGRAM):
        args.out.mkdir(parents=True, exist_ok=True)
        args.run(args)
        size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
        print(f"{args.out}: {size / 1e6:.2f} MB in all")
        if size > LIMIT:
            raise UserError(f"{args.out}: {size} bytes, more than the {LIMIT} that the bundle may have")
    return 0


def read_split(folder: Path, split: Split) -> EmojiImages:
    try:
        return EmojiImages(folder, split)
    except DatasetUnavailable as error:
        raise UserError(f"--data {error}") from None


# The classifier.


def make_classifier(args: argparse.Namespace) -> None:
    train, heldout = (read_split(args.data, split) for split in SPLITS)
    weights = train_classifier(train, args)
    about = {"what": "classifier of the groups of emoji, colour images in [-1, 1]", "network": "emoji64"}
    path = args.out / "classifier.safetensors"
    save_classifier(path, weights, about)
    classifier = EmojiClassifier.load(path, args.device)  # as rounded: it is what scores
    name = f"{len(train)} emoji of 64x64, every group weighing equally"
    reference = balanced_statistics(classifier, train.images, train.labels, name)
    reference.save(args.out / "reference_statistics.safetensors")
    facts = judge(classifier, train, heldout, reference)
    settings = {name: getattr(args, name) for name in ("epochs", "batch_size", "seed")}
    facts |= {"settings": settings, "data": train.made_with, "environment": environment(args.device)}
    write_json(args.out / "classifier.json", facts)


def train_classifier(data: EmojiImages, args: argparse.Namespace) -> dict[str, Tensor]:
    """Weights, after cross entropy on moved, zoomed, turned and mirrored images.

    A group of n images is drawn in proportion to the root of n: more evenly than they are, since most emoji are people.
    """
    torch.manual_seed(args.seed)
    layout = torch.channels_last  # nearly twice as fast, on a CPU too
    model = EmojiClassifier().to(args.device, memory_format=layout).train()
    images, labels = data.images.to(args.device), data.labels.to(args.device)
    chances = labels.bincount(minlength=len(CLASSES)).float().clamp(min=1).rsqrt()[labels]
    steps = args.epochs * math.ceil(len(data) / args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
    for _ in tqdm(range(steps), unit="step", mininterval=5):
        chosen = chances.multinomial(args.batch_size)
        scores = model(augmented(to_model(images[chosen])).contiguous(memory_format=layout))
        loss = F.cross_entropy(scores, labels[chosen], label_smoothing=SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}


def augmented(images: Tensor) -> Tensor:
    """Images in [-1, 1] on white, each moved, zoomed, turned and mirrored at random; colours stay as they are."""
    n, device = len(images), images.device
    draw = lambda: torch.rand(n, device=device) * 2 - 1  # noqa: E731
    angle, size = TURN * draw(), 1 + ZOOM * draw()
    mirror = draw().sign()
    cos, sin = angle.cos() * size, angle.sin() * size
    rows = [torch.stack([mirror * cos, -sin, SHIFT * draw()], 1), torch.stack([mirror * sin, cos, SHIFT * draw()], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images - WHITE, grid, align_corners=False) + WHITE  # outside of an image lies white


def judge(
    classifier: EmojiClassifier, train: EmojiImages, heldout: EmojiImages, reference: FeatureStatistics
) -> dict[str, Any]:
    """How often it is right, and how far sets of images lie from the training images; printed and returned.

    A set as small as the held-out one lies away from the training images by being small. The same number of each group
    of the training images says how far that is.
    """
    right = {}
    for name, data in (("train", train), ("heldout", heldout)):
        correct = (guesses(classifier, data.images) == data.labels).double()
        by_group = [float(correct[data.labels == label].mean()) for label in range(len(CLASSES))]
        right[name] = {"all": float(correct.mean()), "mean of groups": sum(by_group) / len(CLASSES)}
        right[name] |= dict(zip(CLASSES, by_group, strict=True))
        print(f"{name}: " + ", ".join(f"{group} {share:.3f}" for group, share in right[name].items()), flush=True)

    draws = torch.Generator().manual_seed(0)

    def distance(images: Tensor, labels: Tensor) -> float:
        return frechet_distance(balanced_statistics(classifier, images, labels, ""), reference)

    same = torch.cat([some(train.labels, label, heldout.labels, draws) for label in range(len(CLASSES))])
    found = {
        "training images": distance(train.images, train.labels),
        "training images as they are, most of them people": frechet_distance(
            image_statistics(classifier, train.images, ""), reference
        ),
        "as many training images of each group as are held out": distance(train.images[same], train.labels[same]),
        "held-out images": distance(heldout.images, heldout.labels),
    }
    for sigma in BLURS:
        for name, data in (("training", train), ("held-out", heldout)):
            blurred = gaussian_blur(data.images, 2 * math.ceil(3 * sigma) + 1, sigma)
            found[f"{name} images blurred by {sigma:g} pixels"] = distance(blurred, data.labels)
    for sigma in NOISES:
        for name, data in (("training", train), ("held-out", heldout)):
            noise = torch.randn(data.images.shape, generator=draws) * sigma
            noisy = (data.images + noise).round().clamp(0, 255).to(torch.uint8)
            found[f"{name} images with noise of {sigma:g} / 255"] = distance(noisy, data.labels)
    for name, value in found.items():
        print(f"{value:9.4f}  {name}", flush=True)
    return {"accuracy": right, "distance to the training images": found}


def some(labels: Tensor, label: int, like: Tensor, draws: torch.Generator) -> Tensor:
    """Numbers of as many images of a class as ``like`` has of it, drawn without repetition."""
    members = (labels == label).nonzero()[:, 0]
    return members[torch.randperm(len(members), generator=draws)[: int((like == label).sum())]]


# The model.


def make_model(args: argparse.Namespace) -> None:
    """The run's averaged weights in fp16. Nothing is written of a model that cannot be sampled from."""
    require(args.out, SCORING, "classifier")
    source, model = trained_model(args.folder)
    classes = getattr(getattr(model, "cond_stage_model", None), "n_classes", 0)
    if classes != len(CLASSES) + 1 or model.use_ema:
        raise ConfigError(
            f"{args.folder}: n_classes is {classes} and use_ema {model.use_ema}; the bundle's model has one class more "
            f"than the {len(CLASSES)} groups, and its averages in place of weights"
        )
    write_model(args, source, model, BUNDLES["emoji64"].scale)
    facts = judge_first_stage(load_latent_diffusion(args.out, device=args.device), args, args.out)
    write_json(args.out / "first_stage.json", facts | {"environment": environment(args.device)})


def require(folder: Path, names: Sequence[str], command: str) -> None:
    """Raises :class:`UserError` where a file is missing that an earlier command makes."""
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder}: lacks {', '.join(missing)}; `{PROGRAM} {command}` makes them first")


def trained_model(folder: Path) -> tuple[Path, LatentDiffusion]:
    """The checkpoint of a run and what it holds, every value of it finite."""
    try:
        source = find_checkpoint(folder)
        model = load_latent_diffusion(source)
    except ValueError as error:
        raise UserError(f"--run {error}") from None
    if broken := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise UserError(f"{source}: {broken[0]} holds values that are not finite")
    return source, model


def write_model(args: argparse.Namespace, source: Path, model: LatentDiffusion, scale: float) -> None:
    """Weights in fp16, the config, which recommends the guidance ``scale``, and the facts of the training."""
    config = {"model": load_model_config(args.folder / "config.yaml"), "sampling": {"scale": scale}}
    weights = weights_for_file(model, torch.float16)
    write_atomically(args.out / "model.safetensors", encode_weights(weights, weights_facts(source)))
    write_atomically(args.out / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    write_json(args.out / "train.json", read_json(args.folder / "train.json"))


@torch.no_grad()
def judge_first_stage(
    model: LatentDiffusion, args: argparse.Namespace, judges: Path, known: KnownImages | None = None
) -> dict[str, Any]:
    """Images that were encoded and decoded again, against the training images; printed and returned.

    Args:
        judges: folder of the classifier and the statistics.
        known: with it also, how often decoded training images are still recognised: no model can do better.
    """
    classifier = EmojiClassifier.load(judges / SCORING[0], args.device)
    reference = FeatureStatistics.load(judges / SCORING[1])
    stage, found, facts = model.first_stage_model, {}, {}
    for split in SPLITS:
        data = read_split(args.data, split)
        parts = (to_model(part.to(args.device)) for part in data.images.split(IMAGES_AT_ONCE))
        decoded = torch.cat([to_pixels(stage.decode(stage.encode(part).mean)).cpu() for part in parts])
        statistics = balanced_statistics(classifier, decoded, data.labels, "")
        found[split] = frechet_distance(statistics, reference)
        print(f"{found[split]:9.4f}  {split} images through the first stage", flush=True)
        if known is not None and split == "train":
            facts["agreement of decoded training images"] = agreement(
                classifier, known, *judged(known, data, decoded)
            ).to_dict()
    return {"distance to the training images": found, **facts}


# The checkpoints.


def take_checkpoints(args: argparse.Namespace) -> None:
    """As the tables made them, with their settings in the header; the published one without a corrected output."""
    take(BUNDLES["emoji64"], CHECKPOINTS, args)


def take(bundle: LatentBundle, checkpoints: dict[str, tuple[str, bool]], args: argparse.Namespace) -> None:
    """Checkpoints out of a folder of tables.

    Args:
        checkpoints: name in the bundle -> recipe of the tables, and whether its corrected output belongs to it.
    """
    bundle = dataclasses.replace(bundle, folder=args.out)
    sources = {name: args.tables / "calibrated" / f"{recipe}.safetensors" for name, (recipe, _) in checkpoints.items()}
    if missing := [str(path) for path in sources.values() if not path.is_file()]:
        raise UserError(f"--tables {args.tables}: lacks {', '.join(missing)}")
    settings = read_json(args.tables / "settings.json")
    for name, (recipe, corrected) in checkpoints.items():
        model = bundle.from_packed(sources[name])
        if not corrected:
            model.output_scale = None
        facts = read_info(sources[name]).calibration | {"recipe": recipe}
        facts |= {key: settings[key] for key in OF_CALIBRATION if key in settings}
        save_packed(args.out / name, model, info={"model_config": bundle.facts, "calibration": facts})


# The model of captions.


def make_tokenizer(args: argparse.Namespace) -> None:
    """From the training captions alone: held-out ones have to do with its tokens, as any prompt has."""
    captions = read_split(args.data, "train").captions
    merges = learn_merges(captions, args.vocabulary - len(clip_vocabulary([])))
    folder = args.out / TOKENIZER
    write_clip_tokenizer(folder, merges, args.max_length)
    tokenizer = load_tokenizer(CLIP, TOKENIZER, folder)
    if len(tokenizer) != args.vocabulary:
        raise UserError(f"--vocabulary {args.vocabulary}: {len(captions)} captions give no more than {len(tokenizer)}")
    for split in SPLITS:
        lengths = [len(row) for row in tokenizer(read_split(args.data, split).captions, verbose=False)["input_ids"]]
        longest, mean = max(lengths), sum(lengths) / len(lengths)
        print(f"{split}: {len(lengths)} captions of {mean:.1f} tokens on average, {longest} at most, marks included")
        if longest > args.max_length:
            raise UserError(f"--max_length {args.max_length}: a caption has {longest} tokens")


def make_names(args: argparse.Namespace) -> None:
    """Features of the training images, the captions to draw, and what recognising by features is good for."""
    require(args.judges, SCORING, "classifier")
    path = args.judges / SCORING[0]
    classifier, train = EmojiClassifier.load(path, args.device), read_split(args.data, "train")
    known = KnownImages.of(path, classifier, train.images, train.labels, bases(train.emoji), train.captions)
    known.save(args.out / NAMES)
    captions = known.in_turn(CAPTIONS_SEED)[:CAPTIONS_JUDGED]
    write_atomically(args.out / "captions.txt", ("\n".join(captions) + "\n").encode())
    draws = torch.Generator().manual_seed(0)
    images, captions = judged(known, train, train.images)
    changed = {"training images": images}
    for sigma in BLURS:
        changed[f"blurred by {sigma:g} pixels"] = gaussian_blur(images, 2 * math.ceil(3 * sigma) + 1, sigma)
    for sigma in NOISES:
        noise = torch.randn(images.shape, generator=draws) * sigma
        changed[f"with noise of {sigma:g} / 255"] = (images + noise).round().clamp(0, 255).to(torch.uint8)
    found = {name: agreement(classifier, known, these, captions).to_dict() for name, these in changed.items()}
    for name, shares in found.items():
        print(", ".join(f"{key} {value:.3f}" for key, value in shares.items() if key != "count") + f"  {name}")
    facts = {"agreement": found, "data": train.made_with, "environment": environment(args.device)}
    write_json(args.out / "names.json", facts)


def bases(emoji: Sequence[str]) -> Tensor:
    """A number for each emoji, the same for variants of one."""
    numbers: dict[tuple[int, ...], int] = {}
    found = [base_of(tuple(map(ord, one))) for one in emoji]
    return torch.tensor([numbers.setdefault(base, len(numbers)) for base in found])


def judged(known: KnownImages, data: EmojiImages, images: Tensor) -> tuple[Tensor, list[str]]:
    """Those of the training images whose captions are drawn to measure agreement, and these captions.

    Args:
        images: the training images or what became of them, in the same order.
    """
    captions = known.in_turn(CAPTIONS_SEED)[:CAPTIONS_JUDGED]
    rows = {caption: row for row, caption in enumerate(data.captions)}
    return images[[rows[caption] for caption in captions]], captions


def make_text_model(args: argparse.Namespace) -> None:
    """The run's averaged weights in fp16, text encoder and first stage among them, and its tokenizer."""
    require(args.judges, SCORING, "classifier")
    require(args.out, [NAMES], "names")
    source, model = trained_model(args.folder)
    encoder = getattr(model, "cond_stage_model", None)
    if not isinstance(encoder, TextEncoder) or model.use_ema:
        raise ConfigError(
            f"{args.folder}: use_ema is {model.use_ema} and the condition {model.cond_stage_key!r}; the bundle's model "
            "has a text encoder, and its averages in place of weights"
        )
    if encoder.tokenizer_folder != str((args.folder / TOKENIZER).resolve()):
        raise ConfigError(f"{args.folder}: the config names no tokenizer beside it (version: ./{TOKENIZER})")
    _ = encoder.tokenizer  # read before anything is written
    try:
        known = KnownImages.load(args.out / NAMES, args.judges / SCORING[0])
    except ValueError as error:
        raise UserError(str(error)) from None
    write_model(args, source, model, BUNDLES["emoji-text"].scale)
    (args.out / TOKENIZER).mkdir(exist_ok=True)
    for name, content in tokenizer_files(args.folder / TOKENIZER).items():
        write_atomically(args.out / TOKENIZER / name, content)
    facts = judge_first_stage(load_latent_diffusion(args.out, device=args.device), args, args.judges, known)
    write_json(args.out / "first_stage.json", facts | {"environment": environment(args.device)})


def take_text_checkpoint(args: argparse.Namespace) -> None:
    """As the tables made it, with its settings in the header."""
    take(BUNDLES["emoji-text"], TEXT_CHECKPOINTS, args)


if __name__ == "__main__":
    raise SystemExit(main())
