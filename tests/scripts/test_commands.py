"""The commands that an installation has: where they lead, and how shells complete them."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qdiff.cli.flags import typed_command

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def run(name: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """As the installed command does."""
    module, _, function = COMMANDS[name].partition(":")
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{name}", *words])
    with pytest.raises(SystemExit) as caught:
        getattr(importlib.import_module(module), function)()
    return caught.value.code


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_its_flags_to_shells(name: str, monkeypatch, capsys, tmp_path) -> None:
    for shell in ("bash", "zsh"):
        assert run(name, "--print-completion", shell, monkeypatch=monkeypatch) == 0
        script = capsys.readouterr().out
        assert name in script
        assert "--seed" in script or name == "qdiff-stats"
        if program := shutil.which(shell):
            path = tmp_path / shell
            path.write_text(script)
            subprocess.run([program, "-n", str(path)], check=True)
    assert run(name, "--help", monkeypatch=monkeypatch) == 0
    assert f"usage: {name}" in capsys.readouterr().out


def test_files_are_completed(monkeypatch, capsys) -> None:
    run("qdiff-sample-ddim", "--print-completion", "bash", monkeypatch=monkeypatch)
    script = capsys.readouterr().out
    assert "__cali_ckpt_COMPGEN=_shtab_compgen_files" in script
    assert "__logdir_COMPGEN=_shtab_compgen_dirs" in script


def test_what_was_typed(monkeypatch) -> None:
    assert typed_command("txt2img.py") == ["python", "scripts/txt2img.py"]
    monkeypatch.setattr(sys, "argv", ["/opt/bin/qdiff-txt2img", "--seed", "1"])
    assert typed_command("txt2img.py") == ["qdiff-txt2img"]


def test_a_clone_has_no_such_flag(monkeypatch, capsys) -> None:
    """Completion belongs to a command's name, which a script that python runs has not."""
    monkeypatch.setattr(sys, "argv", ["scripts/txt2img.py", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module("qdiff.cli.txt2img").main()
    assert "--print-completion" not in capsys.readouterr().out
