"""What a benchmark of backbones says: a table, a chart, and whether a ratio has worsened since it was stored."""

import math
from pathlib import Path
from typing import Any

from ..errors import BenchmarkError, MissingExtraError

_HEADER = ("min ms", "median", "ratio", "M par.", "GMAC", "GMAC/s", "MB", "total MB")
_SETTINGS = ("image_size", "batch", "dtype", "compiled", "train", "device")


def table(result: dict[str, Any]) -> str:
    """The runs as text, and how time grows with the number of pixels where there are several sizes."""
    about = result["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['threads']} thread(s) of {about['cores']} {about['instructions']} cores ({about['device']}), load "
        f"{about['load']} to {result['load_after']}, {versions}; {result['repeats']} rounds, contestants taking turns"
    ]
    lines += result.get("notes", [])
    for run in result["runs"]:
        kind = "training step" if run["train"] else "inference"
        how = [kind, run["dtype"], *(["compiled"] if run["compiled"] else []), run["device"]]
        lines += ["", f"{run['image_size']} px, batch {run['batch']}, {', '.join(how)}", _line("", _HEADER)]
        lines += [_line(name, _cells(row)) for name, row in run["models"].items()]
    exponents = growth(result)
    if exponents:
        powers = ", ".join(f"{name} {exponent:.2f}" for name, exponent in exponents.items())
        lines += ["", f"time grows with the number of pixels to the power of: {powers}"]
    return "\n".join(lines)


def _cells(row: dict[str, float]) -> tuple[str, ...]:
    cells = [f"{1e3 * row['minimum']:.1f}", f"{1e3 * row['median']:.1f}", f"{row['ratio']:.3f}"]
    cells += [f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.2f}", f"{row['macs'] / row['minimum'] / 1e9:.0f}"]
    cells += [f"{row[key]:.0f}" if key in row else "" for key in ("above_start", "total")]
    return tuple(cells)


def _line(name: str, cells: tuple[str, ...]) -> str:
    return f"  {name:<32}" + "".join(f"{cell:>9}" for cell in cells).rstrip()


def growth(result: dict[str, Any]) -> dict[str, float]:
    """Exponent of time against pixels per model, between the smallest and the largest image of the first batch."""
    points: dict[str, list[tuple[int, float]]] = {}
    for run in result["runs"]:
        if run["batch"] == result["runs"][0]["batch"]:
            for name, row in run["models"].items():
                points.setdefault(name, []).append((run["image_size"], row["minimum"]))
    ends = {name: (runs[0], runs[-1]) for name, runs in points.items() if runs[0][0] != runs[-1][0]}
    return {
        name: math.log(last_time / first_time) / (2 * math.log(last_side / first_side))
        for name, ((first_side, first_time), (last_side, last_time)) in ends.items()
    }


def chart(result: dict[str, Any], path: Path) -> None:
    """Time per image against image side, one line per model, on logarithmic axes, as a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "viz", "A chart") from error
    batch = result["runs"][0]["batch"]
    runs = [run for run in result["runs"] if run["batch"] == batch]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = [run["image_size"] for run in runs]
    for name in runs[0]["models"]:
        axes.plot(sizes, [1e3 * run["models"][name]["minimum"] / batch for run in runs], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="image side, pixels", ylabel="milliseconds per image")
    axes.set_xticks(sizes, labels=[str(size) for size in sizes], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def check(result: dict[str, Any], stored: dict[str, Any], tolerance: float = 0.1) -> list[str]:
    """Compare the ratios of minima with a stored result.

    Returns:
        A line for each ratio that both results hold.

    Raises:
        BenchmarkError: A ratio is worse by more than `tolerance`, or the two have none in common.
    """
    before: dict[tuple, dict[str, Any]] = {}
    for run in stored["runs"]:
        before.setdefault(_key(run), {}).update(run["models"])
    lines, worse = [], []
    for run in result["runs"]:
        for name, row in run["models"].items():
            old = before.get(_key(run), {}).get(name)
            if old is None:
                continue
            ratios = f"ratio {row['ratio']:.3f}, was {old['ratio']:.3f}"
            lines.append(f"{run['image_size']} px, batch {run['batch']}, {name}: {ratios}")
            if row["ratio"] > (1 + tolerance) * old["ratio"]:
                worse.append(lines[-1])
    if not lines:
        raise BenchmarkError("The stored result has no run and model in common with this one: use the same options.")
    if worse:
        raise BenchmarkError(f"Worse by more than {tolerance:.0%}:\n" + "\n".join(worse))
    return lines


def _key(run: dict[str, Any]) -> tuple:
    return tuple(run[name] for name in _SETTINGS)
