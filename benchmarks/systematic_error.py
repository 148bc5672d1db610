"""How much of a quantized network's output error is systematic, and what that does to the images.

    python benchmarks/systematic_error.py --folder DIR --config configs/fashion_mnist.yml --weights CKPT --images 96

DIR holds what ``benchmarks/published_slips.py`` reads, CKPT is a calibrated checkpoint (W4A8, split). For each
timestep of the calibration set: the error relative to the output; the same error as one of the image that the sampler
infers from the output, relative to that image's variance, which is what a step acts on; and the shares of the error
that a factor, a linear 5 x 5 filter of the network's input, and a mean map explain. They are fitted on one half of the
samples and counted on the other. Then images from the same noise, full precision against quantized, as calibrated and
with corrections: difference of brightness, root mean square difference ([-1, 1]), squared shift of the mean features.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ddim.config import load_config
from ddim.samplers import ddim_sample
from ddim.schedule import alphas_cumprod, make_betas, sampling_timesteps
from ddim.unet import UNet
from qdiff import QuantConfig, QuantModel, fit_output_scale, load_calibration_set, load_quantized
from qdiff.evaluation.features import FashionClassifier, pooled_features
from qdiff.evaluation.variants import markdown_table, run_batches

FILTER = 5
BATCH = 48


def explained(error: Tensor, regressors: list[Tensor]) -> float:
    """Share of the second half's squared error that a linear fit on the first half explains."""
    half = len(error) // 2
    inside, outside = (
        torch.stack([r[part].flatten() for r in regressors], 1).double() for part in (slice(half), slice(half, None))
    )
    fitted = torch.linalg.lstsq(inside, error[:half].flatten().double()[:, None]).solution
    rest = error[half:].flatten().double() - (outside @ fitted)[:, 0]
    return 1 - (rest.square().sum() / error[half:].double().square().sum()).item()


def explained_by_map(error: Tensor) -> float:
    half = len(error) // 2
    rest = error[half:] - error[:half].mean(0)
    return 1 - (rest.square().sum() / error[half:].square().sum()).item()


def neighbourhood(x: Tensor) -> list[Tensor]:
    """Every pixel's neighbours, one tensor for each place in the filter."""
    reach = FILTER // 2
    patches = F.unfold(F.pad(x, (reach,) * 4, mode="reflect"), FILTER)
    return list(patches.view(len(x), -1, *x.shape[2:]).split(1, dim=1))


def rows_of_timesteps(x: Tensor, t: Tensor, full: Tensor, error: Tensor, alpha_bar: Tensor) -> Iterator[list[str]]:
    for step in t.unique():
        own = t == step
        a = alpha_bar[int(step)].float()
        image = (x[own] - (1 - a).sqrt() * full[own]) / a.sqrt()
        image_error = (1 - a) / a * error[own].square().mean() / image.var()
        shares = explained(error[own], [full[own]]), explained(error[own], neighbourhood(x[own]))
        relative = error[own].square().sum() / full[own].square().sum()
        values = f"{step:g}", f"{relative:.5f}", f"{image_error:.4f}"
        yield [*values, *(f"{share:.2f}" for share in (*shares, explained_by_map(error[own])))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="calibrated checkpoint, W4A8 --a_sym --split")
    parser.add_argument("--quant_act", action="store_true", help="quantize activations too")
    parser.add_argument("--cali_n", type=int, default=128, help="samples of each timestep")
    parser.add_argument("--images", type=int, default=0, metavar="N", help="also compare N images")
    parser.add_argument("--timesteps", type=int, default=50, help="of the sampler")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bundle", type=Path, default=Path("models/pixel/fashion_mnist"), help="for its classifier")
    args = parser.parse_args()
    torch.set_grad_enabled(False)

    config = load_config(args.config)
    config.model.dropout, config.diffusion.beta_end = 0.1, 0.02  # those of the published result
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    alpha_bar = alphas_cumprod(make_betas(config.diffusion)).to(args.device)
    data = load_calibration_set(args.folder / "calibration_set.pt", cali_st=20, cali_n=args.cali_n, image_shape=shape)
    unet = UNet.from_config(config).eval()
    unet.load_state_dict({k: v.float() for k, v in load_file(args.folder / "model.safetensors").items()})
    qnn = QuantModel.from_config(unet, QuantConfig(4, 8, args.quant_act, a_sym=True, split=True))
    load_quantized(args.weights, qnn, quant_act=args.quant_act, keep_full_precision=True, correct_scale=False)
    qnn.to(args.device).eval()

    x, t = data.x.to(args.device), data.t.to(args.device)
    with qnn.quant_state(False, False):
        full = run_batches(qnn, x, t, BATCH)
    error = run_batches(qnn, x, t, BATCH) - full
    header = ["t", "error of output", "of inferred image", "by a factor", "by a filter", "by a mean map"]
    print(markdown_table(header, list(rows_of_timesteps(x, t, full, error, alpha_bar))), flush=True)
    if not args.images:
        return

    times = sampling_timesteps(config.diffusion.num_diffusion_timesteps, args.timesteps, "quad")
    start = torch.randn(args.images, *shape, generator=torch.Generator().manual_seed(7)).to(args.device)
    classifier = FashionClassifier.load(args.bundle / "classifier.safetensors", args.device)

    def sample(model: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        images = torch.cat([ddim_sample(model, part, times, alpha_bar) for part in start.split(BATCH)])
        return images, pooled_features(classifier, (images.clamp(-1, 1) + 1) / 2).double()

    with qnn.quant_state(False, False):
        reference, features = sample(qnn)
    both = fit_output_scale(qnn, data, mean=True)
    lines = []
    for name, correction in (("none", None), ("scale", fit_output_scale(qnn, data)), ("scale and mean", both)):
        qnn.output_scale = correction
        images, own = sample(qnn)
        shift = own - features
        # Less what a mean of so few would differ by chance.
        squared = shift.mean(0).square().sum() - shift.var(0).sum() / len(shift)
        difference = images - reference
        values = difference.mean(), difference.square().mean().sqrt(), squared
        lines.append([name, *(f"{value:.3f}" for value in values)])
    print()
    print(markdown_table(["correction", "brightness", "rms difference", "shift of features"], lines))


if __name__ == "__main__":
    main()
