from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ddim.config import ConfigError
from ddim.unet import AttnBlock as PlainAttention
from ldm.models.autoencoder import (
    POSITIONS_AT_ONCE,
    AutoencoderKL,
    DiagonalGaussian,
    IdentityFirstStage,
    VectorQuantizer,
    VQModelInterface,
)
from ldm.modules.diffusionmodules.model import AttnBlock, Encoder

DDCONFIG: dict[str, Any] = {
    "z_channels": 3,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.0,
}


def test_attention_without_its_map_is_attention() -> None:
    torch.manual_seed(0)
    ours, plain = AttnBlock(32), PlainAttention(32)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 32, 5, 7)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)


def test_levels_attend_where_the_resolution_says() -> None:
    encoder = Encoder(**DDCONFIG)
    assert [len(level.attn) for level in encoder.down] == [0, 1]
    assert isinstance(encoder.down[1].downsample, nn.Identity)


@pytest.mark.parametrize("cls", [AutoencoderKL, VQModelInterface])
def test_sizes_other_than_the_trained_one_pass(cls: type) -> None:
    codes = {"n_embed": 16} if cls is VQModelInterface else {}
    model = cls(ddconfig=DDCONFIG, embed_dim=2, lossconfig={"target": "os.system"}, ckpt_path="gone.ckpt", **codes)
    assert model.downsampling == 2
    encoded = model.encode(torch.randn(1, 3, 8, 24))
    latent = encoded.mean if cls is AutoencoderKL else encoded
    assert latent.shape == (1, 2, 4, 12)
    assert model.decode(latent).shape == (1, 3, 8, 24)


def test_wrong_keywords_are_named() -> None:
    with pytest.raises(ConfigError, match="'remap'"):
        VQModelInterface(ddconfig=DDCONFIG, embed_dim=3, n_embed=8, remap="file")
    with pytest.raises(ConfigError, match="'attn_type'"):
        AutoencoderKL(ddconfig={**DDCONFIG, "attn_type": "linear"}, embed_dim=3)
    with pytest.raises(ConfigError, match="double_z must be True"):
        AutoencoderKL(ddconfig={**DDCONFIG, "double_z": False}, embed_dim=3)
    with pytest.raises(ConfigError, match="'vq'"):
        IdentityFirstStage(vq=True)


def test_identity_changes_nothing() -> None:
    x = torch.randn(1, 3, 4, 4)
    stage = IdentityFirstStage(vq_interface=True)
    assert torch.equal(stage.decode(stage.encode(x)), x)


def test_codes_are_the_nearest_across_pieces() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(50, 3)
    side = int(POSITIONS_AT_ONCE**0.5) + 1
    latent = torch.randn(2, 3, side, side)
    distances = (latent[:, None] - quantizer.embedding.weight[None, :, :, None, None]).square().sum(2)
    assert torch.equal(quantizer.indices(latent), distances.argmin(1))
    codes = quantizer(latent)
    assert torch.equal(quantizer(codes), codes)


def test_posterior_agrees_with_torch_distributions() -> None:
    torch.manual_seed(0)
    posterior = DiagonalGaussian.from_moments(torch.randn(2, 6, 4, 4))
    normal = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(normal, standard).flatten(1).sum(1)
    torch.testing.assert_close(posterior.kl(), expected)
    noise = torch.randn_like(posterior.mean)
    torch.testing.assert_close(posterior.sample(noise), normal.mean + normal.stddev * noise)
    wild = DiagonalGaussian.from_moments(torch.full((1, 2, 1, 1), 1000.0))
    assert torch.isfinite(wild.sample(torch.ones(1, 1, 1, 1))).all()
