"""scripts/inspect_model.py: the page, from models of both kinds; opened in a browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qdiff.cli.inspect_model import main
from qdiff.cli.sample_ddim import main as sample_ddim

from ..cases import thorough_but
from .conftest import Miniature

QUICK = ["--cali_st", "2", "--cali_n", "3", "--trajectories", "2", "--sensitivity_n", "1"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
SECTIONS = [
    "Ranges of activations by timestep",
    "Shortcuts over two features",
    "One layer quantized at a time",
    "Errors along the trajectory",
    "All layers",
]


def headings(page: Path) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page.read_text())


@pytest.fixture(scope="module")
def page(miniature: Miniature, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rounded to nearest, inputs made on the spot."""
    out = tmp_path_factory.mktemp("page") / "page.html"
    flags = ["--weight_bit", "4", "--quant_act", "--split", "--out", str(out)]
    assert main([*miniature.flags(), *QUICK, *flags]) == 0
    return out


def test_page_has_all_parts_and_needs_no_other_file(page: Path) -> None:
    text = page.read_text()
    assert headings(page) == SECTIONS
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 7
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for layer in ("conv_in", "up.1.block.0.nin_shortcut", "mid.attn_1 (products)"):
        assert f"<td>{layer}</td>" in text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_browser_shows_every_picture_and_nothing_sticks_out(page: Path, tmp_path: Path) -> None:
    look = (
        "<script>onload = () => { document.body.dataset.seen = JSON.stringify({"
        "pictures: [...document.images].map(i => i.naturalWidth > 400 && i.width > 400),"
        "sticksOut: document.documentElement.scrollWidth > innerWidth}) }</script>"
    )
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</body>", f"{look}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [BROWSER, *flags, "--window-size=1150,900", "--virtual-time-budget=5000", "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    seen = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert seen is not None
    assert seen[1].replace("&quot;", '"') == '{"pictures":[' + ",".join(["true"] * 7) + '],"sticksOut":false}'


def test_calibrated_run_tells_its_losses_too(miniature: Miniature, tmp_path: Path) -> None:
    quant = ["--ptq", "--weight_bit", "4", "--quant_act", "--split"]
    sample_ddim([*miniature.flags(), *miniature.calibration_flags(), *quant, "--max_images", "1", "-l", str(tmp_path)])
    (folder,) = (tmp_path / "samples").iterdir()
    out = tmp_path / "page.html"
    data = ["--cali_data_path", str(miniature.calibration_set)]
    packed = [*miniature.flags(), *QUICK, "--cali_ckpt", str(folder / "ckpt.safetensors")]
    assert main([*packed, *data, "--out", str(out)]) == 0
    assert headings(out) == [*SECTIONS[:-1], "What learning made of each unit", SECTIONS[-1]]
    assert "weights 4, activations 8" in out.read_text()

    published = [*miniature.flags(), *QUICK, "--cali_ckpt", str(folder / "ckpt.pth"), *quant[1:]]
    assert main([*published, "--out", str(out), "--force"]) == 0


@pytest.mark.parametrize("kind", thorough_but(["classes"], ["beds", "churches", "classes"]))
def test_latent_models_in_the_same_way(kind: str, latent, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    model = ["-r", str(latent(kind).ckpt), "-c", "4", "--device", "cpu", "--weight_bit", "4", "--quant_act", "--split"]
    assert main([*model, *QUICK, "--out", str(out)]) == 0
    assert headings(out) == SECTIONS
    assert "skip_connection" in out.read_text()


def test_wrong_input_is_one_line(miniature: Miniature, tmp_path: Path, failing) -> None:
    def said(*more: str) -> str:
        failure = failing(*miniature.flags(), *more, main=main)
        assert failure.status == 2
        return failure.message

    out = ["--out", str(tmp_path / "page.html")]
    (tmp_path / "there.html").touch()
    (tmp_path / "run.log").write_text("nothing was learned\n")
    assert "--force replaces it" in said("--out", str(tmp_path / "there.html"))
    assert "there is no folder" in said("--out", str(tmp_path / "no" / "page.html"))
    assert "takes 2 samples" in said(*out, "--cali_n", "1")
    assert "the sampler makes 5 steps" in said(*out, "--cali_st", "6")
    assert "--act_bit needs --quant_act" in said(*out, "--act_bit", "4")
    assert "no such file" in said(*out, "--cali_ckpt", "nowhere.pth")
    assert "tells of no unit" in said(*out, *QUICK, "--run_log", str(tmp_path / "run.log"))
    assert "goes with -r" in said(*out, "--scale", "2")
