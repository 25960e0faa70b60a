"""Linear maps and working memory for channels-last features: the same arithmetic, by the fastest exact kernel.

PyTorch computes a float32 `linear` on a CPU with its BLAS, and a convolution with oneDNN. On processors where the BLAS
leaves the wide vector units unused (MKL on AMD: 200 instead of 430 GFLOP/s on two cores) a linear map is twice as fast
when it is asked for as a 1x1 convolution. Large temporaries cost as much as the arithmetic, since the system hands
every page out anew; so in inference results are written over what is no longer needed, and long maps are computed tile
by tile.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Values of an intermediate result that are best worked on in one go: 8 MiB in float32, about the last-level cache.
VALUES_IN_CACHE = 2**21
# oneDNN rewrites a convolution's weights into a layout of its own each time. Below this number of positions that takes
# longer than the arithmetic.
_FEW_POSITIONS = 128
# Fewer rows than this MKL multiplies from the left just as fast, in float32.
_ROWS_FOR_ONEDNN = 28
ONEDNN_TYPES = (torch.float32, torch.bfloat16)


def is_tracing() -> bool:
    """True while `torch.compile`, `torch.export` or `torch.jit.trace` records the program."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_compiling_inference(x: torch.Tensor) -> bool:
    """True while `torch.compile` records inference on a CPU: then [`opaque`] operators stand for our kernels."""
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiling and x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def opaque(function: Callable[..., Any], shape: Callable[..., Any]) -> Callable[..., Any]:
    """An operator that `torch.compile` calls as it is, instead of looking inside.

    Inductor would compute our linear maps and convolutions with worse kernels and lay out their results channels first.

    Args:
        function: Annotated with types of tensors and scalars; writes over no argument, returns new tensors.
        shape: Same arguments, returns empty tensors of the results' shapes, types and strides.
    """
    name = function.__name__.strip("_")
    while hasattr(torch.ops.hf_rsheat, name):  # a copy of this file from the Hub keeps operators of its own
        name += "_"
    operator = torch.library.custom_op(f"hf_rsheat::{name}", torch.no_grad()(function), mutates_args=())
    operator.register_fake(shape)
    return operator


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether the module or a part of it has any; asked in each call, so without the generators of `modules()`."""
    parts: list[nn.Module | None] = [module]
    while parts:
        part = parts.pop()
        if part is not None:
            if part._forward_hooks or part._forward_pre_hooks:
                return True
            parts.extend(part._modules.values())
    return False


class _Observed(threading.local):
    """Whether somebody looks at the intermediate results of what runs now in this thread."""

    def __init__(self) -> None:
        self.value = False


_observed = _Observed()


@contextmanager
def respecting_hooks(module: nn.Module) -> Iterator[None]:
    """Inside, and if `module` or a part of it has forward hooks, nothing is written over and no call is cut up.

    Hooks then see, and may keep, whole and final tensors; inference is slower.
    """
    before = _observed.value
    _observed.value = before or has_forward_hooks(module)
    try:
        yield
    finally:
        _observed.value = before


def overwritable(x: torch.Tensor) -> bool:
    """Whether a temporary may be written over: neither autograd nor a hook will ask for it."""
    needed = x.requires_grad and torch.is_grad_enabled()
    return not needed and (is_tracing() or not _observed.value)


def is_plain(module: nn.Module, kind: type[nn.Linear] | type[nn.Conv2d] = nn.Linear) -> bool:
    """Whether the module is nothing but its weight and bias: no hooks, no adapter, no quantised or sharded weight."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return (
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and "forward" not in vars(module)  # as accelerate's offloading sets it
        and not hooks
        and type(module.weight) in (nn.Parameter, torch.Tensor)
    )


@lru_cache(maxsize=1)
def has_onednn_linear() -> bool:
    """Whether PyTorch's oneDNN `linear`, an operator of its compiler's, is there and means what it meant."""
    if not torch.backends.mkldnn.is_available():
        return False
    with torch.no_grad():
        x, weight, bias = torch.arange(6.0).view(2, 3) - 2, torch.arange(12.0).view(4, 3) / 7, torch.arange(4.0)
        try:
            result = onednn_linear(x, weight, bias, "gelu")
        except (AttributeError, RuntimeError, TypeError):
            return False
        return torch.allclose(result, F.gelu(F.linear(x, weight, bias)), atol=1e-5)


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """`F.linear` and "none", "gelu" (erf) or "swish" (SiLU), without gradients; the weight plain or in blocks."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, activation, [], "none")


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    """`F.linear` on `(..., in_features)`, and GELU (erf) if `activation` is "gelu", by the fastest kernel."""
    plain = type(weight) in (nn.Parameter, torch.Tensor)  # quantised weights know `F.linear` only
    if plain and is_compiling_inference(x):
        return _opaque_linear(x, weight, bias, activation)
    exported = torch.compiler.is_exporting() or torch.jit.is_tracing()  # a graph for others should say what is meant
    on_cpu = plain and x.device.type == "cpu" and x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
    if on_cpu and not exported and x.dtype in ONEDNN_TYPES:
        if not is_tracing() and not torch.is_grad_enabled() and has_onednn_linear():
            return onednn_linear(x, weight, bias, activation)
        if x.dtype == torch.float32 and x.numel() >= _FEW_POSITIONS * x.shape[-1]:
            return _activated(_as_convolution(x, weight, bias), activation)
    return _activated(F.linear(x, weight, bias), activation)


def _as_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    image = x if x.ndim == 4 else x.reshape(1, 1, -1, x.shape[-1])
    result = F.conv2d(image.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    return result.reshape(*x.shape[:-1], weight.shape[0])


def _activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    return gelu(x) if activation == "gelu" else x


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    return linear(x, weight, bias, activation).contiguous()


_opaque_linear = opaque(_linear, lambda x, weight, bias, activation: x.new_empty(*x.shape[:-1], weight.shape[0]))


def apply_linear(module: nn.Linear, x: torch.Tensor, activation: str = "none") -> torch.Tensor:
    """`module(x)` and activation by the fastest kernel; an adapter or int8 in place of the `nn.Linear` is called."""
    if is_plain(module):
        return linear(x, module.weight, module.bias, activation)
    return _activated(module(x), activation)


def apply_linear_halves(module: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`module(x).chunk(2, dim=-1)`, both halves contiguous where possible, so that no later step has to copy them."""
    if not is_plain(module):
        first, second = module(x).chunk(2, dim=-1)
        return first, second
    if is_compiling_inference(x):
        return _opaque_linear_halves(x, module.weight, module.bias)
    return _linear_halves(x, module.weight, module.bias)


def _linear_halves(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    biases = (None, None) if bias is None else bias.chunk(2)
    first, second = (linear(x, w, b) for w, b in zip(weight.chunk(2), biases, strict=True))
    return first, second


def _shape_of_halves(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (x.new_empty(*x.shape[:-1], half.shape[0]) for half in weight.chunk(2))
    return first, second


_opaque_linear_halves = opaque(_linear_halves, _shape_of_halves)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU (erf) of a temporary, over it where possible."""
    return torch.ops.aten.gelu_(x) if overwritable(x) else F.gelu(x)


def gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x * SiLU(gate) of two temporaries, over them where possible."""
    gate = F.silu(gate, inplace=overwritable(gate))
    return x.mul_(gate) if overwritable(x) and x.dtype == gate.dtype else x * gate


def added(branch: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """branch + x, over the temporary `branch` where possible."""
    return branch.add_(x) if overwritable(branch) and branch.dtype == x.dtype else x + branch


def per_image_in_cache(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function(x)` for a function that treats images `(batch, ...)` apart; in inference a few images at a time."""
    if is_tracing() or x.device.type != "cpu" or not overwritable(x):
        return function(x)
    images = max(1, VALUES_IN_CACHE * len(x) // max(1, x.numel()))
    return function(x) if images >= len(x) else torch.cat([function(part) for part in x.split(images)])


def strided_conv3x3(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A 3x3 convolution with stride 2 and padding 1 on `(batch, height, width, channels)`.

    Of small maps in inference as a matrix product of their 3x3 neighbourhoods.
    """
    if not isinstance(conv, nn.Conv2d):
        return conv(x)  # packed, and channels-last as it is
    if is_compiling_inference(x) and is_plain(conv, nn.Conv2d):
        return _opaque_strided_conv3x3(x, conv.weight, conv.bias)
    if is_tracing() or x.device.type != "cpu" or not overwritable(x):
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return _strided_conv3x3(x, conv.weight, conv.bias)


def _strided_conv3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x[..., 0].numel() >= 4 * _FEW_POSITIONS:
        return F.conv2d(_channels_first(x), weight, bias, stride=2, padding=1).permute(0, 2, 3, 1).contiguous()
    neighbourhoods = F.pad(x, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 2).unfold(2, 3, 2).flatten(3)
    return linear(neighbourhoods, weight.flatten(1), bias)


def left_product(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`matrix @ x` of `(m, n)` and `(batch, n, columns)`, by oneDNN where it is faster: for a single matrix."""
    if is_tracing() or torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype not in ONEDNN_TYPES:
        return torch.matmul(matrix, x)
    few_rows = x.dtype == torch.float32 and len(matrix) < _ROWS_FOR_ONEDNN
    if len(x) != 1 or few_rows or not has_onednn_linear():
        return torch.matmul(matrix, x)
    return onednn_linear(matrix, x[0].T, None, "none")[None]


def _strided_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    batch, height, width, _ = x.shape
    return x.new_empty(batch, (height + 1) // 2, (width + 1) // 2, weight.shape[0])


_opaque_strided_conv3x3 = opaque(_strided_conv3x3, _strided_shape)


def depthwise_conv3x3(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A depthwise 3x3 convolution with padding 1 on `(batch, height, width, channels)`."""
    if is_compiling_inference(x) and is_plain(conv, nn.Conv2d):
        return _opaque_depthwise_conv3x3(x, conv.weight, conv.bias)
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _depthwise_conv3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result = F.conv2d(_channels_first(x), weight, bias, padding=1, groups=len(weight))
    return result.permute(0, 2, 3, 1).contiguous()


_opaque_depthwise_conv3x3 = opaque(_depthwise_conv3x3, lambda x, weight, bias: x.new_empty(x.shape))


def _channels_first(x: torch.Tensor) -> torch.Tensor:
    """A view as `(batch, channels, height, width)` that PyTorch recognises as channels-last.

    Inductor gives dimensions of size 1 the stride 0, and a convolution then copies its input and works channels first.
    """
    return x.flatten().view(x.shape).permute(0, 3, 1, 2)


def linear_gelu_linear(first: nn.Linear, second: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """`second(gelu(first(x)))` by the fastest kernels."""
    if is_compiling_inference(x) and is_plain(first) and is_plain(second):
        return _opaque_linear_gelu_linear(x, first.weight, first.bias, second.weight, second.bias)
    return apply_linear(second, apply_linear(first, x, "gelu"))


def _linear_gelu_linear(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor, b2: torch.Tensor | None
) -> torch.Tensor:
    positions = x.flatten(0, -2)
    tiles = math.ceil(len(positions) * len(w1) / VALUES_IN_CACHE)
    if tiles <= 1:
        return linear(linear(x, w1, b1, "gelu"), w2, b2)
    results = [linear(linear(tile, w1, b1, "gelu"), w2, b2) for tile in positions.chunk(tiles)]
    return torch.cat(results).view(*x.shape[:-1], len(w2))


_opaque_linear_gelu_linear = opaque(
    _linear_gelu_linear, lambda x, w1, b1, w2, b2: x.new_empty(*x.shape[:-1], w2.shape[0])
)
