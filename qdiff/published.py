"""The published names for reconstructing one layer or block of a wrapped UNet, over the functions used here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qdiff.capture import UnitData, observe_unit
from qdiff.config import CalibrationConfig
from qdiff.quant_model import QuantModel, Unit
from qdiff.reconstruction import UnitReport, reconstruct_activations, reconstruct_weights


def block_reconstruction(
    model: QuantModel,
    block: nn.Module,
    cali_data: tuple[Tensor, ...],
    batch_size: int = 32,
    iters: int = 20_000,
    weight: float = 0.01,
    opt_mode: str = "mse",
    asym: bool = True,
    include_act_func: bool = True,
    b_range: tuple[float, float] = (20, 2),
    warmup: float = 0.2,
    act_quant: bool = False,
    lr: float = 4e-4,
    p: float = 2.4,
    seed: int = 1234,
    **_: Any,
) -> UnitReport:
    """Reconstruct one unit of ``model``: the weights, or with ``act_quant`` the step sizes of its activations.

    Weight grids (:meth:`QuantModel.find_weight_grids`) or activation ranges must be set. The whole calibration is
    :func:`qdiff.calibrate`, which also passes the data on from unit to unit.

    Args:
        block: a unit's module: one of ``model.units()``.
        cali_data: the network's inputs: noisy images, timesteps and, where there is one, context.
        weight: of the rounding regulariser; ``b_range``, ``warmup``: the course of its exponent.
        lr, p: rate of the step sizes and exponent of their loss.
        opt_mode: only ``mse``.
        asym: the unit's input comes from the quantized network, the only way here.
        include_act_func: accepted; blocks always include what lies between their layers.

    Raises:
        ValueError: ``block`` is not a unit of ``model``, or an option has a value other than those above.
    """
    if opt_mode != "mse" or not asym:
        raise ValueError("only opt_mode='mse' with asym=True, the options of the published scripts, is supported")
    unit = unit_of(model, block)
    config = CalibrationConfig(
        iters=iters,
        iters_a=iters,
        batch_size=batch_size,
        lr=lr,
        p=p,
        round_weight=weight,
        beta_start=b_range[0],
        beta_end=b_range[1],
        warmup=warmup,
        seed=seed,
    )
    with torch.no_grad():
        with model.quant_state(True, act_quant):
            inputs = observe_unit(model, unit, cali_data, batch_size)[0]
        with model.quant_state(False, False):
            target = observe_unit(model, unit, cali_data, batch_size)[1]
    reconstruct = reconstruct_activations if act_quant else reconstruct_weights
    return reconstruct(unit, UnitData(inputs, target, t=cali_data[1]), config, seed=seed)


layer_reconstruction = block_reconstruction


def unit_of(model: QuantModel, module: nn.Module) -> Unit:
    """The unit whose module this is.

    Raises:
        ValueError: it is none.
    """
    for unit in model.units():
        if unit.module is module:
            return unit
    raise ValueError(f"this {type(module).__name__} is not a unit of the model; model.units() lists them")
