"""The command that makes calibration sets, for latent models: what the network sees, and under which conditions."""

from __future__ import annotations

import pytest
import torch

from ddim.noise import ImageNoise
from ldm.models.diffusion.ddim import latent_timesteps
from qdiff.calibration_data import load_calibration_set
from qdiff.cli.latent import LatentModel
from qdiff.cli.make_calibration_data import main

from .latent_models import CLASSES, SHAPES, STEPS


@pytest.mark.parametrize("kind", SHAPES)
def test_holds_every_step_of_the_sampler(latent, kind):
    content = torch.load(latent(kind).calibration_set, weights_only=True)
    assert set(content) == ({"xs", "ts", "cs", "ucs"} if kind == "classes" else {"xs", "ts"})
    assert [x.shape for x in content["xs"]] == [(6, *SHAPES[kind])] * STEPS
    assert [t.tolist() for t in content["ts"]] == [[float(t)] * 6 for t in reversed(latent_timesteps(40, STEPS))]
    assert torch.equal(content["xs"][0], ImageNoise(7, range(6), SHAPES[kind]).start())
    assert not torch.equal(content["xs"][0], content["xs"][1])


def test_conditions_are_those_of_the_samples(latent, tmp_path):
    """Labels in turn; the file holds the embeddings once, not at every step."""
    content = torch.load(latent("classes").calibration_set, weights_only=True)
    model = LatentModel(str(latent("classes").folder))
    model.load()
    table = model.diffusion.cond_stage_model.embedding.weight
    for step in range(STEPS):
        assert torch.equal(content["cs"][step][:, 0], table[[1, 4, 1, 4, 1, 4]])
        assert torch.equal(content["ucs"][step][:, 0], table[[CLASSES] * 6])
    assert len({embeddings.data_ptr() for embeddings in content["cs"]}) == 1


def test_the_selection_is_taken_twice(latent):
    path = latent("classes").calibration_set
    chosen = load_calibration_set(
        path, cali_st=2, cali_n=3, image_shape=SHAPES["classes"], conditional=True, context_width=12
    )
    content = torch.load(path, weights_only=True)
    once = torch.cat([content["xs"][step][:3] for step in (0, 2)])
    assert torch.equal(chosen.x, torch.cat([once, once]))
    expected = [content[name][step][:3] for name in ("cs", "ucs") for step in (0, 2)]
    assert torch.equal(chosen.context, torch.cat(expected))


@pytest.mark.parametrize("kind", ["churches", "classes"])
def test_does_not_depend_on_the_batch_size(latent, tmp_path, kind):
    same = latent(kind).flags("--out", tmp_path / "set.pt", "--batch_size", 5, seed=7)
    same[same.index("-n") + 1] = "6"
    main(same)
    again, content = (torch.load(p, weights_only=True) for p in (tmp_path / "set.pt", latent(kind).calibration_set))
    for name in content:
        for x, y in zip(content[name], again[name], strict=True):
            assert (x - y).abs().max() < 1e-3


def test_keeps_what_calibration_takes(latent, tmp_path, capsys):
    flags = latent("classes").flags("--out", tmp_path / "set.pt", "--cali_st", 2, "--cali_n", 2, "--half", seed=7)
    main(flags)
    content = torch.load(tmp_path / "set.pt", weights_only=True)
    whole = torch.load(latent("classes").calibration_set, weights_only=True)
    assert {name: len(steps) for name, steps in content.items()} == {"xs": 2, "ts": 2, "cs": 2, "ucs": 2}
    assert torch.equal(content["xs"][0], whole["xs"][0][:2].half())
    assert torch.equal(content["ts"][1], whole["ts"][2][:2])
    assert torch.equal(content["cs"][0], whole["cs"][0][:2])
    said = capsys.readouterr().out
    assert "2 steps of 2x3x8x8" in said
    assert "embeddings of 2x1x12" in said


@pytest.mark.parametrize(("flag", "steps"), [("--dpm", STEPS), ("-v", 40)])
def test_other_samplers(latent, tmp_path, flag, steps):
    flags = ["-r", str(latent("beds").folder), "-n", "2", flag, "--out", str(tmp_path / "set.pt"), "--device", "cpu"]
    main(flags + (["-c", str(STEPS)] if flag == "--dpm" else []))
    times = [float(t[0]) for t in torch.load(tmp_path / "set.pt", weights_only=True)["ts"]]
    assert len(times) == steps
    assert times == sorted(times, reverse=True)
