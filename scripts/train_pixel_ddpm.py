"""Train a small pixel-space noise predictor (Ho et al. 2020, algorithm 1) from a file in ``configs/``.

    python scripts/train_pixel_ddpm.py --config configs/fashion_mnist.yml --data DIR -l OUT --minutes 9 --compile

writes ``model.safetensors`` (EMA weights in float16, facts in the header), ``train.json`` (the same facts), a
TensorBoard log and ``checkpoint.pt``. A run that was killed goes on with ``--resume`` from its last checkpoint, at
most a minute back, with the same optimizer, average and random state.

On a GPU the network is so small that launching its kernels takes longer than running them. So one whole step - draw
images, draw noise, forward, backward, optimizer, average - is captured once as a CUDA graph and then replayed; the
data set lies on the GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ddim.config import ConfigError, PixelConfig, load_config
from ddim.datasets import ArrayImages, DatasetUnavailable, open_dataset
from ddim.pretrained import load_weights, weights_facts
from ddim.schedule import alphas_cumprod, make_betas
from ddim.transforms import to_model
from ddim.unet import UNet
from qdiff.files import atomic_file, write_atomically

WARMUP_STEPS = 1000  # learning rate from 0 to its full value
EAGER_STEPS = 5  # real steps before the capture: allocations, cuDNN's choice of kernels, compilation
TIMED_STEPS = 500  # real steps that tell how many fit into --minutes
STEPS_PER_REPORT = 500  # on a GPU; every report waits for the device
SECONDS_PER_CHECKPOINT = 60.0
SECONDS_TO_FINISH = 8.0  # of --minutes, kept for writing the results


@dataclass(frozen=True)
class TrainOptions:
    """What the command line says about the optimisation."""

    batch_size: int
    lr: float
    ema: float
    seed: int
    steps: int | None = None
    minutes: float | None = None
    compile: bool = False
    device: str = "cpu"
    init: Path | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give either --steps or --minutes")
        for name in ("batch_size", "lr", "steps", "minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name} {value}: must be above 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema {self.ema}: must lie in [0, 1)")


@dataclass
class Progress:
    """How far a run has come; part of every checkpoint."""

    step: int = 0
    total: int | None = None  # None until --minutes has been turned into steps
    seconds: float = 0.0  # in all invocations together, set-up included
    losses: list[list[float]] = field(default_factory=list)  # [step, mean loss since the row before]


def learning_rate_factor(step: int, total: int | None) -> float:
    """Factor on the base rate: linear warm-up, constant up to half the run, then linear to 0.

    Args:
        step: steps already taken.
        total: length of the run; None while it is not known yet (no decay then).
    """
    warmup = WARMUP_STEPS if total is None else max(1, min(WARMUP_STEPS, total // 10))
    decay = 1.0 if total is None else 2 * (1 - step / total)
    return max(0.0, min(1.0, (step + 1) / warmup, decay))


def ema_decay(step: int, decay: float) -> float:
    """Decay of the average: shorter memory at first, so that random initial weights leave it soon."""
    return min(decay, (1 + step) / (10 + step))


def load_images(config: PixelConfig, root: Path) -> Tensor:
    """All training images at the size the config asks for: N x C x H x W, uint8.

    Raises:
        ConfigError: a data set that is not kept in memory, or a config that changes images at random.
        DatasetUnavailable: no files.
    """
    data = config.data
    if data.random_flip or data.uniform_dequantization or data.gaussian_dequantization or data.logit_transform:
        raise ConfigError("section 'data': training here knows no flips, dequantization or logits; set them to false")
    dataset = open_dataset(data, root, train=True)
    if not isinstance(dataset, ArrayImages):
        raise ConfigError(f"key 'data.dataset': {data.dataset} does not fit into memory; CIFAR10 or FashionMNIST do")
    return dataset.images.contiguous()


class Trainer:
    """One training step and its state, all of it on one device.

    Args:
        images: the data set, N x C x H x W, uint8, already on the device.
    """

    def __init__(self, config: PixelConfig, options: TrainOptions, images: Tensor):
        self.config, self.options, self.images = config, options, images
        self.device = images.device
        torch.manual_seed(options.seed)
        self.on_gpu = self.device.type == "cuda"
        # Compiled code prefers channels last; eager group norm would convert back at every layer.
        self.layout = torch.channels_last if self.on_gpu and options.compile else torch.contiguous_format
        self.model = UNet.from_config(config).to(self.device, memory_format=self.layout).train()
        if options.init is not None:
            load_weights(options.init, self.model, "the config")
        self.params = list(self.model.parameters())
        self.average = [p.detach().clone() for p in self.params]
        self.optimizer = self._make_optimizer()
        self.forward: nn.Module = self.model
        self.loss_sum = torch.zeros((), device=self.device)
        self.average_rate = torch.zeros((), device=self.device)  # 1 - decay; a tensor so that the graph reads it
        alpha_bar = alphas_cumprod(make_betas(config.diffusion))
        self.signal = alpha_bar.sqrt().float().to(self.device)
        self.noise = (1 - alpha_bar).sqrt().float().to(self.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _make_optimizer(self) -> torch.optim.AdamW:
        optim = self.config.optim
        # A tensor as rate, and the step count on the device: a captured step can then be replayed with new values.
        speed = {"fused": True, "capturable": True} if self.on_gpu else {"foreach": False}
        rate = torch.tensor(self.options.lr, device=self.device)
        betas = (optim.beta1, 0.999)
        return torch.optim.AdamW(
            self.params, lr=rate, betas=betas, eps=optim.eps, weight_decay=optim.weight_decay, **speed
        )

    def _step(self) -> None:
        """One step, without any traffic between host and device."""
        batch = self.options.batch_size
        index = torch.randint(len(self.images), (batch,), device=self.device)
        t = torch.randint(len(self.signal), (batch,), device=self.device)
        x0 = to_model(self.images[index].float() / 255, self.config.data)
        noise = torch.randn_like(x0)
        x_t = self.signal[t][:, None, None, None] * x0 + self.noise[t][:, None, None, None] * noise
        x_t = x_t.contiguous(memory_format=self.layout)

        self.optimizer.zero_grad(set_to_none=True)
        # No cache of cast weights: one filled during the capture would be stale, or freed, afterwards.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu, cache_enabled=False):
            predicted = self.forward(x_t, t)
        loss = F.mse_loss(predicted.float(), noise)  # Ho et al. 2020, equation 14
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, self.config.optim.grad_clip, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            self.loss_sum += loss.detach()
            change = torch._foreach_sub(self.params, self.average)
            torch._foreach_mul_(change, self.average_rate)
            torch._foreach_add_(self.average, change)

    def prepare(self, progress: Progress) -> None:
        """Compile and capture the step. Takes a few real steps, counted in ``progress``."""
        if not self.on_gpu:
            return
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        if self.options.compile:
            try:
                self.forward = torch.compile(self.model, fullgraph=True)
                self._capture(progress)
                return
            except Exception as error:
                warnings.warn(f"torch.compile failed, going on without: {error}", stacklevel=2)
                self.forward, self.graph = self.model, None
        self._capture(progress)

    def _capture(self, progress: Progress) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(EAGER_STEPS):
                self._set_rates(progress)
                self._step()
                progress.step += 1
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.optimizer.zero_grad(set_to_none=True)  # the gradients of the graph belong into its own memory pool
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._step()
        self.graph = graph

    def _set_rates(self, progress: Progress) -> None:
        factor = learning_rate_factor(progress.step, progress.total)
        self.optimizer.param_groups[0]["lr"].fill_(self.options.lr * factor)
        self.average_rate.fill_(1 - ema_decay(progress.step, self.options.ema))

    def run(self, progress: Progress, count: int) -> float:
        """Take ``count`` steps, wait for them and return their mean loss."""
        self.loss_sum.zero_()
        for _ in range(count):
            self._set_rates(progress)
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()
            progress.step += 1
        loss = self.loss_sum.item() / count
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {progress.step}: lower --lr")
        return loss

    def average_state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The averaged weights under their names in the model, on the CPU."""
        names = [name for name, _ in self.model.named_parameters()]
        return {n: p.to("cpu", dtype).contiguous() for n, p in zip(names, self.average, strict=True)}

    def state(self) -> dict[str, Any]:
        rows = [self.optimizer.state[p] for p in self.params]
        return {
            "params": [p.detach() for p in self.params],
            "average": self.average,
            **{key: [row[key] for row in rows] for key in ("step", "exp_avg", "exp_avg_sq")},
            "random": torch.cuda.get_rng_state() if self.on_gpu else torch.get_rng_state(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned. Before :meth:`prepare`: a captured graph keeps its addresses."""
        for mine, saved in zip(self.params + self.average, state["params"] + state["average"], strict=True):
            mine.copy_(saved)
        for p, step, mean, square in zip(
            self.params, state["step"], state["exp_avg"], state["exp_avg_sq"], strict=True
        ):
            self.optimizer.state[p] = {
                "step": step.to(self.device if self.on_gpu else "cpu"),
                "exp_avg": torch.empty_like(p).copy_(mean),
                "exp_avg_sq": torch.empty_like(p).copy_(square),
            }
        set_state = torch.cuda.set_rng_state if self.on_gpu else torch.set_rng_state
        set_state(state["random"].cpu())


def run_identity(config: PixelConfig, options: TrainOptions) -> dict[str, Any]:
    """What must not change between the parts of an interrupted run."""
    return {
        "config": config.to_dict(),
        "device": torch.device(options.device).type,
        **{key: getattr(options, key) for key in ("batch_size", "lr", "ema", "seed")},
    }


def save_checkpoint(path: Path, trainer: Trainer, progress: Progress) -> None:
    """Write everything a later ``--resume`` needs. The file is whole or as it was before, whenever the run ends."""
    identity = run_identity(trainer.config, trainer.options)
    content = {"identity": identity, "progress": asdict(progress), "trainer": trainer.state()}
    with atomic_file(path) as file:
        torch.save(content, file)


def load_checkpoint(path: Path, trainer: Trainer) -> Progress:
    """Continue from a file of :func:`save_checkpoint`.

    Raises:
        ValueError: the file is missing, or belongs to a run with other settings.
    """
    if not path.is_file():
        raise ValueError(f"--resume: there is no checkpoint {path}")
    content = torch.load(path, map_location=trainer.device, weights_only=True)
    identity = run_identity(trainer.config, trainer.options)
    for key, value in identity.items():
        if content["identity"][key] != value:
            raise ValueError(f"--resume: {path} was made with {key} {content['identity'][key]}, not {value}")
    progress = Progress(**content["progress"])
    if trainer.options.steps not in (None, progress.total):
        raise ValueError(f"--resume: {path} belongs to a run of {progress.total} steps, not {trainer.options.steps}")
    trainer.restore(content["trainer"])
    return progress


def fix_total(trainer: Trainer, progress: Progress, started: float) -> int:
    """How many steps the run has: as asked, or as many as fit into the minutes at the speed measured here."""
    options = trainer.options
    if options.steps is not None:
        return options.steps
    before = time.perf_counter()
    count = TIMED_STEPS if trainer.on_gpu else 1
    trainer.run(progress, count)
    seconds_per_step = (time.perf_counter() - before) / count
    left = 60 * options.minutes - (time.perf_counter() - started) - SECONDS_TO_FINISH
    total = progress.step + max(1, int(left / seconds_per_step))
    print(f"{1000 * seconds_per_step:.2f} ms a step: {total} steps in {options.minutes} minutes", flush=True)
    return total


def train(trainer: Trainer, progress: Progress, folder: Path, started: float) -> None:
    """Run to the end, with a bar, a TensorBoard log and a checkpoint every minute.

    Args:
        started: ``time.perf_counter()`` when this invocation began; ``--minutes`` counts from there.
    """
    earlier = progress.seconds
    trainer.prepare(progress)
    if progress.total is None:
        progress.total = fix_total(trainer, progress, started)
    saved_at = time.perf_counter()
    with (
        SummaryWriter(str(folder / "tensorboard")) as log,
        tqdm(total=progress.total, initial=progress.step, unit="step", mininterval=5) as bar,
    ):
        while progress.step < progress.total:
            wanted = STEPS_PER_REPORT if trainer.on_gpu else 1
            count = min(wanted, progress.total - progress.step)
            loss = trainer.run(progress, count)
            progress.seconds = earlier + time.perf_counter() - started
            progress.losses.append([progress.step, loss])
            log.add_scalar("loss", loss, progress.step)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(count)
            if time.perf_counter() - saved_at > SECONDS_PER_CHECKPOINT:
                save_checkpoint(folder / "checkpoint.pt", trainer, progress)
                saved_at = time.perf_counter()
    save_checkpoint(folder / "checkpoint.pt", trainer, progress)


def facts(trainer: Trainer, progress: Progress) -> dict[str, Any]:
    """What a reader of the weights wants to know about their making."""
    device = torch.cuda.get_device_name(trainer.device) if trainer.on_gpu else "CPU"
    last, init = progress.losses[-max(1, len(progress.losses) // 20) :], trainer.options.init
    return {
        **{key: getattr(trainer.options, key) for key in ("seed", "batch_size", "lr", "ema", "compile")},
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "device": device,
        "torch": torch.__version__,
        "images": len(trainer.images),
        "parameters": sum(p.numel() for p in trainer.params),
        "final_loss": round(sum(loss for _, loss in last) / max(1, len(last)), 6),
        "init": None if init is None else {"file": init.name, **weights_facts(init)},
        "config": trainer.config.to_dict(),
    }


def save_results(folder: Path, trainer: Trainer, progress: Progress) -> None:
    """Write the averaged weights, float16, and the facts: in the header of the file and as JSON beside it."""
    about = facts(trainer, progress)
    header = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    write_atomically(folder / "model.safetensors", save(trainer.average_state(torch.float16), metadata=header))
    record = json.dumps(about | {"losses": progress.losses}, indent=1) + "\n"
    write_atomically(folder / "train.json", record.encode())


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, e.g. configs/fashion_mnist.yml")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set, see ddim.datasets")
    parser.add_argument("-l", "--logdir", type=Path, required=True, help="folder for everything that is written")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="length of the run")
    length.add_argument("--minutes", type=float, help="wall time of the run, set-up included; steps are derived")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, help="default: training.batch_size of the config")
    parser.add_argument("--lr", type=float, help="highest learning rate; default: optim.lr of the config")
    parser.add_argument("--ema", type=float, help="decay of the averaged weights; default: model.ema_rate")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network (GPU only; takes a minute)")
    parser.add_argument("--init", type=Path, metavar="FILE", help="weights to start from, in place of random ones")
    parser.add_argument("--resume", action="store_true", help="go on from LOGDIR/checkpoint.pt")
    return parser


def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        config = load_config(args.config)
        options = TrainOptions(
            batch_size=config.training.batch_size if args.batch_size is None else args.batch_size,
            lr=config.optim.lr if args.lr is None else args.lr,
            ema=config.model.ema_rate if args.ema is None else args.ema,
            seed=args.seed,
            steps=args.steps,
            minutes=args.minutes,
            compile=args.compile,
            device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            init=args.init,
        )
        checkpoint = args.logdir / "checkpoint.pt"
        if checkpoint.exists() and not args.resume:
            raise ValueError(
                f"{checkpoint} belongs to an earlier run: --resume goes on with it, -l names another folder"
            )
        trainer = Trainer(config, options, load_images(config, args.data).to(options.device))
        progress = load_checkpoint(checkpoint, trainer) if args.resume else Progress(total=args.steps)
    except (ValueError, DatasetUnavailable) as error:
        parser.error(str(error))
    args.logdir.mkdir(parents=True, exist_ok=True)
    train(trainer, progress, args.logdir, started)
    save_results(args.logdir, trainer, progress)
    print(f"{progress.step} steps, {progress.seconds:.0f} s: {args.logdir / 'model.safetensors'}")


if __name__ == "__main__":
    main()
