"""scripts/model_stats.py: what it prints, from configs of every kind and against the bundled checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qdiff.cli.model_stats import main

from .conftest import REPOSITORY
from .latent_models import config_of

FASHION = ["--config", str(REPOSITORY / "configs" / "fashion_mnist.yml"), "--quant_act", "--split"]
BUNDLED = REPOSITORY / "models" / "pixel" / "fashion_mnist"
BEDS = REPOSITORY / "models" / "ldm" / "lsun_beds256"
BETTER = ["--timed_ranges", "all", "--split_input", "--correct_scale", "--correct_mean", "--cali_st", "20"]


def facts(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("file", "precision", "flags"),
    [("w8a8", "W8A8", []), ("w4a8-published", "W4A8", []), ("w4a8", "W4A8", BETTER)],
)
def test_bundled_checkpoints_have_the_size_that_is_told(
    file: str, precision: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    told = facts(capsys, *FASHION, *flags)["precisions"][precision]["bytes"]
    assert told == sum(tensor.nbytes for tensor in load_file(BUNDLED / f"{file}.safetensors").values())


def test_table_compares_with_counts_reported_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-r", str(BEDS / "model.ckpt"), "--weight_bit", "4", "--quant_act"]) == 0  # only its config is there
    out = capsys.readouterr().out
    assert "274,056,163 parameters, 101,200,031,744 MACs" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.partition("reported elsewhere")[2].splitlines()[1:]}
    assert rows["fp32"] == ["1045.6", "1045.4", "-0.02%"]
    assert rows["W4A8"][0] == "148.4"


def test_layers_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    told = facts(capsys, *FASHION, "--layers")
    for name, total in told["precisions"].items():
        assert sum(row["sizes"][name] for row in told["layers"]) == total["bytes"]
        assert sum(row["bops"][name] for row in told["layers"]) == total["bops"]
    main([*FASHION, "--layers"])
    table = capsys.readouterr().out
    assert all(row["path"] in table for row in told["layers"])


def test_words_change_a_latent_config_and_the_context_has_a_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(config_of("classes")))  # JSON is YAML
    plain = facts(capsys, "--config", config)
    assert plain["inputs"] == [[3, 8, 8], [1, 12]]
    larger = facts(capsys, "-r", tmp_path, "model.params.image_size=16", "--context_tokens", "5")
    assert larger["inputs"] == [[3, 16, 16], [5, 12]]
    assert larger["parameters"] == plain["parameters"]
    assert larger["macs"] > 4 * plain["macs"] * 0.9


def test_text_encoder_is_not_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = config_of("classes")
    encoder = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    content["model"]["params"]["cond_stage_config"] = encoder
    (tmp_path / "v1.yaml").write_text(json.dumps(content))
    assert facts(capsys, "--config", tmp_path / "v1.yaml")["inputs"][1] == [77, 12]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--config FILE, or -r PATH"),
        (["--config", "nowhere.yml"], "no such file"),
        (["-r", "/nowhere/model.ckpt"], "there is no /nowhere/config.yaml"),
        ([*FASHION[:2], "--act_bit", "4"], "--act_bit needs --quant_act"),
        ([*FASHION, "--weight_bit", "9"], "not one of 2, 3"),
        ([*FASHION, "--timed_ranges", "all"], "needs --cali_st"),
        ([*FASHION, "--cali_st", "20"], "--cali_st changes nothing"),
        ([*FASHION, "--correct_mean"], "needs --correct_scale"),
        ([*FASHION, "--context_tokens", "7"], "takes no context"),
        ([*FASHION, "model.ch=64"], "only the config of a latent model"),
        (["-r", str(BEDS), "model.params.image_size=12"], "cannot be run on inputs of 3x12x12"),
        (["-r", str(BEDS), "model.params.image_size=big"], "not the number of rows"),
        (["-r", str(BEDS), "model.params.unet_config.params.num_head_channels=5"], "does not divide"),
        (["-r", str(BEDS), "model.params.unet_config=1"], "no section model.params.unet_config"),
        (["-r", str(BEDS), "model.params.unet_config.params.heads=5"], "heads"),
    ],
)
def test_wrong_input_is_one_line(argv: list[str], said: str, failing) -> None:
    failure = failing(*argv, main=main)
    assert failure.status == 2
    assert said in failure.message
    assert "Traceback" not in failure.message
