"""Flags: what was given, how values are refused, what needs what."""

from __future__ import annotations

import argparse

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff.cli import sample_ldm
from qdiff.cli.flags import Parser, at_least, at_least_or_all, choice_of, device_name, real, whole_numbers
from qdiff.cli.sample_ddim import build_parser

# Flag -> default, as the project's users know them.
DEFAULTS = {
    "--ptq": False,
    "--quant_mode": "qdiff",
    "--weight_bit": 8,
    "--act_bit": 8,
    "--quant_act": False,
    "--a_sym": False,
    "--split": False,
    "--sm_abit": 8,
    "--timed_ranges": "none",
    "--split_input": False,
    "--act_range": "max",
    "--cali_noisy_weight": 1.0,
    "--range_samples": 64,
    "--running_stat": False,
    "--rs_sm_only": False,
    "--tensorboard": False,
    "--correct_scale": False,
    "--correct_mean": False,
    "--no_correct_scale": False,
    "--cali_data_path": None,
    "--cali_st": 1,
    "--cali_n": 1024,
    "--cali_batch_size": 32,
    "--cali_iters": 20000,
    "--cali_iters_a": 5000,
    "--cali_lr": 4e-4,
    "--cali_p": 2.4,
    "--resume": False,
    "--resume_w": False,
    "--cali_ckpt": None,
    "--verbose": False,
    "--seed": 1234,
    "--use_pretrained": False,
    "--ckpt": None,
    "--sample_type": "generalized",
    "--skip_type": "uniform",
    "--timesteps": 1000,
    "--eta": 0.0,
    "--max_images": 50000,
    "--batch_size": None,
    "--device": None,
    "--precision": "full",
    "--compile": False,
}


def test_defaults():
    args = build_parser().parse_args(["--config", "x.yml"])
    for flag, default in DEFAULTS.items():
        assert getattr(args, flag[2:]) == default, flag
    assert args.given == {"config"}


# What the latent command has beside these, and where its defaults are others.
LATENT_DEFAULTS = {
    "--n_samples": 50000,
    "--custom_steps": 50,
    "--eta": 1.0,
    "--batch_size": 10,
    "--vanilla_sample": False,
    "--dpm": False,
    "--class_labels": None,
    "--scale": None,
    "--a_min_max": False,
    "--cond": False,
    "--logdir": "runs",
}
PIXEL_ONLY = (
    "--use_pretrained",
    "--ckpt",
    "--sample_type",
    "--skip_type",
    "--timesteps",
    "--max_images",
    "--act_range",
)


def test_defaults_of_the_latent_command():
    args = sample_ldm.build_parser().parse_args(["-r", "model.ckpt", "--seed", "3"])
    shared = {flag: value for flag, value in DEFAULTS.items() if flag not in (*PIXEL_ONLY, "--seed")}
    for flag, default in (shared | LATENT_DEFAULTS).items():
        assert getattr(args, flag[2:]) == default, flag
    assert not [flag for flag in PIXEL_ONLY if hasattr(args, flag[2:])]
    assert args.given == {"resume_base", "seed"}
    assert args.overrides == []


def test_short_forms_of_the_latent_command():
    words = ["-r", "m.ckpt", "-n", "20", "-c", "200", "-e", "0.5", "-v", "-l", "out", "--seed", "41"]
    args = sample_ldm.build_parser().parse_args(words)
    found = args.resume_base, args.n_samples, args.custom_steps, args.eta, args.vanilla_sample, args.logdir, args.seed
    assert found == ("m.ckpt", 20, 200, 0.5, True, "out", 41)


NAMES = st.lists(st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.tuples(NAMES, st.text(max_size=5)), max_size=4), places=st.lists(st.integers(0, 3)))
def test_words_between_flags_are_overrides_in_their_order(words, places):
    """Wherever they stand; the flags around them keep their values."""
    given_words = [f"{'.'.join(names)}={value}" for names, value in words]
    flags = [["-r", "model.ckpt"], ["--seed", "3"], ["-v"]]
    line = [[] for _ in range(4)]
    for number, word in enumerate(given_words):
        line[sorted((*places, *[3] * len(words))[: len(words)])[number]].append(word)
    argv = [*line[0], *flags[0], *line[1], *flags[1], *line[2], *flags[2], *line[3]]
    args = sample_ldm.build_parser().parse_args(argv)
    assert args.overrides == given_words
    assert (args.resume_base, args.seed, args.vanilla_sample) == ("model.ckpt", 3, True)


@pytest.mark.parametrize("word", ["--model.x=3", "model.x", "=3", "-x=3", "3=4", "two words=3"])
def test_other_words_are_refused(word, capsys):
    with pytest.raises(SystemExit):
        sample_ldm.build_parser().parse_args(["-r", "m.ckpt", "--seed", "3", word])
    assert word in capsys.readouterr().err


def test_words_are_refused_where_there_is_no_config_to_change(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--config", "x.yml", "model.ch=3"])
    assert "model.ch=3" in capsys.readouterr().err


def test_whole_numbers():
    assert whole_numbers("1,5, 207") == (1, 5, 207)
    for text in ("", "1,", "1;2", "-1", "1.5", "a"):
        with pytest.raises(argparse.ArgumentTypeError, match="1,5,207"):
            whole_numbers(text)


def test_short_form_of_logdir():
    assert build_parser().parse_args(["--config", "x.yml", "-l", "out"]).logdir == "out"


def test_given_holds_defaults_that_were_typed():
    args = build_parser().parse_args(["--config", "x.yml", "--weight_bit", "8", "--ptq"])
    assert args.given == {"config", "weight_bit", "ptq"}


def test_no_abbreviations(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--config", "x.yml", "--weight", "8"])
    assert "--weight_bit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("convert", "good", "bad"),
    [
        (choice_of((2, 3, 16)), {"2": 2, "16": 16}, ["4", "two", "2.0", ""]),
        (at_least(1), {"1": 1, "70": 70}, ["0", "-3", "1.5", "x", ""]),
        (at_least_or_all(1), {"1": 1, "all": None}, ["0", "1.5", "ALL", ""]),
        (real(zero=True), {"0": 0.0, "2.5": 2.5}, ["-1", "nan", "inf", "x"]),
        (real(zero=False), {"4e-4": 4e-4}, ["0", "-1", "nan", "inf", "x"]),
    ],
)
def test_converters(convert, good, bad):
    parser = Parser(prog="p")
    parser.add_argument("--x", type=convert)
    for text, value in good.items():
        assert parser.parse_args([f"--x={text}"]).x == value
    for text in bad:
        with pytest.raises(SystemExit) as caught:
            parser.parse_args([f"--x={text}"])
        assert caught.value.code == 2


def test_devices(monkeypatch):
    assert device_name("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_name("cuda") == "cuda"
    assert device_name("cuda:1") == "cuda:1"
    with pytest.raises(Exception, match="this machine has 2"):
        device_name("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Exception, match="--device cpu"):
        device_name("cuda")


def test_help_shows_defaults_and_keeps_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["--help"])
    said = capsys.readouterr().out
    assert caught.value.code == 0
    for words in ("[20000]", "[0.0]", "examples:\n", "calibrated checkpoints:"):
        assert words in said
    for flag in DEFAULTS:
        assert flag in said


FLAG_ERRORS = {
    "--weight_bit 9": ["--weight_bit", "'9'", "2, 3, 4, 5, 6, 7, 8"],
    "--weight_bit 1": ["--weight_bit", "'1'"],
    "--act_bit 12": ["--act_bit", "'12'", "16"],
    "--sm_abit 1": ["--sm_abit", "'1'"],
    "--quant_mode nearest": ["--quant_mode", "nearest", "qdiff", "linear"],
    "--sample_type ddim": ["--sample_type", "generalized", "ddpm_noisy", "dpm_solver"],
    "--skip_type cubic": ["--skip_type", "uniform", "quad"],
    "--timesteps 0": ["--timesteps", "'0'", "at least 1"],
    "--timesteps 1001": ["--timesteps 1001", "100", "1 to 100"],
    "--eta -1": ["--eta", "'-1'"],
    "--eta 1 --sample_type ddpm_noisy": ["--eta 1.0", "--sample_type generalized"],
    "--max_images -1": ["--max_images", "'-1'"],
    "--batch_size 0": ["--batch_size", "'0'"],
    "--seed x": ["--seed", "'x'"],
    "--precision fp8": ["--precision", "fp8", "full", "autocast", "fp16", "bf16"],
    "--precision fp16": ["--precision fp16", "GPU", "bf16"],
    "--wieght_bit 4": ["--wieght_bit", "did you mean --weight_bit?"],
    "--ptq --use_pretrained": ["--use_pretrained", "not allowed with", "--ckpt"],
    "--weight_bit 4": ["--weight_bit 4 needs --ptq"],
    "--split": ["--split needs --ptq"],
    "--tensorboard": ["--tensorboard needs --ptq"],
    "--resume": ["--resume needs --ptq"],
    "--ptq --act_bit 8 --cali_data_path {set}": ["--act_bit 8 needs --quant_act"],
    "--ptq --a_sym --cali_data_path {set}": ["--a_sym needs --quant_act"],
    "--ptq --sm_abit 16 --cali_data_path {set}": ["--sm_abit 16 needs --quant_act"],
    "--ptq --running_stat --cali_data_path {set}": ["--running_stat needs --quant_act"],
    "--timed_ranges all": ["--timed_ranges all needs --ptq"],
    "--ptq --timed_ranges all --cali_data_path {set}": ["--timed_ranges all needs --quant_act"],
    "--ptq --split_input --cali_data_path {set}": ["--split_input needs --quant_act"],
    "--ptq --act_range mse --cali_data_path {set}": ["--act_range mse needs --quant_act"],
    "--ptq --quant_act --timed_ranges some --cali_data_path {set}": ["--timed_ranges", "some", "input"],
    "--ptq --quant_act --timed_ranges all --running_stat --cali_data_path {set}": ["exclude each other"],
    "--ptq --quant_act --range_samples few --cali_data_path {set}": ["--range_samples", "'few'", "'all'"],
    "--ptq --quant_act --range_samples 0 --cali_data_path {set}": ["--range_samples", "'0'", "at least 1"],
    "--correct_scale": ["--correct_scale needs --ptq"],
    "--ptq --quant_mode linear --correct_scale": ["--cali_data_path"],
    "--ptq --correct_scale --resume --cali_ckpt {ckpt}": ["scripts/correct_scale.py", "applied anyway"],
    "--correct_mean": ["--correct_mean needs --ptq"],
    "--ptq --correct_mean --cali_data_path {set}": ["--correct_mean needs --correct_scale"],
    "--ptq --no_correct_scale --cali_data_path {set}": ["--no_correct_scale needs --resume"],
    "--ptq --quant_act --rs_sm_only --cali_data_path {set}": ["--rs_sm_only needs --running_stat"],
    "--ptq --resume_w --cali_ckpt {ckpt} --cali_data_path {set}": ["--resume_w needs --quant_act"],
    "--ptq --resume": ["--resume needs --cali_ckpt"],
    "--ptq --quant_act --resume_w": ["--resume_w needs --cali_ckpt"],
    "--ptq --quant_act --resume --resume_w --cali_ckpt {ckpt}": ["--resume and --resume_w exclude"],
    "--ptq --cali_ckpt {ckpt}": ["--cali_ckpt", "needs --resume"],
    "--ptq": ["--cali_data_path", "make_calibration_data.py", "--resume"],
    "--ptq --quant_act --resume_w --cali_ckpt {ckpt}": ["--cali_data_path"],
    "--ptq --quant_mode linear --quant_act": ["--cali_data_path"],
    "--ptq --cali_st 0 --cali_data_path {set}": ["--cali_st", "'0'", "at least 1"],
    "--ptq --cali_st 6 --cali_n 4 --cali_data_path {set}": ["--cali_st 6", "5 steps"],
    "--ptq --cali_st 5 --cali_n 7 --cali_data_path {set}": ["6 samples", "--cali_n 7"],
    "--ptq --cali_iters -1 --cali_data_path {set}": ["--cali_iters", "'-1'"],
    "--ptq --cali_lr 0 --cali_data_path {set}": ["--cali_lr", "'0'", "above 0"],
    "--ptq --cali_data_path none.pt": ["--cali_data_path none.pt", "no such file"],
    "--ptq --cali_data_path {folder}": ["--cali_data_path", "is a folder"],
    "--ptq --resume --cali_ckpt none.pth": ["--cali_ckpt none.pth", "no such file"],
}


@pytest.mark.parametrize("flags", FLAG_ERRORS)
def test_refused(miniature, tmp_path, failing, flags):
    """Each says flag, value and remedy, and leaves nothing behind."""
    places = {"set": miniature.calibration_set, "ckpt": miniature.ckpt, "folder": miniature.folder}
    failure = failing(*miniature.flags(), "-l", tmp_path / "out", "--max_images", 0, *flags.format(**places).split())
    assert failure.status == 2
    for words in FLAG_ERRORS[flags]:
        assert words in failure.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--confg", "configs/cifar10.yml"], "--confg configs/cifar10.yml (did you mean --config?)"),
        ([], "required: --config"),
    ],
)
def test_a_slip_is_named_before_what_is_missing_for_it(failing, words, said):
    failure = failing(*words)
    assert failure.status == 2
    assert said in failure.message


def test_compiling_without_a_compiler(miniature, tmp_path, failing, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    failure = failing(*miniature.flags(), "-l", tmp_path / "out", "--compile")
    assert failure.status == 2
    assert "--compile needs" in failure.message
    assert "no-such-compiler" in failure.message
    assert "leave it out" in failure.message
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_without_one(miniature, tmp_path, failing):
    failure = failing(*miniature.flags(), "-l", tmp_path / "out", "--device", "cuda")
    assert failure.status == 2
    assert "no CUDA device" in failure.message
    assert "--device cpu" in failure.message


def test_no_weights_named(miniature, tmp_path, failing):
    failure = failing(*miniature.flags(ckpt=False), "-l", tmp_path / "out")
    assert failure.status == 2
    assert "--use_pretrained" in failure.message
    assert "--ckpt" in failure.message
