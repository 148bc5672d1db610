"""The training loop of latent models, on PyTorch Lightning (the extra ``train``).

The networks are so small that on a GPU launching a step's kernels takes longer than running them. So the data lies on
the device, and one whole step - draw, forward, backward, optimizer, average - is captured as a CUDA graph and replayed.
Lightning sees a round of many steps as one batch, and as one epoch too: a checkpoint then always lies between
epochs, where Lightning resumes exactly.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.modules.ema import EMA
from ldm.training import Task, TrainOptions, learning_rate_factor

try:
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import TensorBoardLogger
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"training needs {error.name}: pip install -e '.[train]'", name=error.name) from None

EAGER_STEPS = 5  # real steps before the capture: allocations, cuDNN's choice of kernels, compilation
STEPS_PER_ROUND = 200  # on a GPU; every round ends with waiting for the device. On a CPU a round is one step.
SECONDS_PER_CHECKPOINT = 60.0
MEASURED_SHARE = 0.02  # of a run whose length is given in minutes, until its steps are counted
SECONDS_TO_FINISH = 15.0  # of --minutes, kept for writing the results
WEIGHT_DECAY = 0.0
GRAD_CLIP = 1.0  # largest norm of all gradients together


@dataclass
class Progress:
    """How far a run has come; part of every checkpoint.

    Attributes:
        total: length of the run; None where it is not known yet.
    """

    step: int = 0
    total: int | None = None
    seconds: float = 0.0  # in all invocations together
    losses: list[list[float]] = field(default_factory=list)  # [step, mean loss since the row before]


class TrainingLoop(pl.LightningModule):
    """Trains a task's model and keeps the average of its weights.

    Args:
        task: what is trained, already on ``options.device``.
        facts: settings of the run beyond ``options`` that may not change when it is resumed.
        checkpoint: where a checkpoint goes every minute.
        started: ``time.perf_counter()`` when this invocation began; its minutes count from there.
    """

    def __init__(self, task: Task, options: TrainOptions, facts: Mapping[str, Any], checkpoint: Path, started: float):
        super().__init__()
        self.automatic_optimization = False
        self.task, self.options, self.run_identity = task, options, {**options.identity(), **facts}
        self.ema = EMA(task.model, options.ema)
        self.params = [p for p in task.model.parameters() if p.requires_grad]
        self.progress = Progress(total=options.steps)
        self.checkpoint, self.started = checkpoint, started
        self.saved_at = started
        self.random_state: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.clock: tuple[float, int] | None = None  # time and steps from which speed is measured
        self.loss_function = task.loss

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.options.device).type == "cuda"

    @property
    def finished(self) -> bool:
        return self.progress.total is not None and self.progress.step >= self.progress.total

    def facts(self) -> dict[str, Any]:
        """What a reader of the weights wants to know about their making."""
        last = self.progress.losses[-max(1, len(self.progress.losses) // 20) :]
        return {
            **self.run_identity,
            "compile": self.options.compile,
            "steps": self.progress.total,
            "steps_taken": self.progress.step,
            "seconds": round(self.progress.seconds, 1),
            "device": torch.cuda.get_device_name(self.options.device) if self.on_gpu else "CPU",
            "final_loss": round(sum(loss for _, loss in last) / len(last), 6),
        }

    def configure_optimizers(self) -> torch.optim.AdamW:
        # The step count on the device: a captured step can then be replayed.
        speed: dict[str, Any] = {"fused": True, "capturable": True} if self.on_gpu else {"foreach": False}
        rate = torch.tensor(self.options.lr, device=self.options.device)
        return torch.optim.AdamW(self.params, lr=rate, weight_decay=WEIGHT_DECAY, **speed)

    def on_train_start(self) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)  # there is one
        self.optimizer = optimizer
        # A tensor of our own, whatever the checkpoint brought: the captured step reads its rate from this address.
        self.rate = torch.tensor(self.options.lr, device=self.device)
        self.optimizer.param_groups[0]["lr"] = self.rate
        self.loss_sum = torch.zeros((), device=self.device)
        self.earlier_seconds = self.progress.seconds
        if self.random_state is not None:
            (torch.cuda.set_rng_state if self.on_gpu else torch.set_rng_state)(self.random_state.cpu())
        self.bar = tqdm(total=self.progress.total, initial=self.progress.step, unit="step", mininterval=5)
        if self.on_gpu and not self.finished:
            self._prepare_graph()

    def _prepare_graph(self) -> None:
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        if self.options.compile:
            try:
                self.loss_function = torch.compile(self.task.loss, fullgraph=True)
                self._capture()
                return
            except Exception as error:  # the compiler has many kinds, and training works without it
                warnings.warn(f"torch.compile failed, going on without: {error}", stacklevel=2)
                self.loss_function = self.task.loss
        self._capture()

    def _capture(self) -> None:
        """Take a few real steps, then record one."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(EAGER_STEPS):
                self._set_rate()
                self._step()
                self.progress.step += 1
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.optimizer.zero_grad(set_to_none=True)  # the gradients of the graph belong into its own memory pool
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._step()
        self.graph = graph

    def _set_rate(self) -> None:
        self.rate.fill_(self.options.lr * learning_rate_factor(self.progress.step, self.progress.total))

    def _step(self) -> None:
        """One step, without any traffic between host and device."""
        batch = self.task.draw(self.options.batch_size)
        self.optimizer.zero_grad(set_to_none=True)
        # No cache of cast weights: one filled during the capture would be stale, or freed, afterwards.
        mixed = self.options.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed, cache_enabled=False):
            loss = self.loss_function(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, GRAD_CLIP, foreach=True)
        self.optimizer.step()
        self.ema.update(self.task.model)
        self.loss_sum += loss.detach()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One round of steps; ``batch`` only counts.

        Raises:
            FloatingPointError: the loss is no number any more.
        """
        if self.finished:  # killed between the last step and the results, and resumed for them
            return
        self.loss_sum.zero_()
        count = STEPS_PER_ROUND if self.on_gpu else 1
        if self.progress.total is not None:
            count = min(count, self.progress.total - self.progress.step)
        for _ in range(count):
            self._set_rate()
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()
            self.progress.step += 1
        loss = self.loss_sum.item() / count
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.progress.step}: lower --lr")
        self.progress.losses.append([self.progress.step, loss])
        assert isinstance(self.logger, TensorBoardLogger)
        self.logger.experiment.add_scalar("loss", loss, self.progress.step)
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.bar.update(count)
        if self.progress.total is None:
            self._count_steps()

    def _count_steps(self) -> None:
        """How many steps the run's minutes have room for, once enough of them were timed; the first round is not."""
        assert self.options.for_minutes is not None
        now, step = time.perf_counter(), self.progress.step
        if self.clock is None:
            self.clock = now, step
            return
        length = 60 * self.options.for_minutes
        if now - self.clock[0] < MEASURED_SHARE * length:
            return
        each = (now - self.clock[0]) / (step - self.clock[1])
        spent = self.earlier_seconds + now - self.started
        self.progress.total = step + max(1, int((length - spent - SECONDS_TO_FINISH) / each))
        self.bar.total = self.progress.total
        print(f"{1000 * each:.2f} ms a step: {self.progress.total} steps in {self.options.for_minutes:g} minutes")

    def on_train_epoch_end(self) -> None:
        now = time.perf_counter()
        self.progress.seconds = self.earlier_seconds + now - self.started
        limit = math.inf if self.options.minutes is None else 60 * self.options.minutes - SECONDS_TO_FINISH
        self.trainer.should_stop = self.finished or now - self.started >= limit
        if now - self.saved_at > SECONDS_PER_CHECKPOINT and not self.trainer.should_stop:
            self.trainer.save_checkpoint(self.checkpoint)
            self.saved_at = now

    def on_train_end(self) -> None:
        self.bar.close()
        self.trainer.save_checkpoint(self.checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = torch.cuda.get_rng_state() if self.on_gpu else torch.get_rng_state()
        checkpoint["run"] = {"identity": self.run_identity, "progress": vars(self.progress), "random": state}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.progress = Progress(**checkpoint["run"]["progress"])
        self.random_state = checkpoint["run"]["random"]


def check_resumable(path: Path, identity: Mapping[str, Any]) -> None:
    """Whether a run with these settings may go on from a checkpoint.

    Raises:
        ValueError: the file is missing or not one of ours, or belongs to a run with other settings.
    """
    if not path.is_file():
        raise ValueError(f"--resume: there is no checkpoint {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)["run"]["identity"]
    except Exception as error:  # torch.load raises whatever a damaged file makes it stumble over
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--resume: {path} is not a checkpoint of this script ({reason})") from None
    for key, value in identity.items():
        if saved.get(key) != value:
            raise ValueError(f"--resume: {path} was made with {key} {saved.get(key)}, not {value}")


def fit(
    task: Task, options: TrainOptions, facts: Mapping[str, Any], folder: Path, *, resume: bool, started: float
) -> TrainingLoop:
    """Train to the end of the run or of this invocation's minutes; checkpoints and a TensorBoard log go to ``folder``.

    Args:
        facts, started: see :class:`TrainingLoop`.
        resume: go on from ``folder/last.ckpt``, with its optimizer, average and random state.

    Returns:
        The finished loop, with its progress, and the averages as ``ema``.

    Raises:
        ValueError: a checkpoint is there and ``resume`` is not set, or it is set and there is none that fits.
    """
    path = folder / "last.ckpt"
    if path.exists() and not resume:
        raise ValueError(f"{path} belongs to an earlier run: --resume goes on with it, -l names another folder")
    loop = TrainingLoop(task, options, facts, path, started)
    if resume:
        check_resumable(path, loop.run_identity)
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # no tips, no list of absent accelerators
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        logger=TensorBoardLogger(str(folder), name="", version="tensorboard"),
        max_epochs=-1,  # the loop says when to stop
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    with warnings.catch_warnings():
        # A frozen first stage is in eval mode on purpose; the other one is Lightning's own call into torch.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        warnings.filterwarnings("ignore", message=r".*treespec")
        trainer.fit(loop, [0], ckpt_path=str(path) if resume else None, weights_only=True)
    return loop
