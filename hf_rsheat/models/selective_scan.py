"""Selective scan of a diagonal state-space model (Mamba, arXiv 2312.00752, algorithm 2), on any device.

    dt_t = softplus(delta_t + delta_bias)
    h_t  = exp(dt_t A) * h_(t-1) + dt_t * u_t * B_t          zero-order hold for A, Euler for B
    y_t  = (C_t . h_t + D * u_t) * silu(z_t)

Per channel, A holds one negative rate per state; B and C are shared by all channels.
"""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache

import torch

from .selective_scan_chunks import ScanArguments, chunked_scan
from .selective_scan_traced import associative_scan_graph, chunk_scan_graph

logger = logging.getLogger(__name__)

SCAN_BACKENDS = ("auto", "torch", "associative", "kernels")
KERNEL_REPOSITORY, KERNEL_VERSION = "kernels-community/mamba-ssm", 4


class ScanBackendError(ValueError):
    """A scan backend that was asked for does not exist here; the message says what to install or to choose."""


@cache
def _say_once(message: str, level: int) -> None:
    logger.log(level, message)


@cache
def _kernel_scan() -> Callable:
    """`selective_scan_fn` of mamba-ssm's CUDA kernels, from the `kernels` package."""
    try:
        from kernels import get_kernel

        return get_kernel(KERNEL_REPOSITORY, version=KERNEL_VERSION).selective_scan_fn
    except Exception as error:
        raise ScanBackendError(
            f"The CUDA kernels {KERNEL_REPOSITORY} could not be loaded ({type(error).__name__}: {error}). Install the "
            "`kernels` package and check that it can reach the Hub, or use scan_backend='torch'."
        ) from error


@torch.compiler.assume_constant_result
def choose_implementation(backend: str, device_type: str, traced: bool, exported: bool, has_state: bool) -> str:
    """The implementation behind a backend: "chunks", "scan graph", "associative" or "kernels"; said once in the log.

    Args:
        backend: One of `SCAN_BACKENDS`. "auto" is: traced, `torch.associative_scan` on CUDA (not in exports) and a scan
            over chunks elsewhere; not traced, the CUDA kernels where the `kernels` package is installed; else "torch".
        device_type: "cpu", "cuda", ...
        traced, exported: Whether `torch.compile` or `torch.export`, or just the latter, records the program.
        has_state: Whether an initial state is given, which the kernels cannot take.

    Raises:
        ScanBackendError: The backend is unknown, or asked for and not available.
    """
    if backend not in SCAN_BACKENDS:
        raise ScanBackendError(f"scan_backend={backend!r} is unknown: choose one of {', '.join(SCAN_BACKENDS)}.")
    plain = "scan graph" if traced else "chunks"
    if backend == "kernels":
        if device_type != "cuda" or has_state or exported:
            reason = "need CUDA tensors" if device_type != "cuda" else "take no initial state and cannot be exported"
            raise ScanBackendError(f"The mamba-ssm kernels {reason}: use scan_backend='auto' or 'torch'.")
        _kernel_scan()
        chosen = "kernels"
    elif backend != "auto":
        chosen = {"torch": plain, "associative": "associative"}[backend]
    elif device_type != "cuda" or has_state or exported:
        chosen = plain
    else:
        chosen = "associative" if traced else _kernels_or_chunks()
    _say_once(f"Selective scan on {device_type}: scan_backend={backend!r} uses {chosen!r}.", logging.INFO)
    return chosen


def _kernels_or_chunks() -> str:
    advice = f"Selective scan on CUDA runs in plain PyTorch; for the fast kernels ({KERNEL_REPOSITORY}) "
    if importlib.util.find_spec("kernels") is None:
        _say_once(advice + "run `pip install kernels`.", logging.WARNING)
        return "chunks"
    try:
        _kernel_scan()
    except ScanBackendError as error:
        _say_once(f"{advice}see: {error}", logging.WARNING)
        return "chunks"
    return "kernels"


def _kernels(arguments: ScanArguments) -> tuple[torch.Tensor, torch.Tensor]:
    def swap(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.to(arguments.u.dtype).transpose(1, 2).contiguous()

    def widen(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.float()

    y, last_state = _kernel_scan()(
        swap(arguments.u),
        swap(arguments.delta),
        arguments.A.float(),
        swap(arguments.B),
        swap(arguments.C),
        widen(arguments.D),
        z=swap(arguments.z),
        delta_bias=widen(arguments.delta_bias),
        delta_softplus=arguments.delta_softplus,
        return_last_state=True,
    )
    return y.transpose(1, 2), last_state


IMPLEMENTATIONS: dict[str, Callable[[ScanArguments], tuple[torch.Tensor, torch.Tensor]]] = {
    "chunks": chunked_scan,
    "scan graph": chunk_scan_graph,
    "associative": associative_scan_graph,
    "kernels": _kernels,
}


def _check_shapes(arguments: ScanArguments) -> None:
    batch, length, channels = arguments.u.shape
    state = arguments.A.shape[-1]
    expected = {
        "delta": (arguments.delta, (batch, length, channels)),
        "A": (arguments.A, (channels, state)),
        "B": (arguments.B, (batch, length, state)),
        "C": (arguments.C, (batch, length, state)),
        "D": (arguments.D, (channels,)),
        "z": (arguments.z, (batch, length, channels)),
        "delta_bias": (arguments.delta_bias, (channels,)),
        "initial_state": (arguments.initial_state, (batch, channels, state)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)} (length before channels), which does not fit u with "
                f"(batch, length, channels) = {(batch, length, channels)} and A with {state} states: expected {shape}."
            )
    if length == 0:
        raise ValueError("`u` has no time steps: the scan needs a length of at least 1.")


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: torch.Tensor | None = None,
    return_last_state: bool = False,
    *,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Selective scan; see the head of this file for the equations.

    Any memory layout works. Fastest are views of tensors laid out `(batch, length, channels)`, which is how linear
    layers write them: then nothing is copied.

    Args:
        u: Input, `(batch, channels, length)`.
        delta: Time step, same shape, before bias and softplus.
        A: Rates, `(channels, state)`, negative for a state that decays.
        B, C: Input and output weights, `(batch, state, length)`.
        D: Skip connection, `(channels,)`.
        z: Gate, `(batch, channels, length)`; SiLU is applied to it.
        delta_bias: Added to `delta`, `(channels,)`.
        delta_softplus: Whether `softplus(delta + delta_bias)` is the time step.
        initial_state: `(batch, channels, state)`; zeros if `None`.
        return_last_state: Also return the state after the last step.
        backend: "auto", "torch", "associative" or "kernels"; see [`choose_implementation`].

    Returns:
        y, shape and dtype of `u`; and, on request, the last state `(batch, channels, state)`. States are float32
        (float64 if any input is), also under autocast.

    Raises:
        ScanBackendError: The backend is unknown or not available.
        ValueError: The shapes do not fit.
    """

    def swap(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.transpose(1, 2)

    time_major = (swap(x) for x in (u, delta, B, C, z))
    u_, delta_, B_, C_, z_ = time_major
    arguments = ScanArguments(u_, delta_, A, B_, C_, D, z_, delta_bias, initial_state, delta_softplus)
    _check_shapes(arguments)
    traced, exported = torch.compiler.is_compiling(), torch.compiler.is_exporting()
    name = choose_implementation(backend, u.device.type, traced, exported, initial_state is not None)
    with torch.autocast(device_type="cpu" if u.is_meta else u.device.type, enabled=False):
        y, last_state = IMPLEMENTATIONS[name](arguments)
    y = y.transpose(1, 2)
    return (y, last_state) if return_last_state else y
