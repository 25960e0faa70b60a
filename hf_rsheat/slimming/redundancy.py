"""The redundancy report: what a model still knows at every width (arXiv 2601.22841)."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from ..auto import register
from ..errors import ConfigurationError
from ..evaluation.features import collect, read_image, untrained_like
from ..evaluation.statistics import corrected_interval, cross_validate, require_sklearn
from ..hub.records import weights_digest
from ..training.image_folder import scan_classes
from .calibration import ImageBatches
from .families import slim_widths
from .features import TrunkFeatures, latency, trunk_features
from .flops import flops
from .folder import calibration_batches, load_model
from .measures import redundancy_measures
from .published import PAPER_WIDTHS
from .slim import Correction, Keep, slim

PROBES = ("knn", "linear")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a report is made.

    Args:
        keep, correction: How models are slimmed, see `slim`.
        calibration_images: How many images of the data, without their labels, corrections and importance look at.
        probes: "knn", "linear" or both.
        neighbours: Neighbours that vote.
        folds, repeats: Every probe is scored in `repeats` seeded splits of `folds` parts.
        untrained: Networks with random weights that are slimmed in the same way: what design and images give away.
        latency_rounds: Timed forward passes of every width, in turns with the full model.
        batch_size: Images per forward pass.
        modality: Sensor of the images, for RS-vHeat.
        seed: For random units and the choice of calibration images.
    """

    keep: Keep = "first"
    correction: Correction | None = None
    calibration_images: int = 256
    probes: tuple[str, ...] = PROBES
    neighbours: int = 5
    folds: int = 5
    repeats: int = 5
    untrained: int = 1
    latency_rounds: int = 5
    batch_size: int = 16
    modality: str | None = None
    seed: int = 0


def redundancy(
    model_dir: str | Path,
    data: str | Path,
    output: str | Path,
    widths: Sequence[float] | None = None,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Slim a model to several widths, measure each, and write `report.html`, PNGs, `report.csv` and `report.json`.

    What is measured of a width is kept in `output/widths`; started again with the same model, data and settings, only
    what is missing is computed. Features stand beside it as safetensors.

    Args:
        model_dir: Model folder or Hub id.
        data: Folder with one sub-folder of images per class.
        output: Folder to write.
        widths: Width multipliers; the paper's 31 if None. The full model is always measured.
        settings: How.

    Returns:
        What is written to `report.json`.

    Raises:
        ConfigurationError: For widths outside (0, 1], or a model that cannot be slimmed or has no image processor.
        DataError: If the folder has no classes, or too few images.
        MissingExtraError: If scikit-learn or matplotlib is not installed.
    """
    from .redundancy_report import write_report  # needs matplotlib: refused before anything is computed

    require_sklearn()
    register()
    settings, output = settings or Settings(), Path(output)
    chosen = sorted({*(PAPER_WIDTHS if widths is None else widths), 1.0})
    if not 0 < chosen[0] <= chosen[-1] <= 1:
        raise ConfigurationError(f"Width multipliers must be in (0, 1], got {chosen[0]:g} to {chosen[-1]:g}.")
    study = _Study(model_dir, Path(data), output, settings)
    rows = study.measure(chosen)
    report = {
        "model": {"name": Path(model_dir).resolve().name, "weights_sha256": weights_digest(model_dir)},
        "dataset": {"name": Path(data).resolve().name, "images": len(study.labels), "classes": len(study.classes)},
        "settings": asdict(settings),
        "rows": [_compared(row, rows[-1], settings) for row in rows],
    }
    write_report(report, study.features_of, output)
    return report


class _Study:
    """A model, labelled images, and the widths measured so far."""

    def __init__(self, model_dir: str | Path, data: Path, output: Path, settings: Settings) -> None:
        self.settings, self.root, self.folder = settings, data, output / "widths"
        model, processor = load_model(model_dir)
        if processor is None:
            raise ConfigurationError(f"{model_dir} has no image processor: save it beside the weights.")
        self.full = trunk_features(model, processor, settings.modality)
        samples, self.classes = scan_classes(data, settings.modality or "optical")
        self.labels = {sample.files[0][1]: int(sample.label or 0) for sample in samples}
        sizes = [(path, (data / path).stat().st_size) for path in self.labels]
        self.identity = repr((weights_digest(model_dir), str(self.full.model.config), asdict(settings), sizes))
        networks = [untrained_like(self.full, seed) for seed in range(settings.untrained)]
        self.untrained = [TrunkFeatures(n.model, n.processor, n.modality) for n in networks]
        self.calibration = self._calibration()
        self.folder.mkdir(parents=True, exist_ok=True)

    def _calibration(self) -> ImageBatches | None:
        settings = self.settings
        if settings.correction is None and settings.keep != "importance":
            return None
        arguments = (settings.calibration_images, settings.modality, settings.seed, settings.batch_size)
        return calibration_batches(self.full.model, self.full.processor, self.root, *arguments)

    def _path(self, width: float) -> Path:
        config = self.full.model.config
        units = slim_widths(config, width, ("attn", "ffn"))
        key = hashlib.sha256(repr((self.identity, units)).encode()).hexdigest()[:12]
        return self.folder / f"{width:g}-{key}.json"

    def features_of(self, width: float) -> NDArray[np.float32]:
        """Features of a width that was measured, `(images, dimensions)`."""
        return load_file(self._path(width).with_suffix(".safetensors"))["features"]

    def measure(self, chosen: Sequence[float]) -> list[dict[str, Any]]:
        """A row per width; widths that lead to the same model are measured once."""
        rows: dict[str, dict[str, Any]] = {}
        with tqdm(chosen, desc="widths", unit="width") as progress:
            for width in progress:
                progress.set_postfix(width=width)
                units = repr(slim_widths(self.full.model.config, width, ("attn", "ffn")))
                path = self._path(width)
                rows[units] = json.loads(path.read_text()) if path.is_file() else self._measure(width, path)
        return list(rows.values())

    def _measure(self, width: float, path: Path) -> dict[str, Any]:
        small = self._slimmed(self.full, width)
        vectors, labels = self._features(small, f"width {width:g}")
        images = [read_image(self.root / path) for path in list(self.labels)[: min(8, self.settings.batch_size)]]
        inputs = self.full.inputs(images)
        row: dict[str, Any] = {
            "width": width,
            "units": slim_widths(self.full.model.config, width, ("attn", "ffn")),
            "flops": flops(small.model, tuple(inputs["pixel_values"].shape[-2:])),
            "parameters": sum(parameter.numel() for parameter in small.model.parameters()),
            **latency(self.full.model, small.model, inputs, self.settings.latency_rounds),
            **redundancy_measures(vectors),
            "scores": self._scores(vectors, labels),
        }
        for index, network in enumerate(self.untrained):
            theirs = self._features(self._slimmed(network, width), f"untrained {index}")[0]
            row.setdefault("untrained_scores", []).append(self._scores(theirs, labels))
        save_file({"features": np.ascontiguousarray(vectors)}, path.with_suffix(".safetensors"))
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(row), encoding="utf-8")
        draft.replace(path)  # last, and at once: a row that exists is complete
        return row

    def _slimmed(self, extractor: TrunkFeatures, width: float) -> TrunkFeatures:
        settings = self.settings
        model = slim(
            extractor.model,
            width,
            keep=settings.keep,
            correction=settings.correction if width < 1 else None,
            calibration=self.calibration,
            seed=settings.seed,
        )
        return TrunkFeatures(model, extractor.processor, extractor.modality)

    def _features(self, extractor: TrunkFeatures, title: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        paths, batch_size = list(self.labels), self.settings.batch_size
        found = collect(extractor, paths, root=self.root, batch_size=batch_size, title=title)
        self.labels = {path: self.labels[path] for path in found.paths}  # what follows keeps to the readable ones
        return found.vectors, np.array(list(self.labels.values()))

    def _scores(self, vectors: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, list[float]]:
        settings = self.settings
        return {
            probe: cross_validate(vectors, labels, probe, settings.folds, settings.repeats, settings.neighbours)[
                "accuracy"
            ]
            for probe in settings.probes
        }


def _compared(row: dict[str, Any], full: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """A row with accuracies, their intervals, and what it keeps of the full model's accuracy."""
    result = {name: value for name, value in row.items() if not name.endswith("scores")}
    result["compute"] = row["flops"] / full["flops"]
    for probe in settings.probes:
        mine, theirs = np.array(row["scores"][probe]), np.array(full["scores"][probe])
        result[probe] = {
            "accuracy": corrected_interval(mine.tolist(), settings.folds),
            "retention": _ratio(mine, theirs, settings.folds),
        }
        if settings.untrained:
            mine_untrained, full_untrained = (
                np.mean([scores[probe] for scores in side["untrained_scores"]], axis=0) for side in (row, full)
            )
            result[probe]["untrained_accuracy"] = corrected_interval(mine_untrained.tolist(), settings.folds)
            result[probe]["retention_above_untrained"] = _ratio(
                mine - mine_untrained, theirs - full_untrained, settings.folds
            )
    return result


def _ratio(mine: NDArray[np.float64], theirs: NDArray[np.float64], folds: int) -> dict[str, Any]:
    """Ratio of two means of paired folds with a 95 % interval, by the delta method with the corrected variance."""
    below = float(theirs.mean())
    if below == 0:
        return {"value": float("nan"), "interval95": [float("nan"), float("nan")]}
    value = float(mine.mean()) / below
    low, high = corrected_interval(((mine - value * theirs) / below).tolist(), folds)["interval95"]
    return {"value": value, "interval95": [value + low, value + high]}
