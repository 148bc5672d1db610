"""A UNet whose layers are quantized, and the units in which it is calibrated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qdiff.adapters import Stage, StagedNetwork, find_adapter
from qdiff.attention import UNQUANTIZED_MAP
from qdiff.clock import Clock
from qdiff.config import QuantConfig, QuantizerConfig, TimedRanges
from qdiff.output_scale import OutputScale
from qdiff.quant_block import BaseQuantBlock
from qdiff.quant_layer import QUANTIZABLE, QuantModule, SignedInputQuantModule, SplitQuantModule
from qdiff.quantizers import AdaRoundQuantizer, TimedQuantizer, UniformAffineQuantizer


@dataclass(frozen=True)
class Unit:
    """What is reconstructed at once: a residual, attention or transformer block, or a single remaining layer.

    Attributes:
        path: of the module in the UNet, as in checkpoints but for the leading ``model.``.
        stage: the step of the UNet's forward pass in which it runs.
        clock: the network's. Who runs the unit alone sets it to the timesteps of the batch: ``unit.clock.set(t)``.
        upsampler: what enlarges a feature map and ends in the module, a single layer then.
    """

    path: str
    module: QuantModule | BaseQuantBlock
    stage: Stage
    clock: Clock = field(default_factory=Clock)
    upsampler: nn.Module | None = None

    @property
    def entry(self) -> nn.Module:
        """What is run to reconstruct the unit, and where its inputs are collected: before they are enlarged they take a
        quarter.
        """
        return self.module if self.upsampler is None else self.upsampler

    @property
    def kind(self) -> str:
        return "layer" if isinstance(self.module, QuantModule) else self.module.kind

    def layers(self) -> list[QuantModule]:
        return [module for module in self.module.modules() if isinstance(module, QuantModule)]

    def act_quantizers(self) -> list[UniformAffineQuantizer]:
        """Every activation quantizer of the unit, those of attention products included."""
        quantizers = [quantizer for layer in self.layers() for quantizer in layer.act_quantizers()]
        for block in self.module.modules():
            if isinstance(block, BaseQuantBlock):
                quantizers += block.block_act_quantizers()
        return quantizers

    def learnable_act_quantizers(self) -> list[UniformAffineQuantizer]:
        """Those whose step sizes are learned: all but softmax maps' in 16 bits, which stand for no quantization.

        Such a step is a fraction of Adam's, whose first one makes another grid of it.
        """
        maps = {
            id(block.attention_quantizers()["w"])
            for block in self.module.modules()
            if isinstance(block, BaseQuantBlock) and block.attention_quantizers()
        }
        return [q for q in self.act_quantizers() if id(q) not in maps or q.config.n_bits < UNQUANTIZED_MAP]

    def parameter_count(self) -> int:
        """Weights and biases of the layers."""
        return sum(p.numel() for layer in self.layers() for p in (layer.weight, layer.bias) if p is not None)


class QuantModel(nn.Module):
    """Wraps a UNet: every convolution, linear layer and attention product in it gets quantizers.

    The UNet is changed in place and belongs to the wrapper from then on. Freshly wrapped it still computes in full
    precision; :meth:`set_quant_state` turns quantization on.

    Args:
        model: a UNet of a known family (:mod:`qdiff.adapters`).
        weight_quant_params, act_quant_params: the published dictionaries (``n_bits``, ``symmetric``, ``channel_wise``,
            ``scale_method``, ``leaf_param``, ``always_zero``) or configs.
        sm_abit: bits of attention maps after softmax.
        split: cut up-path shortcuts in two.
        timed_ranges, timesteps: which activation quantizers have a grid for each of these timesteps, see
            :class:`~qdiff.config.QuantConfig`.
        split_input: quantize the network's input as two tensors, its negative and its positive values.

    Attributes:
        clock: what the time-dependent quantizers look up. A forward pass sets it; whoever runs stages or units of the
            network alone sets it to the batch's timesteps. Setting it costs nothing where no grid depends on time.
        output_scale: divides the output of the quantized network, where there is one (PTQD).

    Raises:
        TypeError: the class of ``model`` is not known.
        ValueError: ``model`` is wrapped already, or grids are to depend on timesteps that are not given.
    """

    def __init__(
        self,
        model: nn.Module,
        weight_quant_params: QuantizerConfig | dict[str, Any] | None = None,
        act_quant_params: QuantizerConfig | dict[str, Any] | None = None,
        sm_abit: int = 8,
        *,
        split: bool = False,
        timed_ranges: TimedRanges = "none",
        timesteps: tuple[float, ...] = (),
        split_input: bool = False,
    ):
        super().__init__()
        if any(isinstance(module, QuantModule) for module in model.modules()):
            raise ValueError("this network is wrapped already; build a new one to quantize it differently")
        weight = QuantizerConfig.from_params(weight_quant_params or {"channel_wise": True})
        act = QuantizerConfig.from_params(act_quant_params or {"leaf_param": True})
        self.config = QuantConfig(
            weight_bit=weight.n_bits,
            act_bit=act.n_bits,
            quant_act=act_quant_params is not None,
            a_sym=act.symmetric,
            split=split,
            sm_abit=sm_abit,
            weight_range=weight.scale_method,
            act_range=act.scale_method,
            timed_ranges=timed_ranges,
            timesteps=timesteps,
            split_input=split_input,
        )
        if self.config.timed and not self.config.timesteps:
            raise ValueError(f"timed_ranges={timed_ranges!r} needs timesteps, those of the calibration set")
        self.adapter = find_adapter(model)
        assert isinstance(model, StagedNetwork)  # as all that adapters know
        self.model = model
        self.clock = Clock(self.config.timesteps)
        self.output_scale: OutputScale | None = None
        self.use_weight_quant = self.use_act_quant = False
        self._wrap_layers(weight, act)
        self._wrap_blocks()
        self._time_quantizers()
        self.to(next(model.parameters()).device)  # the quantizers too
        self.train(model.training)

    @classmethod
    def from_config(cls, model: nn.Module, config: QuantConfig) -> QuantModel:
        """Wrap ``model`` as a :class:`~qdiff.config.QuantConfig` says."""
        quantized = cls(
            model,
            config.weight,
            config.act,
            config.sm_abit,
            split=config.split,
            timed_ranges=config.timed_ranges,
            timesteps=config.timesteps,
            split_input=config.split_input,
        )
        quantized.config = config
        return quantized

    def _wrap_layers(self, weight: QuantizerConfig, act: QuantizerConfig) -> None:
        cuts = dict(self.adapter.shortcuts(self.model)) if self.config.split else {}
        inputs = set(self.adapter.inputs(self.model)) if self.config.split_input else ()
        layers = [(path, module) for path, module in self.model.named_modules() if isinstance(module, QUANTIZABLE)]
        for path, layer in layers:
            if path in cuts:
                quantized: QuantModule = SplitQuantModule(layer, weight, act, split_channels=cuts[path])
            else:
                quantized = (SignedInputQuantModule if path in inputs else QuantModule)(layer, weight, act)
            _replace(self.model, path, quantized)

    def _wrap_blocks(self) -> None:
        found = [(path, module) for path, module in self.model.named_modules() if type(module) in self.adapter.blocks]
        for path, block in found:
            quantized = self.adapter.blocks[type(block)].take_over(block)
            self.adapter.finish_block(quantized, self.config)
            _replace(self.model, path, quantized)

    def _time_quantizers(self) -> None:
        """Give the chosen activation quantizers a grid for each timestep."""
        if not self.config.timed:
            return
        inputs = tuple(f"{path}." for path in self.adapter.inputs(self.model))
        for path, quantizer in self.act_quantizers().items():
            if self.config.timed_ranges == "all" or path.startswith(inputs):
                _replace(self.model, path, TimedQuantizer(quantizer.config, self.clock))

    def forward(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.clock.set(t)
        output = self.model(x, t, *args, **kwargs)
        self.clock.clear()
        if self.output_scale is not None and self.use_weight_quant:
            output = self.output_scale.correct(output, t, act_quant=self.use_act_quant)
        return output

    # Looking inside.

    def layers(self) -> dict[str, QuantModule]:
        """Every quantized layer by its path in the UNet."""
        return {path: m for path, m in self.model.named_modules() if isinstance(m, QuantModule)}

    def act_quantizers(self) -> dict[str, UniformAffineQuantizer]:
        """Every activation quantizer by its path in the UNet."""
        return {
            path: module
            for path, module in self.model.named_modules()
            if isinstance(module, UniformAffineQuantizer) and "act_quantizer" in path.rpartition(".")[2]
        }

    def timed_quantizers(self) -> dict[str, TimedQuantizer]:
        """Those whose grid depends on the timestep."""
        return {path: q for path, q in self.act_quantizers().items() if isinstance(q, TimedQuantizer)}

    def units(self) -> list[Unit]:
        """What is reconstructed, in the order in which the network runs it."""
        return [unit for stage in self.model.stages() for unit in self.units_of(stage)]

    def units_of(self, stage: Stage) -> list[Unit]:
        """The units that run within one stage of the forward pass."""
        return list(self._units_below(stage.path, self.model.get_submodule(stage.path), stage))

    def _units_below(self, path: str, module: nn.Module, stage: Stage) -> Iterator[Unit]:
        if isinstance(module, QuantModule | BaseQuantBlock):
            yield Unit(path, module, stage, self.clock)
            return
        name = self.adapter.upsamplers.get(type(module), "")
        if isinstance(layer := getattr(module, name, None), QuantModule):
            yield Unit(f"{path}.{name}", layer, stage, self.clock, upsampler=module)
            return
        for name, child in module.named_children():
            yield from self._units_below(f"{path}.{name}", child, stage)

    # Switching quantization.

    def set_quant_state(self, weight_quant: bool = False, act_quant: bool = False) -> None:
        """Quantize weights and activations from now on, or not."""
        for module in self._switches():
            module.use_weight_quant, module.use_act_quant = weight_quant, act_quant

    @contextlib.contextmanager
    def quant_state(self, weight_quant: bool, act_quant: bool) -> Iterator[None]:
        """The same for the length of a ``with`` block."""
        modules = self._switches()
        before = [(m.use_weight_quant, m.use_act_quant) for m in modules]
        self.set_quant_state(weight_quant, act_quant)
        try:
            yield
        finally:
            for module, flags in zip(modules, before, strict=True):
                module.use_weight_quant, module.use_act_quant = flags

    def _switches(self) -> list[QuantModel | QuantModule | BaseQuantBlock]:
        return [m for m in self.modules() if isinstance(m, QuantModel | QuantModule | BaseQuantBlock)]

    def set_grad_ckpt(self, grad_ckpt: bool) -> None:
        """Whether transformer blocks save memory while they are reconstructed, by computing activations twice.

        The published name. The result is the same; families without such blocks are not affected.
        """
        for module in self.model.modules():
            if isinstance(module, BaseQuantBlock):
                module.grad_ckpt = grad_ckpt

    def find_weight_grids(self) -> None:
        """Set every weight's grid from the weight itself: round to nearest."""
        for layer in self.layers().values():
            layer.find_weight_grid()

    def learn_rounding(self) -> None:
        """Give every weight rounding variables (the structure of calibrated checkpoints)."""
        for layer in self.layers().values():
            layer.learn_rounding()

    def bake(self) -> None:
        """Compute every quantized weight once; forward passes then cost what full-precision ones do."""
        for layer in self.layers().values():
            if layer.baked_weight is None:
                layer.bake()

    def weights_calibrated(self) -> bool:
        """Whether every weight has rounding variables."""
        return all(
            isinstance(q, AdaRoundQuantizer) for layer in self.layers().values() for q, _ in layer.weight_quantizers()
        )


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for the length of a ``with`` block; every module's own mode comes back."""
    before = [(module, module.training) for root in modules for module in root.modules()]
    for root in modules:
        root.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def frozen_parameters(module: nn.Module) -> Iterator[None]:
    """No parameter of ``module`` asks for gradients inside the ``with`` block."""
    before = [(p, p.requires_grad) for p in module.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
