"""`hf-rsheat bench scan`: our selective scan beside transformers', on the same tensors.

Times are taken in one process, contestant after contestant in every round, so that whatever else the machine does falls
on all of them; memory in a fresh process each. What counts is the ratio.
"""

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..errors import ConfigurationError
from .measure import in_fresh_process, load, peak_memory, take_turns

OURS, THEIRS = "hf_rsheat", "transformers"
GROUPS = ("scan", "mixer")
HIDDEN_SIZE = 256  # of all published RS4D sizes


@dataclass(frozen=True)
class ScanSize:
    """Size of a scan; the defaults are one layer of RS4D-base at 1024 px, both directions.

    Attributes:
        batch: Sequences.
        length: Time steps.
        channels: Inner channels.
        state: States per channel.
        threads: Threads of PyTorch.
        backend: Our `scan_backend`.
    """

    batch: int = 2
    length: int = 4096
    channels: int = 512
    state: int = 16
    threads: int = 1
    backend: str = "torch"

    def __post_init__(self) -> None:
        for name in ("batch", "length", "channels", "state", "threads"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"`{name}` must be positive, got {getattr(self, name)}.")


def _scan(size: ScanSize) -> dict[str, Callable[[], torch.Tensor]]:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    from ..models.selective_scan import selective_scan

    def channels_last(width: int) -> torch.Tensor:
        return torch.randn(size.batch, size.length, width).transpose(1, 2)

    u, delta, z = (channels_last(size.channels) for _ in range(3))
    B, C = (channels_last(size.state) for _ in range(2))
    A = -torch.arange(1.0, size.state + 1).repeat(size.channels, 1)
    D, bias = torch.ones(size.channels), torch.full((size.channels,), -3.0)
    arguments = (u, delta, A, B, C, D, z, bias, True)
    return {
        OURS: lambda: selective_scan(*arguments, backend=size.backend),
        THEIRS: lambda: mamba_selective_scan(*arguments),
    }


def _mixer(size: ScanSize) -> dict[str, Callable[[], torch.Tensor]]:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    from ..models.configuration_rs4d import RS4DConfig
    from ..models.rs4d_mixer import RS4DMixer

    sizes: dict[str, Any] = {"hidden_size": HIDDEN_SIZE, "state_size": size.state, "num_hidden_layers": 1}
    config = MambaConfig(**sizes, time_step_rank=16, use_bias=False)
    config.intermediate_size = size.channels
    theirs = MambaMixer(config, 0).eval()
    ours_config = RS4DConfig(**sizes, inner_size=size.channels, path_type="forward", scan_backend=size.backend)
    ours = RS4DMixer(ours_config).eval()
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randn(size.batch, size.length, HIDDEN_SIZE)
    return {OURS: lambda: ours(tokens), THEIRS: lambda: theirs(tokens)}


def _contestants(group: str, size: ScanSize) -> dict[str, Callable[[], torch.Tensor]]:
    if group not in GROUPS:
        raise ConfigurationError(f"A benchmark is one of {', '.join(GROUPS)}, got {group!r}.")
    torch.set_num_threads(size.threads)
    torch.manual_seed(0)
    return {"scan": _scan, "mixer": _mixer}[group](size)


@torch.no_grad()
def measure_time(group: str, size: ScanSize, repeats: int) -> dict[str, Any]:
    """Seconds of every round and contestant, and how far our output is from theirs.

    Args:
        group: "scan" or "mixer" (projections, convolution and scan).
        size: Of the input.
        repeats: Rounds, after one that is not counted.
    """
    contestants = _contestants(group, size)
    first = {name: run() for name, run in contestants.items()}
    seconds = take_turns(contestants, repeats, warmup=0)
    difference = (first[OURS] - first[THEIRS]).abs().max() / first[THEIRS].abs().max()
    return {"seconds": seconds, "relative_difference": difference.item()}


def memory_in_fresh_process(group: str, contestant: str, size: ScanSize) -> dict[str, float]:
    """Peak memory of one run in a fresh process, see [`peak_memory`]."""
    return in_fresh_process("hf_rsheat.benchmarks.scan", [group, contestant, asdict(size)])


def bench_scan(size: ScanSize | None = None, *, repeats: int = 5, memory: bool = True) -> dict[str, Any]:
    """Time and memory of our scan and mixer beside transformers'.

    Args:
        size: Of the input; one layer of RS4D-base at 1024 px if `None`.
        repeats: Timed rounds.
        memory: Whether to measure memory as well, one process per contestant.

    Returns:
        The size, load, versions, and per group and contestant `minimum` and `median` seconds, `speedup` (their minimum
        over ours, likewise with medians) and megabytes.
    """
    size = size or ScanSize()
    if repeats < 1:
        raise ConfigurationError(f"`repeats` must be positive, got {repeats}.")
    result: dict[str, Any] = {"size": asdict(size), "load": load(), "torch": torch.__version__, "groups": {}}
    for group in GROUPS:
        result["groups"][group] = _bench_group(group, size, repeats, memory)
    result["load_after"] = load()
    return result


def _bench_group(group: str, size: ScanSize, repeats: int, memory: bool) -> dict[str, Any]:
    timed = measure_time(group, size, repeats)
    rows: dict[str, dict[str, float]] = {
        name: {"minimum": min(values), "median": statistics.median(values)} for name, values in timed["seconds"].items()
    }
    values: dict[str, Any] = {f"speedup_{key}": rows[THEIRS][key] / rows[OURS][key] for key in ("minimum", "median")}
    if memory:
        for name, row in rows.items():
            peaks = memory_in_fresh_process(group, name, size)
            row |= {f"megabytes_{key}": value for key, value in peaks.items()}
        values["memory_share"] = rows[OURS]["megabytes_above_start"] / max(rows[THEIRS]["megabytes_above_start"], 1e-3)
    return {"contestants": rows, **values, "relative_difference": timed["relative_difference"]}


def report(result: dict[str, Any]) -> str:
    """The result as text."""
    size = result["size"]
    lines = [
        f"batch {size['batch']}, length {size['length']}, channels {size['channels']}, state {size['state']}; "
        f"{size['threads']} thread(s), load {result['load']} to {result['load_after']} on {os.cpu_count()} cores, "
        f"torch {result['torch']}"
    ]
    for group, values in result["groups"].items():
        lines.append(f"{group} (outputs differ by {values['relative_difference']:.1e} of the largest value)")
        for name, row in values["contestants"].items():
            memory = ""
            if "megabytes_total" in row:
                memory = f", {row['megabytes_above_start']:.0f} MB above start, {row['megabytes_total']:.0f} MB in all"
            lines.append(f"  {name:<14}{row['minimum']:.4f} s minimum, {row['median']:.4f} s median{memory}")
        share = f", {values['memory_share']:.3f} of the memory" if "memory_share" in values else ""
        speed = f"{values['speedup_minimum']:.1f} (minima), {values['speedup_median']:.1f} (medians)"
        lines.append(f"  ours is faster by {speed}{share}")
    return "\n".join(lines)


if __name__ == "__main__":
    _group, _contestant, _size = json.loads(sys.argv[1])
    with torch.no_grad():
        print(json.dumps(peak_memory(_contestants(_group, ScanSize(**_size))[_contestant])))
