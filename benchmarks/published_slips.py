"""What each corrected slip of the published calibration is worth, on a trained model.

    python benchmarks/published_slips.py --folder DIR --config configs/fashion_mnist.yml [--only NAME ...]

DIR holds ``model.safetensors``, ``calibration_set.pt`` (published format) and ``evaluation.safetensors`` (``x``, ``t``,
``full_precision``: rows of 20 steps, 8 a step). Every case calibrates W4A8 ``--split`` from one seed, ours or with one
slip put back, and prints the mean output error of the 20 steps with weights only and with activations.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ddim.config import PixelConfig, load_config
from ddim.unet import UNet
from qdiff import (
    CalibrationConfig,
    QuantConfig,
    QuantModel,
    calibrate,
    load_calibration_set,
    load_quantized,
    primitives,
    save_packed,
)
from qdiff.capture import PairedCapture
from qdiff.evaluation.features import FashionClassifier, image_statistics
from qdiff.evaluation.frechet import FeatureStatistics, frechet_distance
from qdiff.evaluation.sampling import sample_images
from qdiff.evaluation.variants import HeldOutInputs
from qdiff.places import Collector
from qdiff.quant_model import Unit
from qdiff.quantizers import UniformAffineQuantizer
from qdiff.reconstruction import _EagerRounding

ROWS_A_STEP = 8


@contextlib.contextmanager
def dropout_on() -> Iterator[None]:
    """Units are reconstructed in training mode, dropout at work."""

    @contextlib.contextmanager
    def training(*modules: nn.Module) -> Iterator[None]:
        for module in modules:
            module.train()
        yield
        for module in modules:
            module.eval()

    with mock.patch("qdiff.reconstruction.evaluating", training):
        yield


@contextlib.contextmanager
def first_half_regularized() -> Iterator[None]:
    """The rounding regulariser leaves out the second half of a split layer."""

    def penalty(self: _EagerRounding, k: int) -> Tensor | float:
        _, _, beta, weight = self.schedule.rows[k]
        first = [layer.weight_quantizers()[0][0] for layer in self.layers]
        return weight * sum(quantizer.regularizer(beta) for quantizer in first) if weight else 0.0

    with mock.patch.object(_EagerRounding, "penalty", penalty):
        yield


@contextlib.contextmanager
def full_precision_inputs() -> Iterator[None]:
    """In the second phase a unit's input comes from the full-precision network."""
    targets, inputs = PairedCapture.targets, PairedCapture.inputs
    there: dict[str, Collector] = {}

    def targets_and_inputs(self: PairedCapture, stage: Any) -> dict[str, Collector]:
        with self.qnn.quant_state(False, False):  # before the network moves on
            for unit in self.qnn.units_of(stage):
                there[unit.path] = self._full.inputs(unit, self._storage.collector(unit))
        return targets(self, stage)

    def full_inputs(self: PairedCapture, unit: Unit) -> Collector:
        return there[unit.path] if self.act_quant else inputs(self, unit)

    with (
        mock.patch.object(PairedCapture, "targets", targets_and_inputs),
        mock.patch.object(PairedCapture, "targets_from", lambda self, unit: self.targets(unit.stage)),
        mock.patch.object(PairedCapture, "inputs", full_inputs),
    ):
        yield


@contextlib.contextmanager
def positive_ranges_without_zero() -> Iterator[None]:
    """A positive-only tensor's min-max range starts at its minimum, while the grid still starts at zero."""
    original = primitives.range_to_grid

    def range_to_grid(
        lowest: Tensor, highest: Tensor, n_bits: int, *, symmetric: bool, always_zero: bool = False
    ) -> tuple[Tensor, Tensor]:
        if symmetric or lowest.dim() > 0 or lowest.item() <= 0:
            return original(lowest, highest, n_bits, symmetric=symmetric, always_zero=always_zero)
        return (highest - lowest) / (2**n_bits - 1), torch.zeros_like(lowest)

    with mock.patch("qdiff.primitives.range_to_grid", range_to_grid):
        yield


@contextlib.contextmanager
def asymmetric_search_for_symmetric() -> Iterator[None]:
    """The error search of a symmetric quantizer runs over an asymmetric grid, whose step and zero point it keeps."""
    original = primitives.search_grid

    def search_grid(
        x: Tensor, n_bits: int, *, symmetric: bool, channel_wise: bool, always_zero: bool = False
    ) -> tuple[Tensor, Tensor]:
        return original(x, n_bits, symmetric=False, channel_wise=channel_wise, always_zero=always_zero)

    with mock.patch("qdiff.primitives.search_grid", search_grid):
        yield


@contextlib.contextmanager
def running_statistics_of_layers_only() -> Iterator[None]:
    """Moving averages reach the inputs of layers, not q, k, v and the softmax map."""
    original = UniformAffineQuantizer.update_range

    def update_range(self: UniformAffineQuantizer, x: Tensor) -> None:
        if x.dim() != 3:
            original(self, x)

    with mock.patch.object(UniformAffineQuantizer, "update_range", update_range):
        yield


@contextlib.contextmanager
def gradients_of_clamp() -> Iterator[None]:
    """Step sizes learn through torch.clamp, whatever its gradient at a bound is in this release."""

    class RoundStraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad

    def fake_quantize(x: Tensor, delta: Tensor, lo: Tensor | float, hi: Tensor | float) -> Tensor:
        return torch.clamp(RoundStraightThrough.apply(x / delta), lo, hi) * delta

    with mock.patch("qdiff.primitives.fake_quantize", fake_quantize):
        yield


@dataclass(frozen=True)
class Case:
    name: str
    slip: Callable[[], contextlib.AbstractContextManager]
    a_sym: bool = True
    act_range: str = "max"
    running_stat: bool = False
    shares_weights: bool = True  # nothing in it reaches the weight phase
    engine: str = "fast"


CASES = (
    Case("ours", contextlib.nullcontext),
    Case("second phase fed from full precision", full_precision_inputs),
    Case("asymmetric, ours", contextlib.nullcontext, a_sym=False),
    Case("asymmetric, positive ranges without zero", positive_ranges_without_zero, a_sym=False),
    Case("asymmetric, gradients of torch.clamp", gradients_of_clamp, a_sym=False),
    Case("symmetric with error search, ours", contextlib.nullcontext, act_range="mse"),
    Case("symmetric with error search on the asymmetric grid", asymmetric_search_for_symmetric, act_range="mse"),
    Case("running statistics, ours", contextlib.nullcontext, running_stat=True),
    Case("running statistics of layers only", running_statistics_of_layers_only, running_stat=True),
    Case("dropout on", dropout_on, shares_weights=False),
    Case("regulariser without second halves", first_half_regularized, shares_weights=False, engine="eager"),
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--iters", type=int, default=1000)
    parser.add_argument("--iters_a", type=int, default=250)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--weights", type=Path, help="calibrated 4-bit checkpoint; no case calibrates weights then")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--frechet", type=int, default=0, metavar="N", help="also score N samples of the case 'ours' (100 quad steps)"
    )
    parser.add_argument(
        "--bundle", type=Path, default=Path("models/pixel/fashion_mnist"), help="classifier, statistics"
    )
    parser.add_argument("--save", type=Path, help="folder for the checkpoint of each case")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    config = load_config(args.config)
    config.model.dropout, config.diffusion.beta_end = 0.1, 0.02  # those of the published result
    data = load_calibration_set(
        args.folder / "calibration_set.pt",
        cali_st=20,
        cali_n=256,
        image_shape=(config.data.channels, config.data.image_size, config.data.image_size),
    )
    evaluation = load_file(args.folder / "evaluation.safetensors", device=args.device)
    held_out = HeldOutInputs(evaluation["x"], evaluation["t"], evaluation["full_precision"], ROWS_A_STEP)
    weights = {k: v.float() for k, v in load_file(args.folder / "model.safetensors").items()}

    def with_weights(options: CalibrationConfig) -> QuantModel:
        unet = UNet.from_config(config).eval()
        unet.load_state_dict(weights)
        qnn = QuantModel.from_config(unet.to(args.device), QuantConfig(4, 8, quant_act=False, split=True))
        if args.weights is None:
            calibrate(qnn, data, options)
        else:
            load_quantized(args.weights, qnn, quant_act=False)
        return qnn

    shared: QuantModel | None = None
    for case in CASES:
        if args.only and case.name not in args.only:
            continue
        started = time.perf_counter()
        options = CalibrationConfig(
            iters=args.iters,
            iters_a=args.iters_a,
            seed=args.seed,
            running_stat=case.running_stat,
            engine=case.engine,
        )
        with case.slip():
            qnn = shared if case.shares_weights and shared is not None else with_weights(options)
            if case.shares_weights:
                shared = qnn
            weight_error = held_out.error(qnn)
            qnn = with_activations(qnn, QuantConfig(4, 8, True, case.a_sym, True, act_range=case.act_range))
            calibrate(qnn, data, options, weights_done=True)
        seconds = time.perf_counter() - started
        print(json.dumps(result_of(case, qnn, weight_error, held_out.error(qnn), seconds, config, args)), flush=True)
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            save_packed(args.save / f"{case.name.replace(' ', '_').replace(',', '')}.safetensors", qnn)


def result_of(
    case: Case,
    qnn: QuantModel,
    weight_error: Tensor,
    act_error: Tensor,
    seconds: float,
    config: PixelConfig,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """A case's line: its output errors, and where asked for the distances of its samples."""
    frechet = {}
    if args.frechet and case.name == "ours":
        frechet = {"frechet_w4a8": score(qnn, config, args)}
        qnn.set_quant_state(True, False)
        frechet["frechet_w4a32"] = score(qnn, config, args)
        qnn.set_quant_state(True, True)
    return {
        "case": case.name,
        "w4a32": round(weight_error.mean().item(), 5),
        "w4a8": round(act_error.mean().item(), 5),
        "last_steps_w4a32": [round(v, 4) for v in weight_error[-2:].tolist()],
        "last_steps_w4a8": [round(v, 4) for v in act_error[-2:].tolist()],
        "seconds": round(seconds, 1),
        **frechet,
    }


def score(model: nn.Module, config: PixelConfig, args: argparse.Namespace) -> float:
    """Fréchet distance of samples from the noise that the recorded figures used: one draw on the GPU, seed 1, TF32."""
    side = config.data.image_size
    torch.manual_seed(1)
    start = torch.randn(args.frechet, config.data.channels, side, side, device=args.device)
    images = sample_images(
        model, config, count=args.frechet, batch_size=500, device=args.device, start=start, allow_tf32=True
    )
    classifier = FashionClassifier.load(args.bundle / "classifier.safetensors", args.device)
    reference = FeatureStatistics.load(args.bundle / "reference_statistics.safetensors")
    return round(frechet_distance(image_statistics(classifier, images, "samples"), reference), 4)


def with_activations(qnn: QuantModel, config: QuantConfig) -> QuantModel:
    """The same calibrated weights with other activation quantizers."""
    qnn = copy.deepcopy(qnn)
    qnn.config = config
    for quantizer_path in qnn.act_quantizers():
        parent, _, name = quantizer_path.rpartition(".")
        owner = qnn.model.get_submodule(parent)
        bits = config.sm_abit if name == "act_quantizer_w" else config.act_bit
        fresh = UniformAffineQuantizer(bits, config.a_sym, False, config.act_range, True)
        setattr(owner, name, fresh.to(next(qnn.parameters()).device))
    return qnn


if __name__ == "__main__":
    main()
