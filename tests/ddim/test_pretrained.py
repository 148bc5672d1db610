"""Downloads against a local server that misbehaves in every way asked of it; loading of files that do not fit."""

from __future__ import annotations

import hashlib
import http.server
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ddim import pretrained
from ddim.config import load_config
from ddim.pretrained import (
    CheckpointUnavailable,
    PublishedCheckpoint,
    checkpoint_path,
    fetch,
    load_weights,
    read_weights,
)
from ddim.unet import UNet

CONTENT = bytes(range(256)) * 3000  # 768 kB
MD5 = hashlib.md5(CONTENT).hexdigest()
CONFIGS = Path(__file__).resolve().parents[2] / "configs"

Answer = Callable[["Handler", int], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Gives the n-th request to the n-th answer of the server's list, the last one from then on."""

    protocol_version = "HTTP/1.0"  # the connection closes after each answer, so that breaks are seen at once

    def do_GET(self) -> None:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(found[1]) if found else 0
        self.server.starts.append(start)
        answers = self.server.answers
        answers[min(len(self.server.starts), len(answers)) - 1](self, start)

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def whole(handler: Handler, start: int) -> None:
    """A good server: ranges are honoured."""
    if start >= len(CONTENT):
        handler.send(b"", 416, Content_Range=f"bytes */{len(CONTENT)}")
        return
    span = {"Content_Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"} if start else {}
    handler.send(CONTENT[start:], 206 if start else 200, Content_Length=str(len(CONTENT) - start), **span)


def breaks_after(count: int) -> Answer:
    """Promises the rest of the file, honours the range, and hangs up after ``count`` bytes."""

    def answer(handler: Handler, start: int) -> None:
        span = {"Content_Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"} if start else {}
        body = CONTENT[start : start + count]
        handler.send(body, 206 if start else 200, Content_Length=str(len(CONTENT) - start), **span)

    return answer


def ignores_range(handler: Handler, start: int) -> None:
    handler.send(CONTENT, Content_Length=str(len(CONTENT)))


def wrong_file(handler: Handler, start: int) -> None:
    handler.send(b"<html>log in</html>", Content_Length="19")


def promises_more(handler: Handler, start: int) -> None:
    handler.send(CONTENT, Content_Length=str(len(CONTENT) + 1000))


def promises_less(handler: Handler, start: int) -> None:
    handler.send(CONTENT, Content_Length=str(len(CONTENT) - 1000))


def says_no_length(handler: Handler, start: int) -> None:
    handler.send(CONTENT)


def continues_elsewhere(handler: Handler, start: int) -> None:
    if start:
        span = f"bytes {start + 7}-{len(CONTENT) - 1}/{len(CONTENT)}"
        handler.send(CONTENT[start + 7 :], 206, Content_Range=span)
    else:
        whole(handler, start)


def fails(status: int) -> Answer:
    return lambda handler, start: handler.send(b"sorry", status, Content_Length="5")


Serve = Callable[..., PublishedCheckpoint]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """``serve(answer, ...)`` -> an entry whose URL answers so; ``serve.starts`` has the offsets asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.starts, server.answers = [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()

    def start(*answers: Answer) -> PublishedCheckpoint:
        server.answers = list(answers)
        return PublishedCheckpoint("folder/model.ckpt", MD5, f"http://127.0.0.1:{server.server_port}/f")

    start.starts = server.starts
    yield start
    server.shutdown()
    server.server_close()


def get(entry: PublishedCheckpoint) -> Path:
    return fetch(entry, progress=False, pause_s=0)


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "diffusion_models_converted" / "folder").glob("*"))


def test_a_good_download_is_cached_and_not_repeated(serve, tmp_path):
    entry = serve(whole)
    path = get(entry)
    assert path == tmp_path / "diffusion_models_converted" / "folder" / "model.ckpt"
    assert path.read_bytes() == CONTENT
    assert get(entry) == path
    assert serve.starts == [0]
    assert cached(tmp_path) == ["model.ckpt"]


def test_a_broken_download_continues_where_it_ended(serve, tmp_path):
    assert get(serve(breaks_after(300_000), breaks_after(200_000), whole)).read_bytes() == CONTENT
    assert serve.starts == [0, 300_000, 500_000]
    assert cached(tmp_path) == ["model.ckpt"]


def test_the_next_run_continues_too_and_until_then_nothing_is_published(serve, tmp_path):
    with pytest.raises(CheckpointUnavailable, match="broke off"):
        fetch(serve(breaks_after(100_000), breaks_after(0)), progress=False, attempts=2, pause_s=0)
    assert cached(tmp_path) == ["model.ckpt.part"]
    assert get(serve(whole)).read_bytes() == CONTENT
    assert serve.starts == [0, 100_000, 100_000]


def test_a_server_that_ignores_ranges_starts_over(serve):
    assert get(serve(breaks_after(300_000), ignores_range)).read_bytes() == CONTENT
    assert serve.starts == [0, 300_000]


def test_a_server_that_continues_at_the_wrong_place_is_asked_afresh(serve):
    assert get(serve(breaks_after(300_000), continues_elsewhere)).read_bytes() == CONTENT
    assert serve.starts == [0, 300_000, 0]


def test_a_wrong_file_is_never_used(serve, tmp_path):
    with pytest.raises(CheckpointUnavailable, match="another file: 19 bytes"):
        get(serve(wrong_file))
    assert cached(tmp_path) == []


def test_a_wrong_file_is_followed_by_another_attempt(serve):
    assert get(serve(wrong_file, whole)).read_bytes() == CONTENT


def test_a_length_said_too_large_does_not_spoil_a_right_file(serve):
    assert get(serve(promises_more)).read_bytes() == CONTENT


def test_a_length_said_too_small_is_noticed(serve, tmp_path):
    with pytest.raises(CheckpointUnavailable, match="another file"):
        get(serve(promises_less))
    assert cached(tmp_path) == []


def test_a_server_may_keep_the_length_to_itself(serve):
    assert get(serve(says_no_length)).read_bytes() == CONTENT


def test_a_wrong_part_left_behind_is_started_over(serve, tmp_path):
    part = tmp_path / "diffusion_models_converted" / "folder" / "model.ckpt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * len(CONTENT))
    assert get(serve(whole)).read_bytes() == CONTENT
    assert serve.starts == [len(CONTENT), 0]


def test_a_damaged_cached_file_is_reported_and_replaced(serve, capsys):
    entry = serve(whole)
    path = get(entry)
    path.write_bytes(CONTENT[:-1])
    assert get(entry).read_bytes() == CONTENT
    assert f"{path} is damaged" in capsys.readouterr().out


def test_server_errors_are_retried_and_refusals_are_not(serve):
    assert get(serve(fails(503), whole)).read_bytes() == CONTENT
    assert serve.starts == [0, 0]


def test_a_refusal_ends_at_once(serve):
    with pytest.raises(CheckpointUnavailable, match="answered 404"):
        get(serve(fails(404), whole))
    assert serve.starts == [0]


def test_without_network_one_error_says_all(serve, tmp_path):
    entry = PublishedCheckpoint("folder/model.ckpt", MD5, "http://127.0.0.1:9/f")  # the discard port: refused
    with pytest.raises(CheckpointUnavailable) as error:
        get(entry)
    place = tmp_path / "diffusion_models_converted" / "folder" / "model.ckpt"
    for part in (f"put the file at {place}", MD5, "--ckpt", "no connection"):
        assert part in str(error.value)


def test_an_unwritable_cache_is_named(serve, tmp_path):
    (tmp_path / "diffusion_models_converted").write_text("a file in the way")
    with pytest.raises(CheckpointUnavailable, match="cannot write"):
        get(serve(whole))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "ema_diffusion_cifar10_model/model-790000.ckpt"),
        ("bedroom", "ema_diffusion_lsun_bedroom_model/model-2388000.ckpt"),
        ("church", "ema_diffusion_lsun_church_model/model-4432000.ckpt"),
        ("cat", "ema_diffusion_lsun_cat_model/model-1761000.ckpt"),
    ],
)
def test_each_config_has_its_checkpoint(name, file, monkeypatch):
    asked = []
    monkeypatch.setattr(pretrained, "fetch", lambda entry, progress: asked.append(entry))
    checkpoint_path(load_config(CONFIGS / f"{name}.yml"))
    assert asked[0].file == file
    assert re.fullmatch(r"[0-9a-f]{32}", asked[0].md5)


def test_a_data_set_without_published_weights_names_those_that_have(tmp_path):
    config = load_config(CONFIGS / "cifar10.yml")
    config.data.dataset = "FOLDER"
    with pytest.raises(ValueError, match=r"CIFAR10, LSUN/bedroom.*--ckpt"):
        checkpoint_path(config)


def test_the_bundled_model_is_found_or_its_absence_named(tmp_path, monkeypatch):
    config = load_config(CONFIGS / "cifar10.yml")
    config.data.dataset = "FashionMNIST"
    monkeypatch.setitem(pretrained.BUNDLED, "FashionMNIST", tmp_path / "model.safetensors")
    with pytest.raises(CheckpointUnavailable, match="missing from this checkout"):
        checkpoint_path(config)
    (tmp_path / "model.safetensors").touch()
    assert checkpoint_path(config) == tmp_path / "model.safetensors"


# ---- loading


def tiny(**changes: object) -> UNet:
    numbers = {"image_size": 8, "in_channels": 1, "out_ch": 1, "ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1}
    return UNet(**{**numbers, "attn_resolutions": (4,), **changes})


@pytest.fixture(scope="module")
def model() -> UNet:
    torch.manual_seed(0)
    return tiny()


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["m.ckpt", "m.pth", "m.pt", "m.safetensors", "wrapped.ckpt"])
def test_every_form_of_file_loads(model, name, tmp_path):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": model.state_dict(), "step": 3} if "wrapped" in name else model.state_dict(), path)
    other = tiny()
    load_weights(path, other)
    assert same(other, model)


def test_half_precision_is_widened(model, tmp_path):
    save_file({name: t.half() for name, t in model.state_dict().items()}, tmp_path / "m.safetensors")
    for name, tensor in read_weights(tmp_path / "m.safetensors").items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].half().float())


class Planted:
    """Unpickling this would create a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_with_code_in_it_is_refused_and_not_run(model, legacy, tmp_path):
    trap = tmp_path / "ran"
    content = {**model.state_dict(), "extra": Planted(trap)}
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="other than tensors and plain containers"):
        load_weights(tmp_path / "m.ckpt", tiny())
    assert not trap.exists()


def test_a_bare_pickle_with_code_is_refused_too(tmp_path):
    (tmp_path / "m.pt").write_bytes(pickle.dumps(Planted(tmp_path / "ran"), protocol=2))
    with pytest.raises(ValueError, match=r"m\.pt"):
        load_weights(tmp_path / "m.pt", tiny())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["m.ckpt", "m.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files_are_named(model, name, share, tmp_path):
    path = tmp_path / name
    save_file(model.state_dict(), path) if path.suffix == ".safetensors" else torch.save(model.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=f"{name}: truncated"):
        load_weights(path, tiny())


def test_other_unusable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint file"):
        load_weights(tmp_path / "none.ckpt", tiny())
    (tmp_path / "m.bin").touch()
    with pytest.raises(ValueError, match="ends in"):
        load_weights(tmp_path / "m.bin", tiny())
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no state dict"):
        load_weights(tmp_path / "list.pt", tiny())


def test_a_difference_is_told_in_a_sentence_and_nothing_is_loaded(model, tmp_path):
    state = dict(model.state_dict())
    state["surplus.weight"] = torch.zeros(1)
    del state["conv_out.bias"]
    torch.save(state, tmp_path / "m.pt")
    other = tiny()
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 tensors missing from the file \(conv_out.bias\)") as error:
        load_weights(tmp_path / "m.pt", other, "configs/x.yml")
    assert "1 tensors not in the model (surplus.weight)" in str(error.value)
    assert "configs/x.yml" in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_another_architecture_is_told_by_its_numbers(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "m.pt")
    with pytest.raises(ValueError, match="does not fit") as error:
        load_weights(tmp_path / "m.pt", tiny(ch=64, in_channels=3), "configs/x.yml")
    message = str(error.value)
    assert "the file's UNet has 32 channels (model.ch), 1 image channels" in message
    assert "the config's 64 channels (model.ch), 3 image channels" in message
    assert len(message) < 1000


def test_a_quantized_checkpoint_is_sent_to_its_own_flag(model, tmp_path):
    torch.save({"model.conv_in.weight_quantizer.delta": torch.zeros(1)}, tmp_path / "q.pth")
    with pytest.raises(ValueError, match="--cali_ckpt"):
        load_weights(tmp_path / "q.pth", tiny())
