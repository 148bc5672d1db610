"""Two sets of images that should show the same, image by image: what quantization changed, the noise being equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.evaluation.errors import EvaluationError
from qdiff.evaluation.image_metrics import psnr
from qdiff.evaluation.image_sets import ImageSet, as_bytes
from qdiff.evaluation.scores import over_parts

# Options of the sampling commands that decide the noise of an image, or the way from it to the image.
SAME_IN_BOTH = (
    *("seed", "fixed_code", "prompts_sha256", "class_labels", "scale"),
    *("timesteps", "custom_steps", "ddim_steps", "eta", "ddim_eta"),
    *("sample_type", "skip_type", "vanilla_sample", "dpm", "plms", "H", "W"),
)


def check_pairs(images: ImageSet, others: ImageSet) -> None:
    """Refuse sets in which the images do not correspond.

    Raises:
        EvaluationError: other numbers of images, or images of other numbers.
    """
    if len(images) != len(others):
        raise EvaluationError(
            f"{images.path} has {len(images)} images and {others.path} {len(others)}: pairs need as many in both"
        )
    ours, theirs = (one.numbers or list(range(len(one))) for one in (images, others))
    if ours != theirs:
        a, b = next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
        raise EvaluationError(f"image {a} of {images.path} would be compared with image {b} of {others.path}")


def check_same_noise(options: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Refuse runs whose images did not come from the same noise in the same way.

    Args:
        options, others: as the runs' ``sampling_config.yaml`` record them.

    Raises:
        EvaluationError: naming what differs.
    """
    differing = [name for name in SAME_IN_BOTH if options.get(name) != others.get(name)]
    if differing:
        shown = "; ".join(f"{name} is {options.get(name)!r} and {others.get(name)!r}" for name in differing)
        raise EvaluationError(f"the two runs do not make the same images of the same noise: {shown}")


def compare(images: ImageSet, others: ImageSet, lpips: nn.Module | None, *, batch_size: int) -> dict[str, Any] | None:
    """PSNR, and LPIPS where its network is given, of every pair: mean and worst.

    Equal images have no finite PSNR: they are counted, and the mean is over the others. Of several processes only the
    first gets the result.

    Raises:
        EvaluationError: images that do not correspond, or differ in shape.
    """
    check_pairs(images, others)
    device = next(lpips.parameters()).device if lpips is not None else None

    def work(start: int, part: Tensor) -> tuple[Tensor, Tensor | None]:
        a, b = as_bytes(part), as_bytes(others.read(start, start + len(part)))
        if a.shape != b.shape:
            sizes = " and ".join("x".join(map(str, x.shape[1:])) for x in (a, b))
            raise EvaluationError(f"{images.path} and {others.path}: images of {sizes} do not compare")
        ratios = psnr(a.double() / 255, b.double() / 255)
        return ratios, None if lpips is None else _lpips(lpips, a, b, device)

    found = over_parts(images, batch_size, work, "pairs")
    if found is None:
        return None
    ratios, numbers = torch.cat([one for one, _ in found]), images.numbers
    finite = ratios[ratios.isfinite()]
    result: dict[str, Any] = {"pairs": len(ratios), "identical": int((~ratios.isfinite()).sum())}
    if len(finite):
        result["psnr"] = _summary(ratios, float(finite.mean()), int(ratios.argmin()), numbers)
    if lpips is not None:
        distances = torch.cat([one for _, one in found])
        result["lpips"] = _summary(distances, float(distances.mean()), int(distances.argmax()), numbers)
    return result


@torch.no_grad()
def _lpips(network: nn.Module, a: Tensor, b: Tensor, device: torch.device | None) -> Tensor:
    """n float64; grey images count as three equal channels."""
    a, b = (x.expand(-1, 3, -1, -1).to(device) for x in (a, b))
    return network(a, b).reshape(-1).double().cpu()


def _summary(values: Tensor, mean: float, worst: int, numbers: list[int] | None) -> dict[str, Any]:
    return {"mean": mean, "worst": float(values[worst]), "worst_image": numbers[worst] if numbers else worst}
