from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddim.config import ConfigError, config_from_dict, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GOOD: dict[str, Any] = {
    "data": {"dataset": "CIFAR10", "image_size": 32, "channels": 3},
    "model": {
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [16],
    },
    "diffusion": {"beta_schedule": "linear"},
}


def changed(key: str, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(GOOD)
    section, _, name = key.partition(".")
    if name:
        content.setdefault(section, {})[name] = value
    else:
        content[section] = value
    return content


def without(key: str) -> dict[str, Any]:
    content = copy.deepcopy(GOOD)
    section, _, name = key.partition(".")
    del (content[section] if name else content)[name or section]
    return content


def test_a_good_config_fills_in_the_defaults():
    config = config_from_dict(GOOD)
    assert config.model.ch_mult == [1, 2]
    assert config.diffusion.num_diffusion_timesteps == 1000
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (changed("model.channels", 3), ["unknown key 'model.channels'", "in_channels"]),
        (changed("modle", {}), ["unknown key 'modle'", "model"]),
        (changed("model.ch", "wide"), ["'model.ch'", "int"]),
        (changed("model.ch_mult", 3), ["'model.ch_mult'", "list[int]"]),
        (changed("model.ch_mult", [1, "two"]), ["model.ch_mult", "list[int]"]),
        (changed("diffusion.beta_start", [1]), ["'diffusion.beta_start'", "float"]),
        (changed("data.rescaled", "perhaps"), ["'data.rescaled'", "bool"]),
        (changed("data", [1]), ["'data'", "section of keys"]),
        (without("model.ch"), ["'model.ch' is missing", "int"]),
        (without("data.dataset"), ["'data.dataset' is missing", "str"]),
        (without("diffusion"), ["'diffusion' is missing"]),
        (changed("diffusion.beta_schedule", "cosine"), ["'diffusion.beta_schedule'", "linear, quad"]),
        (changed("model.var_type", "learned"), ["'model.var_type'", "fixedlarge"]),
        (changed("model.num_res_blocks", 0), ["'model.num_res_blocks'", "at least 1"]),
        (changed("model.ch", 48), ["'model.ch'", "multiple of 32"]),
        (changed("model.ch_mult", []), ["'model.ch_mult'", "positive"]),
        (changed("data.image_size", 33), ["'data.image_size'", "divisible by 2"]),
        (changed("model.in_channels", 1), ["'model.in_channels'", "data.channels 3"]),
    ],
)
def test_a_mistake_is_named_with_file_key_and_what_was_expected(content, expected, tmp_path):
    path = tmp_path / "mistake.yml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    for part in [str(path), *expected]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"data: [1, 2", b"\xff\xfe\x00", b"- 1\n- 2\n", b""])
def test_files_that_are_no_config(content, tmp_path):
    path = tmp_path / "odd.yml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"odd\.yml"):
        load_config(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yml: no such config file"):
        load_config(tmp_path / "none.yml")


@pytest.mark.parametrize(
    ("name", "size", "ch_mult", "dropout", "var_type"),
    [
        ("cifar10", 32, [1, 2, 2, 2], 0.1, "fixedlarge"),
        ("bedroom", 256, [1, 1, 2, 2, 4, 4], 0.0, "fixedsmall"),
        ("church", 256, [1, 1, 2, 2, 4, 4], 0.0, "fixedsmall"),
        ("cat", 256, [1, 1, 2, 2, 4, 4], 0.0, "fixedsmall"),
    ],
)
def test_the_published_models_numbers(name, size, ch_mult, dropout, var_type):
    config = load_config(CONFIGS / f"{name}.yml")
    model = config.model
    assert (config.data.image_size, config.data.channels, config.data.rescaled) == (size, 3, True)
    assert (model.ch, model.ch_mult, model.num_res_blocks, model.attn_resolutions) == (128, ch_mult, 2, [16])
    assert (model.dropout, model.var_type, model.resamp_with_conv) == (dropout, var_type, True)
    diffusion = config.diffusion
    assert (diffusion.beta_schedule, diffusion.beta_start, diffusion.beta_end) == ("linear", 1e-4, 0.02)
    assert diffusion.num_diffusion_timesteps == 1000
