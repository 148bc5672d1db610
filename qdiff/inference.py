"""A network made ready to sample with: in which precision it computes, compiled or not, as one CUDA graph or not.

For the fake-quantized network and the full-precision one alike. Low bits stay simulated: weights are dequantized once
and held in the chosen type, activations are rounded to their grids in float32 on the way into each layer, which a
compiler fuses into the kernel that produces them.

What stays in float32 whatever the precision, because half precision changes more than the last digits there: the time
embedding, the statistics of normalisation, and the arithmetic of activation grids (x / δ in float16 is off by up to a
sixteenth of a step near the ends of an 8-bit grid, which moves roundings).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from qdiff.adapters import find_adapter
from qdiff.graphs import recording
from qdiff.quant_block import BaseQuantBlock
from qdiff.quant_layer import QUANTIZABLE, QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizers import UniformAffineQuantizer

Precision = Literal["full", "autocast", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

NoiseModel = Callable[..., Tensor]
"""(x: N,C,H,W; t: N; where the network is conditional, context: N,L,D) -> eps like x."""

WARMUP_CALLS = 3  # before a capture: lazy allocations, cuBLAS handles, cuDNN's choice of kernels
_DTYPES = {"autocast": torch.float16, "fp16": torch.float16, "bf16": torch.bfloat16}
_NORMS = (nn.GroupNorm, nn.LayerNorm)


class InferenceError(ValueError):
    """The network cannot be run as asked for; the message says what is missing and what to do."""


@dataclass(frozen=True)
class InferenceConfig:
    """How a network runs while sampling.

    Attributes:
        precision: ``full`` is float32; ``autocast`` leaves weights in float32 and lets torch choose, operation by
            operation, between that and float16; ``fp16`` and ``bf16`` hold the weights in that type.
        compile: through torch.compile, and on a GPU as one CUDA graph.
        unrounded_maps: softmax maps in 16 bits, which stand for no quantization, stay unrounded, so that attention is
            fused and none of them is in memory.
    """

    precision: Precision = "full"
    compile: bool = False
    unrounded_maps: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: choose one of {', '.join(PRECISIONS)}")

    def on(self, device: torch.device | str) -> InferenceConfig:
        """What the same words mean on a device: on a CPU ``autocast`` is ``full``."""
        if self.precision == "autocast" and torch.device(device).type == "cpu":
            return dataclasses.replace(self, precision="full")
        return self


def why_not_compiled(device: torch.device | str) -> str | None:
    """What torch.compile lacks on this machine for such a device, and the remedy; None where nothing is known to."""
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        return f"needs Python's headers and found none in {headers}: install them (on Debian and Ubuntu: python3-dev)"
    if torch.device(device).type == "cpu":
        compiler = os.environ.get("CXX", "g++")  # as torch looks for it
        if shutil.which(compiler) is None:
            return f"needs a C++ compiler on a CPU and found no {compiler}: install g++, or let CXX name another"
        return None
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton on a GPU: install it in the version that torch asks for"
    if os.environ.get("CC") is None and not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return "needs a C compiler on a GPU too: install gcc, or let CC name another"
    return None


# One network in another precision.


class InFloat32(nn.Module):
    """Runs a module in float32 inside a network of lower precision.

    Args:
        back: return the result in the type of the input; else it stays in float32 and the next layer rounds it, so
            that what lies between is not rounded twice.
    """

    def __init__(self, module: nn.Module, *, back: bool):
        super().__init__()
        self.module, self.back = module, back

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            out = self.module(x.float())
        return out.to(x.dtype) if self.back else out


@torch.no_grad()
def lower_precision(network: nn.Module, precision: Precision, *, channels_last: bool = False) -> None:
    """Change a UNet, wrapped or not, in place; it can only sample afterwards.

    A quantized layer's weight becomes the tensor of its dequantized values, once and for all: its full-precision
    values, rounding variables and weight quantizers go.

    Args:
        channels_last: keep the weights of convolutions in that order, which the tensor cores of a GPU work in.
    """
    if precision == "full":
        return
    unet = network.model if isinstance(network, QuantModel) else network
    untouched = [unet.get_submodule(path) for path in find_adapter(unet).time_embedding]
    kept = {id(module) for root in untouched for module in root.modules()}
    for module in list(unet.modules()):
        if isinstance(module, QuantModule):
            _seal(module)
        if id(module) in kept:
            continue
        if precision != "autocast" and isinstance(module, (QuantModule, *QUANTIZABLE)):
            _hold_weights_in(_DTYPES[precision], module, channels_last)
    for path, module in list(unet.named_modules()):
        if id(module) in kept and not any(module is root for root in untouched):
            continue
        if isinstance(module, UniformAffineQuantizer):
            _replace(unet, path, InFloat32(module, back=True))
        elif isinstance(module, _NORMS) or id(module) in kept:
            _replace(unet, path, InFloat32(module, back=False))


def _seal(layer: QuantModule) -> None:
    """Make the quantized weight the layer's only one."""
    if not layer.use_weight_quant:
        return
    weight = layer.effective_weight().detach()
    for suffix in [suffix for suffix, _ in layer.parts()]:
        delattr(layer, f"weight_quantizer{suffix}")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.unbake()
    layer.use_weight_quant = False


def _hold_weights_in(
    dtype: torch.dtype, layer: QuantModule | nn.Conv2d | nn.Conv1d | nn.Linear, channels_last: bool
) -> None:
    order = torch.channels_last if channels_last and layer.weight.dim() == 4 else torch.preserve_format
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype, memory_format=order), requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    if not isinstance(layer, QuantModule):  # that one rounds its own input, after quantizing it
        layer.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype), *args[1:]))


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


# Ways of running it.


@contextlib.contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Allow or forbid TF32 in matrix products and convolutions for a while."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextlib.contextmanager
def _fastest_kernels(wanted: bool) -> Iterator[None]:
    """Let cuDNN time its kernels. Which one it takes changes the last digits, so not where they matter."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class FixedBatch:
    """Calls a model with batches of one size; a smaller one is filled up with copies of its last row.

    A compiled network would be compiled anew for the last, smaller batch, and a graph has fixed buffers.
    """

    def __init__(self, model: NoiseModel, size: int):
        self.model, self.size = model, size

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        """Args:
        inputs: x, t and, where there is one, context, of as many rows each.
        """
        rows = len(inputs[0])
        if rows > self.size:
            raise ValueError(f"a batch of {rows}, but the model was made ready for at most {self.size}")
        if rows < self.size:
            inputs = tuple(torch.cat([part, part[-1:].expand(self.size - rows, *part.shape[1:])]) for part in inputs)
        return self.model(*inputs)[:rows]


class GraphedModel:
    """A noise predictor whose kernels are launched as one CUDA graph.

    A small network spends more time launching kernels than running them. The graph has fixed buffers of the size it was
    captured with, so batches must have that size (:class:`FixedBatch`).

    Args:
        model: free of traffic between device and host, and of branches on values.
        shape: of a batch, N x C x H x W.
        context_shape: L x D of the context of one row, where the model takes one.

    Raises:
        RuntimeError: the model cannot be captured.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: NoiseModel,
        shape: Sequence[int],
        device: torch.device,
        context_shape: Sequence[int] | None = None,
    ):
        self._inputs = _zeros(shape, device, context_shape)
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_CALLS):
                    model(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with recording(self._graph, stream):
                self._out = model(*self._inputs)
        self._model = model  # its weights are what the graph reads

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        for buffer, value in zip(self._inputs, inputs, strict=True):
            buffer.copy_(value)
        self._graph.replay()
        return self._out.clone()  # the next replay overwrites it; multistep samplers keep it longer


def _zeros(
    shape: Sequence[int], device: torch.device, context_shape: Sequence[int] | None = None
) -> tuple[Tensor, ...]:
    """A batch of inputs to make a network ready with: x, t and, where it takes one, context."""
    shapes = [tuple(shape), (shape[0],)]
    if context_shape is not None:
        shapes.append((shape[0], *context_shape))
    return tuple(torch.zeros(size, device=device) for size in shapes)


def leave_maps_unrounded(network: nn.Module) -> None:
    """No softmax map of 16 bits is rounded from now on where attention can be fused without it.

    Raises:
        InferenceError: the network has no such map.
    """
    blocks = [m for m in network.modules() if isinstance(m, BaseQuantBlock) and m.can_leave_map_unrounded()]
    if not blocks:
        raise InferenceError("there are no softmax maps in 16 bits that could stay unrounded in this network")
    for block in blocks:
        block.unrounded_map = True


@torch.no_grad()
def prepare(
    model: NoiseModel,
    config: InferenceConfig,
    *,
    shape: Sequence[int],
    device: torch.device | str,
    context_shape: Sequence[int] | None = None,
    cuda_graph: bool | None = None,
    allow_tf32: bool = False,
) -> NoiseModel:
    """A model as ``config`` wants it run, compiled and captured when this returns.

    torch.compile and an own CUDA graph around it, rather than the graphs of ``mode="reduce-overhead"``: one graph,
    captured at a known moment, whose buffers nobody else reuses, and the same code with and without compilation.

    Args:
        model: on ``device``, in evaluation mode. A network is changed in place where ``config.precision`` is not
            ``full`` (:func:`lower_precision`) and belongs to the result; any other callable runs in full precision.
        shape: of the largest batch, N x C x H x W. Classifier-free guidance calls the network on two rows an image.
        context_shape: L x D of the context of one row, where the model takes one.
        cuda_graph: None captures on a GPU and goes on without, with a warning, where the model resists; True raises
            there.
        allow_tf32: for what is compiled or captured here in float32. Whoever calls the result sets it for the rest.

    Returns:
        (x, t) or (x, t, context) -> noise, float32 both ways, for batches up to that size.

    Raises:
        InferenceError: a precision or torch.compile is not possible here, or not for this model.
        ValueError: a graph asked for without a GPU.
        RuntimeError: the model cannot be captured, and has to be.
    """
    device = torch.device(device)
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph needs a GPU; device is {device}")
    config = config.on(device)
    graphed = device.type == "cuda" and cuda_graph is not False
    predict = model
    if config.unrounded_maps:
        if not isinstance(model, nn.Module):
            raise InferenceError("only a network has softmax maps that could stay unrounded")
        leave_maps_unrounded(model)
    if config.precision != "full":
        if not isinstance(model, nn.Module):
            raise InferenceError(f"precision {config.precision} needs a network; a function runs as it is written")
        on_gpu = device.type == "cuda"
        lower_precision(model, config.precision, channels_last=on_gpu)
        predict = _in_precision(model, config.precision, channels_last=on_gpu)
    if config.compile:
        if lack := why_not_compiled(device):
            raise InferenceError(f"torch.compile {lack}")
        torch.compiler.reset()  # what earlier networks left would count against its limit of versions
        predict = torch.compile(predict, fullgraph=True, dynamic=False)
    if not (config.compile or graphed):
        return predict
    with tf32(allow_tf32), _fastest_kernels(config.precision != "full"), _compiling(config.compile):
        if graphed:
            predict = _graphed(predict, shape, device, context_shape, required=bool(cuda_graph))
        else:
            predict(*_zeros(shape, device, context_shape))
    return FixedBatch(predict, shape[0])


def _graphed(
    model: NoiseModel,
    shape: Sequence[int],
    device: torch.device,
    context_shape: Sequence[int] | None = None,
    *,
    required: bool,
) -> NoiseModel:
    """The model as a captured graph, or as it is where that fails and is not required."""
    try:
        return GraphedModel(model, shape, device, context_shape)
    except RuntimeError as error:
        if required or isinstance(error, torch.OutOfMemoryError) or _is_compilers(error):
            raise
        warnings.warn(f"the model cannot be captured as a CUDA graph, sampling without: {error}", stacklevel=3)
        return model


def _in_precision(network: nn.Module, precision: Precision, *, channels_last: bool) -> NoiseModel:
    order = torch.channels_last if channels_last else torch.contiguous_format
    autocast = precision == "autocast"

    def predict(x: Tensor, t: Tensor, *context: Tensor) -> Tensor:
        # Every weight is used once a call, so there is nothing that a cache of casts could save.
        with torch.autocast(x.device.type, torch.float16, enabled=autocast, cache_enabled=False):
            out = network(x.contiguous(memory_format=order), t, *context)
        return out.float()

    return predict


def _is_compilers(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))


@contextlib.contextmanager
def _compiling(enabled: bool) -> Iterator[None]:
    """What torch.compile raises inside, in one sentence."""
    try:
        yield
    except Exception as error:
        if not enabled or not _is_compilers(error):
            raise
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InferenceError(f"torch.compile failed ({first.strip()}); run without it") from error
