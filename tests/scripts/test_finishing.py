"""Checker and watermark, each on what it is made for; skipped where its package is not installed."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qdiff.cli import finishing
from qdiff.cli.errors import UserError
from qdiff.cli.finishing import WATERMARK, SafetyChecker, image_steps

from .test_txt2img import pictures
from .text_models import draw

needs_watermark = pytest.mark.skipif(not importlib.util.find_spec("imwatermark"), reason="no invisible-watermark here")
needs_diffusers = pytest.mark.skipif(not importlib.util.find_spec("diffusers"), reason="diffusers is absent")


def picture(seed: int = 0, side: int = 256) -> Tensor:
    """1 x 3 x H x W, smooth as images are."""
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0.05, 0.95)


def flags(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**({"safety_checker": None, "no_watermark": False} | changes))


@needs_watermark
def test_the_watermark_is_found_and_not_seen():
    from imwatermark import WatermarkDecoder

    def found(images: Tensor) -> bytes:
        pixels = images[0].mul(255).round().byte().permute(1, 2, 0).numpy()[..., ::-1]
        return WatermarkDecoder("bytes", 8 * len(WATERMARK)).decode(np.ascontiguousarray(pixels), "dwtDct")

    # Bits are hidden in a channel of colour, and strong colours drown them: that is the package's method.
    clean = picture().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    marked = clean
    for step in image_steps(flags()):
        marked = step(marked)
    assert found(marked) == WATERMARK
    assert found(clean) != WATERMARK
    assert (marked - clean).square().mean() < 1e-3  # below 30 dB it would be seen
    left_out = clean
    for step in image_steps(flags(no_watermark=True)):
        left_out = step(left_out)
    assert torch.equal(left_out, clean)


@needs_watermark
def test_images_too_small_for_a_watermark_stay(caplog):
    small = picture(side=32)
    with caplog.at_level(logging.INFO, "qdiff.cli.finishing"):
        (_, mark) = image_steps(flags())
        assert torch.equal(mark(small), small)
    assert "too small for a watermark" in caplog.text


def test_without_the_package_images_stay(monkeypatch):
    monkeypatch.setattr(finishing.importlib.util, "find_spec", lambda name: None)
    images = picture()
    for step in image_steps(flags()):
        assert torch.equal(step(images), images)


def classifier(folder: Path, labels: list[str]) -> Path:
    """A tiny image classifier: the second label for bright images, the first for dark ones."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=3,
        embedding_size=4,
        hidden_sizes=[4],
        depths=[1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    torch.manual_seed(0)
    model = ResNetForImageClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("convolution.weight"):
                parameter.fill_(1 / parameter[0].numel())  # averages
        head = model.classifier[-1]
        head.weight.copy_(torch.tensor([[0.0] * 4, [1.0] * 4]))
        middle = [model(torch.full((1, 3, 32, 32), value)).logits[0, 1] for value in (0.2, 0.8)]
        head.bias.copy_(torch.tensor([0.0, 0.0]))
        head.bias[1] -= sum(middle) / 2
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "do_resize": true, "size": {"height": 32, "width": 32}, '
        '"do_rescale": true, "do_normalize": false}'
    )
    return folder


def test_a_classifier_of_transformers_blacks_out_what_it_objects_to(tmp_path):
    checker = SafetyChecker(str(classifier(tmp_path / "c", ["normal", "nsfw"])))
    images = torch.cat([torch.full((1, 3, 40, 40), value) for value in (0.2, 0.8, 0.3)])
    checked = checker(images)
    assert torch.equal(checked[[0, 2]], images[[0, 2]])
    assert checked[1].abs().max() == 0


def test_labels_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none of its labels \(cat, dog\)"):
        SafetyChecker(str(classifier(tmp_path / "c", ["cat", "dog"])))


@needs_diffusers
def test_the_checker_of_diffusers(tmp_path):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    numbers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=numbers | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds.data.normal_()
    for threshold, objects in ((-2.0, True), (2.0, False)):
        checker.concept_embeds_weights.data.fill_(threshold)
        checker.special_care_embeds_weights.data.fill_(2.0)
        folder = tmp_path / str(objects)
        checker.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(
            '{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "crop_size": '
            '{"height": 16, "width": 16}}'
        )
        images = picture(side=32)
        checked = SafetyChecker(str(folder))(images)
        assert torch.equal(checked, torch.zeros_like(images) if objects else images)


def test_the_log_says_whether_images_are_checked(text, tmp_path):
    folder = classifier(tmp_path / "c", ["normal", "nsfw"])
    flags = text("sd").flags("--n_iter", 1)
    plain = draw(flags, tmp_path / "a")
    checked = draw(flags, tmp_path / "b", "--safety_checker", folder)
    assert "not checked for content" in (plain / "run.log").read_text()
    log = (checked / "run.log").read_text()
    assert f"images are checked by {folder}" in log
    black = [bool(image.max() == 0) for image in pictures(checked)]
    objected = f"{sum(black)} of {len(black)} images were objected to"
    assert (objected in log) is any(black)
