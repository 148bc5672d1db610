from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from ddim.config import ConfigError
from ldm.modules.encoders.modules import ClassEmbedder
from ldm.util import instantiate_from_config, load_guidance, load_model_config

EMBEDDER = "ldm.modules.encoders.modules.ClassEmbedder"


def test_builds_what_the_target_names() -> None:
    built = instantiate_from_config({"target": EMBEDDER, "params": {"embed_dim": 4, "n_classes": 3}})
    assert isinstance(built, ClassEmbedder)
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), nn.Identity)


@pytest.mark.parametrize("target", ["os.system", "this.setup", "torch.nn.Linear", "ldm.lr_scheduler.Other", ""])
def test_other_targets_are_refused_before_anything_is_imported(target: str) -> None:
    sys.modules.pop("this", None)
    with pytest.raises(ConfigError, match=f"target '{target}' is none of"):
        instantiate_from_config({"target": target, "params": {"command": "true"}})
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("__is_unconditional__", "expected a section"),
        ({"params": {}}, "expected a section"),
        ({"target": EMBEDDER, "parameters": {}}, "unknown key 'parameters'"),
        ({"target": EMBEDDER, "params": {"embed_dim": 4, "width": 3}}, "ClassEmbedder: .*'width'"),
        ({"target": EMBEDDER}, "ClassEmbedder: .*'embed_dim'"),
    ],
)
def test_wrong_sections_are_named(config: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        instantiate_from_config(config)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_only_the_model_section_is_read_and_words_override_it(tmp_path: Path) -> None:
    path = write(
        tmp_path, "model: {target: x, params: {a: 1, b: [1, 2]}}\ndata: {target: os.system, root: '${oc.no:}'}"
    )
    got = load_model_config(path, ["model.params.a=5", "model.params.c.d=true", "data.x=1"])
    assert got == {"target": "x", "params": {"a": 5, "b": [1, 2], "c": {"d": True}}}


@pytest.mark.parametrize("text", ["model: [", "data: {}", "model: {}", "- 1", "", "model: {a: '${b}'}"])
def test_unusable_files_are_named(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_model_config(path)
    with pytest.raises(ConfigError, match="no such config file"):
        load_model_config(tmp_path / "other.yaml")


def test_guidance_that_a_config_recommends(tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {target: a.B}\nsampling: {scale: 2.5}\n")
    assert load_guidance(path) == 2.5
    assert load_guidance(path, ["sampling.scale=4"]) == 4.0
    path.write_text("model: {target: a.B}\n")
    assert load_guidance(path) is None
    with pytest.raises(ConfigError, match="no section 'sampling'"):
        load_guidance(path, ["sampling.scale=4"])


@pytest.mark.parametrize(
    "section", ["{scale: -1}", "{scale: .inf}", "{scale: .nan}", "{scale: yes}", "{steps: 5}", "3"]
)
def test_guidance_that_is_none(tmp_path, section: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"model: {{target: a.B}}\nsampling: {section}\n")
    with pytest.raises(ConfigError, match="'sampling' holds 'scale' alone"):
        load_guidance(path)
