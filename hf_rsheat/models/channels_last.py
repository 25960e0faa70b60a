"""Linear maps and working memory for channels-last features: the same arithmetic, by the fastest exact kernel.

PyTorch computes a float32 `linear` on a CPU with its BLAS, and a convolution with oneDNN. On processors where the BLAS
leaves the wide vector units unused (MKL on AMD: 200 instead of 430 GFLOP/s on two cores) a linear map is twice as fast
when it is asked for as a 1x1 convolution. Large temporaries cost as much as the arithmetic, since the system hands
every page out anew; so in inference results are written over what is no longer needed, and long maps are computed tile
by tile.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

# Values of an intermediate result that are best worked on in one go: 8 MiB in float32, about the last-level cache.
VALUES_IN_CACHE = 2**21
# oneDNN rewrites a convolution's weights into a layout of its own each time. Below this number of positions that takes
# longer than the arithmetic.
_FEW_POSITIONS = 128


def is_tracing() -> bool:
    """True while `torch.compile`, `torch.export` or `torch.jit.trace` records the program."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


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
    _observed.value = before or any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    try:
        yield
    finally:
        _observed.value = before


def overwritable(x: torch.Tensor) -> bool:
    """Whether a temporary may be written over: neither autograd nor a hook will ask for it."""
    needed = x.requires_grad and torch.is_grad_enabled()
    return not needed and (is_tracing() or not _observed.value)


def _is_plain(module: nn.Module) -> bool:
    """Whether the module is nothing but its weight and bias: no hooks, no adapter, no quantised or sharded weight."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in vars(module)  # as accelerate's offloading sets it
        and not hooks
        and type(module.weight) in (nn.Parameter, torch.Tensor)
    )


@lru_cache(maxsize=1)
def _has_onednn_linear() -> bool:
    """Whether PyTorch's oneDNN `linear`, an operator of its compiler's, is there and means what it meant."""
    if not torch.backends.mkldnn.is_available():
        return False
    with torch.no_grad():
        x, weight, bias = torch.arange(6.0).view(2, 3) - 2, torch.arange(12.0).view(4, 3) / 7, torch.arange(4.0)
        try:
            result = _onednn_linear(x, weight, bias, "gelu")
        except (AttributeError, RuntimeError, TypeError):
            return False
        return torch.allclose(result, F.gelu(F.linear(x, weight, bias)), atol=1e-5)


def _onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    """`F.linear` on `(..., in_features)`, and GELU (erf) if `activation` is "gelu", by the fastest kernel."""
    exported = torch.compiler.is_exporting() or torch.jit.is_tracing()  # a graph for others should say what is meant
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype and not torch.is_autocast_enabled("cpu")
    if on_cpu and not exported and x.dtype in (torch.float32, torch.bfloat16):
        if not is_tracing() and not torch.is_grad_enabled() and _has_onednn_linear():
            return _onednn_linear(x, weight, bias, activation)
        if x.dtype == torch.float32 and x.numel() >= _FEW_POSITIONS * x.shape[-1]:
            return _activated(_as_convolution(x, weight, bias), activation)
    return _activated(F.linear(x, weight, bias), activation)


def _as_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    image = x if x.ndim == 4 else x.reshape(1, 1, -1, x.shape[-1])
    result = F.conv2d(image.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    return result.reshape(*x.shape[:-1], weight.shape[0])


def _activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    return gelu(x) if activation == "gelu" else x


def apply_linear(module: nn.Linear, x: torch.Tensor, activation: str = "none") -> torch.Tensor:
    """`module(x)` and activation by the fastest kernel; an adapter or int8 in place of the `nn.Linear` is called."""
    if _is_plain(module):
        return linear(x, module.weight, module.bias, activation)
    return _activated(module(x), activation)


def apply_linear_halves(module: nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`module(x).chunk(2, dim=-1)`, both halves contiguous where possible, so that no later step has to copy them."""
    if not _is_plain(module):
        first, second = module(x).chunk(2, dim=-1)
        return first, second
    biases = (None, None) if module.bias is None else module.bias.chunk(2)
    first, second = (linear(x, w, b) for w, b in zip(module.weight.chunk(2), biases, strict=True))
    return first, second


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


def strided_conv3x3(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A 3x3 convolution with stride 2, padding 1 and no bias on `(batch, height, width, channels)`.

    Of small maps in inference as a matrix product of their 3x3 neighbourhoods.
    """
    small = not is_tracing() and x[..., 0].numel() < 4 * _FEW_POSITIONS
    if not small or x.device.type != "cpu" or not overwritable(x):
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    neighbourhoods = F.pad(x, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 2).unfold(2, 3, 2).flatten(3)
    return F.linear(neighbourhoods, conv.weight.flatten(1))
