"""The selective scan in chunks: plain PyTorch, forward and backward, no more memory than a chunk of states.

Inside, the state is `(batch, state, channels)`: with channels last every operation runs over long contiguous rows. The
decay is `exp2(dt * A * log2(e))`, since `exp2` is several times faster than `exp` on CPUs and as exact here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# States stepped at once on a CPU; larger problems are cut into tiles of batch rows, then of channels. One step of a
# tile (128 KiB in float32) stays in the L2 cache and is long enough to hide PyTorch's cost per call.
TILE_STATES = 2**15
CHUNK_STATES = 2**20  # states of a chunk, 4 MiB in float32
MIN_CHUNK, MAX_CHUNK = 16, 256
SOFTPLUS_THRESHOLD = 20.0  # torch's default: identity above


@dataclass(frozen=True)
class ScanArguments:
    """Tensors of a scan in time order, channels last.

    Attributes:
        u, delta, z: Input, time step before bias and softplus, and gate (or None), `(batch, length, channels)`.
        A: `(channels, state)`.
        B, C: `(batch, length, state)`.
        D, delta_bias: `(channels,)` or None.
        initial_state: `(batch, channels, state)` or None for zeros.
        delta_softplus: Whether softplus is applied to `delta + delta_bias`.
    """

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None
    initial_state: torch.Tensor | None
    delta_softplus: bool

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor | None], delta_softplus: bool) -> "ScanArguments":
        """From `tensors`."""
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
        values: dict[str, Any] = dict(zip(names, tensors, strict=True))
        return cls(**values, delta_softplus=delta_softplus)

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All tensor fields, in order."""
        return (self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias, self.initial_state)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state: at least float32."""
        dtype = torch.float32
        for tensor in self.tensors:
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
        return dtype


def time_steps(delta: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    """dt = softplus(delta + bias), or without either."""
    delta = delta if bias is None else delta + bias
    return F.softplus(delta, threshold=SOFTPLUS_THRESHOLD) if softplus else delta


class _Tile:
    """A block of batch rows and channels: its inputs by chunk, and buffers for one chunk of states."""

    def __init__(self, arguments: ScanArguments, rows: slice, channels: slice) -> None:
        def cut(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x[rows, :, channels].transpose(0, 1)

        def widen(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x[channels].to(dtype)

        self.rows, self.channels, self.softplus = rows, channels, arguments.delta_softplus
        self.dtype = dtype = arguments.dtype
        self.u, self.delta, self.z = cut(arguments.u), cut(arguments.delta), cut(arguments.z)
        self.B, self.C = arguments.B[rows].transpose(0, 1), arguments.C[rows].transpose(0, 1)
        self.D, self.bias = widen(arguments.D), widen(arguments.delta_bias)
        self.A = arguments.A[channels].to(dtype).t().contiguous()
        self.A_log2 = self.A * math.log2(math.e)
        self.length: int = self.u.shape[0]
        shape = (self.u.shape[1], *self.A.shape)
        self.state = arguments.u.new_zeros(shape, dtype=dtype)
        if arguments.initial_state is not None:
            self.state.copy_(arguments.initial_state[rows, channels].transpose(1, 2))
        self.chunk = chunk_length(self.state.numel(), self.length)
        self.decay, self.states = (self.state.new_empty((self.chunk, *shape)) for _ in range(2))
        self.decay_steps, self.state_steps = self.decay.unbind(), self.states.unbind()

    def spans(self) -> list[tuple[int, slice]]:
        """Number and time span of every chunk."""
        return [(i, slice(start, start + self.chunk)) for i, start in enumerate(range(0, self.length, self.chunk))]

    def run(self, span: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Step the recurrence through a chunk, from `state`, which stays as it was, into `states`.

        Returns dt and u of the chunk, `(time, batch, channels)`.
        """
        u, dt = self.u[span].to(self.dtype), time_steps(self.delta[span].to(self.dtype), self.bias, self.softplus)
        steps = u.shape[0]
        decay = torch.mul(dt.unsqueeze(2), self.A_log2, out=self.decay[:steps])
        decay.exp2_()
        torch.mul((dt * u).unsqueeze(2), self.B[span].to(self.dtype).unsqueeze(3), out=self.states[:steps])
        previous = self.state
        for step in range(steps):
            previous = self.state_steps[step].addcmul_(self.decay_steps[step], previous)
        return dt, u

    def read_out(self, span: slice, u: torch.Tensor) -> torch.Tensor:
        """y before the gate, `(time, batch, channels)`, from the states of the chunk."""
        states = self.states[: u.shape[0]]
        y = torch.matmul(self.C[span].to(self.dtype).unsqueeze(2), states).squeeze(2)
        return y if self.D is None else y.addcmul_(u, self.D)


def chunk_length(states_per_step: int, length: int) -> int:
    """Time steps discretised at once: as many as keep a chunk of states in the cache."""
    return max(1, min(length, MAX_CHUNK, max(MIN_CHUNK, CHUNK_STATES // max(1, states_per_step))))


def _tiles(arguments: ScanArguments) -> Iterator[_Tile]:
    batch, _, channels = arguments.u.shape
    rows, width = batch, channels
    if arguments.u.device.type == "cpu":
        state = arguments.A.shape[1]
        rows = min(batch, max(1, TILE_STATES // (channels * state)))
        width = channels if rows > 1 else min(channels, max(1, TILE_STATES // state))
    for row in range(0, batch, rows):
        for channel in range(0, channels, width):
            yield _Tile(arguments, slice(row, row + rows), slice(channel, channel + width))


def scan_forward(
    arguments: ScanArguments, boundaries: list[torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan without autograd.

    Args:
        arguments: See [`ScanArguments`].
        boundaries: If given, the state before every chunk is appended, one `(chunks, batch, state, channels)` per tile.

    Returns:
        y `(batch, length, channels)` in the dtype of u, and the last state `(batch, channels, state)`.
    """
    u = arguments.u
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last_state = u.new_empty((u.shape[0], *arguments.A.shape), dtype=arguments.dtype)
    for tile in _tiles(arguments):
        out = y[tile.rows, :, tile.channels].transpose(0, 1)
        kept = None
        if boundaries is not None:
            kept = tile.state.new_empty((len(tile.spans()), *tile.state.shape))
            boundaries.append(kept)
        for index, span in tile.spans():
            if kept is not None:
                kept[index] = tile.state
            dt, u_chunk = tile.run(span)
            values = tile.read_out(span, u_chunk)
            if tile.z is not None:
                values.mul_(F.silu(tile.z[span].to(tile.dtype)))
            out[span] = values
            tile.state.copy_(tile.state_steps[dt.shape[0] - 1])
        last_state[tile.rows, tile.channels] = tile.state.transpose(1, 2)
    return y, last_state


class _Gradients:
    """Gradient buffers of a scan, in its dtype."""

    def __init__(self, arguments: ScanArguments) -> None:
        def zeros(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else torch.zeros(x.shape, dtype=arguments.dtype, device=x.device)

        self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.bias, self.state = map(
            zeros, arguments.tensors
        )

    def cast(self, arguments: ScanArguments) -> list[torch.Tensor | None]:
        """The gradients in the dtypes of the arguments."""
        buffers = (self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.bias, self.state)
        return [
            None if g is None else g.to(x.dtype)  # type: ignore[union-attr]
            for g, x in zip(buffers, arguments.tensors, strict=True)
        ]


def scan_backward(
    arguments: ScanArguments, boundaries: list[torch.Tensor], grad_y: torch.Tensor, grad_last: torch.Tensor
) -> list[torch.Tensor | None]:
    """Gradients of all tensors of the scan, recomputing the states chunk by chunk from the boundaries.

    With the adjoint state g_t = C_t dy_t + decay_(t+1) g_(t+1): dC_t = dy_t h_t, d(dt u B)_t = g_t and
    d(dt A)_t = g_t decay_t h_(t-1).
    """
    gradients = _Gradients(arguments)
    for tile, kept in zip(_tiles(arguments), boundaries, strict=True):
        incoming = grad_y[tile.rows, :, tile.channels].transpose(0, 1)
        carry = grad_last[tile.rows, tile.channels].to(tile.dtype).transpose(1, 2).contiguous()
        adjoint = torch.empty_like(tile.states)
        for index, span in reversed(tile.spans()):
            tile.state.copy_(kept[index])
            _chunk_backward(tile, span, incoming[span].to(tile.dtype), adjoint, carry, gradients)
        if gradients.state is not None:
            gradients.state[tile.rows, tile.channels] = carry.transpose(1, 2)
    return gradients.cast(arguments)


def _chunk_backward(
    tile: _Tile, span: slice, dy: torch.Tensor, adjoint: torch.Tensor, carry: torch.Tensor, gradients: _Gradients
) -> None:
    """Add a chunk's share to the gradients; `carry` holds the adjoint state coming from later chunks, then ours."""
    rows, channels = tile.rows, tile.channels
    dt, u = tile.run(span)
    steps = dt.shape[0]
    B, C = tile.B[span].to(tile.dtype), tile.C[span].to(tile.dtype)
    if tile.z is not None:
        z = tile.z[span].to(tile.dtype)
        gate = torch.sigmoid(z)
        grad_z = dy * tile.read_out(span, u) * gate * (1 + z * (1 - gate))
        gradients.z[rows, span, channels] = grad_z.transpose(0, 1)
        dy = dy * z * gate
    decay, states, g = tile.decay[:steps], tile.states[:steps], adjoint[:steps]
    torch.mul(dy.unsqueeze(2), C.unsqueeze(3), out=g)
    g[-1] += carry
    for step in range(steps - 2, -1, -1):
        g[step].addcmul_(decay[step + 1], g[step + 1])
    torch.mul(decay[0], g[0], out=carry)
    gradients.C[rows, span] += torch.matmul(states, dy.unsqueeze(3)).squeeze(3).transpose(0, 1)
    gradients.B[rows, span] += torch.matmul(g, (dt * u).unsqueeze(3)).squeeze(3).transpose(0, 1)
    grad_input = torch.matmul(B.unsqueeze(2), g).squeeze(2)
    # From here on `decay` holds d(dt A): the buffers are reused.
    exponent = decay.mul_(g)
    exponent[0] *= tile.state
    exponent[1:] *= states[:-1]
    gradients.A[channels] += torch.mul(exponent, dt.unsqueeze(2), out=states).sum((0, 1)).t()
    grad_dt = exponent.mul_(tile.A).sum(2).addcmul_(grad_input, u)
    grad_u = grad_input * dt
    if tile.D is not None:
        gradients.D[channels] += (dy * u).sum((0, 1))
        grad_u.addcmul_(dy, tile.D)
    if tile.softplus:
        grad_dt *= -torch.expm1(-dt)  # softplus' = sigmoid(x) = 1 - exp(-softplus(x)); 1 above the threshold
    if tile.bias is not None:
        gradients.bias[channels] += grad_dt.sum((0, 1))
    gradients.u[rows, span, channels] = grad_u.transpose(0, 1)
    gradients.delta[rows, span, channels] = grad_dt.transpose(0, 1)


class ChunkedScan(torch.autograd.Function):
    """[`scan_forward`] with gradients: keeps the inputs and one state per chunk, never all states."""

    @staticmethod
    def forward(ctx, delta_softplus: bool, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        boundaries: list[torch.Tensor] = []
        outputs = scan_forward(ScanArguments.of(tensors, delta_softplus), boundaries)
        ctx.delta_softplus, ctx.num_tensors = delta_softplus, len(tensors)
        ctx.save_for_backward(*tensors, *boundaries)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: torch.Tensor, grad_last: torch.Tensor):
        saved = ctx.saved_tensors
        arguments = ScanArguments.of(saved[: ctx.num_tensors], ctx.delta_softplus)
        return None, *scan_backward(arguments, list(saved[ctx.num_tensors :]), grad_y, grad_last)


def chunked_scan(arguments: ScanArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """y `(batch, length, channels)` and the last state `(batch, channels, state)`, differentiable (once)."""
    needs_grad = any(tensor is not None and tensor.requires_grad for tensor in arguments.tensors)
    if needs_grad and torch.is_grad_enabled():
        return ChunkedScan.apply(arguments.delta_softplus, *arguments.tensors)
    return scan_forward(arguments)
