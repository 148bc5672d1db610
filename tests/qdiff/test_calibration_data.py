"""Making, saving, selecting and refusing calibration sets."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qdiff.calibration_data import (
    CalibrationSetError,
    get_train_samples,
    load_calibration_set,
    make_calibration_set,
    save_calibration_set,
    selected_steps,
)

SHAPE = (3, 4, 4)


def some_set(steps: int = 6, samples: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    draws = torch.Generator().manual_seed(0)
    return {
        "xs": [torch.randn(samples, *SHAPE, generator=draws).to(dtype) for _ in range(steps)],
        "ts": [torch.full((samples,), float(100 * (steps - i))) for i in range(steps)],
    }


def load(path, cali_st=2, cali_n=3, **changes):
    return load_calibration_set(path, cali_st=cali_st, cali_n=cali_n, **{"image_shape": SHAPE, **changes})


@pytest.fixture
def saved(tmp_path):
    """Saves content and returns its path."""

    def save(content, **options):
        path = tmp_path / "set.pt"
        torch.save(content, path, **options)
        return path

    return save


def test_selection_is_every_stride_th_step(saved):
    content = some_set()
    chosen = load(saved(content), cali_st=2, cali_n=3)
    assert chosen.steps == (0, 3)
    assert chosen.trajectory == 6
    assert torch.equal(chosen.x, torch.cat([content["xs"][0][:3], content["xs"][3][:3]]))
    assert torch.equal(chosen.t, torch.tensor([600.0] * 3 + [300.0] * 3))
    assert len(chosen) == 6


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "old"])
def test_half_precision_and_integer_timesteps_become_float32(saved, options):
    content = some_set(dtype=torch.float16)
    content["ts"] = [t.long() for t in content["ts"]]
    chosen = load(saved(content, **options))
    assert chosen.x.dtype == chosen.t.dtype == torch.float32
    assert torch.equal(chosen.x[:3].half(), content["xs"][0][:3])


def test_loaded_samples_do_not_hold_on_to_the_file(saved):
    path = saved(some_set())
    chosen = load(path)
    before = chosen.x.clone()
    with path.open("r+b") as file:
        file.write(b"\0" * os.path.getsize(path))
    assert torch.equal(chosen.x, before)


def test_dict_with_one_step_gives_its_first(saved):
    content = some_set()
    chosen = load(saved(content), cali_st=1)
    assert torch.equal(chosen.x, content["xs"][0][:3])
    assert torch.equal(chosen.t, content["ts"][0][:3])


def test_conditional_selection_is_taken_twice(saved):
    content = some_set()
    content["cs"] = [torch.full((5, 2, 2), float(i)) for i in range(6)]
    content["ucs"] = [-c for c in content["cs"]]
    chosen = load(saved(content), conditional=True)
    assert len(chosen) == 12
    assert torch.equal(chosen.x[:6], chosen.x[6:])
    assert torch.equal(chosen.context[:6], -chosen.context[6:])


def changed(**changes):
    return {**some_set(), **changes}


def with_value(value: float, step: int = 3) -> dict[str, list[Tensor]]:
    content = some_set()
    content["xs"][step][1, 0, 0, 0] = value
    return content


REFUSED = {
    "tensor": (torch.zeros(5, *SHAPE), {}, ["one tensor", "--cali_st 1"]),
    "list": ([1, 2], {}, ["list", "xs, ts"]),
    "no ts": ({"xs": []}, {}, ["no 'ts'"]),
    "xs is a number": (changed(xs=3), {}, ["'xs'", "int"]),
    "lengths differ": (changed(ts=[torch.zeros(5)]), {}, ["6 steps", "'ts' has 1"]),
    "empty": ({"xs": [], "ts": []}, {}, ["0 steps"]),
    "cali_st 0": (some_set(), {"cali_st": 0}, ["--cali_st 0"]),
    "cali_st too large": (some_set(), {"cali_st": 7}, ["--cali_st 7", "6 steps"]),
    "too few samples": (some_set(), {"cali_n": 6}, ["5 samples", "--cali_n 6"]),
    "too few timesteps": (changed(ts=[torch.zeros(2)] * 6), {}, ["'ts'", "2 samples", "--cali_n 3"]),
    "shape": (some_set(), {"image_shape": (1, 4, 4)}, ["5x3x4x4", "Nx1x4x4"]),
    "no tensor inside": (changed(xs=["a"] * 6), {}, ["str"]),
    "ts of strings": (changed(ts=[["a"] * 5] * 6), {}, ["'ts'", "list"]),
    "ts with two axes": (changed(ts=[torch.zeros(5, 1)] * 6), {}, ["'ts' has 2 axes"]),
    "nan": (with_value(float("nan")), {}, ["step 3", "NaN"]),
    "inf": (with_value(float("inf")), {}, ["step 3", "infinite"]),
    "plain tensor for a conditional model": (
        torch.zeros(5, *SHAPE),
        {"cali_st": 1, "conditional": True},
        ["cs and ucs"],
    ),
    "conditional without embeddings": (some_set(), {"conditional": True}, ["no 'cs'"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(saved, name):
    content, options, words = REFUSED[name]
    path = saved(content)
    with pytest.raises(CalibrationSetError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert str(path) in message
    for word in words:
        assert word in message


def test_values_that_are_not_taken_may_be_anything(saved):
    assert len(load(saved(with_value(float("nan"), step=1)))) == 6


def test_missing_file_names_the_script_that_makes_one(tmp_path):
    with pytest.raises(CalibrationSetError, match="make_calibration_data"):
        load(tmp_path / "none.pt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "old"])
def test_truncated_file(saved, share, options):
    path = saved(some_set(), **options)
    os.truncate(path, int(share * os.path.getsize(path)))
    with pytest.raises(CalibrationSetError, match=r"damaged|truncated"):
        load(path)


def test_other_files(tmp_path):
    path = tmp_path / "set.pt"
    path.write_bytes(b"not a calibration set at all")
    with pytest.raises(CalibrationSetError, match=r"not a file written by torch\.save"):
        load(path)


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


def test_code_in_the_file_is_not_run(saved, tmp_path):
    path = saved({"xs": [Bomb(tmp_path / "touched")], "ts": []})
    with pytest.raises(CalibrationSetError, match="refused"):
        load(path)
    assert not (tmp_path / "touched").exists()


def test_published_interface_takes_the_sampler_steps_from_either_place():
    args = SimpleNamespace(cali_n=2, cali_st=3, custom_steps=6, cond=False)
    xs, ts = get_train_samples(args, some_set())
    assert xs.shape == (6, *SHAPE)
    assert ts.tolist() == [600.0, 600.0, 400.0, 400.0, 200.0, 200.0]
    with pytest.raises(CalibrationSetError, match="7 of the sampler"):
        get_train_samples(args, some_set(), 7)


def fake_sampler(steps: int):
    """A sampler whose input at step k for image i is 10 i + k."""

    def sample(indices, on_step):
        x = torch.tensor([10.0 * i for i in indices]).reshape(-1, 1, 1, 1)
        for k in range(steps):
            on_step(k, 100 - k, x)
            x += 1  # in place: what was recorded must not change with it

    return sample


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_recording_does_not_depend_on_the_batch_size(batch_size):
    done = []
    content = make_calibration_set(fake_sampler(4), n_samples=5, n_steps=4, batch_size=batch_size, progress=done.append)
    assert [x.flatten().tolist() for x in content["xs"]] == [[10.0 * i + k for i in range(5)] for k in range(4)]
    assert [t.tolist() for t in content["ts"]] == [[100.0 - k] * 5 for k in range(4)]
    assert sum(done) == 5


@pytest.mark.parametrize("n_steps", [5, 20, 50, 51, 100, 101])
@pytest.mark.parametrize("cali_st", [1, 2, 5])
def test_a_thinned_set_gives_the_selection_of_the_whole(tmp_path, n_steps, cali_st):
    loaded = []
    for keep in (None, cali_st):
        content = make_calibration_set(
            fake_sampler(n_steps), n_samples=2, n_steps=n_steps, batch_size=2, cali_st=keep, half=True
        )
        save_calibration_set(tmp_path / "set.pt", content)
        loaded.append(load(tmp_path / "set.pt", cali_st, 2, image_shape=(1, 1, 1)))
    whole, thinned = loaded
    assert thinned.trajectory == len(selected_steps(n_steps, cali_st))
    assert torch.equal(whole.x, thinned.x)
    assert torch.equal(whole.t, thinned.t)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"n_samples": 0}, "n_samples=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"n_steps": 3}, "4 model calls, 3"),
        ({"cali_st": 5}, "cali_st=5"),
        ({"cali_st": 0}, "cali_st=0"),
    ],
)
def test_impossible_recordings(changes, word):
    options = {"n_samples": 2, "n_steps": 4, "batch_size": 2, **changes}
    with pytest.raises(ValueError, match=word):
        make_calibration_set(fake_sampler(4), **options)


def test_a_failed_write_leaves_the_earlier_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "set.pt"
    save_calibration_set(path, some_set())
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*set\.pt"):
        save_calibration_set(path, some_set(steps=3))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
