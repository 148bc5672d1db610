"""What ways of choosing activation ranges are worth on a trained model, without learning anything.

    python benchmarks/activation_ranges.py --folder DIR --config configs/fashion_mnist.yml --weights CKPT [--case ...]

DIR holds what ``benchmarks/published_slips.py`` reads. CKPT is a checkpoint with calibrated 4-bit weights in the
published format. Each case sets ranges on the calibration set and prints the output error, the mean of the 20 steps and
the last ones: with all activations quantized, with the network's input alone, and with all others; on the 4-bit weights
and on full-precision ones. With ``--scale`` also the scale of the output on the calibration set, last timestep first,
and the error after dividing by it.

A case is a list of flags of the sampling command, joined by commas: ``timed_ranges=all,act_range=mse,split_input``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ddim.config import load_config
from ddim.unet import UNet
from qdiff.act_ranges import find_act_ranges, range_rows
from qdiff.calibration_data import CalibrationSet, load_calibration_set
from qdiff.checkpoint import load_quantized
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.evaluation.variants import HeldOutInputs
from qdiff.quant_block import BaseQuantBlock
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.scale_correction import fit_output_scale

ROWS_A_STEP = 8
SHOWN_STEPS = 3
CASES = (
    "a_sym",
    "",
    "a_sym,timed_ranges=input",
    "timed_ranges=input",
    "a_sym,timed_ranges=all",
    "timed_ranges=all",
    "timed_ranges=all,act_range=mse",
    "split_input",
    "split_input,timed_ranges=input",
    "split_input,timed_ranges=all",
    "split_input,timed_ranges=all,act_range=mse",
)


def options_of(case: str) -> dict[str, Any]:
    """Fields of :class:`QuantConfig`."""
    pairs = (word.partition("=") for word in case.split(",") if word)
    return {name: value if separator else True for name, separator, value in pairs}


def errors_of(qnn: QuantModel, inputs: HeldOutInputs, chosen: Callable[[str], bool]) -> dict[str, Any]:
    """Output error while the activations of some layers and blocks are quantized, chosen by their path."""
    for path, module in qnn.model.named_modules():
        if isinstance(module, QuantModule | BaseQuantBlock):
            module.use_act_quant = chosen(path)
    error = inputs.error(qnn)
    return {"mean": round(error.mean().item(), 5), "last": [round(v, 4) for v in error[-SHOWN_STEPS:].tolist()]}


def measure(qnn: QuantModel, held_out: HeldOutInputs) -> dict[str, Any]:
    images = set(qnn.adapter.inputs(qnn.model))
    result: dict[str, Any] = {}
    for name, quantized in (("w4", True), ("w32", False)):
        qnn.set_quant_state(quantized, True)
        result[f"{name}a8"] = errors_of(qnn, held_out, lambda path: True)
        result[f"{name}a8, input only"] = errors_of(qnn, held_out, lambda path: path in images)
        result[f"{name}a8, all but the input"] = errors_of(qnn, held_out, lambda path: path not in images)
    return result


def corrected(qnn: QuantModel, held_out: HeldOutInputs, data: CalibrationSet) -> dict[str, Any]:
    qnn.set_quant_state(True, True)
    qnn.output_scale = scale = fit_output_scale(qnn, data)
    s = [round(v, 3) for v in scale.activations.tolist()]
    return {"s": s, "w4a8, divided by s": errors_of(qnn, held_out, lambda path: True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="published format, 4 bits, split")
    parser.add_argument("--case", nargs="*", default=CASES)
    parser.add_argument("--cali_n", type=int, default=64, help="samples of each of the 20 steps")
    parser.add_argument("--range_samples", type=int, default=64, help="for ranges that are not timed; 0 for all")
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    config = load_config(args.config)
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    data = load_calibration_set(args.folder / "calibration_set.pt", cali_st=20, cali_n=args.cali_n, image_shape=shape)
    evaluation = load_file(args.folder / "evaluation.safetensors", device=args.device)
    held_out = HeldOutInputs(evaluation["x"], evaluation["t"], evaluation["full_precision"], ROWS_A_STEP)
    rows = range_rows(len(data), CalibrationConfig(range_samples=args.range_samples or None))
    inputs: tuple[Tensor, ...] = tuple(x.to(args.device) for x in data.inputs())
    for case in args.case:
        quant = QuantConfig(4, 8, True, split=True, **options_of(case)).at_timesteps(data.t.tolist())
        qnn = QuantModel.from_config(UNet.from_config(config).eval(), quant)
        load_quantized(args.weights, qnn, quant_act=False)
        qnn.to(args.device)
        started = time.perf_counter()
        find_act_ranges(qnn, inputs, rows.to(args.device))
        seconds = round(time.perf_counter() - started, 1)
        result = {"case": case, "seconds": seconds} | measure(qnn, held_out)
        if args.scale:
            result |= corrected(qnn, held_out, data)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
