"""Ways of calibrating a trained model whose published result is recorded: output errors and Fréchet distances.

    python benchmarks/recorded_model.py --folder DIR --config configs/fashion_mnist.yml --out study.jsonl \
        --case a_sym weight_lr=0.03,split_input,timed_ranges=all --seeds 0 1 2 --cali_precision tf32 bf16 --frechet 5000

DIR holds what ``benchmarks/published_slips.py`` reads. A case is fields of :class:`QuantConfig` and
:class:`CalibrationConfig`, joined by commas; ``linear`` among them rounds to nearest. Each case is calibrated W4A8
``--split`` with each seed and precision, and measured with weights only and with activations, both as calibrated,
divided by the scale fitted on the calibration set, and with the mean error subtracted as well: the output error on the
recorded inputs, and with ``--frechet N`` the distance of N samples (100 quad steps) from the recorded noise.
``--gains`` measures full precision with its output divided by a constant. What the file holds already is not measured
again; ``--summary`` prints means and spreads.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ddim.config import PixelConfig, load_config
from ddim.unet import UNet
from qdiff import (
    CalibrationConfig,
    QuantConfig,
    QuantModel,
    calibrate,
    fit_output_scale,
    load_calibration_set,
    save_packed,
)
from qdiff.calibration_data import CalibrationSet
from qdiff.config import CALI_PRECISIONS
from qdiff.evaluation.features import FashionClassifier, image_statistics
from qdiff.evaluation.frechet import FeatureStatistics, frechet_distance
from qdiff.evaluation.record import environment
from qdiff.evaluation.sampling import sample_images
from qdiff.evaluation.variants import HeldOutInputs, markdown_table
from qdiff.inference import InferenceConfig

ROWS_A_STEP = 8
NOISE_SEED = 1  # of the recorded figures: one draw on a GPU
# Bits: whether activations are quantized; what is corrected: nothing, the scale, the mean as well.
VARIANTS = {
    f"{bits} {how}".strip(): (activations, how)
    for bits, activations in (("w4a32", False), ("w4a8", True))
    for how in ("", "scaled", "scaled, mean")
}


def options_of(case: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Fields of the two configs, and the mode, that the words of a case mean."""
    quant_fields = {f.name for f in dataclasses.fields(QuantConfig)}
    quant: dict[str, Any] = {}
    calibration: dict[str, Any] = {}
    mode = "qdiff"
    for word in filter(None, case.split(",")):
        name, given, text = word.partition("=")
        if word == "linear":
            mode = word
            continue
        try:
            value = json.loads(text) if given else True
        except json.JSONDecodeError:
            value = text
        (quant if name in quant_fields else calibration)[name] = value
    return quant, calibration, mode


class Study:
    """The recorded model, and where results go."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        self.config: PixelConfig = load_config(args.config)
        # Those of the published result.
        self.config.model.dropout, self.config.diffusion.beta_end = 0.1, 0.02
        data = self.config.data
        self.shape = (data.channels, data.image_size, data.image_size)
        self.weights = {k: v.float() for k, v in load_file(args.folder / "model.safetensors").items()}
        recorded = load_file(args.folder / "evaluation.safetensors", device=args.device)
        self.held_out = HeldOutInputs(recorded["x"], recorded["t"], recorded["full_precision"], ROWS_A_STEP)
        self.inference = InferenceConfig(args.precision, args.compile)
        lines = args.out.read_text(encoding="utf-8").splitlines() if args.out.is_file() else []
        self.results: list[dict[str, Any]] = [json.loads(line) for line in lines]

    @property
    def data(self) -> CalibrationSet:
        return load_calibration_set(
            self.args.folder / "calibration_set.pt", cali_st=20, cali_n=256, image_shape=self.shape
        )

    def unet(self) -> UNet:
        unet = UNet.from_config(self.config).eval()
        unet.load_state_dict(self.weights)
        return unet.to(self.device)

    def keep(self, **result: Any) -> None:
        """On the disk before the next one starts."""
        result["environment"] = environment(self.device)
        self.results.append(result)
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        with self.args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps({k: v for k, v in result.items() if k not in ("environment", "scales")}), flush=True)

    def is_there(self, **key: Any) -> bool:
        return any(all(result.get(name) == value for name, value in key.items()) for result in self.results)

    def run(self) -> None:
        for gain in self.args.gains:
            if not self.is_there(case="full", gain=gain):
                unet = self.unet()
                for parameter in unet.conv_out.parameters():
                    parameter.data /= gain
                started = time.perf_counter()
                distance = self.distance(unet)
                self.keep(case="full", gain=gain, frechet=distance, seconds_of_sampling=time.perf_counter() - started)
        for case in self.args.case:
            for seed in self.args.seeds:
                for precision in self.args.cali_precision:
                    key = {"case": case, "seed": seed, "precision": precision}
                    if not self.is_there(**key):
                        self.measure(key)

    def measure(self, key: dict[str, Any]) -> None:
        quant, calibration, mode = options_of(key["case"])
        data = self.data
        qnn = QuantModel.from_config(self.unet(), QuantConfig(4, 8, True, split=True, **quant).at_timesteps(data.t))
        options = CalibrationConfig(
            **{"iters": self.args.iters, "iters_a": self.args.iters_a, "correct_scale": True}
            | calibration
            | {"seed": key["seed"], "precision": key["precision"]}
        )
        started = time.perf_counter()
        reports = calibrate(qnn, data, options, mode=mode)
        seconds = time.perf_counter() - started
        if self.args.save:
            self.args.save.mkdir(parents=True, exist_ok=True)
            save_packed(self.args.save / f"{key['case']}-{key['seed']}-{key['precision']}.safetensors", qnn)
        scale = qnn.output_scale
        corrections = {"": None, "scaled": scale, "scaled, mean": fit_output_scale(qnn, data, mean=True)}
        errors, distances = {}, {}
        for name, (activations, correction) in VARIANTS.items():
            qnn.set_quant_state(True, activations)
            qnn.output_scale = corrections[correction]
            error = self.held_out.error(qnn)
            errors[name] = [error.mean().item(), *error[-3:].tolist()]
            if self.args.frechet and name in self.args.variants:
                distances[name] = self.distance(copy.deepcopy(qnn))
        tables = {name: getattr(scale, name).tolist() for name in ("timesteps", "weights", "activations")}
        kept = [f"{report.phase} {report.name}" for report in reports if report.outcome != "learned"]
        seconds_of_sampling = time.perf_counter() - started - seconds
        self.keep(
            **key,
            error=errors,
            frechet=distances,
            scales=tables,
            seconds=seconds,
            seconds_of_sampling=seconds_of_sampling,
            not_learned=kept,
        )

    def distance(self, model: nn.Module) -> float:
        """Fréchet distance of samples from the noise that the recorded figures used; the model is used up by it."""
        torch.manual_seed(NOISE_SEED)
        start = torch.randn(self.args.frechet, *self.shape, device=self.device)
        images = sample_images(
            model,
            self.config,
            count=self.args.frechet,
            batch_size=min(self.args.frechet, self.args.batch_size),
            timesteps=self.args.timesteps,
            device=self.device,
            start=start,
            inference=self.inference,
            allow_tf32=True,
        )
        classifier = FashionClassifier.load(self.args.bundle / "classifier.safetensors", self.args.device)
        reference = FeatureStatistics.load(self.args.bundle / "reference_statistics.safetensors")
        return frechet_distance(image_statistics(classifier, images, "samples"), reference)


def summary(results: list[dict[str, Any]]) -> str:
    """Means over the seeds, with the standard deviation, of every case and precision."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        if "seed" in result:
            groups.setdefault((result["case"], result["precision"]), []).append(result)
    lines = [list(line) for (case, precision), group in groups.items() for line in _lines(case, precision, group)]
    lines += [
        [f"full, divided by {r['gain']:g}", "", "", "", "", f"{r['frechet']:.3f}"] for r in results if "gain" in r
    ]
    return markdown_table(["case", "precision", "seeds", "bits", "output error", "Fréchet"], lines)


def _lines(case: str, precision: str, group: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    seeds = " ".join(str(result["seed"]) for result in group)
    for name in VARIANTS:
        error = _mean_and_spread([result["error"][name][0] for result in group], 5)
        distance = _mean_and_spread([r["frechet"][name] for r in group if name in r["frechet"]], 3)
        yield case, precision, seeds, name, error, distance


def _mean_and_spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="results, one line of JSON each")
    parser.add_argument("--case", nargs="*", default=["a_sym"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration")
    parser.add_argument("--cali_precision", nargs="+", choices=CALI_PRECISIONS, default=[CalibrationConfig.precision])
    parser.add_argument("--iters", type=int, default=1000)
    parser.add_argument("--iters_a", type=int, default=250)
    parser.add_argument("--frechet", type=int, default=0, metavar="N", help="samples to score")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which to score")
    parser.add_argument("--gains", type=float, nargs="*", default=[], help="also full precision divided by these")
    parser.add_argument("--timesteps", type=int, default=100, help="of the sampler")
    parser.add_argument("--batch_size", type=int, default=500, help="of the sampler")
    parser.add_argument("--precision", default="full", help="of the sampler, as for the sampling command")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--bundle", type=Path, default=Path("models/pixel/fashion_mnist"), help="classifier, statistics"
    )
    parser.add_argument("--save", type=Path, help="folder for the checkpoints")
    parser.add_argument("--summary", action="store_true", help="only print what the file holds")
    args = parser.parse_args()
    study = Study(args)
    if not args.summary:
        study.run()
    print(summary(study.results))


if __name__ == "__main__":
    main()
