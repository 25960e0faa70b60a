"""The redundancy report as files: a self-contained HTML page, PNGs, CSV and JSON."""

import base64
import csv
import html
import json
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingExtraError
from .measures import correlation_matrix
from .published import RETENTION_BY_COMPUTE, RETENTION_BY_MODEL

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtraError("matplotlib", "viz", "The redundancy report") from error

GREY = "0.75"
MAX_MATRICES = 6
_NAMES = {"knn": "k-NN", "linear": "linear probe"}
_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Redundancy of $model</title>
<style>body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.2rem .6rem;text-align:right}
tr:nth-child(even){background:#f4f4f4}img{max-width:100%}</style></head><body>
<h1>Redundancy of $model</h1>
<p>$images images of $dataset, $classes classes. $settings</p>
<p>Intervals are 95 % (corrected resampled t, paired by fold). Latency is relative to the full model, measured in turns
with it. Grey: published values of other models on other data (arXiv 2601.22841), for orientation.</p>
<table><tr>$head</tr>$body</table>
$figures
</body></html>
""")


def write_report(report: dict[str, Any], features_of: Callable[[float], NDArray[np.float32]], output: Path) -> None:
    """Write `report.json`, `report.csv`, the figures as PNG, and `report.html` with all of it.

    Args:
        report: Result of `redundancy`.
        features_of: Width -> features `(images, dimensions)`.
        output: Folder to write.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    table = [table_row(row) for row in report["rows"]]
    with (output / "report.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    figures = {
        "accuracy": _accuracy_figure(report),
        "latency": _latency_figure(report["rows"]),
        "measures": _measures_figure(report["rows"]),
        "correlation": _correlation_figure(report["rows"], features_of),
    }
    for name, figure in figures.items():
        figure.savefig(output / f"{name}.png", dpi=120, bbox_inches="tight")
    (output / "report.html").write_text(_page(report, table, list(figures), output), encoding="utf-8")


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """A width as flat columns."""
    flat = {
        "width": row["width"],
        "units": json.dumps(row["units"]),
        "mflops": row["flops"] / 1e6,
        "compute": row["compute"],
        "parameters": row["parameters"],
        "relative_latency": row["relative_latency"],
    }
    for probe in (name for name in _NAMES if name in row):
        for measure, value in row[probe].items():
            flat[f"{probe}_{measure}"] = value["value"]
            flat[f"{probe}_{measure}_low"], flat[f"{probe}_{measure}_high"] = value["interval95"]
    for name in ("feature_correlation", "explained_variance_slope", "effective_dimensionality", "dead_dimensions"):
        flat[name] = row[name]
    return flat


def _probes(rows: list[dict[str, Any]]) -> list[str]:
    return [name for name in _NAMES if name in rows[0]]


def _accuracy_figure(report: dict[str, Any]) -> Figure:
    rows = report["rows"]
    compute = [row["compute"] for row in rows]
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for column, scale in enumerate(("linear", "log")):
        for probe in _probes(rows):
            for axis, measure in ((axes[0, column], "accuracy"), (axes[1, column], "retention")):
                value = np.array([row[probe][measure]["value"] for row in rows])
                spread = np.array([row[probe][measure]["interval95"] for row in rows])
                axis.plot(compute, value, "o-", label=_NAMES[probe])
                axis.fill_between(compute, *spread.T, alpha=0.15)
        if "untrained_accuracy" in rows[0].get("knn", {}):
            untrained = [row["knn"]["untrained_accuracy"]["value"] for row in rows]
            axes[0, column].plot(compute, untrained, ":", color="black", label="k-NN, untrained")
        _draw_published(axes[1, column])
        for axis, label in ((axes[0, column], "accuracy"), (axes[1, column], "share of the full model's accuracy")):
            axis.set(xscale=scale, xlabel="compute relative to the full model", ylabel=label)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.suptitle(f"{report['model']['name']} on {report['dataset']['name']}")
    return figure


def _draw_published(axis: Any) -> None:
    for points in RETENTION_BY_MODEL.values():
        axis.plot(*zip(*points, strict=True), ".", color=GREY, zorder=0)
    for (name, points), style in zip(RETENTION_BY_COMPUTE.items(), ("-", "--", ":"), strict=True):
        middles = [(low + 0.05, retention) for low, retention in points]
        axis.plot(*zip(*middles, strict=True), style, color=GREY, zorder=0, label=f"published: {name}")


def _latency_figure(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    width = [row["width"] for row in rows]
    axis.plot(width, [row["relative_latency"] for row in rows], "o-", label="latency")
    axis.plot(width, [row["compute"] for row in rows], "--", color="grey", label="operations")
    axis.set(xlabel="width", ylabel="relative to the full model", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def _measures_figure(rows: list[dict[str, Any]]) -> Figure:
    names = {
        "feature_correlation": "mean feature correlation",
        "explained_variance_slope": "slope of log explained variance",
        "effective_dimensionality": "effective dimensionality",
    }
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axis, (name, label) in zip(figure.subplots(1, 3), names.items(), strict=True):
        axis.plot([row["compute"] for row in rows], [row[name] for row in rows], "o-")
        axis.set(xlabel="compute relative to the full model", ylabel=label)
        axis.grid(alpha=0.3)
    return figure


def _correlation_figure(rows: list[dict[str, Any]], features_of: Callable[[float], NDArray[np.float32]]) -> Figure:
    chosen = [rows[i] for i in sorted({round(i) for i in np.linspace(0, len(rows) - 1, min(MAX_MATRICES, len(rows)))})]
    figure = Figure(figsize=(3 * len(chosen), 3.2), layout="constrained")
    axes = figure.subplots(1, len(chosen), squeeze=False)[0]
    for axis, row in zip(axes, chosen, strict=True):
        image = axis.imshow(np.abs(correlation_matrix(features_of(row["width"]))), vmin=0, vmax=1, cmap="magma")
        axis.set(title=f"width {row['width']:g}", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, label="|correlation|")
    return figure


def _page(report: dict[str, Any], table: list[dict[str, Any]], figures: list[str], output: Path) -> str:
    columns = [name for name in table[0] if not name.endswith(("_low", "_high")) and name != "units"]
    body = "".join(f"<tr>{''.join(f'<td>{_cell(row, name)}</td>' for name in columns)}</tr>" for row in table)
    pictures = (base64.b64encode((output / f"{name}.png").read_bytes()).decode() for name in figures)
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items() if value is not None)
    return _PAGE.substitute(
        model=html.escape(report["model"]["name"]),
        dataset=html.escape(report["dataset"]["name"]),
        images=report["dataset"]["images"],
        classes=report["dataset"]["classes"],
        settings=html.escape(f"Settings: {settings}."),
        head="".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in columns),
        body=body,
        figures="".join(
            f'<img alt="{name}" src="data:image/png;base64,{data}">'
            for name, data in zip(figures, pictures, strict=True)
        ),
    )


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if f"{name}_low" in row:
        return f"{value:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
