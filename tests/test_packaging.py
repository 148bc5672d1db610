"""What surrounds the code: dependencies stated in several files, the README's commands, the built package."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qdiff.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
PACKAGES = ("qdiff", "ddim", "ldm")


def requirements(lines: list[str]) -> dict[str, SpecifierSet]:
    """Name → version range; a package named twice is an error."""
    parsed = [Requirement(line) for line in lines]
    found = {requirement.name: requirement.specifier for requirement in parsed}
    assert len(found) == len(parsed), f"a package is named twice in {lines}"
    return found


# ---- versions ----------------------------------------------------------------------------------------------


def test_environment_yml_states_the_dependencies_of_pyproject() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "qdiff"

    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert "pip" in conda
    assert pip[-1] == "-e ."
    assert requirements(pip[:-1]) == requirements(PROJECT["dependencies"])

    (python,) = [item.partition("=")[2] for item in conda if item.startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0")


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_constraints_pin_torch_inside_the_supported_ranges(python: str) -> None:
    ranges = requirements(PROJECT["dependencies"])
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    chosen = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]

    assert sorted(pin.name for pin in chosen) == ["torch", "torchvision"]
    for pin in chosen:
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert ranges[pin.name].contains(specifier.version), f"{pin} lies outside {ranges[pin.name]}"


def test_changelog_begins_with_the_current_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == __version__


# ---- README ------------------------------------------------------------------------------------------------


def shell_lines(text: str) -> list[str]:
    """The commands in the ```bash blocks, continuation lines joined, comments left out."""
    blocks = re.findall(r"^```(?:bash|sh|shell)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def filled_in(command: str) -> list[str]:
    """The command with its <placeholders> filled in, once for each value that `<4 or 8>` offers."""
    if "<4 or 8>" in command:
        return [filled for bits in ("4", "8") for filled in filled_in(command.replace("<4 or 8>", bits))]
    return [re.sub(r"<[^<>]+>", "placeholder", command)]


SHELL_LINES = shell_lines(README)
SCRIPT_COMMANDS = [filled for line in SHELL_LINES if line.startswith("python scripts/") for filled in filled_in(line)]


def parser_of(script: Path) -> argparse.ArgumentParser:
    """A script's parser, without starting a process: from its module in qdiff.cli, or the script's own."""
    module = re.search(r"from qdiff\.cli\.(\w+) import main", script.read_text())
    if module:
        return importlib.import_module(f"qdiff.cli.{module[1]}").build_parser()
    spec = importlib.util.spec_from_file_location(script.stem, script)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = loaded  # dataclasses look their module up there
    spec.loader.exec_module(loaded)
    return loaded.make_parser()


def test_readme_begins_with_demo_and_test() -> None:
    assert SHELL_LINES[:2] == ["make demo", "make test"]


def test_readme_names_only_targets_that_the_makefile_has() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {line.split()[1] for line in SHELL_LINES if line.startswith("make ")}
    named |= set(re.findall(r"`make ([a-z0-9-]+)", README))
    assert named <= targets


def test_readme_has_the_three_forms_of_the_cifar_command() -> None:
    """Weights only, with activations, calibrating; each with 4 and with 8 bits."""
    cifar = [shlex.split(c) for c in SCRIPT_COMMANDS if "sample_diffusion_ddim.py --config configs/cifar10.yml" in c]
    for bits in ("4", "8"):
        mine = [c for c in cifar if "--weight_bit" in c and c[c.index("--weight_bit") + 1] == bits]
        forms = {("--resume" in c, "--quant_act" in c, "--cali_data_path" in c) for c in mine}
        assert forms >= {(True, False, False), (True, True, False), (False, True, True)}


@pytest.mark.parametrize("command", SCRIPT_COMMANDS)
def test_readme_command_is_understood(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)[1:]
    script = ROOT / words[0]
    assert script.is_file(), f"README names {words[0]}, which does not exist"

    try:
        parser_of(script).parse_args(words[1:])
    except SystemExit:
        pytest.fail(f"{command}\n{capsys.readouterr().err}")

    for option, value in itertools.pairwise(words):
        if option == "--config" and not value.startswith("placeholder/"):
            assert (ROOT / value).is_file(), f"README names {value}, which does not exist"


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))])
def test_links_inside_the_repository_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and "://" not in target]
    missing = [target for target in local if not (ROOT / page).parent.joinpath(target).exists()]
    assert not missing


# ---- docs/formats.md ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4])
def test_reader_in_the_formats_page_reads_packed_weights(bits: int, tmp_path: Path) -> None:
    import torch

    from ddim.config import load_config
    from ddim.unet import UNet
    from qdiff.calibrate import calibrate
    from qdiff.checkpoint import save_packed
    from qdiff.config import CalibrationConfig, QuantConfig
    from qdiff.quant_model import QuantModel

    torch.manual_seed(0)
    unet = UNet.from_config(load_config(ROOT / "configs" / "fashion_mnist.yml"))
    qnn = QuantModel.from_config(unet, QuantConfig(weight_bit=bits, split=True))
    calibrate(qnn, None, CalibrationConfig(), mode="linear")
    save_packed(tmp_path / "ckpt.safetensors", qnn)

    page = (ROOT / "docs" / "formats.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(code, names)
    weights = names["read_weights"](tmp_path / "ckpt.safetensors")

    layers = qnn.layers()
    assert weights.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.equal(torch.from_numpy(weights[name]), layer.baked_weight), name


def test_readers_in_the_formats_page_read_grids_and_scales(tmp_path: Path) -> None:
    import torch

    from ddim.config import load_config
    from ddim.unet import UNet
    from qdiff.checkpoint import save_packed
    from qdiff.config import QuantConfig
    from qdiff.output_scale import OutputScale
    from qdiff.quant_model import QuantModel

    page = (ROOT / "docs" / "formats.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(code, names)
    config = load_config(ROOT / "configs" / "fashion_mnist.yml")
    bundled = ROOT / "models" / "pixel" / "fashion_mnist" / "w4a8-published.safetensors"
    assert len(names["read_activation_grids"](bundled)) > 50
    assert names["read_scale"](bundled, 10, True) == 1

    quant = QuantConfig(4, quant_act=True, timed_ranges="input", timesteps=(1, 50, 900), split_input=True)
    qnn = QuantModel.from_config(UNet.from_config(config), quant)
    qnn.find_weight_grids()
    for quantizer in qnn.act_quantizers().values():
        quantizer.set_grid(torch.rand(quantizer.delta.shape), torch.randint(256, quantizer.delta.shape).float())
    qnn.output_scale = OutputScale((1, 50, 900), (1.0, 1.1, 1.2), (0.9, 1.0, 1.3))
    save_packed(tmp_path / "ckpt.safetensors", qnn)

    grids = names["read_activation_grids"](tmp_path / "ckpt.safetensors")
    assert grids.keys() == qnn.act_quantizers().keys()
    assert len(grids["conv_in.act_quantizer_positive"][0]) == 3
    for name, quantizer in qnn.act_quantizers().items():
        for stored, own in zip(grids[name], (quantizer.delta, quantizer.zero_point), strict=True):
            assert stored.tolist() == own.flatten().tolist(), name
    for act_quant in (False, True):
        for t in (0.0, 1.0, 30.0, 475.0, 999.0):
            expected = qnn.output_scale.at(torch.tensor([t]), act_quant=act_quant).item()
            assert names["read_scale"](tmp_path / "ckpt.safetensors", t, act_quant) == pytest.approx(expected)


# ---- the arrows of docs/architecture.md ----------------------------------------------------------------------

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
LAYERS = re.findall(r"^\| `(qdiff/[\w./]+)` \|", ARCHITECTURE, flags=re.MULTILINE)  # in order, the lowest first

QDIFF_INIT = ROOT / "qdiff" / "__init__.py"  # gathers the public names: above every layer


def test_commands_start_without_what_most_of_them_never_use() -> None:
    """Each takes seconds to import: whoever asks for ``--help``, or typed a wrong flag, should not wait for it."""
    commands = sorted(path.stem for path in (ROOT / "qdiff" / "cli").glob("*.py") if path.stem != "__init__")
    slow = ("torchvision", "transformers", "matplotlib", "pytorch_lightning", "torch_fidelity", "torch._dynamo")
    program = (
        f"import sys; from qdiff.cli import {', '.join(commands)}; print(*(m for m in {slow} if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from package import name`: name may be a module
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(dotted: str) -> int | None:
    """The row of the table that a module of qdiff belongs to."""
    path = dotted.replace(".", "/")
    rows = [i for i, row in enumerate(LAYERS) if f"{path}.py" == row or f"{path}/".startswith(row)]
    return rows[0] if rows else None


def test_architecture_lists_every_module_of_qdiff_and_no_other() -> None:
    assert [row for row in LAYERS if not (ROOT / row).exists()] == []
    there = [str(p.relative_to(ROOT).with_suffix("")) for p in (ROOT / "qdiff").rglob("*.py") if p != QDIFF_INIT]
    assert [name for name in there if layer_of(name.removesuffix("/__init__").replace("/", ".")) is None] == []


@pytest.mark.parametrize("package", ["ddim", "ldm"])
def test_full_precision_packages_do_not_import_qdiff(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert not {name for name in imported_modules(path) if name.split(".")[0] == "qdiff"}, path


def test_qdiff_imports_only_downwards() -> None:
    wrong = []
    for path in (ROOT / "qdiff").rglob("*.py"):
        here = layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        if path == QDIFF_INIT or here is None:
            continue
        for name in imported_modules(path):
            there = layer_of(name) if name.startswith("qdiff.") else None
            if there is not None and there > here:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


# ---- the package -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel is built of, and what must not get into one."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "configs", "scripts", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
    return source


@pytest.fixture(scope="module")
def wheel(wheel_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # In this environment's own setuptools: a build environment would have to be downloaded.
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, "--wheel-dir", folder, wheel_source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_every_module_and_nothing_else(wheel: Path, wheel_source: Path) -> None:
    assert wheel.name.startswith(f"qdiff-{__version__}-py3-none-any")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(p.relative_to(wheel_source)) for package in PACKAGES for p in (wheel_source / package).rglob("*.py")
    } | {f"{package}/py.typed" for package in PACKAGES}
    assert packed == expected


@pytest.mark.skipif("INSTALL_WHEEL" not in os.environ, reason="make test-full installs the wheel, torch and all")
@pytest.mark.timeout(3600)
def test_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Every command starts there, far from the repository, and one does its work as it does here."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*words: object, **changes: str) -> str:
        command = list(map(str, words))
        done = subprocess.run(
            command, cwd=tmp_path, env=environment | changes, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    bin_folder = tmp_path / "venv" / "bin"
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(bin_folder / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    assert Path(run(bin_folder / "python", "-c", "print(__import__('qdiff').__file__)")).is_relative_to(tmp_path)
    for command in PROJECT["scripts"]:
        assert run(bin_folder / command, "--help").startswith("usage: ")

    cifar10 = ["--config", ROOT / "configs" / "cifar10.yml", "--weight_bit", "4"]
    here = run(sys.executable, ROOT / "scripts" / "model_stats.py", *cifar10, PYTHONPATH=str(ROOT))
    assert run(bin_folder / "qdiff-stats", *cifar10) == here

    weights = ROOT / "models" / "pixel" / "fashion_mnist" / "model.safetensors"
    bundled = ["--config", ROOT / "configs" / "fashion_mnist.yml", "--ckpt", weights, "--device", "cpu"]
    run(bin_folder / "qdiff-sample-ddim", *bundled, "--timesteps", 2, "--max_images", 1, "-l", "out")
    assert len(list(tmp_path.glob("out/samples/*/img/000000.png"))) == 1
