"""The selective scan as a graph of fixed size, for `torch.compile`, `torch.export` and ONNX.

A Python loop would be unrolled into one node per token. Here it is a higher-order operator: `scan` over chunks of
`TRACED_CHUNK` tokens (ONNX: one `Scan` node), or `associative_scan` over all tokens (a log-depth kernel on CUDA).
Both are the exact recurrence: nothing is divided by a product of decays, so large time steps are safe.
"""

import torch
import torch.nn.functional as F

from .selective_scan_chunks import ScanArguments, time_steps

TRACED_CHUNK = 16


def _prepare(arguments: ScanArguments) -> tuple[torch.Tensor, ...]:
    dtype = arguments.dtype
    u, B, C = (x.to(dtype) for x in (arguments.u, arguments.B, arguments.C))
    bias = None if arguments.delta_bias is None else arguments.delta_bias.to(dtype)
    dt = time_steps(arguments.delta.to(dtype), bias, arguments.delta_softplus)
    A = arguments.A.to(dtype).t().contiguous()
    if arguments.initial_state is None:
        state = torch.zeros((u.shape[0], *A.shape), dtype=dtype, device=u.device)
    else:
        state = arguments.initial_state.to(dtype).transpose(1, 2).contiguous()
    return u, dt, A, B, C, state


def _finish(arguments: ScanArguments, y: torch.Tensor) -> torch.Tensor:
    if arguments.D is not None:
        y = y + arguments.u.to(y.dtype) * arguments.D.to(y.dtype)
    if arguments.z is not None:
        y = y * F.silu(arguments.z.to(y.dtype))
    return y.to(arguments.u.dtype)


def chunk_scan_graph(arguments: ScanArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """[`chunked_scan`] with torch's `scan` operator; the graph does not grow with the number of tokens."""
    from torch._higher_order_ops.scan import scan  # a prototype in torch: imported only where it is used

    u, dt, A, B, C, state = _prepare(arguments)
    batch, length, channels = u.shape
    padding = -length % TRACED_CHUNK  # a time step of zero changes no state

    def chunks(x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 0, 0, padding))
        return x.reshape(batch, -1, TRACED_CHUNK, x.shape[-1]).transpose(0, 1).contiguous()

    def run_chunk(state: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        dt, x, B, C = inputs
        decays = torch.exp(dt[:, :, None] * A).unbind(1)
        additions = (x[:, :, None] * B[..., None]).unbind(1)
        states = []
        for decay, addition in zip(decays, additions, strict=True):
            state = torch.addcmul(addition, decay, state)
            states.append(state)
        # A sum of products, not a matmul: the views of a batched matmul do not survive the scan's own tracing.
        return state.clone(), (C[..., None] * torch.stack(states, 1)).sum(2)

    state, y = scan(run_chunk, state, (chunks(dt), chunks(dt * u), chunks(B), chunks(C)))
    y = y.transpose(0, 1).contiguous().reshape(batch, length + padding, channels)[:, :length]
    return _finish(arguments, y), state.transpose(1, 2)


def associative_scan_graph(arguments: ScanArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """[`chunked_scan`] with torch's `associative_scan`; holds all states at once, so it is meant for compiled CUDA."""
    from torch._higher_order_ops.associative_scan import associative_scan

    u, dt, A, B, C, state = _prepare(arguments)
    decay = torch.exp(dt[:, :, None] * A)
    inputs = (dt * u)[:, :, None] * B[..., None]
    # The initial state enters as an input before the first token.
    inputs = torch.cat(((inputs[:, :1] + decay[:, :1] * state[:, None]), inputs[:, 1:]), dim=1)

    def combine(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    mode = "pointwise" if u.device.type == "cuda" else "generic"
    _, states = associative_scan(combine, (decay, inputs), dim=1, combine_mode=mode)
    y = (C[..., None] * states).sum(2)
    return _finish(arguments, y), states[:, -1].transpose(1, 2)
