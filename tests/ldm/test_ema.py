from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.modules.ema import EMA, EMA_COPY, buffer_names, has_ema, with_ema_weights


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2, bias=False)))
    model[0].bias.requires_grad_(False)
    return model


def test_published_names() -> None:
    names = ["diffusion_model.time_embed.0.weight", "diffusion_model.input_blocks.1.0.in_layers.2.bias"]
    assert list(buffer_names(names).values()) == [
        "diffusion_modeltime_embed0weight",
        "diffusion_modelinput_blocks10in_layers2bias",
    ]


@pytest.mark.parametrize("names", [["a.1.0", "a.10"], ["decay"]])
def test_two_averages_of_one_name_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="would both be called"):
        buffer_names(names)


def test_state_holds_the_trainable_parameters_and_the_counters() -> None:
    assert set(EMA(network()).state_dict()) == {"decay", "num_updates", "0weight", "10weight"}


def test_updates_warm_up_to_the_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, decay=0.5)
    expected = 0.0
    for n in range(1, 20):
        nn.init.constant_(model.weight, float(n))
        ema.update(model)
        d = min(0.5, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * n
    assert int(ema.num_updates) == 19
    assert float(ema.weight) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="decay"):
        EMA(model, decay=1.5)


def test_averages_take_the_parameters_place_and_give_it_back() -> None:
    model = network()
    ema = EMA(model)
    average, weight = ema.get_buffer("0weight").clone(), model[0].weight
    with torch.no_grad():
        weight.add_(1)
    own = weight.detach().clone()

    def sample_and_fail() -> None:
        with ema.applied_to(model):
            assert torch.equal(model[0].weight, average)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        sample_and_fail()
    assert model[0].weight is weight
    assert torch.equal(weight, own)


def test_averages_of_a_state_dict_replace_its_parameters() -> None:
    model = network().requires_grad_(True)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()} | {"betas": torch.ones(1)}
    ema = EMA(model)
    with torch.no_grad():
        for average in ema.buffers():
            average += 1
    file = state | {EMA_COPY + name: tensor for name, tensor in ema.state_dict().items()}
    assert has_ema(file)
    assert not has_ema(state)

    got = with_ema_weights(file | {"model_ema.unknown": torch.ones(1)})
    assert got.keys() == state.keys() | {"model_ema.unknown"}
    for name in model.state_dict():
        assert got[f"model.{name}"] is file[EMA_COPY + name.replace(".", "")]
    assert got["betas"] is state["betas"]

    del file["model_ema.10weight"]
    with pytest.raises(ValueError, match=r"1 parameters have no moving average, as model\.1\.0\.weight"):
        with_ema_weights(file)
