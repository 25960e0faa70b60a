"""Training steps through `torch.compile`: what is compiled, what it needs, and errors that say what to do."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError, TrainingError

MAX_GRAPHS = 1000
"""Graphs of one function. PyTorch's limit of 8 would be met by a few batch sizes, and then it computes uncompiled."""


def check_compiler(device: torch.device) -> None:
    """Make sure that there is a C++ compiler, which inductor needs for a CPU.

    Raises:
        ConfigurationError: If there is none.
    """
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # the question inductor itself asks, `CXX` included
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigurationError(
            "torch_compile needs a C++ compiler on a CPU, and there is none: install g++ (Debian, Ubuntu: `apt-get "
            "install g++`), name another one in the environment variable CXX, or set torch_compile to false."
        ) from error


def compile_parts(parts: Iterable[nn.Module]) -> None:
    """Have a model or parts of it compute through inductor, in place, so that the names of the weights stay.

    Every shape gets a graph of its own: a graph whose sizes are variables depends on the sizes that were seen first,
    and a resumed run, which sees others first, might compute other last bits. Dropout and drop path are drawn by
    PyTorch as without compiling, so that both runs draw the same.
    """
    for part in parts:
        part.compile(dynamic=False, options={"fallback_random": True})


@contextmanager
def compiled_steps() -> Iterator[None]:
    """While this lasts, what cannot be compiled ends the run.

    Raises:
        TrainingError: If a graph cannot be compiled or loaded; it names the caches that may be damaged.
    """
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import CppCompileError

    settings: dict[str, Any] = {
        "recompile_limit": MAX_GRAPHS,
        "accumulated_recompile_limit": MAX_GRAPHS,
        "fail_on_recompile_limit_hit": True,
        "capture_scalar_outputs": True,  # without it inductor (seen in 2.15) cannot take RS4D's scan apart
    }
    try:
        with config.patch(settings):
            yield
    except (TorchDynamoException, FailOnRecompileLimitHit, CppCompileError) as error:
        raise TrainingError(_advice(error)) from error


def uncompiled() -> AbstractContextManager[None]:
    """A context in which a compiled model computes as if it were none: for pictures and evaluations of other shapes."""
    return torch.compiler.set_stance("force_eager")


def _advice(error: BaseException) -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    folders = dict.fromkeys((cache_dir(), default_cache_dir()))  # precompiled headers always lie in the latter
    return (
        f"torch_compile failed: {_reason(error)} A run that was killed while it compiled may leave half a file: "
        f"delete {' and '.join(folders)} and continue with --resume, or set torch_compile to false."
    )


def _reason(error: BaseException) -> str:
    """The line of a compiler's output that names the error, or the first line of the message."""
    cause = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    return next((line for line in lines if "error:" in line), lines[0]).rstrip(".") + "."
