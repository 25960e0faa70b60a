"""Heat conduction in the frequency domain: plain PyTorch, channels last.

A feature map is read as an initial temperature u(x, y, 0). Its 2-D DCT-II diagonalises the heat equation with
insulated borders, so conduction for a (learned) time is one multiplication in the frequency domain (vHeat,
arXiv 2405.16555, eq. 6-8; RS-vHeat, arXiv 2411.17984, adds the heat-capacity correction):

    u_t = IDCT( DCT(u_0) * exp(-k * (w_y**2 + w_x**2)) ),   w = pi * n / N,  n = 0 .. N - 1

k >= 0 is the thermal diffusivity times time, predicted per frequency and channel from a learned frequency embedding.
It does not depend on the image. DCTs are matrix products: O(N^1.5) for N tokens, and a small share of the work.
"""

import math
import weakref
from collections.abc import Callable, MutableMapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from .channels_last import (
    VALUES_IN_CACHE,
    apply_linear,
    apply_linear_halves,
    depthwise_conv3x3,
    gated,
    is_compiling_inference,
    is_plain,
    is_tracing,
    left_product,
    linear,
    opaque,
    overwritable,
)

# Values (not bytes) from which on a tensor derived from the weights is computed each time instead of being kept in eval
# mode. In float32 this is 8 MiB per layer: everything up to 512 px in the published sizes, little of it at 1024 px.
MAX_CACHED_VALUES = 2**21


def cosine_basis(
    size: int, *, normalized: bool = True, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> torch.Tensor:
    """The DCT-II matrix A of shape `(size, size)`: `A @ x` are the coefficients, row n has frequency pi * n / size.

    Args:
        size: Number of samples and of frequencies.
        normalized: Orthonormal rows (then `A.T` is the inverse); otherwise plain `2 * cos(...)`, as in scipy with
            `norm=None`.
        dtype: Of the result; computed in float32, or in float64 if asked for.
        device: Of the result.
    """
    compute_dtype = torch.promote_types(dtype, torch.float32)
    n = torch.arange(size, device=device)
    count = n[-1] + 1  # the size as a tensor, so that an exported graph computes it from its input
    # cos(pi * p / (2 * size)) with p = n * (2x + 1): folding the integer p into the first quadrant by periodicity and
    # symmetry keeps angles exact, so that float32 is enough at any size.
    phase = (n[:, None] * (2 * n[None, :] + 1)) % (4 * count)
    phase = torch.minimum(phase, 4 * count - phase)
    sign = 1 - 2 * (phase > count).to(compute_dtype)
    phase = torch.minimum(phase, 2 * count - phase)
    step = (math.pi / (2 * count.to(_widest(count)))).to(compute_dtype)
    basis = 2 * sign * torch.cos(phase.to(compute_dtype) * step)
    if normalized:
        scale = torch.sqrt((0.5 - 0.25 * (n == 0).to(compute_dtype)) / count.to(compute_dtype))
        basis = basis * scale[:, None]
    return basis.to(dtype)


@lru_cache(maxsize=128)
def _cached_basis(size: int, inverse: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Outside inference mode, so that a later training step may save it for backward.
    with torch.inference_mode(False):
        basis = cosine_basis(size, dtype=dtype, device=device)
        return basis.T.contiguous() if inverse else basis


def _basis(x: torch.Tensor, axis: int, *, inverse: bool = False) -> torch.Tensor:
    size = x.shape[axis]
    if is_tracing() or x.is_meta:
        basis = cosine_basis(size, dtype=x.dtype, device=x.device)
        return basis.T if inverse else basis
    return _cached_basis(size, inverse, x.dtype, x.device)


def _along_width(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    batch, height, width, channels = x.shape
    return torch.matmul(matrix, x.reshape(batch * height, width, channels)).reshape(batch, height, width, channels)


def _along_height(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    batch, height, width, channels = x.shape
    return left_product(matrix, x.reshape(batch, height, width * channels)).reshape(batch, height, width, channels)


def dct2(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal 2-D DCT-II over height and width of `(batch, height, width, channels)`."""
    # Height first, and last in the inverse: of the four orders this one rounds closest to the original (golden tests).
    return _along_width(_basis(x, 2), _along_height(_basis(x, 1), x))


def idct2(coefficients: torch.Tensor) -> torch.Tensor:
    """Inverse of [`dct2`], same shape."""
    x = _along_width(_basis(coefficients, 2, inverse=True), coefficients)
    return _along_height(_basis(x, 1, inverse=True), x)


def squared_frequencies(
    height: int, width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> torch.Tensor:
    """w_y**2 + w_x**2 in (radians per sample)**2, shape `(height, width)`; w = pi * n / N excludes the end point pi."""
    rows, columns = (_frequencies(size, dtype, device) for size in (height, width))
    return rows[:, None] ** 2 + columns[None, :] ** 2


def _frequencies(size: int, dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
    n = torch.arange(size, device=device)
    return n.to(dtype) * (math.pi / (n[-1].to(_widest(n)) + 1)).to(dtype)


def _widest(x: torch.Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no double


def decay_map(diffusivity: torch.Tensor, frequencies: torch.Tensor | None = None) -> torch.Tensor:
    """exp(-k * w**2), the share of each coefficient left after conduction; in (0, 1], 1 at the mean (0, 0).

    Args:
        diffusivity: k >= 0, shape `(height, width, channels)`, indexed by frequency.
        frequencies: [`squared_frequencies`] of these rows, if they are not the whole map.
    """
    if frequencies is None:
        height, width, _ = diffusivity.shape
        frequencies = squared_frequencies(height, width, dtype=diffusivity.dtype, device=diffusivity.device)
    return torch.exp(-diffusivity * frequencies[..., None])


def conduct_heat(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """Heat conduction of `x` `(batch, height, width, channels)` under a decay map `(height, width, channels)`."""
    return idct2(attenuated(dct2(x), decay))


def attenuated(coefficients: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """coefficients * decay, over the temporary `coefficients` where possible."""
    decay = decay.to(coefficients.dtype)
    return coefficients.mul_(decay) if overwritable(coefficients) else coefficients * decay


class _OptimizerSteps:
    """Counts optimiser steps in this process: fused optimisers change weights without bumping tensor versions."""

    count = 0

    @classmethod
    def increment(cls, *_: object) -> None:
        cls.count += 1


register_optimizer_step_post_hook(_OptimizerSteps.increment)


class DerivedTensorCache:
    """Keeps one tensor computed from weights, for as long as these weights are the same.

    "The same" means the same tensor objects and versions (in-place edits bump them) and no optimiser step since.
    Edits through `.data` are invisible to PyTorch and need `clear()`. Never used while tracing or where gradients have
    to flow into the weights; never copied or pickled with its module.
    """

    def __init__(self) -> None:
        self._entry: tuple[tuple, torch.Tensor] | None = None

    def __deepcopy__(self, memo: dict) -> "DerivedTensorCache":
        return DerivedTensorCache()

    def __reduce__(self) -> tuple:
        return (DerivedTensorCache, ())

    def clear(self) -> None:
        """Forget the tensor."""
        self._entry = None

    def get(
        self, sources: tuple[torch.Tensor, ...], key: tuple, compute: Callable[[], torch.Tensor], enabled: bool = True
    ) -> torch.Tensor:
        """The cached tensor if it still holds for `sources` and `key`, otherwise `compute()`."""
        if not enabled or is_tracing():
            return compute()
        if any(s.is_inference() or (s.requires_grad and torch.is_grad_enabled()) for s in sources):
            return compute()
        state = (key, _OptimizerSteps.count, tuple((weakref.ref(s), s._version) for s in sources))
        if self._entry is not None and _same_state(self._entry[0], state):
            return self._entry[1]
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor would break a later training step
            value = compute()
        if value.numel() < MAX_CACHED_VALUES and type(value) is torch.Tensor:
            self._entry = (state, value)
        return value


def _same_state(old: tuple, new: tuple) -> bool:
    return old[:2] == new[:2] and all(a() is b() and v == w for (a, v), (b, w) in zip(old[2], new[2], strict=True))


class CachingModule(nn.Module):
    """A module with [`DerivedTensorCache`]s: cleared by `train()`, `eval()`, loads, and moves of device or dtype."""

    def caches(self) -> tuple[DerivedTensorCache, ...]:
        """The caches of this very module (not of its children)."""
        raise NotImplementedError

    def clear_cache(self) -> None:
        """Forget derived tensors; needed only after edits through `weight.data`, which PyTorch cannot notice."""
        for cache in self.caches():
            cache.clear()
        _compiled_caches.clear()

    def train(self, mode: bool = True):
        self.clear_cache()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self.clear_cache()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.clear_cache()
        super()._load_from_state_dict(*args, **kwargs)


class HeatConduction(CachingModule):
    """Heat conduction operator on channels-last features.

    depthwise 3x3 -> linear -> (signal, gate); the signal conducts heat in the DCT domain, is normalised, gated with
    SiLU and projected back. With `correction` (RS-vHeat) the input is first corrected by the heat capacity:
    LayerNorm(ReLU(x + heat_capacity)).

    Args:
        dim: Channels in and out.
        inner_dim: Channels of signal and gate (`dim` unless slimmed).
        correction: Whether a heat-capacity table is part of the input.
        table_interpolation: How tables of another size are resized, see [`resize_table`].
    """

    def __init__(
        self, dim: int, inner_dim: int | None = None, correction: bool = False, table_interpolation: str = "bicubic"
    ) -> None:
        super().__init__()
        self.table_interpolation = table_interpolation
        inner_dim = inner_dim or dim
        self.correction_norm = nn.LayerNorm(dim, eps=1e-5) if correction else None
        self.depthwise_conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.in_proj = nn.Linear(dim, 2 * inner_dim)
        self.to_diffusivity = nn.Linear(dim, inner_dim)
        self.out_norm = nn.LayerNorm(inner_dim, eps=1e-5)
        self.out_proj = nn.Linear(inner_dim, dim)
        self._decay_cache = DerivedTensorCache()

    def caches(self) -> tuple[DerivedTensorCache, ...]:
        return (self._decay_cache,)

    def diffusivity(self, frequency_embedding: torch.Tensor) -> torch.Tensor:
        """k = ReLU(linear(embedding)) >= 0, shape `(height, width, inner_dim)`, in at least float32.

        Args:
            frequency_embedding: `(height, width, dim)`, indexed by frequency.
        """
        return _diffusivity(frequency_embedding, self.to_diffusivity.weight, self.to_diffusivity.bias)

    def decay(self, frequency_embedding: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Decay map `(height, width, inner_dim)` in `dtype`; cached in eval mode (see [`DerivedTensorCache`])."""
        cache = None if self.training else self._decay_cache
        return _decay((frequency_embedding, self.to_diffusivity.weight, self.to_diffusivity.bias), dtype, cache)

    def forward(
        self,
        hidden_states: torch.Tensor,
        frequency_embedding: torch.Tensor,
        heat_capacity: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `(batch, height, width, dim)`.
            frequency_embedding: `(height, width, dim)`; of any other height and width in compiled inference.
            heat_capacity: `(height, width, dim)`, exactly when the operator was built with `correction`.
        """
        x = hidden_states
        if self.correction_norm is not None:
            x = self.correction_norm(F.relu(x + heat_capacity, inplace=True))
        x = depthwise_conv3x3(self.depthwise_conv, x)
        gate_and_signal = [*reversed(apply_linear_halves(self.in_proj, x))]
        del x
        # Popped: no name may keep the signal in memory while its coefficients are computed.
        conducted = self.conduct(gate_and_signal, frequency_embedding)
        return apply_linear(self.out_proj, gated(self.out_norm(conducted), gate_and_signal.pop()))

    def conduct(self, signal: list[torch.Tensor], table: torch.Tensor) -> torch.Tensor:
        """Heat conduction of the last tensor of the list, which is taken from it, under a frequency embedding."""
        sources = (table, self.to_diffusivity.weight, self.to_diffusivity.bias)
        if is_compiling_inference(signal[-1]):
            if is_plain(self.to_diffusivity) and not self.training:
                return _opaque_conduct(signal.pop(), *sources, self.table_interpolation)
            height, width = signal[-1].shape[1:3]
            sources = (resize_table(table, height, width, self.table_interpolation), *sources[1:])
        return _conducted(signal, sources, None if self.training else self._decay_cache)


# Frequency embedding `(height, width, dim)`, and weight and bias of the linear that makes it the diffusivity.
_Sources = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _diffusivity(table: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(table.dtype, torch.float32)
    # exp(-k w^2) spans nine decades: half precision, also autocast's, would lose the slow frequencies.
    device_type = "cpu" if table.is_meta else table.device.type
    with torch.autocast(device_type=device_type, enabled=False):
        return F.relu(linear(table.to(dtype), weight.to(dtype), bias.to(dtype)))


def _decay(sources: _Sources, dtype: torch.dtype, cache: DerivedTensorCache | None) -> torch.Tensor:
    def compute() -> torch.Tensor:
        return decay_map(_diffusivity(*sources)).to(dtype)

    return compute() if cache is None else cache.get(sources, (dtype, sources[0].device), compute)


def _conducted(signal: list[torch.Tensor], sources: _Sources, cache: DerivedTensorCache | None) -> torch.Tensor:
    """Heat conduction of the last tensor of the list, which is taken from it."""
    _, height, width, channels = signal[-1].shape
    in_rows = not is_tracing() and signal[-1].device.type == "cpu" and overwritable(signal[-1])
    if not in_rows or height * width * channels < MAX_CACHED_VALUES:
        coefficients = dct2(signal.pop())
        return idct2(attenuated(coefficients, _decay(sources, coefficients.dtype, cache)))
    # A decay map too large to be kept is made, and all that happens along the width done, a few rows at a time.
    x = _along_height(_basis(signal[-1], 1), signal.pop())
    table, weight, bias = sources
    basis, inverse = _basis(x, 2), _basis(x, 2, inverse=True)
    frequencies = squared_frequencies(height, width, device=x.device)
    rows = max(1, VALUES_IN_CACHE // (4 * width * channels))
    for first in range(0, height, rows):
        part = slice(first, first + rows)
        decay = decay_map(_diffusivity(table[part], weight, bias), frequencies[part])
        x[:, part] = _along_width(inverse, _along_width(basis, x[:, part]).mul_(decay.to(x.dtype)))
    return _along_height(_basis(x, 1, inverse=True), x)


def resize_table(table: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
    """Resize a table indexed by frequency or position, `(rows, columns, dim)`, to `(height, width, dim)`.

    Keeps the relative frequency n / N. `mode` is "bicubic" (vHeat) or "bilinear" (RS-vHeat), corners not aligned, no
    antialiasing, computed in at least float32.
    """
    dtype = torch.promote_types(table.dtype, torch.float32)
    resized = F.interpolate(table.permute(2, 0, 1)[None].to(dtype), size=(height, width), mode=mode)
    return resized[0].permute(1, 2, 0).to(table.dtype).contiguous()


# Compiled code has no modules whose caches it could use: here tables and weights have their own.
_compiled_caches: MutableMapping[torch.Tensor, DerivedTensorCache] = WeakTensorKeyDictionary()


def _conduct(
    x: torch.Tensor, table: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, interpolation: str
) -> torch.Tensor:
    height, width = x.shape[1:3]
    if table.shape[:2] != x.shape[1:3]:
        cache = _compiled_caches.setdefault(table, DerivedTensorCache())
        stored = table
        table = cache.get((stored,), (height, width), lambda: resize_table(stored, height, width, interpolation))
    cache = _compiled_caches.setdefault(weight, DerivedTensorCache())
    return _conducted([x], (table, weight, bias), cache)


_opaque_conduct = opaque(_conduct, lambda x, table, weight, bias, interpolation: x.new_empty(x.shape))
