"""What learning the step sizes of softmax maps in 16 bits is worth, on the bundled text-to-image model.

    python benchmarks/map_steps.py --iters_a 100

calibrates the activations of the bundled W4A32 network twice, on 160 samples, batch 8, one thread of a CPU: with these
step sizes learned as all others are, and left as they were found (``Unit.learnable_act_quantizers``).
It prints the loss of each transformer block, and of all units together.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from unittest import mock

import torch

from qdiff.calibrate import calibrate
from qdiff.calibration_data import CalibrationSet, save_calibration_set
from qdiff.checkpoint import load_quantized
from qdiff.cli.bundles import BUNDLES, LatentBundle
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.evaluation.variants import markdown_table
from qdiff.quant_model import QuantModel, Unit
from qdiff.reconstruction import UnitReport

MODEL = "emoji-text"
SAMPLER_STEPS, TIMESTEPS, SAMPLES_A_STEP = 20, 5, 16  # each sample with its caption and without
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iters_a", type=int, default=100, help="iterations a unit")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bundle = BUNDLES[MODEL]
    assert isinstance(bundle, LatentBundle)
    data = recorded(bundle)
    learned, left = (reports(bundle, data, args.iters_a, learn_maps=learn) for learn in (True, False))
    rows = [
        [one.name, *(f"{x:.4g}" for x in (one.loss_before, one.loss_after, other.loss_after)), one.outcome]
        for one, other in zip(learned, left, strict=True)
        if one.kind == "transformer block"
    ]
    sums = [f"{sum(report.loss_after for report in reports):.1f}" for reports in (learned, left)]
    rows.append([f"all {len(left)} units", "", *sums, ""])
    print(markdown_table(["unit", "start", "learned", "left alone", "what became of the learned one"], rows))


def recorded(bundle: LatentBundle) -> CalibrationSet:
    """Inputs along full-precision trajectories."""
    content = bundle.record(
        bundle.full_precision(),
        device=torch.device("cpu"),
        timesteps=SAMPLER_STEPS,
        seed=1,
        count=SAMPLES_A_STEP,
        batch_size=SAMPLES_A_STEP,
        cali_st=TIMESTEPS,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.pt"
        save_calibration_set(path, content)
        return bundle.calibration_samples(path, cali_st=TIMESTEPS, cali_n=SAMPLES_A_STEP)


def reports(bundle: LatentBundle, data: CalibrationSet, iters: int, *, learn_maps: bool) -> list[UnitReport]:
    """Of one calibration of the activations, on the bundled weights."""
    quant = QuantConfig(4, 8, quant_act=True, split=True, **bundle.quant)
    model = QuantModel.from_config(bundle.full_precision(), quant)
    packed = bundle.folder / "w4a8.safetensors"
    load_quantized(packed, model, quant_act=False, weights_only=True, keep_full_precision=True)
    options = CalibrationConfig(iters=0, iters_a=iters, batch_size=BATCH, **bundle.calibration)
    learnable = Unit.act_quantizers if learn_maps else Unit.learnable_act_quantizers
    with mock.patch.object(Unit, "learnable_act_quantizers", learnable):
        return calibrate(model, data, options, weights_done=True)


if __name__ == "__main__":
    main()
