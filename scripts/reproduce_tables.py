"""The paper's tables and ablations on a bundled model, in one command that can be stopped and started again.

    python scripts/reproduce_tables.py --model fashion_mnist --out tables

makes calibration sets, calibrates, samples and scores, row by row. What is finished lies in the output folder and is
not done again: calibration sets, calibrated checkpoints and one file a row, and from those ``results.json``,
``results.md`` and ``results.png``. ``--list`` shows the rows.

Several processes may work in one folder, one a GPU, say. Each takes rows that no other has taken, and what several rows
need is made once. Who has what is said by file locks, which the kernel drops when a process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qdiff.calibrate import calibrate
from qdiff.calibration_data import save_calibration_set
from qdiff.checkpoint import load_quantized, save_packed
from qdiff.cli.bundles import BUNDLES, LatentBundle
from qdiff.cli.errors import UserError, exit_on_error
from qdiff.cli.flags import (
    Parser,
    add_inference_flags,
    at_least,
    check_inference,
    device_name,
    inference_config,
    real,
    resolve_device,
)
from qdiff.config import CALI_PRECISIONS, CalibrationConfig, QuantConfig
from qdiff.evaluation.record import environment, read_json, write_json
from qdiff.evaluation.variants import HeldOutInputs, comparison_picture, markdown_table
from qdiff.files import atomic_file, write_atomically
from qdiff.quant_model import QuantModel

PROGRAM = "reproduce_tables.py"
EXAMPLES = """\
examples:
  everything, half an hour at a time: the same command goes on where it stopped
    python scripts/reproduce_tables.py --model fashion_mnist --out tables --tf32 --minutes 30
  on two GPUs: the same command once a GPU, at any time; they share the folder and take different rows
    CUDA_VISIBLE_DEVICES=0 python scripts/reproduce_tables.py --out tables --tf32 &
    CUDA_VISIBLE_DEVICES=1 python scripts/reproduce_tables.py --out tables --tf32
  the latent models, of classes and of captions
    python scripts/reproduce_tables.py --model emoji64 --out tables-emoji --tf32 --minutes 30
    python scripts/reproduce_tables.py --model emoji-text --out tables-text --tf32 --minutes 30
  a quick look on a CPU
    python scripts/reproduce_tables.py --out quick --rows full 'linear-w4*' --count 100 --cali_samples 320
"""
SHOWN = 12  # images of each row that the picture keeps
HELD_OUT = {"steps": 20, "per_step": 8}  # inputs for the output error
SET_SEED = 2026  # of the images whose trajectories are calibrated on
SAMPLER_STEPS = 100  # of those trajectories, eta 0
FULL = 32  # "bits" of activations that are not quantized
# Fields of a recipe's ``quant`` and ``calibration`` that do not reach its weights. All others are taken to reach them.
ACTIVATION_QUANT = ("sm_abit", "act_range", "timed_ranges", "split_input")
ACTIVATION_CALIBRATION = ("lr", "p", "range_samples", "range_order", "running_stat", "rs_sm_only")
MODELS = BUNDLES
AGREEMENT = {"group": "group", "named": "emoji", "base": "emoji or a variant"}  # shares -> their columns


@dataclass(frozen=True)
class Recipe:
    """One calibration: everything but the seed and the iterations that decides a checkpoint.

    A row of further options is one line in :data:`ROWS`, as ``Row("Error search", Recipe("qdiff", 4, a_sym=False,
    quant={"act_range": "mse"}))``.

    Attributes:
        mode: ``linear`` rounds to nearest, ``qdiff`` reconstructs.
        weight_bit, act_bit: the checkpoint holds both; it also serves rows that leave activations alone. Without
            ``act_bit`` it holds weights only, for others to go on from.
        steps: timesteps the calibration set is drawn from. The number of samples in all stays the same.
        quant, calibration: further fields of :class:`QuantConfig` and :class:`CalibrationConfig`.
    """

    mode: str
    weight_bit: int
    act_bit: int | None = 8
    split: bool = True
    a_sym: bool = True
    steps: int = 20
    quant: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its checkpoint: what differs from the usual, in words."""
        words = [f"{self.mode}-w{self.weight_bit}" + ("" if self.act_bit is None else f"a{self.act_bit}")]
        words += [] if self.split else ["nosplit"]
        words += [] if self.a_sym else ["asym"]
        words += [] if self.steps == Recipe.steps else [f"st{self.steps}"]
        words += [f"{key}={value}" for key, value in sorted({**self.quant, **self.calibration}.items())]
        return "-".join(words)

    @property
    def weights(self) -> Recipe:
        """What decides the weights: one for all recipes that differ in activations only."""

        quant = {name: value for name, value in self.quant.items() if name not in ACTIVATION_QUANT}
        calibration = {name: v for name, v in self.calibration.items() if name not in ACTIVATION_CALIBRATION}
        return replace(self, act_bit=None, a_sym=Recipe.a_sym, quant=quant, calibration=calibration)

    def quant_config(self, family: Mapping[str, Any] = MappingProxyType({})) -> QuantConfig:
        """Args:
        family: what all recipes of a family of models have in common, in the place of defaults.
        """
        act: dict[str, Any] = {}
        if self.act_bit is not None:
            act = {"act_bit": self.act_bit, "quant_act": True, "a_sym": self.a_sym}
        return QuantConfig(self.weight_bit, split=self.split, **act, **{**family, **self.quant})

    def calibration_options(self, family: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of :class:`CalibrationConfig`; ``family`` as in :meth:`quant_config`."""
        options = {**family, **self.calibration}
        if self.quant.get("timed_ranges") == "all":  # as the commands have it: the two flags exclude each other
            options.pop("running_stat", None)
        return options


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        table: heading under which it stands.
        recipe: None is full precision.
        quant_act: use the activation quantizers of the checkpoint.
        correction: of the output, fitted with every calibration: none, its scale divided out (``scaled``), or its mean
            error subtracted as well (``corrected``).
        timesteps, eta: of the sampler. Calibration is always on the 100-step trajectory.
    """

    table: str
    recipe: Recipe | None = None
    quant_act: bool = True
    timesteps: int = 100
    eta: float = 0.0
    correction: str = ""

    @property
    def name(self) -> str:
        words = ["full"]
        if self.recipe is not None:
            bits = f"a{self.recipe.act_bit}"
            words = [self.recipe.name if self.quant_act else self.recipe.name.replace(bits, f"a{FULL}", 1)]
        words += [] if self.timesteps == Row.timesteps else [f"{self.timesteps}steps"]
        words += [] if self.eta == Row.eta else [f"eta{self.eta:g}"]
        words += [self.correction] if self.correction else []
        return "-".join(words)


MAIN, RATE, NO_SPLIT = "Bits", "Higher rate of rounding", "Without split shortcuts"
STEPS, SAMPLER = "Timesteps in the calibration set", "Sampler"
CORRECTED, OPTIONS = "With the output corrected", "Other activation ranges"
MODES = ("linear", "qdiff")


def bits_rows(table: str, mode: str, **options: Any) -> list[Row]:
    """W8A8, W4A32 and W4A8; the last two come from one checkpoint."""
    four = Recipe(mode, 4, **options)
    return [Row(table, Recipe(mode, 8, **options)), Row(table, four, quant_act=False), Row(table, four)]


def sampler_rows(timesteps: int, eta: float) -> list[Row]:
    sampler: dict[str, Any] = {"timesteps": timesteps, "eta": eta}
    quantized = [Row(SAMPLER, Recipe(mode, 4), quant_act=act, **sampler) for mode in MODES for act in (False, True)]
    return [Row(SAMPLER, **sampler), *quantized]


def option_rows(**quant: Any) -> list[Row]:
    """W4A8 with other activation quantizers, from the whole set, without and with the output corrected."""
    recipes = [Recipe(mode, 4, a_sym=False, quant=quant, calibration={"range_samples": None}) for mode in MODES]
    return [Row(OPTIONS, recipe, correction=correction) for recipe in recipes for correction in ("", "corrected")]


def rate_rows() -> list[Row]:
    """Rounding that settles: with the published activations, and with all better options, where W8A8 is too."""
    rate = {"weight_lr": 0.03}
    quant = {"timed_ranges": "all", "split_input": True}
    published = Recipe("qdiff", 4, calibration=rate)
    four, eight = (Recipe("qdiff", bits, a_sym=False, quant=quant, calibration=rate) for bits in (4, 8))
    return [
        Row(RATE, published, quant_act=False),
        Row(RATE, published),
        Row(RATE, four),
        Row(RATE, four, correction="scaled"),
        Row(RATE, four, correction="corrected"),
        Row(RATE, four, quant_act=False, correction="corrected"),
        Row(RATE, eight, correction="corrected"),
    ]


ROWS: tuple[Row, ...] = (
    Row(MAIN),
    *(row for mode in MODES for row in bits_rows(MAIN, mode)),
    *rate_rows(),
    *(row for mode in MODES for row in bits_rows(NO_SPLIT, mode, split=False)),
    *(Row(STEPS, Recipe("qdiff", 4, steps=steps), quant_act=act) for steps in (1, 5) for act in (False, True)),
    *(
        row
        for eta in (0.0, 1.0)
        for timesteps in (20, 50, 100)
        if (timesteps, eta) != (Row.timesteps, Row.eta)
        for row in sampler_rows(timesteps, eta)
    ),
    *(
        Row(CORRECTED, Recipe(mode, 4), quant_act=act, correction=correction)
        for mode in MODES
        for act in (False, True)
        for correction in ("scaled", "corrected")
    ),
    *(Row(CORRECTED, Recipe(mode, 8), correction="corrected") for mode in MODES),
    *option_rows(),
    *option_rows(timed_ranges="all"),
    *option_rows(split_input=True),
    *option_rows(timed_ranges="all", split_input=True),
)

# Of a latent model: the published comparison and the better options, at the sampler that it is calibrated for.
LATENT_ROWS: tuple[Row, ...] = (
    Row(MAIN),
    *(row for mode in MODES for row in bits_rows(MAIN, mode)),
    *rate_rows(),
    *(row for mode in MODES for row in bits_rows(NO_SPLIT, mode, split=False)),
    *(Row(STEPS, Recipe("qdiff", 4, steps=steps), quant_act=act) for steps in (1, 5) for act in (False, True)),
)


def rows_of(model: str) -> tuple[Row, ...]:
    """All rows of a bundled model, in the order of its tables."""
    return LATENT_ROWS if isinstance(MODELS[model], LatentBundle) else ROWS


def make_parser() -> Parser:
    parser = Parser(prog=PROGRAM, description=__doc__.splitlines()[0], epilog=EXAMPLES)
    parser.add_argument("--model", choices=MODELS, default="fashion_mnist", help="which bundled model")
    parser.add_argument("--out", type=Path, default=Path("tables"), metavar="DIR", help="where everything is kept")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these [all]; a * stands for whatever there is")
    parser.add_argument("--list", action="store_true", help="print the rows, with what is finished, and stop")
    parser.add_argument("--minutes", type=real(zero=False), help="start nothing new after that time [no limit]")
    group = parser.add_argument_group("settings", "recorded in settings.json; a folder holds rows of one setting")
    group.add_argument("--count", type=at_least(2), default=10_000, metavar="N", help="samples a row and seed")
    group.add_argument("--iters", type=at_least(0), default=20_000, metavar="N", help="iterations a unit, weights")
    group.add_argument("--iters_a", type=at_least(0), default=5_000, metavar="N", help="the same, activations")
    group.add_argument(
        "--cali_samples", type=at_least(1), default=5120, metavar="N", help="in a calibration set, over its timesteps"
    )
    group.add_argument("--cali_seed", type=at_least(0), default=1234, metavar="N", help="of the calibration's draws")
    group.add_argument(
        "--cali_precision", choices=CALI_PRECISIONS, default=CalibrationConfig.precision, help="of the calibrations"
    )
    group.add_argument("--tf32", action="store_true", help="TF32 while sampling on a GPU, with --precision full")
    parser.add_argument(
        "--seeds",
        type=at_least(0),
        nargs="+",
        default=[0],
        metavar="N",
        help="of the starting noise; a later run can add more [0]",
    )
    parser.add_argument("--batch_size", type=at_least(1), default=500, metavar="N", help="images at once")
    add_inference_flags(parser)
    parser.add_argument("--device", type=device_name, metavar="DEVICE", help="cpu or cuda [cuda where there is one]")
    parser.add_argument("--verbose", action="store_true", help="tracebacks with errors")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    check_inference(parser, args)
    rows = chosen_rows(parser, args.rows, rows_of(args.model))
    with exit_on_error(PROGRAM, verbose=args.verbose):
        study = Study(args)
        if args.list:
            print("\n".join(f"{'done' if study.missing_seeds(row) == [] else '    '}  {row.name}" for row in rows))
            return 0
        study.run(rows)
    return 0


def chosen_rows(parser: Parser, names: Sequence[str] | None, rows: Sequence[Row]) -> list[Row]:
    """Those of ``rows`` that a list of names means, in the order of the tables."""
    if names is None:
        return list(rows)

    for name in names:
        if not any(fnmatchcase(row.name, name) for row in rows):
            parser.error(f"--rows {name}: no such row; --list shows them")
    return [row for row in rows if any(fnmatchcase(row.name, name) for name in names)]


@contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock among processes for the length of the block, which gets whether it is held.

    The file stays: if it were removed, two processes could hold locks on two files of that name.

    Args:
        wait: until whoever holds it lets go, or ends. Otherwise the block gets False when someone holds it.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        try:
            yield held
        finally:
            if held:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a forked child has the file open


class Study:
    """The output folder, and how its rows come about.

    Processes that share the folder claim a row by a lock; what rows share is made under a lock of its own. Locks are
    taken in the order row, checkpoint, checkpoint of the weights, calibration set, so that nobody waits in a circle.

    Raises:
        UserError: the folder holds rows measured with other settings, or a file of figures is damaged.
    """

    def __init__(self, args: Any):
        self.args, self.out = args, args.out
        self.device = resolve_device(args.device)
        self.inference = inference_config(args)
        self.bundle = MODELS[args.model]
        self.bundle.check()
        self.settings_path, self.results_path = self.out / "settings.json", self.out / "results.json"
        self.started = time.monotonic()
        self._held_out: HeldOutInputs | None = None
        self._check_settings()

    @property
    def settings(self) -> dict[str, Any]:
        a = self.args
        names = ("model", "count", "iters", "iters_a", "cali_samples", "cali_seed", "cali_precision")
        named = {name: getattr(a, name) for name in names}
        named |= {"tf32": a.tf32, "precision": self.inference.precision, "compile": self.inference.compile}
        return named | self.bundle.settings

    def _check_settings(self) -> None:
        recorded = self._read(self.settings_path) or self.settings
        if differing := [name for name, value in self.settings.items() if recorded.get(name) != value]:
            shown = "; ".join(f"{name} is {self.settings[name]}, was {recorded.get(name)}" for name in differing)
            raise UserError(f"{self.settings_path}: its rows have other settings: {shown}. Use those, or another --out")

    def _record_settings(self) -> None:
        """Before anything is made: checkpoints depend on them too."""
        with self._lock(self.settings_path):
            self._check_settings()  # another process may have been first
            write_json(self.settings_path, self.settings)

    def missing_seeds(self, row: Row) -> list[int]:
        """Seeds of the command that the row was not sampled with yet, by any process."""
        done = self._read(self._row_path(row)).get("frechet", {})
        return [seed for seed in self.args.seeds if str(seed) not in done]

    def run(self, rows: Sequence[Row]) -> None:
        """Measure what is missing and not claimed by others, as long as there is time, and write the tables."""
        self._record_settings()
        while (in_time := not self._time_is_up()) and self._go_on(rows):
            pass
        if left := sum(bool(self.missing_seeds(row)) for row in rows):
            then = "other processes have them" if in_time else "run the same command again to go on"
            print(f"{left} rows are left; {then}", flush=True)
        self.write_tables()

    def _time_is_up(self) -> bool:
        minutes = self.args.minutes
        return minutes is not None and time.monotonic() - self.started >= 60 * minutes

    def _go_on(self, rows: Sequence[Row]) -> bool:
        """Measure the first row that nobody has and that needs nothing which another process is making right now.

        Where all that nobody has need such things, wait for the first of them.

        Returns:
            whether there was anything to do; if not, all rows are finished or other processes have them.
        """
        awaited: Path | None = None
        for row in rows:
            if not self.missing_seeds(row):
                continue
            with self._lock(self._row_path(row), wait=False) as mine:
                if not mine or not self.missing_seeds(row):  # another process may have finished it just now
                    continue
                path = self._made_elsewhere(row)
                if path is None:
                    self.measure(row)
                    return True
                awaited = awaited or path
        if awaited is None:
            return False
        print(f"waiting for {awaited.name}, which another process makes", flush=True)
        with self._lock(awaited):
            return True

    def _made_elsewhere(self, row: Row) -> Path | None:
        """The first file that a row needs and another process is making; in the order in which they are made."""
        if row.recipe is None or self._checkpoint_path(row.recipe).is_file():
            return None
        recipe = row.recipe
        weights, both = self._checkpoint_path(recipe.weights), self._checkpoint_path(recipe)
        for path in (self._set_path(recipe.steps), weights, both):  # what is there soonest is awaited first
            if not path.is_file():
                with self._lock(path, wait=False) as free:
                    if not free:
                        return path
        return None

    def measure(self, row: Row) -> None:
        """One row, seed by seed; each seed's result is on the disk before the next starts."""
        path = self._row_path(row)
        entry = self._read(path)
        if not entry:
            model, size = self.network(row)
            error = None if row.recipe is None else self.held_out.error(model)
            entry = {
                "table": row.table,
                "bytes": size,
                "output_error": None if error is None else error.mean().item(),
                "last_steps": None if error is None else error[-2:].tolist(),
                "frechet": {},
                "seconds": {},
                "environment": environment(self.device),
            }
        for seed in self.missing_seeds(row):
            started = time.perf_counter()
            images = self.sample(row, seed)
            entry["frechet"][str(seed)] = self.bundle.distance(images, self.device)
            entry["seconds"][str(seed)] = time.perf_counter() - started
            shares = self.bundle.agreement(images, self.device)
            if shares is not None:
                entry.setdefault("agreement", {})[str(seed)] = shares
            self._keep_images(row, seed, images)
            write_json(path, entry)
            print(f"{row.name}, seed {seed}: Fréchet {entry['frechet'][str(seed)]:.3f}", flush=True)
            if self._time_is_up():
                break

    def network(self, row: Row) -> tuple[nn.Module, int]:
        """The network of a row on the device, and the bytes it takes on disk (in full precision: fp32)."""
        if row.recipe is None:
            model = self.bundle.full_precision().to(self.device)
            return model, 4 * sum(p.numel() for p in model.parameters())
        path = self.checkpoint(row.recipe)
        model = self.bundle.from_packed(path, quant_act=row.quant_act).to(self.device)
        if not row.correction:
            model.output_scale = None
        elif row.correction == "scaled":
            model.output_scale = model.output_scale.without_means()
        return model, path.stat().st_size

    @property
    def held_out(self) -> HeldOutInputs:
        """Inputs that no calibration saw, recorded once."""
        if self._held_out is None:
            model = self.bundle.full_precision().to(self.device)
            self._held_out = self.bundle.held_out(model, device=self.device, **HELD_OUT)
        return self._held_out

    def sample(self, row: Row, seed: int) -> Tensor:
        model, _ = self.network(row)  # a new one: in half precision sampling changes it
        with tqdm(total=self.args.count, unit="image", desc=row.name, dynamic_ncols=True, leave=False) as bar:
            return self.bundle.sample(
                model,
                count=self.args.count,
                batch_size=self.args.batch_size,
                timesteps=row.timesteps,
                eta=row.eta,
                seed=seed,
                device=self.device,
                inference=self.inference,
                allow_tf32=self.args.tf32,
                on_batch=bar.update,
            )

    # What rows share.

    def checkpoint(self, recipe: Recipe) -> Path:
        """The packed checkpoint of a recipe; calibrated where it is not there yet."""
        path = self._checkpoint_path(recipe)
        with self._lock(path):
            if not path.is_file():
                self._calibrate(recipe, path)
        return path

    def _calibrate(self, recipe: Recipe, path: Path) -> None:
        """Make a checkpoint: of weights, or of activations on the weights' checkpoint, as ``--resume_w`` does it."""
        weights = None if recipe.act_bit is None else self.checkpoint(recipe.weights)
        path_of_set, samples = self.calibration_set(recipe.steps), self._samples_a_step(recipe.steps)
        data = self.bundle.calibration_samples(path_of_set, cali_st=recipe.steps, cali_n=samples)
        quant = recipe.quant_config(self.bundle.quant).at_timesteps(data.t.tolist())
        model = QuantModel.from_config(self.bundle.full_precision().to(self.device), quant)
        if weights is not None:  # full precision stays: it is the target of the activations and of the scale
            load_quantized(weights, model, quant_act=False, weights_only=True, keep_full_precision=True)
        options = CalibrationConfig(
            iters=self.args.iters,
            iters_a=self.args.iters_a,
            seed=self.args.cali_seed,
            precision=self.args.cali_precision,
            correct_scale=weights is not None,  # rows choose whether to use it
            correct_mean=weights is not None,
            **recipe.calibration_options(self.bundle.calibration),
        )
        started = time.perf_counter()
        with tqdm(unit="unit", desc=f"calibrating {recipe.name}", dynamic_ncols=True, leave=False) as bar:

            def show(progress: Any) -> None:
                bar.total = progress.total
                bar.update(progress.index + 1 - bar.n)

            calibrate(model, data, options, mode=recipe.mode, weights_done=weights is not None, on_unit=show)
        seconds = time.perf_counter() - started
        write_json(path.with_suffix(".json"), {"seconds": seconds})  # first: with the checkpoint all is there
        info = {"model_config": self.bundle.facts, "calibration": {"quant_mode": recipe.mode}}
        save_packed(path, model, info=info)
        print(f"{recipe.name}: calibrated in {seconds:.0f} s", flush=True)

    def calibration_set(self, steps: int) -> Path:
        """Inputs along full-precision trajectories, as many in all whatever the number of timesteps."""
        path = self._set_path(steps)
        with self._lock(path):
            if not path.is_file():
                self._make_calibration_set(steps, path)
        return path

    def _make_calibration_set(self, steps: int, path: Path) -> None:
        model = self.bundle.full_precision().to(self.device)
        count = self._samples_a_step(steps)
        with tqdm(total=count, unit="image", desc=f"calibration set, {steps} steps", leave=False) as bar:
            content = self.bundle.record(
                model,
                device=self.device,
                timesteps=SAMPLER_STEPS,
                seed=SET_SEED,
                count=count,
                batch_size=self.args.batch_size,
                cali_st=steps,
                progress=bar.update,
            )
        save_calibration_set(path, content)

    def _samples_a_step(self, steps: int) -> int:
        return max(1, self.args.cali_samples // steps)

    def _keep_images(self, row: Row, seed: int, images: Tensor) -> None:
        """The first images of the first seed, for the picture."""
        if seed == self.args.seeds[0]:
            path = self._images_path(row)
            path.parent.mkdir(exist_ok=True)
            with atomic_file(path) as file:  # another process may be reading it
                torch.save((images[:SHOWN] * 255).round().to(torch.uint8), file)

    # Where things are.

    def _row_path(self, row: Row) -> Path:
        return self.out / "rows" / f"{row.name}.json"

    def _checkpoint_path(self, recipe: Recipe) -> Path:
        return self.out / "calibrated" / f"{recipe.name}.safetensors"

    def _set_path(self, steps: int) -> Path:
        return self.out / "sets" / f"st{steps}.pt"

    def _images_path(self, row: Row) -> Path:
        return self.out / "images" / f"{row.name}.pt"

    def _lock(self, path: Path, *, wait: bool = True) -> AbstractContextManager[bool]:
        """The lock under which a file of the folder is made, see :func:`file_lock`; the file's folder is there then."""
        lock = self.out / "locks" / path.relative_to(self.out)
        for folder in (path.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        return file_lock(lock, wait=wait)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            return read_json(path)
        except ValueError as error:
            raise UserError(str(error)) from None

    # What comes out.

    def results(self) -> dict[str, Any]:
        """All that the folder holds: the settings, an entry a row, and how long each calibration took."""
        rows = {path.stem: self._read(path) for path in sorted(self.out.glob("rows/*.json"))}
        seconds = {path.stem: self._read(path)["seconds"] for path in sorted(self.out.glob("calibrated/*.json"))}
        return {"settings": self.settings, "rows": rows, "calibration_seconds": seconds}

    def write_tables(self) -> None:
        """``results.json``, ``results.md`` and ``results.png`` from all rows in the folder, if there are any."""
        with self._lock(self.results_path):  # who is last has read all rows
            results = self.results()
            if not results["rows"]:
                return
            write_json(self.results_path, results)
            text = tables(results)
            write_atomically(self.out / "results.md", text.encode())
            print(f"\n{text}")
            paths = {row.name: self._images_path(row) for row in rows_of(self.args.model) if row.table == MAIN}
            shown = {name: torch.load(path, weights_only=True) / 255 for name, path in paths.items() if path.is_file()}
            if shown:
                title = f"{Row.timesteps} {self.bundle.steps_are}, the same noise in a column"
                asked = self.bundle.asked_for(SHOWN)
                comparison_picture(shown, self.out / "results.png", title=title, captions=asked)


def tables(results: Mapping[str, Any]) -> str:
    """One markdown table a heading, in the order of the rows, and below how they were made."""
    entries: Mapping[str, Any] = results["rows"]
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "Fréchet": lambda e: mean_and_spread(list(e["frechet"].values())),
        "output error": lambda e: "" if e["output_error"] is None else f"{e['output_error']:.5f}",
        "last 2 steps": lambda e: "" if e["last_steps"] is None else ", ".join(f"{v:.3f}" for v in e["last_steps"]),
        "MiB": lambda e: f"{e['bytes'] / 2**20:.2f}",
    }
    for kind, heading in AGREEMENT.items():
        if any("agreement" in entry for entry in entries.values()):
            columns[heading] = partial(percent, kind=kind)
    parts = []
    rows = rows_of(results["settings"]["model"])
    for heading in dict.fromkeys(row.table for row in rows):
        names = [row.name for row in rows if row.table == heading and row.name in entries]
        if names:
            lines = [[name, *(column(entries[name]) for column in columns.values())] for name in names]
            parts += [f"### {heading}", markdown_table(["row", *columns], lines)]
    parts.append("Settings: " + ", ".join(f"{name} {value}" for name, value in results["settings"].items()) + ".")
    seeds = sorted({seed for entry in entries.values() for seed in entry["frechet"]}, key=int)
    if counts := {s["count"] for entry in entries.values() for s in entry.get("agreement", {}).values()}:
        parts.append(
            f"Group, emoji: of the first {max(counts)} images of a seed, those in which the classifier sees the "
            "caption's group, and those whose nearest training image has the caption."
        )
    parts.append(f"Seeds of the starting noise: {', '.join(seeds)}; ± is the standard deviation over them.")
    places = dict.fromkeys(", ".join(f"{k} {v}" for k, v in entry["environment"].items()) for entry in entries.values())
    parts += [f"Measured on: {place}." for place in places]
    return "\n\n".join(parts) + "\n"


def percent(entry: Mapping[str, Any], kind: str) -> str:
    """A share of images that agree with their captions, the mean over the seeds; empty where it was not measured."""
    shares = [shares[kind] for shares in entry.get("agreement", {}).values()]
    return f"{100 * statistics.mean(shares):.1f} %" if shares else ""


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean, and with several values their standard deviation."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    sys.exit(main())
