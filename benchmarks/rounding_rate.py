"""What AdaRound's learning rate is worth when there are few iterations, and which timesteps it learns from.

    python benchmarks/rounding_rate.py --folder DIR --config configs/fashion_mnist.yml --rates 0.001 0.01 0.03

calibrates the 4-bit weights of a model once for each rate, and prints the output error with activations in full. At
the published rate of 0.001 a rounding variable moves by about 1 at most in 1000 iterations, from a start between -2.4
and 2.4: most roundings stay at the nearest. ``--noisy_weights 0.1 1 10`` does so for samples of the noisiest timestep
drawn a tenth as often, as often and ten times as often as those of the cleanest. The folder is that of
``benchmarks/published_slips.py``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from ddim.config import load_config
from ddim.unet import UNet
from qdiff import CalibrationConfig, QuantConfig, QuantModel, calibrate, load_calibration_set, save_packed
from qdiff.evaluation.variants import HeldOutInputs

ROWS_A_STEP = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.001, 0.01, 0.03])
    parser.add_argument("--noisy_weights", type=float, nargs="+", default=[1.0])
    parser.add_argument("--iters", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--cali_n", type=int, default=64, help="samples of each of 20 timesteps")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", type=Path, help="folder for the checkpoints")
    args = parser.parse_args()

    config = load_config(args.config)
    config.model.dropout, config.diffusion.beta_end = 0.1, 0.02  # those of the published result
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    data = load_calibration_set(args.folder / "calibration_set.pt", cali_st=20, cali_n=args.cali_n, image_shape=shape)
    evaluation = load_file(args.folder / "evaluation.safetensors", device=args.device)
    held_out = HeldOutInputs(evaluation["x"], evaluation["t"], evaluation["full_precision"], ROWS_A_STEP)
    weights = {k: v.float() for k, v in load_file(args.folder / "model.safetensors").items()}
    for rate, noisy_weight in itertools.product(args.rates, args.noisy_weights):
        started = time.perf_counter()
        unet = UNet.from_config(config).eval()
        unet.load_state_dict(weights)
        qnn = QuantModel.from_config(unet.to(args.device), QuantConfig(4, split=True))
        options = CalibrationConfig(
            iters=args.iters,
            batch_size=args.batch_size,
            weight_lr=rate,
            noisy_weight=noisy_weight,
            seed=args.seed,
            correct_scale=True,
        )
        reports = calibrate(qnn, data, options)
        error = {"scaled": held_out.error(qnn)}
        scale, qnn.output_scale = qnn.output_scale, None
        error["w4a32"] = held_out.error(qnn)
        result = {name: round(value.mean().item(), 5) for name, value in error.items()}
        parameters = sum(r.parameters for r in reports)
        result |= {
            "rate": rate,
            "noisy_weight": noisy_weight,
            "first_steps": [round(v, 6) for v in error["w4a32"][:3].tolist()],
            "last_steps": [round(v, 4) for v in error["w4a32"][-3:].tolist()],
            "scale": [round(v, 3) for v in scale.weights.tolist()],
            "settled": round(sum(r.trace[-1].settled * r.parameters for r in reports) / parameters, 3),
            "kept": [r.name for r in reports if r.outcome == "kept"],
            "seconds": round(time.perf_counter() - started),
        }
        print(json.dumps(result), flush=True)
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            weighted = "" if noisy_weight == 1 else f"-noisy{noisy_weight:g}"
            save_packed(args.save / f"rate{rate:g}{weighted}.safetensors", qnn)


if __name__ == "__main__":
    main()
