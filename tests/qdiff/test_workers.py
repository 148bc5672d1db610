"""Several processes on one calibration end where one process does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from qdiff.calibrate import calibrate
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.workers import WORKERS, joined_processes, local_device

from .conftest import calibration_set, wrapped

CONFIG = CalibrationConfig(iters=12, iters_a=12, batch_size=6, weight_lr=1e-2, lr=1e-3, precision="fp32")
TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]


def losses(device: str, engine: str) -> list[tuple[float, float]]:
    qnn = wrapped(QuantConfig(4, 8, quant_act=True, split=True)).to(device)
    reports = calibrate(qnn, calibration_set(20), dataclasses.replace(CONFIG, engine=engine))
    return [(report.loss_before, report.loss_after) for report in reports]


def worker(rank: int, folder: str, kind: str, engine: str) -> None:
    torch.set_num_threads(1)
    device, backend = ("cpu", "gloo") if kind == "cpu" else (f"cuda:{rank}", "nccl")
    if kind == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        assert WORKERS.count == 2
        assert WORKERS.same({"from": rank}) == {"from": 0}
        torch.save(losses(device, engine), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("cpu", "fast"),
        pytest.param("cpu", "eager", marks=pytest.mark.thorough),
        pytest.param("cuda", "fast", marks=TWO_GPUS),
    ],
)
def test_two_processes_end_where_one_does(tmp_path: Path, kind: str, engine: str) -> None:
    """Losses before and after every unit, weights and activations, within a thousandth."""
    alone = losses(kind, engine)
    mp.start_processes(worker, (str(tmp_path), kind, engine), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    assert len(first) == len(alone)
    weights = len(alone) // 2
    for number, (together, single) in enumerate(zip(first, alone, strict=True)):
        # Sums in another order move an activation over a rounding edge now and then, and that one the units behind it.
        assert together == pytest.approx(single, rel=1e-3 if number < weights else 5e-2)
    assert sum(after for _, after in first) == pytest.approx(sum(after for _, after in alone), rel=1e-3)


def test_one_process_is_alone() -> None:
    draws = torch.arange(6).view(2, 3)
    assert (WORKERS.count, WORKERS.rank) == (1, 0)
    assert torch.equal(WORKERS.share(draws), draws)
    assert WORKERS.same("x") == "x"
    gradients = (torch.ones(2),)
    assert WORKERS.summed(gradients) is gradients
    with joined_processes(torch.device("cpu")):
        assert WORKERS.count == 1


def test_more_processes_than_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(WORKERS), "count", property(lambda self: 4))
    with pytest.raises(ValueError, match="3 samples cannot be shared by 4"):
        WORKERS.share(torch.zeros(2, 3))


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_device(torch.device("cuda")) == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert local_device(torch.device("cuda", 3)) == torch.device("cuda", 3)
    assert local_device(torch.device("cpu")) == torch.device("cpu")
