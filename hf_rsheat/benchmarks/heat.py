"""`hf-rsheat bench heat`: the heat conduction operator alone, beside its restated original and an FFT.

The operator is that of vHeat-T's first stage: a map of a quarter of the image's side with 96 channels. Its core, from
signal to conducted signal, is measured apart as well, since only there do the ways to compute a DCT differ.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import ConfigurationError
from ..models.heat_conduction import HeatConduction, conduct_heat
from .measure import conditions, in_fresh_process, load, peak_memory, summary, take_turns
from .vheat_reference import heat_of_original, transform_of_original

STRIDE = 4  # of vHeat's stem
CONTESTANTS = ("operator: original restated", "operator", "core: original restated", "core: FFT", "core")


@dataclass(frozen=True)
class HeatRun:
    """One contest.

    Attributes:
        image_size: Side of the image in pixels; the map has a quarter of it.
        batch: Maps at once.
        channels: Of the map.
        threads: Threads of PyTorch.
    """

    image_size: int
    batch: int = 1
    channels: int = 96
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("batch", "channels", "threads"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.image_size < STRIDE or self.image_size % STRIDE:
            raise ConfigurationError(f"`image_size` is a multiple of {STRIDE} pixels, got {self.image_size}.")

    @property
    def side(self) -> int:
        """Side of the map."""
        return self.image_size // STRIDE

    def macs(self, contestant: str) -> float:
        """Multiply-adds of our way: four products with a DCT matrix; the operator's 3x3 and linear maps on top.

        The FFT needs fewer, so that its rate is to be read as that of a matrix product as fast as it.
        """
        values = self.batch * self.side**2 * self.channels
        core = 4 * values * self.side
        return core if contestant.startswith("core") else core + values * (9 + 3 * self.channels)


def dct2_by_fft(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Orthonormal DCT-II along an axis by a Fourier transform of the same length (Makhoul 1980)."""
    x = x.movedim(dim, -1)
    size = x.shape[-1]
    spectrum = torch.fft.fft(torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), dim=-1))
    result = (spectrum * _twiddles(size)).real * (2 / size) ** 0.5
    result[..., 0] *= 0.5**0.5
    return result.movedim(-1, dim)


def idct2_by_fft(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Inverse of [`dct2_by_fft`]."""
    x = x.movedim(dim, -1) * (x.shape[dim] / 2) ** 0.5
    size = x.shape[-1]
    x = torch.cat((x[..., :1] * 2**0.5, x[..., 1:]), dim=-1)
    mirrored = torch.cat((torch.zeros_like(x[..., :1]), x[..., 1:].flip(-1)), dim=-1)
    folded = torch.fft.ifft(torch.complex(x, -mirrored) * _twiddles(size).conj()).real
    result = torch.empty_like(folded)
    result[..., ::2], result[..., 1::2] = folded[..., : (size + 1) // 2], folded[..., (size + 1) // 2 :].flip(-1)
    return result.movedim(-1, dim)


def _twiddles(size: int) -> torch.Tensor:
    return torch.polar(torch.ones(size), -torch.pi * torch.arange(size) / (2 * size))


def contestants(run: HeatRun) -> dict[str, Callable[[], torch.Tensor]]:
    """The ways to compute, on the same map; those of a group return the same, the restated operator channels first."""
    torch.set_num_threads(run.threads)
    torch.manual_seed(0)
    operator = HeatConduction(run.channels).eval().requires_grad_(False)
    table = torch.rand(run.side, run.side, run.channels)
    x = torch.randn(run.batch, run.side, run.side, run.channels)
    channels_first = x.permute(0, 3, 1, 2).contiguous()
    decay = operator.decay(table, x.dtype)

    def by_fft() -> torch.Tensor:
        coefficients = dct2_by_fft(dct2_by_fft(x, 1), 2).mul_(decay)
        return idct2_by_fft(idct2_by_fft(coefficients, 2), 1)

    runs = (
        lambda: heat_of_original(operator, channels_first, table),
        lambda: operator(x, table),
        lambda: transform_of_original(transform_of_original(x) * decay, inverse=True),
        by_fft,
        lambda: conduct_heat(x, decay),
    )
    return dict(zip(CONTESTANTS, runs, strict=True))


@torch.inference_mode()
def bench_heat(
    sizes: Sequence[int],
    batches: Sequence[int] = (1,),
    *,
    channels: int = 96,
    threads: int = 1,
    repeats: int = 5,
    memory: bool = True,
) -> dict[str, Any]:
    """Every contestant at every size and batch, in float32 on the CPU.

    Args:
        sizes: Sides of the images in pixels; maps have a quarter of them.
        batches: Maps at once.
        channels: Of the map.
        threads: Threads of PyTorch.
        repeats: Timed rounds, after one that is not timed.
        memory: Whether to measure memory as well, one process per contestant.

    Returns:
        As [`bench_backbone`]; `notes` hold the machine's rates and how long either would need at least.
    """
    if repeats < 1 or not sizes or not batches:
        raise ConfigurationError("A benchmark needs at least one size, batch and round.")
    torch.set_num_threads(threads)
    product, copy = _rates()
    notes = [f"matrix products {product / 1e9:.0f} GMAC/s, copies {copy / 1e9:.1f} GB/s (read and written), float32"]
    result: dict[str, Any] = {"conditions": conditions(), "repeats": repeats, "runs": [], "notes": notes}
    for size in sizes:
        for batch in batches:
            run = HeatRun(size, batch, channels, threads)
            rows = summary(take_turns(contestants(run), repeats))
            for name, row in rows.items():
                row |= {"parameters": 0, "macs": run.macs(name)}
                if memory:
                    row |= in_fresh_process("hf_rsheat.benchmarks.heat", [name, asdict(run)])
            settings = {"dtype": "float32", "compiled": False, "train": False, "device": "cpu"}
            result["runs"].append({**asdict(run), **settings, "models": rows})
            notes.append(f"{size} px, batch {batch}: {_limits(run, product, copy)}")
    result["load_after"] = load()
    return result


def _rates() -> tuple[float, float]:
    """Multiply-adds and bytes per second of the best of a few large products and copies."""
    a, b = torch.randn(2048, 2048), torch.randn(2**25)
    target = torch.empty_like(b)

    def fastest(call: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return 2048**3 / fastest(lambda: torch.nn.functional.linear(a, a)), 8 * 2**25 / fastest(lambda: target.copy_(b))


def _limits(run: HeatRun, product: float, copy: float) -> str:
    """The least time by arithmetic, and by reading the map and writing the result once."""
    moved = 8 * run.batch * run.side**2 * run.channels
    by_group = [f"{name} {1e3 * run.macs(name) / product:.2f} ms" for name in ("operator", "core")]
    return f"at least {' and '.join(by_group)} by arithmetic, {1e3 * moved / copy:.2f} ms by memory"


if __name__ == "__main__":
    _name, _run = json.loads(sys.argv[1])
    with torch.inference_mode():
        print(json.dumps(peak_memory(contestants(HeatRun(**_run))[_name])))
