"""Which units make the output of a network with quantized weights too large or too small.

    python benchmarks/scale_by_unit.py --folder DIR --config configs/fashion_mnist.yml [--weights CKPT]

DIR holds what ``benchmarks/published_slips.py`` reads; CKPT is a checkpoint with 4-bit split weights in the published
format, or packed; without one, weights are rounded to nearest. Prints s - 1 (see :mod:`qdiff.output_scale`) and the
output error over all inputs above a timestep, for the whole network and with one unit quantized alone, largest first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ddim.config import load_config
from ddim.unet import UNet
from qdiff.calibration_data import load_calibration_set
from qdiff.checkpoint import load_quantized
from qdiff.config import QuantConfig
from qdiff.evaluation.variants import run_batches
from qdiff.quant_model import QuantModel

BATCH = 64


def compared(output: Tensor, full: Tensor) -> tuple[float, float]:
    """s - 1, and the relative error."""
    output, full = output.double(), full.double()
    energy = full.square().sum()
    return ((output * full).sum() / energy - 1).item(), ((output - full).square().sum() / energy).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--cali_n", type=int, default=8, help="samples of each of the 20 steps")
    parser.add_argument("--above", type=float, default=90, help="timestep from which on inputs count")
    parser.add_argument("--shown", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    config = load_config(args.config)
    unet = UNet.from_config(config).eval()
    unet.load_state_dict({k: v.float() for k, v in load_file(args.folder / "model.safetensors").items()})
    qnn = QuantModel.from_config(unet, QuantConfig(4, split=True))
    if args.weights is None:
        qnn.find_weight_grids()
        qnn.bake()
    else:
        load_quantized(args.weights, qnn, quant_act=False, keep_full_precision=True)
    qnn.to(args.device)

    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    data = load_calibration_set(args.folder / "calibration_set.pt", cali_st=20, cali_n=args.cali_n, image_shape=shape)
    chosen = data.t > args.above
    x, t = data.x[chosen].to(args.device), data.t[chosen].to(args.device)
    with qnn.quant_state(False, False):
        full = run_batches(qnn, x, t, BATCH)
    with qnn.quant_state(True, False):
        rows = [(*compared(run_batches(qnn, x, t, BATCH), full), "all units")]
    alone = []
    for unit in qnn.units():
        with qnn.quant_state(False, False):
            unit.module.set_quant_state(True, False)
            alone.append((*compared(run_batches(qnn, x, t, BATCH), full), unit.path))
    rows.append((sum(s for s, _, _ in alone), sum(error for _, error, _ in alone), "sum of the units alone"))
    for scale, error, name in rows + sorted(alone, key=lambda row: -abs(row[0]))[: args.shown]:
        print(f"{scale:+.4f}  {error:.5f}  {name}")


if __name__ == "__main__":
    main()
